"""Open-loop load for storms and outages: warnings at their moments, agents and nodes that survive what the workers do.

Everything on this side goes on when Postgres or Redis is away, like machines of a customer would: what fails is done
again until it worked, and a warning's time runs from its moment.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from control.agents.repository import lease_tasks, record_report
from control.bus.bells import POLL_SECONDS
from control.gateways.aws import AwsGateway, Credentials, client_token
from control.interruptions.repository import insert_rows
from tests.control.interruptions.harness import Stage
from warehouse.contracts import TaskResult, TaskStatus
from warehouse.postgres.models import new_id

T = TypeVar("T")
AGENT_BATCH = 100


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """Until it worked: Postgres may be away."""
    while True:
        try:
            return await work()
        except (SQLAlchemyError, OSError):
            await asyncio.sleep(0.1)


@dataclass
class Load:
    """Clusters with nodes, their agents, and when each warning was due and in its agent's hands (Unix seconds)."""

    stage: Stage
    clusters: list[UUID]
    reports: bool = True
    due: dict[str, float] = field(default_factory=dict)
    leased: dict[str, float] = field(default_factory=dict)
    _joined: set[str] = field(default_factory=set)

    async def nodes(self, count: int) -> list[str]:
        """Running Spot instances of the customer, Ready nodes spread over the clusters."""
        keys = self.stage.aws.credentials(self.stage.tenant.account_id)
        gateway = AwsGateway(endpoint_url=self.stage.aws.url)
        rows: list[dict[str, Any]] = []
        for start in range(0, count, 50):
            size = min(50, count - start)
            answer = await gateway.call(
                "ec2",
                "RunInstances",
                {
                    "ImageId": "ami-0c0ffee00000x8664",
                    "InstanceType": "m5.large",
                    "MinCount": size,
                    "MaxCount": size,
                    "ClientToken": client_token(),
                    "InstanceMarketOptions": {"MarketType": "spot"},
                },
                region=self.stage.tenant.region,
                credentials=Credentials(keys.access_key_id, keys.secret_access_key),
            )
            for instance in answer["Instances"]:
                cluster = self.clusters[len(rows) % len(self.clusters)]
                rows.append(
                    self._node(
                        instance["InstanceId"],
                        instance["InstanceType"],
                        instance["Placement"]["AvailabilityZone"],
                        "spot",
                        cluster,
                    )
                )
        await gateway.close()
        async with self.stage.db.system() as conn:
            for start in range(0, count, 1000):
                await insert_rows(conn, "nodes", rows[start : start + 1000], order="id")
        return [row["instance_id"] for row in rows]

    def _node(self, instance_id: str, instance_type: str, zone: str, lifecycle: str, cluster: UUID) -> dict[str, Any]:
        return {
            "id": new_id(),
            "customer_id": self.stage.tenant.customer_id,
            "cluster_id": cluster,
            "node_name": f"node-{instance_id}",
            "instance_id": instance_id,
            "instance_type": instance_type,
            "availability_zone": zone,
            "node_type": lifecycle,
            "status": "ready",
            "cpu_cores": 2.0,
            "memory_bytes": 8 << 30,
            "last_seen_at": datetime.now(UTC),
        }

    async def warm_up(self) -> None:
        """One message through the intake, so that the start of the workers is not measured."""
        self.stage.aws.send_event(self.stage.queue, self.stage.tenant.rebalance("i-0000000000000000f"))
        await self.until(self.queue_empty, 60)

    def warn(self, instance_id: str, moment: float | None = None) -> None:
        """Send an instance's warning; its time runs from ``moment`` (Unix seconds; default: now)."""
        self.due[instance_id] = moment or time.time()
        self.stage.aws.send_event(self.stage.queue, self.stage.tenant.warning(instance_id))

    async def storm(self, instances: Sequence[str], seconds: float, *, seed: int = 31) -> None:
        """Warnings at seeded random moments within ``seconds``, whatever the workers do."""
        rng = random.Random(seed)
        began = time.time()
        moments = sorted(rng.uniform(0, seconds) for _ in instances)
        for instance, moment in zip(instances, moments, strict=True):
            await asyncio.sleep(max(0.0, began + moment - time.time()))
            self.warn(instance, began + moment)

    async def queue_empty(self) -> bool:
        return self.stage.aws.queue_depth(self.stage.queue) == (0, 0)

    async def all_offered(self) -> bool:
        return set(self.due) <= set(self.leased)

    async def all_closed(self) -> bool:
        rows = await self.stage.tenant.rows(
            "SELECT count(*) AS n FROM interruptions WHERE customer_id = :customer_id AND state = 'closed'"
        )
        return rows[0].n >= len(self.due)

    async def until(self, condition: Callable[[], Awaitable[T]], seconds: float = 120.0) -> T:
        """The first true answer; errors of a database that is away count as false."""
        ends = time.monotonic() + seconds
        while True:
            try:
                if found := await condition():
                    return found
            except (SQLAlchemyError, OSError):
                pass
            if time.monotonic() > ends:
                raise AssertionError(
                    f"not within {seconds} s: {condition.__name__}; {len(self.leased)} of {len(self.due)} offered\n"
                    + self.stage.logs()
                )
            await asyncio.sleep(0.02)

    def latencies(self) -> list[float]:
        """Seconds from each warning's moment to its agent's hands."""
        return [self.leased[instance] - due for instance, due in self.due.items() if instance in self.leased]

    # --- the customer's side

    async def agent(self, cluster: UUID) -> None:
        """Long polls by bell and every two seconds, drains in no time, reports until accepted."""
        async with self.stage.bells.listen("tasks", cluster) as bell:
            while True:
                if not await again(lambda: self._work(cluster)):
                    await bell.wait(POLL_SECONDS)

    async def _work(self, cluster: UUID) -> bool:
        async with self.stage.db.tenant(self.stage.tenant.customer_id) as conn:
            tasks = await lease_tasks(
                conn, cluster_id=cluster, agent="agent", limit=AGENT_BATCH, understands=["drain_node"]
            )
        now = time.time()
        for task in tasks:
            self.leased.setdefault(task.parameters["instance_id"], now)
        if tasks and self.reports:
            await again(lambda: self._report(cluster, tasks))
        return bool(tasks)

    async def _report(self, cluster: UUID, tasks: Sequence[Any]) -> None:
        async with self.stage.db.tenant(self.stage.tenant.customer_id) as conn:
            for task in tasks:
                report = TaskResult(
                    lease_epoch=task.lease_epoch, report_id=new_id(), status=TaskStatus.DONE, detail={"cordoned": True}
                )
                await record_report(conn, cluster_id=cluster, task_id=task.task_id, report=report)
        await self.stage.bells.ring("interruptions")

    async def joining(self) -> None:
        """Replacements become Ready nodes of the cluster they are tagged with; what EC2 took is gone."""
        while True:
            await again(self.join)
            await asyncio.sleep(0.3)

    async def join(self) -> None:
        """One look at the customer's machines, as the agents report them."""
        alive = self.stage.ours(alive=True)
        new = [instance for instance in alive if instance.instance_id not in self._joined]
        rows = [
            self._node(
                instance.instance_id,
                instance.instance_type,
                instance.zone_name,
                instance.lifecycle,
                UUID(instance.tags["cloudoptim:cluster"]),
            )
            for instance in new
        ]
        account = self.stage.tenant.account_id
        gone = [i.instance_id for i in self.stage.aws.instances(account_id=account, states=("terminated",))]
        async with self.stage.db.system() as conn:
            # After a restored backup some are known.
            await insert_rows(conn, "nodes", rows, order="instance_id", conflict="(cluster_id, instance_id) DO NOTHING")
            if gone:
                await conn.execute(
                    text(
                        "UPDATE nodes SET status = 'terminated', terminated_at = now() "
                        "WHERE instance_id = ANY(:gone) AND terminated_at IS NULL"
                    ),
                    {"gone": gone},
                )
        self._joined.update(instance.instance_id for instance in new)


@asynccontextmanager
async def load(stage: Stage, clusters: int = 1, *, reports: bool = True) -> AsyncIterator[Load]:
    """Load on a stage, instead of the stage's own agent."""
    await stage.pause()
    # Half an hour of load replaces more nodes than the default cap allows a customer.
    await stage.tenant.config("max_launches_per_hour", 10_000)
    more = [
        {
            "id": new_id(),
            "customer_id": stage.tenant.customer_id,
            "cluster_name": f"cluster-{number}",
            "region": stage.tenant.region,
            "status": "active",
        }
        for number in range(1, clusters)
    ]
    async with stage.db.system() as conn:
        await insert_rows(conn, "clusters", more, order="id")
    found = Load(stage, [stage.tenant.cluster_id, *(row["id"] for row in more)], reports)
    tasks = [asyncio.create_task(found.agent(cluster)) for cluster in found.clusters]
    tasks.append(asyncio.create_task(found.joining()))
    try:
        yield found
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
