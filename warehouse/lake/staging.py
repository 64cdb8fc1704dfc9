"""From data to staged Parquet files: check, complete, split by partition, order, write, describe. No lock, no commit.

A staged file is invisible until a Delta commit names it. Memory is bounded by ``BUFFERED_ROWS``, however long the
stream is.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warehouse.lake.errors import LakeDataError
from warehouse.lake.storage import Storage
from warehouse.lake.tables import PARTITION_TEXT, Source, TableSpec

# DuckDB reads row groups in parallel and skips them by statistics; a multiple of its 2,048-row vectors.
ROW_GROUP_ROWS = 262_144
BUFFERED_ROWS = 1_048_576
# Bounds the memory of a reader that has to open a whole file's footer, and what a compaction rewrites at once.
FILE_ROWS = 8 * 1_048_576
OPEN_FILES = 64
# A longer text is left out of a file's statistics: a shortened maximum would be a wrong bound.
STATISTICS_TEXT = 64


_ENCODER = msgspec.json.Encoder(decimal_format="number")


class _All:
    def __repr__(self) -> str:
        return "ALL"


ALL: Final = _All()
"""Every value of a partition column."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which partitions a write replaces: for each partition column a set of values, or None for every value."""

    table: str
    values: tuple[tuple[str, frozenset[str] | None], ...]

    @classmethod
    def of(cls, spec: TableSpec, partition: Mapping[str, Any]) -> Scope:
        """Read ``{"day": "2024-01-01", "region": ["us-east-1", "eu-west-1"]}``; a column left out means all of it.

        Raises:
            LakeDataError: unknown column, unreadable value, or nothing named at all.
        """
        for name in partition:
            if name not in spec.partition_by:
                raise LakeDataError(
                    f"table {spec.name}: {name!r} is not a partition column; it is partitioned by "
                    f"{', '.join(spec.partition_by)}"
                )
        if not partition:
            raise LakeDataError(
                f"table {spec.name}: an empty partition would replace the whole table; name one of "
                f"{', '.join(spec.partition_by)}, or say {{'{spec.partition_by[0]}': ALL}} if that is meant"
            )
        return cls(
            spec.name, tuple((name, _values(spec, name, partition.get(name, ALL))) for name in spec.partition_by)
        )

    def single(self, name: str) -> str | None:
        """The value when the scope allows exactly one, else None."""
        values = dict(self.values)[name]
        return next(iter(values)) if values is not None and len(values) == 1 else None

    def covers(self, partition: Mapping[str, str]) -> bool:
        """True when the partition is one of those replaced."""
        return all(values is None or partition[name] in values for name, values in self.values)

    def overlaps(self, other: Scope) -> bool:
        """True when both replace some partition."""
        return self.table == other.table and all(
            mine is None or theirs is None or mine & theirs
            for (_, mine), (_, theirs) in zip(self.values, other.values, strict=True)
        )

    def __str__(self) -> str:
        parts = []
        for name, values in self.values:
            if values is None:
                parts.append(f"{name}=*")
            elif len(values) <= 3:
                parts.append(f"{name}={'|'.join(sorted(values))}")
            else:
                parts.append(f"{name}={min(values)}..{max(values)} ({len(values)} values)")
        return "/".join(parts)


def _values(spec: TableSpec, name: str, given: Any) -> frozenset[str] | None:
    if given is ALL:
        return None
    items = [given] if isinstance(given, (str, date)) or not isinstance(given, Iterable) else list(given)
    if not items:
        raise LakeDataError(f"table {spec.name}: the list of values for {name!r} is empty; name at least one")
    return frozenset(partition_text(spec, name, item) for item in items)


def partition_text(spec: TableSpec, name: str, value: Any) -> str:
    """A partition value as Delta writes it.

    Raises:
        LakeDataError: the value is no date (``day``), or holds characters that cannot be a folder name.
    """
    if name == "day":
        if isinstance(value, datetime):
            value = value.astimezone(UTC).date() if value.tzinfo else value.date()
        if isinstance(value, date):
            return value.isoformat()
        with suppress(TypeError, ValueError):
            return date.fromisoformat(value).isoformat()
        raise LakeDataError(f"table {spec.name}: day {value!r} is no date; give a date or text like 2024-01-31")
    if isinstance(value, str) and PARTITION_TEXT.match(value):
        return value
    raise LakeDataError(
        f"table {spec.name}: {name} {value!r} cannot be a partition value; use 1 to 128 letters, digits, '_', '.', '-'"
    )


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One Parquet file that waits for its commit. ``path`` is relative to the table."""

    path: str
    partition: Mapping[str, str]
    rows: int
    size_bytes: int
    modified_ms: int
    statistics: str


@dataclass(frozen=True, slots=True)
class Staged:
    """Staged files of one table and the partitions they replace.

    ``hold`` is the lake's mark that they wait for their release and vacuum is kept away; empty when there is no file.
    """

    table: str
    scope: Scope
    files: tuple[StagedFile, ...]
    hold: str = ""

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(file.rows for file in self.files)


def batches(data: Any) -> pa.RecordBatchReader:
    """Any frame or stream as Arrow batches: pyarrow, Polars (eager or lazy), DuckDB relations, lists of batches.

    Raises:
        LakeDataError: it is none of these.
    """
    if isinstance(data, pa.RecordBatchReader):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.RecordBatchReader.from_batches(data.schema, [data])
    if isinstance(data, pa.Table):
        return data.to_reader()
    if type(data).__module__.split(".")[0] == "polars" and hasattr(data, "collect"):
        data = data.collect(engine="streaming")
    if hasattr(data, "__arrow_c_stream__"):
        return pa.RecordBatchReader.from_stream(data)
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, (pa.RecordBatch, pa.Table)) for item in data):
        schema = data[0].schema
        flat = (batch for item in data for batch in (item.to_batches() if isinstance(item, pa.Table) else [item]))
        return pa.RecordBatchReader.from_batches(schema, flat)
    raise LakeDataError(
        f"data is {type(data).__name__}; give a pyarrow Table or RecordBatchReader, a Polars frame or a DuckDB relation"
    )


class Conformer:
    """Makes batches fit a table, or says which column does not and what to do."""

    def __init__(self, spec: TableSpec, schema: pa.Schema, scope: Scope) -> None:
        self.spec = spec
        self.schema = schema
        self.scope = scope
        self.file_schema = pa.schema([field for field in schema if field.name not in spec.partition_by])
        self._required = {column.name for column in spec.columns if column.required}

    def check_names(self, given: pa.Schema) -> None:
        """Refuse unknown, doubled and missing columns before any row is read."""
        unknown = [name for name in given.names if name not in self.schema.names]
        if unknown:
            raise LakeDataError(
                f"table {self.spec.name} has no column {', '.join(map(repr, unknown))}; drop it from the data, or add "
                f"it with Lake.add_column. Columns: {', '.join(self.schema.names)}"
            )
        doubled = {name for name in given.names if given.names.count(name) > 1}
        if doubled:
            raise LakeDataError(f"table {self.spec.name}: the data has {', '.join(sorted(doubled))} more than once")
        missing = [
            name
            for name in self.schema.names
            if name in self._required and name not in given.names and not self._derived(name)
        ]
        if missing:
            raise LakeDataError(
                f"table {self.spec.name}: required column {', '.join(map(repr, missing))} is missing from the data"
            )

    def _derived(self, name: str) -> bool:
        return name in self.spec.partition_by and (
            self.scope.single(name) is not None or (name == "day" and self.spec.time_column is not None)
        )

    def conform(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[str, pa.Array | str]]:
        """The batch in the table's columns, order and types, and beside it its partition columns.

        A partition column that has one value in the whole write is given as that value.

        Raises:
            LakeDataError: a value does not fit its column's type, or is null where it must not be.
        """
        columns = []
        for field in self.file_schema:
            index = batch.schema.get_field_index(field.name)
            if index < 0:
                columns.append(pa.nulls(batch.num_rows, field.type))
                continue
            column = self._cast(field, batch.column(index))
            if field.name in self._required and column.null_count:
                raise LakeDataError(
                    f"table {self.spec.name}: column {field.name!r} is null in {column.null_count} of "
                    f"{batch.num_rows} rows, and it is required; fill the value or drop the rows"
                )
            columns.append(column)
        conformed = pa.RecordBatch.from_arrays(columns, schema=self.file_schema)
        self._check_source(conformed)
        return conformed, {name: self._partition_column(name, batch, conformed) for name in self.spec.partition_by}

    def _partition_column(self, name: str, batch: pa.RecordBatch, conformed: pa.RecordBatch) -> pa.Array | str:
        field = self.schema.field(name)
        index = batch.schema.get_field_index(name)
        given = self._cast(field, batch.column(index)) if index >= 0 else None
        if given is not None and given.null_count and given.null_count == len(given) and self._derived(name):
            given = None
        if given is not None and given.null_count:
            raise LakeDataError(f"table {self.spec.name}: partition column {name!r} is null in some rows")
        if name == "day" and self.spec.time_column is not None:
            time = conformed.column(self.spec.time_column)
            derived = time.cast(pa.timestamp("us")).cast(pa.date32(), safe=False)
            if given is not None and not given.equals(derived):
                raise LakeDataError(
                    f"table {self.spec.name}: 'day' is not the UTC day of {self.spec.time_column!r} in some rows; "
                    "leave 'day' out, it is derived"
                )
            return derived
        if given is not None:
            return given
        value = self.scope.single(name)
        assert value is not None  # check_names let only such columns pass
        return value

    def _cast(self, field: pa.Field, column: pa.Array) -> pa.Array:
        given, wanted = column.type, field.type
        if given == wanted:
            return column
        try:
            return _cast(column, wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, _NoCastError) as error:
            reason = str(error).split("\n")[0]
            raise LakeDataError(
                f"table {self.spec.name}: column {field.name!r} is {given} and must be {wanted}: {reason}"
            ) from None

    def _check_source(self, batch: pa.RecordBatch) -> None:
        if "source" in self.spec.names:
            odd = [value for value in pc.unique(batch.column("source")).to_pylist() if value not in _SOURCES]
            if odd:
                raise LakeDataError(
                    f"table {self.spec.name}: column 'source' holds {odd[0]!r}; it must be one of {', '.join(Source)}"
                )


_SOURCES = frozenset(str(source) for source in Source)


class _NoCastError(Exception):
    """A conversion that could change the meaning of a value."""


def _cast(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    given = column.type
    types = pa.types
    if types.is_null(given):
        return pa.nulls(len(column), wanted)
    if types.is_dictionary(given):
        return _cast(column.dictionary_decode(), wanted)
    text = types.is_string(given) or types.is_large_string(given) or types.is_string_view(given)
    number = types.is_integer(given) or types.is_floating(given) or types.is_decimal(given)
    if types.is_string(wanted):
        if text:
            return column.cast(wanted)
        raise _NoCastError("cast it to text")
    if types.is_timestamp(wanted):
        if types.is_timestamp(given) and given.tz is not None:
            return column.cast(wanted)
        if types.is_timestamp(given):
            raise _NoCastError("it has no time zone; make it UTC, e.g. dt.replace_time_zone('UTC')")
        raise _NoCastError("cast it to a timestamp with time zone UTC")
    if types.is_date(wanted):
        if types.is_date(given) or text:
            return column.cast(wanted)
        raise _NoCastError("give dates or text like 2024-01-31")
    if types.is_decimal(wanted):
        if types.is_integer(given):
            return column.cast(pa.decimal128(38, wanted.scale)).cast(wanted)
        if types.is_floating(given) or types.is_decimal(given):
            return column.cast(wanted)
        raise _NoCastError("give a decimal or a number")
    if (types.is_floating(wanted) or types.is_integer(wanted)) and number:
        return column.cast(wanted)
    raise _NoCastError("the kinds differ; cast it before publishing")


@dataclass(slots=True)
class _Open:
    """A file being written, with the rows that wait for its next row group."""

    partition: dict[str, str]
    relative: str
    path: str
    writer: pq.ParquetWriter
    metadata: list[pq.FileMetaData]
    waiting: list[pa.RecordBatch]
    folder_made: bool
    waiting_rows: int = 0
    rows: int = 0


class Stager:
    """Writes one table's rows into files, one or more for each partition that occurs."""

    def __init__(self, storage: Storage, conformer: Conformer) -> None:
        self._storage = storage
        self._conformer = conformer
        self._spec = conformer.spec
        self._scope = conformer.scope
        self._file_schema = conformer.file_schema
        self._open: dict[tuple[str, ...], _Open] = {}
        self._done: list[StagedFile] = []
        self._buffered = 0
        self._written: list[str] = []
        self._keys = [name for name in self._spec.sort_by if name in self._file_schema.names]

    def write(self, reader: Iterable[pa.RecordBatch]) -> list[StagedFile]:
        """Write all batches and describe the files. On any error every file is deleted.

        Raises:
            LakeDataError: rows do not fit the table, or lie outside the replaced partitions.
        """
        try:
            for batch in reader:
                if batch.num_rows:
                    for part, rows in self._split(*self._conformer.conform(batch)):
                        self._add(part, rows)
            for key in list(self._open):
                self._close(key)
        except BaseException:
            for file in self._open.values():
                with suppress(Exception):
                    file.writer.close()
            for path in self._written:
                with suppress(OSError):
                    self._storage.discard(path)
            raise
        return self._done

    def _split(
        self, data: pa.RecordBatch, partitions: dict[str, pa.Array | str]
    ) -> Iterator[tuple[tuple[str, ...], pa.RecordBatch]]:
        codes = None
        labels: list[list[str]] = []
        for name, column in partitions.items():
            if isinstance(column, str):
                labels.append([column])
                continue
            low, high = pc.min_max(column).values()
            if low == high:
                labels.append([partition_text(self._spec, name, low.as_py())])
                continue
            encoded = column.dictionary_encode()
            labels.append([partition_text(self._spec, name, value) for value in encoded.dictionary.to_pylist()])
            indices = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            codes = indices if codes is None else codes * len(labels[-1]) + indices
        if codes is None:
            yield tuple(label[0] for label in labels), data
            return
        changes = np.flatnonzero(np.diff(codes)) + 1
        if len(changes) >= len(np.unique(codes)):  # rows of one partition are not all together
            order = np.argsort(codes, kind="stable")
            codes = codes[order]
            data = data.take(pa.array(order))
            changes = np.flatnonzero(np.diff(codes)) + 1
        bounds = [0, *changes.tolist(), data.num_rows]
        for start, stop in itertools.pairwise(bounds):
            code, key = int(codes[start]), []
            for label in reversed(labels):
                code, index = divmod(code, len(label))
                key.append(label[index])
            yield tuple(reversed(key)), data.slice(start, stop - start)

    def _add(self, key: tuple[str, ...], rows: pa.RecordBatch) -> None:
        file = self._open.pop(key, None) or self._create(key)
        self._open[key] = file  # most recently used last
        file.waiting.append(rows)
        file.waiting_rows += rows.num_rows
        self._buffered += rows.num_rows
        while file.waiting_rows >= ROW_GROUP_ROWS:
            self._flush(file, ROW_GROUP_ROWS)
        if file.rows >= FILE_ROWS:
            self._close(key)
        while self._buffered > BUFFERED_ROWS:
            fullest = max(self._open.values(), key=lambda candidate: candidate.waiting_rows)
            self._flush(fullest, fullest.waiting_rows)

    def _create(self, key: tuple[str, ...]) -> _Open:
        if len(self._open) >= OPEN_FILES:
            self._close(next(iter(self._open)))
        partition = dict(zip(self._spec.partition_by, key, strict=True))
        if not self._scope.covers(partition):
            text = "/".join(f"{name}={value}" for name, value in partition.items())
            raise LakeDataError(
                f"table {self._spec.name}: the data has rows of {text}, outside the replaced partition {self._scope}; "
                "filter the data, or replace that partition too"
            )
        folder = "/".join(f"{name}={value}" for name, value in partition.items())
        relative = f"{folder}/part-{uuid.uuid4().hex}.parquet"
        path = self._storage.path(self._spec.name, relative)
        made = self._storage.prepare(path.rpartition("/")[0])
        metadata: list[pq.FileMetaData] = []
        self._written.append(path)
        writer = pq.ParquetWriter(
            path,
            self._file_schema,
            filesystem=self._storage.filesystem,
            metadata_collector=metadata,
            # Money as INT64 instead of fixed-length bytes: smaller, and DuckDB reads it without conversion.
            store_decimal_as_integer=True,
        )
        return _Open(partition, relative, path, writer, metadata, [], made)

    def _flush(self, file: _Open, rows: int) -> None:
        table = pa.Table.from_batches(file.waiting, self._file_schema)
        chunk, rest = table.slice(0, rows), table.slice(rows)
        file.writer.write_table(self._ordered(chunk), row_group_size=ROW_GROUP_ROWS)
        file.waiting = rest.to_batches()
        file.waiting_rows = rest.num_rows
        file.rows += chunk.num_rows
        self._buffered -= chunk.num_rows

    def _ordered(self, chunk: pa.Table) -> pa.Table:
        if chunk.num_rows < 2 or not self._keys or _in_order(chunk, self._keys):
            return chunk
        return chunk.take(pa.array(np.lexsort([_rank(chunk[name]) for name in reversed(self._keys)])))

    def _close(self, key: tuple[str, ...]) -> None:
        file = self._open[key]
        if file.waiting_rows:
            self._flush(file, file.waiting_rows)
        file.writer.close()
        del self._open[key]
        size = self._storage.settle(file.path, folders=3 if file.folder_made else 1)
        statistics = file_statistics(file.metadata[0])
        modified = int(datetime.now(UTC).timestamp() * 1000)
        self._done.append(StagedFile(file.relative, file.partition, file.rows, size, modified, statistics))


def _in_order(chunk: pa.Table, keys: list[str]) -> bool:
    """True when rows ascend by the keys; nulls count as out of order, which costs a sort and nothing else."""
    before, after = chunk.slice(0, chunk.num_rows - 1), chunk.slice(1)
    ordered: Any = None
    for name in reversed(keys):
        less = pc.less(before[name], after[name])
        if ordered is None:
            ordered = pc.less_equal(before[name], after[name])
        else:
            ordered = pc.or_(less, pc.and_(pc.equal(before[name], after[name]), ordered))
    return bool(pc.all(ordered, skip_nulls=False).as_py())


def _rank(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers that sort as the values do, nulls first. Ranks of distinct texts sort far faster than the texts."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    ranks = np.empty(len(order) + 1, dtype=np.int64)
    ranks[order] = np.arange(len(order))
    ranks[-1] = -1
    return ranks[encoded.indices.fill_null(len(order)).to_numpy(zero_copy_only=False)]


def file_statistics(metadata: pq.FileMetaData) -> str:
    """Delta's statistics of one file as JSON (numRecords, minValues, maxValues, nullCount), from the Parquet footer."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    unbounded: set[str] = set()
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            name, statistics = column.path_in_schema, column.statistics
            if statistics is None:
                unbounded.add(name)
                continue
            nulls[name] = nulls.get(name, 0) + statistics.null_count
            if not statistics.has_min_max:
                if statistics.null_count < column.num_values:
                    unbounded.add(name)
                continue
            low[name] = min(low[name], statistics.min) if name in low else statistics.min
            high[name] = max(high[name], statistics.max) if name in high else statistics.max
    for name in [name for name in low if name in unbounded or not (_bound(low[name]) and _bound(high[name]))]:
        del low[name], high[name]
    return _ENCODER.encode(
        {
            "numRecords": metadata.num_rows,
            "minValues": {name: _json(value) for name, value in low.items()},
            "maxValues": {name: _json(value) for name, value in high.items()},
            "nullCount": nulls,
        }
    ).decode()


def _bound(value: Any) -> bool:
    if isinstance(value, bool):
        return False  # Delta keeps no bounds of booleans
    if isinstance(value, str):
        return len(value) <= STATISTICS_TEXT
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (int, Decimal, date))


def _json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.isoformat() if isinstance(value, date) else value
