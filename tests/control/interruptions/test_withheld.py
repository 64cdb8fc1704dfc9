"""A launch that was committed and not called yet: nothing of it can have happened, so what says no meanwhile counts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import deadlines, leaving
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from warehouse.contracts import EventSource


async def _killed_before_the_call(stage: Stage, launcher: Launcher, *, called: int = 0) -> None:
    """What a worker leaves that dies between its commit and its call, or between the call and its answer."""
    (lost,) = await stage.launch_nodes()
    warning = Received(json.dumps(stage.tenant.warning(lost)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [warning])
    stage.aws.inject(Fault("drop_before", action="RunInstances"))
    await launcher.plan_round()
    await launcher.finish_calls(10)
    stage.aws.clear_faults()
    await stage.tenant.rows(
        "UPDATE launch_batches SET state = 'calling', error_code = NULL, calls = :calls, "
        "first_called_at = CASE WHEN :calls > 0 THEN now() END RETURNING 1",
        calls=called,
    )
    await stage.tenant.rows("UPDATE launch_attempts SET state = 'calling' RETURNING 1")


async def _taken_over(stage: Stage, launcher: Launcher) -> int:
    """The next worker finds the batch; returns how many calls it made."""
    before = len(stage.calls("RunInstances"))
    await stage.pass_leases()
    await launch_reconciler.run_once(launcher)
    await launcher.finish_calls(10)
    return len(stage.calls("RunInstances")) - before


async def _planned(stage: Stage, launcher: Launcher) -> Any:
    await stage.pass_leases()
    await launcher.plan_round()
    await launcher.finish_calls(10)
    return await stage.tenant.row("SELECT * FROM launch_intents")


async def test_under_a_kill_switch_it_is_withdrawn_and_planned_anew_afterwards(
    stage: Stage, launcher: Launcher
) -> None:
    await _killed_before_the_call(stage, launcher)
    await stage.tenant.rows("UPDATE customers SET kill_switch = true WHERE id = :customer_id RETURNING 1")
    assert await _taken_over(stage, launcher) == 0
    assert (await stage.tenant.row("SELECT state FROM launch_batches")).state == "failed"
    assert "kill switch" in (await _planned(stage, launcher)).reason
    assert stage.ours() == []
    await stage.tenant.rows("UPDATE customers SET kill_switch = false WHERE id = :customer_id RETURNING 1")
    assert (await _planned(stage, launcher)).state == "launched"
    first, second = await stage.tenant.rows("SELECT * FROM launch_attempts ORDER BY attempt_no")
    assert (first.state, first.instance_id, second.state) == ("failed", None, "launched")
    pools = [(attempt.instance_type, attempt.availability_zone, attempt.node_type) for attempt in (first, second)]
    assert pools[0] == pools[1], "nothing was found wrong with its pool"
    assert await stage.tenant.rows("SELECT 1 FROM pool_standings WHERE refusals > 0") == []


async def test_for_a_deleted_cluster_it_is_not_called(stage: Stage, launcher: Launcher) -> None:
    await _killed_before_the_call(stage, launcher)
    await stage.tenant.rows("UPDATE clusters SET status = 'deleted' RETURNING 1")
    await leaving.run_once(launcher.runtime)
    assert await _taken_over(stage, launcher) == 0
    attempt = await stage.tenant.row(
        "SELECT a.state, l.state AS intent FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id"
    )
    assert (attempt.state, attempt.intent, stage.ours()) == ("failed", "cancelled", [])


async def test_after_its_window_it_is_not_called(stage: Stage, launcher: Launcher) -> None:
    await _killed_before_the_call(stage, launcher)
    await stage.tenant.rows("UPDATE launch_intents SET deadline_at = now() - interval '1 second' RETURNING 1")
    assert await _taken_over(stage, launcher) == 0
    await deadlines.run_once(launcher.runtime)
    intent = await stage.tenant.row("SELECT state, reason FROM launch_intents")
    assert (intent.state, "window" in intent.reason) == ("exhausted", True)


@pytest.mark.parametrize(
    "gone",
    [
        "UPDATE clusters SET status = 'deleted' RETURNING 1",
        "UPDATE customers SET status = 'offboarding' RETURNING 1",
        "UPDATE customers SET status = 'suspended' RETURNING 1",
    ],
    ids=["deleted", "offboarding", "suspended"],
)
async def test_for_who_is_gone_by_then_none_is_committed(stage: Stage, launcher: Launcher, gone: str) -> None:
    (lost,) = await stage.launch_nodes()
    warning = Received(json.dumps(stage.tenant.warning(lost)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [warning])
    await stage.tenant.rows(gone)
    intent = await _planned(stage, launcher)
    assert (intent.state, intent.reason) == ("cancelled", "the cluster or its customer is gone")
    assert await stage.tenant.rows("SELECT 1 FROM launch_batches") == []


async def test_it_is_withdrawn_also_while_the_role_cannot_be_assumed(stage: Stage, launcher: Launcher) -> None:
    await _killed_before_the_call(stage, launcher)
    await stage.tenant.rows("UPDATE customers SET status = 'offboarding' WHERE id = :customer_id RETURNING 1")
    launcher.runtime.aws._sessions.clear()
    stage.aws.inject(Fault("drop_before", action="AssumeRole", count=None))
    assert await _taken_over(stage, launcher) == 0
    assert (await stage.tenant.row("SELECT state FROM launch_attempts")).state == "failed"


async def test_what_may_have_launched_is_asked_for_all_the_same(stage: Stage, launcher: Launcher) -> None:
    await _killed_before_the_call(stage, launcher, called=1)
    await stage.tenant.rows("UPDATE customers SET kill_switch = true WHERE id = :customer_id RETURNING 1")
    assert await _taken_over(stage, launcher) == 1


async def test_ten_minutes_without_a_call_are_no_ten_minutes_without_an_answer(
    stage: Stage, launcher: Launcher
) -> None:
    await _killed_before_the_call(stage, launcher)
    await stage.tenant.rows("UPDATE launch_batches SET created_at = now() - interval '11 minutes' RETURNING 1")
    assert await _taken_over(stage, launcher) == 0
    assert (await _planned(stage, launcher)).state == "launched"
    assert len(stage.ours()) == 1


async def test_a_role_that_cannot_be_assumed_at_first_leaves_nothing_unanswered(
    stage: Stage, launcher: Launcher
) -> None:
    await _killed_before_the_call(stage, launcher)
    launcher.runtime.aws._sessions.clear()
    stage.aws.inject(Fault("drop_before", action="AssumeRole"))
    assert await _taken_over(stage, launcher) == 0
    batch = await stage.tenant.row("SELECT state, calls FROM launch_batches")
    assert (batch.state, batch.calls) == ("calling", 0), "nothing was sent"
    assert await _taken_over(stage, launcher) == 1
    assert len(stage.ours()) == 1
