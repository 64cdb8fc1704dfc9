"""Back to Spot: the rule condition by condition, and plans against the AWS double with a real agent's queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from control.gateways.aws import AwsGateway
from control.interruptions import closing, returning
from control.interruptions.caps import Caps
from control.interruptions.choosing import Limits, Market, TypeFacts
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import invariants, leaving, ready
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers.ending import claim_endings
from control.interruptions.return_rule import (
    AFTER_FAILURE,
    Move,
    PoolRecord,
    Progress,
    StandIn,
    Verdict,
    judge,
    next_move,
    window_open,
)
from control.interruptions.runtime import Runtime
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from warehouse.contracts import EventSource

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)  # a Monday
ZONE = "us-east-1a"
TYPES = {"m5.large": TypeFacts("m5.large", 2, 8, 0.096), "m5a.large": TypeFacts("m5a.large", 2, 8, 0.086)}
MARKET = Market([ZONE], TYPES, {(ZONE, "m5.large"): 0.04, (ZONE, "m5a.large"): 0.05})
QUIET = PoolRecord(troubled_at=NOW - timedelta(hours=7), seen_at=NOW - timedelta(hours=1))
NODE = StandIn(
    instance_id="i-0123456789abcdef0",
    instance_type="m5.large",
    availability_zone=ZONE,
    usd_per_hour=0.096,
    ready_at=NOW - timedelta(hours=8),
    cpu_cores=2.0,
    memory_gib=8.0,
    interruptions_in_flight=0,
    plan_running=False,
    last_failure_at=None,
    stopped=False,
    agent_seen_at=NOW - timedelta(seconds=10),
    nodes=10,
    nodes_disturbed=0,
    nodes_on_demand=3,
)


def verdict(
    node: StandIn = NODE,
    *,
    market: Market = MARKET,
    limits: Limits = Limits(),
    record: PoolRecord = QUIET,
    caps: Caps | None = None,
    config: dict[str, Any] | None = None,
) -> Verdict:
    records = dict.fromkeys(market.spot, record)
    return judge(node, market, limits, records, caps or Caps.of({}, 0, 0.0), config or {}, NOW)


def test_a_quiet_cheap_pool_takes_the_node_back_and_all_evidence_is_kept() -> None:
    found = verdict()
    assert found.go
    assert found.pool is not None
    assert (found.pool.instance_type, found.pool.availability_zone, found.pool.node_type) == ("m5.large", ZONE, "spot")
    assert [entry["name"] for entry in found.as_evidence()] == [
        "quiet_pool",
        "price",
        "capacity_seen",
        "zone_allowed",
        "launch_caps",
        "nothing_in_flight",
        "no_other_plan",
        "disruption_budget",
        "on_demand_floor",
        "disruption_window",
        "no_approval_needed",
        "not_stopped",
        "agent_seen",
        "settled",
        "spare_node",
        "no_recent_failure",
    ]
    assert all(entry["found"] and entry["needed"] for entry in found.as_evidence())


DEAR = replace(MARKET, spot=dict.fromkeys(MARKET.spot, 0.09))


@pytest.mark.parametrize(
    ("broken", "values"),
    [
        ("quiet_pool", {"record": replace(QUIET, troubled_at=NOW - timedelta(hours=5))}),
        ("quiet_pool", {"config": {"quiet_hours_before_spot": 8}}),
        ("price", {"market": DEAR}),
        ("price", {"limits": Limits(price_cap_ratio=0.3)}),
        ("capacity_seen", {"record": replace(QUIET, seen_at=None)}),
        ("capacity_seen", {"record": replace(QUIET, seen_at=NOW - timedelta(hours=9))}),
        ("zone_allowed", {"limits": Limits(zones=frozenset({"us-east-1b"}))}),
        ("launch_caps", {"caps": Caps.of({"max_launches_per_hour": 3}, 3, 0.0)}),
        ("launch_caps", {"caps": Caps.of({"max_hourly_spend_usd": 0.1}, 1, 0.08)}),
        ("nothing_in_flight", {"node": replace(NODE, interruptions_in_flight=1)}),
        ("no_other_plan", {"node": replace(NODE, plan_running=True)}),
        ("disruption_budget", {"node": replace(NODE, nodes_disturbed=1)}),
        ("disruption_budget", {"config": {"disruption_budget": {"ratio": 0.0, "nodes": 0}}}),
        ("on_demand_floor", {"config": {"on_demand_floor": {"nodes": 3, "ratio": 0.0}}}),
        ("on_demand_floor", {"config": {"on_demand_floor": {"nodes": 0, "ratio": 0.25}}}),
        (
            "disruption_window",
            {
                "config": {
                    "disruption_windows": {"windows": [{"days": ["sun"], "start": "01:00:00", "end": "05:00:00"}]}
                }
            },
        ),
        ("no_approval_needed", {"config": {"approval_required": True}}),
        ("not_stopped", {"node": replace(NODE, stopped=True)}),
        ("agent_seen", {"node": replace(NODE, agent_seen_at=NOW - timedelta(minutes=3))}),
        ("agent_seen", {"node": replace(NODE, agent_seen_at=None)}),
        ("settled", {"node": replace(NODE, ready_at=NOW - timedelta(minutes=5))}),
        ("spare_node", {"node": replace(NODE, spare_instance_id="i-0fedcba9876543210")}),
        ("no_recent_failure", {"node": replace(NODE, last_failure_at=NOW - AFTER_FAILURE / 2)}),
    ],
)
def test_each_condition_alone_keeps_the_node_on_demand(broken: str, values: dict[str, Any]) -> None:
    found = verdict(**values)
    assert not found.go
    assert [check.name for check in found.checks if not check.ok] == [broken]


def test_another_pool_goes_where_the_first_is_troubled_and_an_untested_one_gets_a_try() -> None:
    records = {(ZONE, "m5.large"): replace(QUIET, troubled_at=NOW), (ZONE, "m5a.large"): PoolRecord()}
    found = judge(NODE, MARKET, Limits(), records, Caps.of({}, 0, 0.0), {}, NOW)
    assert found.go
    assert found.pool is not None
    assert found.pool.instance_type == "m5a.large"
    assert not judge(NODE, replace(MARKET, spot={}), Limits(), {}, Caps.of({}, 0, 0.0), {}, NOW).go


def test_windows_are_local_and_go_over_midnight() -> None:
    night = {"time_zone": "Europe/Berlin", "windows": [{"days": ["mon"], "start": "22:00:00", "end": "04:00:00"}]}
    berlin = timedelta(hours=1)
    for hours, inside in ((21.9, False), (22, True), (27.9, True), (28, False), (46, False)):
        assert window_open(night, NOW.replace(hour=0) - berlin + timedelta(hours=hours)) is inside
    assert window_open({"windows": []}, NOW)
    assert window_open(None, NOW)


AT = Progress("ready", None, None, False, False, False, True, 0, False, False)


def test_a_plan_moves_forward_holds_and_ends() -> None:
    done = replace(AT, drain="done", drained_at=NOW - timedelta(seconds=30))
    assert next_move(replace(AT, launch="launching"), NOW).do == "wait"
    assert next_move(AT, NOW).do == "drain"
    assert next_move(replace(AT, drain="leased"), NOW).do == "wait"
    assert next_move(replace(done, old_cordoned=True), NOW).do == "terminate"
    # Nothing is begun while an interruption is in flight or the kill switch is on.
    for held in ({"interruptions_in_flight": 1}, {"stopped": True}):
        assert next_move(replace(AT, **held), NOW).do == "wait"
        assert next_move(replace(done, old_cordoned=True, **held), NOW).do == "wait"
        assert next_move(replace(done, old_cordoned=True, terminating=True, **held), NOW).do == "wait"
    # The agent's word is compared with its reports.
    assert next_move(done, NOW).do == "wait"
    assert next_move(done, NOW + timedelta(minutes=6)).end == "stuck"

    def end(move: Move) -> tuple[str | None, bool]:
        return move.end, move.uncordon

    assert end(next_move(replace(AT, launch="exhausted"), NOW)) == ("rolled_back", False)
    for over in ("failed", "refused", "expired", "superseded"):
        assert end(next_move(replace(AT, drain=over), NOW)) == ("stuck", True)
    assert end(next_move(replace(done, old_cordoned=True, new_ready=False), NOW)) == ("rolled_back", True)
    assert end(next_move(replace(AT, old_gone=True), NOW)) == ("stopped", False)
    assert next_move(replace(AT, launch="planned", old_gone=True), NOW).do == "cancel_launch"
    assert next_move(replace(AT, launch="planned", stop_requested=True), NOW).do == "cancel_launch"
    assert end(next_move(replace(AT, launch="cancelled", stop_requested=True), NOW)) == ("stopped", False)
    assert end(next_move(replace(AT, stop_requested=True), NOW)) == ("stopped", False)
    assert next_move(replace(AT, terminating=True, old_gone=True), NOW).do == "terminate"


# --- against the AWS double -------------------------------------------------------------------------------------


@pytest.fixture
async def launcher(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Launcher]:
    """The loops of a worker, turned by hand."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    aws = AwsGateway(endpoint_url=stage.aws.url)
    yield Launcher(Runtime(stage.db, stage.db, aws, stage.bells, "by-hand", DEPLOYMENT))
    await aws.close()


async def _launch(stage: Stage, launcher: Launcher, *, of: str = "true") -> None:
    """Launch what is planned, until its nodes (``of`` these intents) are Ready."""

    async def all_ready() -> bool:
        await launcher.plan_round()
        await launcher.finish_calls(10)
        await ready.run_once(launcher.runtime)
        sql = f"SELECT 1 FROM launch_intents WHERE state NOT IN ('ready', 'exhausted', 'cancelled') AND {of}"
        return not await stage.tenant.rows(sql)

    await stage.until(all_ready, 10)


async def _stand_in(stage: Stage, launcher: Launcher, *, hours: float = 7.0) -> str:
    """An interrupted Spot node that was replaced on demand some hours ago; everything has been quiet since."""
    others = await stage.launch_nodes(2)
    # Spot is not to be had: the ladder ends on demand.
    await stage.tenant.rows("UPDATE spot_price_current SET price_usd_per_hour = 9 RETURNING 1")
    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(others[0])), EventSource.SQS)])
    await _launch(stage, launcher)
    await stage.until(lambda: closing.close_ended(launcher.runtime), 10)
    await stage.tenant.rows("UPDATE spot_price_current SET price_usd_per_hour = 0.03 RETURNING 1")
    await stage.tenant.rows("UPDATE nodes SET terminated_at = now() WHERE instance_id = :i RETURNING 1", i=others[0])
    attempt = await stage.tenant.row("SELECT * FROM launch_attempts WHERE node_type = 'on-demand'")
    await stage.tenant.rows(
        f"UPDATE launch_attempts SET ready_at = ready_at - interval '{hours} hours', "
        f"created_at = created_at - interval '{hours} hours' RETURNING 1"
    )
    await stage.tenant.rows(f"UPDATE pool_standings SET updated_at = now() - interval '{hours} hours' RETURNING 1")
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
    launcher._markets.clear()
    return attempt.instance_id


async def _again(stage: Stage) -> None:
    await stage.tenant.rows("UPDATE round_claims SET claimed_until = now() RETURNING 1")


async def _plan(stage: Stage) -> Any:
    return await stage.tenant.row("SELECT * FROM optimization_history")


def _running(stage: Stage) -> dict[str, str]:
    return {instance.instance_id: instance.lifecycle for instance in stage.ours(alive=True)}


async def _advance_until_drained(stage: Stage, launcher: Launcher) -> None:
    assert await returning.advance(launcher) == 1

    async def drained() -> bool:
        rows = await stage.tenant.rows("SELECT 1 FROM agent_tasks WHERE interruption_id IS NULL AND state = 'done'")
        return bool(rows)

    await stage.until(drained, 10)


async def _about_to_end(stage: Stage, launcher: Launcher) -> str:
    """A stand-in whose return has come as far as its end: drained, and cordoned by its agent's report."""
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    await _launch(stage, launcher)
    await _advance_until_drained(stage, launcher)
    await stage.tenant.rows("UPDATE nodes SET status = 'cordoned' WHERE instance_id = :i RETURNING 1", i=old)
    return old


async def test_a_stand_in_goes_back_to_spot_by_a_plan_with_its_evidence(stage: Stage, launcher: Launcher) -> None:
    old = await _stand_in(stage, launcher)
    assert await returning.consider(launcher) == 1
    await _again(stage)
    assert await returning.consider(launcher) == 0, "one plan per cluster at a time"
    plan = await _plan(stage)
    assert (plan.optimization_type, plan.status, plan.decided_by) == ("return_to_spot", "running", "rule")
    assert all(check["ok"] for check in plan.safety_report)
    assert float(plan.estimated_savings) > 0

    await _launch(stage, launcher)
    assert sorted(_running(stage).values()) == ["on-demand", "spot"], "the new one first"
    await _advance_until_drained(stage, launcher)
    task = await stage.tenant.row("SELECT * FROM agent_tasks WHERE interruption_id IS NULL")
    assert task.parameters["instance_id"] == old
    assert task.parameters["force_at_deadline"] is False
    # The agent's own report must show it before the node is ended.
    assert await returning.advance(launcher) == 0
    assert old in _running(stage)
    await stage.tenant.rows("UPDATE nodes SET status = 'cordoned' WHERE instance_id = :i RETURNING 1", i=old)
    assert await returning.advance(launcher) == 1
    plan = await _plan(stage)
    assert (plan.status, list(_running(stage).values())) == ("succeeded", ["spot"])
    steps = await stage.tenant.rows("SELECT kind, state FROM plan_steps ORDER BY step_no")
    assert [(step.kind, step.state) for step in steps] == [("launch", "done"), ("drain", "done"), ("terminate", "done")]
    topics = await stage.tenant.rows("SELECT topic FROM outbox WHERE topic LIKE 'optimization.%' ORDER BY id")
    assert [row.topic for row in topics] == ["optimization.started", "optimization.completed"]
    # Its end is our own doing: no interruption, no replacement.
    facts = await stage.tenant.facts()
    told = stage.tenant.state_change(old, "shutting-down")
    await ingest(stage.db, facts, [Received(json.dumps(told), EventSource.SQS)])
    assert len(await stage.interruptions()) == 1


async def test_nothing_is_begun_or_carried_on_while_an_interruption_is_in_flight(
    stage: Stage, launcher: Launcher
) -> None:
    old = await _stand_in(stage, launcher)
    other = stage.tenant.instances[1]
    stage.agent_works = False
    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(other)), EventSource.SQS)])
    assert await returning.consider(launcher) == 0

    stage.agent_works = True
    await _launch(stage, launcher)
    await stage.until(lambda: closing.close_ended(launcher.runtime), 10)
    # The interruption itself was trouble in its pool; hours later all is quiet again.
    await stage.tenant.rows("UPDATE pool_standings SET updated_at = now() - interval '7 hours' RETURNING 1")
    await _again(stage)
    assert await returning.consider(launcher) == 1
    await _launch(stage, launcher)
    # Between launch and drain a warning comes in: the plan holds, with both nodes kept.
    stage.agent_works = False
    fresh = (await stage.launch_nodes())[0]
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(fresh)), EventSource.SQS)])
    assert await returning.advance(launcher) == 0
    assert (await _plan(stage)).status == "running"
    assert old in _running(stage)


async def _warn(stage: Stage, instance: str) -> None:
    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)])


async def _calmed(stage: Stage, launcher: Launcher) -> None:
    await stage.until(lambda: closing.close_ended(launcher.runtime), 10)
    await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")


async def test_an_interruption_that_comes_after_the_plan_began_launches_first(stage: Stage, launcher: Launcher) -> None:
    await _stand_in(stage, launcher)
    assert await returning.consider(launcher) == 1
    other = (await stage.launch_nodes())[0]
    await _warn(stage, other)
    await _launch(stage, launcher, of="plan_id IS NULL")
    states = "SELECT state, reason FROM launch_intents WHERE plan_id IS NOT NULL"
    held = await stage.tenant.row(states)
    assert (held.state, "in flight" in held.reason) == ("planned", True)
    replaced = await stage.tenant.row(
        "SELECT l.state FROM launch_intents l JOIN interruptions i ON i.id = l.interruption_id "
        "WHERE i.instance_id = :i",
        i=other,
    )
    assert replaced.state == "ready"
    await _calmed(stage, launcher)
    await _launch(stage, launcher)
    assert (await stage.tenant.row(states)).state == "ready"


async def test_a_warning_of_nobody_in_another_region_holds_nothing(stage: Stage, launcher: Launcher) -> None:
    await _stand_in(stage, launcher)
    await _warn(stage, "i-0fedcba9876543210")
    nobodys = "UPDATE interruptions SET region = :r WHERE instance_id = 'i-0fedcba9876543210' RETURNING state"
    assert (await stage.tenant.row(nobodys, r="us-east-1")).state == "unmatched"
    assert await returning.consider(launcher) == 0, "it may be this cluster's"
    await stage.tenant.row(nobodys, r="eu-west-1")
    await _again(stage)
    assert await returning.consider(launcher) == 1


async def test_an_interruption_between_commit_and_call_withdraws_the_launch_of_a_return(
    stage: Stage, launcher: Launcher
) -> None:
    await _stand_in(stage, launcher)
    assert await returning.consider(launcher) == 1
    # A worker that dies before its call.
    stage.aws.inject(Fault("drop_before", action="RunInstances"))
    await launcher.plan_round()
    await launcher.finish_calls(10)
    plans = "SELECT i.id FROM launch_intents i WHERE i.plan_id IS NOT NULL"
    of_plan = f"id IN (SELECT batch_id FROM launch_attempts WHERE intent_id IN ({plans}))"
    await stage.tenant.rows(
        f"UPDATE launch_batches SET state = 'calling', calls = 0, first_called_at = NULL WHERE {of_plan} RETURNING 1"
    )
    await stage.tenant.rows(f"UPDATE launch_attempts SET state = 'calling' WHERE intent_id IN ({plans}) RETURNING 1")
    await _warn(stage, (await stage.launch_nodes())[0])
    await stage.pass_leases()
    await launch_reconciler.run_once(launcher)
    attempt = f"SELECT state FROM launch_attempts WHERE intent_id IN ({plans}) ORDER BY attempt_no"
    assert [row.state for row in await stage.tenant.rows(attempt)] == ["failed"]
    await _launch(stage, launcher, of="plan_id IS NULL")
    await _calmed(stage, launcher)
    await _launch(stage, launcher)
    assert [row.state for row in await stage.tenant.rows(attempt)] == ["failed", "ready"]


@pytest.mark.parametrize("what", ["interruption", "kill switch", "adopt-only"])
async def test_what_comes_while_ec2_is_asked_holds_the_end_of_the_old_node(
    stage: Stage, launcher: Launcher, what: str
) -> None:
    old = await _about_to_end(stage, launcher)
    fresh = (await stage.launch_nodes())[0]
    stage.aws.inject(Fault("delay", action="DescribeInstances", seconds=1.0, nth=2))
    before = len(stage.calls("DescribeInstances"))
    moving = asyncio.create_task(returning.advance(launcher))

    async def asked_once() -> bool:
        return len(stage.calls("DescribeInstances")) > before

    await stage.until(asked_once, 10)
    if what == "interruption":
        stage.agent_works = False
        await _warn(stage, fresh)
    elif what == "kill switch":
        await stage.tenant.rows("UPDATE clusters SET kill_switch = true RETURNING 1")
    else:
        await stage.tenant.rows("UPDATE customers SET adopt_only_since = now() WHERE id = :customer_id RETURNING 1")
    await moving
    assert old in _running(stage)
    assert (await _plan(stage)).status == "running"


async def test_a_pool_that_refuses_ends_the_plan_and_nothing_was_moved(stage: Stage, launcher: Launcher) -> None:
    old = await _stand_in(stage, launcher)
    assert await returning.consider(launcher) == 1
    stage.aws.inject(Fault("ice", action="RunInstances", count=None))
    for _ in range(2):
        await stage.until(launcher.plan_round, 10)
        await launcher.finish_calls(10)
    await returning.advance(launcher)
    plan = await _plan(stage)
    assert plan.status == "rolled_back"
    assert "the plan's pool refused" in plan.reason
    assert list(_running(stage)) == [old]
    assert len(await stage.tenant.rows("SELECT 1 FROM launch_attempts WHERE node_type = 'on-demand'")) == 1
    await stage.tenant.rows("UPDATE pool_standings SET updated_at = now() - interval '7 hours' RETURNING 1")
    await _again(stage)
    assert await returning.consider(launcher) == 0, "the cluster is left alone after a return that did not work out"


async def test_a_drain_that_fails_gives_the_node_back(stage: Stage, launcher: Launcher) -> None:
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    await _launch(stage, launcher)
    stage.agent_works = False
    assert await returning.advance(launcher) == 1
    await stage.tenant.rows("UPDATE agent_tasks SET state = 'failed' WHERE interruption_id IS NULL RETURNING 1")
    assert await returning.advance(launcher) == 1
    assert (await _plan(stage)).status == "stuck"
    task = await stage.tenant.row("SELECT * FROM agent_tasks WHERE task_type = 'uncordon_node'")
    assert task.parameters["instance_id"] == old
    assert old in _running(stage)


async def test_a_return_that_cannot_drain_uses_its_spot_node_again_and_never_adds_another(
    stage: Stage, launcher: Launcher
) -> None:
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    await _launch(stage, launcher)
    stage.agent_works = False
    kept = _running(stage)
    assert len(kept) == 2
    for tries in (1, 2):
        assert await returning.advance(launcher) == 1
        await stage.tenant.rows(
            "UPDATE agent_tasks SET state = 'failed' WHERE task_type = 'drain_node' AND interruption_id IS NULL "
            "AND state = 'queued' RETURNING 1"
        )
        assert await returning.advance(launcher) == 1
        assert (await _plan(stage)).status == "stuck"
        uncordons = await stage.tenant.rows("SELECT 1 FROM agent_tasks WHERE task_type = 'uncordon_node'")
        assert len(uncordons) == tries
        await _again(stage)
        assert await returning.consider(launcher) == 0, "not before six hours"
        await stage.tenant.rows("UPDATE optimization_history SET finished_at = now() - interval '7 hours' RETURNING 1")
        await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
        await _again(stage)
        assert await returning.consider(launcher) == 1
        assert (await _plan(stage)).status == "running"
        assert await launcher.plan_round() == 0
        assert _running(stage) == kept
    stage.agent_works = True
    await _advance_until_drained(stage, launcher)
    await stage.tenant.rows("UPDATE nodes SET status = 'cordoned' WHERE instance_id = :i RETURNING 1", i=old)
    assert await returning.advance(launcher) == 1
    plan = await _plan(stage)
    assert (plan.status, list(_running(stage).values())) == ("succeeded", ["spot"])
    history = await stage.tenant.rows("SELECT version, event, status FROM plan_history ORDER BY version")
    assert [row.version for row in history] == list(range(1, plan.version + 1))
    once = [("launch_done", "running"), ("drain_running", "running"), ("ended", "stuck")]
    again = [("resumed", "running"), ("drain_running", "running"), ("ended", "stuck")]
    done = [
        ("resumed", "running"),
        ("drain_running", "running"),
        ("drain_done", "running"),
        ("terminate_running", "running"),
        ("terminate_done", "running"),
        ("ended", "succeeded"),
    ]
    assert [(row.event, row.status) for row in history] == [("begun", "running"), *once, *again, *done]
    assert await invariants.run_once(launcher.runtime) == 0
    await stage.tenant.rows("DELETE FROM plan_history WHERE version = 3 RETURNING 1")
    await _again(stage)
    assert await invariants.run_once(launcher.runtime) == 1


@pytest.mark.parametrize("at", ["before the drain", "stuck", "terminating"])
async def test_a_spot_node_lost_while_the_node_it_was_to_replace_lives_is_not_replaced(
    stage: Stage, launcher: Launcher, at: str
) -> None:
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    await _launch(stage, launcher)
    (spot,) = set(_running(stage)) - {old}
    if at == "stuck":
        stage.agent_works = False
        assert await returning.advance(launcher) == 1
        await stage.tenant.rows("UPDATE agent_tasks SET state = 'failed' WHERE interruption_id IS NULL RETURNING 1")
        assert await returning.advance(launcher) == 1
        stage.agent_works = True
    if at == "terminating":
        await _advance_until_drained(stage, launcher)
        await stage.tenant.rows("UPDATE nodes SET status = 'cordoned' WHERE instance_id = :i RETURNING 1", i=old)
        stage.aws.inject(Fault("throttle", action="TerminateInstances"))
        assert await returning.advance(launcher) == 1

    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(spot)), EventSource.SQS)])
    await _launch(stage, launcher)
    await stage.until(lambda: closing.close_ended(launcher.runtime), 10)
    stage.aws.terminate(spot, reason="Server.SpotInstanceTermination")
    await stage.tenant.rows("UPDATE nodes SET terminated_at = now() WHERE instance_id = :i RETURNING 1", i=spot)
    if at == "terminating":
        await stage.tenant.rows("UPDATE refused_endings SET next_at = now() RETURNING 1")
        await _again(stage)
    await returning.advance(launcher)
    if at == "terminating":
        assert old not in _running(stage), "what was begun is brought to its end"
        assert len(_running(stage)) == 1
    else:
        assert list(_running(stage)) == [old], "one node is wanted there, and lives"
        assert (await _plan(stage)).status in ("rolled_back", "stuck")


async def test_both_nodes_of_a_return_lost_at_once_have_one_replacement(stage: Stage, launcher: Launcher) -> None:
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    await _launch(stage, launcher)
    both = set(_running(stage))
    facts = await stage.tenant.facts()
    for lost in (old, *(both - {old})):
        await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(lost)), EventSource.SQS)])
    await _launch(stage, launcher)
    assert len(set(_running(stage)) - both) == 1


async def test_a_node_lost_while_its_return_launches_waits_for_that_launch(stage: Stage, launcher: Launcher) -> None:
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(old)), EventSource.SQS)])
    await _launch(stage, launcher)
    assert len(_running(stage)) == 2, "the node that is lost, and one in its place"


@pytest.mark.parametrize("held", ["round", "adopt_only"])
async def test_the_old_node_waits_for_its_clusters_round_and_for_a_person(
    stage: Stage, launcher: Launcher, held: str
) -> None:
    """Another loop, or worker, ended an instance of the cluster a moment ago; or the database was restored."""
    old = await _about_to_end(stage, launcher)
    adopt_only = "UPDATE customers SET adopt_only_since = {} WHERE id = :customer_id RETURNING 1"
    if held == "round":
        assert await claim_endings(launcher.runtime, stage.tenant.cluster_id)
    else:
        await stage.tenant.rows(adopt_only.format("now()"))
    await returning.advance(launcher)
    assert _alive(stage, old)
    if held == "round":
        await _again(stage)
    else:
        await stage.tenant.rows(adopt_only.format("NULL"))
    await returning.advance(launcher)
    assert not _alive(stage, old)
    assert (await _plan(stage)).status == "succeeded"


async def test_a_customer_that_leaves_keeps_its_role_until_its_return_has_stopped(
    stage: Stage, launcher: Launcher
) -> None:
    old = await _stand_in(stage, launcher)
    await returning.consider(launcher)
    await _launch(stage, launcher)
    await stage.tenant.rows("UPDATE customers SET status = 'offboarding' WHERE id = :customer_id RETURNING 1")
    assert await leaving.run_once(launcher.runtime) == 0, "a plan runs"
    customer = "SELECT status, aws_role_arn FROM customers WHERE id = :customer_id"
    assert (await stage.tenant.row(customer)).aws_role_arn is not None
    assert await returning.advance(launcher) == 1
    assert (await _plan(stage)).status == "stopped"
    assert await leaving.run_once(launcher.runtime) == 1
    assert (await stage.tenant.row(customer)).status == "offboarded"
    assert old in _running(stage), "Ready nodes stay the customer's"
    assert len(_running(stage)) == 2
    assert await stage.tenant.rows("SELECT 1 FROM agent_tasks WHERE interruption_id IS NULL") == []


async def test_an_old_node_that_lost_our_tag_is_never_ended(stage: Stage, launcher: Launcher) -> None:
    old = await _about_to_end(stage, launcher)
    stage.aws._instances.by_id[old].tags.pop("cloudoptim:managed")
    await returning.advance(launcher)
    assert _alive(stage, old)
    assert (await _plan(stage)).status == "running"


def _alive(stage: Stage, instance_id: str) -> bool:
    return any(i.instance_id == instance_id for i in stage.aws.instances(states=("pending", "running")))
