"""Signals that follow each other about one instance, and launches whose answers are lost in between: nothing that came
earlier may swallow a warning, and nothing that comes later may launch twice."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from control.interruptions import closing, launch_repository
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import deadlines, never_ready, orphans, ready
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.service import Ingested, Received, ingest
from control.interruptions.taking import accept_agent_events
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from warehouse.contracts import AgentEvent, EventKind, EventSource
from warehouse.postgres.models import new_id


async def told(stage: Stage, document: dict[str, Any]) -> Ingested:
    return await ingest(stage.db, await stage.tenant.facts(), [Received(json.dumps(document), EventSource.SQS)])


def steps_measured() -> dict[str, float]:
    name = "cloudoptim_interruption_step_seconds_count"
    return {step: REGISTRY.get_sample_value(name, {"step": step}) or 0 for step in ("task_created", "drained")}


async def launch(launcher: Launcher) -> None:
    await launcher.plan_round()
    await launcher.finish_calls(10)


async def due_again(stage: Stage) -> None:
    await stage.pass_leases()
    await stage.tenant.rows("UPDATE launch_batches SET next_action_at = now() RETURNING 1")
    await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")


async def test_a_warning_after_a_recommendation_that_kept_the_node_is_a_new_interruption(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.rebalance(instance))
    await stage.tenant.rows("UPDATE launch_intents SET state = 'exhausted' RETURNING 1")
    await closing.begin_waiting_drains(launcher.runtime)
    await closing.close_ended(launcher.runtime)
    (kept,) = await stage.interruptions()
    assert (kept.state, kept.outcome) == ("closed", "cancelled")

    await told(stage, stage.tenant.warning(instance))
    _, warned = await stage.interruptions()
    assert (warned.state, warned.kind) == ("open", "spot_interruption")
    tasks = await stage.tenant.rows("SELECT interruption_id FROM agent_tasks")
    intents = await stage.tenant.rows("SELECT interruption_id FROM launch_intents WHERE state = 'planned'")
    assert [task.interruption_id for task in tasks] == [warned.id]
    assert [intent.interruption_id for intent in intents] == [warned.id]
    # Told again, by whomever, it stays the one.
    await told(stage, stage.tenant.warning(instance))
    await told(stage, stage.tenant.rebalance(instance))
    assert len(await stage.interruptions()) == 2


async def test_a_warning_that_follows_a_recommendation_under_way_stays_one_interruption(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.pause()
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "drain"})
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.rebalance(instance))
    await told(stage, stage.tenant.warning(instance))
    await stage.tenant.rows(
        "UPDATE agent_tasks SET state = 'done', finished_at = now(), created_at = now() - interval '1 minute' "
        "RETURNING 1"
    )
    await stage.tenant.rows("UPDATE launch_intents SET state = 'ready' RETURNING 1")
    before = steps_measured()
    await closing.close_ended(launcher.runtime)
    measured = {step: count - before[step] for step, count in steps_measured().items()}
    assert measured == {"task_created": 0, "drained": 1}, "what was begun before the warning is no answer to it"
    await told(stage, stage.tenant.warning(instance))
    await told(stage, stage.tenant.rebalance(instance))
    (row,) = await stage.interruptions()
    assert (row.state, row.outcome, row.kind) == ("closed", "handled", "spot_interruption")


async def test_a_drain_that_failed_is_tried_again_when_the_warning_comes(stage: Stage, launcher: Launcher) -> None:
    await stage.pause()
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "drain"})
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.rebalance(instance))
    await stage.tenant.rows("UPDATE agent_tasks SET state = 'failed', finished_at = now() RETURNING 1")
    await told(stage, stage.tenant.warning(instance))
    tasks = await stage.tenant.rows("SELECT state, deadline_at FROM agent_tasks ORDER BY id")
    assert [task.state for task in tasks] == ["failed", "queued"]
    await stage.tenant.rows("UPDATE launch_intents SET state = 'ready' RETURNING 1")
    assert await closing.close_ended(launcher.runtime) == 0, "its drain is under way again"


async def test_a_replacement_that_does_not_come_does_not_keep_an_announced_end_undrained(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.pause()
    await stage.tenant.config("event_policies", {"spot_interruption": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    await stage.tenant.rows("UPDATE clusters SET kill_switch = true RETURNING 1")
    await told(stage, stage.tenant.warning(instance))
    (before,) = await stage.interruptions()
    assert await closing.begin_waiting_drains(launcher.runtime) == 0
    await stage.tenant.rows("UPDATE interruptions SET deadline_at = now() + interval '50 seconds' RETURNING 1")
    assert await closing.begin_waiting_drains(launcher.runtime) == 1
    (task,) = await stage.tenant.rows("SELECT state, deadline_at FROM agent_tasks")
    assert task.state == "queued"
    assert task.deadline_at < before.notice_at + timedelta(minutes=3), "the end does not move"
    await deadlines.run_once(launcher.runtime)


async def test_a_replacement_interrupted_before_it_was_ready_is_replaced_once(stage: Stage, launcher: Launcher) -> None:
    stage.nodes_join = False
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.warning(instance))
    await launch(launcher)
    (first,) = stage.ours(alive=True)
    await told(stage, stage.tenant.warning(first.instance_id))
    stage.aws.terminate(first.instance_id, reason="Server.SpotInstanceTermination")
    await orphans.run_once(launcher)
    for _ in range(6):
        await due_again(stage)
        await launch(launcher)
    assert len(stage.ours(alive=True)) == 1
    states = [row.state for row in await stage.tenant.rows("SELECT state FROM launch_intents ORDER BY id")]
    assert states == ["cancelled", "launched"]


@pytest.mark.parametrize("code", ["revoked", "UnauthorizedOperation", "InvalidParameterValue"])
async def test_a_refusal_of_the_second_call_says_nothing_about_the_first(
    stage: Stage, launcher: Launcher, code: str
) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_after", action="RunInstances"))
    await told(stage, stage.tenant.warning(instance))
    await launch(launcher)
    assert len(stage.ours(alive=True)) == 1
    if code == "revoked":
        stage.aws.revoke_role(stage.tenant.account_id)
        stage.aws.expire_credentials(stage.tenant.account_id)
        launcher.runtime.aws._sessions.clear()
    else:
        stage.aws.inject(Fault("error", action="RunInstances", code=code, status=403))
    await due_again(stage)
    await launch_reconciler.run_once(launcher)
    (attempt,) = await stage.tenant.rows("SELECT state FROM launch_attempts")
    assert attempt.state == "unknown"
    stage.aws.revoke_role(stage.tenant.account_id, revoked=False)
    for _ in range(3):
        await due_again(stage)
        await launch_reconciler.run_once(launcher)
        await launch(launcher)
    assert len(stage.ours(alive=True)) == 1
    (attempt,) = await stage.tenant.rows("SELECT state FROM launch_attempts")
    assert attempt.state in ("launched", "ready")


async def test_a_replacement_nobody_could_report_on_is_not_ended_for_it(stage: Stage, launcher: Launcher) -> None:
    stage.nodes_join = False
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.warning(instance))
    await launch(launcher)
    await stage.tenant.rows("UPDATE launch_attempts SET launched_at = now() - interval '11 minutes' RETURNING 1")
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() - interval '12 minutes' RETURNING 1")
    assert await never_ready.run_once(launcher.runtime) == 0
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
    assert await never_ready.run_once(launcher.runtime) == 1


async def test_a_node_back_from_its_maintenance_is_warned_of_like_any_other(stage: Stage, launcher: Launcher) -> None:
    await stage.pause()
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "drain"})
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.rebalance(instance))
    await stage.tenant.rows("UPDATE agent_tasks SET state = 'done', finished_at = now() RETURNING 1")
    await stage.tenant.rows("UPDATE launch_intents SET state = 'ready' RETURNING 1")
    await closing.close_ended(launcher.runtime)
    await told(stage, stage.tenant.warning(instance))
    assert len(await stage.interruptions()) == 1, "it was drained a moment ago"
    await stage.tenant.rows("UPDATE interruptions SET closed_at = now() - interval '3 days' RETURNING 1")
    again = stage.tenant.warning(instance)
    await told(stage, again)
    _, warned = await stage.interruptions()
    assert (warned.state, warned.kind) == ("open", "spot_interruption")


async def test_after_an_outage_nodes_that_still_live_are_replaced_before_those_that_are_gone(stage: Stage) -> None:
    await stage.pause()
    left = {"gone": -600, "later": 100, "sooner": 20}
    instances = dict(zip(left, await stage.launch_nodes(3), strict=True))
    await stage.tenant.rows("UPDATE nodes SET last_seen_at = now() - interval '10 minutes' RETURNING 1")
    for name, seconds in left.items():
        warning = stage.tenant.warning(instances[name])
        at = datetime.now(UTC) + timedelta(seconds=seconds - 120)
        await told(stage, warning | {"time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})
    async with stage.db.system() as conn:
        claimed = await launch_repository.claim_intents(conn, worker="test", limit=10)
    assert [intent.requirements["instance_id"] for intent in claimed] == [
        instances[name] for name in ("sooner", "later", "gone")
    ]


@pytest.mark.parametrize("replacement", ["lives", "was replaced itself", "is gone"])
async def test_a_node_replaced_on_a_recommendation_and_taken_days_later_has_one_replacement(
    stage: Stage, launcher: Launcher, replacement: str
) -> None:
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "drain"})
    (instance,) = await stage.launch_nodes()

    async def warned(document: dict[str, Any]) -> Any:
        """The interruption of a signal, once it is closed and days have passed."""
        await told(stage, document)

        async def closed() -> bool:
            await launch(launcher)
            await ready.run_once(launcher.runtime)
            await closing.close_ended(launcher.runtime)
            return all(row.state == "closed" for row in await stage.interruptions())

        assert await stage.until(closed, 15)
        past = "now() - interval '3 days'"
        await stage.tenant.rows(
            f"UPDATE interruptions SET notice_at = {past}, received_at = {past}, closed_at = {past} RETURNING 1"
        )
        rows = await stage.interruptions()
        return rows[-1]

    await warned(stage.tenant.rebalance(instance))
    (first,) = stage.ours(alive=True)
    if replacement != "lives":
        await stage.tenant.rows(
            f"UPDATE nodes SET status = 'terminated', terminated_at = now() "
            f"WHERE instance_id = '{first.instance_id}' RETURNING 1"
        )
        stage.aws.terminate(first.instance_id, reason="Server.SpotInstanceTermination")
    if replacement == "was replaced itself":
        await warned(stage.tenant.warning(first.instance_id))

    last = await warned(stage.tenant.warning(instance))
    assert (last.instance_id, last.outcome) == (instance, "handled")
    (living,) = stage.ours(alive=True)
    intent = await stage.tenant.row(f"SELECT state, reason FROM launch_intents WHERE interruption_id = '{last.id}'")
    if replacement == "is gone":
        assert intent.state == "ready"
    else:
        assert (intent.state, intent.reason) == ("cancelled", f"{living.instance_id} has replaced it already")


async def test_an_agent_speaks_for_its_own_cluster_only(stage: Stage) -> None:
    await stage.pause()
    (instance,) = await stage.launch_nodes()
    event = AgentEvent(event_type=EventKind.SPOT_INTERRUPTION, instance_id=instance, occurred_at=datetime.now(UTC))
    said = {"customer_id": stage.tenant.customer_id, "region": stage.tenant.region, "events": [event]}
    done = await accept_agent_events(stage.db, None, cluster_id=new_id(), **said)
    assert (done.quarantined, await stage.interruptions()) == (1, [])


@pytest.mark.parametrize("policy", ["drain", "pre_spin"])
async def test_a_maintenance_of_next_week_drains_nothing_today(stage: Stage, launcher: Launcher, policy: str) -> None:
    await stage.pause()
    await stage.tenant.config("event_policies", {"scheduled_change": policy})
    (instance,) = await stage.launch_nodes()
    start = datetime.now(UTC) + timedelta(days=7)
    detail = {
        "service": "EC2",
        "eventTypeCategory": "scheduledChange",
        "eventTypeCode": "AWS_EC2_SYSTEM_MAINTENANCE_EVENT",
        "startTime": f"{start:%a, %d %b %Y %H:%M:%S} GMT",
        "affectedEntities": [{"entityValue": instance}],
    }
    await told(stage, stage.tenant.event("AWS Health Event", detail, source="aws.health"))
    assert await closing.begin_waiting_drains(launcher.runtime) == 0
    assert await stage.tenant.rows("SELECT 1 FROM agent_tasks") == []
    (row,) = await stage.interruptions()
    assert (row.state, row.drain_pending) == ("open", True)
    # When it begins, the drain does not wait for a replacement any longer; half an hour before, if none will come.
    minutes = 14
    if policy == "pre_spin":
        await stage.tenant.rows("UPDATE launch_intents SET state = 'exhausted' RETURNING 1")
        assert await closing.begin_waiting_drains(launcher.runtime) == 0
        minutes = 44
    await stage.tenant.rows(f"UPDATE interruptions SET deadline_at = now() + interval '{minutes} minutes' RETURNING 1")
    assert await closing.begin_waiting_drains(launcher.runtime) == 1


def maintenance(stage: Stage, *instances: str, start: datetime, said_at: datetime, name: str) -> dict[str, Any]:
    """What AWS Health says of a maintenance; its words of one share the name."""
    code = "AWS_EC2_SYSTEM_MAINTENANCE_EVENT"
    detail = {
        "eventArn": f"arn:aws:health:{stage.tenant.region}::event/EC2/{code}/{code}_{name}",
        "service": "EC2",
        "eventTypeCategory": "scheduledChange",
        "eventTypeCode": code,
        "startTime": f"{start:%a, %d %b %Y %H:%M:%S} GMT",
        "affectedEntities": [{"entityValue": instance} for instance in instances],
    }
    return stage.tenant.event("AWS Health Event", detail, source="aws.health", time=f"{said_at:%Y-%m-%dT%H:%M:%SZ}")


async def test_a_maintenance_that_is_postponed_is_prepared_for_its_new_day(stage: Stage, launcher: Launcher) -> None:
    await stage.pause()
    tenant = stage.tenant
    (instance,) = await stage.launch_nodes()
    now = datetime.now(UTC).replace(microsecond=0)
    day, hour = timedelta(days=1), timedelta(hours=1)

    async def planned() -> tuple[timedelta, timedelta, timedelta]:
        (row,) = await stage.interruptions()
        (intent,) = await tenant.rows("SELECT next_action_at, deadline_at FROM launch_intents")
        assert (row.state, row.drain_pending) == ("open", True)
        return (
            row.deadline_at - timedelta(minutes=15) - now,
            intent.next_action_at + timedelta(minutes=30) - now,
            intent.deadline_at - timedelta(minutes=30) - now,
        )

    first = maintenance(stage, instance, start=now + day, said_at=now - 10 * timedelta(minutes=1), name="a")
    await told(stage, first)
    assert await planned() == (day, day, day)
    # Said again, later: it is postponed. A late copy of what was said first takes nothing back.
    await told(stage, maintenance(stage, instance, start=now + 7 * day, said_at=now, name="a"))
    assert await planned() == (7 * day, 7 * day, 7 * day)
    await told(stage, first | {"id": "by-another-bus"})
    assert await planned() == (7 * day, 7 * day, 7 * day)
    assert [row.event for row in await tenant.rows("SELECT event FROM interruption_history ORDER BY version")] == [
        "detected",
        "deadline_moved",
    ]
    # Another one that comes first is not put off by it.
    await told(stage, maintenance(stage, instance, start=now + 2 * day, said_at=now, name="b"))
    assert (await planned())[:2] == (2 * day, 2 * day)
    await told(stage, maintenance(stage, instance, start=now + 9 * day, said_at=now + timedelta(minutes=1), name="a"))
    assert (await planned())[:2] == (2 * day, 2 * day)

    # What has begun goes on: its drain, or the end that was announced meanwhile.
    await tenant.rows("UPDATE interruptions SET deadline_at = now() + interval '14 minutes' RETURNING 1")
    await closing.begin_waiting_drains(launcher.runtime)
    (begun,) = await stage.interruptions()
    await told(stage, maintenance(stage, instance, start=now + 20 * day, said_at=now + timedelta(minutes=2), name="b"))
    (row,) = await stage.interruptions()
    assert (row.deadline_at, row.drain_pending) == (begun.deadline_at, False)
    await told(stage, tenant.warning(instance))
    (warned,) = await stage.interruptions()
    await told(stage, maintenance(stage, instance, start=now + 30 * day, said_at=now + timedelta(minutes=3), name="b"))
    (row,) = await stage.interruptions()
    assert row.deadline_at == warned.deadline_at < now + hour


async def test_a_postponement_of_a_node_that_registers_late_counts(stage: Stage, launcher: Launcher) -> None:
    await stage.pause()
    late = "i-0aaaabbbbcccc0004"
    now = datetime.now(UTC).replace(microsecond=0)
    day = timedelta(days=1)
    words = [(day, -2, "a"), (7 * day, 0, "a"), (day, -1, "a")]
    for after, minutes, name in words:
        said_at = now + timedelta(minutes=minutes)
        await told(stage, maintenance(stage, late, start=now + after, said_at=said_at, name=name))
    await stage.tenant.node(late)
    assert await closing.settle_unmatched(launcher.runtime) == 1
    (row,) = await stage.interruptions()
    (intent,) = await stage.tenant.rows("SELECT next_action_at FROM launch_intents")
    assert row.deadline_at == now + 7 * day + timedelta(minutes=15)
    assert intent.next_action_at == now + 7 * day - timedelta(minutes=30)


async def test_a_warning_that_launches_first_drains_a_node_its_recommendation_had_kept(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.pause()
    await stage.tenant.config(
        "event_policies", {"rebalance_recommendation": "pre_spin", "spot_interruption": "pre_spin"}
    )
    (instance,) = await stage.launch_nodes()
    await told(stage, stage.tenant.rebalance(instance))
    await stage.tenant.rows("UPDATE launch_intents SET state = 'exhausted' RETURNING 1")
    # It is kept, and not closed yet when the warning comes.
    await closing.begin_waiting_drains(launcher.runtime)
    await told(stage, stage.tenant.warning(instance))
    await closing.begin_waiting_drains(launcher.runtime)
    tasks = await stage.tenant.rows("SELECT state FROM agent_tasks")
    assert [task.state for task in tasks] == ["queued"]


async def test_late_nodes_of_one_message_are_each_matched_with_what_it_said(stage: Stage, launcher: Launcher) -> None:
    await stage.pause()
    tenant = stage.tenant
    start = (datetime.now(UTC) + timedelta(days=7)).replace(microsecond=0)
    late, never, warned = "i-0aaaabbbbcccc0001", "i-0aaaabbbbcccc0002", "i-0aaaabbbbcccc0003"
    detail = {
        "service": "EC2",
        "eventTypeCategory": "scheduledChange",
        "eventTypeCode": "AWS_EC2_SYSTEM_MAINTENANCE_EVENT",
        "startTime": f"{start:%a, %d %b %Y %H:%M:%S} GMT",
        "affectedEntities": [{"entityValue": instance} for instance in (late, never, warned)],
    }
    await told(stage, tenant.event("AWS Health Event", detail, source="aws.health"))
    # Nobody's yet, one of them is warned of by its agent, with the exact moment.
    ends = (datetime.now(UTC) + timedelta(seconds=100)).replace(microsecond=0)
    notice = AgentEvent(
        event_type=EventKind.SPOT_INTERRUPTION,
        instance_id=warned,
        occurred_at=datetime.now(UTC),
        detail={"action": "terminate", "time": ends.isoformat()},
    )
    await accept_agent_events(
        stage.db,
        None,
        customer_id=tenant.customer_id,
        cluster_id=tenant.cluster_id,
        region=tenant.region,
        events=[notice],
    )
    await tenant.node(late)
    await tenant.node(warned)
    assert await closing.settle_unmatched(launcher.runtime) == 2
    rows = {row.instance_id: row for row in await stage.interruptions()}
    assert {rows[late].state, rows[warned].state, rows[never].state} == {"open", "unmatched"}
    assert (rows[late].drain_pending, rows[late].deadline_at) == (True, start + timedelta(minutes=15))
    assert (rows[warned].kind, rows[warned].deadline_at) == ("spot_interruption", ends)
    tasks = await tenant.rows("SELECT interruption_id, deadline_at FROM agent_tasks")
    assert [(task.interruption_id, task.deadline_at) for task in tasks] == [(rows[warned].id, ends)]
    planned = await tenant.row("SELECT * FROM launch_intents WHERE interruption_id = :id", id=rows[late].id)
    assert planned.next_action_at == start - timedelta(minutes=30)

    inbox = "SELECT outcome, body IS NOT NULL AS kept FROM inbox_messages WHERE source = 'sqs'"
    assert tuple(await tenant.row(inbox)) == ("waiting", True), "one of its nodes is still waited for"
    await tenant.rows("UPDATE interruptions SET received_at = now() - interval '11 minutes' RETURNING 1")
    await closing.settle_unmatched(launcher.runtime)
    assert tuple(await tenant.row(inbox)) == ("quarantined", True)


def called_off(document: dict[str, Any], said_at: datetime, **values: Any) -> dict[str, Any]:
    """The word by which AWS closes a maintenance."""
    detail = document["detail"] | {"statusCode": "closed"}
    return document | {"id": str(new_id()), "detail": detail, "time": f"{said_at:%Y-%m-%dT%H:%M:%SZ}"} | values


async def test_a_maintenance_that_is_called_off_takes_back_what_it_had_planned(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.pause()
    tenant = stage.tenant
    (instance,) = await stage.launch_nodes()
    now, day, minute = datetime.now(UTC).replace(microsecond=0), timedelta(days=1), timedelta(minutes=1)
    first = maintenance(stage, instance, start=now + day, said_at=now - 10 * minute, name="a")
    other = maintenance(stage, instance, start=now + 2 * day, said_at=now - 9 * minute, name="b")
    await told(stage, first)
    await told(stage, called_off(first, now - 11 * minute))
    await told(stage, called_off(maintenance(stage, instance, start=now + day, said_at=now, name="c"), now))
    (row,) = await stage.interruptions()
    assert (row.state, row.deadline_at) == ("open", now + day + 15 * minute), "an older word, and another maintenance"

    # Another one is left.
    await told(stage, other)
    await told(stage, called_off(first, now - 8 * minute))
    (row,) = await stage.interruptions()
    assert (row.state, row.drain_pending, row.deadline_at) == ("open", True, now + 2 * day + 15 * minute)
    (intent,) = await tenant.rows("SELECT state, next_action_at FROM launch_intents")
    assert (intent.state, intent.next_action_at) == ("planned", now + 2 * day - 30 * minute)

    await told(stage, called_off(other, now - 7 * minute))
    await told(stage, first | {"id": "by-another-bus"})
    (row,) = await stage.interruptions()
    assert (row.state, row.outcome, row.reason) == ("closed", "cancelled", "AWS called the maintenance off")
    assert await closing.cancel_unwanted(launcher.runtime) == 1
    (intent,) = await tenant.rows("SELECT state FROM launch_intents")
    assert intent.state == "cancelled"
    history = await tenant.rows("SELECT event, state, detail FROM interruption_history ORDER BY version")
    assert [entry.event for entry in history] == ["detected", "deadline_moved", "called_off"]
    assert history[-1].state == "closed"
    assert not await tenant.rows("SELECT 1 FROM agent_tasks")
    told_of = await tenant.rows("SELECT payload FROM outbox WHERE topic = 'spot.interruption.closed'")
    assert [one.payload["outcome"] for one in told_of] == ["cancelled"]

    # What comes after it is news.
    await told(stage, tenant.warning(instance))
    _, warned = await stage.interruptions()
    assert (warned.state, warned.kind) == ("open", "spot_interruption")
    assert len(await tenant.rows("SELECT 1 FROM agent_tasks")) == 1


@pytest.mark.parametrize("begun", ["drain", "warning", "recommendation"])
async def test_what_has_begun_goes_on_when_its_maintenance_is_called_off(
    stage: Stage, launcher: Launcher, begun: str
) -> None:
    await stage.pause()
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    now = datetime.now(UTC).replace(microsecond=0)
    told_first = maintenance(stage, instance, start=now + timedelta(days=1), said_at=now, name="a")
    await told(stage, told_first)
    if begun == "drain":
        await stage.tenant.rows("UPDATE interruptions SET deadline_at = now() + interval '14 minutes' RETURNING 1")
        await closing.begin_waiting_drains(launcher.runtime)
    elif begun == "warning":
        await told(stage, stage.tenant.warning(instance))
    else:
        await told(stage, stage.tenant.rebalance(instance))
    (before,) = await stage.interruptions()
    await told(stage, called_off(told_first, now + timedelta(minutes=1)))
    (row,) = await stage.interruptions()
    assert (row.state, row.deadline_at, row.drain_pending) == ("open", before.deadline_at, before.drain_pending)
    assert await closing.cancel_unwanted(launcher.runtime) == 0


async def test_a_maintenance_called_off_before_its_node_registers_begins_nothing(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.pause()
    late, now = "i-0aaaabbbbcccc0005", datetime.now(UTC).replace(microsecond=0)
    first = maintenance(stage, late, start=now + timedelta(days=1), said_at=now, name="a")
    await told(stage, first)
    await told(stage, called_off(first, now))
    (row,) = await stage.interruptions()
    assert (row.state, row.outcome) == ("closed", "cancelled")
    await stage.tenant.node(late)
    assert await closing.settle_unmatched(launcher.runtime) == 0
    inbox = await stage.tenant.rows("SELECT outcome FROM inbox_messages")
    assert [message.outcome for message in inbox] == ["handled", "handled"]


async def test_a_replacement_launched_for_a_maintenance_that_is_called_off_is_ended(
    stage: Stage, launcher: Launcher
) -> None:
    stage.nodes_join = False
    (instance,) = await stage.launch_nodes()
    now = datetime.now(UTC).replace(microsecond=0)
    first = maintenance(stage, instance, start=now + timedelta(minutes=40), said_at=now, name="a")
    await told(stage, first)
    await due_again(stage)
    await launch(launcher)
    assert len(stage.ours(alive=True)) == 1
    await told(stage, called_off(first, now))
    await closing.cancel_unwanted(launcher.runtime)
    (attempt,) = await stage.tenant.rows("SELECT state FROM launch_attempts")
    (intent,) = await stage.tenant.rows("SELECT state FROM launch_intents")
    assert (intent.state, attempt.state) == ("cancelled", "terminating")
