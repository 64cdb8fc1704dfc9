"""Each guarantee taken away, one at a time: in a worker before it is forked, and in this process where a test acts.

The names are those of RELIABILITY's list; what each breaks is said beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from control.agents import repository as tasks
from control.gateways import aws
from control.gateways.aws import AwsGateway
from control.interruptions import freezing, launch_repository, parsing
from control.interruptions.calling import Calls
from control.interruptions.intake import QueueReader
from warehouse.contracts import TaskResult
from warehouse.postgres import session

Mutation = Callable[[pytest.MonkeyPatch], None]


def no_client_token(patch: pytest.MonkeyPatch) -> None:
    original = freezing.run_instances_request

    def without_token(*args: Any, **options: Any) -> str:
        request = json.loads(original(*args, **options))
        del request["ClientToken"]
        return json.dumps(request)

    patch.setattr(freezing, "run_instances_request", without_token)
    patch.delitem(aws.EFFECTS, "RunInstances")
    patch.setattr(aws, "READS", (*aws.READS, "RunInstances"))


def naive_launcher(patch: pytest.MonkeyPatch) -> None:
    """A new token for every call, as code that keeps nothing has it (botocore's own default)."""
    original = Calls.call

    async def call(self: Calls, batch: Any, cluster: Any) -> None:
        request = json.loads(batch.request_json) | {"ClientToken": freezing.client_token()}
        await original(self, replace(batch, request_json=json.dumps(request)), cluster)

    patch.setattr(Calls, "call", call)


def delete_before_commit(patch: pytest.MonkeyPatch) -> None:
    original = QueueReader._take_in

    async def take_in(self: QueueReader, batch: Any) -> None:
        await self._delete([message.receipt_handle for message in batch])
        await original(self, batch)

    patch.setattr(QueueReader, "_take_in", take_in)


def no_epoch_check(patch: pytest.MonkeyPatch) -> None:
    """Agents' reports count under whatever epoch they were begun."""
    original = tasks.record_report

    async def any_epoch(conn: Any, *, cluster_id: Any, task_id: Any, report: TaskResult) -> Any:
        now = await conn.execute(text("SELECT lease_epoch FROM agent_tasks WHERE id = :id"), {"id": task_id})
        current = report.model_copy(update={"lease_epoch": now.scalar_one()})
        return await original(conn, cluster_id=cluster_id, task_id=task_id, report=current)

    patch.setattr(tasks, "record_report", any_epoch)


def no_launch_epoch_check(patch: pytest.MonkeyPatch) -> None:
    """Calls are made, and their answers count, under whatever epoch the launch was claimed."""
    called = str(launch_repository._CALLED).replace("AND lease_epoch = :lease_epoch", "AND :lease_epoch > 0")
    patch.setattr(launch_repository, "_CALLED", text(called))
    original = Calls.record

    async def any_epoch(self: Calls, batch: Any, *args: Any, **options: Any) -> None:
        async with self.runtime.db.system() as conn:
            locked = await launch_repository.lock_batch(conn, batch.id)
        assert locked is not None
        await original(self, replace(batch, lease_epoch=locked[0].lease_epoch), *args, **options)

    patch.setattr(Calls, "record", any_epoch)


def no_row_level_security(patch: pytest.MonkeyPatch) -> None:
    """The policy is the database's: ``DATABASES`` takes it away."""


def set_instead_of_set_local(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "_SCOPE", text(str(session._SCOPE).replace(", true)", ", false)")))


def no_pagination(patch: pytest.MonkeyPatch) -> None:
    async def first_page(self: AwsGateway, service: str, operation: str, parameters: Any, result: str, **options: Any):
        page = await self.call(service, operation, parameters, **options)
        for item in page.get(result, []):
            yield item

    patch.setattr(AwsGateway, "pages", first_page)


def trusted_body(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parsing, "_origin", lambda document, *_: (document["account"], document["region"]))


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        naive_launcher,
        no_client_token,
        delete_before_commit,
        no_epoch_check,
        no_launch_epoch_check,
        no_row_level_security,
        set_instead_of_set_local,
        no_pagination,
        trusted_body,
    )
}
# What the trials find without it: the field of their summary that is not zero any more.
FOUND_AS = {
    "naive_launcher": "duplicates",
    "no_client_token": "duplicates",
    "delete_before_commit": "lost",
    "no_epoch_check": "stale_reports_applied",
    "no_launch_epoch_check": "stale_answers_applied",
    "no_row_level_security": "seen_of_others",
    "set_instead_of_set_local": "carried_over",
    "no_pagination": "unfound",
    "trusted_body": "acted_on_forged",
}
# For the zygote: applied for good.
WORKERS: dict[str, Callable[[], None]] = {
    name: partial(mutation, pytest.MonkeyPatch()) for name, mutation in MUTATIONS.items()
}
DATABASES = {"no_row_level_security": "ALTER TABLE interruptions DISABLE ROW LEVEL SECURITY"}
