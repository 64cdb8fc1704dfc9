"""Queues: broken ones are told about and leave the others alone, customers come and go, floods are taken in batches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from control.gateways.aws import AwsError, AwsGateway
from control.interruptions.intake import CUSTOMERS_SECONDS, Health, Intake, explain
from control.interruptions.runtime import Runtime
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.corpus import cases
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.tenants import Tenant, create_tenant


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

    async def deleted() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await _drained(stage, stage.tenant, instance)
    await stage.until(deleted, 40)
    row = await stage.tenant.row("SELECT receive_count FROM inbox_messages")
    assert row.receive_count >= 2
    assert len(await stage.interruptions()) == 1


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
        (AwsError("ReceiveMessage", "KMS.AccessDeniedException", "", status=400), "kms:Decrypt", True),
        (AwsError("ReceiveMessage", "RequestThrottled", "", status=403), "throttles", False),
        (AwsError("ReceiveMessage", "Unreachable", ""), "cannot be reached", False),
        (ValueError("sqs_queue_url 'x' is not a queue's address"), "sqs_queue_url", True),
    ],
)
def test_every_trouble_has_a_remedy(error: AwsError | ValueError, word: str, lasting: bool) -> None:
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


async def test_a_message_the_database_refuses_is_set_aside_and_blocks_nobody(stage: Stage, intake: Intake) -> None:
    """A content nobody thought of: its neighbours of the same batch go on, it is kept with the reason."""
    bad, good = await stage.launch_nodes(2)
    async with stage.db.system() as conn:
        await conn.execute(text("RESET ROLE"))
        await conn.execute(
            text(
                f"""
                CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN
                    IF NEW.instance_id = '{bad}' THEN
                        RAISE EXCEPTION 'no such text' USING ERRCODE = 'data_exception';
                    END IF;
                    RETURN NEW;
                END $$
                """
            )
        )
        await conn.execute(
            text("CREATE TRIGGER refuse BEFORE INSERT ON interruptions FOR EACH ROW EXECUTE FUNCTION refuse()")
        )
    for instance in (bad, good):
        stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    await _drained(stage, stage.tenant, good)

    async def kept() -> list:
        return await stage.tenant.rows(
            "SELECT reason, body FROM inbox_messages WHERE customer_id = :customer_id AND outcome = 'quarantined'"
        )

    ((reason, body),) = await stage.until(kept, 20)
    assert reason.startswith("unprocessable: DataException")
    assert bad in body

    async def emptied() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(emptied, 20)
