"""`cloudoptim lake sql`: one reading statement, shown as a table or written as JSON or Parquet."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

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
        ValueError: ``customer_id`` is no UUID, ``as_of`` is no time, or two columns of the answer share a name that the
            format needs to be one column's.
        OSError: the lake or ``file`` cannot be opened.
    """
    from warehouse.lake.query import LakeReader

    customer_id = None if customer_id is None else _customer(customer_id)
    moment = None if as_of is None else _moment(as_of)
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"--out {file}: there is no folder {file.absolute().parent}; create it or name another file")
    reader = LakeReader((settings.lake_root, settings.database_url))
    try:
        # The command line belongs to the machine's operator, who owns the files too: without a customer it sees all.
        with reader.pin(as_of=moment).ask(query, customer_id=customer_id) as rows:
            if output != "table":
                _refuse_duplicates(rows.schema.names, output)
            if output == "parquet":
                return _write_parquet(rows, file)
            if output == "json":
                return _write_json(rows, file)
            return _show(rows, file)
    finally:
        reader.close()


def _customer(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise ValueError(f"--customer is {text!r}; give the customer's id, a UUID") from error


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"--as-of is {text!r}; give a time like 2024-05-01T10:00Z") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _refuse_duplicates(names: list[str], output: Format) -> None:
    """JSON would drop all but the last of them, and most readers of Parquet refuse such a file."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"several columns are named {', '.join(twice)}; {output} needs aliases (SELECT … AS other_name)"
        )


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
                target.write(json.dumps(_finite(row), default=_plain, allow_nan=False))
                count += 1
        target.write("\n]\n" if count else "]\n")
    return "" if file is None else f"{count} rows in {file}"


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON has no form for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _show(rows: pa.RecordBatchReader, file: Path | None) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text: rich would take a value like "[red]" for its markup.
    table = Table()
    for name in rows.schema.names:
        table.add_column(Text(name), overflow="fold")
    shown = more = 0
    for batch in rows:
        # By position: the rows of batch.to_pylist() are keyed by name, and names may repeat.
        columns = [column.to_pylist() for column in batch.slice(0, MAX_SCREEN_ROWS - shown).columns]
        for row in zip(*columns, strict=True):
            table.add_row(*(Text("" if value is None else str(value)) for value in row))
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
