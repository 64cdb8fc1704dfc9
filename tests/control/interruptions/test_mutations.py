"""The checks can fail: each guarantee is taken away, and the scenario that guards it must notice.

Every scenario answers with what it found wrong; without the mutation that is nothing. The kill -9 trials are run
against the same mutations in test_crash_trials.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from control.agents import repository as tasks
from control.interruptions import intake as intake_module
from control.interruptions import launch_repository
from control.interruptions.answers import Meaning, Reading
from control.interruptions.intake import Held, QueueReader, Source
from control.interruptions.launch_repository import BatchRow
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers import missed
from control.interruptions.service import Facts, Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from tests.control.interruptions.mutations import DATABASES, FOUND_AS, MUTATIONS
from tests.control.interruptions.tenants import create_tenant
from warehouse.contracts import EventSource, OptimizationTask, TaskResult, TaskStatus
from warehouse.postgres import session
from warehouse.postgres.models import new_id

Scenario = Callable[[Stage, Launcher], Awaitable[list[str]]]


# --- scenarios


async def one_instance_after_a_lost_answer(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_after", action="RunInstances"))
    message = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [message])
    for _ in range(3):
        await launcher.plan_round()
        await launcher.finish_calls(10)
        await stage.tenant.rows("UPDATE launch_batches SET next_action_at = now(), lease_until = NULL RETURNING 1")
        await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")
        await launch_reconciler.run_once(launcher)
    alive = stage.ours(alive=True)
    return [] if len(alive) == 1 else [f"{len(alive)} instances for one intent"]


async def nothing_is_deleted_that_is_not_committed(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    customer = await stage.tenant.row("SELECT * FROM customers WHERE id = :customer_id")
    role = intake_module.Role(customer.id, customer.aws_role_arn, str(customer.external_id))
    original, calls = intake_module.ingest, 0

    async def postgres_dies_once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OperationalError("INSERT", {}, Exception("the server closed the connection"))
        return await original(*args, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(intake_module, "ingest", postgres_dies_once)
    source = Source(customer.id, customer.sqs_queue_url, role)
    reader = QueueReader(launcher.runtime, Facts(stage.db), source, asyncio.Semaphore(1), Held())
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    try:
        async with asyncio.timeout(10):
            while calls == 0:  # noqa: ASYNC110 - the reader's doing
                await asyncio.sleep(0.02)
        # A process that dies now knows nothing; the message must still be there.
        tasks = [*reader._receiving, *reader._finishing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        patch.undo()
    kept = sum(stage.aws.queue_depth(stage.queue)) + len(await stage.interruptions())
    return [] if kept == 1 else ["a message is neither in the queue nor in the database"]


async def a_late_report_changes_nothing(stage: Stage, launcher: Launcher) -> list[str]:
    stage.agent_works = False
    await stage.pause()
    node = await stage.tenant.node()
    message = Received(json.dumps(stage.tenant.warning(node)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [message])

    async def lease(agent: str) -> OptimizationTask:
        async with stage.db.tenant(stage.tenant.customer_id) as conn:
            (task,) = await tasks.lease_tasks(
                conn, cluster_id=stage.tenant.cluster_id, agent=agent, limit=1, understands=["drain_node"]
            )
        return task

    late = await lease("late")
    await stage.tenant.rows("UPDATE agent_tasks SET lease_until = now() RETURNING 1")
    await lease("heir")
    report = TaskResult(lease_epoch=late.lease_epoch, report_id=new_id(), status=TaskStatus.FAILED, detail={})
    async with stage.db.tenant(stage.tenant.customer_id) as conn:
        await tasks.record_report(conn, cluster_id=stage.tenant.cluster_id, task_id=late.task_id, report=report)
    task = await stage.tenant.row("SELECT state, lease_epoch FROM agent_tasks")
    return [] if task.state == "leased" else [f"the heir's task is {task.state} by the word of the one before"]


async def a_late_call_changes_nothing(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    # Applied, and the answer lost: nobody knows the outcome.
    stage.aws.inject(Fault("drop_after", action="RunInstances"))
    message = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [message])
    await launcher.plan_round()
    await launcher.finish_calls(10)

    async def claim(worker: str) -> BatchRow:
        await stage.pass_leases()
        async with stage.db.system() as conn:
            (batch,) = await launch_repository.claim_batches(conn, worker=worker, limit=10)
        return batch

    late, heir = await claim("late"), await claim("heir")
    calls = len(stage.calls("RunInstances"))
    async with stage.db.system() as conn:
        clusters = await launch_repository.cluster_facts(conn, [late.cluster_id])
    await launcher.calls.call(late, clusters[late.cluster_id])
    await launcher.calls.record(late, Reading(Meaning.REFUSED, "InsufficientInstanceCapacity", ""))
    broken = ["the late one called"] if len(stage.calls("RunInstances")) > calls else []
    batch = await stage.tenant.row("SELECT state, leased_by, lease_epoch FROM launch_batches")
    if (batch.state, batch.leased_by, batch.lease_epoch) != ("unknown", "heir", heir.lease_epoch):
        broken.append(f"the heir's call is {batch.state} by the word of the one before")
    return broken


async def every_ended_instance_is_found(stage: Stage, launcher: Launcher) -> list[str]:
    instances = await stage.launch_nodes(3)
    stage.aws._ec2.describe_page_size = 1
    for instance in instances:
        stage.aws.terminate(instance, reason="Server.SpotInstanceTermination")
    await missed.run_once(launcher)
    found = {row.instance_id for row in await stage.interruptions()}
    return [f"{instance} was not found" for instance in instances if instance not in found]


async def a_foreign_account_is_refused(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    forged = stage.tenant.warning(instance, account="999999999999")
    await ingest(stage.db, await stage.tenant.facts(), [Received(json.dumps(forged), EventSource.SQS)])
    return [f"acted on {row.instance_id}" for row in await stage.interruptions()]


async def a_tenant_sees_its_own_only(stage: Stage, launcher: Launcher) -> list[str]:
    other = await create_tenant(stage.db)
    theirs = await other.node()
    await ingest(stage.db, await other.facts(), [Received(json.dumps(other.warning(theirs)), EventSource.SQS)])
    async with stage.db.tenant(stage.tenant.customer_id) as conn:
        rows = (await conn.execute(text("SELECT instance_id FROM interruptions"))).all()
    return [f"saw {row.instance_id}" for row in rows]


async def a_connection_carries_nothing_over(stage: Stage, launcher: Launcher) -> list[str]:
    single = session.Database(stage.database_url, pool_size=1, max_overflow=0)
    async with single.tenant(stage.tenant.customer_id):
        pass
    async with single.engine.begin() as conn:
        left = (await conn.execute(text("SELECT current_setting('app.customer_id', true)"))).scalar_one()
        role = (await conn.execute(text("SELECT current_user"))).scalar_one()
    await single.close()
    return [f"the next transaction is {left or role}"] if left or role == session.TENANT_ROLE else []


GUARDS: list[tuple[Scenario, str]] = [
    (one_instance_after_a_lost_answer, "no_client_token"),
    (one_instance_after_a_lost_answer, "naive_launcher"),
    (nothing_is_deleted_that_is_not_committed, "delete_before_commit"),
    (a_late_report_changes_nothing, "no_epoch_check"),
    (a_late_call_changes_nothing, "no_launch_epoch_check"),
    (every_ended_instance_is_found, "no_pagination"),
    (a_foreign_account_is_refused, "trusted_body"),
    (a_tenant_sees_its_own_only, "no_row_level_security"),
    (a_connection_carries_nothing_over, "set_instead_of_set_local"),
]


def test_every_mutation_has_its_guard() -> None:
    assert {name for _, name in GUARDS} == set(MUTATIONS) == set(FOUND_AS)


@pytest.mark.parametrize(
    "scenario", dict.fromkeys(scenario for scenario, _ in GUARDS), ids=lambda scenario: scenario.__name__
)
async def test_the_guarantee_holds(stage: Stage, launcher: Launcher, scenario: Scenario) -> None:
    assert await scenario(stage, launcher) == []


@pytest.mark.parametrize(("scenario", "mutation"), GUARDS, ids=lambda value: getattr(value, "__name__", value))
async def test_without_it_the_check_fails(
    stage: Stage, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, mutation: str
) -> None:
    MUTATIONS[mutation](monkeypatch)
    if mutation in DATABASES:
        async with stage.db.engine.begin() as conn:
            await conn.execute(text(DATABASES[mutation]))
    assert await scenario(stage, launcher) != []
