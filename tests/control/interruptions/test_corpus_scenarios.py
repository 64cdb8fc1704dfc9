"""The corpus's scenarios: several messages in a certain order, among good ones, by hand and through a real worker."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from control.gateways.aws import AwsGateway
from control.interruptions import closing, repository
from control.interruptions.runtime import Runtime
from control.interruptions.service import Received, ingest
from control.interruptions.taking import accept_agent_events
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.corpus import Scenario, scenarios
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.tenants import Tenant, create_tenant
from warehouse.contracts import AgentEvent, EventKind, EventSource, InterruptionAction
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database

ALL = scenarios()
# Scenarios without good messages beside: what all of a customer's messages are dropped for, or are an hour late for.
ALONE = {
    "q14-an-hour-later",
    "q18-cluster-was-deleted",
    "q18-customer-is-offboarded",
    "q18-customer-is-offboarding",
    "q18-customer-is-suspended",
}
QUEUE_CASES = {f"q{number:02d}" for number in range(1, 23)}


class Play:
    """One scenario on a stage of its own customer: ``deliver`` is all that differs by hand and through a worker."""

    def __init__(self, scenario: Scenario, db: Database, tenant: Tenant) -> None:
        self.scenario, self.db, self.tenant = scenario, db, tenant
        self.instances: dict[str, str] = {}
        self.good: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.clusters: dict[str, UUID] = {"one": tenant.cluster_id}
        self.places: dict[str, Tenant] = {}

    async def prepare(self) -> None:
        for name, given in self.scenario.nodes.items():
            place = self.tenant
            if given.get("customer") == "another":
                place = await create_tenant(self.db)
            elif "cluster" in given:
                place = await self._second_cluster(given["cluster"])
            self.places[name] = place
            if given.get("registered", True):
                self.instances[name] = await place.node()
            else:
                self.instances[name] = f"i-{new_id().hex[-17:]}"

    async def _second_cluster(self, name: str) -> Tenant:
        cluster = {
            "id": new_id(),
            "customer_id": self.tenant.customer_id,
            "cluster_name": name,
            "region": self.tenant.region,
            "status": "active",
        }
        async with self.db.system() as conn:
            await repository.insert_rows(conn, "clusters", [cluster], order="id")
        self.clusters[name] = cluster["id"]
        return Tenant(self.db, self.tenant.customer_id, cluster["id"], self.tenant.account_id, self.tenant.region)

    # --- steps

    async def run(self) -> None:
        for step in self.scenario.steps:
            if "parallel" in step:
                documents = [[self.document(event)[0] for event in share] for share in step["parallel"]]
                await asyncio.gather(*(self.deliver(share, step) for share in documents))
            elif step.get("event") == "agent":
                await self._agent(self.instances[step["node"]])
            elif "event" in step:
                await self.deliver(self.document(step), step)
            elif "raw" in step:
                await self.deliver([step["raw"]], step)
            elif "expect" in step:
                await self.check(step["expect"])
            else:
                await self._world(step)

    def document(self, step: dict[str, Any]) -> list[str]:
        """The bodies of one step's messages."""
        instance, tenant = self.instances[step["node"]], self.tenant
        at = datetime.now(UTC) - timedelta(seconds=step.get("age_seconds", 0))
        values = {"time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}
        if "id" in step:
            values["id"] = self.ids.setdefault(step["id"] + step["node"], str(new_id()))
        times = step.get("times", 1)
        if step.get("each_its_own_id"):
            return [json.dumps(tenant.warning(instance, **values)) for _ in range(times)]
        match step["event"]:
            case "warning":
                event = tenant.warning(instance, **values)
            case "rebalance":
                event = tenant.rebalance(instance, **values)
            case state:
                event = tenant.state_change(instance, state, **values)
        return [json.dumps(event)] * times

    async def neighbour(self) -> str:
        """A good warning about a node of its own."""
        node = await self.tenant.node()
        event = self.tenant.warning(node)
        self.good[node] = event["id"]
        return json.dumps(event)

    async def deliver(self, bodies: list[str], step: dict[str, Any]) -> None:
        raise NotImplementedError

    async def sweep(self) -> None:
        raise NotImplementedError

    async def _agent(self, instance: str) -> None:
        event = AgentEvent(
            event_type=EventKind.SPOT_INTERRUPTION,
            instance_id=instance,
            occurred_at=datetime.now(UTC),
            instance_action=InterruptionAction.TERMINATE,
        )
        await accept_agent_events(
            self.db,
            None,
            customer_id=self.tenant.customer_id,
            cluster_id=self.tenant.cluster_id,
            region=self.tenant.region,
            events=[event],
        )

    async def _world(self, step: dict[str, Any]) -> None:
        match step:
            case {"register": name}:
                await self.places[name].node(self.instances[name])
            case {"gone": name}:
                await self._sql(
                    "UPDATE nodes SET terminated_at = now(), status = 'terminated' WHERE instance_id = :i",
                    i=self.instances[name],
                )
            case {"close": name}:
                await self._sql(
                    "UPDATE interruptions SET state = 'closed', outcome = 'handled', closed_at = now() "
                    "WHERE instance_id = :i",
                    i=self.instances[name],
                )
            case {"cluster": status}:
                await self._sql("UPDATE clusters SET status = :s WHERE id = :id", s=status, id=self.tenant.cluster_id)
            case {"customer": status}:
                await self._sql("UPDATE customers SET status = :s WHERE id = :id", s=status, id=self.tenant.customer_id)
            case {"minutes_pass": minutes}:
                await self._sql(
                    "UPDATE interruptions SET received_at = received_at - make_interval(mins => :m) "
                    "WHERE customer_id = :id",
                    m=minutes,
                    id=self.tenant.customer_id,
                )
            case {"sweep": True}:
                await self.sweep()
            case _:
                raise AssertionError(f"{self.scenario.name}: no such step {step}")

    async def _sql(self, sql: str, **values: Any) -> None:
        async with self.db.system() as conn:
            await conn.execute(text(sql), values)

    # --- what became of it

    async def check(self, expect: dict[str, Any]) -> None:
        assert await self.differences(expect) == []

    async def differences(self, expect: dict[str, Any]) -> list[str]:
        """What is not as expected, in words."""
        rows = await self.tenant.rows("SELECT * FROM inbox_messages WHERE customer_id = :customer_id")
        inbox = [row for row in rows if row.dedupe_key not in self.good.values() and row.source == "sqs"]
        found: list[str] = []

        def same(what: str, value: Any, wanted: Any) -> None:
            if value != wanted:
                found.append(f"{what} is {value!r}, expected {wanted!r}")

        if "inbox" in expect:
            same("the inbox", dict(Counter(row.outcome for row in inbox)), expect["inbox"])
        if "deliveries" in expect:
            same("deliveries", sum(row.receive_count for row in inbox), expect["deliveries"])
        if "deliveries_at_least" in expect and sum(row.receive_count for row in rows) < expect["deliveries_at_least"]:
            found.append("it was not delivered again")
        if "reason" in expect and not any((row.reason or "").startswith(expect["reason"]) for row in inbox):
            found.append(f"reasons are {[row.reason for row in inbox]}, expected {expect['reason']!r}")
        if "interruptions" in expect:
            found += await self._interruptions(expect["interruptions"])
        if "health" in expect:
            found += await self._health(expect["health"])
        for node in self.good:
            task = "SELECT 1 FROM agent_tasks WHERE parameters ->> 'instance_id' = :i"
            same(f"drains of the good neighbour {node}", len(await self.tenant.rows(task, i=node)), 1)
        return found

    async def _interruptions(self, expect: dict[str, dict[str, Any]]) -> list[str]:
        rows = await self.tenant.rows(
            """SELECT i.*, (SELECT count(*) FROM agent_tasks t WHERE t.interruption_id = i.id) AS drains,
                      (SELECT count(*) FROM launch_intents l WHERE l.interruption_id = i.id) AS launches
               FROM interruptions i WHERE i.customer_id = :customer_id"""
        )
        names = {instance: name for name, instance in self.instances.items()}
        found = [f"{row.instance_id} twice" for row in rows if sum(r.instance_id == row.instance_id for r in rows) > 1]
        by_name = {names[row.instance_id]: row for row in rows if row.instance_id in names}
        if by_name.keys() != expect.keys():
            found.append(f"interruptions of {sorted(by_name)}, expected {sorted(expect)}")
        for name in by_name.keys() & expect.keys():
            for key, wanted in expect[name].items():
                value = getattr(by_name[name], key)
                value = sorted(value) if isinstance(value, list) else value
                if value != wanted:
                    found.append(f"{name}: {key} is {value!r}, expected {wanted!r}")
            cluster = self.scenario.nodes[name].get("cluster", "one")
            if by_name[name].cluster_id not in (None, self.clusters[cluster]):
                found.append(f"{name}: given to another cluster")
        return found

    async def _health(self, expect: dict[str, str]) -> list[str]:
        rows = await self.tenant.rows(
            "SELECT * FROM intake_health WHERE customer_id = :customer_id AND detector = 'sqs'"
        )
        if not rows:
            return ["nothing is known of the queue's health"]
        return [
            f"health: {key} is {getattr(rows[0], key)!r}, expected {wanted!r}"
            for key, wanted in expect.items()
            if wanted not in (getattr(rows[0], key) or "")
        ]


# --- by hand


class ByHand(Play):
    """Messages go straight to the intake, a good one beside each."""

    async def deliver(self, bodies: list[str], step: dict[str, Any]) -> None:
        now = datetime.now(UTC) + timedelta(seconds=step.get("received_after_seconds", 0))
        batch = [Received(body, EventSource.SQS) for body in bodies]
        if self.scenario.neighbours:
            batch.insert(len(batch) // 2, Received(await self.neighbour(), EventSource.SQS))
        await ingest(self.db, await self.tenant.facts(), batch, now=now)

    async def sweep(self) -> None:
        aws = AwsGateway(endpoint_url="http://127.0.0.1:9")
        await closing.settle_unmatched(Runtime(self.db, self.db, aws, None, "by-hand", DEPLOYMENT))  # type: ignore[arg-type]
        await aws.close()


def test_every_class_of_bad_input_has_a_case_of_both_kinds() -> None:
    """By hand and through a queue; what is about the queue itself has nothing to show by hand."""
    from tests.control.interruptions.corpus import cases
    from tests.control.interruptions.test_corpus_intake import sendable

    by_hand = {case.name[:3] for case in cases()} | {scenario.name[:3] for scenario in ALL if scenario.unit}
    over_a_queue = {case.name[:3] for case in cases() if sendable(case.body)}
    over_a_queue |= {scenario.name[:3] for scenario in ALL if scenario.end_to_end}
    assert by_hand >= QUEUE_CASES - {"q19", "q20"}
    assert over_a_queue >= QUEUE_CASES
    # Good messages among the bad ones, wherever it is not the good ones that are refused.
    alone = {scenario.name for scenario in ALL if not scenario.neighbours}
    assert alone == ALONE


@pytest.mark.parametrize("scenario", [s for s in ALL if s.unit], ids=lambda scenario: scenario.name)
async def test_by_hand(db: Database, tenant: Tenant, scenario: Scenario) -> None:
    play = ByHand(scenario, db, tenant)
    await play.prepare()
    await play.run()
    await play.check(scenario.expect)


# --- through a queue and a worker


class ThroughAWorker(Play):
    """Messages go through the customer's own queue, a good one after each; a worker process reads it."""

    stage: Stage
    seconds = 60.0
    redelivered = 0.0

    async def deliver(self, bodies: list[str], step: dict[str, Any]) -> None:
        message = ""
        for body in bodies:
            message = self.stage.aws.send_event(self.tenant.account_id, body)
            if len(bodies) < 20 and self.scenario.neighbours:
                self.stage.aws.send_event(self.tenant.account_id, await self.neighbour())
        if "event" in step:
            key = json.loads(bodies[-1])["id"]
            await self._until(lambda: self._known(message, key))

    async def _known(self, message: str, key: str) -> list[str]:
        found = await self.tenant.rows(
            "SELECT 1 FROM inbox_messages "
            "WHERE customer_id = :customer_id AND (sqs_message_id = :message OR dedupe_key = :key)",
            message=message,
            key=key,
        )
        return [] if found else [f"message {key} was not taken in"]

    async def sweep(self) -> None:
        """The worker's own."""

    async def _world(self, step: dict[str, Any]) -> None:
        if "fault" in step:
            self.stage.aws.inject(Fault(**step["fault"], account_id=self.tenant.account_id))
            return
        if "queue_region" in step:
            # As somebody who copied the address of another region's queue: there is none of this name.
            await self._sql(
                "UPDATE customers SET sqs_queue_url = regexp_replace(sqs_queue_url, '^.*://[^/]+', :host) "
                "WHERE id = :id",
                host=f"https://sqs.{step['queue_region']}.amazonaws.com",
                id=self.tenant.customer_id,
            )
            return
        await super()._world(step)

    async def check(self, expect: dict[str, Any]) -> None:
        await self._until(lambda: self.differences(expect))

    async def differences(self, expect: dict[str, Any]) -> list[str]:
        found = await super().differences(expect)
        if expect.get("queue_empties") and self.stage.aws.queue_depth(self.tenant.account_id) != (0, 0):
            found.append("the queue is not empty")
            # Not so often that a handle is stale before it can be used.
            if time.monotonic() - self.redelivered > 3.0:
                self.stage.redeliver(self.tenant.account_id)
                self.redelivered = time.monotonic()
        return found

    async def _until(self, differences: Any) -> None:
        ends = time.monotonic() + self.seconds
        while found := await differences():
            if time.monotonic() > ends:
                raise AssertionError(f"{self.scenario.name}: {found}")
            await asyncio.sleep(0.1)


async def run_through_a_worker(stage: Stage, chosen: list[Scenario]) -> None:
    plays = []
    for scenario in chosen:
        play = ThroughAWorker(scenario, stage.db, await stage.add_customer())
        play.stage = stage
        await play.prepare()
        plays.append(play)
    # What is broken before the first message is broken before the first poll.
    for play in plays:
        for step in play.scenario.steps:
            if "queue_region" in step or ("fault" in step and step["fault"]["action"] == "ReceiveMessage"):
                await play._world(step)
                play.scenario.steps.remove(step)
    worker = stage.start_worker()

    async def whole(play: ThroughAWorker) -> str | None:
        try:
            await play.run()
            await play.check(play.scenario.expect)
        except AssertionError as error:
            return str(error)
        return None

    failures = await asyncio.gather(*(whole(play) for play in plays))
    failed = [failure for failure in failures if failure]
    assert not failed, "\n".join([*failed, stage.logs()])
    assert worker.poll() is None


async def test_through_a_queue_and_a_worker(stage: Stage) -> None:
    """All at once, each with a customer of its own: the broken queues must not disturb the others."""
    await run_through_a_worker(stage, [s for s in ALL if s.end_to_end and not s.slow])


@pytest.mark.crash
async def test_slow_ones_through_a_queue_and_a_worker(stage: Stage) -> None:
    await run_through_a_worker(stage, [s for s in ALL if s.slow])
