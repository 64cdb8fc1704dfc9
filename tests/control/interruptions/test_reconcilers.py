"""What the loops that compare tables with the cloud find, mend and leave alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from control.gateways.aws import AwsGateway, Credentials, client_token
from control.interruptions import closing
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import (
    came_back,
    deadlines,
    invariants,
    missed,
    never_ready,
    orphans,
    ready,
    scores,
)
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers.ending import Ending, allowed
from control.interruptions.runtime import Runtime
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.tenants import create_tenant
from warehouse.contracts import EventSource
from warehouse.postgres.models import new_id


@pytest.fixture
async def launcher(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Launcher]:
    """The loops of a worker, turned by hand."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    aws = AwsGateway(endpoint_url=stage.aws.url)
    yield Launcher(Runtime(stage.db, stage.db, aws, stage.bells, "by-hand", DEPLOYMENT))
    await aws.close()


async def _warn(stage: Stage, instance_id: str) -> Any:
    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(instance_id)), EventSource.SQS)])
    return await stage.tenant.row("SELECT * FROM interruptions WHERE instance_id = :i", i=instance_id)


async def _launch(stage: Stage, launcher: Launcher) -> None:
    await launcher.plan_round()
    await launcher.finish_calls(10)


def _age(stage: Stage, seconds: float = 3600.0) -> None:
    for instance in stage.aws._instances.by_id.values():
        instance.launched_at -= seconds


async def _our_instance(stage: Stage, *, batch_id: UUID, tenant: UUID | None = None) -> str:
    """An instance with our tags, and the token of its batch where there is one, that no attempt names."""
    keys = stage.aws.credentials(stage.tenant.account_id)
    gateway = AwsGateway(endpoint_url=stage.aws.url)
    tags = {
        "cloudoptim:managed": DEPLOYMENT,
        "cloudoptim:tenant": str(tenant or stage.tenant.customer_id),
        "cloudoptim:cluster": str(stage.tenant.cluster_id),
        "cloudoptim:batch": str(batch_id),
    }
    answer = await gateway.call(
        "ec2",
        "RunInstances",
        {
            "ImageId": "ami-0c0ffee00000x8664",
            "InstanceType": "m5.large",
            "MinCount": 1,
            "MaxCount": 1,
            "ClientToken": client_token(),
            "TagSpecifications": [
                {"ResourceType": "instance", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}
            ],
        },
        region="us-east-1",
        credentials=Credentials(keys.access_key_id, keys.secret_access_key),
    )
    await gateway.close()
    instance_id = answer["Instances"][0]["InstanceId"]
    for batch in await stage.tenant.rows("SELECT client_token FROM launch_batches WHERE id = :id", id=batch_id):
        stage.aws._instances.by_id[instance_id].client_token = batch.client_token
    return instance_id


def _state(stage: Stage, instance_id: str) -> str:
    (found,) = [i for i in stage.aws.instances() if i.instance_id == instance_id]
    return found.state(stage.aws._instances.clock())


async def test_a_warning_the_queue_never_brought_is_found_by_the_poll(stage: Stage, launcher: Launcher) -> None:
    instance, other = await stage.launch_nodes(2)
    stage.aws.interrupt(instance)
    assert await missed.run_once(launcher) == 1
    interruption = await stage.tenant.row("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert (interruption.instance_id, interruption.detected_by) == (instance, ["poll"])
    assert interruption.kind == "spot_interruption"
    health = await stage.tenant.row("SELECT * FROM intake_health WHERE detector = 'poll'")
    assert health.state == "ok"
    # The same answer teaches how nodes are launched, and the round is nobody's for a minute.
    templates = await stage.tenant.row("SELECT instance_ids FROM launch_templates")
    assert other in templates.instance_ids
    assert await missed.run_once(launcher) == 0


async def test_warnings_of_other_machines_of_the_account_are_left_alone(stage: Stage, launcher: Launcher) -> None:
    _, machine = await stage.launch_nodes(2)
    await stage.tenant.rows("DELETE FROM nodes WHERE instance_id = :i RETURNING 1", i=machine)
    stage.aws.interrupt(machine)
    assert await missed.run_once(launcher) == 0
    for table in ("interruptions", "inbox_messages", "spot_events"):
        assert await stage.tenant.rows(f"SELECT 1 FROM {table}") == []


async def test_an_instance_that_ended_without_a_word_is_found_by_the_poll(stage: Stage, launcher: Launcher) -> None:
    instance, _ = await stage.launch_nodes(2)
    stage.agent_works = False
    stage.aws.terminate(instance, reason="Server.SpotInstanceTermination")
    assert await missed.run_once(launcher) == 1
    await _launch(stage, launcher)
    intent = await stage.tenant.row("SELECT * FROM launch_intents")
    assert intent.state in ("launched", "ready")


async def test_an_instance_its_owner_ended_is_not_replaced(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.terminate(instance, reason="Client.UserInitiatedShutdown")
    await missed.run_once(launcher)
    await _launch(stage, launcher)
    intent = await stage.tenant.row("SELECT * FROM launch_intents")
    assert (intent.state, stage.ours()) == ("cancelled", [])


async def test_a_lost_answer_is_asked_for_again_with_the_same_token(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_after", action="RunInstances"))
    await _warn(stage, instance)
    await _launch(stage, launcher)
    batch = await stage.tenant.row("SELECT * FROM launch_batches")
    assert (batch.state, batch.calls, len(stage.ours())) == ("unknown", 1, 1)
    await stage.tenant.rows("UPDATE launch_batches SET next_action_at = now() RETURNING 1")
    assert await launch_reconciler.run_once(launcher) == 1
    attempt = await stage.tenant.row("SELECT * FROM launch_attempts")
    assert (attempt.state, [attempt.instance_id]) == ("launched", [i.instance_id for i in stage.ours()])


async def test_after_ten_minutes_an_instance_is_adopted_by_its_tag(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_after", action="RunInstances", count=None))
    await _warn(stage, instance)
    await _launch(stage, launcher)
    await stage.tenant.rows(
        "UPDATE launch_batches SET next_action_at = now(), first_called_at = now() - interval '11 minutes' RETURNING 1"
    )
    await launch_reconciler.run_once(launcher)
    attempt = await stage.tenant.row("SELECT * FROM launch_attempts")
    assert (attempt.state, [attempt.instance_id]) == ("adopted", [i.instance_id for i in stage.ours()])


async def test_no_answer_and_no_instance_for_ten_minutes_is_given_up_and_never_doubled(
    stage: Stage, launcher: Launcher
) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_before", action="RunInstances", count=None))
    await _warn(stage, instance)
    await _launch(stage, launcher)
    await stage.tenant.rows(
        "UPDATE launch_batches SET next_action_at = now(), first_called_at = now() - interval '11 minutes' RETURNING 1"
    )
    await launch_reconciler.run_once(launcher)
    attempt = await stage.tenant.row("SELECT a.state, l.state AS intent FROM launch_attempts a, launch_intents l")
    assert (attempt.state, attempt.intent) == ("abandoned", "exhausted")
    assert await launcher.plan_round() == 0


async def test_no_capacity_goes_down_the_ladder_and_is_remembered(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("ice", action="RunInstances", count=2))
    await _warn(stage, instance)
    for _ in range(3):
        await _launch(stage, launcher)
    attempts = await stage.tenant.rows("SELECT * FROM launch_attempts ORDER BY attempt_no")
    assert [attempt.state for attempt in attempts] == ["failed", "failed", attempts[2].state]
    pools = [(a.instance_type, a.availability_zone, a.node_type) for a in attempts]
    assert len(set(pools)) == 3
    assert ("m5.large", stage.zone_of(instance), "spot") not in pools
    assert attempts[2].instance_id is not None
    refused = await stage.tenant.rows("SELECT * FROM pool_standings WHERE refusals > 0 AND instance_type <> '*'")
    assert len(refused) == 2


async def test_six_refusals_are_the_end_and_an_alarm(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("ice", action="RunInstances", count=None))
    await _warn(stage, instance)
    for _ in range(8):
        await _launch(stage, launcher)
    intent = await stage.tenant.row("SELECT * FROM launch_intents")
    attempts = await stage.tenant.rows("SELECT * FROM launch_attempts")
    assert intent.state == "exhausted"
    assert 1 <= len(attempts) <= 6
    assert any(attempt.node_type == "on-demand" for attempt in attempts)


async def test_a_replacement_that_is_never_ready_is_ended_and_tried_again(stage: Stage, launcher: Launcher) -> None:
    stage.join_seconds = 3600
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await _launch(stage, launcher)
    await stage.tenant.rows("UPDATE launch_attempts SET launched_at = now() - interval '11 minutes' RETURNING 1")
    assert await never_ready.run_once(launcher.runtime) == 1
    first = await stage.tenant.row("SELECT * FROM launch_attempts")
    assert first.state == "terminating"
    assert await launcher.plan_round() == 0, "two of one intent would be alive"
    assert await Ending(launcher).run_once() == 1
    assert _state(stage, first.instance_id) in ("shutting-down", "terminated")
    await _launch(stage, launcher)
    attempts = await stage.tenant.rows("SELECT state FROM launch_attempts ORDER BY attempt_no")
    assert [attempt.state for attempt in attempts] == ["terminated", "launched"]


@pytest.mark.parametrize("cluster", ["active", "deleted"])
async def test_an_instance_of_a_dead_attempt_is_ended_and_a_stranger_is_not(
    stage: Stage, launcher: Launcher, cluster: str
) -> None:
    stage.nodes_join = False
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await _launch(stage, launcher)
    # An orphan that becomes a Ready node is adopted and not ended.
    stage.nodes_join = False
    batch = await stage.tenant.row("SELECT id FROM launch_batches")
    orphan = await _our_instance(stage, batch_id=batch.id)
    foreign = await _our_instance(stage, batch_id=batch.id, tenant=new_id())
    young = await orphans.run_once(launcher)
    assert young == 0, "an instance younger than a minute may have its row under way"
    await stage.tenant.rows(f"UPDATE clusters SET status = '{cluster}' RETURNING 1")
    _age(stage)
    await stage.tenant.rows("UPDATE round_claims SET claimed_until = now() RETURNING 1")
    assert await orphans.run_once(launcher) == 1
    assert _state(stage, orphan) in ("shutting-down", "terminated")
    for kept in (instance, foreign, *(i.instance_id for i in stage.ours(alive=True))):
        assert _state(stage, kept) == "running"


async def test_orphans_are_ended_a_few_at_a_time(stage: Stage, launcher: Launcher) -> None:
    assert [allowed(nodes) for nodes in (0, 1, 19, 20, 40, 100)] == [1, 1, 1, 1, 2, 5]
    stage.nodes_join = False
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await _launch(stage, launcher)
    stage.nodes_join = False
    batch = await stage.tenant.row("SELECT id FROM launch_batches")
    for _ in range(3):
        await _our_instance(stage, batch_id=batch.id)
    _age(stage)
    assert await orphans.run_once(launcher) == 1


async def test_a_restored_database_adopts_and_ends_nothing(stage: Stage, launcher: Launcher) -> None:
    lost = await _our_instance(stage, batch_id=new_id())
    _age(stage)
    assert await orphans.run_once(launcher) == 0
    adopted = await stage.tenant.row("SELECT * FROM adopted_instances")
    assert (adopted.instance_id, adopted.cluster_id) == (lost, stage.tenant.cluster_id)
    customer = await stage.tenant.row("SELECT * FROM customers WHERE id = :customer_id")
    assert customer.adopt_only_since is not None
    assert "the database is older" in customer.adopt_only_reason

    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await _launch(stage, launcher)
    await stage.tenant.rows("UPDATE launch_attempts SET state = 'terminating' RETURNING 1")
    assert await Ending(launcher).run_once() == 0
    assert {_state(stage, i.instance_id) for i in stage.ours()} == {"running"}


async def test_the_mark_of_another_customer_is_never_terminated(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await _launch(stage, launcher)
    attempt = await stage.tenant.row("SELECT * FROM launch_attempts")
    stage.aws._instances.by_id[attempt.instance_id].tags["cloudoptim:tenant"] = str(new_id())
    await stage.tenant.rows("UPDATE launch_attempts SET state = 'terminating' RETURNING 1")
    assert await Ending(launcher).run_once() == 0
    assert _state(stage, attempt.instance_id) == "running"


async def test_a_denied_account_blocks_and_goes_on_when_mended(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    stage.aws.inject(Fault("error", action="RunInstances", code="UnauthorizedOperation", status=403))
    await _launch(stage, launcher)
    intent = await stage.tenant.row("SELECT * FROM launch_intents")
    assert (intent.state, "UnauthorizedOperation" in intent.reason) == ("blocked", True)
    await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")
    await _launch(stage, launcher)
    assert (await stage.tenant.row("SELECT state FROM launch_intents")).state == "launched"


async def test_a_late_node_is_matched_and_nobodys_instance_ends_in_quarantine(stage: Stage, launcher: Launcher) -> None:
    interruption = await _warn(stage, "i-0123456789abcdef0")
    assert interruption.state == "unmatched"
    assert await closing.settle_unmatched(launcher.runtime) == 0
    await stage.tenant.node("i-0123456789abcdef0")
    assert await closing.settle_unmatched(launcher.runtime) == 1
    matched = await stage.tenant.row("SELECT * FROM interruptions")
    assert (matched.state, matched.cluster_id) == ("open", stage.tenant.cluster_id)
    task = await stage.tenant.row("SELECT * FROM agent_tasks")
    assert task.parameters["instance_id"] == "i-0123456789abcdef0"

    nobody = await _warn(stage, "i-0fedcba9876543210")
    waited = "UPDATE interruptions SET received_at = now() - interval '{} minutes' RETURNING 1"
    await stage.tenant.rows(waited.format(9))
    assert await closing.settle_unmatched(launcher.runtime) == 0
    await stage.tenant.rows(waited.format(11))
    await closing.settle_unmatched(launcher.runtime)
    closed = await stage.tenant.row("SELECT * FROM interruptions WHERE id = :id", id=nobody.id)
    assert (closed.state, closed.outcome) == ("closed", "unmatched")
    kept = await stage.tenant.row("SELECT * FROM inbox_messages WHERE outcome = 'quarantined'")
    assert kept.reason.startswith("unowned")
    assert json.loads(kept.body)["detail"]["instance-id"] == "i-0fedcba9876543210"


async def test_the_sweep_finds_what_should_not_be(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    interruption = await _warn(stage, instance)
    assert await invariants.run_once(launcher.runtime) == 0
    await stage.tenant.rows("UPDATE interruptions SET version = 7 WHERE id = :id RETURNING 1", id=interruption.id)
    await stage.tenant.rows("UPDATE round_claims SET claimed_until = now() RETURNING 1")
    assert await invariants.run_once(launcher.runtime) == 1


async def test_a_ready_node_is_seen(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await _launch(stage, launcher)

    async def seen() -> int:
        return await ready.run_once(launcher.runtime)

    assert await stage.until(seen, 10) == 1
    assert (await stage.tenant.row("SELECT state FROM launch_intents")).state == "ready"


async def test_all_workers_share_one_round_of_terminations(stage: Stage, launcher: Launcher) -> None:
    stage.join_seconds = 3600
    instances = await stage.launch_nodes(6)
    for instance in instances:
        await _warn(stage, instance)
    await _launch(stage, launcher)
    await stage.tenant.rows("UPDATE launch_attempts SET launched_at = now() - interval '11 minutes' RETURNING 1")
    assert await never_ready.run_once(launcher.runtime) == 6
    workers = [Ending(launcher), Ending(launcher), Ending(launcher)]
    assert sorted([await worker.run_once() for worker in workers]) == [0, 0, 1], "5 % of six nodes is one"
    await stage.tenant.rows("UPDATE round_claims SET claimed_until = now() RETURNING 1")
    assert await workers[0].run_once() == 1
    assert len(stage.ours(alive=True)) == 4


async def test_what_cannot_be_ended_does_not_hold_up_the_rest(stage: Stage, launcher: Launcher) -> None:
    stage.join_seconds = 3600
    for instance in await stage.launch_nodes(3):
        await _warn(stage, instance)
    await _launch(stage, launcher)
    await stage.tenant.rows(
        "UPDATE launch_attempts SET state = 'terminating', launched_at = now() - interval '11 minutes' RETURNING 1"
    )
    stranger, forgotten, ours = sorted(
        await stage.tenant.rows("SELECT instance_id, id FROM launch_attempts"), key=lambda row: row.id
    )
    stage.aws._instances.by_id[stranger.instance_id].tags["cloudoptim:tenant"] = str(new_id())
    del stage.aws._instances.by_id[forgotten.instance_id]
    assert await Ending(launcher).run_once() == 2
    states = {row.id: row.state for row in await stage.tenant.rows("SELECT id, state FROM launch_attempts")}
    assert states == {stranger.id: "terminating", forgotten.id: "terminated", ours.id: "terminated"}
    assert _state(stage, stranger.instance_id) == "running"


async def test_a_node_that_ec2_and_its_agent_forgot_is_found_by_the_poll(stage: Stage, launcher: Launcher) -> None:
    await stage.launch_nodes()
    lost, young = await stage.tenant.node(), await stage.tenant.node()
    await stage.tenant.rows(
        "UPDATE nodes SET created_at = now() - interval '1 day', last_seen_at = now() - interval '12 minutes' "
        "WHERE instance_id = :i RETURNING 1",
        i=lost,
    )
    assert await missed.run_once(launcher) == 1
    found = await stage.tenant.row("SELECT * FROM interruptions")
    assert (found.instance_id, found.detected_by, found.instance_gone_at is not None) == (lost, ["poll"], True)
    node = await stage.tenant.row("SELECT * FROM nodes WHERE instance_id = :i", i=young)
    assert node.terminated_at is None


def test_in_the_wrong_account_nothing_has_vanished() -> None:
    seen = datetime(2026, 1, 1, tzinfo=UTC)
    assert missed.vanished({}, {"i-0123456789abcdef0": seen}) == []
    assert missed.vanished({"i-other": {}}, {"i-0123456789abcdef0": seen}) == [("i-0123456789abcdef0", seen)]


async def test_an_account_that_does_not_answer_does_not_delay_the_polls_of_others(
    stage: Stage, launcher: Launcher
) -> None:
    others = []
    for _ in range(8):
        other = await create_tenant(stage.db)
        row = await other.row("SELECT external_id FROM customers WHERE id = :customer_id")
        account = stage.aws.add_account(other.account_id, external_id=str(row.external_id))
        await other.rows(
            "UPDATE customers SET aws_role_arn = :r WHERE id = :customer_id RETURNING 1", r=account.role_arn
        )
        others.append(other)
    silent = others[0].account_id
    stage.aws.inject(Fault("hang", action="DescribeSpotInstanceRequests", account_id=silent, seconds=3.0, count=None))
    began = time.monotonic()
    rounds = asyncio.create_task(missed.run_once(launcher))

    async def eight_polled() -> bool:
        polled = await stage.tenant.rows("SELECT 1 FROM intake_health WHERE detector = 'poll' AND state = 'ok'")
        return len(polled) == 8

    await stage.until(eight_polled, 10)
    assert time.monotonic() - began < 2.5
    await rounds


def _sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_rebalance_scores_are_metrics_of_the_busiest_pools(stage: Stage, launcher: Launcher) -> None:
    right, wrong = await stage.launch_nodes(2)
    facts = await stage.tenant.facts()
    for instance in (right, wrong):
        told = stage.tenant.rebalance(instance)
        await ingest(stage.db, facts, [Received(json.dumps(told), EventSource.SQS)])
    await _warn(stage, right)
    await stage.tenant.rows(
        "UPDATE spot_events SET received_at = received_at - interval '1 hour', "
        "occurred_at = occurred_at - interval '1 minute' RETURNING 1"
    )
    await scores.run_once(launcher.runtime)
    followed = {zone: [] for zone in {stage.zone_of(right), stage.zone_of(wrong)}}
    for zone in followed:
        for label in ("yes", "no"):
            name = "cloudoptim_rebalance_recommendations"
            followed[zone].append(_sample(name, instance_type="m5.large", availability_zone=zone, followed=label))
    assert sum(count or 0 for counts in followed.values() for count in counts) == 2
    assert sum(counts[0] or 0 for counts in followed.values()) == 1


async def test_every_step_is_measured_from_the_notice_and_against_the_deadline(
    stage: Stage, launcher: Launcher
) -> None:
    steps = (
        "task_created",
        "task_in_agents_hands",
        "cordoned",
        "replacement_launched",
        "replacement_ready",
        "drained",
        "closed",
    )
    names = ("cloudoptim_interruption_step_seconds_count", "cloudoptim_interruption_step_left_seconds_count")
    before = {(name, step): _sample(name, step=step) or 0.0 for name in names for step in steps}
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)

    async def closed() -> bool:
        await launcher.plan_round()
        await launcher.finish_calls(10)
        await ready.run_once(launcher.runtime)
        return bool(await closing.close_ended(launcher.runtime))

    await stage.until(closed, 15)
    for key, count in before.items():
        assert (_sample(key[0], step=key[1]) or 0.0) == count + 1, key


async def test_a_stopped_node_that_comes_back_takes_pods_again(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await stage.launch_nodes()
    facts = await stage.tenant.facts()
    told = stage.tenant.warning(instance, "stop")
    await ingest(stage.db, facts, [Received(json.dumps(told), EventSource.SQS)])
    await stage.tenant.rows("UPDATE nodes SET status = 'cordoned' RETURNING 1")

    async def closed() -> bool:
        await launcher.plan_round()
        await launcher.finish_calls(10)
        await ready.run_once(launcher.runtime)
        return bool(await closing.close_ended(launcher.runtime))

    await stage.until(closed, 15)
    assert await came_back.run_once(launcher.runtime) == 0, "not gone yet: it is cordoned because it is being taken"
    stopped = stage.tenant.state_change(instance, "stopped")
    await ingest(stage.db, facts, [Received(json.dumps(stopped), EventSource.SQS)])
    await stage.tenant.rows("UPDATE interruptions SET instance_gone_at = now() - interval '10 minutes' RETURNING 1")
    assert await came_back.run_once(launcher.runtime) == 1
    task = await stage.tenant.row("SELECT * FROM agent_tasks WHERE task_type = 'uncordon_node'")
    assert task.parameters["instance_id"] == instance
    assert await came_back.run_once(launcher.runtime) == 0


async def test_a_window_that_closed_says_what_kept_the_launch(stage: Stage, launcher: Launcher) -> None:
    await stage.tenant.config("max_launches_per_hour", 0)
    (instance,) = await stage.launch_nodes()
    await _warn(stage, instance)
    await stage.until(launcher.plan_round, 10)
    await launcher.finish_calls(10)
    await stage.tenant.rows("UPDATE launch_intents SET deadline_at = now() - interval '1 s' RETURNING 1")
    await deadlines.run_once(launcher.runtime)
    intent = await stage.tenant.row("SELECT * FROM launch_intents")
    assert intent.state == "exhausted"
    assert "max_launches_per_hour is 0" in intent.reason


async def _told(stage: Stage, document: dict[str, Any]) -> None:
    await ingest(stage.db, await stage.tenant.facts(), [Received(json.dumps(document), EventSource.SQS)])


async def _replaced(stage: Stage, launcher: Launcher) -> None:
    async def ended() -> bool:
        await launcher.plan_round()
        await launcher.finish_calls(10)
        await ready.run_once(launcher.runtime)
        rows = await stage.tenant.rows("SELECT 1 FROM launch_intents WHERE state IN ('ready', 'exhausted')")
        return bool(rows)

    await stage.until(ended, 15)


async def _outcome(stage: Stage, launcher: Launcher) -> Any:
    await stage.until(lambda: closing.close_ended(launcher.runtime), 10)
    return await stage.tenant.row("SELECT * FROM interruptions")


async def test_replacement_first_then_the_drain(stage: Stage, launcher: Launcher) -> None:
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    await _told(stage, stage.tenant.rebalance(instance))
    assert await closing.begin_waiting_drains(launcher.runtime) == 0
    assert await stage.tenant.rows("SELECT 1 FROM agent_tasks") == []
    await _replaced(stage, launcher)
    assert await closing.begin_waiting_drains(launcher.runtime) == 1
    task = await stage.tenant.row("SELECT * FROM agent_tasks")
    assert task.parameters["instance_id"] == instance
    assert (await _outcome(stage, launcher)).outcome == "handled"


async def test_a_warning_does_not_wait_for_the_replacement(stage: Stage, launcher: Launcher) -> None:
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    await _told(stage, stage.tenant.rebalance(instance))
    await _told(stage, stage.tenant.warning(instance))
    task = await stage.tenant.row("SELECT * FROM agent_tasks")
    assert task.parameters["instance_id"] == instance
    assert len(await stage.tenant.rows("SELECT 1 FROM launch_intents")) == 1
    assert await closing.begin_waiting_drains(launcher.runtime) == 0


async def test_without_a_replacement_a_rumour_costs_no_node_and_a_maintenance_does(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    await _told(stage, stage.tenant.rebalance(instance))
    await stage.tenant.rows("UPDATE launch_intents SET state = 'exhausted' RETURNING 1")
    await closing.begin_waiting_drains(launcher.runtime)
    assert await stage.tenant.rows("SELECT 1 FROM agent_tasks") == []
    closed = await _outcome(stage, launcher)
    assert (closed.outcome, closed.reason) == ("cancelled", "the node is kept; no replacement could be launched")
    history = await stage.tenant.rows("SELECT version, event FROM interruption_history ORDER BY version")
    assert [(row.version, row.event) for row in history] == [(1, "detected"), (2, "node_kept"), (3, "closed")]

    (other,) = await stage.launch_nodes()
    retirement = stage.tenant.event(
        "AWS Health Event",
        {
            "service": "EC2",
            "eventTypeCategory": "scheduledChange",
            "eventTypeCode": "AWS_EC2_PERSISTENT_INSTANCE_RETIREMENT_SCHEDULED",
            "affectedEntities": [{"entityValue": other}],
        },
        source="aws.health",
    )
    await _told(stage, retirement)
    await stage.tenant.rows("UPDATE launch_intents SET state = 'exhausted' RETURNING 1")
    assert await closing.begin_waiting_drains(launcher.runtime) == 1
    assert (await stage.tenant.row("SELECT * FROM agent_tasks")).parameters["instance_id"] == other


@pytest.mark.parametrize(("policy", "points"), [("ignore", []), ("score", [(1, 1)])])
async def test_events_that_are_ignored_or_scored_move_nothing(
    stage: Stage, launcher: Launcher, policy: str, points: list[tuple[int, int]]
) -> None:
    await stage.tenant.config("event_policies", {"rebalance_recommendation": policy, "spot_interruption": policy})
    (instance,) = await stage.launch_nodes()
    for document in (stage.tenant.rebalance(instance), stage.tenant.warning(instance)):
        await _told(stage, document)
    for table in ("interruptions", "agent_tasks", "launch_intents"):
        assert await stage.tenant.rows(f"SELECT 1 FROM {table}") == []
    assert len(await stage.tenant.rows("SELECT 1 FROM spot_events")) == 2
    rows = await stage.tenant.rows("SELECT rebalances, interruptions FROM pool_standings")
    assert [tuple(row) for row in rows] == points


async def test_two_node_groups_of_one_image_are_launched_with_their_own_user_data(
    stage: Stage, launcher: Launcher
) -> None:
    first, second, third = await stage.launch_nodes(3)
    groups = {first: "blue", second: "green", third: "green"}
    for instance, group in groups.items():
        stage.aws._instances.by_id[instance].tags["eks:nodegroup-name"] = group
        stage.aws.inject(
            Fault(
                "rewrite",
                action="DescribeInstanceAttribute",
                match={"InstanceId": instance},
                pattern=r"<userData\s*/>|<userData></userData>",
                replacement=f"<userData><value>{group}</value></userData>",
                count=None,
            )
        )
    assert await missed.run_once(launcher) == 0
    kept = await stage.tenant.rows("SELECT template ->> 'user_data' AS user_data, instance_ids FROM launch_templates")
    learned = {instance: row.user_data for row in kept for instance in row.instance_ids}
    assert learned == groups
    assert len(stage.calls("DescribeInstanceAttribute")) == 2, "once a group"
