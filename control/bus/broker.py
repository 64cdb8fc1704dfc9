"""The FastStream broker: publishers of every event, and the consumers a worker runs.

Redis is never the queue (an acknowledged entry may be gone after a crash), so what is consumed here only saves time
or can be sent again by its producer.
"""

# No postponed annotations here: FastStream reads the handlers' types, which are local names.

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from faststream import AckPolicy
from faststream.redis import RedisBroker, StreamSub
from faststream.redis.annotations import RedisStreamMessage
from faststream.specification import AsyncAPI
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from control.bus.events import CONSUMED, PUBLISHED, ClientMetricsUpdated, PredictionReady

log = structlog.get_logger(__name__)

GROUP = "control"
# About an hour of a busy deployment; readers that are away longer read tables.
STREAM_LENGTH = 10_000
# A consumer that took an entry and died loses it to another one after this long.
RECLAIM_AFTER_MS = 15_000
MAX_DELIVERIES = 3
DEAD_LETTERS = "cloudoptim.bus.dead"
GRACEFUL_SECONDS = 5.0
WATCH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Handlers:
    """What a worker does with the events it consumes. Each may be called more than once with the same event."""

    metrics_updated: Callable[[ClientMetricsUpdated], Awaitable[None]]
    prediction_ready: Callable[[PredictionReady], Awaitable[None]]


def make_broker(redis_url: str, handlers: Handlers | None = None, *, consumer: str | None = None) -> RedisBroker:
    """A broker that is not connected yet. Without ``handlers`` it only publishes."""
    broker = RedisBroker(redis_url, graceful_timeout=GRACEFUL_SECONDS, logger=None)  # type: ignore[arg-type]
    for topic, event in PUBLISHED.items():
        broker.publisher(stream=StreamSub(topic, maxlen=STREAM_LENGTH), schema=event, title=topic)
    if handlers is not None:
        consumer = consumer or f"{socket.gethostname()}"
        _subscribe(broker, "client.metrics.updated", ClientMetricsUpdated, handlers.metrics_updated, consumer)
        _subscribe(broker, "ml.prediction.ready", PredictionReady, handlers.prediction_ready, consumer)
    return broker


def _subscribe(
    broker: RedisBroker, topic: str, event: type[Any], handle: Callable[[Any], Awaitable[None]], consumer: str
) -> None:
    # FastStream's default leaves a failed entry pending for ever: the second subscriber claims what idles (TOOLING §3).
    @broker.subscriber(
        stream=StreamSub(topic, group=GROUP, consumer=consumer, polling_interval=2_000),
        ack_policy=AckPolicy.NACK_ON_ERROR,
        title=topic,
    )
    async def consume(body: event) -> None:  # type: ignore[valid-type]
        await handle(body)

    @broker.subscriber(
        stream=StreamSub(
            topic,
            group=GROUP,
            consumer=f"{consumer}-reclaims",
            min_idle_time=RECLAIM_AFTER_MS,
            polling_interval=2_000,
        ),
        ack_policy=AckPolicy.NACK_ON_ERROR,
        title=f"{topic} (reclaimed)",
        include_in_schema=False,
    )
    async def reclaim(body: event, message: RedisStreamMessage) -> None:  # type: ignore[valid-type]
        if await message.get_delivery_count() >= MAX_DELIVERIES:
            log.error("bus.dead_letter", topic=topic)
            await broker.publish(body, stream=DEAD_LETTERS)
            return
        await handle(body)


async def create_groups(redis_url: str) -> None:
    """Create the consumer groups from the beginning of their streams.

    FastStream would create them at the end, and skip what was published while no worker ran.
    """
    async with Redis.from_url(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
        for topic in CONSUMED:
            try:
                await client.xgroup_create(topic, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise


async def keep_consuming(redis_url: str, handlers: Handlers, stop: asyncio.Event, *, consumer: str) -> None:
    """Consume until ``stop`` is set, through restarts and wipes of Redis.

    A subscriber whose group vanished stops for good while the broker still answers pings, so the subscribers
    themselves are watched.
    """
    while not stop.is_set():
        broker = make_broker(redis_url, handlers, consumer=consumer)
        try:
            await create_groups(redis_url)
            await broker.start()
            while not stop.is_set():
                await _pause(stop, WATCH_SECONDS)
                running = all(subscriber.running for subscriber in broker.subscribers)
                if not running or not await broker.ping(timeout=2.0):
                    log.warning("bus.consumers_stopped")
                    break
                await create_groups(redis_url)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("bus.away", error=type(error).__name__)
        finally:
            try:
                await broker.stop()
            except (RedisError, OSError, TimeoutError) as error:
                log.info("bus.stopped_hard", error=type(error).__name__)
        await _pause(stop, WATCH_SECONDS)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


async def _nothing(_: Any) -> None:
    return None


def specification() -> dict[str, Any]:
    """The AsyncAPI document of the bus: everything published and consumed, with schemas. Names no real address."""
    broker = make_broker("redis://redis:6379", Handlers(_nothing, _nothing), consumer="worker")
    document = AsyncAPI(broker, title="CloudOptim events", version="1.0.0").to_specification()
    return document.to_jsonable()
