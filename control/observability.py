"""Request ids, request logs, metrics, security headers, and the last net under every request."""

from __future__ import annotations

import re
import time
from uuid import uuid4

import structlog
from prometheus_client import Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control.problems import internal_error

log = structlog.get_logger(__name__)

REQUESTS = Counter("cloudoptim_http_requests_total", "Requests answered", ["method", "route", "status"])
SECONDS = Histogram(
    "cloudoptim_http_request_seconds",
    "Time to answer, long polls included",
    ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
SAMPLES = Counter("cloudoptim_metric_samples_total", "Samples of agents", ["outcome"])
BATCHES = Counter("cloudoptim_metric_batches_total", "Batches of agents", ["outcome"])
TASKS_LEASED = Counter("cloudoptim_tasks_leased_total", "Tasks handed to agents", ["task_type"])
TASK_REPORTS = Counter("cloudoptim_task_reports_total", "Reports of agents", ["status", "applied"])
SOCKETS = Gauge("cloudoptim_websockets", "Open sockets", ["kind"])

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{8,64}$")
# Pages of ours load nothing from elsewhere; the API's answers are no pages at all.
API_POLICY = b"default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    b"default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"frame-ancestors 'none'"
)
PAGES = frozenset({"/docs", "/asyncapi"})
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-site"),
)


class Observe:
    """Outermost middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _REQUEST_ID.match(given) else uuid4().hex
        scope["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started, status, has_started = time.perf_counter(), 500, False
        page = scope["path"] in PAGES

        async def send_with_headers(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                headers = message.setdefault("headers", [])
                present = {name.lower() for name, _ in headers}
                headers.append((b"x-request-id", request_id.encode()))
                headers.extend(header for header in SECURITY_HEADERS if header[0] not in present)
                if b"content-security-policy" not in present:
                    headers.append((b"content-security-policy", PAGE_POLICY if page else API_POLICY))
                if b"cache-control" not in present and scope["path"].startswith("/api/"):
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499
        except Exception:
            log.exception("request.failed", method=scope["method"], route=_route(scope))
            if not has_started:
                await internal_error(request_id)(scope, receive, send_with_headers)
        finally:
            elapsed, route = time.perf_counter() - started, _route(scope)
            REQUESTS.labels(scope["method"] if scope["method"] in _METHODS else "other", route, status).inc()
            SECONDS.labels(scope["method"] if scope["method"] in _METHODS else "other", route).observe(elapsed)
            if status >= 400 or elapsed > 1:
                principal = scope.get("principal")
                log.info(
                    "request",
                    method=scope["method"],
                    route=route,
                    status=status,
                    seconds=round(elapsed, 4),
                    actor=principal.actor if principal else None,
                )


_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


def _route(scope: Scope) -> str:
    """The route's template; a path nobody serves must not become a label or a log line of its own."""
    route = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None) or "unmatched"
