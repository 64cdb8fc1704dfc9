"""What is to end and cannot be ended, found or seen: told with instance ids, ended later, and in nobody's way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from control.cli import app
from control.commands.doctor import examine
from control.interruptions import closing
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import alarms, deadlines, leaving, never_ready, orphans
from control.interruptions.reconcilers import ending as ending_module
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers.ending import Ending
from control.sandbox.aws.faults import Fault
from control.settings import get_settings
from tests.control.api import Api, serving, settings_for
from tests.control.interruptions.harness import Stage
from tests.control.interruptions.replacements import launched, never_ready_replacements

OVER = ("shutting-down", "terminated")


@pytest.fixture
async def api(stage: Stage) -> AsyncIterator[Api]:
    """The API over the stage's database and AWS."""
    async with serving(settings_for(stage.database_url, stage.redis_url, AWS_ENDPOINT_URL=stage.aws.url)) as running:
        yield running


async def _health(stage: Stage, detector: str) -> Any:
    return await stage.tenant.row(
        "SELECT h.*, m.status FROM intake_health h JOIN customers m ON m.id = h.customer_id "
        "WHERE h.detector = :d AND m.id = :customer_id",
        d=detector,
    )


async def _attempt(stage: Stage, instance_id: str) -> Any:
    return await stage.tenant.row(
        "SELECT a.*, l.state AS intent FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id "
        "WHERE a.instance_id = :i",
        i=instance_id,
    )


def _protect(stage: Stage, instance_id: str) -> None:
    stage.aws.inject(
        Fault(
            "error",
            action="TerminateInstances",
            match={"InstanceId": instance_id},
            code="OperationNotPermitted",
            message="The instance may not be terminated. Modify its 'disableApiTermination' instance attribute",
            status=400,
            count=None,
        )
    )


async def test_a_protected_instance_is_told_and_holds_up_no_other(stage: Stage, launcher: Launcher) -> None:
    protected, *others = await never_ready_replacements(stage, launcher, 3)
    _protect(stage, protected)
    ending = Ending(launcher)
    for _ in others:
        await stage.pass_rounds()
        assert await ending.run_once() == 1
    assert [stage.state_of(instance) in OVER for instance in (protected, *others)] == [False, True, True]
    assert await alarms.run_once(launcher.runtime) == 1
    told = await _health(stage, "ending")
    assert (told.state, told.status) == ("degraded", "degraded")
    for word in (protected, "OperationNotPermitted", "USD/h"):
        assert word in told.reason
    assert "protection" in told.remedy
    assert await alarms.run_once(launcher.runtime) == 0, "said once"
    # The role is fine: a verification makes the customer active, and the instance is protected all the same.
    await stage.tenant.rows("UPDATE customers SET status = 'active' WHERE id = :customer_id RETURNING 1")
    await alarms.run_once(launcher.runtime)
    assert (await _health(stage, "ending")).status == "degraded"

    await stage.pass_rounds()
    calls = len(stage.calls("TerminateInstances"))
    assert await ending.run_once() == 0
    assert len(stage.calls("TerminateInstances")) == calls, "EC2 is not asked every five seconds"
    # Every hour for a week, every day from then on, and told all the time.
    for age, hours in (("6 days", 1), ("8 days", 24)):
        aged = f"UPDATE refused_endings SET next_at = now(), first_at = now() - interval '{age}' RETURNING 1"
        await stage.tenant.rows(aged)
        await stage.pass_rounds()
        assert await ending.run_once() == 0
        refused = await stage.tenant.row("SELECT next_at - last_at AS pause FROM refused_endings")
        assert refused.pause.total_seconds() == pytest.approx(hours * 3600, abs=1)
    await alarms.run_once(launcher.runtime)
    assert (await _health(stage, "ending")).state == "degraded"
    stage.aws.clear_faults()
    await stage.pass_rounds()
    await stage.tenant.rows("UPDATE refused_endings SET next_at = now() RETURNING 1")
    assert await ending.run_once() == 1
    await alarms.run_once(launcher.runtime)
    told = await _health(stage, "ending")
    assert (told.state, told.reason, told.status) == ("ok", None, "active")


async def test_a_protected_replacement_keeps_no_interruption_open(stage: Stage, launcher: Launcher) -> None:
    (protected,) = await never_ready_replacements(stage, launcher)
    _protect(stage, protected)
    assert await Ending(launcher).run_once() == 0
    await stage.until(lambda: _drained(stage), 10)
    assert await closing.close_ended(launcher.runtime) == 0, "there is still time for another"
    await stage.tenant.rows("UPDATE launch_intents SET deadline_at = now() - interval '1 second' RETURNING 1")
    await deadlines.run_once(launcher.runtime)
    assert await closing.close_ended(launcher.runtime) == 1
    (closed,) = await stage.interruptions()
    assert "no replacement could be launched" in closed.reason
    attempt = await _attempt(stage, protected)
    assert (attempt.intent, attempt.state) == ("exhausted", "terminating"), "it is still to end"
    stage.aws.clear_faults()
    await stage.pass_rounds()
    await stage.tenant.rows("UPDATE refused_endings SET next_at = now() RETURNING 1")
    assert await Ending(launcher).run_once() == 1
    attempt = await _attempt(stage, protected)
    assert (attempt.intent, attempt.state) == ("exhausted", "terminated"), "and nothing is launched any more"


async def _drained(stage: Stage) -> bool:
    return bool(await stage.tenant.rows("SELECT 1 FROM agent_tasks WHERE state = 'done'"))


async def test_a_protected_orphan_holds_up_no_other(stage: Stage, launcher: Launcher) -> None:
    orphaned = sorted(await launched(stage, launcher, 3))
    await stage.tenant.rows("UPDATE launch_attempts SET state = 'abandoned' RETURNING 1")
    for instance in stage.aws._instances.by_id.values():
        instance.launched_at -= 3600
    _protect(stage, orphaned[0])
    for _ in orphaned[1:]:
        await stage.pass_rounds()
        assert await orphans.run_once(launcher) == 1
    assert [stage.state_of(instance) in OVER for instance in orphaned] == [False, True, True]
    await alarms.run_once(launcher.runtime)
    assert orphaned[0] in (await _health(stage, "ending")).reason


async def test_an_account_that_does_not_answer_holds_up_no_other(
    stage: Stage, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending_module, "INTERVAL_SECONDS", 0.5)
    monkeypatch.setattr(launch_reconciler, "INTERVAL_SECONDS", 0.5)
    silent = stage.tenant
    (unended,) = await never_ready_replacements(stage, launcher)
    other = stage.tenant = await stage.add_customer()
    (ended,) = await never_ready_replacements(stage, launcher)
    hang = {"mode": "hang", "account_id": silent.account_id, "count": None, "seconds": 20.0}
    stage.aws.inject(Fault(**hang))
    async with asyncio.timeout(10):
        assert await Ending(launcher).run_once() == 1
    assert [stage.state_of(instance) in OVER for instance in (unended, ended)] == [False, True]

    # The same for launches without an answer.
    stage.aws.clear_faults()
    await launcher.leave()
    for tenant in (silent, other):
        stage.tenant = tenant
        lost = Fault("drop_before", action="RunInstances", account_id=tenant.account_id)
        await launched(stage, launcher, fault=lost)
    stage.aws.inject(Fault(**hang))
    await stage.tenant.rows("UPDATE launch_batches SET next_action_at = now() RETURNING 1")
    async with asyncio.timeout(10):
        assert await launch_reconciler.run_once(launcher) == 2
    unanswered = await stage.tenant.rows("SELECT customer_id FROM launch_batches WHERE state IN ('calling', 'unknown')")
    assert [row.customer_id for row in unanswered] == [silent.customer_id]
    stage.aws.clear_faults()
    await launcher.leave()


async def test_credentials_that_ended_are_renewed_at_the_next_look(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await never_ready_replacements(stage, launcher)
    stage.aws.expire_credentials(stage.tenant.account_id)
    assert await Ending(launcher).run_once() == 0
    refused = await stage.tenant.row("SELECT code, lasting FROM refused_endings")
    assert (refused.code, refused.lasting) == ("RequestExpired", False)
    await stage.tenant.rows("UPDATE refused_endings SET next_at = now() RETURNING 1")
    await stage.pass_rounds()
    assert await Ending(launcher).run_once() == 1
    assert stage.state_of(instance) in OVER


async def test_a_node_that_became_ready_after_all_is_kept(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await never_ready_replacements(stage, launcher)
    await stage.tenant.node(instance)
    assert await Ending(launcher).run_once() == 0
    attempt = await _attempt(stage, instance)
    assert (attempt.state, attempt.intent, stage.state_of(instance)) == ("ready", "ready", "running")
    assert stage.calls("TerminateInstances") == []


async def test_while_its_agent_is_away_a_replacement_is_told_and_not_ended(stage: Stage, launcher: Launcher) -> None:
    (instance,) = await launched(stage, launcher)
    await stage.tenant.rows("UPDATE launch_attempts SET launched_at = now() - interval '11 minutes' RETURNING 1")
    away = "UPDATE clusters SET last_seen_at = now() - interval '12 minutes' RETURNING 1"
    await stage.tenant.rows(away)
    assert await never_ready.run_once(launcher.runtime) == 0
    await alarms.run_once(launcher.runtime)
    told = await _health(stage, "never_ready")
    assert (told.state, told.status) == ("degraded", "degraded")
    for word in (instance, "USD/h", "last heard"):
        assert word in told.reason
    assert "agent" in told.remedy

    # Heard for a moment, and away again before the call: nobody knows whether it is Ready by now.
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
    assert await never_ready.run_once(launcher.runtime) == 1
    await stage.tenant.rows(away)
    assert await Ending(launcher).run_once() == 0
    assert stage.state_of(instance) == "running"
    await alarms.run_once(launcher.runtime)
    assert (await _health(stage, "never_ready")).state == "degraded"
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
    assert await Ending(launcher).run_once() == 1
    await alarms.run_once(launcher.runtime)
    told = await _health(stage, "never_ready")
    assert (told.state, told.status) == ("ok", "active")


async def test_a_launch_nobody_can_ask_about_any_more_is_told_until_the_role_is_back(
    stage: Stage, launcher: Launcher
) -> None:
    await launched(stage, launcher, fault=Fault("drop_after", action="RunInstances", count=None))
    (instance,) = stage.ours()
    stage.aws.revoke_role(stage.tenant.account_id)
    stage.aws.expire_credentials(stage.tenant.account_id)
    await stage.tenant.rows(
        "UPDATE launch_batches SET next_action_at = now(), first_called_at = now() - interval '11 minutes' RETURNING 1"
    )
    await launch_reconciler.run_once(launcher)
    batch = await stage.tenant.row("SELECT * FROM launch_batches")
    assert (batch.state, batch.lease_until) == ("unknown", None)
    await alarms.run_once(launcher.runtime)
    told = await _health(stage, "launches")
    assert (told.state, told.status) == ("degraded", "degraded")
    assert f"cloudoptim:batch={batch.id}" in told.reason
    assert batch.error_code in told.reason

    stage.aws.revoke_role(stage.tenant.account_id, revoked=False)
    launcher.runtime.aws._sessions.clear()
    await stage.pass_leases()
    await launch_reconciler.run_once(launcher)
    assert (await _attempt(stage, instance.instance_id)).state == "adopted"
    await alarms.run_once(launcher.runtime)
    told = await _health(stage, "launches")
    assert (told.state, told.status) == ("ok", "active")


# --- off-boarding


async def test_off_boarding_ends_what_is_in_flight_before_it_gives_up_the_role(
    stage: Stage, launcher: Launcher, api: Api
) -> None:
    await launched(stage, launcher, fault=Fault("drop_after", action="RunInstances"))
    (instance,) = stage.ours()
    path = f"/customers/{stage.tenant.customer_id}"
    answer = await api.call("DELETE", path)
    assert answer.status_code == 202, answer.text
    assert answer.json()["in_flight"]["unanswered_launches"] == 1
    secrets = await stage.tenant.row("SELECT data_key, status, aws_role_arn FROM customers WHERE id = :customer_id")
    assert (secrets.data_key, secrets.status) == (None, "offboarding")
    assert secrets.aws_role_arn is not None

    await leaving.run_once(launcher.runtime)
    await stage.pass_leases()
    await launch_reconciler.run_once(launcher)
    shown = await api.ok("GET", path)
    assert (shown["status"], shown["in_flight"]["instances"]) == ("offboarding", [instance.instance_id])
    attempt = await _attempt(stage, instance.instance_id)
    assert (attempt.state, attempt.intent) == ("terminating", "cancelled")
    assert attempt.launched_at is not None, "it bills from then on"
    assert await Ending(launcher).run_once() == 1
    assert await leaving.run_once(launcher.runtime) == 1
    assert stage.state_of(instance.instance_id) in OVER
    assert (await api.call("GET", path)).status_code == 404
    gone = await stage.tenant.row("SELECT status, aws_role_arn FROM customers WHERE id = :customer_id")
    assert (gone.status, gone.aws_role_arn) == ("offboarded", None)


async def test_what_cannot_be_ended_because_the_role_is_gone_is_told_and_can_be_left_behind(
    stage: Stage, launcher: Launcher, api: Api
) -> None:
    (instance,) = await launched(stage, launcher)
    path = f"/customers/{stage.tenant.customer_id}"
    stage.aws.revoke_role(stage.tenant.account_id)
    stage.aws.expire_credentials(stage.tenant.account_id)
    launcher.runtime.aws._sessions.clear()
    assert (await api.call("DELETE", path)).status_code == 202
    assert await leaving.run_once(launcher.runtime) == 1
    assert await Ending(launcher).run_once() == 0
    await alarms.run_once(launcher.runtime)
    shown = await api.ok("GET", path)
    (told,) = [one for one in shown["intake"] if one["detector"] == "ending"]
    assert told["state"] == "degraded"
    assert instance in told["reason"]
    assert "AssumeRole" in told["reason"]
    assert "verify" in told["remedy"]
    assert await Ending(launcher).run_once() == 0
    asked = len(stage.aws.history(action="AssumeRole"))
    assert (await api.call("DELETE", path)).status_code == 202
    await Ending(launcher).run_once()
    assert len(stage.aws.history(action="AssumeRole")) > asked, "asked again at once"

    assert (await api.call("DELETE", path, params={"leave_behind": True})).status_code == 204
    left = await stage.tenant.row(
        "SELECT detail FROM audit_log WHERE customer_id = :customer_id AND action = 'customer.offboarded'"
    )
    assert left.detail["left_behind"]["instances"] == [instance]
    attempt = await _attempt(stage, instance)
    assert (attempt.state, "off-boarded" in attempt.failure) == ("abandoned", True)


@pytest.mark.parametrize("marked", [False, True])
async def test_a_deleted_clusters_replacement_that_never_joined_is_ended(
    stage: Stage, launcher: Launcher, marked: bool
) -> None:
    """Also when it was to be ended before as never Ready: no agent will say any more whether it is."""
    (instance,) = await (never_ready_replacements if marked else launched)(stage, launcher)
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() - interval '12 minutes' RETURNING 1")
    async with stage.db.system() as conn:
        await conn.execute(
            text("UPDATE clusters SET status = 'deleted' WHERE id = :id"), {"id": stage.tenant.cluster_id}
        )
    assert await leaving.run_once(launcher.runtime) == 1
    assert await Ending(launcher).run_once() == 1
    assert stage.state_of(instance) in OVER


# --- restored from a backup


async def test_adopt_only_is_one_customers_and_lifted_by_a_person(
    stage: Stage, launcher: Launcher, api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (lost,) = await launched(stage, launcher)
    await stage.tenant.rows("DELETE FROM launch_attempts RETURNING 1")
    await stage.tenant.rows("DELETE FROM launch_batches RETURNING 1")
    await stage.tenant.rows("DELETE FROM launch_intents RETURNING 1")
    for instance in stage.aws._instances.by_id.values():
        instance.launched_at -= 3600
    other = await stage.add_customer()
    assert await orphans.run_once(launcher) == 0
    await alarms.run_once(launcher.runtime)
    path = f"/customers/{stage.tenant.customer_id}"
    shown = await api.ok("GET", path)
    assert shown["adopt_only"]["instances"] == [lost]
    assert "database is older" in shown["adopt_only"]["reason"]
    (told,) = [one for one in shown["intake"] if one["detector"] == "adopt_only"]
    assert told["state"] == "degraded"
    assert "adopt-only" in told["remedy"]
    assert (await api.ok("GET", f"/customers/{other.customer_id}"))["adopt_only"] is None

    (ending,) = await never_ready_replacements(stage, launcher)
    assert await Ending(launcher).run_once() == 0
    monkeypatch.setenv("DATABASE_URL", stage.database_url)
    monkeypatch.setenv("REDIS_URL", stage.redis_url)
    monkeypatch.setenv("CLOUDOPTIM_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    listed = await _command("adopt-only")
    assert str(stage.tenant.customer_id) in listed
    assert lost in listed
    found = await asyncio.to_thread(_noted_by_doctor)
    assert "cloudoptim adopt-only" in found
    assert (await api.call("POST", f"{path}/adopt-only/lift", json={"reason": "compared with EC2"})).is_success
    assert (await api.call("POST", f"{path}/adopt-only/lift", json={"reason": "again"})).status_code == 409
    assert "Nothing is held back" in await _command("adopt-only")
    get_settings.cache_clear()
    audit = await stage.tenant.row("SELECT detail FROM audit_log WHERE action = 'customer.adopt_only_lifted'")
    assert (audit.detail["reason"], audit.detail["adopted"]) == ("compared with EC2", [lost])

    await stage.pass_rounds()
    assert await Ending(launcher).run_once() == 1
    assert stage.state_of(ending) in OVER
    await orphans.run_once(launcher)
    assert stage.state_of(lost) == "running", "what was adopted stays"
    await alarms.run_once(launcher.runtime)
    assert (await _health(stage, "adopt_only")).state == "ok"


def _noted_by_doctor() -> str:
    findings = examine(get_settings(), dict(os.environ))
    finding = next(found for found in findings if found.subject.startswith("customer "))
    assert finding.state == "note"
    return finding.detail


async def _command(*arguments: str) -> str:
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output
