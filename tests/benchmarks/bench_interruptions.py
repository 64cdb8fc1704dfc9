"""How long from a warning visible on SQS to its drain in the agent's hands, over real sockets.

    .venv/bin/python -m tests.benchmarks.bench_interruptions --count 200 --per-second 4

Starts its own Postgres, Redis, AWS double, worker process and agent. Arrivals are open loop: each warning has its
moment, and the time runs from that moment, so a stalled server cannot look fast.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from tests.control.interruptions.harness import Stage, stage
from tests.control.interruptions.load import percentile
from warehouse.postgres.migrate import upgrade


async def measure(found: Stage, count: int, per_second: float) -> dict[str, Any]:
    """Send ``count`` single warnings at seeded random moments and time each to its lease."""
    instances: list[str] = []
    for start in range(0, count, 50):
        instances += await found.launch_nodes(min(50, count - start))
    found.start_worker()
    await _warm_up(found)

    rng = random.Random(20)
    began = time.time()
    sent: dict[str, float] = {}
    at = began
    for instance in instances:
        at += rng.expovariate(per_second)
        await asyncio.sleep(max(0.0, at - time.time()))
        sent[instance] = at
        found.aws.send_event(found.queue, found.tenant.warning(instance))

    async def all_leased() -> bool:
        return len(found.leased) >= count + 1

    await found.until(all_leased, 60)
    rows = await found.tenant.rows(
        """SELECT t.id, t.parameters ->> 'instance_id' AS instance, extract(epoch FROM i.received_at) AS received,
                  extract(epoch FROM t.created_at) AS created
           FROM agent_tasks t JOIN interruptions i ON i.id = t.interruption_id WHERE t.customer_id = :customer_id"""
    )
    leased: dict[UUID, float] = found.leased
    latencies = [leased[row.id] - sent[row.instance] for row in rows if row.instance in sent]
    parts = {
        "to_worker": [float(row.received) - sent[row.instance] for row in rows if row.instance in sent],
        "to_task": [float(row.created - row.received) for row in rows if row.instance in sent],
        "to_agent": [leased[row.id] - float(row.created) for row in rows if row.instance in sent],
    }
    closed = await found.closed(count + 1, 180)
    outcomes: dict[str, int] = {}
    for row in closed:
        outcomes[row.outcome] = outcomes.get(row.outcome, 0) + 1
    calls = found.aws.history(action="RunInstances")
    return {
        "warnings": count,
        "per_second": per_second,
        "p50_ms": round(percentile(latencies, 0.50) * 1000, 1),
        "p90_ms": round(percentile(latencies, 0.90) * 1000, 1),
        "p99_ms": round(percentile(latencies, 0.99) * 1000, 1),
        "max_ms": round(max(latencies) * 1000, 1),
        "parts_p50_ms": {name: round(percentile(values, 0.5) * 1000, 1) for name, values in parts.items()},
        "outcomes": outcomes,
        "run_instances_calls": len(calls),
        "instances_alive": len(found.ours(alive=True)),
        "seconds": round(time.time() - began, 1),
    }


async def _warm_up(found: Stage) -> None:
    (instance,) = await found.launch_nodes()
    found.aws.send_event(found.queue, found.tenant.warning(instance))

    async def leased() -> bool:
        return bool(found.leased)

    await found.until(leased, 60)


async def _main(count: int, per_second: float) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        await asyncio.to_thread(Path(folder).chmod, 0o755)
        postgres = EmbeddedPostgres(Path(folder) / "postgres", port=free_port()).start()
        redis = EmbeddedRedis(Path(folder) / "redis", port=free_port()).start()
        try:
            postgres.ensure_database("bench")
            upgrade(postgres.url("bench"))
            logs = Path(folder) / "logs"
            await asyncio.to_thread(logs.mkdir)
            async with stage(postgres.url("bench"), redis.url, logs) as found:
                busy = round(os.getloadavg()[0], 2)
                print(json.dumps(await measure(found, count, per_second) | {"load_average_before": busy}))  # noqa: T201
        finally:
            redis.stop()
            postgres.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--per-second", type=float, default=4.0)
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.count, arguments.per_second))
