"""Instances with our tags: adopted where a launch of ours made them, told where nobody may end them, or ended."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import alarms, orphans, ready
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.service import Received, ingest
from control.interruptions.templates import launched_by
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from warehouse.contracts import EventSource
from warehouse.postgres.models import new_id

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
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


# --- what no living attempt explains


async def _abandoned(stage: Stage, launcher: Launcher, *, joined: bool = False) -> str:
    """An instance of ours, half an hour old, whose attempt was given up."""
    stage.nodes_join = False
    await _launch(stage, launcher)
    (instance,) = stage.ours()
    if joined:
        await stage.tenant.node(instance.instance_id, availability_zone=instance.zone_name)
    await stage.tenant.rows("UPDATE launch_attempts SET state = 'abandoned', instance_id = NULL RETURNING 1")
    await stage.tenant.rows("UPDATE launch_intents SET state = 'exhausted' RETURNING 1")
    await stage.tenant.rows("UPDATE launch_batches SET state = 'abandoned' RETURNING 1")
    stage.aws._instances.by_id[instance.instance_id].launched_at -= 1800
    return instance.instance_id


async def _told(stage: Stage, launcher: Launcher, detector: str) -> Any:
    """What the customer's health says by a detector; None when it is well or never was not."""
    await alarms.run_once(launcher.runtime)
    rows = await stage.tenant.rows(
        "SELECT reason, remedy FROM intake_health WHERE detector = :d AND customer_id = :customer_id "
        "AND state = 'degraded'",
        d=detector,
    )
    return rows[0] if rows else None


async def _round(stage: Stage, launcher: Launcher) -> int:
    await stage.pass_rounds()
    return await orphans.run_once(launcher)


async def test_an_instance_of_a_dead_attempt_that_is_no_node_is_ended(stage: Stage, launcher: Launcher) -> None:
    orphan = await _abandoned(stage, launcher)
    assert await _round(stage, launcher) == 1
    assert stage.state_of(orphan) in OVER


async def test_a_ready_node_that_nothing_explains_is_adopted_and_not_ended(stage: Stage, launcher: Launcher) -> None:
    node = await _abandoned(stage, launcher, joined=True)
    assert await _round(stage, launcher) == 0
    assert stage.state_of(node) == "running"
    adopted = await stage.tenant.row("SELECT instance_id, reason FROM adopted_instances")
    assert (adopted.instance_id, adopted.reason) == (node, "node")
    customer = await stage.tenant.row("SELECT adopt_only_since FROM customers WHERE id = :customer_id")
    assert customer.adopt_only_since is None, "everything else goes on"
    assert await _told(stage, launcher, "adopted") is None, "it works"
    # Out of its cluster, and EC2 still bills it.
    await stage.tenant.rows("UPDATE nodes SET terminated_at = now() WHERE instance_id = :i RETURNING 1", i=node)
    assert await _round(stage, launcher) == 0
    assert node in (await _told(stage, launcher, "adopted")).reason
    stage.aws.terminate(node)
    await _round(stage, launcher)
    assert await _told(stage, launcher, "adopted") is None


async def test_a_node_that_becomes_ready_while_it_is_to_end_is_kept(
    stage: Stage, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = await _abandoned(stage, launcher)
    describe = launcher.accounts.describe

    async def and_joins(*arguments: Any) -> Any:
        found = await describe(*arguments)
        await stage.tenant.node(orphan)
        return found

    monkeypatch.setattr(launcher.accounts, "describe", and_joins)
    assert await _round(stage, launcher) == 0
    assert stage.state_of(orphan) == "running"


async def test_while_its_agent_is_away_an_orphan_is_told_and_not_ended(stage: Stage, launcher: Launcher) -> None:
    orphan = await _abandoned(stage, launcher)
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() - interval '3 minutes' RETURNING 1")
    for _ in range(6):
        assert await _round(stage, launcher) == 0
        await stage.tenant.rows("UPDATE refused_endings SET next_at = now() RETURNING 1")
    assert stage.state_of(orphan) == "running"
    assert orphan in (await _told(stage, launcher, "ending")).reason
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
    assert await _round(stage, launcher) == 1
    assert stage.state_of(orphan) in OVER
    assert await _told(stage, launcher, "ending") is None


async def _copy(stage: Stage, original: str) -> str:
    """Somebody launches "more like this" in the console: the tags come along, the token does not."""
    (copied,) = await stage.launch_nodes()
    await stage.tenant.rows("DELETE FROM nodes WHERE instance_id = :i RETURNING 1", i=copied)
    instance = stage.aws._instances.by_id[copied]
    instance.tags |= stage.aws._instances.by_id[original].tags
    instance.client_token = str(new_id())
    instance.launched_at -= 1800
    return copied


async def test_a_copy_of_our_instance_is_nobodys_to_end_but_its_owners(stage: Stage, launcher: Launcher) -> None:
    await _launch(stage, launcher)
    (original,) = stage.ours()
    copied = await _copy(stage, original.instance_id)
    assert await _round(stage, launcher) == 0
    assert stage.state_of(copied) == "running"
    adopted = await stage.tenant.row("SELECT instance_id, reason FROM adopted_instances")
    assert (adopted.instance_id, adopted.reason) == (copied, "copied")
    told = await _told(stage, launcher, "adopted")
    assert copied in told.reason
    assert "tags" in told.reason
    # Its owner takes our tags off.
    stage.aws._instances.by_id[copied].tags.clear()
    await _round(stage, launcher)
    assert await _told(stage, launcher, "adopted") is None


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, True),
        ({"ClientToken": ""}, True),
        ({"ClientToken": "of-the-console"}, False),
        ({"ClientToken": "of-the-spot-request", "InstanceLifecycle": "spot"}, True),
        ({"ClientToken": "of-the-console", "InstanceLifecycle": "spot", "InstanceType": "m5.xlarge"}, False),
        ({"ClientToken": "of-the-console", "InstanceLifecycle": "spot", "LaunchTime": NOW + timedelta(hours=1)}, False),
        ({"ClientToken": "", "LaunchTime": NOW + timedelta(minutes=20)}, False),
        ({"ClientToken": "", "LaunchTime": NOW - timedelta(minutes=2)}, False),
        ({"ClientToken": "", "InstanceType": "m5.xlarge"}, False),
    ],
)
def test_what_a_call_launched_has_its_token_or_else_its_moment_and_type(changes: dict[str, Any], ours: bool) -> None:
    instance = {"ClientToken": "token", "LaunchTime": NOW + timedelta(seconds=2), "InstanceType": "m5.large"}
    assert launched_by(instance | changes, "token", "m5.large", NOW) is ours


async def test_a_copy_is_never_taken_for_the_launch_without_an_answer(stage: Stage, launcher: Launcher) -> None:
    stage.nodes_join = False
    stage.aws.inject(Fault("drop_after", action="RunInstances", nth=2))
    await _launch(stage, launcher)
    (original,) = stage.ours()
    copied = await _copy(stage, original.instance_id)
    stage.aws._instances.by_id[copied].launch_index = -1
    await stage.tenant.rows(
        "UPDATE launch_batches SET next_action_at = now(), first_called_at = now() - interval '11 minutes' RETURNING 1"
    )
    await launch_reconciler.run_once(launcher)
    (attempt,) = await _attempts(stage)
    assert (attempt.state, attempt.instance_id) == ("adopted", original.instance_id)


async def test_what_was_adopted_and_never_joins_is_told_after_adopt_only_is_lifted(
    stage: Stage, launcher: Launcher
) -> None:
    lost = await _abandoned(stage, launcher)
    for table in ("launch_attempts", "launch_batches", "launch_intents"):
        await stage.tenant.rows(f"DELETE FROM {table} RETURNING 1")
    assert await _round(stage, launcher) == 0
    await stage.tenant.rows("UPDATE customers SET adopt_only_since = NULL WHERE id = :customer_id RETURNING 1")
    assert await _round(stage, launcher) == 0
    told = await _told(stage, launcher, "adopted")
    assert lost in told.reason
    assert "USD/h" in told.reason
    await stage.tenant.node(lost)
    assert await _told(stage, launcher, "adopted") is None


async def test_a_replacement_that_left_its_cluster_and_still_runs_is_told(stage: Stage, launcher: Launcher) -> None:
    await _launch(stage, launcher)
    (ours,) = stage.ours()

    async def joined() -> int:
        return await ready.run_once(launcher.runtime)

    await stage.until(joined, 10)
    stage.aws._instances.by_id[ours.instance_id].launched_at -= 3600
    await _round(stage, launcher)
    assert await _told(stage, launcher, "adopted") is None
    # Somebody deleted the node; its instance is in no group that would end it.
    left = (
        "UPDATE nodes SET status = 'terminated', terminated_at = now() - interval '{}' "
        "WHERE instance_id = :i RETURNING 1"
    )
    await stage.tenant.rows(left.format("5 minutes"), i=ours.instance_id)
    await _round(stage, launcher)
    assert await _told(stage, launcher, "adopted") is None, "it may be on its way out"
    await stage.tenant.rows(left.format("11 minutes"), i=ours.instance_id)
    assert await _round(stage, launcher) == 0
    told = await _told(stage, launcher, "adopted")
    assert ours.instance_id in told.reason
    assert "USD/h" in told.reason
    stage.aws.terminate(ours.instance_id)
    await _round(stage, launcher)
    assert await _told(stage, launcher, "adopted") is None
