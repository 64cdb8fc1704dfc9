"""Days whose computed rows later data made stale: marked when that data comes, settled when they are computed again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime

from sqlalchemy import Connection

from warehouse.postgres.dirty import MARK, MARKS, SETTLE, mark_values

# The first table of costs: what is marked under it is computed again with all that follows from it.
COSTS = "node_cost_hourly"


def mark(connection: Connection, table_name: str, days: Iterable[date], *, reason: str) -> None:
    """Have a table's days computed again."""
    values = mark_values(table_name, days, reason)
    if values["days"]:
        connection.execute(MARK, values)


def marks(connection: Connection, table_name: str, keys: Sequence[str]) -> dict[str, datetime]:
    """When each of the partitions was last marked; to be read before the data that the computation reads."""
    rows = connection.execute(MARKS, {"table_name": table_name, "keys": list(keys)})
    return {row.partition_key: row.marked_at for row in rows}


def settle(connection: Connection, table_name: str, seen: Mapping[str, datetime]) -> None:
    """Take off the marks that the computation saw; one that was set meanwhile stays for the next."""
    for key, marked_at in sorted(seen.items()):
        connection.execute(SETTLE, {"table_name": table_name, "key": key, "marked_at": marked_at})
