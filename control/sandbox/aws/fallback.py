"""moto for everything the sandbox does not do itself: S3, IAM, EventBridge, CloudWatch, the rest of EC2 and STS.

Imported at first use, since it costs half a second and some 60 MB. moto's state is in memory, shared by the process and
gone at the end of it, except for the objects on S3 (buckets.py); accounts keep sandboxes apart.
"""

import threading
from collections.abc import Callable
from io import BytesIO
from typing import Any

from control.sandbox.aws.buckets import Buckets
from control.sandbox.aws.protocol import Answer


class Moto:
    """moto's own WSGI application, called in process, one request at a time (its backends take no locks)."""

    def __init__(self, buckets: Buckets | None = None) -> None:
        self._lock = threading.Lock()
        self._buckets = buckets
        self._application: Callable[..., Any] | None = None

    def call(
        self,
        *,
        method: str,
        path: str,
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        account_id: str,
        service: str,
        region: str,
    ) -> Answer:
        """Answer one HTTP request on behalf of an account; blocking, to be run in a thread."""
        with self._lock:
            answer = self._ask(method=method, path=path, query=query, headers=headers, body=body, account_id=account_id)
            if self._buckets is not None and service == "s3" and answer.status < 300:
                self._buckets.follow(
                    self._ask,
                    method=method,
                    path=path,
                    query=query,
                    body=body,
                    account_id=account_id,
                    region=region,
                )
            return answer

    def close(self) -> None:
        """Close the file of the buckets, after the call under way."""
        with self._lock:
            if self._buckets is not None:
                self._buckets.close()

    def _ask(
        self, *, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]], body: bytes, account_id: str
    ) -> Answer:
        from werkzeug.test import run_wsgi_app

        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path.encode().decode("latin-1"),
            "QUERY_STRING": query.decode("latin-1"),
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(body),
            "wsgi.errors": BytesIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
            "HTTP_X_MOTO_ACCOUNT_ID": account_id,
        }
        for raw_name, raw_value in headers:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            if name in ("content-length", "transfer-encoding"):
                continue
            environ["CONTENT_TYPE" if name == "content-type" else f"HTTP_{name.upper().replace('-', '_')}"] = value
        environ["CONTENT_LENGTH"] = str(len(body))
        chunks, status, answered = run_wsgi_app(self._load(), environ, buffered=True)
        payload = b"".join(chunks)
        hop = ("content-length", "transfer-encoding", "connection", "content-type", "server", "date")
        kept = tuple((k.lower().encode(), v.encode("latin-1")) for k, v in answered if k.lower() not in hop)
        length = answered.get("content-length")
        if method == "HEAD" and length is not None:
            kept += ((b"content-length", length.encode()),)
        return Answer(int(status.split()[0]), payload, answered.get("content-type", "text/plain"), kept)

    def _load(self) -> Callable[..., Any]:
        if self._application is None:
            from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

            self._application = DomainDispatcherApplication(create_backend_app)
            if self._buckets is not None:
                self._buckets.fill(self._ask)
        return self._application
