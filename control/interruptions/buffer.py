"""What was received from a queue and is not taken in yet: bounded in number and memory, large bodies apart.

A queue is read while it holds less than its bound and all of the process' queues less than theirs; one that holds
nothing is always read, so that nobody's flood keeps a warning out. What a receive under way brings comes on top: at
most ten messages, from one receiver a queue once they are large.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Sequence

from control.gateways.aws import SqsMessage

# What is received must be committed well within the visibility timeout of 20 s.
MAX_BUFFERED = 400
MAX_HELD_BYTES = 4 << 20
MAX_HELD_BYTES_OF_ALL = 64 << 20
# One transaction's.
COMMIT_LIMIT = 200
COMMIT_BYTES = 2 << 20
# A warning has less than a kilobyte. A body above this is not taken in with warnings, which do not wait for it: to read
# and write one of 1 MiB takes as long as hundreds of them.
LARGE_BYTES = 32 << 10
# Reading a large body holds up the whole process for some 20 ms. It waits until nothing came or was taken in for this
# long, and no longer than that.
QUIET_SECONDS = 0.01
PATIENCE_SECONDS = 1.0


def size_of(messages: Sequence[SqsMessage]) -> int:
    """Bytes that the bodies of messages take in memory."""
    return sum(sys.getsizeof(message.body) for message in messages)


class Held:
    """Bytes of bodies that all queues of a process hold, and the queues that wait for there to be fewer."""

    def __init__(self) -> None:
        self.bytes = 0
        self.waiting: set[asyncio.Event] = set()

    def add(self, size: int) -> None:
        """Bodies were received (or, negative, taken in)."""
        self.bytes += size
        if self.bytes < MAX_HELD_BYTES_OF_ALL:
            # Each looks again whether there is room for it.
            for room in self.waiting:
                room.set()
            self.waiting.clear()


class Lane:
    """Messages of one size class, with one taker: ``next_batch``, then ``Buffer.taken_in``."""

    def __init__(self) -> None:
        self.waiting: deque[SqsMessage] = deque()
        self.taking: list[SqsMessage] = []
        # Set while something waits; whoever wakes the taker for another reason sets it too.
        self.filled = asyncio.Event()

    def next_batch(self) -> list[SqsMessage]:
        """What is taken in together next: of small bodies many, of large ones one or two."""
        size = 0
        while self.waiting and len(self.taking) < COMMIT_LIMIT and size < COMMIT_BYTES:
            size += size_of([self.waiting[0]])
            self.taking.append(self.waiting.popleft())
        if not self.waiting:
            self.filled.clear()
        return self.taking


class Buffer:
    """One queue's: small bodies and large ones, side by side."""

    def __init__(self, held_of_all: Held) -> None:
        self.held_bytes, self._held_of_all = 0, held_of_all
        self.small, self.large = Lane(), Lane()
        self.lanes = (self.small, self.large)
        self._room = asyncio.Event()
        self._room.set()
        self._moved_at = time.monotonic()

    def add(self, messages: Sequence[SqsMessage]) -> int:
        """Messages that were received; returns the bytes of their bodies."""
        for message in messages:
            lane = self.large if size_of([message]) > LARGE_BYTES else self.small
            lane.waiting.append(message)
            lane.filled.set()
        size = size_of(messages)
        self._hold(size)
        self._moved_at = time.monotonic()
        return size

    @property
    def full(self) -> bool:
        """Whether somebody waits to receive more."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Wait until more may be received."""
        while not self._has_room():
            self._room.clear()
            self._held_of_all.waiting.add(self._room)
            await self._room.wait()

    def _has_room(self) -> bool:
        return (
            sum(len(lane.waiting) for lane in self.lanes) < MAX_BUFFERED
            and self.held_bytes < MAX_HELD_BYTES
            and (not self.held_bytes or self._held_of_all.bytes < MAX_HELD_BYTES_OF_ALL)
        )

    def taken_in(self, lane: Lane) -> None:
        """A lane's batch is committed."""
        size, lane.taking = size_of(lane.taking), []
        self._hold(-size)
        self._room.set()
        self._moved_at = time.monotonic()

    async def quiet(self) -> None:
        """Wait for a good moment to read a large body."""
        now = time.monotonic()
        ends = now + PATIENCE_SECONDS
        while now < (until := min(self._moved_at + QUIET_SECONDS, ends)):
            await asyncio.sleep(until - now)
            now = time.monotonic()

    def empty(self) -> list[SqsMessage]:
        """All that is not taken in, the batches under way included; the buffer holds nothing afterwards."""
        rest = [message for lane in self.lanes for message in (*lane.taking, *lane.waiting)]
        for lane in self.lanes:
            lane.taking = []
            lane.waiting.clear()
        self._hold(-self.held_bytes)
        self._held_of_all.waiting.discard(self._room)
        return rest

    def _hold(self, size: int) -> None:
        self.held_bytes += size
        self._held_of_all.add(size)
