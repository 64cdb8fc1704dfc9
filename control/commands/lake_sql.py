"""`cloudoptim lake sql`: one reading statement, shown as a table or written as JSON or Parquet."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
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
        # The command line belongs to the machine's operator, who owns the files too: without a customer it sees all.
        with reader.pin(as_of=moment).ask(query, customer_id=customer_id) as rows:
            if output == "parquet":
                return _write_parquet(rows, file)
            if output == "json":
                return _write_json(rows, file)
            return _show(rows, file)
    finally:
        reader.close()


def _write_parquet(rows: pa.RecordBatchReader, file: Path | None) -> str:
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(sys.stdout.buffer if file is None else file, rows.schema) as writer:
        for batch in rows:
            writer.write_batch(batch)
            count += batch.num_rows
    return "" if file is None else f"{count} rows in {file}"


def _write_json(rows: pa.RecordBatchReader, file: Path | None) -> str:
    with nullcontext(sys.stdout) if file is None else file.open("w") as target:
        count = 0
        target.write("[")
        for batch in rows:
            for row in batch.to_pylist():
                target.write(",\n" if count else "\n")
                target.write(json.dumps(row, default=_plain))
                count += 1
        target.write("\n]\n" if count else "]\n")
    return "" if file is None else f"{count} rows in {file}"


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _show(rows: pa.RecordBatchReader, file: Path | None) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in rows.schema.names:
        table.add_column(name, overflow="fold")
    shown = more = 0
    for batch in rows:
        for row in batch.slice(0, MAX_SCREEN_ROWS - shown).to_pylist():
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        shown += min(batch.num_rows, MAX_SCREEN_ROWS - shown)
        more += batch.num_rows
        if more > shown:
            break
    if file is None:
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    else:
        with file.open("w") as target:
            Console(file=target, width=200).print(table)
    return f"first {shown} rows shown; --format json or parquet has all" if more > shown else ""
