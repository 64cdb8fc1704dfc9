"""Many queues in one worker process, and warnings that no queue ever brought. Real processes, sockets and clocks.

.venv/bin/pytest -m storm -s tests/control/interruptions/test_queues.py
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from control.interruptions.repository import insert_rows
from tests.control.interruptions.harness import Stage
from warehouse.postgres.models import new_id

IDLE_SECONDS = 40.0


async def _customers(stage: Stage, count: int) -> list[dict[str, Any]]:
    """Customers with an account, a queue, a cluster and one node each."""
    customers, clusters, nodes, found = [], [], [], []
    for number in range(count):
        customer_id, cluster_id, external_id = new_id(), new_id(), new_id()
        account = stage.aws.add_account(f"{700_000_000_000 + number}", external_id=str(external_id))
        instance_id = f"i-7{number:016x}"
        customers.append(
            {
                "id": customer_id,
                "company_name": f"Queue {number}",
                "email": "ops@example.com",
                "aws_account_id": account.account_id,
                "aws_role_arn": account.role_arn,
                "external_id": external_id,
                "sqs_queue_url": account.queue_url,
                "status": "active",
            }
        )
        # Clusters that no poll asks EC2 about: the queues alone are measured.
        clusters.append(
            {
                "id": cluster_id,
                "customer_id": customer_id,
                "cluster_name": "one",
                "region": "us-east-1",
                "status": "active",
            }
        )
        nodes.append(
            {
                "id": new_id(),
                "customer_id": customer_id,
                "cluster_id": cluster_id,
                "node_name": f"node-{number}",
                "instance_id": instance_id,
                "instance_type": "m5.large",
                "availability_zone": "us-east-1a",
                "node_type": "spot",
                "status": "ready",
                "cpu_cores": 2.0,
                "memory_bytes": 8 << 30,
            }
        )
        found.append({"account": account.account_id, "instance": instance_id})
    async with stage.db.system() as conn:
        await insert_rows(conn, "customers", customers, order="id")
        await insert_rows(conn, "clusters", clusters, order="id")
        await insert_rows(conn, "nodes", nodes, order="id")
    return found


async def _count(stage: Stage, sql: str) -> int:
    async with stage.db.system() as conn:
        return int((await conn.execute(text(sql))).scalar_one())


@pytest.mark.storm
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("queues", "most_mib", "most_cpu", "most_seconds"), [(200, 1024, 0.20, 30), (1000, 2048, 1.0, 150)]
)
async def test_many_queues_in_one_process(
    stage: Stage, queues: int, most_mib: int, most_cpu: float, most_seconds: float
) -> None:
    found = await _customers(stage, queues - 1)
    process = stage.start_worker()
    worker = psutil.Process(process.pid)

    async def all_read() -> bool:
        healthy = "SELECT count(*) FROM intake_health WHERE detector = 'sqs' AND state = 'ok'"
        return await _count(stage, healthy) == queues

    began = time.monotonic()
    await stage.until(all_read, 120)
    started = time.monotonic() - began
    await asyncio.sleep(15)

    def used() -> float:
        times = worker.cpu_times()
        return times.user + times.system

    before, at = used(), time.monotonic()
    await asyncio.sleep(IDLE_SECONDS)
    cpu = (used() - before) / (time.monotonic() - at)
    mib = worker.memory_info().rss / (1 << 20)

    # One warning in every queue at the same moment.
    sent = time.monotonic()
    for customer in found:
        document = stage.tenant.warning(customer["instance"], account=customer["account"])
        stage.aws.send_event(customer["account"], document)

    async def all_handled() -> bool:
        return await _count(stage, "SELECT count(*) FROM agent_tasks") == len(found)

    await stage.until(all_handled, most_seconds)
    took = time.monotonic() - sent
    print(  # noqa: T201
        f"\n{queues} queues: all read after {started:.1f} s; idle {cpu:.1%} of a core, {mib:.0f} MiB; "
        f"a warning in each taken in within {took:.1f} s"
    )
    assert mib <= most_mib
    assert cpu <= most_cpu


@pytest.mark.storm
@pytest.mark.timeout(300)
async def test_without_any_message_the_poll_finds_every_interruption(stage: Stage) -> None:
    """R-07: no queue brings anything; all are found within 90 s, inside the two minutes of the notice."""
    instances = await stage.launch_nodes(20)
    stage.start_worker()

    async def polled_once() -> bool:
        return await _count(stage, "SELECT count(*) FROM intake_health WHERE detector = 'poll' AND state = 'ok'") == 1

    await stage.until(polled_once, 60)
    interrupted: dict[str, float] = {}
    for instance in instances:
        stage.aws.interrupt(instance, send_event=False)
        interrupted[instance] = time.time()
        await asyncio.sleep(2)

    async def all_found() -> list[Any] | None:
        rows = await stage.interruptions()
        return rows if len(rows) == len(instances) else None

    rows = await stage.until(all_found, 120)
    waits = sorted(row.received_at.timestamp() - interrupted[row.instance_id] for row in rows)
    print(f"\nfound by the poll: median {waits[10]:.1f} s, last {waits[-1]:.1f} s")  # noqa: T201
    assert {tuple(row.detected_by) for row in rows} == {("poll",)}
    assert waits[-1] <= 90
