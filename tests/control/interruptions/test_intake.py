"""Queues: broken ones are told about and leave the others alone, customers come and go, floods are taken in batches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from control.errors import Invalid
from control.gateways.aws import AwsError, AwsGateway, SqsMessage
from control.interruptions import views
from control.interruptions.buffer import LARGE_BYTES, PATIENCE_SECONDS, QUIET_SECONDS, Buffer, Held
from control.interruptions.intake import (
    COMMITS_AT_ONCE,
    CUSTOMERS_SECONDS,
    DEGRADED_AFTER_SECONDS,
    Health,
    Intake,
    QueueReader,
    explain,
)
from control.interruptions.runtime import Runtime
from control.interruptions.service import Facts, Received, ingest
from control.sandbox.aws.faults import Fault
from control.security.principal import Principal, Role
from control.worker import Worker
from tests.control.api import settings_for
from tests.control.interruptions.corpus import cases
from tests.control.interruptions.harness import DEPLOYMENT, Stage, gate
from tests.control.interruptions.tenants import Tenant, create_tenant, refusing
from warehouse.contracts import EventSource


@pytest.fixture
async def intake(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Intake]:
    """A worker's intake in this process, running."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    monkeypatch.setattr("control.interruptions.intake.CUSTOMERS_SECONDS", 0.2)
    aws = AwsGateway(endpoint_url=stage.aws.url)
    found = Intake(Runtime(stage.db, stage.db, aws, stage.bells, "intake", DEPLOYMENT))
    stop = asyncio.Event()
    task = asyncio.create_task(found.run(stop))
    yield found
    stop.set()
    await task
    await aws.close()


async def readers_of(stage: Stage, intake: Intake, *tenants: Tenant) -> list[QueueReader]:
    """The readers of customers' queues, once they are there."""
    wanted = [tenant.customer_id for tenant in tenants]

    async def read() -> bool:
        return set(wanted) <= set(intake.readers)

    await stage.until(read, 10)
    return [intake.readers[customer_id] for customer_id in wanted]


async def add_customer(stage: Stage, *, queue: bool = True) -> Tenant:
    """Another customer with an account, a role and (by default) a queue in the sandbox."""
    tenant = await create_tenant(stage.db)
    external_id = (await tenant.row("SELECT external_id FROM customers WHERE id = :customer_id")).external_id
    account = stage.aws.add_account(tenant.account_id, external_id=str(external_id))
    url = account.queue_url if queue else account.queue_url + "-missing"
    async with stage.db.system() as conn:
        await conn.execute(
            text("UPDATE customers SET aws_role_arn = :role, sqs_queue_url = :url WHERE id = :id"),
            {"role": account.role_arn, "url": url, "id": tenant.customer_id},
        )
    return tenant


async def _health(tenant: Tenant) -> tuple[str | None, str | None, str | None]:
    rows = await tenant.rows("SELECT * FROM intake_health WHERE customer_id = :customer_id AND detector = 'sqs'")
    return (rows[0].state, rows[0].reason, rows[0].remedy) if rows else (None, None, None)


async def _drained(stage: Stage, tenant: Tenant, instance: str) -> None:
    async def task() -> list:
        return await tenant.rows(
            "SELECT 1 FROM agent_tasks WHERE customer_id = :customer_id AND parameters ->> 'instance_id' = :i",
            i=instance,
        )

    await stage.until(task, 20)


async def test_a_missing_queue_is_told_with_its_remedy_and_others_work(stage: Stage, intake: Intake) -> None:
    broken = await add_customer(stage, queue=False)

    async def degraded() -> bool:
        return (await _health(broken))[0] == "degraded"

    await stage.until(degraded, 20)
    _, reason, remedy = await _health(broken)
    assert reason is not None
    assert "NonExistentQueue" in reason
    assert remedy is not None
    assert "sqs_queue_url" in remedy
    assert (await broken.row("SELECT status FROM customers WHERE id = :customer_id")).status == "degraded"
    (instance,) = await stage.launch_nodes()
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    await _drained(stage, stage.tenant, instance)

    # Mended: healthy again by itself.
    (account,) = [a for a in stage.aws.accounts() if a.account_id == broken.account_id]
    async with stage.db.system() as conn:
        await conn.execute(
            text("UPDATE customers SET sqs_queue_url = :url WHERE id = :id"),
            {"url": account.queue_url, "id": broken.customer_id},
        )
    node = await broken.node()
    stage.aws.send_event(broken.account_id, broken.warning(node))
    await _drained(stage, broken, node)


async def test_a_revoked_role_is_told_and_heals(stage: Stage, intake: Intake) -> None:
    other = await add_customer(stage)
    stage.aws.revoke_role(other.account_id)
    stage.aws.expire_credentials(other.account_id)

    async def degraded() -> bool:
        return (await _health(other))[0] == "degraded"

    await stage.until(degraded, 40)
    _, _, remedy = await _health(other)
    assert remedy is not None
    assert "external id" in remedy
    stage.aws.revoke_role(other.account_id, revoked=False)
    node = await other.node()
    stage.aws.send_event(other.account_id, other.warning(node))
    await _drained(stage, other, node)


async def test_customers_come_and_go_while_it_runs(stage: Stage, intake: Intake) -> None:
    added = await add_customer(stage)
    node = await added.node()
    stage.aws.send_event(added.account_id, added.warning(node))
    await _drained(stage, added, node)
    async with stage.db.system() as conn:
        await conn.execute(text("UPDATE customers SET status = 'offboarded' WHERE id = :id"), {"id": added.customer_id})

    async def gone() -> bool:
        return added.customer_id not in intake.readers

    await stage.until(gone, 10)
    since = max(entry["seq"] for entry in stage.aws.history())
    await asyncio.sleep(0.5)
    calls = [e for e in stage.aws.history(since_seq=since) if e.get("account") == added.account_id]
    # The long poll that was under way is cut.
    assert [call for call in calls if call["outcome"] != "client left"] == []


async def test_a_flood_of_one_customer_is_taken_in_large_batches(stage: Stage, intake: Intake) -> None:
    instances = [await stage.tenant.node() for _ in range(300)]
    stage.aws.send_events(stage.queue, [json.dumps(stage.tenant.warning(i)) for i in instances])

    async def all_in() -> bool:
        row = await stage.tenant.row("SELECT count(*) AS n FROM interruptions WHERE customer_id = :customer_id")
        return row.n == 300

    await stage.until(all_in, 60)

    async def deleted() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(deleted, 20)
    commits = await stage.tenant.row(
        "SELECT count(DISTINCT received_at) AS n FROM interruptions WHERE customer_id = :customer_id"
    )
    assert commits.n < 60


async def test_large_messages_are_held_by_their_bytes_and_keep_nobody_out(
    stage: Stage, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Postgres is slow, a flood of large bodies stays in its queue, and other queues are read all the same."""
    monkeypatch.setattr("control.interruptions.buffer.MAX_HELD_BYTES_OF_ALL", 3 << 20)
    quiet = await add_customer(stage)
    flooded, other = await readers_of(stage, intake, stage.tenant, quiet)
    async with contextlib.AsyncExitStack() as no_turns:
        for _ in range(COMMITS_AT_ONCE):
            await no_turns.enter_async_context(intake.turns)
        nodes = await stage.tenant.nodes(40)
        size = 300 << 10
        bodies = [json.dumps(stage.tenant.warning(node, padding="p" * size)) for node in nodes]
        stage.aws.send_events(stage.queue, bodies)

        async def full() -> bool:
            return intake.held.bytes >= 3 << 20

        await stage.until(full, 10)
        node = await quiet.node()
        stage.aws.send_event(quiet.account_id, quiet.warning(node))

        async def held() -> bool:
            return other.buffer.held_bytes > 0

        await stage.until(held, 10)
        # The bound, and the receives that were under way when it was reached.
        assert flooded.buffer.held_bytes < (3 << 20) + 2 * 10 * (size + 1024)
        assert flooded.buffer.held_bytes + other.buffer.held_bytes == intake.held.bytes
        assert sum(stage.aws.queue_depth(stage.queue)) == 40
    await _drained(stage, quiet, node)

    async def all_in() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(all_in, 30)
    assert len(await stage.interruptions()) == 40
    assert intake.held.bytes == 0


async def test_warnings_do_not_wait_for_a_large_body_of_their_queue(stage: Stage, intake: Intake) -> None:
    """R-14: reading and writing one of 1 MiB takes long; here its transaction does not end at all."""
    large, *nodes = await stage.tenant.nodes(3)
    await readers_of(stage, intake, stage.tenant)
    async with gate(stage.database_url, "inbox_messages", "NEW.outcome = 'quarantined'") as held:
        stage.aws.send_events(
            stage.queue,
            [json.dumps(stage.tenant.warning(large)) + "x" * (1 << 19), json.dumps(stage.tenant.warning(nodes[0]))],
        )
        await held.reached()
        await _drained(stage, stage.tenant, nodes[0])
        stage.aws.send_event(stage.queue, stage.tenant.warning(nodes[1]))
        await _drained(stage, stage.tenant, nodes[1])
        assert not await stage.tenant.rows("SELECT FROM inbox_messages WHERE outcome = 'quarantined'")
        await held.commit()

    async def emptied() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(emptied, 20)
    kept = await stage.tenant.rows("SELECT reason FROM inbox_messages WHERE outcome = 'quarantined'")
    assert [row.reason.split(":")[0] for row in kept] == ["not_json"]


async def test_a_large_body_waits_for_a_quiet_moment_and_not_for_ever() -> None:
    buffer = Buffer(Held())
    small = SqsMessage("id", "handle", "{}", None, 1)
    buffer.add([replace(small, body="x" * (LARGE_BYTES + 1)), small])
    came_at = time.monotonic()
    buffer.add([small])
    await asyncio.wait_for(buffer.quiet(), 5)
    assert time.monotonic() - came_at >= QUIET_SECONDS

    async def flood() -> None:
        while True:
            buffer.add([small])
            await asyncio.sleep(QUIET_SECONDS / 10)

    flooding = asyncio.create_task(flood())
    await asyncio.wait_for(buffer.quiet(), PATIENCE_SECONDS + 1)
    flooding.cancel()
    assert len(buffer.large.next_batch()) == 1


async def test_poison_one_to_one_with_good_warnings_over_the_queue(stage: Stage, intake: Intake) -> None:
    good = [await stage.tenant.node() for _ in range(40)]
    poison = []
    for case in cases():
        if case.expect["outcome"] == "quarantine" and "generate" not in case.expect:
            with contextlib.suppress(UnicodeDecodeError):
                body = case.body.decode()
                # SQS itself takes no empty body and no NUL.
                if body.strip() and "\x00" not in body:
                    poison.append(body)
    assert len(poison) >= 20
    for index, instance in enumerate(good):
        stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
        stage.aws.send_event(stage.queue, poison[index % len(poison)])

    async def all_in() -> bool:
        rows = await stage.tenant.rows("SELECT outcome, count(*) AS n FROM inbox_messages GROUP BY outcome")
        found = {row.outcome: row.n for row in rows}
        return found.get("handled") == 40 and found.get("quarantined", 0) >= min(len(poison), 40) - 5

    await stage.until(all_in, 60)

    async def deleted() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(deleted, 20)


async def test_undeletable_messages_come_again_and_change_nothing(stage: Stage, intake: Intake) -> None:
    stage.aws.inject(Fault("error", action="DeleteMessageBatch", code="InternalError", count=2))
    stage.aws.inject(Fault("duplicate", action="ReceiveMessage", count=3))
    (instance,) = await stage.launch_nodes()
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))

    async def left() -> bool:
        return len(stage.aws.history(action="DeleteMessageBatch")) >= 2

    async def deleted() -> bool:
        if stage.aws.queue_depth(stage.queue) == (0, 0):
            return True
        stage.redeliver()
        return False

    await _drained(stage, stage.tenant, instance)
    await stage.until(left, 10)
    assert stage.aws.queue_depth(stage.queue) != (0, 0)
    await stage.until(deleted, 40)
    row = await stage.tenant.row("SELECT receive_count FROM inbox_messages")
    assert row.receive_count >= 2
    assert len(await stage.interruptions()) == 1


async def test_three_consumers_of_one_queue_make_one_interruption_of_ten_deliveries(
    stage: Stage, intake: Intake
) -> None:
    """Q-14 over the queue: ten times at once, to three consumers, and again when the interruptions are over."""
    stop = asyncio.Event()
    others = [Intake(replace(intake.runtime, worker=f"other-{number}")) for number in range(2)]
    running = [asyncio.create_task(other.run(stop)) for other in others]

    async def reading() -> bool:
        return all(stage.tenant.customer_id in one.readers for one in (intake, *others))

    async def emptied() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(reading, 10)
    nodes = await stage.tenant.nodes(3)
    events = [json.dumps(stage.tenant.warning(node)) for node in nodes]
    again = [json.dumps(stage.tenant.warning(node)) for node in nodes]
    stage.aws.send_events(stage.queue, events * 10)
    await stage.until(emptied, 20)
    assert sorted(row.instance_id for row in await stage.interruptions()) == nodes
    await stage.tenant.rows(
        "UPDATE interruptions SET state = 'closed', outcome = 'handled', closed_at = now() "
        "WHERE customer_id = :customer_id AND state <> 'closed' RETURNING 1"
    )
    stage.aws.send_events(stage.queue, [*events, *again] * 3)
    await stage.until(emptied, 20)
    inbox = await stage.tenant.rows("SELECT outcome FROM inbox_messages WHERE customer_id = :customer_id")
    assert [row.outcome for row in inbox] == ["handled"] * 6
    assert [row.state for row in await stage.interruptions()] == ["closed"] * 3
    tasks = await stage.tenant.rows("SELECT 1 FROM agent_tasks WHERE customer_id = :customer_id")
    assert len(tasks) == 3
    stop.set()
    await asyncio.gather(*running)


@pytest.mark.parametrize(
    ("error", "word", "lasting"),
    [
        (
            AwsError("ReceiveMessage", "AWS.SimpleQueueService.NonExistentQueue", "", status=400),
            "create the queue",
            True,
        ),
        (AwsError("ReceiveMessage", "AccessDenied", "", status=403), "sqs:ReceiveMessage", True),
        (AwsError("AssumeRole", "AccessDenied", "", status=403), "external id", True),
        (AwsError("AssumeRole", "NoCredentials", ""), "credentials of its own", True),
        (AwsError("OwnCredentials", "Unreachable", "MetadataRetrievalError"), "instance or task role", False),
        (KeyError("Messages"), "worker's log", False),
        (AwsError("ReceiveMessage", "KMS.AccessDeniedException", "", status=400), "kms:Decrypt", True),
        (AwsError("ReceiveMessage", "RequestThrottled", "", status=403), "throttles", False),
        (AwsError("ReceiveMessage", "Unreachable", ""), "cannot be reached", False),
        (ValueError("sqs_queue_url 'x' is not a queue's address"), "sqs_queue_url", True),
    ],
)
def test_every_trouble_has_a_remedy(error: Exception, word: str, lasting: bool) -> None:
    trouble = explain(error)
    assert trouble.reason
    assert word in trouble.remedy
    assert trouble.lasting is lasting


def test_every_trouble_is_told_within_a_minute() -> None:
    """The follower looks every five seconds: 60 s less that is what a queue may keep us waiting."""
    lately = 60 - CUSTOMERS_SECONDS
    silent = Health(heard_at=0.0)
    assert silent.trouble(25.0) is None, "an idle long poll takes 20 s"
    told = silent.trouble(lately)
    assert told is not None
    assert "no answer" in told.reason
    throttled = Health(
        heard_at=0.0, receiving=explain(AwsError("ReceiveMessage", "ThrottlingException", "", status=400))
    )
    assert throttled.trouble(5.0) is None
    told = throttled.trouble(lately)
    assert told is not None
    assert "throttles" in told.remedy
    denied = Health(heard_at=0.0, receiving=explain(AwsError("ReceiveMessage", "AccessDenied", "", status=403)))
    assert denied.trouble(0.0) is not None


async def test_a_right_to_delete_that_is_missing_is_told_though_messages_arrive(stage: Stage, intake: Intake) -> None:
    fault = stage.aws.inject(
        Fault("error", action="DeleteMessageBatch", code="AccessDenied", message="no sqs:DeleteMessage", status=403,
              count=None)
    )  # fmt: skip
    (instance,) = await stage.launch_nodes()
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    await _drained(stage, stage.tenant, instance)

    async def state(wanted: str) -> bool:
        return (await _health(stage.tenant))[0] == wanted

    await stage.until(lambda: state("degraded"), 20)
    _, reason, remedy = await _health(stage.tenant)
    assert "no sqs:DeleteMessage" in str(reason)
    assert "sqs:DeleteMessage" in str(remedy)
    # Mended: the next message that is deleted shows it.
    stage.aws.clear_faults(fault)
    stage.aws.send_event(stage.queue, stage.tenant.rebalance(instance))
    await stage.until(lambda: state("ok"), 20)
    assert (await stage.tenant.row("SELECT status FROM customers WHERE id = :customer_id")).status == "active"


async def test_a_flood_of_one_customer_leaves_the_others_their_speed(stage: Stage, intake: Intake) -> None:
    quiet = await add_customer(stage)
    nodes = [await quiet.node() for _ in range(5)]
    await asyncio.sleep(0.5)
    flood = [json.dumps(stage.tenant.rebalance(f"i-{number:017x}")) for number in range(3000)]
    stage.aws.send_events(stage.queue, flood)
    waits = []
    for node in nodes:
        sent = time.monotonic()
        stage.aws.send_event(quiet.account_id, quiet.warning(node))
        await _drained(stage, quiet, node)
        waits.append(time.monotonic() - sent)
    assert sum(stage.aws.queue_depth(stage.queue)) > 0, "the flood was over before the others were measured"
    assert sorted(waits)[2] < 2.0, waits


@pytest.mark.parametrize(
    ("condition", "cause"),
    [("data_exception", "DataException"), ("program_limit_exceeded", "ProgramLimitExceeded")],
)
async def test_a_message_the_database_refuses_is_set_aside_and_blocks_nobody(
    stage: Stage, intake: Intake, condition: str, cause: str
) -> None:
    """A content nobody thought of: its neighbours of the same batch go on, it is kept with the reason."""
    bad, good = await stage.launch_nodes(2)

    async def kept() -> list:
        return await stage.tenant.rows(
            "SELECT reason, body FROM inbox_messages WHERE customer_id = :customer_id AND outcome = 'quarantined'"
        )

    async def emptied() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    async with refusing(stage.db, bad, condition):
        for instance in (bad, good):
            stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
        await _drained(stage, stage.tenant, good)
        ((reason, body),) = await stage.until(kept, 20)
        assert reason.startswith(f"unprocessable: {cause}")
        assert bad in body
        await stage.until(emptied, 20)


async def test_a_batch_full_of_what_the_database_refuses_is_over_within_its_visibility_timeout(
    stage: Stage, intake: Intake
) -> None:
    bad, good = await stage.tenant.nodes(2)
    async with refusing(stage.db, bad, "data_exception"):
        poison = [json.dumps(stage.tenant.warning(bad)) for _ in range(30)]
        stage.aws.send_events(stage.queue, [*poison, json.dumps(stage.tenant.warning(good))])

        async def emptied() -> bool:
            return stage.aws.queue_depth(stage.queue) == (0, 0)

        await stage.until(emptied, 11)
        await _drained(stage, stage.tenant, good)
        kept = await stage.tenant.rows("SELECT max(receive_count) AS n, count(*) AS kept FROM inbox_messages "
                                       "WHERE outcome = 'quarantined'")  # fmt: skip
        assert [tuple(row) for row in kept] == [(1, 30)]


async def test_a_batch_that_fails_again_and_again_is_taken_apart_and_told(stage: Stage, intake: Intake) -> None:
    """An error that says nothing of the content, while Postgres answers: the neighbours do not wait for ever."""
    bad, good = await stage.launch_nodes(2)
    (reader,) = await readers_of(stage, intake, stage.tenant)

    async def stuck() -> bool:
        return reader.trouble(time.monotonic() + DEGRADED_AFTER_SECONDS + 1) is not None

    async with refusing(stage.db, bad, "internal_error"):
        stage.aws.send_events(stage.queue, [json.dumps(stage.tenant.warning(instance)) for instance in (bad, good)])
        await _drained(stage, stage.tenant, good)
        stage.aws.send_event(stage.queue, stage.tenant.rebalance(bad))
        await stage.until(stuck, 30)
        assert reader.trouble(time.monotonic()) is None, "it may be over in a moment"


async def test_failing_credentials_of_the_server_are_told_and_end_nothing(
    stage: Stage, intake: Intake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program, a sign-in or the machine's role that gives the server its credentials fails for a while."""
    program = tmp_path / "credentials"
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {program}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    aws = AwsGateway(endpoint_url=stage.aws.url)
    with pytest.raises(AwsError) as failed:
        await aws.own_credentials()
    assert (failed.value.operation, failed.value.code, failed.value.definite) == (
        "OwnCredentials",
        "Unreachable",
        False,
    )
    # For customers that come from now on.
    intake.runtime = replace(intake.runtime, aws=aws)
    added = await add_customer(stage)

    async def failing() -> bool:
        found = intake.readers.get(added.customer_id)
        return found is not None and found.health.receiving is not None

    await stage.until(failing, 10)
    keys = stage.aws.credentials()
    answer = {"Version": 1, "AccessKeyId": keys.access_key_id, "SecretAccessKey": keys.secret_access_key}
    program.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    program.chmod(0o755)
    node = await added.node()
    stage.aws.send_event(added.account_id, added.warning(node))
    await _drained(stage, added, node)
    await aws.close()


async def test_pages_of_quarantine_skip_nothing_of_one_commit(stage: Stage) -> None:
    customer_id = stage.tenant.customer_id
    facts = await Facts(stage.db).of(customer_id)
    for source in (EventSource.SQS, EventSource.PUSH):
        await ingest(stage.db, facts, [Received(f"not json {number}", source) for number in range(7)])
    caller = Principal(customer_id, "test", Role.CUSTOMER_ADMIN, customer_id)
    found, before = [], None
    while page := await views.list_quarantine(stage.db, caller, customer_id=None, before=before, limit=3):
        found += page
        before = views.place(page[-1])
    assert len({message.id for message in found}) == len(found) == 14
    assert [message.received_at for message in found] == sorted((m.received_at for m in found), reverse=True)
    # A time, as before.
    (second,) = {message.received_at for message in found} - {found[0].received_at}
    for moment in (found[0].received_at, found[0].received_at.isoformat()):
        older = await views.list_quarantine(stage.db, caller, customer_id=None, before=moment, limit=100)
        assert {message.received_at for message in older} == {second}
    for broken in ("x", "2026-01-01T00:00:00Z~x", "~"):
        with pytest.raises(Invalid):
            await views.list_quarantine(stage.db, caller, customer_id=None, before=broken, limit=3)


async def test_a_worker_reads_its_queues_while_redis_is_silent(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis takes connections and says nothing: it is waited for by nobody, at start or between two commits."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        worker = Worker(
            settings_for(
                stage.database_url,
                f"redis://127.0.0.1:{silent.getsockname()[1]}/0",
                AWS_ENDPOINT_URL=stage.aws.url,
                CLOUDOPTIM_DEPLOYMENT_ID=DEPLOYMENT,
            )
        )
        first, second = await stage.tenant.nodes(2)
        stage.aws.send_event(stage.queue, stage.tenant.warning(first))
        started = time.monotonic()
        running = asyncio.create_task(worker.run())
        await _drained(stage, stage.tenant, first)
        assert time.monotonic() - started < 1.9
        stage.aws.send_event(stage.queue, stage.tenant.warning(second))
        await _drained(stage, stage.tenant, second)
        worker.stop.set()
        await running
