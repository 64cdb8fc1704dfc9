"""Which Parquet files hold one version of a table, and the SQL that reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from deltalake import DeltaTable

from warehouse.lake.delta import delta_arrow_schema
from warehouse.lake.errors import LakeError
from warehouse.lake.pruning import Days
from warehouse.lake.store import Lake
from warehouse.lake.tables import TableSpec, duckdb_type

# Reader features of Delta that do not change what a Parquet file holds.
HARMLESS_FEATURES = frozenset({"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint"})
_DAY_IN_PATH = re.compile(r"/day=(\d{4}-\d\d-\d\d)/")


@dataclass(frozen=True, slots=True)
class Files:
    """Files that hold the same columns."""

    uris: tuple[str, ...]
    columns: frozenset[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to read one version of one table."""

    table: str
    schema: pa.Schema
    partition_by: tuple[str, ...]
    groups: tuple[Files, ...]
    dataset: pads.Dataset | None

    @property
    def uris(self) -> list[str]:
        return [uri for group in self.groups for uri in group.uris]

    def within(self, days: Days) -> Plan:
        """The same table, of these days' files only."""
        first, last = days.first.isoformat(), days.last.isoformat()
        groups = []
        for group in self.groups:
            # A file whose path tells no day is read, whatever it holds.
            uris = tuple(
                uri for uri in group.uris if not (day := _DAY_IN_PATH.search(uri)) or first <= day.group(1) <= last
            )
            if uris:
                groups.append(Files(uris, group.columns))
        return replace(self, groups=tuple(groups))


def quoted_name(identifier: str) -> str:
    """A name as SQL writes it."""
    return '"' + identifier.replace('"', '""') + '"'


def quoted_text(value: str) -> str:
    """A text as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def plan_table(lake: Lake, table: str, version: int) -> Plan:
    """List the files of one version.

    Raises:
        LakeError: the table uses deletion vectors, column mapping or another feature that makes plain Parquet reads
            wrong.
    """
    handle = lake.delta_table(table, version)
    refuse_features(handle, table)
    schema = delta_arrow_schema(handle)
    partition_by = tuple(handle.metadata().partition_columns)
    actions = pa.table(handle.get_add_actions())
    if not actions.num_rows:
        return Plan(table, schema, partition_by, (), None)
    stored = [name for name in schema.names if name not in partition_by]
    uris = [f"{handle.table_uri.rstrip('/').removeprefix('file://')}/{path}" for path in actions["path"].to_pylist()]
    groups: dict[frozenset[str], list[str]] = {}
    for uri, columns in zip(uris, _columns_of_files(actions, stored), strict=True):
        groups.setdefault(columns, []).append(uri)
    plan = tuple(Files(tuple(sorted(files)), columns) for columns, files in groups.items())
    dataset = _dataset(lake, schema, partition_by, actions, uris) if lake.storage.remote else None
    return Plan(table, schema, partition_by, plan, dataset)


def refuse_features(handle: DeltaTable, table: str) -> None:
    """Raise when reading the table's Parquet files directly would give wrong rows."""
    protocol = handle.protocol()
    configuration = handle.metadata().configuration
    features = set(protocol.reader_features or ())
    mapping = configuration.get("delta.columnMapping.mode", "none")
    vectors = configuration.get("delta.enableDeletionVectors", "false")
    odd = features - HARMLESS_FEATURES
    if mapping != "none":
        odd.add("columnMapping")
    if vectors == "true":
        odd.add("deletionVectors")
    if odd:
        raise LakeError(
            f"lake table {table} uses {', '.join(sorted(odd))}, which readers of plain Parquet files would misread; "
            "another engine switched it on: restore the last release (Lake.repair) and write only through the lake"
        )


def _columns_of_files(actions: pa.Table, stored: list[str]) -> list[frozenset[str]]:
    """Which columns each file holds: those its statistics count nulls of. Files older than a column lack it.

    A file without statistics is none of ours and is taken to hold every column: reading it fails if it does not.
    """
    if "null_count" not in actions.column_names:
        return [frozenset(stored)] * actions.num_rows
    counts = actions["null_count"].combine_chunks()
    known = [name for name in stored if counts.type.get_field_index(name) >= 0]
    present = {name: pc.is_valid(pc.struct_field(counts, name)).to_numpy(zero_copy_only=False) for name in known}
    if all(present[name].all() for name in known) and len(known) == len(stored):
        return [frozenset(stored)] * actions.num_rows
    described = pc.is_valid(actions["num_records"]).to_pylist()
    return [
        frozenset(name for name in known if present[name][row]) if described[row] else frozenset(stored)
        for row in range(actions.num_rows)
    ]


def _dataset(
    lake: Lake, schema: pa.Schema, partition_by: Sequence[str], actions: pa.Table, uris: list[str]
) -> pads.Dataset:
    """The files as an Arrow dataset, for stores DuckDB cannot read itself (its httpfs extension needs a download)."""
    options = pads.ParquetFragmentScanOptions(pre_buffer=True)
    file_format = pads.ParquetFileFormat(default_fragment_scan_options=options)
    partitions = actions["partition"].to_pylist()
    fragments = []
    for uri, partition in zip(uris, partitions, strict=True):
        expression: Any = None
        for name in partition_by:
            term = pc.field(name) == pa.scalar(partition[name], schema.field(name).type)
            expression = term if expression is None else expression & term
        fragments.append(
            file_format.make_fragment(
                uri.removeprefix("s3://"), lake.storage.filesystem, partition_expression=expression
            )
        )
    nullable = pa.schema([pa.field(field.name, field.type) for field in schema])
    return pads.FileSystemDataset(fragments, nullable, file_format, lake.storage.filesystem)


def beneath(table: str) -> str:
    """The name under which a cursor knows an Arrow dataset: one that no text can name."""
    return f"{table} of everybody"


def select_files(plan: Plan) -> str:
    """SQL that reads the plan's files with all columns in the table's order."""
    types = {field.name: duckdb_type(field.type) for field in plan.schema}
    if not plan.groups:
        columns = ", ".join(f"CAST(NULL AS {types[name]}) AS {quoted_name(name)}" for name in plan.schema.names)
        return f"SELECT {columns} WHERE false"
    hive = ", ".join(f"{quoted_text(name)}: {types[name]}" for name in plan.partition_by)
    parts = []
    for group in plan.groups:
        columns = ", ".join(
            quoted_name(name)
            if name in plan.partition_by or name in group.columns
            else f"CAST(NULL AS {types[name]}) AS {quoted_name(name)}"
            for name in plan.schema.names
        )
        files = ", ".join(map(quoted_text, group.uris))
        parts.append(
            f"SELECT {columns} FROM read_parquet([{files}], hive_partitioning = true, hive_types = {{{hive}}})"
        )
    return " UNION ALL ".join(parts)


def scoped(spec: TableSpec | None, schema: pa.Schema, base: str) -> dict[str, str]:
    """What each scope sees of a table: everything, one customer's rows, or nothing that belongs to customers."""
    everything = f"SELECT * FROM {base}"
    if "customer_id" not in schema.names:
        return {"all": everything, "tenant": everything, "shared": everything}
    shared = " OR customer_id IS NULL" if spec is not None and spec.shared_when_null else ""
    return {"all": everything, "tenant": f"{everything} WHERE customer_id = getvariable('customer_id'){shared}"}
