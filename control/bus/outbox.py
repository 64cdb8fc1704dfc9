"""The outbox relay: rows written with what caused them become events on the bus, at least once."""

from __future__ import annotations

from uuid import UUID

import structlog
from faststream.redis import RedisBroker
from pydantic import ValidationError
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.bus.broker import STREAM_LENGTH
from control.bus.events import Event, typed
from warehouse.postgres.session import Database

log = structlog.get_logger(__name__)

# The bell wakes the relay; this is what a lost bell costs.
INTERVAL_SECONDS = 1.0
LIMIT = 500
MAX_BACKOFF_SECONDS = 300
KEEP_PUBLISHED_DAYS = 7

_CLAIM = text("""
    SELECT id, topic, payload FROM outbox
    WHERE published_at IS NULL AND next_attempt_at <= now()
    ORDER BY next_attempt_at LIMIT :limit FOR UPDATE SKIP LOCKED
""")
_PUBLISHED = text("UPDATE outbox SET published_at = now(), attempts = attempts + 1, error = NULL WHERE id = ANY(:ids)")
_FAILED = text("""
    UPDATE outbox SET attempts = attempts + 1, error = :error,
        next_attempt_at = now() + make_interval(secs => least(:most, power(2, least(attempts, 20))))
    WHERE id = ANY(:ids)
""")
# What can never be published is kept where it can be seen, and not tried again.
_QUARANTINED = text("""
    UPDATE outbox SET attempts = attempts + 1, error = :error, next_attempt_at = 'infinity' WHERE id = :id
""")
_FORGET = text("""
    DELETE FROM outbox WHERE id IN (
        SELECT id FROM outbox WHERE published_at < now() - make_interval(days => :days) LIMIT :limit)
""")


async def relay_once(db: Database, broker: RedisBroker) -> int:
    """Publish due rows; returns how many were claimed. The rows stay locked until Redis has them.

    Raises:
        sqlalchemy.exc.DBAPIError: Postgres is away; what was published meanwhile is published again.
    """
    async with db.system() as conn:
        rows = (await conn.execute(_CLAIM, {"limit": LIMIT})).all()
        if not rows:
            return 0
        events: list[tuple[UUID, str, Event]] = []
        for row in rows:
            try:
                events.append((row.id, row.topic, typed(row.topic, row.id, row.payload)))
            except (KeyError, ValidationError) as error:
                log.error("outbox.not_an_event", topic=row.topic, outbox_id=str(row.id), error=str(error)[:200])
                await conn.execute(_QUARANTINED, {"id": row.id, "error": str(error)[:1000]})
        await _publish(conn, broker, events)
    return len(rows)


async def _publish(conn: AsyncConnection, broker: RedisBroker, events: list[tuple[UUID, str, Event]]) -> None:
    if not events:
        return
    ids = [event_id for event_id, _, _ in events]
    try:
        client = broker._connection
        if client is None:
            raise ConnectionError("the bus is not connected")
        pipeline = client.pipeline(transaction=False)
        for event_id, topic, event in events:
            await broker.publish(
                event, stream=topic, maxlen=STREAM_LENGTH, correlation_id=str(event_id), pipeline=pipeline
            )
        await pipeline.execute()
    except (RedisError, OSError, TimeoutError) as error:
        await conn.execute(_FAILED, {"ids": ids, "error": type(error).__name__, "most": MAX_BACKOFF_SECONDS})
        raise
    await conn.execute(_PUBLISHED, {"ids": ids})


async def forget_old(db: Database) -> int:
    """Delete rows published long ago; returns how many."""
    async with db.system() as conn:
        return (await conn.execute(_FORGET, {"days": KEEP_PUBLISHED_DAYS, "limit": 10_000})).rowcount
