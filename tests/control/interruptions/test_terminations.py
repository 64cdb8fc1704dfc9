"""What may be terminated, and how much of it at once: the loops that end instances, against the AWS double's record."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers import never_ready, orphans
from control.interruptions.reconcilers.ending import Ending
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from tests.control.interruptions.replacements import launched, never_ready_replacements
from warehouse.contracts import EventSource
from warehouse.postgres.models import new_id

ALIVE = ("pending", "running")


def _an_hour_later(stage: Stage) -> None:
    for instance in stage.aws._instances.by_id.values():
        instance.launched_at -= 3600


def _tag(stage: Stage, instance_id: str, name: str, value: str) -> None:
    stage.aws._instances.by_id[instance_id].tags[f"cloudoptim:{name}"] = value


async def _set(stage: Stage, instance_id: str, state: str) -> None:
    await stage.tenant.rows(
        "UPDATE launch_attempts SET state = :state WHERE instance_id = :i RETURNING 1", state=state, i=instance_id
    )


async def test_what_another_deployment_launched_is_neither_ended_nor_adopted(stage: Stage, launcher: Launcher) -> None:
    unwanted, orphan, unheard_of = await launched(stage, launcher, 3)
    _an_hour_later(stage)
    await _set(stage, unwanted, "terminating")
    await _set(stage, orphan, "abandoned")
    await stage.tenant.rows("DELETE FROM launch_attempts WHERE instance_id = :i RETURNING 1", i=unheard_of)
    _tag(stage, unheard_of, "batch", str(new_id()))
    for instance in (unwanted, orphan, unheard_of):
        _tag(stage, instance, "managed", "another-deployment")
    assert await Ending(launcher).run_once() == 0
    await stage.pass_rounds()
    assert await orphans.run_once(launcher) == 0
    assert {stage.state_of(instance) for instance in (unwanted, orphan, unheard_of)} == {"running"}
    assert stage.calls("TerminateInstances") == []
    customer = await stage.tenant.row("SELECT adopt_only_since FROM customers WHERE id = :customer_id")
    assert customer.adopt_only_since is None, "the database is no older for what another deployment did"
    assert await stage.tenant.rows("SELECT 1 FROM refused_endings WHERE why = 'orphan'") == []


async def test_orphans_and_replacements_share_one_round_of_terminations(stage: Stage, launcher: Launcher) -> None:
    unwanted, orphan = await never_ready_replacements(stage, launcher, 2)
    _an_hour_later(stage)
    await _set(stage, orphan, "abandoned")
    assert await Ending(launcher).run_once() == 1
    assert await orphans.run_once(launcher) == 0
    assert [stage.state_of(instance) in ALIVE for instance in (unwanted, orphan)] == [False, True]
    await stage.pass_rounds()
    assert await orphans.run_once(launcher) == 1
    assert stage.state_of(orphan) not in ALIVE


async def test_while_a_customer_is_adopt_only_no_orphan_is_ended(stage: Stage, launcher: Launcher) -> None:
    (orphan,) = await launched(stage, launcher)
    _an_hour_later(stage)
    await _set(stage, orphan, "abandoned")
    adopt_only = "UPDATE customers SET adopt_only_since = {} WHERE id = :customer_id RETURNING 1"
    await stage.tenant.rows(adopt_only.format("now()"))
    assert await orphans.run_once(launcher) == 0
    assert stage.state_of(orphan) == "running"
    await stage.tenant.rows(adopt_only.format("NULL"))
    await stage.pass_rounds()
    assert await orphans.run_once(launcher) == 1


async def test_the_look_that_finds_a_restored_database_ends_nothing_else(stage: Stage, launcher: Launcher) -> None:
    orphan, unheard_of = await launched(stage, launcher, 2)
    _an_hour_later(stage)
    await _set(stage, orphan, "abandoned")
    await stage.tenant.rows("DELETE FROM launch_attempts WHERE instance_id = :i RETURNING 1", i=unheard_of)
    _tag(stage, unheard_of, "batch", str(new_id()))
    assert await orphans.run_once(launcher) == 0
    assert {stage.state_of(instance) for instance in (orphan, unheard_of)} == {"running"}
    customer = await stage.tenant.row("SELECT adopt_only_since FROM customers WHERE id = :customer_id")
    assert customer.adopt_only_since is not None


async def test_what_becomes_adopt_only_while_ec2_answers_is_not_ended(stage: Stage, launcher: Launcher) -> None:
    (unwanted,) = await never_ready_replacements(stage, launcher)
    # The reading of the tags, after the decision and right before the call.
    stage.aws.inject(Fault("delay", action="DescribeInstances", nth=2, seconds=1.0))
    ending = asyncio.create_task(Ending(launcher).run_once())
    await stage.until(lambda: stage.tenant.rows("SELECT 1 FROM round_claims WHERE name LIKE 'endings:%'"), 10)
    await stage.tenant.rows("UPDATE customers SET adopt_only_since = now() WHERE id = :customer_id RETURNING 1")
    assert await ending == 0
    assert stage.state_of(unwanted) == "running"


async def test_an_instance_that_describe_does_not_show_yet_has_not_ended(stage: Stage, launcher: Launcher) -> None:
    """C-10 at the other end: unwanted before EC2 shows it, it is ended when it is seen, and not forgotten before."""
    (unwanted,) = await launched(stage, launcher)
    stage.aws._instances.by_id[unwanted].visible_at = time.time() + 600
    await _set(stage, unwanted, "terminating")
    assert await Ending(launcher).run_once() == 0
    attempt = await stage.tenant.row("SELECT state FROM launch_attempts")
    assert (attempt.state, stage.state_of(unwanted)) == ("terminating", "running")
    stage.aws._instances.by_id[unwanted].visible_at = time.time()
    await stage.pass_rounds()
    assert await Ending(launcher).run_once() == 1
    assert stage.state_of(unwanted) not in ALIVE


async def test_a_replacement_has_ten_minutes_and_one_that_joined_is_not_ended(stage: Stage, launcher: Launcher) -> None:
    joined, unseen = await launched(stage, launcher, 2)
    await stage.tenant.node(joined)
    for minutes, unwanted in ((9, 0), (11, 1)):
        await stage.tenant.rows(
            f"UPDATE launch_attempts SET launched_at = now() - interval '{minutes} minutes' RETURNING 1"
        )
        assert await never_ready.run_once(launcher.runtime) == unwanted
    attempt = await stage.tenant.row("SELECT instance_id FROM launch_attempts WHERE state = 'terminating'")
    assert attempt.instance_id == unseen


@pytest.mark.parametrize("state", ["launched", "adopted", "ready"])
async def test_a_replacement_that_is_counted_on_is_no_orphan(stage: Stage, launcher: Launcher, state: str) -> None:
    (wanted,) = await launched(stage, launcher)
    _an_hour_later(stage)
    await _set(stage, wanted, state)
    assert await orphans.run_once(launcher) == 0
    assert stage.state_of(wanted) == "running"


async def test_an_instance_of_a_call_without_an_answer_is_no_orphan(stage: Stage, launcher: Launcher) -> None:
    """The launch loop asks for it again with its token, and learns of it."""
    await launched(stage, launcher, fault=Fault("drop_after", action="RunInstances"))
    (instance,) = stage.ours()
    _an_hour_later(stage)
    assert await orphans.run_once(launcher) == 0
    assert stage.state_of(instance.instance_id) == "running"
    await stage.pass_leases()
    await launch_reconciler.run_once(launcher)
    attempt = await stage.tenant.row("SELECT state, instance_id FROM launch_attempts")
    assert (attempt.state, attempt.instance_id) == ("launched", instance.instance_id)


async def test_a_replacement_that_somebody_ended_is_launched_anew_at_the_next_look(
    stage: Stage, launcher: Launcher
) -> None:
    (ended,) = await launched(stage, launcher)
    stage.aws.terminate(ended, reason="Client.UserInitiatedShutdown")
    assert await orphans.run_once(launcher) == 0
    assert (await stage.tenant.row("SELECT state FROM launch_intents")).state == "planned"
    assert ended not in await launched(stage, launcher, 0)
    attempts = await stage.tenant.rows("SELECT state, instance_id FROM launch_attempts ORDER BY attempt_no")
    assert (attempts[0].state, attempts[0].instance_id) == ("terminated", ended)
    assert [instance.instance_id for instance in stage.ours(alive=True)] == [attempts[-1].instance_id]
    assert stage.calls("TerminateInstances") == []


async def test_the_end_of_what_we_end_is_no_interruption(stage: Stage, launcher: Launcher) -> None:
    (unwanted,) = await never_ready_replacements(stage, launcher)
    assert await Ending(launcher).run_once() == 1
    told = [
        Received(json.dumps(stage.tenant.state_change(unwanted, state)), EventSource.SQS)
        for state in ("shutting-down", "terminated")
    ]
    await ingest(stage.db, await stage.tenant.facts(), told)
    assert unwanted not in {row.instance_id for row in await stage.interruptions()}
    actions = await stage.tenant.rows("SELECT action_taken FROM spot_events WHERE instance_id = :i", i=unwanted)
    assert [row.action_taken for row in actions] == ["our own termination"] * 2
