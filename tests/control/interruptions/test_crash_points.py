"""Every crash point of docs/reliability.md that is not shown elsewhere: killed there, and the outcome is the same.

The kill comes from outside: from the sandbox at a call, from a database that holds a COMMIT, or from the test.
"""

from __future__ import annotations

import ast
import asyncio
import json
import re
import signal
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from typing import Any

import pytest
from sqlalchemy import text

from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers import ready
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage, gate, kill
from tests.control.interruptions.test_killed_workers import exactly_one_of_everything
from tests.control.interruptions.workers import REPOSITORY, Worker
from warehouse.contracts import EventSource

PAGE = REPOSITORY / "docs" / "reliability.md"
POINTS = [f"C-{number:02d}" for number in range(1, 35)]


def test_every_crash_point_has_a_case_that_exists() -> None:
    """The page names a test for every point, and each of them is there."""
    rows = re.findall(r"^\| (C-\d\d) \|.*\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [point for point, _ in rows] == POINTS
    missing = []
    for point, cell in rows:
        cases = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)
        if not cases:
            missing.append(f"{point}: no case")
        for path, name in cases:
            file = REPOSITORY / path
            tree = ast.parse(file.read_text()) if file.exists() else ast.Module([], [])
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            if name not in functions:
                missing.append(f"{point}: {path} has no {name}")
    assert missing == []


def test_the_page_is_complete_and_names_what_exists() -> None:
    """Every promise, class of bad input and load has its row; files, corpus cases and ``-k`` of commands are there."""
    page = PAGE.read_text()
    for kind, last in (("R", 28), ("Q", 22), ("L", 16)):
        named = [int(number) for row in re.findall(r"^\|([^|]+)\|", page, re.MULTILINE) for number in _ids(kind, row)]
        assert sorted(named) == list(range(1, last + 1)), kind
    tests = {file.name: file.read_text() for file in (REPOSITORY / "tests").rglob("test_*.py")}
    missing = [name for name in re.findall(r"`(test_\w+\.py)`", page) if name not in tests]
    missing += [path for path in re.findall(r"tests/[\w/]+(?:\.py)?", page) if not (REPOSITORY / path).exists()]
    missing += [
        case
        for case in re.findall(r"\b(?:sqs|scenarios)/q\d\d-\*", page)
        if not list((REPOSITORY / "tests/corpus").glob(case)) and not _generated(case)
    ]
    for path, word in re.findall(r"(tests/[\w/]+\.py) -k (\w+)", page):
        functions = re.findall(r"def (test_\w+)", (REPOSITORY / path).read_text())
        if not any(word in name for name in functions):
            missing.append(f"{path} -k {word}")
    assert missing == []


def _ids(kind: str, cell: str) -> list[str]:
    return re.findall(rf"\b{kind}-(\d\d)\b", cell)


def _generated(case: str) -> bool:
    """Bodies too large to keep as files are described in the expectations."""
    names = json.loads((REPOSITORY / "tests/corpus/sqs/expect.json").read_text())
    return any(fnmatch(f"sqs/{name}", case) for name in names)


# --- helpers


async def warned(stage: Stage) -> str:
    """A running Spot node whose warning is in the queue."""
    (instance,) = await stage.launch_nodes()
    warn(stage, instance)
    return instance


def warn(stage: Stage, instance: str) -> None:
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))


async def killed_in_its_launch(stage: Stage) -> None:
    """A worker took a warning in and is killed while EC2 launches: the instance is there, nobody was told."""
    (instance,) = await stage.launch_nodes()
    worker = stage.start_worker()
    await killed_at(stage, worker, "RunInstances", "applied")
    warn(stage, instance)
    await dead(worker)


async def all_handled(stage: Stage, count: int = 1) -> None:
    rows = await stage.closed(count, 40)
    assert [row.outcome for row in rows] == ["handled"] * count, [(row.outcome, row.reason) for row in rows]
    assert await exactly_one_of_everything(stage) == []


async def killed_at(stage: Stage, worker: Worker, action: str, moment: str, number: int = signal.SIGKILL) -> None:
    """Have the worker killed at its next call of this kind."""
    stage.aws.inject(Fault("signal", action=action, pid=worker.pid, moment=moment, signal_number=number))  # type: ignore[arg-type]


async def dead(worker: Worker) -> None:
    assert await asyncio.to_thread(worker.wait, 20) == -signal.SIGKILL


def launches(stage: Stage) -> list[dict[str, Any]]:
    """Our calls of RunInstances, oldest first."""
    return [entry for entry in stage.calls("RunInstances") if entry["session"]]


def tokens(stage: Stage) -> list[str]:
    return [entry["params"]["ClientToken"] for entry in launches(stage)]


async def attempts(stage: Stage) -> list[str]:
    rows = await stage.tenant.rows(
        "SELECT state FROM launch_attempts WHERE customer_id = :customer_id ORDER BY created_at, attempt_no"
    )
    return [row.state for row in rows]


# --- intake


@pytest.mark.crash
@pytest.mark.parametrize("moment", ["before", "applied"])
async def test_killed_while_receiving(stage: Stage, moment: str) -> None:
    """C-01: the queue handed the message out, or not, and nobody was there to take it."""
    worker = stage.start_worker()
    await killed_at(stage, worker, "ReceiveMessage", moment)
    await warned(stage)
    await dead(worker)
    assert await stage.interruptions() == []
    stage.redeliver()
    stage.start_worker()
    await all_handled(stage)


@pytest.mark.crash
async def test_killed_before_the_commit(stage: Stage) -> None:
    """C-02: everything was written, nothing committed."""
    async with gate(stage.database_url, "interruptions", "true") as held:
        worker = stage.start_worker()
        await warned(stage)
        await held.reached()
        kill(worker)
        await held.roll_back()
        assert await stage.interruptions() == []
        assert sum(stage.aws.queue_depth(stage.queue)) == 1
    stage.redeliver()
    stage.start_worker()
    await all_handled(stage)


async def test_killed_in_the_middle_of_the_commit(stage: Stage) -> None:
    """C-03: the rows are there, and nobody was told."""
    async with gate(stage.database_url, "interruptions", "true") as held:
        worker = stage.start_worker()
        await warned(stage)
        await held.reached()
        kill(worker)
        await held.commit()
    assert len(await stage.interruptions()) == 1
    assert sum(stage.aws.queue_depth(stage.queue)) == 1
    stage.redeliver()
    stage.start_worker()
    await all_handled(stage)
    assert (await stage.tenant.row("SELECT receive_count FROM inbox_messages")).receive_count == 2


@pytest.mark.crash
async def test_the_connection_is_lost_in_the_middle_of_the_commit(stage: Stage) -> None:
    """C-03 for a worker that lives: it cannot know, tries again, and there is one set of rows."""
    async with gate(stage.database_url, "interruptions", "true") as held:
        worker = stage.start_worker()
        await warned(stage)
        await held.reached()
        await held.roll_back()
    await all_handled(stage)
    assert worker.poll() is None


async def test_two_consumers_have_the_same_message(stage: Stage) -> None:
    """C-06, C-07: the first is so slow that the message comes again; then its receipt handle is stale."""
    async with gate(stage.database_url, "interruptions", "true") as held:
        slow = stage.start_worker()
        await warned(stage)
        await held.reached()
        slow.send_signal(signal.SIGSTOP)
        stage.start_worker()

        async def the_second_waits() -> list[Any]:
            # Until it is the second's: the first still has a poll under way.
            stage.redeliver()
            return await stage.tenant.rows("SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted")

        await stage.until(the_second_waits, 10)
        await held.commit()
        slow.send_signal(signal.SIGCONT)
    await all_handled(stage)

    async def deleted() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(deleted, 10)
    handles = [
        entry["ReceiptHandle"] for call in stage.calls("DeleteMessageBatch") for entry in call["params"]["Entries"]
    ]
    assert len(set(handles)) >= 2


# --- launching


@pytest.mark.crash
async def test_an_instance_that_describe_does_not_show_yet(stage: Stage) -> None:
    """C-10: an empty answer is no proof; the token is."""
    (instance,) = await stage.launch_nodes()
    stage.aws._ec2.visibility_delay_seconds = (600.0, 600.0)
    worker = stage.start_worker()
    await killed_at(stage, worker, "RunInstances", "applied")
    warn(stage, instance)
    await dead(worker)
    await stage.pass_leases()
    stage.start_worker()
    await all_handled(stage)
    assert len(tokens(stage)) == 2
    assert len(set(tokens(stage))) == 1


@pytest.mark.crash
@pytest.mark.parametrize("recorded", [False, True])
async def test_killed_with_a_refusal_in_hand(stage: Stage, recorded: bool) -> None:
    """C-11, C-12: no capacity, told but not recorded, and recorded with nothing done about it."""
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("ice", action="RunInstances", count=1 if recorded else 2))
    async with gate(stage.database_url, "launch_attempts", "NEW.state = 'failed'", on="UPDATE") as held:
        worker = stage.start_worker()
        warn(stage, instance)
        await held.reached()
        kill(worker)
        await (held.commit() if recorded else held.roll_back())
        assert await attempts(stage) == ["failed" if recorded else "calling"]
    await stage.pass_leases()
    stage.start_worker()
    await all_handled(stage)
    assert await attempts(stage) == ["failed", "ready"]
    used = tokens(stage)
    assert len(set(used)) == 2
    assert used == ([used[0], used[1]] if recorded else [used[0], used[0], used[2]])


@pytest.mark.crash
async def test_somebody_ended_the_instance_nobody_knew_of(stage: Stage) -> None:
    """C-13: the token answers that its instance is terminated; one more attempt, not a loop."""
    stage.nodes_join = False
    await killed_in_its_launch(stage)
    (lost,) = stage.ours()
    stage.aws.terminate(lost.instance_id)
    stage.nodes_join = True
    await stage.pass_leases()
    stage.start_worker()
    await all_handled(stage)
    assert await attempts(stage) == ["terminated", "ready"]
    assert len(launches(stage)) == 3


@pytest.mark.crash
async def test_a_request_that_was_rebuilt_wrongly_is_never_tried_anew(stage: Stage) -> None:
    """C-14: an alarm and no second instance; after ten minutes the first is adopted by its tag."""
    await killed_in_its_launch(stage)
    frozen = json.loads((await stage.tenant.row("SELECT request_json FROM launch_batches")).request_json)
    await stage.tenant.rows(
        "UPDATE launch_batches SET request_json = :other RETURNING 1",
        other=json.dumps(frozen | {"InstanceType": "m5.4xlarge"}),
    )
    await stage.pass_leases()
    stage.start_worker()

    async def mismatched() -> list[Any]:
        return await stage.tenant.rows(
            "SELECT 1 FROM launch_batches WHERE state = 'unknown' AND error_code = 'IdempotentParameterMismatch'"
        )

    await stage.until(mismatched, 15)
    assert await attempts(stage) == ["unknown"]
    assert len(stage.ours()) == 1
    await stage.tenant.rows("UPDATE launch_batches SET first_called_at = now() - interval '11 minutes' RETURNING 1")
    await stage.pass_leases()
    await all_handled(stage)
    assert len(launches(stage)) == 2
    assert "the launch token was used with another request" in stage.logs()


@pytest.mark.crash
async def test_credentials_that_end_between_planning_and_calling(stage: Stage) -> None:
    """C-15: renewed, and the same token."""
    async with gate(stage.database_url, "launch_batches", "true") as held:
        stage.start_worker()
        await warned(stage)
        await held.reached()
        stage.aws.expire_credentials(stage.tenant.account_id)
        await held.commit()
    await all_handled(stage)
    batch = await stage.tenant.row("SELECT client_token, calls FROM launch_batches")
    assert (tokens(stage), batch.calls) == ([batch.client_token], 2)


@pytest.mark.crash
async def test_killed_with_the_id_recorded_and_nobody_told(stage: Stage) -> None:
    """C-16: the next worker finds the launched instance and the events that were to be sent."""
    stage.join_seconds = 2.0
    async with gate(stage.database_url, "launch_attempts", "NEW.state = 'launched'", on="UPDATE") as held:
        worker = stage.start_worker()
        await warned(stage)
        await held.reached()
        kill(worker)
        await held.commit()
    stage.redeliver()
    stage.start_worker()
    await all_handled(stage)
    assert len(launches(stage)) == 1

    async def all_told() -> bool:
        return not await stage.tenant.rows("SELECT 1 FROM outbox WHERE published_at IS NULL")

    await stage.until(all_told, 10)


async def test_a_task_nobody_rang_for_reaches_the_agent(stage: Stage) -> None:
    """C-17: committed, killed before the bell; the agent finds it by polling, with no worker alive."""
    async with gate(stage.database_url, "agent_tasks", "true") as held:
        worker = stage.start_worker()
        await warned(stage)
        await held.reached()
        kill(worker)
        await held.commit()

    async def in_its_hands() -> bool:
        return bool(stage.leased)

    await stage.until(in_its_hands, 5)
    stage.redeliver()
    stage.start_worker()
    await all_handled(stage)


async def test_two_replicas_call_for_the_same_attempt(stage: Stage, launchers: tuple[Launcher, Launcher]) -> None:
    """C-28: the second takes the call over while the first still waits for its answer."""
    first, second = launchers
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("hang_after", action="RunInstances", seconds=1.0))
    facts = await stage.tenant.facts()
    await ingest(stage.db, facts, [Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)])
    await first.plan_round()

    async def called() -> bool:
        return bool(stage.ours())

    await stage.until(called, 5)
    await stage.pass_leases()
    assert await launch_reconciler.run_once(second) == 1
    await first.finish_calls(10)
    assert len(stage.ours()) == 1
    assert await attempts(stage) == ["launched"]
    assert len(tokens(stage)) == 2
    assert len(set(tokens(stage))) == 1


@pytest.mark.crash
async def test_a_worker_frozen_in_its_call_wakes_up_too_late(stage: Stage) -> None:
    """C-29, in short: stopped while EC2 answers, woken when everything is done."""
    (instance,) = await stage.launch_nodes()
    frozen = stage.start_worker()
    await killed_at(stage, frozen, "RunInstances", "applied", signal.SIGSTOP)
    warn(stage, instance)

    async def launched() -> bool:
        return bool(stage.ours())

    await stage.until(launched, 10)
    await stage.pass_leases()
    other = stage.start_worker()
    await all_handled(stage)
    kill(other)
    stage.redeliver()
    frozen.send_signal(signal.SIGCONT)
    # It goes on to work for the next one, alone: whatever it had in hand is done by then.
    await warned(stage)
    await all_handled(stage, 2)
    assert frozen.poll() is None


# --- what the minutes bring


@pytest.mark.crash
async def test_a_deadline_nobody_came_for_is_told_and_still_replaced(stage: Stage) -> None:
    """C-23: missed is said to be missed, and the replacement is launched all the same."""
    stage.agent_works = False
    worker = stage.start_worker()
    await killed_at(stage, worker, "DeleteMessageBatch", "applied")
    await warned(stage)
    await dead(worker)
    for table in ("agent_tasks", "interruptions"):
        await stage.tenant.rows(f"UPDATE {table} SET deadline_at = now() - interval '1 second' RETURNING 1")
    await stage.pass_leases()
    stage.start_worker()
    (row,) = await stage.closed(1, 40)
    assert (row.outcome, row.reason) == ("missed", "no agent drained the node before the deadline")
    assert await attempts(stage) == ["ready"]
    told = await stage.tenant.row("SELECT payload FROM outbox WHERE topic = 'spot.interruption.closed'")
    assert told.payload["outcome"] == "missed"


@pytest.mark.crash
async def test_notices_from_before_an_outage(stage: Stage) -> None:
    """C-24: twenty minutes old; a node that lives is helped, one that is gone is only written down."""
    alive, gone = await stage.launch_nodes(2)
    stage.aws.terminate(gone, reason="Server.SpotInstanceTermination")
    await stage.tenant.rows(
        "UPDATE nodes SET terminated_at = now(), status = 'terminated' WHERE instance_id = :i RETURNING 1", i=gone
    )
    old = (datetime.now(UTC) - timedelta(minutes=20)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for instance in (alive, gone):
        stage.aws.send_event(stage.queue, stage.tenant.warning(instance, time=old))
    stage.start_worker()
    rows = {row.instance_id: row for row in await stage.closed(2, 40)}
    assert (rows[alive].outcome, rows[gone].outcome) == ("handled", "missed")
    assert len(stage.ours()) == 1
    assert await stage.tenant.rows("SELECT 1 FROM agent_tasks WHERE interruption_id = :id", id=rows[gone].id) == []


@pytest.mark.crash
@pytest.mark.parametrize("moment", ["before", "applied"])
async def test_killed_around_the_end_of_an_instance_that_was_never_ready(stage: Stage, moment: str) -> None:
    """C-25, C-26: marked for its end, killed before and after the call that ends it; then one more attempt."""
    stage.nodes_join = False
    worker = stage.start_worker()
    await warned(stage)

    async def launched() -> bool:
        return await attempts(stage) == ["launched"]

    await stage.until(launched, 15)
    kill(worker)
    (never_ready,) = stage.ours()
    await stage.tenant.rows("UPDATE launch_attempts SET launched_at = now() - interval '11 minutes' RETURNING 1")
    worker = stage.start_worker()
    await killed_at(stage, worker, "TerminateInstances", moment)
    await dead(worker)
    assert await attempts(stage) == ["terminating"]
    await stage.pass_rounds()
    # Only now: earlier, the instance that is to be ended would still become a Ready node.
    stage.nodes_join = True
    stage.start_worker()
    await all_handled(stage)
    assert await attempts(stage) == ["terminated", "ready"]
    ended = [call["params"]["InstanceId"] for call in stage.calls("TerminateInstances")]
    assert ended
    assert all(ids == [never_ready.instance_id] for ids in ended)


async def test_replacements_of_replacements_end_on_demand(stage: Stage, launcher: Launcher) -> None:
    """C-27: each is an interruption of its own; after three within ten minutes no more Spot is tried."""
    facts = await stage.tenant.facts()
    (interrupted,) = await stage.launch_nodes()
    kinds = []
    for number in range(1, 5):
        warning = json.dumps(stage.tenant.warning(interrupted))
        await ingest(stage.db, facts, [Received(warning, EventSource.SQS)])

        async def replaced() -> int:
            # Not every pool that is priced offers the type: the ladder goes on.
            await launcher.plan_round()
            await launcher.finish_calls(10)
            return await ready.run_once(launcher.runtime)

        await stage.until(replaced, 10)
        assert len(await stage.interruptions()) == number
        newest = stage.ours()[-1]
        interrupted = newest.instance_id
        kinds.append(newest.lifecycle)
    assert kinds == ["spot", "spot", "spot", "on-demand"]


async def test_a_cluster_deleted_in_the_middle_launches_nothing_more(stage: Stage) -> None:
    """C-32, before the call: nothing is launched."""
    async with gate(stage.database_url, "agent_tasks", "true") as held:
        worker = stage.start_worker()
        await warned(stage)
        await held.reached()
        kill(worker)
        await held.commit()
    async with stage.db.system() as conn:
        await conn.execute(
            text("UPDATE clusters SET status = 'deleted' WHERE id = :id"), {"id": stage.tenant.cluster_id}
        )
    stage.start_worker()
    await stage.closed(1, 40)
    assert (await stage.tenant.row("SELECT state FROM launch_intents")).state == "cancelled"
    assert stage.ours() == []


@pytest.mark.crash
async def test_a_launch_under_way_when_the_cluster_is_deleted_is_not_forgotten(stage: Stage) -> None:
    """C-32, after the call: the instance is found and its attempt ends in a state that says so."""
    await killed_in_its_launch(stage)
    async with stage.db.system() as conn:
        await conn.execute(
            text("UPDATE clusters SET status = 'deleted' WHERE id = :id"), {"id": stage.tenant.cluster_id}
        )
    await stage.pass_leases()
    stage.start_worker()
    await stage.closed(1, 40)
    attempt = await stage.tenant.row("SELECT state, instance_id FROM launch_attempts")
    assert [attempt.instance_id] == [instance.instance_id for instance in stage.ours()]
    assert len(launches(stage)) == 2


async def test_a_role_that_is_gone_after_the_launch(stage: Stage) -> None:
    """C-33: what still bills is named, and nothing is forgotten."""
    stage.nodes_join = False
    worker = stage.start_worker()
    await warned(stage)

    async def launched() -> bool:
        return await attempts(stage) == ["launched"]

    await stage.until(launched, 15)
    kill(worker)
    (instance,) = stage.ours()
    stage.aws.revoke_role(stage.tenant.account_id)
    stage.aws.expire_credentials(stage.tenant.account_id)
    await stage.tenant.rows("UPDATE launch_attempts SET state = 'terminating' RETURNING 1")
    stage.start_worker()

    async def told() -> bool:
        return "still_billing" in stage.logs()

    await stage.until(told, 15)
    (line,) = [line for line in stage.logs().splitlines() if "still_billing" in line][:1]
    assert instance.instance_id in line
    assert await attempts(stage) == ["terminating"]
    # Put back, it is ended by the next worker to ask.
    stage.aws.revoke_role(stage.tenant.account_id, revoked=False)
    for worker in stage.workers:
        kill(worker)
    # The poll of the next minute finds that the role is back.
    await stage.pass_rounds()
    stage.nodes_join = True
    stage.start_worker()
    await all_handled(stage)
    assert await attempts(stage) == ["terminated", "ready"]
