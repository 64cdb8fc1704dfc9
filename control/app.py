"""The control service: one ASGI application for REST, WebSockets, the event bus and its documentation.

uvicorn --factory control.app:served
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import FrameType

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from sqlalchemy.exc import InterfaceError, OperationalError

from control import context as app_context
from control import health, observability, pages, problems
from control.agents import endpoints as agents
from control.agents.ingest import Ingest
from control.agents.watch import Watch
from control.bus.broker import specification
from control.clusters import endpoints as clusters
from control.customers import endpoints as customers
from control.gaps import endpoints as gaps
from control.interruptions import endpoints as interruptions
from control.reports import endpoints as reports
from control.security import endpoints as security
from control.security import service as security_service
from control.security.authentication import Authenticator
from control.security.body import BodyLimits
from control.security.limits import parse_limit
from control.security.outbound import parse_networks
from control.security.redaction import configure_logging
from control.settings import Settings, SettingsError, get_settings
from control.streams import endpoints as streams

API_PREFIX = "/api/v1"
ROUTERS: tuple[APIRouter, ...] = (
    security.router,
    customers.router,
    clusters.router,
    agents.router,
    interruptions.router,
    gaps.router,
    reports.router,
    streams.router,
)

log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; it connects when its lifespan starts.

    Raises:
        SettingsError: a setting is missing, weak or wrong; the message names the variable.
    """
    settings = settings or get_settings()
    check(settings)
    configure_logging(settings.log_level)
    app = FastAPI(
        title="CloudOptim",
        version=version("cloudoptim"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_lifespan,
        responses=COMMON_ANSWERS,
        redirect_slashes=False,
    )
    app.state.settings = settings
    for router in ROUTERS:
        app.include_router(router, prefix=API_PREFIX)
    app.include_router(health.router)
    pages.install(app, specification())
    problems.install(app)
    # The last added is the outermost.
    app.add_middleware(BodyLimits)
    if origins := [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key", "X-Request-Id"],
            expose_headers=["Retry-After", "X-Request-Id"],
            max_age=600,
        )
    app.add_middleware(observability.Observe)
    return app


def served() -> FastAPI:
    """The application of a process that does nothing else. What is imported stays: the collector goes over it no more,
    which would hold up every agent's request for a tenth of a second."""
    app = create_app()
    gc.collect()
    gc.freeze()
    return app


def check(settings: Settings) -> None:
    """Refuse what would only fail, or harm, later.

    Raises:
        SettingsError: names the variable.
    """
    settings.require_secrets()
    if "*" in settings.cors_origins:
        raise SettingsError("CORS_ORIGINS must list exact origins such as https://app.example.com; * is not allowed")
    for variable, text in (
        ("CLOUDOPTIM_OUTBOUND_ALLOW_CIDRS", settings.outbound_allow),
        ("CLOUDOPTIM_TRUSTED_PROXIES", settings.trusted_proxies),
    ):
        try:
            parse_networks(text)
        except ValueError as error:
            raise SettingsError(f"{variable}: {error}; give networks like 10.1.0.0/16, separated by commas") from None
    for variable, text in (
        ("CLOUDOPTIM_RATE_LIMIT_PER_KEY", settings.rate_limit_per_key),
        ("CLOUDOPTIM_RATE_LIMIT_PER_CUSTOMER", settings.rate_limit_per_customer),
    ):
        try:
            parse_limit(text)
        except ValueError:
            raise SettingsError(f"{variable} is {text!r}; give a limit like 6000/minute, or none") from None


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    context = app_context.build(settings)
    context.authenticator = Authenticator(
        context.db, context.tokens, context.pepper, context.limiter, parse_networks(settings.trusted_proxies)
    )
    context.ingest = Ingest(settings.database_url, context.bells)
    context.watch = Watch(context.db, context.bells)
    app.state.context = context
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(_close, context)
        await _until_ready(context)
        context.bells.start()
        await stack.enter_async_context(context.ingest.running())
        await stack.enter_async_context(context.watch.running())
        await stack.enter_async_context(health.broker_running(context))
        stack.enter_context(_answering_before_the_end(context.watch))
        log.info("control.started", sandbox=settings.sandbox)
        yield
        log.info("control.stopping")


@contextlib.contextmanager
def _answering_before_the_end(watch: Watch) -> Iterator[None]:
    """On SIGTERM, answer long polls before the server waits for their connections.

    The server handles the signal first and ends the lifespan last, when it has cut off whoever still waited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, theirs = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(watch.stop)
        if callable(theirs):
            theirs(number, frame)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, theirs)


async def _until_ready(context: app_context.AppContext) -> None:
    """Wait for the database as long as it takes; until then /readyz would only lie."""
    delay = 0.2
    while True:
        try:
            await security_service.ensure_admin_key(context)
            return
        except (OperationalError, InterfaceError, OSError) as error:
            log.warning("database.waiting", error=type(error).__name__)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)


async def _close(context: app_context.AppContext) -> None:
    for close in (context.bells.close, context.limiter.close, context.redis.aclose, context.aws.close):
        with contextlib.suppress(Exception):
            await close()
    await context.db.close()
    await context.intake_db.close()


COMMON_ANSWERS: dict[int | str, dict] = {
    status: {"model": problems.Problem, "description": description}
    for status, description in (
        (401, "No or wrong credentials"),
        (403, "Not allowed for this role"),
        (404, "Unknown, or another customer's"),
        (409, "In conflict with the current state"),
        (413, "Body too large"),
        (415, "Unsupported content type or encoding"),
        (422, "Not valid; `errors` names the fields"),
        (429, "Over a limit; see Retry-After"),
        (503, "Temporarily unavailable; see Retry-After"),
    )
}

DESCRIPTION = """Runs Kubernetes nodes on Spot instances, safely, and proves what it saved.

Send an API key or an access token as `Authorization: Bearer …` (or `X-API-Key: …`). Errors are RFC 9457 problem
details with a stable `type`. Times are RFC 3339 with a zone, money is USD, memory bytes, CPU cores.
"""
