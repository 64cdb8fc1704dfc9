"""Doorbells: they wake, they survive Redis, they never fail their caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
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
