"""Keep Postgres and the lake small: nothing is dropped before the lake holds it."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import dagster as dg
from sqlalchemy import TextClause, text

from cloudoptim_pipelines import coverage
from cloudoptim_pipelines.defs.maintenance.runs import forgettable_runs
from cloudoptim_pipelines.defs.metrics.assets import KEEP_1H, KEEP_5M
from cloudoptim_pipelines.partitions import DAY, day_start
from cloudoptim_pipelines.policies import OWNERS, RETRY
from cloudoptim_pipelines.resources import Warehouse, code_version
from warehouse.lake.maintenance import compact, vacuum

# Agents may send again what is a day late; a week leaves time to mend a broken pipeline.
RAW_KEPT = timedelta(days=7)
LAKE_PARTITIONS_AHEAD = timedelta(days=3)
# SQS keeps a message for two weeks at most and EventBridge repeats one for a day: by then nobody delivers it again. The
# events themselves stay, here and in the lake; so does what is in quarantine, until somebody replays it.
MESSAGES_KEPT = timedelta(days=30)
# Thirteen months, as long as the lake's log: a year's report can be checked against what was received and done.
RECORDS_KEPT = timedelta(days=400)
# Tasks of no interruption: their outcome is in the plan they belong to, and in what the agent said since.
OTHER_TASKS_KEPT = timedelta(days=90)
# Dagster's own log of runs; what its page says of partitions is kept whole.
RUNS_KEPT = timedelta(days=30)
# Each delete is a transaction of its own: none holds locks for long, and a killed run loses one.
BATCH = 5_000
RUNS_A_DAY = 3_000


@dg.asset(
    retry_policy=RETRY, group_name="maintenance", owners=OWNERS, kinds={"postgres"}, tags={"domain": "maintenance"}
)
def metric_retention(warehouse: Warehouse) -> dg.MaterializeResult:
    """Drops raw samples older than a week that the lake holds, and old summaries; makes the next days' partitions."""
    today = warehouse.now().date()
    with warehouse.database.system() as connection:
        kept_from = droppable_before(
            today,
            _oldest_raw_day(connection),
            {row.partition_key: row for row in coverage.load(connection, "metric_5m")},
        )
        connection.execute(
            text("SELECT ensure_metric_partitions(:first, :last)"),
            {"first": today, "last": today + LAKE_PARTITIONS_AHEAD},
        )
        dropped = connection.execute(text("SELECT drop_metric_partitions(:before)"), {"before": kept_from}).scalar_one()
        summaries = 0
        for resolution, keep in (("5m", KEEP_5M), ("1h", KEEP_1H)):
            summaries += connection.execute(
                text("DELETE FROM metrics_summary WHERE resolution = :r AND timestamp < :before"),
                {"r": resolution, "before": day_start(today) - keep},
            ).rowcount
        batches = connection.execute(
            text("DELETE FROM metric_batches WHERE received_at < :before"), {"before": day_start(today) - RAW_KEPT}
        ).rowcount
    return dg.MaterializeResult(
        metadata={"days_dropped": dropped, "summaries_deleted": summaries, "batches_deleted": batches}
    )


@dg.asset(
    retry_policy=RETRY, group_name="maintenance", owners=OWNERS, kinds={"postgres"}, tags={"domain": "maintenance"}
)
def inbox_retention(warehouse: Warehouse) -> dg.MaterializeResult:
    """Forgets messages that were handled or dropped longer ago than any source can repeat them."""
    before = warehouse.now() - MESSAGES_KEPT
    with warehouse.database.system() as connection:
        deleted = connection.execute(
            text("DELETE FROM inbox_messages WHERE outcome IN ('handled', 'dropped') AND received_at < :before"),
            {"before": before},
        ).rowcount
    return dg.MaterializeResult(metadata={"messages_deleted": deleted})


# What is open is not old, whatever its age.
_FORGET_TASKS = text(
    """
    DELETE FROM agent_tasks WHERE id IN (
        SELECT t.id FROM agent_tasks t
        LEFT JOIN interruptions i ON i.customer_id = t.customer_id AND i.id = t.interruption_id
        WHERE t.state NOT IN ('queued', 'leased')
          AND (i.state IS NULL OR i.state = 'closed')
          AND t.created_at < CASE WHEN t.interruption_id IS NULL THEN CAST(:others AS timestamptz)
                                  ELSE CAST(:interruptions AS timestamptz) END
        LIMIT :batch
    )
    """
)
_FORGET_NOTIFICATIONS = text(
    """
    DELETE FROM notifications WHERE id IN (
        SELECT id FROM notifications WHERE state = 'sent' AND created_at < :before LIMIT :batch
    )
    """
)
_OLD_EVENTS = text(
    """
    SELECT e.id::text AS id, e.received_at FROM spot_events e
    LEFT JOIN interruptions i ON i.customer_id = e.customer_id AND i.id = e.interruption_id
    WHERE e.received_at < :before AND (i.state IS NULL OR i.state = 'closed')
      AND (e.received_at, e.id) > (:at, CAST(:id AS uuid))
    ORDER BY e.received_at, e.id LIMIT :batch
    """
)
_HELD = "SELECT event_id FROM events WHERE event_id IN (SELECT unnest($ids))"


@dg.asset(
    retry_policy=RETRY, group_name="maintenance", owners=OWNERS, kinds={"postgres"}, tags={"domain": "maintenance"}
)
def record_retention(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Forgets ended tasks, sent notifications, events that the lake holds, and Dagster's superseded runs, when old."""
    now = warehouse.now()
    tasks = _forget(warehouse, _FORGET_TASKS, others=now - OTHER_TASKS_KEPT, interruptions=now - RECORDS_KEPT)
    notifications = _forget(warehouse, _FORGET_NOTIFICATIONS, before=now - RECORDS_KEPT)
    events = _forget_events(warehouse, now - RECORDS_KEPT)
    runs = forgettable_runs(context.instance, now - RUNS_KEPT, RUNS_A_DAY)
    for run_id in runs:
        context.instance.delete_run(run_id)
    return dg.MaterializeResult(
        metadata={
            "tasks_deleted": tasks,
            "notifications_deleted": notifications,
            "events_deleted": events,
            "runs_deleted": len(runs),
        }
    )


def _forget(warehouse: Warehouse, statement: TextClause, **given: datetime) -> int:
    total = 0
    while True:
        with warehouse.database.system() as connection:
            deleted = connection.execute(statement, {**given, "batch": BATCH}).rowcount
        total += deleted
        if deleted < BATCH:
            return total


def _forget_events(warehouse: Warehouse, before: datetime) -> int:
    """Old events go as soon as the lake holds them; one it does not hold stays until it does."""
    deleted = 0
    position: dict[str, Any] = {"at": datetime.min.replace(tzinfo=UTC), "id": UUID(int=0)}
    while True:
        with warehouse.database.system() as connection:
            rows = connection.execute(_OLD_EVENTS, {"before": before, "batch": BATCH, **position}).all()
        if not rows:
            return deleted
        position = {"at": rows[-1].received_at, "id": rows[-1].id}
        held = warehouse.reader.pin().frame(_HELD, {"ids": [row.id for row in rows]}, all_customers=True)
        with warehouse.database.system() as connection:
            deleted += connection.execute(
                text("DELETE FROM spot_events WHERE id = ANY(CAST(:ids AS uuid[]))"),
                {"ids": held["event_id"].to_list()},
            ).rowcount


def droppable_before(today: date, oldest: date | None, covered: dict[str, coverage.Coverage]) -> date:
    """Raw days before this one may go: older than a week, and no day before it is missing in the lake."""
    limit = today - RAW_KEPT
    day = min(oldest or limit, limit)
    while day < limit:
        row = covered.get(day.isoformat())
        if row is None or row.end < day_start(day) + DAY:
            break
        day += DAY
    return day


def _oldest_raw_day(connection) -> date | None:
    found = connection.execute(text("SELECT min(ts) FROM metric_samples")).scalar_one()
    return found.date() if found else None


# Tables whose running day is written every few minutes leave one file per partition; only appends in parts need this.
COMPACTED = ("spot_prices", "metric_5m")


@dg.asset(
    retry_policy=RETRY, group_name="maintenance", owners=OWNERS, kinds={"deltalake"}, tags={"domain": "maintenance"}
)
def lake_maintenance(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Rolls back what a killed writer left, joins small files, removes files that no readable or kept release needs."""
    # The next commit to a table would roll it back too; a table nobody writes to any more has no next commit.
    repaired = warehouse.lake.repair()
    reader = warehouse.reader
    compacted = sum(
        len(compact(warehouse.lake, reader, table, run_id=context.run.run_id, code_version=code_version()))
        for table in COMPACTED
    )
    report = vacuum(warehouse.lake)
    return dg.MaterializeResult(
        metadata={
            "tables_repaired": repaired,
            "partitions_compacted": compacted,
            "files_removed": sum(len(files) for files in report.files.values()),
            "releases_expired": len(report.expired),
        }
    )
