"""Which of Dagster's runs may go: old ones that neither a partition's state nor a schedule is read from."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, cast

import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionsFilter, BulkActionStatus
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable
from dagster._core.storage.runs import SqlRunStorage
from dagster._core.storage.runs.schema import RunsTable


def forgettable_runs(instance: DagsterInstance, before: datetime, limit: int) -> list[str]:
    """Ids of the oldest runs that ended and were made before that time, at most ``limit``.

    Dagster's page tells a partition's state from the newest materialisation of it and from the newest attempt at one,
    and deleting a run deletes its events: a run that holds one of those stays. So do the runs of a backfill that is
    under way, and the newest run and the newest successful run of each job, from which schedules read when it is due.
    """
    needed = {*_newest_of_partitions(instance), *_of_backfills_under_way(instance), *_newest_of_jobs(instance)}
    ended = sa.select(RunsTable.c.run_id).where(
        RunsTable.c.status.in_([status.value for status in FINISHED_STATUSES]),
        RunsTable.c.create_timestamp < before.astimezone(UTC).replace(tzinfo=None),
    )
    found: list[str] = []
    for (run_id,) in _runs(instance, ended.order_by(RunsTable.c.id)):
        if run_id not in needed:
            found.append(run_id)
            if len(found) == limit:
                break
    return found


def _newest_of_partitions(instance: DagsterInstance) -> Iterator[str]:
    events = SqlEventLogStorageTable
    newest = (
        sa.select(sa.func.max(events.c.id))
        .where(events.c.dagster_event_type.in_(["ASSET_MATERIALIZATION", "ASSET_MATERIALIZATION_PLANNED"]))
        .group_by(events.c.asset_key, events.c.partition, events.c.dagster_event_type)
    )
    storage = cast(SqlEventLogStorage, instance.event_log_storage)
    with storage.index_connection() as connection:
        rows = connection.execute(sa.select(events.c.run_id).where(events.c.id.in_(newest)).distinct()).fetchall()
    yield from (row[0] for row in rows)


def _of_backfills_under_way(instance: DagsterInstance) -> Iterator[str]:
    under_way = [status for status in BulkActionStatus if status not in BULK_ACTION_TERMINAL_STATUSES]
    for backfill in instance.get_backfills(filters=BulkActionsFilter(statuses=under_way)):
        yield from instance.get_run_ids(RunsFilter.for_backfill(backfill.backfill_id))


def _newest_of_jobs(instance: DagsterInstance) -> Iterator[str]:
    for where in (sa.true(), RunsTable.c.status == DagsterRunStatus.SUCCESS.value):
        newest = sa.select(sa.func.max(RunsTable.c.id)).where(where).group_by(RunsTable.c.pipeline_name)
        yield from (row[0] for row in _runs(instance, sa.select(RunsTable.c.run_id).where(RunsTable.c.id.in_(newest))))


def _runs(instance: DagsterInstance, query: Any) -> list[Any]:
    with cast(SqlRunStorage, instance.run_storage).connect() as connection:
        return list(connection.execute(query).fetchall())
