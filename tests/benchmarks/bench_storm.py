"""Storms of interruptions over real sockets, open loop: notices arrive at their moments whatever the server does.

    .venv/bin/python -m tests.benchmarks.bench_storm --notices 200 --clusters 1 --seconds 60    # storm A
    .venv/bin/python -m tests.benchmarks.bench_storm --notices 1000 --clusters 50 --seconds 60  # storm B
    .venv/bin/python -m tests.benchmarks.bench_storm --flood 15000                              # mixed, all at once
    .venv/bin/python -m tests.benchmarks.bench_storm --backlog 5000                             # after an outage
    .venv/bin/python -m tests.benchmarks.bench_storm --old 100000                               # after a long one

One customer's queue serves all clusters. Prints one JSON line: time from a notice's moment to its drain being leased
by the cluster's agent (p50, p99, max), or messages per second through receive, commit and delete; and the machine's
load (1 min) when it began.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from control.interruptions.repository import insert_rows
from tests.control.interruptions.harness import Stage, stage
from tests.control.interruptions.load import load, percentile
from warehouse.postgres.migrate import upgrade
from warehouse.postgres.models import new_id

# On a RAM disk where there is one: fsync stays on and the neighbours' disks stay out of the figures.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


async def _nodes(found: Stage, count: int) -> list[str]:
    """Nodes of the one cluster; only the database knows them, EC2 knows one that shows how they are launched."""
    await found.launch_nodes()
    now = datetime.now(UTC)
    rows = [
        {
            "id": new_id(),
            "customer_id": found.tenant.customer_id,
            "cluster_id": found.tenant.cluster_id,
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


async def storm(found: Stage, notices: int, clusters: int, seconds: float, workers: int) -> dict[str, Any]:
    """Notices at seeded random moments within ``seconds``; every one is drained, replaced and closed."""
    async with load(found, clusters) as made:
        instances = await made.nodes(notices)
        for _ in range(workers):
            found.start_worker()
        await made.warm_up()
        cpu = _cpu_seconds(found)
        began = time.time()
        await made.storm(instances, seconds)
        await made.until(made.all_offered, 120)
        cpu = _cpu_seconds(found) - cpu
        await made.until(made.all_closed, 180)
        closed = time.time() - began
        outcomes = await found.tenant.rows(
            "SELECT outcome, count(*) AS n FROM interruptions WHERE customer_id = :customer_id GROUP BY outcome"
        )
    latencies = made.latencies()
    return {
        "notices": notices,
        "clusters": clusters,
        "seconds": seconds,
        "workers": workers,
        "offered": len(latencies),
        "p50_s": round(percentile(latencies, 0.5), 3),
        "p99_s": round(percentile(latencies, 0.99), 3),
        "max_s": round(max(latencies), 3),
        "worker_cpu_s": round(cpu, 1),
        "outcomes": {row.outcome: row.n for row in outcomes},
        "all_closed_s": round(closed, 1),
        "run_instances_calls": len([c for c in found.aws.history(action="RunInstances") if _ours(c)]),
        "replacements": len(found.ours()),
        "worker_rss_mib": _memory(found),
    }


def _ours(call: dict[str, Any]) -> bool:
    return bool(call["session"])


def _memory(found: Stage) -> list[int]:
    return [psutil.Process(process.pid).memory_info().rss >> 20 for process in found.workers if process.poll() is None]


@dataclass
class Spent:
    """CPU seconds of everybody who takes part: which of them is the bottleneck?"""

    workers: float
    postgres: float
    generator: float

    @classmethod
    def so_far(cls, found: Stage) -> Spent:
        own = psutil.Process().cpu_times()
        servers = [child for child in psutil.Process().children(recursive=True) if child.name() == "postgres"]
        postgres = sum(cpu.user + cpu.system for server in servers if (cpu := server.cpu_times()))
        return cls(_cpu_seconds(found), postgres, own.user + own.system)

    def since(self, before: Spent) -> dict[str, float]:
        """``generator``: this process, with the doubles of SQS and EC2 in it."""
        return {
            "workers": round(self.workers - before.workers, 1),
            "postgres": round(self.postgres - before.postgres, 1),
            "generator_and_doubles": round(self.generator - before.generator, 1),
        }


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
    instances = await _nodes(found, messages // 3)
    found.agent_works = False
    bodies = _mixed(found, instances, messages)
    for _ in range(workers):
        found.start_worker()
    await _intake_is_on(found)
    before, spent = _memory(found), Spent.so_far(found)
    began = time.time()
    found.aws.send_events(found.queue, bodies)
    await _until_empty(found)
    took = time.time() - began
    cpu = Spent.so_far(found).since(spent)
    row = await found.tenant.row(
        "SELECT count(*) AS n, count(DISTINCT CAST(xmin AS text)) AS commits FROM inbox_messages"
    )
    warned = await found.tenant.row("SELECT count(*) AS n FROM interruptions WHERE customer_id = :customer_id")
    return {
        "messages": messages,
        "workers": workers,
        "committed": row.n - 1,
        "commits": row.commits,
        "interruptions": warned.n,
        "seconds": round(took, 2),
        "messages_per_second": round(messages / took),
        "messages_per_worker_cpu_second": round(messages / cpu["workers"]),
        "cpu_seconds": cpu,
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
    """An outage of ten minutes ends: messages wait, half of them still valid. When was the last valid one offered, and
    how much had been done by then about those that are over?"""
    instances = await _nodes(found, messages)
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
    async with load(found, reports=False) as made:
        for _ in range(workers):
            found.start_worker()
        began = time.time()
        await _until_empty(found)
        emptied = time.time() - began
        made.due = dict.fromkeys(valid, began)
        await made.until(made.all_offered, 120)
    leased = made.leased
    over = await found.tenant.row(
        """WITH valid AS (SELECT max(created_at) AS last FROM agent_tasks WHERE customer_id = :customer_id)
           SELECT count(*) AS n, count(*) FILTER (WHERE i.closed_at <= valid.last) AS closed,
                  count(*) FILTER (WHERE EXISTS (SELECT FROM launch_intents l JOIN launch_attempts a
                      ON a.intent_id = l.id WHERE l.interruption_id = i.id AND a.launched_at <= valid.last)) AS launched
           FROM interruptions i, valid WHERE i.customer_id = :customer_id AND i.instance_id = ANY(:over)""",
        over=sorted(set(instances) - valid),
    )
    offered = sorted(made.latencies())
    return {
        "messages": messages,
        "still_valid": len(valid),
        "offered": len(offered),
        "offered_that_were_over": len(set(leased) - valid),
        "p99_valid_offered_s": round(percentile(offered, 0.99), 2),
        "last_valid_offered_s": round(offered[-1], 2),
        "queue_empty_s": round(emptied, 2),
        "over": over.n,
        "over_handled_before_the_last_valid_task": max(over.closed, over.launched),
    }


async def old_backlog(found: Stage, messages: int, still_valid: int, workers: int) -> dict[str, Any]:
    """A long outage ends: old warnings about nodes that are gone, and a few, anywhere among them, still valid."""
    nodes = await _nodes(found, still_valid + 500)
    valid, gone = nodes[:still_valid], nodes[still_valid:]
    await found.tenant.rows(
        "UPDATE nodes SET terminated_at = now() - interval '20 minutes', status = 'terminated', "
        "last_seen_at = now() - interval '20 minutes' WHERE instance_id = ANY(:gone) RETURNING 1",
        gone=gone,
    )
    found.agent_works = False
    old = (datetime.now(UTC) - timedelta(minutes=30)).strftime("%Y-%m-%dT%H:%M:%SZ")
    rng = random.Random(5)
    bodies = [json.dumps(found.tenant.warning(rng.choice(gone), time=old)) for _ in range(messages - still_valid)]
    bodies += [json.dumps(found.tenant.warning(instance)) for instance in valid]
    rng.shuffle(bodies)
    for _ in range(workers):
        found.start_worker()
    await _intake_is_on(found)
    before, spent = _memory(found), Spent.so_far(found)

    async def agent_reports() -> None:
        # Those that live on are seen, so that one is drained even when its notice is over by the time it is read.
        while True:
            await found.tenant.rows(
                "UPDATE nodes SET last_seen_at = now() WHERE instance_id = ANY(:valid) RETURNING 1", valid=valid
            )
            await asyncio.sleep(15)

    reports = asyncio.create_task(agent_reports())
    began = time.time()
    found.aws.send_events(found.queue, bodies)
    await _until_empty(found)
    took = time.time() - began
    reports.cancel()
    cpu = Spent.so_far(found).since(spent)
    row = await found.tenant.row(
        "SELECT (SELECT count(*) FROM inbox_messages) AS committed, "
        "(SELECT count(*) FROM agent_tasks WHERE parameters ->> 'instance_id' = ANY(:valid)) AS offered, "
        "(SELECT count(*) FROM interruptions WHERE instance_id = ANY(:valid)) AS known, "
        "(SELECT count(*) FROM interruptions WHERE instance_id = ANY(:valid) "
        " AND received_at < notice_at + interval '120 s') AS in_time, "
        "(SELECT count(*) FROM agent_tasks WHERE parameters ->> 'instance_id' <> ALL(:valid)) AS over",
        valid=valid,
    )
    return {
        "messages": messages,
        "workers": workers,
        "still_valid": still_valid,
        "committed": row.committed - 1,
        "interruptions": row.known,
        "taken_in_within_their_two_minutes": row.in_time,
        "offered": row.offered,
        "offered_that_were_over": row.over,
        "seconds": round(took, 2),
        "messages_per_second": round(messages / took),
        "messages_per_worker_cpu_second": round(messages / cpu["workers"]),
        "cpu_seconds": cpu,
        "worker_rss_mib_before_after": [before, _memory(found)],
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
            busy = os.getloadavg()[0]
            async with stage(postgres.url("bench"), redis.url, logs) as found:
                print(json.dumps(await run(found) | {"load_average_before": round(busy, 2)}))  # noqa: T201
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
    parser.add_argument("--old", type=int, default=0)
    a = parser.parse_args()
    if a.flood:
        asyncio.run(_main(lambda found: flood(found, a.flood, a.workers)))
    elif a.old:
        asyncio.run(_main(lambda found: old_backlog(found, a.old, min(200, a.old // 10), a.workers)))
    elif a.backlog:
        asyncio.run(_main(lambda found: backlog(found, a.backlog, a.workers)))
    else:
        asyncio.run(_main(lambda found: storm(found, a.notices, a.clusters, a.seconds, a.workers)))
