"""Storms of interruptions over real sockets, open loop: notices arrive at their moments whatever the server does.

    .venv/bin/python -m tests.benchmarks.bench_storm --notices 200 --clusters 1 --seconds 60    # storm A
    .venv/bin/python -m tests.benchmarks.bench_storm --notices 1000 --clusters 50 --seconds 60  # storm B
    .venv/bin/python -m tests.benchmarks.bench_storm --flood 15000                              # mixed, all at once
    .venv/bin/python -m tests.benchmarks.bench_storm --backlog 5000                             # after an outage

One customer's queue serves all clusters. Prints one JSON line: time from a notice's moment to its drain being leased
by the cluster's agent (p50, p99, max), or messages per second through receive, commit and delete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from control.agents.repository import lease_tasks
from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from control.interruptions.repository import insert_rows
from tests.benchmarks.bench_interruptions import percentile
from tests.control.interruptions.harness import Stage, stage
from warehouse.postgres.migrate import upgrade
from warehouse.postgres.models import new_id

# On a RAM disk where there is one: fsync stays on and the neighbours' disks stay out of the figures.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


async def _clusters(found: Stage, count: int) -> list[UUID]:
    """The stage's cluster and ``count - 1`` more of the same customer."""
    more = [
        {
            "id": new_id(),
            "customer_id": found.tenant.customer_id,
            "cluster_name": f"cluster-{number}",
            "region": "us-east-1",
            "status": "active",
        }
        for number in range(1, count)
    ]
    async with found.db.system() as conn:
        await insert_rows(conn, "clusters", more, order="id")
    return [found.tenant.cluster_id, *(row["id"] for row in more)]


async def _nodes(found: Stage, clusters: list[UUID], count: int) -> list[str]:
    """Nodes spread over the clusters; only the database knows them, EC2 knows one that shows how they are launched."""
    await found.launch_nodes()
    now = datetime.now(UTC)
    rows = [
        {
            "id": new_id(),
            "customer_id": found.tenant.customer_id,
            "cluster_id": clusters[number % len(clusters)],
            "node_name": f"storm-{number}",
            "instance_id": f"i-5{number:016x}",
            "instance_type": "m5.large",
            "availability_zone": "us-east-1a",
            "node_type": "spot",
            "status": "ready",
            "cpu_cores": 2.0,
            "memory_bytes": 8 << 30,
            "last_seen_at": now,
        }
        for number in range(count)
    ]
    async with found.db.system() as conn:
        for start in range(0, count, 1000):
            await insert_rows(conn, "nodes", rows[start : start + 1000], order="id")
    return [row["instance_id"] for row in rows]


async def _agent(found: Stage, cluster_id: UUID, leased: dict[str, float]) -> None:
    async with found.bells.listen("tasks", cluster_id) as bell:
        while True:
            async with found.db.tenant(found.tenant.customer_id) as conn:
                tasks = await lease_tasks(
                    conn, cluster_id=cluster_id, agent="agent", limit=100, understands=["drain_node"]
                )
            now = time.time()
            for task in tasks:
                leased.setdefault(task.parameters["instance_id"], now)
            if not tasks:
                await bell.wait(2.0)


async def storm(found: Stage, notices: int, clusters: int, seconds: float, workers: int) -> dict[str, Any]:
    """Notices at seeded random moments within ``seconds``."""
    places = await _clusters(found, clusters)
    instances = await _nodes(found, places, notices)
    found.agent_works = False
    for _ in range(workers):
        found.start_worker()
    leased: dict[str, float] = {}
    agents = [asyncio.create_task(_agent(found, cluster, leased)) for cluster in places]
    await _intake_is_on(found)
    rng = random.Random(31)
    began = time.time()
    moments = sorted(rng.uniform(0, seconds) for _ in instances)
    sent: dict[str, float] = {}
    for instance, moment in zip(instances, moments, strict=True):
        await asyncio.sleep(max(0.0, began + moment - time.time()))
        sent[instance] = began + moment
        found.aws.send_event(found.queue, found.tenant.warning(instance))
    ends = time.time() + 120
    while len(set(leased) & set(sent)) < notices and time.time() < ends:  # noqa: ASYNC110 - other processes' doing
        await asyncio.sleep(0.05)
    latencies = [leased[instance] - sent[instance] for instance in sent if instance in leased]
    calls = len([c for c in found.aws.history(action="RunInstances") if c["params"].get("ClientToken")])
    for agent in agents:
        agent.cancel()
    return {
        "notices": notices,
        "clusters": clusters,
        "seconds": seconds,
        "workers": workers,
        "offered": len(latencies),
        "p50_s": round(percentile(latencies, 0.5), 3),
        "p99_s": round(percentile(latencies, 0.99), 3),
        "max_s": round(max(latencies), 3),
        "run_instances_calls": calls,
        "worker_rss_mib": _memory(found),
    }


def _memory(found: Stage) -> list[int]:
    return [psutil.Process(process.pid).memory_info().rss >> 20 for process in found.workers if process.poll() is None]


def _cpu_seconds(found: Stage) -> float:
    times = [psutil.Process(process.pid).cpu_times() for process in found.workers if process.poll() is None]
    return sum(spent.user + spent.system for spent in times)


async def _intake_is_on(found: Stage) -> None:
    found.aws.send_event(found.queue, found.tenant.rebalance("i-0000000000000000f"))
    await _until_empty(found)


async def _until_empty(found: Stage) -> None:
    while found.aws.queue_depth(found.queue) != (0, 0):  # noqa: ASYNC110 - another process empties it
        await asyncio.sleep(0.02)


async def flood(found: Stage, messages: int, workers: int) -> dict[str, Any]:
    """Mixed messages that all wait: half state changes and rebalances, a third warnings, the rest foreign or poison."""
    instances = await _nodes(found, [found.tenant.cluster_id], messages // 3)
    found.agent_works = False
    bodies = _mixed(found, instances, messages)
    for _ in range(workers):
        found.start_worker()
    await _intake_is_on(found)
    before, cpu_before = _memory(found), _cpu_seconds(found)
    began = time.time()
    found.aws.send_events(found.queue, bodies)
    await _until_empty(found)
    took = time.time() - began
    cpu = _cpu_seconds(found) - cpu_before
    row = await found.tenant.row("SELECT count(*) AS n FROM inbox_messages WHERE customer_id = :customer_id")
    warned = await found.tenant.row("SELECT count(*) AS n FROM interruptions WHERE customer_id = :customer_id")
    return {
        "messages": messages,
        "workers": workers,
        "committed": row.n - 1,
        "interruptions": warned.n,
        "seconds": round(took, 2),
        "messages_per_second": round(messages / took),
        "messages_per_worker_cpu_second": round(messages / cpu),
        "worker_rss_mib_before_after": [before, _memory(found)],
    }


def _mixed(found: Stage, instances: list[str], count: int) -> list[str]:
    tenant, rng = found.tenant, random.Random(7)
    bodies = [json.dumps(tenant.warning(instance)) for instance in instances]
    while len(bodies) < count:
        kind, instance = rng.random(), rng.choice(instances)
        if kind < 0.5:
            bodies.append(json.dumps(tenant.state_change(instance, rng.choice(["pending", "running"]))))
        elif kind < 0.8:
            bodies.append(json.dumps(tenant.rebalance(instance)))
        elif kind < 0.95:
            bodies.append(json.dumps(tenant.event("GuardDuty Finding", {}, source="aws.guardduty")))
        else:
            bodies.append(json.dumps({"poison": rng.random()}))
    rng.shuffle(bodies)
    return bodies


async def backlog(found: Stage, messages: int, workers: int) -> dict[str, Any]:
    """An outage of ten minutes ends: messages wait, half of them still valid. When was the last valid one offered?"""
    instances = await _nodes(found, [found.tenant.cluster_id], messages)
    await found.tenant.rows("UPDATE nodes SET last_seen_at = now() - interval '5 minutes' RETURNING 1")
    found.agent_works = False
    now = datetime.now(UTC)
    valid = set(instances[::2])
    bodies = [
        json.dumps(
            found.tenant.warning(
                instance,
                time=(now - timedelta(seconds=20 if instance in valid else 400)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
        )
        for instance in instances
    ]
    random.Random(3).shuffle(bodies)
    found.aws.send_events(found.queue, bodies)
    leased: dict[str, float] = {}
    agent = asyncio.create_task(_agent(found, found.tenant.cluster_id, leased))
    for _ in range(workers):
        found.start_worker()
    began = time.time()
    await _until_empty(found)
    emptied = time.time() - began
    while len(leased) < len(valid) and time.time() - began < 120:  # noqa: ASYNC110 - other processes' doing
        await asyncio.sleep(0.05)
    agent.cancel()
    offered = sorted(moment - began for moment in leased.values())
    return {
        "messages": messages,
        "still_valid": len(valid),
        "offered": len(offered),
        "offered_that_were_over": len(set(leased) - valid),
        "last_valid_offered_s": round(offered[-1], 2),
        "queue_empty_s": round(emptied, 2),
    }


async def _main(run: Callable[[Stage], Awaitable[dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY) as folder:
        await asyncio.to_thread(Path(folder).chmod, 0o755)
        postgres = EmbeddedPostgres(Path(folder) / "postgres", port=free_port()).start()
        redis = EmbeddedRedis(Path(folder) / "redis", port=free_port()).start()
        try:
            postgres.ensure_database("bench")
            upgrade(postgres.url("bench"))
            logs = Path(folder) / "logs"
            await asyncio.to_thread(logs.mkdir)
            async with stage(postgres.url("bench"), redis.url, logs) as found:
                print(json.dumps(await run(found)))  # noqa: T201
        finally:
            redis.stop()
            postgres.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notices", type=int, default=200)
    parser.add_argument("--clusters", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--flood", type=int, default=0)
    parser.add_argument("--backlog", type=int, default=0)
    a = parser.parse_args()
    if a.flood:
        asyncio.run(_main(lambda found: flood(found, a.flood, a.workers)))
    elif a.backlog:
        asyncio.run(_main(lambda found: backlog(found, a.backlog, a.workers)))
    else:
        asyncio.run(_main(lambda found: storm(found, a.notices, a.clusters, a.seconds, a.workers)))
