"""All SQL of the gap filler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from warehouse.postgres.models import new_id

_GAP_COLUMNS = (
    "id, customer_id, table_name, series, partition_key, gap_start, gap_end, expected_points, missing_points, reason, "
    "state, found_at, filled_at, fill_id, "
    "(SELECT f.message FROM source_failures f WHERE data_gaps.state <> 'filled' "
    "AND (f.table_name, f.series) = (data_gaps.table_name, data_gaps.series)) AS source_error"
)
_GAP_FILTER = """
    gap_end > :start AND gap_start < :end
    AND (CAST(:table_name AS text) IS NULL OR table_name = :table_name)
    AND (CAST(:series AS text) IS NULL OR series = :series)
    AND (CAST(:state AS text) IS NULL OR state = :state)
"""


async def gaps(
    conn: AsyncConnection,
    *,
    start: datetime,
    end: datetime,
    table_name: str | None,
    series: str | None,
    state: str | None,
    limit: int,
) -> tuple[int, list[dict[str, Any]]]:
    """How many gaps overlap the window, and the newest of them."""
    given = {"start": start, "end": end, "table_name": table_name, "series": series, "state": state}
    total = (await conn.execute(text(f"SELECT count(*) FROM data_gaps WHERE {_GAP_FILTER}"), given)).scalar_one()
    rows = await conn.execute(
        text(f"SELECT {_GAP_COLUMNS} FROM data_gaps WHERE {_GAP_FILTER} ORDER BY gap_start DESC, series LIMIT :limit"),
        given | {"limit": limit},
    )
    return total, [dict(row) for row in rows.mappings()]


async def coverage(
    conn: AsyncConnection, *, start: datetime, end: datetime, table_name: str | None
) -> list[dict[str, Any]]:
    """Expected and present points by day and table in the window."""
    rows = await conn.execute(
        text(
            """
            SELECT left(partition_key, 10) AS day, table_name, sum(expected_points)::bigint AS expected_points,
                   sum(present_points)::bigint AS present_points
            FROM partition_coverage
            WHERE left(partition_key, 10) BETWEEN :first AND :last
              AND (CAST(:table_name AS text) IS NULL OR table_name = :table_name)
            GROUP BY 1, 2 ORDER BY 1, 2
            """
        ),
        {"first": start.date().isoformat(), "last": end.date().isoformat(), "table_name": table_name},
    )
    return [dict(row) for row in rows.mappings()]


async def model_window(conn: AsyncConnection, model_id: UUID) -> tuple[datetime | None, datetime | None] | None:
    """A model's training window; None when there is no such model."""
    row = (
        await conn.execute(text("SELECT trained_from, trained_until FROM ml_models WHERE id = :id"), {"id": model_id})
    ).one_or_none()
    return (row.trained_from, row.trained_until) if row else None


async def gaps_by_id(conn: AsyncConnection, ids: Sequence[UUID]) -> list[dict[str, Any]]:
    """The gaps with these ids."""
    rows = await conn.execute(
        text(f"SELECT {_GAP_COLUMNS} FROM data_gaps WHERE id = ANY(CAST(:ids AS uuid[]))"), {"ids": list(ids)}
    )
    return [dict(row) for row in rows.mappings()]


async def active_overlap(conn: AsyncConnection, table_name: str, partitions: Sequence[str]) -> UUID | None:
    """A fill that is under way and covers one of the partitions. Waits for another request of the same table."""
    await conn.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('gap_fills/' || :t, 0))"), {"t": table_name})
    return (
        await conn.execute(
            text(
                """
                SELECT id FROM gap_fills
                WHERE table_name = :table_name AND state IN ('requested', 'running')
                  AND jsonb_exists_any(partitions, CAST(:partitions AS text[]))
                ORDER BY created_at LIMIT 1
                """
            ),
            {"table_name": table_name, "partitions": list(partitions)},
        )
    ).scalar_one_or_none()


async def create_fill(conn: AsyncConnection, *, requested_by: str, table_name: str, partitions: Sequence[str]) -> UUID:
    """Write the request down and mark the gaps in its partitions as being filled."""
    fill_id = new_id()
    await conn.execute(
        text(
            "INSERT INTO gap_fills (id, requested_by, table_name, partitions) "
            "VALUES (:id, :requested_by, :table_name, CAST(:partitions AS jsonb))"
        ),
        {
            "id": fill_id,
            "requested_by": requested_by,
            "table_name": table_name,
            "partitions": json.dumps(list(partitions)),
        },
    )
    await conn.execute(
        text(
            "UPDATE data_gaps SET state = 'filling', fill_id = :id WHERE table_name = :table_name AND state = 'open' "
            "AND partition_key = ANY(CAST(:partitions AS text[]))"
        ),
        {"id": fill_id, "table_name": table_name, "partitions": list(partitions)},
    )
    return fill_id


async def fill(conn: AsyncConnection, fill_id: UUID) -> dict[str, Any] | None:
    """One fill with the partitions that are not written yet. Written means: since it was asked for."""
    row = (
        (
            await conn.execute(
                text(
                    """
                SELECT f.id, f.customer_id, f.requested_by, f.table_name, f.partitions, f.state, f.dagster_run_id,
                       f.dagster_backfill_id, coalesce(f.records_filled, 0) AS records_filled,
                       coalesce(f.sources_used, '[]') AS sources_used, f.error, f.created_at, f.finished_at,
                       now() AS read_at,
                       coalesce((
                           SELECT jsonb_agg(key ORDER BY key) FROM jsonb_array_elements_text(f.partitions) AS key
                           WHERE NOT EXISTS (
                               SELECT 1 FROM partition_coverage c
                               WHERE c.table_name = f.table_name AND c.partition_key = key
                                 AND c.written_at >= f.created_at
                           )
                       ), '[]') AS remaining
                FROM gap_fills f WHERE f.id = :id
                """
                ),
                {"id": fill_id},
            )
        )
        .mappings()
        .one_or_none()
    )
    return dict(row) if row else None


async def fills(conn: AsyncConnection, limit: int) -> list[dict[str, Any]]:
    """The newest fills."""
    rows = await conn.execute(
        text(
            "SELECT id AS fill_id, table_name, state, requested_by, jsonb_array_length(partitions) AS partitions, "
            "coalesce(records_filled, 0) AS records_filled, created_at, finished_at, error "
            "FROM gap_fills ORDER BY created_at DESC LIMIT :limit"
        ),
        {"limit": limit},
    )
    return [dict(row) for row in rows.mappings()]


async def launched(conn: AsyncConnection, fill_id: UUID, *, run_id: str | None, backfill_id: str | None) -> None:
    """Remember what Dagster does for a fill. It may have finished already: a closed fill stays closed."""
    await conn.execute(
        text(
            "UPDATE gap_fills SET dagster_run_id = :run_id, dagster_backfill_id = :backfill_id, error = NULL, "
            "state = CASE WHEN state = 'requested' THEN 'running' ELSE state END WHERE id = :id"
        ),
        {"id": fill_id, "run_id": run_id, "backfill_id": backfill_id},
    )


async def reopen(conn: AsyncConnection, fill_id: UUID) -> bool:
    """Take up a failed or cancelled fill again; False when it is neither."""
    done = await conn.execute(
        text(
            "UPDATE gap_fills SET state = 'requested', error = NULL, finished_at = NULL, dagster_run_id = NULL, "
            "dagster_backfill_id = NULL WHERE id = :id AND state IN ('failed', 'cancelled')"
        ),
        {"id": fill_id},
    )
    await conn.execute(
        text("UPDATE data_gaps SET state = 'filling' WHERE fill_id = :id AND state = 'open'"), {"id": fill_id}
    )
    return done.rowcount == 1


async def close(conn: AsyncConnection, fill_id: UUID, state: str, error: str | None) -> bool:
    """End a fill that is under way; its gaps that are still there are open again. False when it had ended."""
    done = await conn.execute(
        text(
            "UPDATE gap_fills SET state = :state, error = :error, finished_at = now() "
            "WHERE id = :id AND state IN ('requested', 'running')"
        ),
        {"id": fill_id, "state": state, "error": error},
    )
    if done.rowcount:
        await conn.execute(
            text("UPDATE data_gaps SET state = 'open' WHERE fill_id = :id AND state = 'filling'"), {"id": fill_id}
        )
    return done.rowcount == 1


async def gaps_of_fill(conn: AsyncConnection, fill_id: UUID, limit: int) -> list[dict[str, Any]]:
    """Gaps a fill was to close and that are still there."""
    rows = await conn.execute(
        text(
            f"SELECT {_GAP_COLUMNS} FROM data_gaps WHERE fill_id = :id AND state <> 'filled' "
            "ORDER BY gap_start, series LIMIT :limit"
        ),
        {"id": fill_id, "limit": limit},
    )
    return [dict(row) for row in rows.mappings()]
