"""Agents' metrics: from their raw landing in Postgres to five-minute windows in the lake, and to summaries."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import dagster as dg
import polars as pl
from sqlalchemy import text

from cloudoptim_pipelines import coverage, stale
from cloudoptim_pipelines.arrow import arrow_rows
from cloudoptim_pipelines.defs.gaps import ledger
from cloudoptim_pipelines.defs.metrics import windows
from cloudoptim_pipelines.defs.metrics.interpolation import interpolate
from cloudoptim_pipelines.merging import merge
from cloudoptim_pipelines.partitions import DAY, by_day, day_start, days_of
from cloudoptim_pipelines.policies import FILL_TAG, OWNERS, RETRY, SINGLE_RUN
from cloudoptim_pipelines.resources import Warehouse
from warehouse.lake.computed import load_model
from warehouse.lake.query import LakeReader
from warehouse.lake.store import PartitionWrite

TABLE = "metric_5m"
KEY = ["customer_id", "cluster_id", "metric", "subject", "ts"]
# A refresh of the running day reads again what came in since shortly before the last one. A sample that is later than
# this marks its day dirty, and the day is then read whole.
REFRESH_OVERLAP = timedelta(minutes=15)


@dg.asset(
    partitions_def=by_day,
    backfill_policy=SINGLE_RUN,
    retry_policy=RETRY,
    group_name="metrics",
    owners=OWNERS,
    kinds={"postgres", "duckdb", "deltalake"},
    tags={"domain": "metrics"},
)
def metric_5m(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Agents' metrics in windows of five minutes: smallest, mean, largest and last value, in base units."""
    reader = warehouse.reader
    fill_id = context.run.tags.get(FILL_TAG)
    rows = filled = 0
    for day in (day for days in days_of(context.partition_keys) for day in days.days()):
        with coverage.partition_locks(warehouse.database, TABLE, [day.isoformat()]):
            frame, made_up = _replace_day(warehouse, reader, day, context.run.run_id, fill_id)
        rows += frame.height
        filled += made_up
    with warehouse.database.system() as connection:
        gaps = ledger.sync(connection, TABLE, now=warehouse.now(), keys=list(context.partition_keys))
        sources = ["interpolated"] if filled else []
        ledger.record(connection, context.run.tags, records=filled, sources=sources, now=warehouse.now())
    return dg.MaterializeResult(
        metadata={
            "dagster/partition_row_count": rows,
            "rows_interpolated": filled,
            "open_gaps": sum(gap.fillable for gap in gaps),
            "partitions": len(context.partition_keys),
        }
    )


def _replace_day(
    warehouse: Warehouse, reader: LakeReader, day: date, run_id: str, fill_id: str | None
) -> tuple[pl.DataFrame, int]:
    now = warehouse.now()
    start, end = day_start(day), day_start(day) + DAY
    with warehouse.database.system() as connection:
        # Read before the samples: a mark made after this is for the next run.
        marks = stale.marks(connection, TABLE, [day.isoformat()])
        written = coverage.load(connection, TABLE, keys=[day.isoformat()])
    read_from = start
    if written and not marks and not fill_id and start <= now < end:
        read_from = max(start, windows.window_start(min(row.end for row in written) - REFRESH_OVERLAP))
    observed = _windows(warehouse, reader, read_from, end)
    existing = _existing(reader, day)
    rows = merge(existing, observed, KEY)
    made_up = 0
    if fill_id:
        filling = interpolate(rows, day_end=min(end, now), run_id=run_id, filled_at=now)
        made_up = filling.height
        rows = merge(rows, filling, KEY) if made_up else rows
    warehouse.publish([PartitionWrite(TABLE, {"day": day}, rows)], run_id)
    with warehouse.database.system() as connection:
        coverage.save(connection, _coverage(connection, rows, day, now, read_from, run_id))
        stale.settle(connection, TABLE, marks)
    return rows, made_up


def _windows(warehouse: Warehouse, reader: LakeReader, start: datetime, end: datetime) -> pl.DataFrame:
    """Raw samples from ``start`` to ``end`` as five-minute rows; they stream from Postgres into DuckDB."""
    query = (
        "SELECT customer_id::text, cluster_id::text, metric, subject, ts, value, received_at FROM metric_samples "
        f"WHERE ts >= {sql_time(start)} AND ts < {sql_time(end)}"
    )
    with (
        arrow_rows(warehouse.dsn, query) as samples,
        reader.cursor(reader.pin().release, "all", None) as cursor,
    ):
        cursor.register("samples", samples)
        frame = pl.DataFrame(pl.from_arrow(cursor.sql(load_model("metric_5m").sql).to_arrow_table()))
    return frame.with_columns(pl.col("ts").dt.convert_time_zone("UTC"))


def sql_time(at: datetime) -> str:
    """A time as an SQL literal."""
    return f"TIMESTAMPTZ '{at.astimezone(UTC).isoformat()}'"


def _existing(reader: LakeReader, day: date) -> pl.DataFrame:
    return reader.pin().frame(
        "SELECT * EXCLUDE (day) FROM metric_5m WHERE day = $day", {"day": day}, all_customers=True
    )


def _coverage(
    connection: Any, rows: pl.DataFrame, day: date, now: datetime, read_from: datetime, run_id: str
) -> list[coverage.Coverage]:
    """One row for each cluster that should have been there on the day."""
    start, end = day_start(day), day_start(day) + DAY
    number = ((pl.col("ts") - start).dt.total_seconds() // windows.WINDOW.total_seconds()).cast(pl.Int64)
    seen = {
        cluster: (present, measured)
        for cluster, present, measured in rows.group_by("cluster_id")
        .agg(
            number.unique().alias("present"),
            number.filter(pl.col("source") != "interpolated").unique().alias("measured"),
        )
        .iter_rows()
    }
    clusters = connection.execute(
        text(
            "SELECT id::text, customer_id, created_at FROM clusters "
            "WHERE created_at < :end AND (status <> 'deleted' OR id::text = ANY(:seen))"
        ),
        {"end": end, "seen": list(seen)},
    ).all()
    out = []
    for cluster_id, customer_id, created_at in clusters:
        present, measured = seen.get(cluster_id, ([], []))
        expected = windows.expected_windows(day, first_seen=created_at, now=now)
        within = [window for window in present if expected[0] <= window < expected[1]]
        out.append(
            coverage.Coverage(
                TABLE,
                day.isoformat(),
                cluster_id,
                start,
                min(end, now),
                expected=max(0, expected[1] - expected[0]),
                present=len(within),
                detail={
                    "expected": list(expected),
                    "present": windows.encode(present),
                    "measured": windows.encode(measured),
                    "refreshed_from": read_from.isoformat(),
                },
                customer_id=UUID(str(customer_id)),
                run_id=run_id,
            )
        )
    return out


_UPSERT_SUMMARY = text(
    """
    INSERT INTO metrics_summary
        (customer_id, cluster_id, resolution, metric_type, subject, timestamp, value, min, max, samples)
    SELECT n.* FROM unnest(
        CAST(:customer_id AS uuid[]), CAST(:cluster_id AS uuid[]), CAST(:resolution AS text[]), CAST(:metric AS text[]),
        CAST(:subject AS text[]), CAST(:ts AS timestamptz[]), CAST(:value AS float8[]), CAST(:min AS float8[]),
        CAST(:max AS float8[]), CAST(:samples AS int[])
    ) AS n (customer_id, cluster_id, resolution, metric_type, subject, timestamp, value, min, max, samples)
    JOIN clusters c ON c.id = n.cluster_id AND c.customer_id = n.customer_id
    ON CONFLICT (cluster_id, resolution, metric_type, subject, timestamp) DO UPDATE SET
        value = excluded.value, min = excluded.min, max = excluded.max, samples = excluded.samples
    WHERE (metrics_summary.value, metrics_summary.min, metrics_summary.max, metrics_summary.samples)
        IS DISTINCT FROM (excluded.value, excluded.min, excluded.max, excluded.samples)
    """
)
# Summaries older than this are dropped from Postgres; the lake keeps all of them.
KEEP_5M = timedelta(days=2)
KEEP_1H = timedelta(days=60)


@dg.asset(
    deps=[metric_5m],
    partitions_def=by_day,
    backfill_policy=SINGLE_RUN,
    retry_policy=RETRY,
    group_name="metrics",
    owners=OWNERS,
    kinds={"duckdb", "postgres"},
    tags={"domain": "metrics"},
)
def metrics_summary(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Five-minute and hourly summaries of agents' metrics in Postgres, for pages and decisions."""
    reader = warehouse.reader
    now = warehouse.now()
    written = 0
    for day in (day for days in days_of(context.partition_keys) for day in days.days()):
        with warehouse.database.system() as connection:
            rows = coverage.load(connection, TABLE, keys=[day.isoformat()])
        since = min((datetime.fromisoformat(row.detail["refreshed_from"]) for row in rows), default=day_start(day))
        # An hourly value needs its whole hour again.
        frame = _summaries(reader, day, since.replace(minute=0, second=0, microsecond=0), now)
        if frame.is_empty():
            continue
        with warehouse.database.system() as connection:
            connection.execute(_UPSERT_SUMMARY, {name: frame[name].to_list() for name in frame.columns})
        written += frame.height
    return dg.MaterializeResult(metadata={"dagster/partition_row_count": written})


def _summaries(reader: LakeReader, day: date, since: datetime, now: datetime) -> pl.DataFrame:
    """Summaries of one day from ``since`` on, as far as they are still kept."""
    query = """
        WITH windows AS (
            SELECT * FROM metric_5m WHERE day = $day AND ts >= $since AND samples > 0
        )
        SELECT customer_id, cluster_id, '5m' AS resolution, metric, subject, ts, mean AS value, min, max, samples
        FROM windows WHERE ts >= $keep_5m
        UNION ALL
        SELECT customer_id, cluster_id, '1h', metric, subject, date_trunc('hour', ts),
               list_sum(list(mean * samples ORDER BY ts)) / sum(samples), min(min), max(max),
               CAST(sum(samples) AS BIGINT)
        FROM windows WHERE ts >= $keep_1h
        GROUP BY customer_id, cluster_id, metric, subject, date_trunc('hour', ts)
        ORDER BY ALL
    """
    parameters = {"day": day, "since": since, "keep_5m": now - KEEP_5M, "keep_1h": now - KEEP_1H}
    return reader.pin().frame(query, parameters, all_customers=True)
