"""The checks can fail: each guarantee is taken away, and the scenario that guards it must notice.

Every scenario answers with what it found wrong; without the mutation that is nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from control.gateways.aws import AwsGateway
from control.interruptions import intake as intake_module
from control.interruptions import launching, parsing
from control.interruptions.intake import QueueReader, Source
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers import missed
from control.interruptions.runtime import Runtime
from control.interruptions.service import Facts, Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.tenants import create_tenant
from warehouse.contracts import EventSource
from warehouse.postgres import session

Scenario = Callable[[Stage, Launcher], Awaitable[list[str]]]
Mutation = Callable[[pytest.MonkeyPatch, Stage], Awaitable[None]]


@pytest.fixture
async def launcher(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Launcher]:
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    aws = AwsGateway(endpoint_url=stage.aws.url)
    yield Launcher(Runtime(stage.db, stage.db, aws, stage.bells, "mutant", DEPLOYMENT))
    await aws.close()


# --- scenarios


async def one_instance_after_a_lost_answer(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    stage.aws.inject(Fault("drop_after", action="RunInstances"))
    message = Received(json.dumps(stage.tenant.warning(instance)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [message])
    for _ in range(3):
        await launcher.plan_round()
        await launcher.finish_calls(10)
        await stage.tenant.rows("UPDATE launch_batches SET next_action_at = now(), lease_until = NULL RETURNING 1")
        await stage.tenant.rows("UPDATE launch_intents SET next_action_at = now() RETURNING 1")
        await launch_reconciler.run_once(launcher)
    alive = stage.ours(alive=True)
    return [] if len(alive) == 1 else [f"{len(alive)} instances for one intent"]


async def nothing_is_deleted_that_is_not_committed(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    customer = await stage.tenant.row("SELECT * FROM customers WHERE id = :customer_id")
    role = intake_module.Role(customer.id, customer.aws_role_arn, str(customer.external_id))
    original, calls = intake_module.ingest, 0

    async def postgres_dies_once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OperationalError("INSERT", {}, Exception("the server closed the connection"))
        return await original(*args, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(intake_module, "ingest", postgres_dies_once)
    reader = QueueReader(launcher.runtime, Facts(stage.db), Source(customer.id, customer.sqs_queue_url, role))
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    try:
        async with asyncio.timeout(10):
            while calls == 0:  # noqa: ASYNC110 - the reader's doing
                await asyncio.sleep(0.02)
        # A process that dies now knows nothing; the message must still be there.
        await reader.close()
    finally:
        patch.undo()
    kept = sum(stage.aws.queue_depth(stage.queue)) + len(await stage.interruptions())
    return [] if kept == 1 else ["a message is neither in the queue nor in the database"]


async def every_ended_instance_is_found(stage: Stage, launcher: Launcher) -> list[str]:
    instances = await stage.launch_nodes(3)
    stage.aws._ec2.describe_page_size = 1
    for instance in instances:
        stage.aws.terminate(instance, reason="Server.SpotInstanceTermination")
    await missed.run_once(launcher)
    found = {row.instance_id for row in await stage.interruptions()}
    return [f"{instance} was not found" for instance in instances if instance not in found]


async def a_foreign_account_is_refused(stage: Stage, launcher: Launcher) -> list[str]:
    (instance,) = await stage.launch_nodes()
    forged = stage.tenant.warning(instance, account="999999999999")
    await ingest(stage.db, await stage.tenant.facts(), [Received(json.dumps(forged), EventSource.SQS)])
    return [f"acted on {row.instance_id}" for row in await stage.interruptions()]


async def a_tenant_sees_its_own_only(stage: Stage, launcher: Launcher) -> list[str]:
    other = await create_tenant(stage.db)
    theirs = await other.node()
    await ingest(stage.db, await other.facts(), [Received(json.dumps(other.warning(theirs)), EventSource.SQS)])
    async with stage.db.tenant(stage.tenant.customer_id) as conn:
        rows = (await conn.execute(text("SELECT instance_id FROM interruptions"))).all()
    return [f"saw {row.instance_id}" for row in rows]


async def a_connection_carries_nothing_over(stage: Stage, launcher: Launcher) -> list[str]:
    single = session.Database(stage.database_url, pool_size=1, max_overflow=0)
    async with single.tenant(stage.tenant.customer_id):
        pass
    async with single.engine.begin() as conn:
        left = (await conn.execute(text("SELECT current_setting('app.customer_id', true)"))).scalar_one()
        role = (await conn.execute(text("SELECT current_user"))).scalar_one()
    await single.close()
    return [f"the next transaction is {left or role}"] if left or role == session.TENANT_ROLE else []


# --- mutations


async def no_client_token(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    original = launching.run_instances_request

    def without_token(*args: Any, **options: Any) -> str:
        request = json.loads(original(*args, **options))
        del request["ClientToken"]
        return json.dumps(request)

    patch.setattr(launching, "run_instances_request", without_token)


async def naive_launcher(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    """A new token for every call, as code that keeps nothing has it."""
    original = Launcher.call

    async def call(self: Launcher, batch: Any, cluster: Any) -> None:
        from dataclasses import replace

        request = json.loads(batch.request_json) | {"ClientToken": launching.client_token()}
        await original(self, replace(batch, request_json=json.dumps(request)), cluster)

    patch.setattr(Launcher, "call", call)


async def delete_before_commit(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    original = QueueReader._take_in

    async def take_in(self: QueueReader, batch: Any) -> None:
        await self._delete([message.receipt_handle for message in batch])
        await original(self, batch)

    patch.setattr(QueueReader, "_take_in", take_in)


async def no_pagination(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    async def first_page(self: AwsGateway, service: str, operation: str, parameters: Any, result: str, **options: Any):
        page = await self.call(service, operation, parameters, **options)
        for item in page.get(result, []):
            yield item

    patch.setattr(AwsGateway, "pages", first_page)


async def trusted_body(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    patch.setattr(parsing, "_origin", lambda document, *_: (document["account"], document["region"]))


async def no_row_level_security(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    async with stage.db.engine.begin() as conn:
        await conn.execute(text("ALTER TABLE interruptions DISABLE ROW LEVEL SECURITY"))


async def set_instead_of_set_local(patch: pytest.MonkeyPatch, stage: Stage) -> None:
    patch.setattr(
        session,
        "_SCOPE",
        text("SELECT set_config('role', :role, false), set_config('app.customer_id', :customer_id, false)"),
    )


GUARDS: list[tuple[Scenario, Mutation]] = [
    (one_instance_after_a_lost_answer, no_client_token),
    (one_instance_after_a_lost_answer, naive_launcher),
    (nothing_is_deleted_that_is_not_committed, delete_before_commit),
    (every_ended_instance_is_found, no_pagination),
    (a_foreign_account_is_refused, trusted_body),
    (a_tenant_sees_its_own_only, no_row_level_security),
    (a_connection_carries_nothing_over, set_instead_of_set_local),
]


@pytest.mark.parametrize(
    "scenario", dict.fromkeys(scenario for scenario, _ in GUARDS), ids=lambda scenario: scenario.__name__
)
async def test_the_guarantee_holds(stage: Stage, launcher: Launcher, scenario: Scenario) -> None:
    assert await scenario(stage, launcher) == []


@pytest.mark.parametrize(("scenario", "mutation"), GUARDS, ids=lambda value: value.__name__)
async def test_without_it_the_check_fails(
    stage: Stage, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, mutation: Mutation
) -> None:
    await mutation(monkeypatch, stage)
    assert await scenario(stage, launcher) != []
