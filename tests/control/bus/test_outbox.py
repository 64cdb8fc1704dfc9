"""Rows of the outbox become events on Redis streams at least once, whatever Redis does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis.asyncio as redis
from sqlalchemy import text

from control.bus import make_broker, outbox, specification
from control.bus.broker import GROUP, keep_consuming
from control.bus.events import CONSUMED, PUBLISHED
from control.interruptions.consumers import handlers
from control.interruptions.repository import insert_rows
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


async def _add(db: Database, *topics: str) -> None:
    rows = [
        {
            "id": new_id(),
            "topic": topic,
            "payload": {"task_id": new_id(), "cluster_id": new_id(), "task_type": "drain_node", "state": "done"},
        }
        for topic in topics
    ]
    async with db.system() as conn:
        await insert_rows(conn, "outbox", rows, order="id")


async def _rows(db: Database, sql: str) -> list[Any]:
    async with db.system() as conn:
        return list((await conn.execute(text(sql))).all())


async def test_events_arrive_typed_and_are_not_sent_again(db: Database, clean_redis_url: str) -> None:
    broker = make_broker(clean_redis_url)
    await broker.connect()
    await _add(db, "task.created", "task.finished")
    assert await outbox.relay_once(db, broker) == 2
    assert await outbox.relay_once(db, broker) == 0
    async with redis.Redis.from_url(clean_redis_url) as client:
        for topic in ("task.created", "task.finished"):
            assert await client.xlen(topic) == 1
    await broker.stop()


async def test_what_is_no_event_is_kept_aside_and_blocks_nothing(db: Database, clean_redis_url: str) -> None:
    broker = make_broker(clean_redis_url)
    await broker.connect()
    await _add(db, "nobody.declared.this", "gap.filled", "task.created")
    await outbox.relay_once(db, broker)
    rows = {row.topic: row for row in await _rows(db, "SELECT topic, published_at, error FROM outbox")}
    assert rows["task.created"].published_at is not None
    # gap.filled lacks its fill_id; the other topic is unknown.
    for topic in ("nobody.declared.this", "gap.filled"):
        assert (rows[topic].published_at, bool(rows[topic].error)) == (None, True)
    assert await outbox.relay_once(db, broker) == 0
    await broker.stop()


async def test_while_redis_is_away_nothing_is_lost(db: Database, clean_redis_url: str) -> None:
    await _add(db, "task.created")
    unconnected = make_broker("redis://127.0.0.1:1")
    with pytest.raises(Exception, match=r".*"):
        await outbox.relay_once(db, unconnected)
    (row,) = await _rows(db, "SELECT published_at, next_attempt_at > now() AS later FROM outbox")
    assert row.published_at is None
    broker = make_broker(clean_redis_url)
    await broker.connect()
    await _rows(db, "UPDATE outbox SET next_attempt_at = now() RETURNING 1")
    assert await outbox.relay_once(db, broker) == 1
    await broker.stop()


async def test_two_relays_share_the_rows(db: Database, clean_redis_url: str) -> None:
    brokers = [make_broker(clean_redis_url) for _ in range(2)]
    for broker in brokers:
        await broker.connect()
    await _add(db, *["task.created"] * 300)
    claimed = await asyncio.gather(*(outbox.relay_once(db, broker) for broker in brokers))
    assert sum(claimed) == 300
    async with redis.Redis.from_url(clean_redis_url) as client:
        assert await client.xlen("task.created") == 300
    for broker in brokers:
        await broker.stop()


def _prediction(event_id: Any) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat()
    return {
        "event_id": str(event_id),
        "predictions": [
            {
                "kind": "interruption",
                "subject": "m5.large/use1-az1",
                "window_start": now,
                "window_end": now,
                "value": 0.1,
                "model_version": "1",
                "made_at": now,
                "made_by": "ml_server",
            }
        ],
    }


async def _until(condition: Any, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - what is waited for is another process's doing
            await asyncio.sleep(0.05)


async def test_predictions_are_stored_once_and_consuming_survives_a_wiped_redis(
    db: Database, clean_redis_url: str
) -> None:
    from control.bus.bells import Bells

    bells, stop = Bells(clean_redis_url), asyncio.Event()
    broker = make_broker(clean_redis_url)
    await broker.connect()
    # Published before any worker ran: FastStream's own group would begin after it.
    first = new_id()
    await broker.publish(_prediction(first), stream="ml.prediction.ready")
    task = asyncio.create_task(keep_consuming(clean_redis_url, handlers(db, bells), stop, consumer="test"))

    async def stored(count: int) -> bool:
        return len(await _rows(db, "SELECT id FROM predictions")) == count

    await _until(lambda: stored(1))
    await broker.publish(_prediction(first), stream="ml.prediction.ready")
    await broker.publish(_prediction(new_id()), stream="ml.prediction.ready")
    await _until(lambda: stored(2))
    async with redis.Redis.from_url(clean_redis_url) as client:
        await client.flushall()

        async def subscribed_again() -> bool:
            return bool(await client.exists("ml.prediction.ready")) and bool(
                [group for group in await client.xinfo_groups("ml.prediction.ready") if group["name"] == GROUP.encode()]
            )

        await _until(subscribed_again)
        await broker.publish(_prediction(new_id()), stream="ml.prediction.ready")
        await _until(lambda: stored(3))
    stop.set()
    await asyncio.wait_for(task, 15)
    await broker.stop()
    await bells.close()


def test_the_document_names_every_event_and_no_address() -> None:
    document = specification()
    assert set(document["channels"]) == set(PUBLISHED) | set(CONSUMED)
    for model in (*PUBLISHED.values(), *CONSUMED.values()):
        assert model.__name__ in document["components"]["schemas"]
    assert "127.0.0.1" not in json.dumps(document)
