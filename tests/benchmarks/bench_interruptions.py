"""How long from a warning visible on SQS to its drain in the agent's hands, over real sockets.

    .venv/bin/python -m tests.benchmarks.bench_interruptions --count 200
    .venv/bin/python -m tests.benchmarks.bench_interruptions --count 200 --per-second 4

Starts its own Postgres, Redis, AWS double, `cloudoptim worker` and agent. Without ``--per-second`` the warnings come
one after another, and the agent polls `cloudoptim control` over HTTP with the reference agent's own client. With it,
arrivals are open loop (each warning has its moment, and the time runs from that moment, so a stalled server cannot
look fast), and the agent leases from the database.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import insert

from control.agent.config import AgentConfig
from control.agent.server import Server, Unavailable
from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from control.sandbox.identity import agent_key
from control.security import keys
from tests.control.agent.test_agent_with_server import SECRETS, ControlService
from tests.control.interruptions.harness import Stage, stage
from tests.control.interruptions.load import percentile
from warehouse.contracts import TaskResult, TaskStatus
from warehouse.postgres.migrate import upgrade
from warehouse.postgres.models import ApiKey, new_id

AGENT_POLL_SECONDS = 25
BETWEEN_SECONDS = (0.05, 0.3)


class HttpAgent(threading.Thread):
    """Long polls with the reference agent's client, drains in no time and reports; notes when it had each task."""

    def __init__(self, url: str, key: str, cluster_id: UUID, folder: Path) -> None:
        super().__init__(name="agent", daemon=True)
        self._server = Server(
            AgentConfig(
                server_url=url,
                cluster_id=cluster_id,
                api_key=key,
                cluster_name="one",
                state_dir=folder,
                poll_wait_seconds=AGENT_POLL_SECONDS,
            )
        )
        self.in_hands: dict[str, float] = {}
        self.polls = 0
        self._over = False

    def run(self) -> None:
        while not self._over:
            self.polls += 1
            try:
                tasks = self._server.poll(["drain_node"], 10)
                now = time.time()
                for task in tasks:
                    self.in_hands.setdefault(task["parameters"]["instance_id"], now)
                    report = TaskResult(
                        lease_epoch=task["lease_epoch"],
                        report_id=new_id(),
                        status=TaskStatus.DONE,
                        detail={"cordoned": True},
                    )
                    self._server.report(task["task_id"], report.model_dump_json().encode())
            except Unavailable:
                time.sleep(0.1)
        self._server.close()

    def stop(self) -> None:
        """After the poll under way, which the end of the server ends."""
        self._over = True


async def agent_key_for(found: Stage, pepper: str) -> str:
    """A new key of the stage's cluster, as an operator creates one."""
    secret = agent_key()
    key = keys.derive(pepper.encode(), secret)
    row = {
        "id": new_id(),
        "customer_id": found.tenant.customer_id,
        "cluster_id": found.tenant.cluster_id,
        "name": "agent",
        "role": "agent",
        "prefix": key.prefix,
        "secret_hmac": key.secret_hmac,
    }
    async with found.db.system() as conn:
        await conn.execute(insert(ApiKey.__table__).values(**row))
    return secret


async def singles(found: Stage, count: int) -> dict[str, Any]:
    """Warnings one after another, each timed from the queue to the hands of an agent that polls over HTTP."""
    found.agent_works = False
    await found.tenant.config("max_launches_per_hour", 100_000)
    instances = [i for start in range(0, count + 1, 50) for i in await found.launch_nodes(min(50, count + 1 - start))]
    control = ControlService(found.log_folder, found.database_url, found.redis_url)
    agent = None
    try:
        found.start_worker(command=("control.cli", "worker"), CLOUDOPTIM_SANDBOX="1", **SECRETS)
        await asyncio.to_thread(control.start)
        key = await agent_key_for(found, SECRETS["API_KEY_SALT"])
        agent = HttpAgent(control.url, key, found.tenant.cluster_id, found.log_folder)
        agent.start()
        return await _one_after_another(found, agent, instances)
    finally:
        if agent is not None:
            agent.stop()
        control.kill()
        if agent is not None:
            await asyncio.to_thread(agent.join, 10)


async def _one_after_another(found: Stage, agent: HttpAgent, instances: list[str]) -> dict[str, Any]:
    rng = random.Random(20)
    sent: dict[str, float] = {}
    busy = os.getloadavg()[0]
    # The first one waits for the processes' start, and is not counted.
    for number, instance in enumerate(instances):
        sent[instance] = time.time()
        found.aws.send_event(found.queue, found.tenant.warning(instance))
        ends = time.monotonic() + 60
        while instance not in agent.in_hands:
            assert time.monotonic() < ends, f"warning {number} did not reach the agent\n{found.logs()}"
            await asyncio.sleep(0.005)
        await asyncio.sleep(rng.uniform(*BETWEEN_SECONDS))
    del sent[instances[0]]
    rows = await found.tenant.rows(
        """SELECT t.parameters ->> 'instance_id' AS instance, extract(epoch FROM t.created_at) AS created,
                  extract(epoch FROM t.first_leased_at) AS leased
           FROM agent_tasks t WHERE t.customer_id = :customer_id"""
    )
    closed = await found.closed(len(instances), 180)
    latencies = [agent.in_hands[instance] - at for instance, at in sent.items()]
    steps = {
        "queue_to_task": [float(row.created) - sent[row.instance] for row in rows if row.instance in sent],
        "task_to_lease": [float(row.leased - row.created) for row in rows if row.instance in sent],
        "lease_to_agent": [agent.in_hands[row.instance] - float(row.leased) for row in rows if row.instance in sent],
    }
    return {
        "warnings": len(sent),
        "p50_ms": round(percentile(latencies, 0.50) * 1000, 1),
        "p99_ms": round(percentile(latencies, 0.99) * 1000, 1),
        "max_ms": round(max(latencies) * 1000, 1),
        "parts_p50_ms": {name: round(percentile(values, 0.5) * 1000, 1) for name, values in steps.items()},
        "outcomes": dict(Counter(row.outcome for row in closed)),
        "polls": agent.polls,
        "load_average_before": round(busy, 2),
    }


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


async def _main(count: int, per_second: float | None) -> None:
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
                figures = await (measure(found, count, per_second) if per_second else singles(found, count))
                print(json.dumps({"load_average_before": busy} | figures))  # noqa: T201
        finally:
            redis.stop()
            postgres.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--per-second", type=float, help="open loop, without HTTP")
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.count, arguments.per_second))
