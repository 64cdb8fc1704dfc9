"""/healthz, /readyz and /metrics, and the bus that readiness reports on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from faststream.redis import RedisBroker
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError
from sqlalchemy import text

from control.bus.broker import make_broker
from control.context import AppContext, Context

CHECK_SECONDS = 1.5
RECONNECT_SECONDS = 5.0

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


@router.get("/healthz", responses={})
async def healthz() -> dict[str, str]:
    """The process answers. Says nothing of what it needs: restarting it would not bring a database back."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(context: Context) -> JSONResponse:
    """Whether this process can serve, part by part; 503 names what is missing. Redis and the bus cost only speed, so
    their absence is shown as `degraded` and does not take the process out of service."""
    parts = dict(
        zip(
            ("postgres", "redis", "subscribers"),
            await asyncio.gather(_postgres(context), _redis(context), _subscribers(context)),
            strict=True,
        )
    )
    missing = [name for name, state in parts.items() if state != "ok"]
    ready = parts["postgres"] == "ok"
    status = "ready" if not missing else "degraded" if ready else "not ready"
    return JSONResponse(
        {"status": status, "missing": missing, "parts": parts},
        200 if ready else 503,
        headers={} if ready else {"Retry-After": "2"},
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics() -> Response:
    """Prometheus metrics of this process."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _postgres(context: AppContext) -> str:
    try:
        async with asyncio.timeout(CHECK_SECONDS), context.intake_db.system() as conn:
            revision = await conn.execute(text("SELECT to_regclass('user_sessions') IS NOT NULL"))
            return "ok" if revision.scalar_one() else "the schema is not migrated; run `cloudoptim migrate`"
    except Exception as error:
        return f"does not answer ({type(error).__name__}); check DATABASE_URL"


async def _redis(context: AppContext) -> str:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await context.redis.ping()
    except Exception as error:
        return f"does not answer ({type(error).__name__}); check REDIS_URL"
    return "ok"


async def _subscribers(context: AppContext) -> str:
    if not context.bells.connected:
        return "doorbells are not subscribed; work is found by polling"
    if context.broker is None:
        return "the event bus is not connected"
    return "ok"


@asynccontextmanager
async def broker_running(context: AppContext) -> AsyncIterator[None]:
    """Keep the event bus connected for as long as the application runs. It may come and go with Redis."""
    task = asyncio.create_task(_keep_broker(context), name="bus")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _keep_broker(context: AppContext) -> None:
    while True:
        broker = make_broker(context.settings.redis_url)
        try:
            await broker.start()
            context.broker = broker
            await _until_gone(broker)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("bus.away", error=type(error).__name__)
        finally:
            context.broker = None
            with contextlib.suppress(Exception):
                await broker.stop()
        await asyncio.sleep(RECONNECT_SECONDS)


async def _until_gone(broker: RedisBroker) -> None:
    # Nothing tells when Redis goes away; asking every few seconds is how one learns.
    while await broker.ping(timeout=2.0):  # noqa: ASYNC110
        await asyncio.sleep(RECONNECT_SECONDS)
