"""Several clusters' Kubernetes APIs behind one port, one path prefix each (`http://host:port/clusters/<name>`)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from control.sandbox.kubernetes.api import BOOKMARK_SECONDS, KubernetesApi, Usage, half_of_requests
from control.sandbox.kubernetes.controllers import ORPHAN_POD_SECONDS, ControllerManager
from control.sandbox.kubernetes.store import Store

# Watches are long requests: on stop they are ended by the store, and whatever still hangs is cut after this long.
SHUTDOWN_SECONDS = 2


class Cluster:
    """One cluster: its store, its controllers and its API."""

    def __init__(
        self,
        name: str,
        *,
        tokens: Iterable[str],
        read_only_tokens: Iterable[str] = (),
        usage: Usage = half_of_requests,
        bookmark_seconds: float = BOOKMARK_SECONDS,
        orphan_pod_seconds: float = ORPHAN_POD_SECONDS,
        extra_routes: Iterable[Route] = (),
        store: Store | None = None,
    ) -> None:
        self.name = name
        self.store = store or Store(name)
        self.controllers = ControllerManager(self.store, orphan_pod_seconds=orphan_pod_seconds)
        self.api = KubernetesApi(
            self.store,
            tokens=tokens,
            read_only_tokens=read_only_tokens,
            usage=usage,
            bookmark_seconds=bookmark_seconds,
            extra_routes=extra_routes,
        )


def clusters_app(clusters: Iterable[Cluster], extra_routes: Iterable[Route | Mount] = ()) -> Starlette:
    """One ASGI application with every cluster below `/clusters/<name>`."""
    mounts = [Mount(f"/clusters/{cluster.name}", app=cluster.api.app) for cluster in clusters]
    return Starlette(routes=[*extra_routes, *mounts])


class QuietServer(uvicorn.Server):
    """uvicorn without its hands on the process's signals: whoever runs the loop decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers alone."""
        yield


class ServerThread:
    """An ASGI application served from a thread with its own event loop, on an address known before it starts.

    Used where the caller is synchronous (tests, scripts); the sandbox process runs the application on its own loop.
    `call` runs a function on that loop, which is how anything outside may touch a store.
    """

    def __init__(self, app: Starlette, *, host: str = "127.0.0.1", port: int = 0) -> None:
        # asyncio switches Nagle off only on sockets that name their protocol; without it every answer takes 40 ms.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self._socket.listen()
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        self._server = QuietServer(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubernetes-double", daemon=True)

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())

    def start(self) -> str:
        """Start and return the base URL; connections are accepted from now on."""
        self._thread.start()
        self._started.wait(10)
        return self.url

    def call(self, function: Callable, *arguments):
        """Run `function` on the server's loop and return its result."""
        assert self._loop is not None, "the server has not been started"

        async def run():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def stop(self) -> None:
        """Stop and wait; open watches are cut."""
        self._server.should_exit = True
        self._thread.join(10)
