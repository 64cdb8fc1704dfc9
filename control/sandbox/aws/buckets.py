"""S3 buckets that outlive the process: moto answers, and every object it holds is also in one SQLite file.

Level-triggered: after a call that may have changed an object, moto is asked what the object is now and the file is
made to say the same, before the client gets its answer. So the file needs no knowledge of copies, parts or
preconditions, and a killed sandbox has every object whose write was acknowledged. Versions, policies and other settings
of buckets are not kept; uploads in parts that were not completed are forgotten, as by a lifecycle rule.
"""

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, quote
from xml.sax.saxutils import unescape

import msgspec

from control.sandbox.aws.protocol import Answer

_KEPT_HEADERS = re.compile(r"content-encoding|content-disposition|content-language|cache-control|x-amz-meta-.+")

Ask = Callable[..., Answer]
"""`Ask(method=, path=, query=, headers=, body=, account_id=)`: moto's answer."""


class Buckets:
    """The file; used under the lock that keeps moto to one call at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS bucket (name TEXT PRIMARY KEY, account_id TEXT, region TEXT, body BLOB)"
        )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS object "
            "(bucket TEXT, key TEXT, headers BLOB, body BLOB, PRIMARY KEY (bucket, key))"
        )

    def close(self) -> None:
        self._db.close()

    def fill(self, ask: Ask) -> None:
        """Put everything kept into a fresh moto."""
        for name, account_id, region, body in self._db.execute("SELECT * FROM bucket").fetchall():
            ask(method="PUT", path=f"/{name}", query=b"", headers=_signed(region), body=body, account_id=account_id)
            rows = self._db.execute("SELECT key, headers, body FROM object WHERE bucket = ? ORDER BY key", (name,))
            for key, headers, content in rows:
                given = [(n.encode(), v.encode()) for n, v in msgspec.json.decode(headers).items()]
                ask(
                    method="PUT",
                    path=f"/{name}/{key}",
                    query=b"",
                    headers=[*_signed(region), *given],
                    body=content,
                    account_id=account_id,
                )

    def follow(
        self, ask: Ask, *, method: str, path: str, query: bytes, body: bytes, account_id: str, region: str
    ) -> None:
        """Keep what a successful call has changed."""
        if method not in ("PUT", "POST", "DELETE"):
            return
        name, _, key = path.removeprefix("/").partition("/")
        named = parse_qs(query.decode("latin-1"), keep_blank_values=True)
        if key:
            if "partNumber" not in named and "uploads" not in named:
                self._sync(ask, name, key, account_id, region)
        elif "delete" in named:
            for found in re.findall(r"<Key>(.*?)</Key>", body.decode(), re.DOTALL):
                self._sync(ask, name, unescape(found, {"&quot;": '"', "&apos;": "'"}), account_id, region)
        elif method == "PUT" and not set(named) - {"x-id"}:
            self._db.execute("INSERT OR IGNORE INTO bucket VALUES (?, ?, ?, ?)", (name, account_id, region, body))
        elif method == "DELETE" and not set(named) - {"x-id"}:
            self._db.execute("DELETE FROM bucket WHERE name = ?", (name,))
            self._db.execute("DELETE FROM object WHERE bucket = ?", (name,))

    def _sync(self, ask: Ask, bucket: str, key: str, account_id: str, region: str) -> None:
        answer = ask(
            method="GET", path=f"/{bucket}/{key}", query=b"", headers=_signed(region), body=b"", account_id=account_id
        )
        if answer.status == 200:
            headers = {
                n.decode(): v.decode("latin-1") for n, v in answer.headers if _KEPT_HEADERS.fullmatch(n.decode())
            }
            headers["content-type"] = answer.content_type
            row = (bucket, key, msgspec.json.encode(headers), answer.body)
            self._db.execute("REPLACE INTO object VALUES (?, ?, ?, ?)", row)
        elif answer.status == 404:
            self._db.execute("DELETE FROM object WHERE bucket = ? AND key = ?", (bucket, key))


def _signed(region: str) -> list[tuple[bytes, bytes]]:
    """As moto reads them, a call's region and service are in its signature."""
    credential = f"AWS4-HMAC-SHA256 Credential=SANDBOX/20260101/{quote(region)}/s3/aws4_request"
    return [(b"authorization", credential.encode()), (b"host", b"127.0.0.1")]
