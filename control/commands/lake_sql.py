"""`cloudoptim lake sql`: one reading statement, shown as a table or written as JSON or Parquet."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from control.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["table", "json", "parquet"]
MAX_SCREEN_ROWS = 200


def run_query(
    settings: Settings, query: str, output: Format, file: Path | None, *, customer_id: str | None, as_of: str | None
) -> str:
    """Run the query; returns a note about what was left out or written, empty when nothing.

    Raises:
        LakeError: the query, the customer or the release is wrong; the message says why.
        ValueError: ``as_of`` is no time.
    """
    from warehouse.lake.query import LakeReader

    moment = None if as_of is None else datetime.fromisoformat(as_of)
    if moment is not None and moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    reader = LakeReader((settings.lake_root, settings.database_url))
    try:
        parameters = {"customer_id": customer_id} if customer_id else None
        # The command line belongs to the machine's operator, who owns the files too: without a customer it sees all.
        rows = reader.query(query, parameters, all_customers=customer_id is None, as_of=moment)
    finally:
        reader.close()
    if output == "parquet":
        return _write_parquet(rows, file)
    if output == "json":
        return _write_json(rows, file)
    return _show(rows, file)


def _write_parquet(rows: pa.Table, file: Path | None) -> str:
    import pyarrow.parquet as pq

    pq.write_table(rows, sys.stdout.buffer if file is None else file)
    return "" if file is None else f"{rows.num_rows} rows in {file}"


def _write_json(rows: pa.Table, file: Path | None) -> str:
    text = json.dumps(rows.to_pylist(), default=_plain, indent=None if rows.num_rows > MAX_SCREEN_ROWS else 2)
    if file is None:
        sys.stdout.write(text + "\n")
        return ""
    file.write_text(text + "\n")
    return f"{rows.num_rows} rows in {file}"


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _show(rows: pa.Table, file: Path | None) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in rows.column_names:
        table.add_column(name, overflow="fold")
    for row in rows.slice(0, MAX_SCREEN_ROWS).to_pylist():
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    if file is None:
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    else:
        with file.open("w") as target:
            Console(file=target, width=200).print(table)
    shown = min(rows.num_rows, MAX_SCREEN_ROWS)
    return "" if shown == rows.num_rows else f"{shown} of {rows.num_rows} rows shown; --format json or parquet has all"
