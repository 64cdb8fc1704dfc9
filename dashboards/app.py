"""The dashboards process: pages, downloads and sign-in on one port."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import sys
from collections.abc import Callable
from typing import Any

import panel as pn
from panel.io.server import get_server
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import OutputTransform, RedirectHandler, StaticFileHandler
from tornado.websocket import WebSocketClosedError

from dashboards import components as ui
from dashboards.api import ControlApi
from dashboards.auth import COOKIE, LoginAuth, LoginHandler, Logins, LogoutHandler
from dashboards.config import DashboardSettings, DashboardSettingsError
from dashboards.data import Data
from dashboards.export import DownloadHandler, Export, ReportHandler
from dashboards.pages import cost, gaps, interruptions, nodes, prices, reports
from dashboards.shell import PageSpec, Services, page

log = logging.getLogger("cloudoptim.dashboards")

PAGES: tuple[PageSpec, ...] = (
    PageSpec("cost", "Cost", "payments", cost.build),
    PageSpec("interruptions", "Interruptions", "bolt", interruptions.build),
    PageSpec("gaps", "Gap filler", "event_busy", gaps.build),
    PageSpec("nodes", "Clusters and nodes", "dns", nodes.build),
    PageSpec("prices", "Spot prices", "show_chart", prices.build),
    PageSpec("reports", "Reports", "description", reports.build),
)
EXPORTS: dict[str, Export] = {
    "cost": cost.export,
    "gaps": gaps.export,
    "interruptions": interruptions.export,
    "nodes": nodes.export,
    "prices": prices.export,
    "savings": reports.export,
}

# How long a page may be open and still connect again after a break; its session is made anew if it is gone.
PAGE_TOKEN_SECONDS = 12 * 3600
# A closed page's session is about 2 MB.
UNUSED_SESSION_MS = 30_000
_SCRIPT = re.compile(rb"<script(?=[ >])")


class SecurityHeaders(OutputTransform):
    """Headers of every answer. A page runs our own script files and the inline scripts it was served with (they get
    the answer's nonce, which es-module-shims hands on), nothing that came in with data.

    ``unsafe-eval`` is what Bokeh's compiled templates need; ``blob:`` is how Panel loads components.
    """

    def __init__(self, request: HTTPServerRequest) -> None:
        self.request = request

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        """Add the headers before the answer leaves."""
        nonce = secrets.token_urlsafe(16)
        if finishing and headers.get("Content-Type", "").startswith("text/html"):
            chunk = _SCRIPT.sub(b'<script nonce="' + nonce.encode() + b'"', chunk)
            if "Content-Length" in headers:
                headers["Content-Length"] = str(len(chunk))
        headers["Content-Security-Policy"] = (
            "default-src 'self'; "
            f"script-src 'self' 'unsafe-eval' blob: 'nonce-{nonce}'; "
            "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
            f"connect-src 'self' blob: ws://{self.request.host} wss://{self.request.host}; "
            "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
        )
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "same-origin"
        return status_code, headers, chunk


class Dashboards:
    """The server and what it holds; ``start`` listens, ``stop`` lets go of everything."""

    def __init__(self, settings: DashboardSettings) -> None:
        secret = settings.cookie_secret
        self.settings = settings
        self.data = Data(settings)
        self.api = ControlApi(settings.control_url)
        self.logins = Logins(secret, settings.session_hours)
        services = Services(settings, self.data, self.api, self.logins)
        pn.extension(notifications=False, throttled=True)
        # No page asks a CDN for anything: all resources come from this server.
        pn.config.loading_indicator = False
        shared = {"settings": settings, "logins": self.logins, "api": self.api}
        self.server = get_server(
            {f"/{spec.slug}": _maker(services, spec) for spec in PAGES},
            address=settings.host,
            port=settings.port,
            title={f"/{spec.slug}": f"{spec.title} · CloudOptim" for spec in PAGES},
            liveness="liveness",
            cookie_secret=secret,
            auth_provider=LoginAuth(self.logins),
            secret_key=secret.encode(),
            sign_sessions=True,
            session_token_expiration=PAGE_TOKEN_SECONDS,
            unused_session_lifetime=UNUSED_SESSION_MS,
            # Scripts can read a page's token: it must not repeat the cookie.
            exclude_headers=["Cookie", "Authorization"],
            exclude_cookies=[COOKIE],
            websocket_origin=settings.allowed_origins(settings.port),
            extra_patterns=[
                (r"/", RedirectHandler, {"url": f"/{PAGES[0].slug}", "permanent": False}),
                (r"/login", LoginHandler, shared),
                (r"/logout", LogoutHandler, shared),
                (
                    r"/download/([a-z-]+)\.(csv|parquet)",
                    DownloadHandler,
                    {**shared, "data": self.data, "exports": EXPORTS},
                ),
                (r"/report/(\d{4}-\d{2})\.(html|csv|parquet|json|focus)", ReportHandler, shared),
                (r"/assets/(.*)", StaticFileHandler, {"path": str(ui.ASSETS)}),
            ],
        )
        self.server._tornado.add_transform(SecurityHeaders)

    @property
    def port(self) -> int:
        """Port it listens on."""
        port = self.server.port
        assert port is not None
        return port

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        self.server.start()
        self.server.io_loop.asyncio_loop.set_exception_handler(_unless_the_reader_left)  # type: ignore[attr-defined]
        log.info("dashboards on http://%s:%s", self.settings.host, self.port)
        self.server.io_loop.start()

    def stop(self) -> None:
        """Close the listener and all connections."""
        self.server.stop()
        self.data.close()


def _unless_the_reader_left(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A page closed while an update was on its way is no error; Tornado leaves that one in a task nobody awaits."""
    if not isinstance(context.get("exception"), WebSocketClosedError):
        loop.default_exception_handler(context)


def _maker(services: Services, spec: PageSpec) -> Callable[[], Any]:
    # A plain function: Panel would show any other callable as an object instead of calling it.
    def make() -> Any:
        return page(services, PAGES, spec)

    return make


def main() -> None:
    """Entry point of the process ``dashboards``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        dashboards = Dashboards(DashboardSettings())  # type: ignore[call-arg]
    except (DashboardSettingsError, OSError) as error:
        sys.exit(f"dashboards cannot start: {_explained(error)}")
    dashboards.run()


def _explained(error: Exception) -> Any:
    if isinstance(error, OSError):
        return f"{error.strerror or error} - the port is set by CLOUDOPTIM_DASHBOARDS_PORT"
    return error


if __name__ == "__main__":
    main()
