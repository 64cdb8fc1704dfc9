"""The interruption path over real sockets: Postgres, Redis, the sandbox's AWS, an agent, and worker processes that
can be killed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from control.agents import repository as tasks
from control.bus.bells import Bells
from control.gateways.aws import AwsGateway, Credentials, client_token
from control.interruptions.repository import insert_rows
from control.sandbox.aws import network
from control.sandbox.aws.instances import Instance
from control.sandbox.aws.server import SandboxAWS, SandboxConfig
from tests.control.interruptions.tenants import Tenant, create_tenant
from tests.control.interruptions.workers import REPOSITORY, Worker, Zygote
from warehouse.contracts import OptimizationTask, TaskResult, TaskStatus
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database

DEPLOYMENT = "test-deployment"
# vCPUs, GiB, USD per hour On-Demand.
TYPES = {
    "m5.large": (2, 8, 0.096),
    "m5a.large": (2, 8, 0.086),
    "m6i.large": (2, 8, 0.096),
    "m5.xlarge": (4, 16, 0.192),
}


@dataclass
class Stage:
    """Everything outside the workers: a customer's account with a queue, its cluster's nodes, and their agent."""

    aws: SandboxAWS
    db: Database
    bells: Bells
    tenant: Tenant
    database_url: str
    redis_url: str
    log_folder: Path
    zygote: Zygote | None = None
    workers: list[Worker] = field(default_factory=list)
    leased: dict[UUID, float] = field(default_factory=dict)
    agent_works: bool = True
    nodes_join: bool = True
    join_seconds: float = 0.2
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def queue(self) -> str:
        return self.tenant.account_id

    # --- the customer's machines

    async def launch_nodes(
        self, count: int = 1, instance_type: str = "m5.large", zone: str = "us-east-1a"
    ) -> list[str]:
        """Running Spot instances of the customer that are Ready nodes of its cluster, not launched by us."""
        keys = self.aws.credentials(self.tenant.account_id)
        gateway = AwsGateway(endpoint_url=self.aws.url)
        answer = await gateway.call(
            "ec2",
            "RunInstances",
            {
                "ImageId": "ami-0c0ffee00000x8664",
                "InstanceType": instance_type,
                "MinCount": count,
                "MaxCount": count,
                "ClientToken": client_token(),
                "InstanceMarketOptions": {"MarketType": "spot"},
            },
            region=self.tenant.region,
            credentials=Credentials(keys.access_key_id, keys.secret_access_key),
        )
        await gateway.close()
        for instance in answer["Instances"]:
            zone = instance["Placement"]["AvailabilityZone"]
            await self.tenant.node(instance["InstanceId"], instance_type=instance_type, availability_zone=zone)
        return [instance["InstanceId"] for instance in answer["Instances"]]

    async def ingest_prices(self) -> None:
        """Newest prices of a few types in the zones that offer them, as the pipelines keep them."""
        keys = self.aws.credentials(self.tenant.account_id)
        gateway = AwsGateway(endpoint_url=self.aws.url)
        answer = await gateway.call(
            "ec2",
            "DescribeInstanceTypeOfferings",
            {
                "LocationType": "availability-zone",
                "Filters": [{"Name": "instance-type", "Values": sorted(TYPES)}],
            },
            region=self.tenant.region,
            credentials=Credentials(keys.access_key_id, keys.secret_access_key),
        )
        await gateway.close()
        now = datetime.now(UTC)
        common = {"region": self.tenant.region, "effective_at": now, "source": "observed"}
        spot = [
            common
            | {
                "zone_id": network.zone_ids(self.tenant.account_id, self.tenant.region)[offer["Location"]],
                "availability_zone": offer["Location"],
                "instance_type": offer["InstanceType"],
                "product": "Linux/UNIX",
                "price_usd_per_hour": TYPES[offer["InstanceType"]][2] * 0.4,
            }
            for offer in answer["InstanceTypeOfferings"]
        ]
        on_demand = [
            common
            | {
                "instance_type": name,
                "product": "Linux/UNIX",
                "price_usd_per_hour": price,
                "vcpus": vcpus,
                "memory_gib": memory,
            }
            for name, (vcpus, memory, price) in TYPES.items()
        ]
        async with self.db.system() as conn:
            await insert_rows(conn, "spot_price_current", spot, order="zone_id")
            await insert_rows(conn, "on_demand_price", on_demand, order="instance_type")

    def zone_of(self, instance_id: str) -> str:
        """The zone an instance is in."""
        (found,) = [i for i in self.aws.instances() if i.instance_id == instance_id]
        return found.zone_name

    def ours(self, *, alive: bool = False) -> list[Instance]:
        """Instances that carry our tag."""
        states = ("pending", "running") if alive else None
        return [
            instance
            for instance in self.aws.instances(account_id=self.tenant.account_id, states=states)
            if instance.tags.get("cloudoptim:managed") == DEPLOYMENT
        ]

    async def _join_replacements(self) -> None:
        """Instances of ours become Ready nodes, as an agent would report them."""
        started: asyncio.Queue[Instance] = asyncio.Queue()

        def changed(instance: Instance, state: str) -> None:
            if state in ("pending", "running"):
                started.put_nowait(instance)

        self.aws.on_change(changed)
        # Those that started while nobody listened.
        for instance in self.ours(alive=True):
            started.put_nowait(instance)
        joining: set[str] = set()
        async with asyncio.TaskGroup() as tasks_of_nodes:
            while True:
                instance = await started.get()
                ours = instance.tags.get("cloudoptim:managed") == DEPLOYMENT
                known = instance.instance_id in joining or instance.instance_id in self.tenant.instances
                if ours and self.nodes_join and not known:
                    joining.add(instance.instance_id)
                    tasks_of_nodes.create_task(self._join(instance))

    async def _join(self, instance: Instance) -> None:
        await asyncio.sleep(self.join_seconds)
        while self.state_of(instance.instance_id) in ("pending", "running"):
            try:
                await self.tenant.node(
                    instance.instance_id,
                    instance_type=instance.instance_type,
                    availability_zone=instance.zone_name,
                    node_type=instance.lifecycle,
                )
                return
            except (SQLAlchemyError, OSError):
                await asyncio.sleep(0.5)

    def state_of(self, instance_id: str) -> str:
        """An instance's state as EC2 has it now."""
        return self.aws._instances.by_id[instance_id].state(self.aws._instances.clock())

    async def _agent(self) -> None:
        """A good agent: long polls by bell, drains in no time, reports until it is accepted."""
        async with self.bells.listen("tasks", self.tenant.cluster_id) as bell:
            while True:
                leased: list[OptimizationTask] = []
                with contextlib.suppress(SQLAlchemyError, OSError):
                    # A server that does not answer is asked again.
                    leased = await self._lease() if self.agent_works else []
                    for task in leased:
                        self.leased.setdefault(task.task_id, time.time())
                        await self._report(task)
                if not leased:
                    await bell.wait(0.5)

    async def _lease(self) -> list[OptimizationTask]:
        async with self.db.tenant(self.tenant.customer_id) as conn:
            return await tasks.lease_tasks(
                conn, cluster_id=self.tenant.cluster_id, agent="agent", limit=50, understands=["drain_node"]
            )

    async def _report(self, task: OptimizationTask) -> None:
        report = TaskResult(
            lease_epoch=task.lease_epoch, report_id=new_id(), status=TaskStatus.DONE, detail={"cordoned": True}
        )
        async with self.db.tenant(self.tenant.customer_id) as conn:
            await tasks.record_report(conn, cluster_id=self.tenant.cluster_id, task_id=task.task_id, report=report)
        await self.bells.ring("interruptions")

    async def pause(self) -> None:
        """Stop the agent and the joining of nodes, before the database goes away."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.db.engine.dispose()

    async def resume(self) -> None:
        """Start agent and joining (again)."""
        self._tasks = [asyncio.create_task(self._agent()), asyncio.create_task(self._join_replacements())]

    async def add_customer(self) -> Tenant:
        """Another customer with an account, a role and a queue of its own; no agent works for it."""
        tenant = await create_tenant(self.db)
        await connect(self.aws, tenant)
        return tenant

    # --- our processes

    def start_worker(self, *, command: Sequence[str] = ("control.worker",), **environment: str) -> Worker:
        """A worker process; its log is a file in ``log_folder``.

        Forked in milliseconds where the stage has a zygote. With an environment of its own it is started afresh: the
        loader and the interpreter read theirs before anything else.
        """
        keys = self.aws.credentials()
        path = self.log_folder / f"worker-{len(self.workers)}.log"
        own = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "AWS_ENDPOINT_URL": self.aws.url,
            "AWS_ACCESS_KEY_ID": keys.access_key_id,
            "AWS_SECRET_ACCESS_KEY": keys.secret_access_key,
            "AWS_REGION": "us-east-1",
            "CLOUDOPTIM_DEPLOYMENT_ID": DEPLOYMENT,
            "CLOUDOPTIM_WORKER_METRICS_PORT": "0",
            "CLOUDOPTIM_HOME": str(self.log_folder),
        }
        process: Worker
        if self.zygote is not None and not environment:
            process = self.zygote.fork(own, path)
        else:
            with path.open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=REPOSITORY,
                    env=own | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        self.workers.append(process)
        return process

    async def stop_workers(self) -> None:
        for process in self.workers:
            if process.poll() is None:
                process.kill()
        for process in self.workers:
            await asyncio.to_thread(process.wait, 10)

    def logs(self) -> str:
        """The workers' logs, for a failing test."""
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.log_folder.glob("worker-*.log")))

    # --- time that passes, without waiting for it

    def redeliver(self, name: str | None = None) -> None:
        """The visibility timeout is over: what was received and not deleted is visible again."""
        queue = self.aws._queue(name or self.queue)
        for message in list(queue.by_id.values()):
            if message.visible_at > time.time():
                self.aws._sqs.change_visibility(queue, f"{message.id}:{message.receipt}", 0)

    async def pass_leases(self) -> None:
        """Leases of launches have run out, and calls without an answer are due again."""
        for table in ("launch_batches", "launch_intents"):
            await self.tenant.rows(
                f"UPDATE {table} SET lease_until = now(), next_action_at = least(next_action_at, now()) "
                "WHERE customer_id = :customer_id RETURNING 1"
            )

    async def pass_rounds(self) -> None:
        """The minute, or less, between two rounds that ask the cloud or end instances is over."""
        await self.tenant.rows("UPDATE round_claims SET claimed_until = now() RETURNING 1")

    def calls(self, action: str | None = None) -> list[dict[str, Any]]:
        """What the customer's account was asked, oldest first."""
        return [entry for entry in self.aws.history(action=action) if entry["account"] == self.tenant.account_id]

    # --- looking

    async def interruptions(self) -> list[Any]:
        return await self.tenant.rows("SELECT * FROM interruptions WHERE customer_id = :customer_id ORDER BY id")

    async def closed(self, count: int, seconds: float = 30.0) -> list[Any]:
        """Wait until ``count`` interruptions are closed."""

        async def all_closed() -> list[Any] | None:
            rows = await self.interruptions()
            done = [row for row in rows if row.state == "closed"]
            return rows if len(done) >= count else None

        return await self.until(all_closed, seconds)

    async def until(self, condition: Callable[[], Awaitable[Any]], seconds: float = 30.0) -> Any:
        """The first true answer of ``condition``, or a failure that shows the workers' logs."""
        ends = time.monotonic() + seconds
        while True:
            found = await condition()
            if found:
                return found
            if time.monotonic() > ends:
                rows = [(row.instance_id, row.state, row.outcome) for row in await self.interruptions()]
                raise AssertionError(f"not within {seconds} s; interruptions: {rows}\n{self.logs()}")
            await asyncio.sleep(0.05)


async def connect(aws: SandboxAWS, tenant: Tenant) -> None:
    """Give a customer its account, role and queue."""
    external_id = (await tenant.row("SELECT external_id FROM customers WHERE id = :customer_id")).external_id
    account = aws.add_account(tenant.account_id, external_id=str(external_id))
    async with tenant.db.system() as conn:
        await conn.execute(
            text("UPDATE customers SET aws_role_arn = :role, sqs_queue_url = :queue WHERE id = :id"),
            {"role": account.role_arn, "queue": account.queue_url, "id": tenant.customer_id},
        )


@asynccontextmanager
async def stage(
    database_url: str,
    redis_url: str,
    log_folder: Path,
    *,
    config: SandboxConfig | None = None,
    zygote: Zygote | None = None,
    **values: Any,
) -> AsyncIterator[Stage]:
    """A stage with its sandbox and agent running; workers are started by the test. ``values`` are the customer's."""
    db = Database(database_url, pool_size=6, max_overflow=6, pool_timeout=30)
    bells = Bells(redis_url)
    bells.start()
    await bells.heard()
    async with SandboxAWS(config) as aws:
        tenant = await create_tenant(db, **values)
        await connect(aws, tenant)
        found = Stage(aws, db, bells, tenant, database_url, redis_url, log_folder, zygote)
        await found.ingest_prices()
        await found.resume()
        try:
            yield found
        finally:
            await found.stop_workers()
            for task in found._tasks:
                task.cancel()
            ended = await asyncio.gather(*found._tasks, return_exceptions=True)
            await bells.close()
            await db.close()
            for error in ended:
                # An agent that died in silence looks like a server that lost its tasks.
                if isinstance(error, Exception):
                    raise error


def kill(process: Worker) -> None:
    """SIGKILL, and wait for the end."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait(10)


_gates = itertools.count(1)


class Gate:
    """A transaction held in the middle of its COMMIT, by the database itself.

    A deferred trigger runs when the client has sent COMMIT and waits there for a lock that the test has. A client
    killed meanwhile never learns what became of it; the test decides that.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], key: int) -> None:
        self._connection, self._key = connection, key
        self._open = False

    async def _waiting(self) -> list[int]:
        found = await self._connection.execute(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = 4711 AND objid = %s AND NOT granted",
            (self._key,),
        )
        return [row[0] for row in await found.fetchall()]

    async def reached(self, seconds: float = 15.0) -> None:
        """Wait until a transaction is held."""
        async with asyncio.timeout(seconds):
            while not await self._waiting():  # noqa: ASYNC110 - the database's doing
                await asyncio.sleep(0.01)

    async def commit(self) -> None:
        """Let it go: the transaction is committed, whoever may still be there to learn of it."""
        held = await self._waiting()
        self._open = True
        await self._connection.execute("SELECT pg_advisory_unlock(4711, %s)", (self._key,))
        busy = "SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s) AND state = 'active' AND backend_xid IS NOT NULL"
        async with asyncio.timeout(10):
            while await (await self._connection.execute(busy, (held,))).fetchall():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def roll_back(self) -> None:
        """Its connection is lost before the commit: nothing of it is there."""
        for pid in await self._waiting():
            await self._connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        self._open = True
        await self._connection.execute("SELECT pg_advisory_unlock(4711, %s)", (self._key,))


@asynccontextmanager
async def gate(database_url: str, table: str, when: str, *, on: str = "INSERT") -> AsyncIterator[Gate]:
    """Hold the next transactions with a row of ``table`` for which ``when`` (about NEW and OLD) is true."""
    key = next(_gates)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("SELECT pg_advisory_lock(4711, %s)", (key,))
        await connection.execute(f"""
            CREATE FUNCTION gate_{key}() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_advisory_xact_lock_shared(4711, {key}); RETURN NULL; END $$""")
        await connection.execute(f"""
            CREATE CONSTRAINT TRIGGER gate_{key} AFTER {on} ON {table} DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION gate_{key}()""")
        held = Gate(connection, key)
        try:
            yield held
        finally:
            if not held._open:
                await held.commit()
            await connection.execute(f"DROP TRIGGER gate_{key} ON {table}")
            await connection.execute(f"DROP FUNCTION gate_{key}()")
