"""Keep ``data_gaps`` in step with what is missing now, and the record of fills with what they brought."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from uuid import UUID

from sqlalchemy import Connection, insert, text

from cloudoptim_pipelines import coverage, stale
from cloudoptim_pipelines.defs.gaps.finder import PRICES, Gap, metric_gaps, price_gaps
from cloudoptim_pipelines.defs.gaps.needs import price_needs
from cloudoptim_pipelines.partitions import DayRange
from cloudoptim_pipelines.policies import FILL_TAG
from warehouse.postgres.models import Outbox, new_id

# Reconciled as a whole: a gap that is no longer found was filled, whoever filled it (API, Dagster's page, late data).
_CLOSE = text(
    """
    UPDATE data_gaps SET state = 'filled', filled_at = :now
    WHERE table_name = :table_name AND series = :series AND state <> 'filled'
      AND (CAST(:keys AS text[]) IS NULL OR partition_key = ANY(CAST(:keys AS text[])))
      AND NOT (gap_start = ANY(CAST(:starts AS timestamptz[])))
    """
)
_MISSING = text(
    """
    SELECT series, gap_start, gap_end FROM data_gaps
    WHERE table_name = :table_name AND series = ANY(CAST(:series AS text[])) AND state <> 'filled'
      AND (CAST(:keys AS text[]) IS NULL OR partition_key = ANY(CAST(:keys AS text[])))
    """
)
_OPEN = text(
    """
    INSERT INTO data_gaps (id, customer_id, table_name, series, partition_key, gap_start, gap_end, expected_points,
                           missing_points, reason, state, found_at)
    VALUES (:id, :customer_id, :table_name, :series, :partition_key, :start, :end, :expected, :missing, :reason, :state,
            :now)
    ON CONFLICT (table_name, series, gap_start) DO UPDATE SET
        gap_end = excluded.gap_end, expected_points = excluded.expected_points,
        missing_points = excluded.missing_points, reason = excluded.reason,
        state = CASE
            WHEN excluded.state = 'unfillable' THEN 'unfillable'
            -- what made it unfillable was mended
            WHEN data_gaps.state = 'unfillable' AND data_gaps.reason <> excluded.reason THEN excluded.state
            WHEN data_gaps.state = 'filled' THEN 'open'
            ELSE data_gaps.state
        END,
        filled_at = NULL
    """
)


# Nothing was ever read of it and nobody needs it any more: nothing is missing.
_FORGET = text(
    """
    DELETE FROM data_gaps
    WHERE table_name = :table_name AND state <> 'filled' AND NOT (series = ANY(CAST(:needed AS text[])))
    """
)


def _found(
    connection: Connection, table_name: str, rows: Sequence[coverage.Coverage], now: datetime
) -> dict[str, list[Gap]]:
    """Gaps by series, an empty list for a series that lacks nothing. A series nothing was read of may be needed too."""
    by_series = {
        series: list(group)
        for series, group in groupby(sorted(rows, key=lambda row: row.series), key=lambda row: row.series)
    }
    if table_name != PRICES:
        return {series: metric_gaps(group) for series, group in by_series.items()}
    needs = price_needs(connection, table_name, by_series)
    connection.execute(_FORGET, {"table_name": table_name, "needed": [need.region for need in needs]})
    return {need.region: price_gaps(by_series.get(need.region, []), now=now, need=need) for need in needs}


def sync(connection: Connection, table_name: str, *, now: datetime, keys: Sequence[str] | None = None) -> list[Gap]:
    """Make ``data_gaps`` of a table say what is missing now; returns the gaps found.

    Costs of days on which something else is missing than before are marked stale: an hour in a gap is not complete.

    Args:
        keys: only these partitions (metrics: their grid does not depend on other days).
    """
    rows = coverage.load(connection, table_name, keys=keys)
    by_series = _found(connection, table_name, rows, now)
    gaps = [gap for found in by_series.values() for gap in found]
    where = {"table_name": table_name, "series": sorted(by_series), "keys": None if keys is None else list(keys)}
    before = {(row.series, row.gap_start, row.gap_end) for row in connection.execute(_MISSING, where)}
    changed = before ^ {(gap.series, gap.start, gap.end) for gap in gaps}
    for series, found in sorted(by_series.items()):
        connection.execute(
            _CLOSE,
            {
                "table_name": table_name,
                "series": series,
                "keys": list(keys) if keys is not None else None,
                "starts": [gap.start for gap in found],
                "now": now,
            },
        )
        if found:
            connection.execute(_OPEN, [_row(gap, now) for gap in found])
    days = {day for _, start, end in changed for day in _days(start, end)}
    stale.mark(connection, stale.COSTS, days, reason=f"gaps of {table_name} changed")
    return gaps


def _days(start: datetime, end: datetime) -> list[date]:
    return DayRange(start.astimezone(UTC).date(), (end - timedelta.resolution).astimezone(UTC).date()).days()


def _row(gap: Gap, now: datetime) -> dict:
    return {
        "id": new_id(),
        "customer_id": gap.customer_id,
        "table_name": gap.table_name,
        "series": gap.series,
        "partition_key": gap.partition_key,
        "start": gap.start,
        "end": gap.end,
        "expected": gap.expected,
        "missing": gap.missing,
        "reason": gap.reason,
        "state": "open" if gap.fillable else "unfillable",
        "now": now,
    }


_PROGRESS = text(
    """
    UPDATE gap_fills SET
        state = CASE WHEN state = 'requested' THEN 'running' ELSE state END,
        records_filled = coalesce(records_filled, 0) + :records,
        sources_used = (
            SELECT coalesce(jsonb_agg(DISTINCT value ORDER BY value), '[]') FROM (
                SELECT jsonb_array_elements_text(coalesce(sources_used, '[]')) AS value
                UNION SELECT unnest(CAST(:sources AS text[]))
            ) AS sources
        )
    WHERE id = :id AND state IN ('requested', 'running')
    RETURNING table_name, customer_id, partitions, created_at
    """
)
# A partition of the fill is done when it was written after the fill was asked for: ours, not Dagster's, is the record.
_REMAINING = text(
    """
    SELECT count(*) FROM jsonb_array_elements_text(CAST(:partitions AS jsonb)) AS key
    WHERE NOT EXISTS (
        SELECT 1 FROM partition_coverage c
        WHERE c.table_name = :table_name AND c.partition_key = key AND c.written_at >= :asked_at
    )
    """
)


def record(
    connection: Connection, tags: Mapping[str, str], *, records: int, sources: Iterable[str], now: datetime
) -> None:
    """Add what a run wrote to the fill it was launched for; runs of schedules and of people carry none."""
    if fill_id := tags.get(FILL_TAG):
        progress(connection, UUID(fill_id), records=records, sources=sources, now=now)


def progress(connection: Connection, fill_id: UUID, *, records: int, sources: Iterable[str], now: datetime) -> bool:
    """Add a run's share to a fill; closes it when its last partition is written. Returns whether it did.

    Gaps of the fill that are still there were asked for and no source had them: they become unfillable.
    """
    row = connection.execute(
        _PROGRESS, {"id": fill_id, "records": records, "sources": sorted(set(sources))}
    ).one_or_none()
    if row is None:
        return False
    remaining = connection.execute(
        _REMAINING,
        {"partitions": json.dumps(row.partitions), "table_name": row.table_name, "asked_at": row.created_at},
    ).scalar_one()
    if remaining:
        return False
    connection.execute(
        text("UPDATE gap_fills SET state = 'succeeded', finished_at = :now WHERE id = :id"), {"id": fill_id, "now": now}
    )
    connection.execute(
        text("UPDATE data_gaps SET state = 'unfillable' WHERE fill_id = :id AND state IN ('open', 'filling')"),
        {"id": fill_id},
    )
    connection.execute(
        insert(Outbox).values(
            id=new_id(),
            customer_id=row.customer_id,
            topic="gap.filled",
            payload={"fill_id": str(fill_id), "table_name": row.table_name, "partitions": len(row.partitions)},
        )
    )
    return True
