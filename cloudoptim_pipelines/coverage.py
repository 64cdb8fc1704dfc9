"""The coverage each partition had when it was written, and the locks that keep two runs of one partition apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, func, select, text
from sqlalchemy.dialects.postgresql import insert

from warehouse.postgres.models import PartitionCoverage
from warehouse.postgres.session import SyncDatabase

TABLE = PartitionCoverage.__table__


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one partition of one series holds: ``present`` of ``expected`` points, asked for from ``start`` to ``end``.

    A price series is a region (points are minutes asked for), a metric series a cluster (points are 5-minute windows).
    """

    table_name: str
    partition_key: str
    series: str
    start: datetime
    end: datetime
    expected: int
    present: int
    detail: dict[str, Any] = field(default_factory=dict)
    customer_id: UUID | None = None
    run_id: str = ""


def save(connection: Connection, rows: Sequence[Coverage]) -> None:
    """Write or replace coverage rows."""
    if not rows:
        return
    statement = insert(PartitionCoverage).values(
        [
            {
                "table_name": row.table_name,
                "partition_key": row.partition_key,
                "series": row.series,
                "customer_id": row.customer_id,
                "covered_from": row.start,
                "covered_until": row.end,
                "expected_points": row.expected,
                "present_points": row.present,
                "detail": row.detail,
                "run_id": row.run_id,
            }
            for row in rows
        ]
    )
    replace = ("customer_id", "covered_from", "covered_until", "expected_points", "present_points", "detail", "run_id")
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["table_name", "partition_key", "series"],
            set_={name: statement.excluded[name] for name in replace} | {"written_at": func.now()},
        )
    )


def load(
    connection: Connection, table_name: str, *, series: str | None = None, keys: Sequence[str] | None = None
) -> list[Coverage]:
    """Coverage rows of one table in order of their keys, all of them or those of one series or some partitions."""
    query = select(TABLE).where(TABLE.c.table_name == table_name)
    if series is not None:
        query = query.where(TABLE.c.series == series)
    if keys is not None:
        query = query.where(TABLE.c.partition_key.in_(keys))
    return [
        Coverage(
            row.table_name,
            row.partition_key,
            row.series,
            row.covered_from,
            row.covered_until,
            row.expected_points,
            row.present_points,
            row.detail,
            row.customer_id,
            row.run_id,
        )
        for row in connection.execute(query.order_by(TABLE.c.partition_key, TABLE.c.series))
    ]


@contextmanager
def partition_locks(database: SyncDatabase, table_name: str, keys: Sequence[str]) -> Iterator[None]:
    """Hold the partitions of one table while they are read, computed and replaced.

    Dagster may run one partition twice at once (dagster#15155); the second waits here and then replaces the same rows.
    The locks end with the session, so a killed run holds nothing. They are taken latest day first by everybody, so that
    a run may ask for earlier days while it holds later ones.
    """
    with database.system() as connection:
        # It waits, idle, for as long as AWS takes to answer; the server's limit is for forgotten transactions.
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        connection.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(key, 0)) FROM unnest(CAST(:keys AS text[])) key"),
            {"keys": sorted((f"{table_name}/{key}" for key in keys), reverse=True)},
        )
        yield
