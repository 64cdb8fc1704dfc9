"""Partitions of computed tables that later data made stale: the one place that knows how they are marked.

Statements, not functions: the API executes them on asynchronous connections, the pipelines on plain ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Any, Final

from sqlalchemy import text

# clock_timestamp: marks of one transaction and of the next must differ, or settling the first would settle both.
MARK: Final = text(
    """
    INSERT INTO dirty_partitions (table_name, partition_key, reason, marked_at)
    SELECT :table_name, day, :reason, clock_timestamp() FROM unnest(CAST(:days AS text[])) AS d (day) ORDER BY day
    ON CONFLICT (table_name, partition_key) DO UPDATE SET reason = excluded.reason, marked_at = excluded.marked_at
    """
)
MARKS: Final = text(
    """
    SELECT partition_key, marked_at FROM dirty_partitions
    WHERE table_name = :table_name AND partition_key = ANY(CAST(:keys AS text[]))
    """
)
SETTLE: Final = text(
    "DELETE FROM dirty_partitions WHERE table_name = :table_name AND partition_key = :key AND marked_at = :marked_at"
)


def mark_values(table_name: str, days: Iterable[date], reason: str) -> dict[str, Any]:
    """What ``MARK`` binds; ``days`` in order, so that two writers never wait for each other in a circle."""
    return {"table_name": table_name, "days": sorted({day.isoformat() for day in days}), "reason": reason}
