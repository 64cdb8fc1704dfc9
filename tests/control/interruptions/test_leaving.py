"""What a worker that leaves, freezes or is slow still holds: given back, taken over, or kept by a heartbeat."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from control.gateways.aws import AwsGateway, Role
from control.interruptions import intake as intake_module
from control.interruptions import launch_repository
from control.interruptions.answers import Meaning, Reading
from control.interruptions.intake import Held, QueueReader, Source
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.runtime import Runtime
from control.interruptions.service import Facts, Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from warehouse.contracts import EventSource


@pytest.fixture
async def aws(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AwsGateway]:
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    gateway = AwsGateway(endpoint_url=stage.aws.url)
    yield gateway
    await gateway.close()


def _launcher(stage: Stage, aws: AwsGateway, worker: str) -> Launcher:
    return Launcher(Runtime(stage.db, stage.db, aws, stage.bells, worker, DEPLOYMENT))


async def _reader(stage: Stage, aws: AwsGateway) -> QueueReader:
    customer = await stage.tenant.row("SELECT * FROM customers WHERE id = :customer_id")
    role = Role(customer.id, customer.aws_role_arn, str(customer.external_id))
    runtime = Runtime(stage.db, stage.db, aws, stage.bells, "reader", DEPLOYMENT)
    source = Source(customer.id, customer.sqs_queue_url, role)
    return QueueReader(runtime, Facts(stage.db), source, asyncio.Semaphore(1), Held())


@asynccontextmanager
async def _nothing_commits(database_url: str) -> AsyncIterator[None]:
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute("LOCK TABLE inbox_messages IN EXCLUSIVE MODE")
        yield
        await connection.rollback()


async def _received(stage: Stage) -> bool:
    return stage.aws.queue_depth(stage.queue) == (0, 1)


async def _warned(stage: Stage) -> str:
    (instance,) = await stage.launch_nodes()
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    return instance


# --- leaving


async def test_what_a_worker_received_it_takes_in_before_it_leaves(
    stage: Stage, aws: AwsGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "CUT_SECONDS", 0.2)
    reader = await _reader(stage, aws)
    async with _nothing_commits(stage.database_url):
        await _warned(stage)
        await stage.until(lambda: _received(stage))
        closing = asyncio.create_task(reader.close())
        await asyncio.sleep(2 * intake_module.CUT_SECONDS)
        assert not closing.done()
    await closing
    assert len(await stage.interruptions()) == 1
    assert stage.aws.queue_depth(stage.queue) == (0, 0)


async def test_what_it_cannot_take_in_is_visible_to_others_at_once(
    stage: Stage, aws: AwsGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "CUT_SECONDS", 0.2)
    monkeypatch.setattr(intake_module, "CLOSE_SECONDS", 0.2)
    reader = await _reader(stage, aws)
    async with _nothing_commits(stage.database_url):
        await _warned(stage)
        await stage.until(lambda: _received(stage))
        await reader.close()
        assert stage.aws.queue_depth(stage.queue) == (1, 0)
    assert await stage.interruptions() == []


async def test_a_launch_a_leaving_worker_cannot_finish_is_taken_over_at_once(stage: Stage, aws: AwsGateway) -> None:
    leaving, other = _launcher(stage, aws, "leaving"), _launcher(stage, aws, "other")
    await _warn_by_hand(stage)
    # Applied, and the answer never comes.
    stage.aws.inject(Fault("hang_after", action="RunInstances"))
    await leaving.plan_round()
    await stage.until(lambda: _called(stage))
    assert await launch_reconciler.run_once(other) == 0
    await leaving.leave()
    assert await launch_reconciler.run_once(other) == 1
    attempt = await stage.tenant.row("SELECT * FROM launch_attempts")
    assert (attempt.state, [attempt.instance_id]) == ("launched", [i.instance_id for i in stage.ours()])


async def test_claims_that_led_to_nothing_yet_are_given_back(stage: Stage, aws: AwsGateway) -> None:
    leaving, other = _launcher(stage, aws, "leaving"), _launcher(stage, aws, "other")
    await _warn_by_hand(stage)
    async with stage.db.system() as conn:
        assert len(await launch_repository.claim_intents(conn, worker="leaving", limit=10)) == 1
    assert await other.plan_round() == 0
    await leaving.leave()
    assert await other.plan_round() == 1
    await other.finish_calls(10)
    assert len(stage.ours()) == 1


# --- holding on


async def test_a_slow_call_is_kept_by_its_heartbeat(
    stage: Stage, aws: AwsGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_repository, "LEASE_SECONDS", 1)
    monkeypatch.setattr(launch_repository, "HEARTBEAT_SECONDS", 0.2)
    slow, other = _launcher(stage, aws, "slow"), _launcher(stage, aws, "other")
    await _warn_by_hand(stage)
    stage.aws.inject(Fault("delay", action="RunInstances", seconds=1.8))
    await slow.plan_round()
    finished = asyncio.create_task(slow.finish_calls(10))
    while not finished.done():
        assert await launch_reconciler.run_once(other) == 0
        await asyncio.sleep(0.1)
    batch = await stage.tenant.row("SELECT * FROM launch_batches")
    assert (batch.state, batch.calls, batch.lease_epoch) == ("answered", 1, 1)


@pytest.mark.parametrize(
    "reading",
    [
        Reading(Meaning.UNKNOWN, "Unanswered", "ReadTimeout"),
        Reading(Meaning.REFUSED, "InsufficientInstanceCapacity", "none left"),
    ],
    ids=lambda reading: reading.meaning.value,
)
async def test_the_answer_of_a_lease_that_passed_on_writes_nothing(
    stage: Stage, aws: AwsGateway, reading: Reading
) -> None:
    zombie = _launcher(stage, aws, "zombie")
    await _warn_by_hand(stage)
    stage.aws.inject(Fault("hang_after", action="RunInstances"))
    await zombie.plan_round()
    await stage.until(lambda: _called(stage))
    await stage.pass_leases()
    held = await _held(stage, worker="zombie")
    taken = await _held(stage, worker="other", claim=True)
    before = await _versions(stage)
    await zombie.calls.record(held, reading)
    async with stage.db.system() as conn:
        assert not await launch_repository.note_call(conn, held)
        assert not await launch_repository.keep_batch(conn, held)
    assert await _versions(stage) == before
    # Not because such writes do nothing: the holder of now may.
    async with stage.db.system() as conn:
        assert await launch_repository.keep_batch(conn, taken)
    assert await _versions(stage) != before
    await zombie.leave()


async def _warn_by_hand(stage: Stage) -> None:
    """An interruption with its launch intent, without a queue."""
    (instance,) = await stage.launch_nodes()
    message = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [message])


async def _called(stage: Stage) -> list[Any]:
    return await stage.tenant.rows("SELECT 1 FROM launch_batches WHERE calls > 0")


async def _held(stage: Stage, *, worker: str, claim: bool = False) -> launch_repository.BatchRow:
    async with stage.db.system() as conn:
        if claim:
            (row,) = await launch_repository.claim_batches(conn, worker=worker, limit=1)
            return row
        batch = await stage.tenant.row("SELECT id FROM launch_batches")
        found = await launch_repository.lock_batch(conn, batch.id)
    assert found is not None
    return found[0]


async def _versions(stage: Stage) -> list[Any]:
    """Every row of the launch branch with the transaction that wrote it."""
    return await stage.tenant.rows(
        "SELECT 'launch_batches', id, CAST(xmin AS text) FROM launch_batches UNION ALL "
        "SELECT 'launch_intents', id, CAST(xmin AS text) FROM launch_intents UNION ALL "
        "SELECT 'launch_attempts', id, CAST(xmin AS text) FROM launch_attempts"
    )
