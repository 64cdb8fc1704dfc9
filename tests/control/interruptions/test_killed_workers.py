"""A worker killed with SIGKILL at any point changes nothing about the outcome (RELIABILITY §2.4)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Collection

import pytest

from control.gateways.aws import AwsGateway, Role
from control.interruptions import launch_repository
from control.interruptions.launch_repository import BatchRow, ClusterFacts
from control.interruptions.launching import Launcher
from control.interruptions.runtime import Runtime
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import DEPLOYMENT, Stage, gate
from warehouse.contracts import EventSource

# (action, when) of the kill, and the point of §2.4 it reaches.
POINTS = (
    ("ReceiveMessage", "answered", "C-02 received, nothing committed"),
    ("DeleteMessageBatch", "before", "C-04 committed, not deleted"),
    ("DeleteMessageBatch", "applied", "C-05 deleted, nothing else done"),
    ("DescribeSubnets", "before", "C-08 planned, no call made"),
    ("RunInstances", "before", "C-08 attempt committed, no instance"),
    ("RunInstances", "applied", "C-09 instance running, answer lost"),
    ("RunInstances", "answered", "C-09 answered, not recorded"),
)


async def test_the_outcome_is_the_same_wherever_the_worker_is_killed(stage: Stage) -> None:
    for action, moment, _ in POINTS:
        (instance,) = await stage.launch_nodes()
        launched = len(stage.ours())
        worker = stage.start_worker()
        fault = Fault("signal", action=action, pid=worker.pid, moment=moment)  # type: ignore[arg-type]
        if action == "DescribeSubnets":
            # Templates are kept, so only an instance of an unknown group is looked up.
            await stage.tenant.rows("DELETE FROM launch_templates RETURNING 1")
        if action == "ReceiveMessage":
            # The poll that brings the message, not an empty one before it.
            stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
            stage.aws.inject(fault)
        else:
            stage.aws.inject(fault)
            stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
        await asyncio.wait_for(asyncio.to_thread(worker.wait), 30)
        stage.aws.clear_faults()
        if moment == "before":
            # It never got as far: what the call would have changed is as it was.
            if action == "DeleteMessageBatch":
                assert sum(stage.aws.queue_depth(stage.queue)) > 0
            if action == "RunInstances":
                assert len(stage.ours()) == launched
    # What the killed had in their hands is free again.
    stage.redeliver()
    await stage.pass_leases()
    stage.start_worker()
    rows = await stage.closed(len(POINTS), 90)

    assert Counter(row.outcome for row in rows) == {"handled": len(POINTS)}, [(r.outcome, r.reason) for r in rows]
    assert len(stage.ours()) == len(POINTS)
    assert len({instance.client_token for instance in stage.ours()}) <= len(POINTS)
    assert await exactly_one_of_everything(stage) == []


async def test_who_was_away_for_a_lease_sends_nothing_beside_its_heir(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.interruptions.launch_repository.LEASE_SECONDS", 1.0)
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    gateways = [AwsGateway(endpoint_url=stage.aws.url) for _ in range(2)]
    late, heir = (
        Launcher(Runtime(stage.db, stage.db, aws, stage.bells, f"w{n}", DEPLOYMENT)) for n, aws in enumerate(gateways)
    )

    async def claim(launcher: Launcher) -> tuple[BatchRow, ClusterFacts]:
        while True:
            async with stage.db.system() as conn:
                claimed = await launch_repository.claim_batches(conn, worker=launcher.runtime.worker, limit=1)
                if claimed:
                    facts = await launch_repository.cluster_facts(conn, [claimed[0].cluster_id])
                    return claimed[0], facts[claimed[0].cluster_id]
            await asyncio.sleep(0.05)

    # A call that got no answer and did nothing, so it is to be made again.
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_before", action="RunInstances", count=1))
    warning = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [warning])
    await late.plan_round()
    await late.finish_calls(10)
    await stage.pass_leases()
    batch, cluster = await claim(late)
    gateways[0].forget(Role(cluster.customer_id, str(cluster.role_arn), cluster.external_id))
    stage.aws.inject(Fault("delay", action="AssumeRole", seconds=3.0, count=1))
    away = asyncio.create_task(late.calls.call(batch, cluster))
    # Its lease runs out meanwhile. The heir's call is refused, so it goes on to another pool.
    again, cluster = await claim(heir)
    assert again.id == batch.id
    stage.aws.inject(Fault("ice", action="RunInstances", count=1))
    await heir.calls.call(again, cluster)
    await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now(), lease_until = NULL RETURNING 1")
    await heir.plan_round()
    await heir.finish_calls(10)
    assert not away.done()
    await away
    assert len(stage.ours()) == 1
    assert await stage.tenant.rows("SELECT 1 FROM launch_attempts WHERE state = 'launched'")
    for aws in gateways:
        await aws.close()


async def test_who_was_frozen_right_before_its_call_sends_nothing_beside_its_heir(
    stage: Stage, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C-29: the call is noted, the worker stands still for more than half a lease, and another one has it by then."""
    monkeypatch.setattr("control.interruptions.launch_repository.LEASE_SECONDS", 1.0)
    (instance,) = await stage.launch_nodes()
    warning = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [warning])
    calls = len(stage.calls("RunInstances"))
    async with gate(stage.database_url, "launch_batches", "NEW.calls > OLD.calls", on="UPDATE") as held:
        await launcher.plan_round()
        await held.reached()
        # Waits for the row, and has it before the frozen one asks again.
        heir = "UPDATE launch_batches SET lease_epoch = lease_epoch + 1, leased_by = 'heir' RETURNING 1"
        taken = asyncio.create_task(stage.tenant.rows(heir))
        await asyncio.sleep(0.8)
        assert not taken.done()
        await held.commit()
        assert len(await taken) == 1
    await launcher.finish_calls(10)
    assert len(stage.calls("RunInstances")) == calls
    assert stage.ours() == []


async def exactly_one_of_everything(stage: Stage, *, undrained: Collection[str] = ()) -> list[str]:
    """What breaks an invariant of RELIABILITY §2.3, in words; ``undrained`` instances were gone when found."""
    broken: list[str] = []
    checks = {
        "interruption without exactly one drain": """
            SELECT i.id FROM interruptions i LEFT JOIN agent_tasks t ON t.interruption_id = i.id
            WHERE i.customer_id = :customer_id AND i.instance_id <> ALL(:undrained)
            GROUP BY i.id HAVING count(t.id) <> 1""",
        "interruption without exactly one Ready replacement": """
            SELECT i.id FROM interruptions i JOIN launch_intents l ON l.interruption_id = i.id
            LEFT JOIN launch_attempts a ON a.intent_id = l.id AND a.state = 'ready'
            WHERE i.customer_id = :customer_id GROUP BY i.id HAVING count(a.id) <> 1""",
        "history with a hole": """
            SELECT i.id FROM interruptions i JOIN interruption_history h ON h.interruption_id = i.id
            WHERE i.customer_id = :customer_id GROUP BY i.id, i.version
            HAVING count(*) <> i.version OR max(h.version) <> i.version""",
        "instance in two attempts": """
            SELECT instance_id FROM launch_attempts WHERE customer_id = :customer_id AND instance_id IS NOT NULL
            GROUP BY instance_id HAVING count(*) > 1""",
        "message neither handled nor in quarantine": """
            SELECT dedupe_key FROM inbox_messages WHERE customer_id = :customer_id AND outcome = 'waiting'""",
    }
    for what, sql in checks.items():
        if rows := await stage.tenant.rows(sql, undrained=list(undrained)):
            broken.append(f"{what}: {rows}")
    known = {
        row.instance_id
        for row in await stage.tenant.rows(
            "SELECT instance_id FROM launch_attempts WHERE customer_id = :customer_id AND state = 'ready'"
        )
    }
    alive = {instance.instance_id for instance in stage.ours(alive=True)}
    if alive != known:
        broken.append(f"instances alive {alive} are not the recorded ones {known}")
    return broken
