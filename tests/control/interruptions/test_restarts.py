"""Postgres and Redis restarted under working workers, and workers stopped by SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from control.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError, free_port
from tests.control.interruptions.harness import Stage
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.test_killed_workers import exactly_one_of_everything
from tests.control.interruptions.workers import Zygote
from warehouse.postgres.migrate import upgrade


async def _warn(stage: Stage, count: int) -> None:
    for instance in await stage.launch_nodes(count):
        stage.aws.send_event(stage.queue, stage.tenant.warning(instance))


async def start_again(server: EmbeddedPostgres) -> EmbeddedPostgres:
    """Start it on the data of one that was killed."""
    ends = time.monotonic() + 30
    while True:
        try:
            return await asyncio.to_thread(server.start)
        except EmbeddedServerError:
            # After kill -9 the last of its children may still hold the shared memory.
            if time.monotonic() > ends:
                raise
            await asyncio.sleep(0.05)


async def test_sigterm_ends_a_worker_in_seconds_and_another_goes_on(stage: Stage) -> None:
    first = stage.start_worker()
    await _warn(stage, 3)
    await stage.until(stage.interruptions)
    began = time.monotonic()
    first.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(first.wait, 20) == 0
    # 8 s is what `cloudoptim up` leaves; a busy machine gets some more.
    assert time.monotonic() - began < 12
    stage.start_worker()
    rows = await stage.closed(3, 60)
    assert {row.outcome for row in rows} == {"handled"}
    assert await exactly_one_of_everything(stage) == []


async def test_a_wiped_redis_costs_nothing(stage: Stage) -> None:
    import redis.asyncio as redis

    stage.start_worker()
    await _warn(stage, 2)
    async with redis.Redis.from_url(stage.redis_url) as client:
        for _ in range(5):
            await client.flushall()
            await asyncio.sleep(0.2)
    rows = await stage.closed(2, 60)
    assert {row.outcome for row in rows} == {"handled"}


async def test_without_redis_everything_is_found_by_polling(
    database_url: str, tmp_path: Path, server_folder: Path, zygote: Zygote
) -> None:
    server = EmbeddedRedis(server_folder / "redis-stopped", port=free_port()).start()
    async with open_stage(database_url, server.url, tmp_path, zygote=zygote) as stage:
        worker = stage.start_worker()
        await _warn(stage, 1)
        # In the middle of its work.
        await stage.until(stage.interruptions)
        await asyncio.to_thread(server.stop)
        await _warn(stage, 2)
        rows = await stage.closed(3, 60)
        assert {row.outcome for row in rows} == {"handled"}
        assert worker.poll() is None


async def test_postgres_killed_under_it_loses_nothing(
    clean_redis_url: str, tmp_path: Path, server_folder: Path, zygote: Zygote
) -> None:
    folder, port = server_folder / "postgres-killed", free_port()
    server = EmbeddedPostgres(folder, port=port).start()
    server.ensure_database("killed")
    upgrade(server.url("killed"))
    async with open_stage(server.url("killed"), clean_redis_url, tmp_path, zygote=zygote) as stage:
        worker = stage.start_worker()
        await _warn(stage, 1)
        await stage.closed(1, 60)
        stage.agent_works = False
        await stage.pause()
        await asyncio.to_thread(server.process.kill)
        # Warnings come while it is away, and are in the hands of a worker that cannot commit them.
        for number in range(3):
            stage.aws.send_event(stage.queue, stage.tenant.warning(f"i-0aaaaaaaaaaaaaa{number:02d}"))
        async with asyncio.timeout(20):
            while "intake.commit_failed" not in stage.logs():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)
        server = await start_again(EmbeddedPostgres(folder, port=port))
        back = time.monotonic()
        await stage.resume()
        for number in range(3):
            await stage.tenant.node(f"i-0aaaaaaaaaaaaaa{number:02d}")
        await stage.until(lambda: stage.tenant.rows("SELECT 1 FROM inbox_messages OFFSET 1"), 30)
        # 5 s are promised; the machine that runs all tests at once gets a little more.
        assert time.monotonic() - back < 10
        stage.agent_works = True
        rows = await stage.closed(4, 90)
        assert {row.outcome for row in rows} == {"handled"}
        assert worker.poll() is None
    await asyncio.to_thread(server.stop)
