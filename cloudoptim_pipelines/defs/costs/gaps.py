"""When is what an hour costs not fully known? Stretches without the agent, and without Spot prices."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import polars as pl
import pyarrow as pa
from sqlalchemy import Connection, text

from cloudoptim_pipelines.coverage import Coverage
from cloudoptim_pipelines.defs.costs.nodes import read_nodes, run_times
from cloudoptim_pipelines.defs.gaps import finder
from cloudoptim_pipelines.defs.metrics import windows
from cloudoptim_pipelines.partitions import DayRange, day_start

_TIME = pl.Datetime("us", "UTC")

# What was measured, not what is present: an interpolated window closes a gap of the metrics, but nobody was there.
_WINDOWS = text(
    """
    SELECT series AS cluster_id, partition_key, coalesce((detail -> 'expected' ->> 0)::int, 0) AS first,
           coalesce((detail -> 'expected' ->> 1)::int, 0) AS until, coalesce(detail ->> 'measured', '') AS measured
    FROM partition_coverage
    WHERE table_name = 'metric_5m' AND left(partition_key, 10) BETWEEN :first_day AND :last_day
    """
)
# A cluster's own creation, and the first day that has metrics of it with the windows there are.
_CONNECTED = text(
    """
    SELECT DISTINCT ON (c.id) c.id::text AS cluster_id, c.created_at, p.partition_key, p.detail ->> 'present' AS present
    FROM clusters c
    LEFT JOIN partition_coverage p
        ON p.table_name = 'metric_5m' AND p.series = c.id::text AND p.detail ->> 'present' <> ''
    ORDER BY c.id, p.partition_key
    """
)
_KNOWN = text(
    """
    SELECT series AS region, gap_start, gap_end FROM data_gaps
    WHERE table_name = 'spot_prices' AND state <> 'filled' AND reason <> 'did_not_exist'
      AND gap_start < :end AND gap_end > :start
    """
)
# The days' coverage, and each region's first day: what is missing can be missing from then on only.
_READ = text(
    """
    SELECT series, partition_key, covered_from, covered_until, expected_points, present_points
    FROM partition_coverage c
    WHERE table_name = 'spot_prices'
      AND (left(partition_key, 10) BETWEEN :first_day AND :last_day OR partition_key = (
          SELECT min(f.partition_key) FROM partition_coverage f
          WHERE f.table_name = c.table_name AND f.series = c.series
      ))
    """
)


def agent_gaps(connection: Connection, days: DayRange, now: datetime) -> pa.Table:
    """When agents were away: cluster_id, gap_start, gap_end.

    Before a cluster's first metrics, windows of the grid that hold no measured sample, and nodes that are silent now.
    Late samples close a gap of theirs as soon as their day is read again.
    """
    gaps: list[tuple[Any, ...]] = []
    bounds = {"first_day": days.first.isoformat(), "last_day": days.last.isoformat()}
    for row in connection.execute(_WINDOWS, bounds):
        midnight = day_start(date.fromisoformat(row.partition_key))
        for first, until in windows.missing_runs((row.first, row.until), windows.decode(row.measured)):
            gaps.append((row.cluster_id, midnight + first * windows.WINDOW, midnight + until * windows.WINDOW))
    for row in connection.execute(_CONNECTED):
        connected_at = row.created_at
        if row.present:
            first = windows.decode(row.present)[0]
            connected_at = max(connected_at, day_start(date.fromisoformat(row.partition_key)) + first * windows.WINDOW)
        if connected_at > days.start:
            gaps.append((row.cluster_id, days.start, min(connected_at, days.end)))
    nodes = run_times(read_nodes(connection, days.start, days.end), now)
    gaps += [(row["cluster_id"], row["run_until"], now) for row in nodes.filter("silent").iter_rows(named=True)]
    return _table("cluster_id", gaps)


def price_gaps(connection: Connection, days: DayRange, now: datetime) -> pa.Table:
    """Stretches in which a region's Spot prices were not read: region, gap_start, gap_end.

    What the ledger of gaps holds (a sampler's missed turns are seen over many days only), and what the days' coverage
    says now, for the ledger is as old as the last run that wrote prices. Before a region's first day nothing is
    missing: a price from then is the one that still held when that day began, an older one is not in the lake.
    """
    gaps = [tuple(row) for row in connection.execute(_KNOWN, {"start": days.start, "end": days.end})]
    by_region: dict[str, list[Coverage]] = {}
    bounds = {"first_day": days.first.isoformat(), "last_day": days.last.isoformat()}
    for row in connection.execute(_READ, bounds):
        by_region.setdefault(row.series, []).append(
            Coverage(
                "spot_prices",
                row.partition_key,
                row.series,
                row.covered_from,
                row.covered_until,
                expected=row.expected_points,
                present=row.present_points,
            )
        )
    for region, rows in by_region.items():
        for gap in finder.price_gaps(rows, now=now):
            if gap.reason != "did_not_exist" and gap.start < days.end and gap.end > days.start:
                gaps.append((region, gap.start, gap.end))
    return _table("region", gaps)


def _table(series: str, gaps: list[tuple[Any, ...]]) -> pa.Table:
    """The stretches, those of one series that touch or overlap as one."""
    merged: list[tuple[Any, ...]] = []
    for name, start, end in sorted(gaps):
        if merged and merged[-1][0] == name and start <= merged[-1][2]:
            merged[-1] = (name, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((name, start, end))
    schema: dict[str, Any] = {series: pl.String, "gap_start": _TIME, "gap_end": _TIME}
    return pl.DataFrame(merged, schema=schema, orient="row").to_arrow()
