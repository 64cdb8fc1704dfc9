"""Auto Scaling lifecycle hooks: kept waiting while a node drains or starts, answered when it is done, else left."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from control.gateways.aws import AwsGateway, Role
from control.interruptions import closing
from control.interruptions.reconcilers import leaving, lifecycle
from control.interruptions.reconcilers.lifecycle import Step, judge
from control.interruptions.reconcilers.lifecycle_repository import Hook
from control.interruptions.runtime import Runtime
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.tenants import create_tenant
from warehouse.contracts import EventSource
from warehouse.postgres.models import new_id

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.fixture
async def runtime(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runtime]:
    """A worker's hands; its lifecycle loop is turned by the test."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    aws = AwsGateway(endpoint_url=stage.aws.url)
    yield Runtime(stage.db, stage.db, aws, stage.bells, "by-hand", DEPLOYMENT)
    await aws.close()


async def _take_in(stage: Stage, runtime: Runtime) -> None:
    """What the queue holds, taken in as a worker would."""
    customer = await stage.tenant.row("SELECT * FROM customers WHERE id = :customer_id")
    credentials = await runtime.aws.assume(Role(customer.id, customer.aws_role_arn, str(customer.external_id)))
    queue = runtime.aws.queue(customer.sqs_queue_url)
    messages = await runtime.aws.receive(queue, credentials=credentials, wait_seconds=1)
    received = [Received(message.body, EventSource.SQS) for message in messages]
    await ingest(stage.db, await stage.tenant.facts(), received, queue_region=queue.region)


async def _hook(stage: Stage) -> Any:
    return await stage.tenant.row("SELECT * FROM lifecycle_actions")


async def _due(stage: Stage) -> None:
    await stage.tenant.rows("UPDATE lifecycle_actions SET next_action_at = now() RETURNING 1")


@pytest.mark.parametrize("direct", [False, True])
async def test_a_group_waits_until_the_node_is_drained(stage: Stage, runtime: Runtime, direct: bool) -> None:
    stage.agent_works = False
    (instance,) = await stage.launch_nodes()
    action = stage.aws.begin_lifecycle_action(instance, direct=direct)
    await _take_in(stage, runtime)
    assert await lifecycle.run_once(runtime) == 1
    assert (action.heartbeats, action.result) == (1, None)
    # The next look is no heartbeat yet, and one twenty seconds later is.
    await _due(stage)
    assert await lifecycle.run_once(runtime) == 0
    await stage.tenant.rows("UPDATE lifecycle_actions SET heartbeat_at = now() - interval '21 s' RETURNING 1")
    await _due(stage)
    await lifecycle.run_once(runtime)
    assert (action.heartbeats, action.result) == (2, None)

    stage.agent_works = True

    async def drained() -> bool:
        task = await stage.tenant.row("SELECT state FROM agent_tasks")
        return task.state == "done"

    await stage.until(drained, 10)
    await _due(stage)
    assert await lifecycle.run_once(runtime) == 1
    assert action.result == "CONTINUE"
    hook = await _hook(stage)
    assert (hook.state, hook.reason, hook.heartbeats) == ("completed", "the drain is done", 2)
    # The group launches its own replacement.
    assert await stage.tenant.rows("SELECT 1 FROM launch_intents") == []
    await closing.close_ended(runtime)
    assert [row.outcome for row in await stage.interruptions()] == ["handled"]


async def test_a_starting_instance_is_let_in_when_its_node_is_ready(stage: Stage, runtime: Runtime) -> None:
    (instance,) = await stage.launch_nodes()
    await stage.tenant.rows("DELETE FROM nodes RETURNING 1")
    action = stage.aws.begin_lifecycle_action(instance, "launching")
    await _take_in(stage, runtime)
    assert await lifecycle.run_once(runtime) == 0
    assert (action.heartbeats, action.result) == (0, None), (
        "not a node of ours yet: no reason to keep the group waiting"
    )
    await stage.tenant.node(instance, status="not_ready")
    await _due(stage)
    await lifecycle.run_once(runtime)
    assert (action.heartbeats, action.result) == (1, None)
    await stage.tenant.rows("UPDATE nodes SET status = 'ready' RETURNING 1")
    await _due(stage)
    await lifecycle.run_once(runtime)
    assert action.result == "CONTINUE"
    assert await stage.interruptions() == []


async def test_hooks_of_kinds_that_are_only_scored_are_left_alone(stage: Stage, runtime: Runtime) -> None:
    await stage.tenant.config("event_policies", {"asg_terminate_lifecycle": "score", "asg_launch_lifecycle": "ignore"})
    (instance,) = await stage.launch_nodes()
    for transition in ("terminating", "launching"):
        stage.aws.begin_lifecycle_action(instance, transition)
    await _take_in(stage, runtime)
    assert await stage.tenant.rows("SELECT 1 FROM lifecycle_actions") == []


async def test_replacement_first_drains_at_once_where_the_group_replaces(stage: Stage, runtime: Runtime) -> None:
    await stage.tenant.config("event_policies", {"asg_terminate_lifecycle": "pre_spin"})
    (instance,) = await stage.launch_nodes()
    stage.aws.begin_lifecycle_action(instance)
    await _take_in(stage, runtime)
    task = await stage.tenant.row("SELECT parameters FROM agent_tasks")
    assert task.parameters["instance_id"] == instance


async def test_a_group_that_went_on_by_itself_is_no_trouble(stage: Stage, runtime: Runtime) -> None:
    (instance,) = await stage.launch_nodes()
    stage.aws.begin_lifecycle_action(instance, timeout_seconds=-1.0)
    await _take_in(stage, runtime)
    assert await lifecycle.run_once(runtime) == 0
    hook = await _hook(stage)
    assert hook.state == "left"
    assert "No active Lifecycle Action" in hook.reason


async def test_a_completion_whose_answer_is_lost_is_given_once(stage: Stage, runtime: Runtime) -> None:
    """Also of a worker that is killed between the group's answer and its own commit: the group refuses a second one."""
    (instance,) = await stage.launch_nodes()
    action = stage.aws.begin_lifecycle_action(instance)
    await _take_in(stage, runtime)
    await stage.tenant.rows("UPDATE agent_tasks SET state = 'done', finished_at = now() RETURNING 1")
    stage.aws.inject(Fault("drop_after", action="CompleteLifecycleAction"))
    assert await lifecycle.run_once(runtime) == 0
    assert (action.result, (await _hook(stage)).state) == ("CONTINUE", "open")
    for _ in range(3):
        await _due(stage)
        await lifecycle.run_once(runtime)
    assert (await _hook(stage)).state == "left"
    assert len(stage.calls("CompleteLifecycleAction")) == 2, "the lost one, and one that was refused"


async def test_a_missing_right_is_told_with_its_remedy_and_heals(stage: Stage, runtime: Runtime) -> None:
    stage.agent_works = False
    (instance,) = await stage.launch_nodes()
    action = stage.aws.begin_lifecycle_action(instance)
    await _take_in(stage, runtime)
    stage.aws.inject(Fault("error", service="autoscaling", code="AccessDenied", message="no", status=403))
    await lifecycle.run_once(runtime)
    health = await stage.tenant.row("SELECT * FROM intake_health WHERE detector = 'lifecycle'")
    assert (health.state, "autoscaling:CompleteLifecycleAction" in health.remedy) == ("degraded", True)
    await _due(stage)
    await lifecycle.run_once(runtime)
    assert action.heartbeats == 1
    health = await stage.tenant.row("SELECT * FROM intake_health WHERE detector = 'lifecycle'")
    assert (health.state, health.reason) == ("ok", None)


def _judged(**values: Any) -> Step:
    hook = Hook(
        **{
            "customer_id": new_id(),
            "token": "t",
            "region": "us-east-1",
            "group_name": "g",
            "hook_name": "h",
            "instance_id": "i-0123456789abcdef0",
            "transition": "terminating",
            "received_at": NOW,
            "heartbeat_at": None,
            "interruption_state": "open",
            "outcome": None,
            "instance_gone": False,
            "drain": "leased",
            "node_status": "ready",
            "role_arn": None,
            "external_id": "",
        }
        | values
    )
    return judge(hook, NOW + timedelta(seconds=5))[0]


async def test_hooks_of_a_suspended_customer_wait_and_hold_up_nobody(
    stage: Stage, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "LIMIT", 1)
    stage.agent_works = False
    (instance,) = await stage.launch_nodes()
    action = stage.aws.begin_lifecycle_action(instance)
    await _take_in(stage, runtime)
    suspended = await create_tenant(stage.db)
    await stage.tenant.rows(
        "INSERT INTO lifecycle_actions (customer_id, token, region, group_name, hook_name, instance_id, transition, "
        "next_action_at) VALUES (:other, 'token', 'us-east-1', 'group', 'hook', 'i-0', 'terminating', "
        "now() - interval '1 hour') RETURNING 1",
        other=suspended.customer_id,
    )
    await suspended.rows("UPDATE customers SET status = 'suspended' WHERE id = :customer_id RETURNING 1")
    await _due(stage)
    await suspended.rows(
        "UPDATE lifecycle_actions SET next_action_at = now() - interval '1 hour' WHERE customer_id = :customer_id "
        "RETURNING 1"
    )
    assert await lifecycle.run_once(runtime) == 1
    assert action.heartbeats == 1
    await suspended.rows("UPDATE customers SET status = 'offboarding' WHERE id = :customer_id RETURNING 1")
    await leaving.run_once(runtime)
    left = await suspended.row("SELECT state FROM lifecycle_actions WHERE customer_id = :customer_id")
    assert left.state == "left"


def test_what_is_done_about_a_hook() -> None:
    assert _judged() is Step.HEARTBEAT
    assert _judged(heartbeat_at=NOW) is Step.WAIT
    for over in ("done", "failed", "expired", "refused", "superseded"):
        assert _judged(drain=over) is Step.COMPLETE
    assert _judged(interruption_state="unmatched", drain=None) is Step.WAIT
    assert _judged(interruption_state="closed", outcome="unmatched", drain=None) is Step.LEAVE
    assert _judged(interruption_state="closed", outcome="missed", drain=None) is Step.COMPLETE
    assert _judged(drain=None, instance_gone=True) is Step.COMPLETE
    launching = {"transition": "launching", "drain": None, "interruption_state": None}
    assert _judged(**launching) is Step.COMPLETE
    assert _judged(**launching, node_status="pending") is Step.HEARTBEAT
    assert _judged(**launching, node_status=None) is Step.WAIT
    assert _judged(**launching, node_status=None, received_at=NOW - timedelta(minutes=11)) is Step.LEAVE
    assert _judged(**launching, node_status="pending", received_at=NOW - timedelta(minutes=31)) is Step.LEAVE
