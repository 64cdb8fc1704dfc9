"""Doorbells: they wake, they survive Redis, they never fail their caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from control.bus.bells import Bell, Bells
from control.embedded import EmbeddedRedis, free_port


@pytest.fixture
async def bells(redis_url: str) -> AsyncIterator[Bells]:
    bells = Bells(redis_url)
    bells.start()
    assert await bells.heard()
    yield bells
    await bells.close()


async def test_a_ring_wakes_its_listener_at_once_and_no_other(bells):
    mine, other = uuid4(), uuid4()
    async with bells.listen("tasks", mine) as bell, bells.listen("tasks", other) as deaf:
        started = time.monotonic()
        waiting = asyncio.create_task(bell.wait(5))
        assert await bells.ring("tasks", mine)
        assert await waiting
        assert time.monotonic() - started < 1
        assert not await deaf.wait(0.05)


async def test_a_ring_before_the_wait_is_kept_and_rings_once(bells):
    name = uuid4()
    async with bells.listen("tasks", name) as bell:
        await bells.ring("tasks", name)
        await bells.ring("tasks", name)
        assert await bell.wait(5)
        await asyncio.sleep(0.05)
        await bell.wait(0.05)
        assert not await bell.wait(0.05)


async def test_rings_cross_processes(redis_url, bells):
    name = uuid4()
    ringer = Bells(redis_url)
    async with bells.listen("plans", name) as bell:
        await ringer.ring("plans", name)
        assert await bell.wait(5)
    await ringer.close()


async def test_a_dead_redis_costs_the_ringer_nothing_and_listeners_come_back(server_folder: Path):
    server = EmbeddedRedis(server_folder / f"bells-{uuid4().hex[:6]}", port=free_port()).start()
    url = server.url
    bells = Bells(url)
    bells.start()
    assert await bells.heard()
    async with bells.listen("tasks", "x") as bell:
        server.stop()
        started = time.monotonic()
        for _ in range(100):
            assert not await bells.ring("tasks", "x")
        assert time.monotonic() - started < 1.5
        server.start()
        async with asyncio.timeout(20):
            while not (bells.connected and await bells.ring("tasks", "x")):
                await bell.wait(0.1)
        assert await bell.wait(5)
    await bells.close()
    server.stop()


class Wire:
    """Carries connections to Redis until it is `cut`: then they stay open and nobody says a word."""

    def __init__(self, redis_url: str) -> None:
        self.cut, self.accepted = False, 0
        self._redis = urlsplit(redis_url)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._redis._replace(netloc=self._redis.netloc.replace(str(self._redis.port), str(port))).geturl()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        far_reader, far_writer = await asyncio.open_connection(self._redis.hostname, self._redis.port)
        silent = self.cut
        for source, target in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, target, silent=silent)))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, silent: bool) -> None:
        # What met a cut stays dead when the wire is whole again, as a connection that a firewall forgot.
        try:
            while data := await source.read(65_536):
                silent = silent or self.cut
                if not silent:
                    target.write(data)
                    await target.drain()
        finally:
            target.close()


async def test_a_peer_that_falls_silent_is_given_up_and_bells_ring_over_a_new_connection(redis_url):
    ringer, name = Bells(redis_url), uuid4()
    async with Wire(redis_url) as wire:
        bells = Bells(wire.url, silence_seconds=0.3)
        async with bells.listen("tasks", name) as bell:
            assert await bells.heard()
            assert await bell.wait(5)  # woken by the subscription itself
            wire.cut = True
            await ringer.ring("tasks", name)
            assert not await bell.wait(0.2)
            async with asyncio.timeout(3):
                while bells.connected or wire.accepted < 2:  # the next connection meets a silent peer as well
                    await bell.wait(0.02)
            wire.cut = False
            assert await bell.wait(10)  # what was rung meanwhile may have been missed
            assert bells.connected
            await ringer.ring("tasks", name)
            assert await bell.wait(2)
        await bells.close()
    await ringer.close()


async def test_a_quiet_peer_that_answers_is_kept(redis_url):
    async with Wire(redis_url) as wire:
        bells = Bells(wire.url, silence_seconds=0.1)
        bells.start()
        assert await bells.heard()
        await asyncio.sleep(1)
        assert bells.connected
        assert wire.accepted == 1
        await bells.close()


async def test_no_redis_at_all_leaves_only_the_poll():
    bells = Bells(f"redis://127.0.0.1:{free_port()}/0")
    bells.start()
    assert not await bells.heard(timeout=0.3)
    async with bells.listen("tasks", "x") as bell:
        assert not await bells.ring("tasks", "x")
        assert not await bell.wait(0.05)
    await bells.close()


async def test_a_ring_in_the_moment_of_a_cancel_does_not_swallow_it():
    bell = Bell()

    async def listen_for_ever() -> None:
        while True:
            await bell.wait(60)

    listener = asyncio.create_task(listen_for_ever())
    await asyncio.sleep(0.01)
    bell.ring()
    listener.cancel()
    done, _ = await asyncio.wait({listener}, timeout=2)
    assert done
    assert listener.cancelled()
