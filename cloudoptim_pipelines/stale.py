"""Days whose computed rows later data made stale: marked when that data comes, settled when they are computed again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime

from sqlalchemy import Connection, text

# The first table of costs: what is marked under it is computed again with all that follows from it.
COSTS = "node_cost_hourly"

# clock_timestamp: marks of one transaction and of the next must differ, or settling the first would settle both.
_MARK = text(
    """
    INSERT INTO dirty_partitions (table_name, partition_key, reason, marked_at)
    SELECT :table_name, day, :reason, clock_timestamp() FROM unnest(CAST(:days AS text[])) AS d (day) ORDER BY day
    ON CONFLICT (table_name, partition_key) DO UPDATE SET reason = excluded.reason, marked_at = excluded.marked_at
    """
)
_MARKS = text(
    """
    SELECT partition_key, marked_at FROM dirty_partitions
    WHERE table_name = :table_name AND partition_key = ANY(CAST(:keys AS text[]))
    """
)
_SETTLE = text(
    "DELETE FROM dirty_partitions WHERE table_name = :table_name AND partition_key = :key AND marked_at = :marked_at"
)


def mark(connection: Connection, table_name: str, days: Iterable[date], *, reason: str) -> None:
    """Have a table's days computed again."""
    if keys := sorted({day.isoformat() for day in days}):
        connection.execute(_MARK, {"table_name": table_name, "days": keys, "reason": reason})


def marks(connection: Connection, table_name: str, keys: Sequence[str]) -> dict[str, datetime]:
    """When each of the partitions was last marked; to be read before the data that the computation reads."""
    rows = connection.execute(_MARKS, {"table_name": table_name, "keys": list(keys)})
    return {row.partition_key: row.marked_at for row in rows}


def settle(connection: Connection, table_name: str, seen: Mapping[str, datetime]) -> None:
    """Take off the marks that the computation saw; one that was set meanwhile stays for the next."""
    for key, marked_at in sorted(seen.items()):
        connection.execute(_SETTLE, {"table_name": table_name, "key": key, "marked_at": marked_at})
