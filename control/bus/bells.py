"""Doorbells over Redis: they tell a waiting loop to look at its table now instead of at its next poll.

A bell carries a topic and ids, never a command, so a forged or a lost ring changes nothing but latency. Everyone who
waits on a bell also polls at least every two seconds (``POLL_SECONDS``).

    bells = Bells(redis_url)
    await bells.ring("tasks", cluster_id)

    async with bells.listen("tasks", cluster_id) as bell:
        while not (work := await look()):
            await bell.wait(POLL_SECONDS)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import redis.asyncio as redis
import structlog
from redis.exceptions import RedisError

POLL_SECONDS = 2.0
CHANNEL_PREFIX = "cloudoptim:bell:"

# A ring is worth less than the time a dead Redis would take to refuse it.
RING_TIMEOUT_SECONDS = 0.5
RING_PAUSE_AFTER_FAILURE_SECONDS = 1.0
RECONNECT_MIN_SECONDS = 0.1
RECONNECT_MAX_SECONDS = 5.0
# A subscription is asked for a sign of life after this long without a word, and given up after as long again: the peer
# of a half-open connection says nothing and refuses nothing. Meanwhile listeners poll.
SILENCE_SECONDS = 4.0

log = structlog.get_logger(__name__)


class Bell:
    """One listener. A ring between two waits is kept, so nothing is missed while the listener works."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake the listener."""
        self._rung.set()

    async def wait(self, timeout: float = POLL_SECONDS) -> bool:
        """Wait for a ring for at most ``timeout`` seconds; True when it rang."""
        # Not wait_for: before Python 3.12 it loses a cancel that meets a ring, and the listener would never end.
        try:
            async with asyncio.timeout(timeout):
                await self._rung.wait()
        except TimeoutError:
            return False
        self._rung.clear()
        return True


class Bells:
    """All bells of one process over two connections: one that rings, one pattern subscription that listens.

    The subscription starts with the first listener and reconnects for ever. After a reconnect every listener is
    woken once, because rings may have been missed.
    """

    def __init__(self, redis_url: str, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._client: redis.Redis = redis.Redis.from_url(
            redis_url,
            # Not a socket time-out: redis-py keeps it with wait_for, which loses a cancel before Python 3.12.
            socket_timeout=None,
            socket_connect_timeout=None,
            max_connections=16,
        )
        # A blocked read is normal here: no read time-out, `_next` finds a dead peer.
        self._listening_client: redis.Redis = redis.Redis.from_url(
            redis_url, socket_timeout=None, socket_connect_timeout=2.0
        )
        self._listeners: dict[str, set[Bell]] = {}
        self._task: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()
        self._silent_until = 0.0
        self._silence_seconds = silence_seconds

    @property
    def connected(self) -> bool:
        """Whether rings of others are being received right now."""
        return self._subscribed.is_set()

    async def ring(self, topic: str, *ids: UUID | str) -> bool:
        """Ring the bell of a topic and, where given, of one thing. Never raises; False when Redis did not take it."""
        if time.monotonic() < self._silent_until:
            return False
        try:
            async with asyncio.timeout(RING_TIMEOUT_SECONDS):
                await self._client.publish(_channel(topic, *ids), b"1")
        except (RedisError, OSError, TimeoutError) as error:
            self._silent_until = time.monotonic() + RING_PAUSE_AFTER_FAILURE_SECONDS
            log.warning("bell.lost", topic=topic, error=type(error).__name__)
            return False
        return True

    @asynccontextmanager
    async def listen(self, topic: str, *ids: UUID | str) -> AsyncIterator[Bell]:
        """A bell that rings for exactly this topic and these ids until the block ends."""
        self.start()
        channel, bell = _channel(topic, *ids), Bell()
        self._listeners.setdefault(channel, set()).add(bell)
        try:
            yield bell
        finally:
            listeners = self._listeners[channel]
            listeners.discard(bell)
            if not listeners:
                del self._listeners[channel]

    def start(self) -> None:
        """Subscribe before the first listener comes. Whether Redis answers is nobody's to wait for."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._receive(), name="bells")

    async def heard(self, timeout: float = 2.0) -> bool:
        """Whether Redis answered within ``timeout`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._subscribed.wait()
        return self.connected

    async def _receive(self) -> None:
        delay = RECONNECT_MIN_SECONDS
        while True:
            try:
                async with self._listening_client.pubsub() as subscription:
                    async with asyncio.timeout(self._silence_seconds):
                        await subscription.psubscribe(f"{CHANNEL_PREFIX}*")
                    while True:
                        message = await self._next(subscription)
                        if message["type"] == "psubscribe":
                            self._subscribed.set()
                            delay = RECONNECT_MIN_SECONDS
                            self._wake_all()
                        elif message["type"] == "pmessage":
                            for bell in self._listeners.get(message["channel"].decode(), ()):
                                bell.ring()
            except (RedisError, OSError, TimeoutError) as error:
                if self._subscribed.is_set():
                    log.warning("bells.disconnected", error=type(error).__name__)
                self._subscribed.clear()
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(delay * 2, RECONNECT_MAX_SECONDS)

    async def _next(self, subscription: redis.client.PubSub) -> dict[str, Any]:
        """The next message; raises TimeoutError when the peer says nothing for too long, asked for a word or not."""
        # Around all of it: a reconnect within redis-py waits for its peer without a limit.
        async with asyncio.timeout(self._silence_seconds * 2.5):
            message: dict[str, Any] | None = await subscription.get_message(timeout=self._silence_seconds)
            if message is None:
                await subscription.ping()
                message = await subscription.get_message(timeout=self._silence_seconds)
        if message is None:
            raise TimeoutError
        return message

    def _wake_all(self) -> None:
        for bells in self._listeners.values():
            for bell in bells:
                bell.ring()

    async def close(self) -> None:
        """Stop listening and close both connections."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._subscribed.clear()
        await self._client.aclose()
        await self._listening_client.aclose()


def _channel(topic: str, *ids: UUID | str) -> str:
    return CHANNEL_PREFIX + ":".join((topic, *(str(part) for part in ids)))
