"""The lake's Delta tables: their schema, their files, and handles that stand at a released version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Field, Schema
from deltalake.exceptions import TableNotFoundError

from warehouse.lake.errors import LakeDataError, LakeReleaseError
from warehouse.lake.staging import Scope
from warehouse.lake.storage import Storage, refuse_forked_child
from warehouse.lake.tables import TableSpec

TABLE_PROPERTIES = {
    "delta.checkpointInterval": "20",
    "delta.deletedFileRetentionDuration": "interval 7 days",
    "delta.logRetentionDuration": "interval 400 days",
    # A kept release may be older than any retention, and it is read through its log: the log is never cut.
    "delta.enableExpiredLogCleanup": "false",
    # Statistics of every column: they also tell which columns a file from before add_column holds.
    "delta.dataSkippingNumIndexedCols": "-1",
}

# What a change rewrites without changing rows (compaction) is marked, so that readers of changes may skip it.
Operation = Literal["replace", "compact", "create", "add column", "vacuum", "roll back"]


class DeltaTables:
    """Handles on the tables below one root. All but ``open`` are for the holder of the lake's lock."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._handles: dict[str, DeltaTable] = {}

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """A fresh delta-rs handle on a version (None: whatever Delta has, released or not).

        Raises:
            LakeReleaseError: the version is not there.
        """
        refuse_forked_child()
        uri = self._storage.uri(table)
        try:
            return DeltaTable(uri, version=version, storage_options=self._storage.delta_options)
        except TableNotFoundError:
            raise LakeReleaseError(
                f"there is no lake table at {uri}; run `cloudoptim migrate`, or correct CLOUDOPTIM_LAKE_ROOT"
            ) from None

    def newest(self, table: str) -> DeltaTable:
        """The cached handle, moved to the newest version Delta has."""
        handle = self._handles.get(table)
        if handle is None:
            handle = self._handles[table] = self.open(table)
        else:
            handle.update_incremental()
        return handle

    def at_release(self, table: str, released: int) -> DeltaTable:
        """A handle whose content is the released one: whatever a dead writer committed above it is rolled back."""
        handle = self.newest(table)
        if handle.version() < released:
            # A cached handle of a folder that was replaced, or the wrong folder.
            handle = self._handles[table] = self.open(table)
        if handle.version() < released:
            raise LakeReleaseError(
                f"{self._storage.uri(table)} is at version {handle.version()}, but version {released} was released: "
                "the folder is not the one this database belongs to, or was restored from an older backup"
            )
        if handle.version() > released:
            handle.restore(released, commit_properties=commit_properties("roll back", f"above-{released}", ""))
            handle.update_incremental()
            self.settle_log(table, handle.version())
        return handle

    def forget(self, table: str) -> None:
        """Drop the cached handle: somebody else committed."""
        self._handles.pop(table, None)

    def create(self, spec: TableSpec, *, adopt: bool) -> int:
        """Make the table, or take what a dead maker left (``adopt``: whatever is in it); returns its version.

        Raises:
            LakeReleaseError: the folder holds a table with rows that this database never released.
        """
        uri, options = self._storage.uri(spec.name), self._storage.delta_options
        self._storage.prepare(self._storage.path(spec.name))
        if DeltaTable.is_deltatable(uri, options):
            handle = self.newest(spec.name)
            if handle.version() > 0 and not adopt:
                raise LakeReleaseError(
                    f"{uri} holds a table at version {handle.version()}, but this database has no release of it; point "
                    "CLOUDOPTIM_LAKE_ROOT at an empty folder, or DATABASE_URL at the database the lake belongs to"
                )
            if handle.version() > 0:
                handle.restore(0, commit_properties=commit_properties("roll back", "create-tables", ""))
                handle.update_incremental()
            return handle.version()
        DeltaTable.create(
            uri,
            schema=delta_schema(spec),
            mode="error",
            partition_by=list(spec.partition_by),
            name=spec.name,
            description=spec.description,
            configuration=TABLE_PROPERTIES,
            storage_options=options,
            commit_properties=commit_properties("create", "create-tables", ""),
        )
        self.settle_log(spec.name, 0)
        return 0

    def add_declared_columns(self, spec: TableSpec, released: int) -> int:
        """Add the columns that the declaration gained; returns the version.

        Raises:
            LakeDataError: one of them is required.
        """
        handle = self.at_release(spec.name, released)
        known = {field.name for field in handle.schema().fields}
        missing = [column for column in spec.columns if column.name not in known]
        for column in missing:
            if column.required:
                raise LakeDataError(
                    f"table {spec.name} gained the required column {column.name!r}, but its old rows have no value for "
                    "it; declare it optional"
                )
        if missing:
            fields = [delta_field(column.field(), column.description) for column in missing]
            self.add_columns(spec.name, handle, fields, "create-tables", "")
        self._relax_columns(spec, handle)
        return handle.version()

    def _relax_columns(self, spec: TableSpec, handle: DeltaTable) -> None:
        """Let columns be null that were required when the table was made and are declared optional now."""
        optional = {column.name for column in spec.columns if not column.required}
        fields = handle.schema().fields
        if not any(field.name in optional and not field.nullable for field in fields):
            return
        relaxed = Schema(
            [
                Field(
                    field.name, field.type, nullable=field.nullable or field.name in optional, metadata=field.metadata
                )
                for field in fields
            ]
        )
        # delta-rs changes a schema with an overwrite only: this one replaces a partition that no table has.
        handle.create_write_transaction(
            [],
            "overwrite",
            relaxed,
            list(spec.partition_by),
            partition_filters=[(spec.partition_by[0], "=", "0001-01-01")],
            commit_properties=commit_properties("add column", "create-tables", ""),
        )
        handle.update_incremental()
        self.settle_log(spec.name, handle.version())

    def add_columns(
        self, table: str, handle: DeltaTable, fields: Sequence[Field], run_id: str, code_version: str
    ) -> int:
        """Commit nullable columns; returns the new version."""
        handle.alter.add_columns(list(fields), commit_properties=commit_properties("add column", run_id, code_version))
        handle.update_incremental()
        self.settle_log(table, handle.version())
        return handle.version()

    def settle_log(self, table: str, version: int) -> None:
        """Make a commit survive a power cut before a release names it: delta-rs does not sync its log."""
        if self._storage.remote:
            return
        for name in (f"{version:020d}.checkpoint.parquet", "_last_checkpoint", f"{version:020d}.json"):
            path = Path(self._storage.path(table, "_delta_log", name))
            if path.exists():
                self._storage.settle(str(path))


def live_files(
    handle: DeltaTable, spec: TableSpec, scopes: Sequence[Scope] | None = None
) -> Iterator[tuple[str, int, int, dict[str, str]]]:
    """Files of the handle's version inside the scopes: path below the table, bytes, rows, partition values as text."""
    actions = pa.table(handle.get_add_actions())
    if not actions.num_rows:
        return
    columns = {}
    for name in spec.partition_by:
        columns[name] = pc.struct_field(actions["partition"].combine_chunks(), name).cast(pa.string())
    keep: Any = None
    for scope in scopes or ():
        inside: Any = None
        for name, values in scope.values:
            if values is None:
                continue
            hit = pc.is_in(columns[name], value_set=pa.array(sorted(values), pa.string()))
            inside = hit if inside is None else pc.and_(inside, hit)
        if inside is None:
            inside = pa.array([True] * actions.num_rows)
        keep = inside if keep is None else pc.or_(keep, inside)
    rows = pa.table(
        {
            "path": actions["path"],
            "size": actions["size_bytes"],
            "rows": actions["num_records"],
            **{f"p_{name}": column for name, column in columns.items()},
        }
    )
    for row in (rows if keep is None else rows.filter(keep)).to_pylist():
        partition = {name: row[f"p_{name}"] for name in spec.partition_by}
        yield row["path"], row["size"], row["rows"] or 0, partition


def delta_arrow_schema(handle: DeltaTable) -> pa.Schema:
    """Arrow schema of a Delta table's version, without field metadata."""
    schema = pa.schema(handle.schema().to_arrow())
    return pa.schema([pa.field(field.name, field.type, field.nullable) for field in schema])


def delta_field(field: pa.Field, description: str) -> Field:
    """An Arrow field as Delta's, with its description as comment."""
    delta = Schema.from_arrow(pa.schema([field.remove_metadata()])).fields[0]
    return Field(
        delta.name, delta.type, nullable=field.nullable, metadata={"comment": description} if description else None
    )


def delta_schema(spec: TableSpec) -> Schema:
    """A declaration's columns as Delta's schema."""
    return Schema([delta_field(column.field(), column.description) for column in spec.columns])


def commit_properties(operation: Operation, run_id: str, code_version: str) -> CommitProperties:
    """What a commit says of itself; it is never retried: under the lake's lock there is no other writer."""
    return CommitProperties(
        custom_metadata={"cloudoptim_operation": operation, "run_id": run_id, "code_version": code_version},
        max_commit_retries=0,
    )
