"""Rate limits shared by all processes through Redis; while Redis is away each process counts for itself."""

from __future__ import annotations

import time

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from control.errors import TooMany

# Wrong credentials per address: ten a minute leave a person room for mistakes and a guesser none.
FAILURES = parse("10/minute")
REDIS_PAUSE_SECONDS = 2.0
NO_LIMIT = "none"

log = structlog.get_logger(__name__)


class Limiter:
    """Counts hits of named things. Every answer is a decision: a dead Redis never refuses and never opens the gate."""

    def __init__(self, redis_url: str) -> None:
        shared = RedisStorage(
            f"async+{redis_url}",
            implementation="redispy",
            key_prefix="cloudoptim:limits",
            socket_timeout=0.5,
            socket_connect_timeout=0.5,
        )
        self._shared = SlidingWindowCounterRateLimiter(shared)
        self._storage = shared
        self._local = FixedWindowRateLimiter(MemoryStorage())
        self._local_until = 0.0

    async def _run(self, method: str, limit: RateLimitItem, name: tuple[str, ...]):
        if time.monotonic() >= self._local_until:
            try:
                return await getattr(self._shared, method)(limit, *name)
            except (RedisError, OSError, TimeoutError) as error:
                self._local_until = time.monotonic() + REDIS_PAUSE_SECONDS
                log.warning("limits.local", error=type(error).__name__)
        return await getattr(self._local, method)(limit, *name)

    async def hit(self, limit: RateLimitItem | None, *name: str, what: str) -> None:
        """Count one hit.

        Raises:
            TooMany: the limit is reached; says for whom and when to come back.
        """
        if limit is None or await self._run("hit", limit, name):
            return
        stats = await self._run("get_window_stats", limit, name)
        wait = max(1.0, stats.reset_time - time.time())
        raise TooMany(f"The limit of {limit} for {what} is reached; come back in {wait:.0f} s.", retry_after=wait)

    async def refuse_when_reached(self, limit: RateLimitItem, *name: str, what: str) -> None:
        """Like ``hit`` without counting."""
        if await self._run("test", limit, name):
            return
        stats = await self._run("get_window_stats", limit, name)
        wait = max(1.0, stats.reset_time - time.time())
        raise TooMany(f"Too many {what}; come back in {wait:.0f} s.", retry_after=wait)

    async def count(self, limit: RateLimitItem, *name: str) -> None:
        """Count one hit and decide nothing."""
        await self._run("hit", limit, name)

    async def close(self) -> None:
        """Close the connection to Redis."""
        await self._storage.bridge.get_connection().aclose()  # type: ignore[attr-defined]


def parse_limit(text: str) -> RateLimitItem | None:
    """A limit like ``6000/minute``; ``none`` is no limit.

    Raises:
        ValueError: not a limit.
    """
    return None if text.strip().lower() == NO_LIMIT else parse(text)
