"""The agent against the real control service: Postgres, Redis, the service's own process, the Kubernetes double."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text

from control.agents.repository import NewTask, create_tasks
from control.bus.bells import Bells
from control.embedded import free_port
from control.sandbox.identity import ClusterIdentity, CustomerIdentity, agent_key
from control.sandbox.kubernetes.kubelet import PodTiming
from control.sandbox.registration import Registered, register
from tests.control.agent.harness import World, eventually
from warehouse.contracts import TaskType
from warehouse.postgres.session import Database, SyncDatabase

SECRETS = {"JWT_SECRET_KEY": "j" * 40, "API_KEY_SALT": "p" * 40, "CLOUDOPTIM_MASTER_KEY": "m" * 40}


class ControlService:
    """`cloudoptim control` in its own process, shared by the tests of this file."""

    def __init__(self, home: Path, database_url: str, redis_url: str) -> None:
        self.database_url, self.redis_url = database_url, redis_url
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home / "control.log"
        self.process: subprocess.Popen[bytes] | None = None
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUDOPTIM_", "AWS_"))}
        self._environment = {
            **inherited,
            **SECRETS,
            "CLOUDOPTIM_HOME": str(home),
            "CENTRAL_SERVER_PORT": str(self.port),
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "CLOUDOPTIM_SANDBOX": "1",
        }

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "control.cli", "control"], env=self._environment, stdout=log, stderr=log
            )
        eventually(self._answers, 120, "the control service")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Served:
    """A customer with one cluster at the control service."""

    def __init__(self, world: World, control: ControlService) -> None:
        self.world, self.control = world, control
        self.customer_id, self.cluster_id = uuid4(), world.cluster_id
        self.key = agent_key()
        cluster = ClusterIdentity(str(self.cluster_id), "prod", "us-east-1", self.key, world.TOKEN)
        customer = CustomerIdentity(
            customer_id=str(self.customer_id),
            company_name="Test",
            email="t@test.example",
            account_id=f"{uuid4().int % 10**12:012}",
            region="us-east-1",
            external_id=str(uuid4()),
            clusters=(cluster,),
        )
        register(
            control.database_url,
            SECRETS["CLOUDOPTIM_MASTER_KEY"],
            SECRETS["API_KEY_SALT"],
            [Registered(customer, "arn:aws:iam::1:role/x", "", {"prod": "http://127.0.0.1:1"})],
        )
        self.database = SyncDatabase(control.database_url)

    def start_agent(self, **environment: str) -> None:
        self.world.start_agent(
            **{"CLOUDOPTIM_CONTROL_URL": self.control.url, "CLOUDOPTIM_AGENT_KEY": self.key, **environment}
        )

    async def give(self, kind: TaskType, seconds: float = 60, **parameters: Any) -> UUID:
        database, bells = Database(self.control.database_url), Bells(self.control.redis_url)
        deadline = datetime.now(UTC) + timedelta(seconds=seconds)
        task = NewTask(
            customer_id=self.customer_id,
            cluster_id=self.cluster_id,
            task_type=kind,
            parameters=parameters,
            dedupe_key=str(uuid4()),
            deadline_at=deadline,
        )
        try:
            async with database.system() as connection:
                await create_tasks(connection, [task])
            await bells.ring("tasks", self.cluster_id)
        finally:
            await bells.close()
            await database.close()
        return task.task_id

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        with self.database.system() as connection:
            return list(connection.execute(text(statement), {"cluster": self.cluster_id, **parameters}))

    def ended(self, task_id: UUID, seconds: float = 30) -> Any:
        return eventually(
            lambda: self.rows("SELECT * FROM agent_tasks WHERE id = :id AND finished_at IS NOT NULL", id=task_id),
            seconds,
            f"an end of task {task_id}",
        )[0]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory, postgres_url: str, redis_url: str) -> Iterator[ControlService]:
    service = ControlService(tmp_path_factory.mktemp("control"), postgres_url, redis_url)
    try:
        service.start()
        yield service
    finally:
        service.kill()


@pytest.fixture
def served(tmp_path: Path, control: ControlService, request: pytest.FixtureRequest) -> Iterator[Served]:
    world = World(tmp_path / "state", PodTiming(start_seconds=(0.05, 0.2), stop_seconds=(0.05, 0.3)))
    world.start()
    running = Served(world, control)
    try:
        yield running
    finally:
        running.database.close()
        world.stop()
    for log in (world.log, control.log):
        if log.exists():
            request.node.add_report_section("call", log.name, log.read_text()[-5000:])


async def test_a_task_reaches_the_cluster_and_its_timeline_reaches_the_table(served: Served) -> None:
    world = served.world
    instance = world.add_node("n1")
    world.add_node("n2")
    world.deploy("web", 4)
    served.start_agent()
    eventually(lambda: served.rows("SELECT 1 FROM clusters WHERE id = :cluster AND agent_version = '0.1.0'"))
    given = time.monotonic()
    task_id = await served.give(TaskType.DRAIN_NODE, node_name="n1", instance_id=instance)
    eventually(lambda: world.core.read_node("n1").spec.unschedulable)
    assert time.monotonic() - given < 2
    row = served.ended(task_id)
    assert (row.state, row.result["cordoned"]) == ("done", True)
    assert row.created_at <= row.first_leased_at <= row.cordoned_at <= row.finished_at
    assert row.attempts == 1
    refused = served.ended(await served.give(TaskType.DRAIN_NODE, node_name="n2", instance_id="i-0123456789abcdef0"))
    assert refused.state == "refused"


async def test_metrics_and_state_are_taken_without_a_complaint(served: Served) -> None:
    world = served.world
    for index in range(3):
        world.add_node(f"n{index}")
    world.deploy("web", 5)
    served.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.5")
    eventually(lambda: len(served.rows("SELECT 1 FROM metric_batches WHERE cluster_id = :cluster")) >= 3)
    batches = served.rows("SELECT * FROM metric_batches WHERE cluster_id = :cluster ORDER BY seq")
    assert [row.seq for row in batches] == list(range(len(batches)))
    eventually(lambda: len(served.rows("SELECT 1 FROM nodes WHERE cluster_id = :cluster AND status = 'ready'")) == 3)
    samples = served.rows(
        "SELECT DISTINCT metric FROM metric_samples WHERE cluster_id = :cluster AND metric LIKE 'workload%'"
    )
    assert len(samples) == 5
    log = world.log.read_text()
    assert "rejected" not in log
    assert "warns" not in log


async def test_a_notice_on_a_node_becomes_an_interruption(served: Served) -> None:
    world = served.world
    instance = world.add_node("n1")
    served.start_agent()
    eventually(lambda: served.rows("SELECT 1 FROM nodes WHERE cluster_id = :cluster"))
    acts_at = datetime.now(UTC) + timedelta(seconds=118)
    notice = json.dumps({"action": "terminate", "time": acts_at.strftime("%Y-%m-%dT%H:%M:%SZ")})
    world.core.patch_node("n1", {"metadata": {"annotations": {"cloudoptim.io/imds-spot-instance-action": notice}}})
    (row,) = eventually(lambda: served.rows("SELECT * FROM interruptions WHERE instance_id = :i", i=instance))
    assert row.detected_by == ["agent"]
    assert abs((row.deadline_at - acts_at).total_seconds()) < 1
    # the drain that follows is the agent's own next task
    (task,) = eventually(
        lambda: served.rows("SELECT * FROM agent_tasks WHERE interruption_id = :id AND state = 'done'", id=row.id)
    )
    assert task.result["node_name"] == "n1"


async def test_the_control_service_killed_in_the_middle_loses_nothing(served: Served) -> None:
    world = served.world
    instance = world.add_node("n1")
    world.deploy("web", 2, terminationGracePeriodSeconds=5)
    served.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.5")
    task_id = await served.give(TaskType.DRAIN_NODE, node_name="n1", instance_id=instance)
    eventually(lambda: world.core.read_node("n1").spec.unschedulable)
    served.control.kill()
    eventually(lambda: not [p for p in world.pods("web") if p.spec.node_name == "n1"])
    eventually(lambda: "a metric batch waits" in world.log.read_text())
    served.control.start()
    assert served.ended(task_id).state == "done"

    def complete() -> bool:
        sequence = [
            r.seq for r in served.rows("SELECT seq FROM metric_batches WHERE cluster_id = :cluster ORDER BY seq")
        ]
        return len(sequence) > 6 and sequence == list(range(len(sequence)))

    eventually(complete, 20)


async def test_sigterm_answers_who_waits_before_the_connections_close(served: Served) -> None:
    """The agent's long poll of 20 s ends with an answer, and so does the one that follows it on the same connection;
    the log of a clean stop holds no exception."""
    control = served.control
    before = control.log.stat().st_size
    async with httpx.AsyncClient(headers={"X-API-Key": served.key}, timeout=30) as client:
        query = {"cluster_id": str(served.cluster_id), "wait": 20}
        poll = asyncio.create_task(client.get(f"{control.url}/api/v1/client/tasks", params=query))
        await asyncio.sleep(1)
        assert not poll.done()
        assert control.process is not None
        control.process.terminate()
        answer = await poll
        with contextlib.suppress(httpx.TransportError):
            while True:
                again = await client.get(f"{control.url}/api/v1/client/tasks", params=query)
                assert (again.status_code, again.json()["tasks"]) == (200, [])
    assert (answer.status_code, answer.json()["tasks"]) == (200, [])
    await asyncio.to_thread(control.process.wait, 10)
    try:
        assert "Traceback" not in control.log.read_text()[before:]
        assert '"level": "error"' not in control.log.read_text()[before:]
    finally:
        control.start()
