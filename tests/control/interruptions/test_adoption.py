"""Instances with our tags: adopted where a launch of ours made them, told where nobody may end them, or ended."""

from __future__ import annotations

import json
from typing import Any

from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from warehouse.contracts import EventSource

OVER = ("shutting-down", "terminated")


async def _warn(stage: Stage, *instances: str) -> None:
    facts = await stage.tenant.facts()
    received = [Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS) for instance in instances]
    await ingest(stage.db, facts, received)


async def _launch(stage: Stage, launcher: Launcher, count: int = 1) -> None:
    await _warn(stage, *await stage.launch_nodes(count))
    await launcher.plan_round()
    await launcher.finish_calls(10)


async def _attempts(stage: Stage) -> list[Any]:
    return await stage.tenant.rows(
        "SELECT a.*, l.state AS intent FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id "
        "ORDER BY a.attempt_no, a.slot"
    )


# --- one token, several instances


async def _half_ended(stage: Stage, launcher: Launcher) -> tuple[str, str]:
    """Two slots of one call whose answer was lost; one of the instances ended, and EC2 says so about the token."""
    stage.join_seconds = 3600
    await _warn(stage, *await stage.launch_nodes(2))
    stage.aws.inject(Fault("drop_after", action="RunInstances"))
    await launcher.plan_round()
    await launcher.finish_calls(10)
    dead, living = (instance.instance_id for instance in stage.ours())
    stage.aws.terminate(dead)
    stage.aws.inject(Fault("error", action="RunInstances", code="IdempotentInstanceTerminated", status=400, count=None))
    return dead, living


async def _ask_again(stage: Stage, launcher: Launcher) -> None:
    await stage.pass_leases()
    await launch_reconciler.run_once(launcher)
    await launcher.finish_calls(10)


async def test_of_a_call_whose_token_has_ended_the_living_instances_are_adopted(
    stage: Stage, launcher: Launcher
) -> None:
    _, living = await _half_ended(stage, launcher)
    await _ask_again(stage, launcher)
    found = await _attempts(stage)
    assert sorted((attempt.state, attempt.instance_id, attempt.intent) for attempt in found) == [
        ("adopted", living, "launched"),
        ("terminated", None, "planned"),
    ]
    batch = await stage.tenant.row("SELECT state FROM launch_batches")
    assert batch.state == "answered"


async def test_what_describe_does_not_show_yet_is_not_taken_for_ended(stage: Stage, launcher: Launcher) -> None:
    _, living = await _half_ended(stage, launcher)
    instance = stage.aws._instances.by_id[living]
    seen, instance.visible_at = instance.visible_at, instance.visible_at + 3600
    await _ask_again(stage, launcher)
    assert [attempt.state for attempt in await _attempts(stage)] == ["unknown", "unknown"]
    instance.visible_at = seen
    stage.aws.inject(Fault("error", action="DescribeInstances", code="InternalError", status=500))
    await stage.tenant.rows("UPDATE launch_batches SET first_called_at = now() - interval '6 minutes' RETURNING 1")
    await _ask_again(stage, launcher)
    assert [attempt.state for attempt in await _attempts(stage)] == ["unknown", "unknown"], "nobody could look"
    await _ask_again(stage, launcher)
    assert sorted(attempt.state for attempt in await _attempts(stage)) == ["adopted", "terminated"]


async def test_what_is_not_shown_for_five_minutes_has_ended(stage: Stage, launcher: Launcher) -> None:
    for instance_id in await _half_ended(stage, launcher):
        del stage.aws._instances.by_id[instance_id]
    await stage.tenant.rows("UPDATE launch_batches SET first_called_at = now() - interval '6 minutes' RETURNING 1")
    await _ask_again(stage, launcher)
    assert [(attempt.state, attempt.intent) for attempt in await _attempts(stage)] == [("terminated", "planned")] * 2
