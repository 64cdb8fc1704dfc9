"""The lake's one way to write: replace whole partitions of several tables in one release.

Every table is a Delta table; what readers may see is the newest row of ``lake_releases`` in Postgres, which names the
version of every table. The order is:

1. stage Parquet files (no lock);
2. take the Postgres advisory lock, on a session that ends with the process;
3. roll back any table whose version is above the released one: a dead writer's;
4. one Delta commit for each table;
5. one row in ``lake_releases``; 6. unlock.

A writer that dies anywhere leaves readers where they were, and the next writer puts its tables in step. Once the row
may have been sent, no file is deleted: a release whose answer got lost is looked up, and litter is left to vacuum.

    lake = Lake(root, database_url)
    lake.publish([PartitionWrite("spot_prices", {"day": "2024-01-31", "region": "us-east-1"}, frame)],
                 run_id=run_id, code_version=version)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from warehouse.lake.delta import (
    DeltaTables,
    Operation,
    commit_properties,
    delta_arrow_schema,
    delta_field,
    live_files,
)
from warehouse.lake.errors import LakeConflictError, LakeDataError, LakeReleaseError
from warehouse.lake.holds import StagingHolds
from warehouse.lake.releases import Release, Releases
from warehouse.lake.sessions import Sessions
from warehouse.lake.staging import Conformer, Scope, Staged, StagedFile, Stager, batches
from warehouse.lake.storage import Storage, refuse_forked_child
from warehouse.lake.tables import TABLES, TableSpec, duckdb_type


@dataclass(frozen=True, slots=True)
class PartitionWrite:
    """Replace partitions of one table with the given rows; no rows removes them.

    ``partition`` names partition columns with one value or several (``{"day": ["2024-01-01", "2024-01-02"]}``); a
    column left out means all its values. ``data`` is a pyarrow Table or RecordBatchReader, a Polars frame, a DuckDB
    relation, or what ``Lake.stage`` returned. ``day`` may be left out of the data: it is derived from the time column.
    """

    table: str
    partition: Mapping[str, Any]
    data: Any


@dataclass(slots=True)
class _Change:
    """What one release does to one table."""

    scopes: list[Scope]
    files: list[StagedFile]
    operation: Operation = "replace"


class Lake:
    """Lake tables below ``root`` and their releases in Postgres.

    Safe to share between threads of one process. Not usable in a forked child.

    Args:
        root: folder or ``s3://bucket/prefix``.
        database_dsn: Postgres address; the session needs session-level advisory locks, so no transaction pooler.
        storage_options: S3 credentials and endpoint where they are not in the environment.
        tables: declarations, by default all of ``warehouse.lake.tables``.
    """

    def __init__(
        self,
        root: Any,
        database_dsn: str,
        storage_options: Mapping[str, str] | None = None,
        *,
        tables: Mapping[str, TableSpec] = TABLES,
    ) -> None:
        refuse_forked_child()
        self.storage = Storage(root, storage_options)
        self.tables = dict(tables)
        self._sessions = Sessions(database_dsn)
        self._releases = Releases(self._sessions)
        self._holds = StagingHolds(self._sessions, self.storage)
        self._delta = DeltaTables(self.storage)

    # Tables

    def spec(self, name: str) -> TableSpec:
        """The table's declaration.

        Raises:
            LakeDataError: there is no such table.
        """
        if name not in self.tables:
            raise LakeDataError(f"there is no lake table {name!r}; the tables are {', '.join(self.tables)}")
        return self.tables[name]

    def create_tables(self, *, run_id: str = "create-tables", code_version: str = "") -> Release:
        """Create what is missing, add columns that declarations gained, and release it. Safe to repeat.

        Raises:
            LakeReleaseError: the folder holds tables that this database never released.
        """
        with self._sessions.locked() as session:
            latest = self._releases.latest(session)
            released = dict(latest.versions) if latest else {}
            versions = dict(released)
            for spec in self.tables.values():
                if spec.name in released:
                    versions[spec.name] = self._delta.add_declared_columns(spec, released[spec.name])
                else:
                    versions[spec.name] = self._delta.create(spec, adopt=latest is not None)
            if latest and versions == released:
                return latest
            return self._releases.add(session, latest, versions, [], 0, run_id, code_version, "create tables")

    def add_column(self, table: str, field: pa.Field, *, run_id: str = "add-column", code_version: str = "") -> Release:
        """Add a nullable column; old rows read as null. Declare it in ``tables.py`` too, so that new lakes have it.

        Raises:
            LakeDataError: the column exists, is not nullable, or its name is not plain lower case.
        """
        spec = self.spec(table)
        if not field.nullable:
            raise LakeDataError(
                f"table {table}: new column {field.name!r} must be nullable, since old rows have no value"
            )
        if not field.name.isidentifier() or field.name != field.name.lower():
            raise LakeDataError(f"table {table}: {field.name!r} is not a plain lower-case column name")
        duckdb_type(field.type)
        with self._sessions.locked() as session:
            latest = self._releases.current(session)
            handle = self._delta.at_release(table, latest.versions[table])
            if field.name in {known.name for known in handle.schema().fields}:
                raise LakeDataError(f"table {table} already has a column {field.name!r}")
            added = delta_field(field, (field.metadata or {}).get(b"comment", b"").decode())
            version = self._delta.add_columns(table, handle, [added], run_id, code_version)
            versions = {**latest.versions, table: version}
            note = f"add column {spec.name}.{field.name}"
            return self._releases.add(session, latest, versions, [], 0, run_id, code_version, note)

    def table_schema(self, table: str) -> pa.Schema:
        """Arrow schema of the table as released now, columns added since included."""
        self.spec(table)
        version = self.release().versions.get(table)
        if version is None:
            raise LakeReleaseError(f"lake table {table} was never created; run `cloudoptim migrate`")
        return delta_arrow_schema(self.delta_table(table, version))

    def delta_table(self, table: str, version: int | None = None) -> DeltaTable:
        """A fresh delta-rs handle on a version (None: whatever Delta has, released or not).

        Raises:
            LakeReleaseError: the version is not there.
        """
        return self._delta.open(table, version)

    # Staging

    def stage(self, table: str, partition: Mapping[str, Any], data: Any) -> Staged:
        """Write files for a later ``publish``, without any lock. Nobody sees them until then.

        Raises:
            LakeDataError: the data does not fit; no file is left behind.
        """
        refuse_forked_child()
        if isinstance(data, Staged):
            if data.table != table:
                raise LakeDataError(f"the files were staged for table {data.table}, not for {table}")
            return data
        spec = self.spec(table)
        scope = Scope.of(spec, partition)
        conformer = Conformer(spec, self.table_schema(table), scope)
        if data is None:
            return Staged(table, scope, ())
        reader = batches(data)
        conformer.check_names(reader.schema)
        hold = self._holds.take()
        try:
            files = Stager(self.storage, conformer).write(reader)
        except BaseException:
            self._holds.release(hold)
            raise
        if not files:
            self._holds.release(hold)
            return Staged(table, scope, ())
        return Staged(table, scope, tuple(files), hold)

    def discard(self, staged: Staged) -> None:
        """Delete staged files that will not be published. Files that were given to ``publish`` are left alone."""
        if staged.hold not in self._holds:
            return
        for file in staged.files:
            with suppress(OSError):
                self.storage.discard(self.storage.path(staged.table, file.path))
        self._holds.release(staged.hold)

    # Publishing

    def publish(
        self,
        writes: Sequence[PartitionWrite | Staged],
        *,
        run_id: str,
        code_version: str = "",
        note: str | None = None,
        based_on: Release | None = None,
        operation: Operation = "replace",
    ) -> Release:
        """Replace all the partitions in one release: readers see all of it or none.

        Returns the release (the current one when nothing changed). Each replaced partition is listed in it with its
        rows before and after. Who read a partition in order to change it passes the release it read as ``based_on``:
        if any replaced partition changed since, nothing is published. What ``stage`` returned is used up by this call,
        whatever its outcome.

        Raises:
            LakeDataError: data does not fit its table, or staged files were used before; nothing was written.
            LakeError: Postgres was lost before it answered (the message says whether the release is published), or a
                vacuum removed staged files.
            LakeBusyError: another writer held the lock for ``LOCK_TIMEOUT_SECONDS``.
            LakeConflictError: a replaced partition changed since ``based_on`` (read it again and repeat), or someone
                commits to the tables without this class.
        """
        staged: list[Staged] = []
        try:
            with ExitStack() as unpublished:
                for write in writes:
                    given = write if isinstance(write, Staged) else write.data
                    if isinstance(given, Staged):
                        unpublished.callback(self.discard, given)
                for write in writes:
                    item = write if isinstance(write, Staged) else self.stage(write.table, write.partition, write.data)
                    staged.append(item)
                    if item.hold and item.hold not in self._holds:
                        raise LakeDataError(
                            f"table {item.table}: these staged files were already published, discarded, or given to a "
                            "publish that failed; stage the data again, with the lake that publishes it"
                        )
                    unpublished.callback(self.discard, item)
                changes: dict[str, _Change] = {}
                for item in staged:
                    change = changes.setdefault(item.table, _Change([], [], operation))
                    for scope in change.scopes:
                        if scope.overlaps(item.scope):
                            raise LakeDataError(
                                f"table {item.table}: two writes of one release replace the same partition "
                                f"({scope} and {item.scope}); put their rows together"
                            )
                    change.scopes.append(item.scope)
                    change.files.extend(item.files)

                def before_release() -> None:
                    self._holds.refuse_vacuumed(staged)
                    unpublished.pop_all()  # from here on the files may be what a release names

                return self._commit(changes, run_id, code_version, note, based_on, before_release)
        finally:
            for item in staged:
                self._holds.release(item.hold)

    def _commit(
        self,
        changes: Mapping[str, _Change],
        run_id: str,
        code_version: str,
        note: str | None,
        based_on: Release | None,
        before_release: Callable[[], None],
    ) -> Release:
        with self._sessions.locked() as session:
            latest = self._releases.current(session)
            versions = dict(latest.versions)
            replaced: list[dict[str, Any]] = []
            for table, change in changes.items():
                if table not in versions:
                    raise LakeReleaseError(f"lake table {table} was never created; run `cloudoptim migrate`")
                handle = self._delta.at_release(table, versions[table])
                if based_on is not None:
                    self._refuse_changed(handle, table, change, based_on, versions[table])
                versions[table] = self._commit_table(handle, table, change, run_id, code_version, replaced)
            if versions == dict(latest.versions):
                return latest
            before_release()
            rows = sum(entry["rows"] for entry in replaced)
            return self._releases.add(session, latest, versions, replaced, rows, run_id, code_version, note)

    def _refuse_changed(
        self, handle: DeltaTable, table: str, change: _Change, based_on: Release, released: int
    ) -> None:
        if based_on.versions[table] == released:
            return
        spec = self.spec(table)
        then = {path for path, *_ in live_files(self.delta_table(table, based_on.versions[table]), spec, change.scopes)}
        now = {path for path, *_ in live_files(handle, spec, change.scopes)}
        if then != now:
            raise LakeConflictError(
                f"table {table}: {', '.join(map(str, change.scopes))} changed since release {based_on.id} was read; "
                "read it again and repeat"
            )

    def _commit_table(
        self,
        handle: DeltaTable,
        table: str,
        change: _Change,
        run_id: str,
        code_version: str,
        replaced: list[dict[str, Any]],
    ) -> int:
        spec = self.spec(table)
        before: dict[tuple[str, ...], int] = {}
        after: dict[tuple[str, ...], int] = {}
        data_change = change.operation != "compact"
        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        removes = []
        for path, size, rows, partition in live_files(handle, spec, change.scopes):
            key = tuple(partition.values())
            before[key] = before.get(key, 0) + rows
            removes.append(RemoveAction(path, data_change, now_ms, size, {**partition}))
        adds = []
        for file in change.files:
            key = tuple(file.partition.values())
            after[key] = after.get(key, 0) + file.rows
            adds.append(
                AddAction(
                    file.path, file.size_bytes, dict(file.partition), file.modified_ms, data_change, file.statistics
                )
            )
        if not adds and not removes:
            return handle.version()
        for key in sorted(before.keys() | after.keys()):
            entry = dict(zip(spec.partition_by, key, strict=True))
            rows_after, rows_before = after.get(key, 0), before.get(key, 0)
            replaced.append({"table": table, "partition": entry, "rows_before": rows_before, "rows": rows_after})
        base = handle.version()
        try:
            # Append with explicit removes is delta-rs' only commit that replaces several partitions at once; its
            # overwrite takes one conjunction of filters. Nothing is retried: under our lock there is no other writer.
            handle.create_write_transaction(
                adds + removes,
                "append",
                handle.schema(),
                list(spec.partition_by),
                commit_properties=commit_properties(change.operation, run_id, code_version),
            )
        except CommitFailedError as error:
            self._delta.forget(table)
            raise LakeConflictError(
                f"table {table}: version {base + 1} was committed by something that does not hold the lake's lock "
                f"({error}); write only through warehouse.lake.store, then publish again"
            ) from error
        handle.update_incremental()
        if handle.version() != base + 1:
            raise LakeConflictError(f"table {table} is at version {handle.version()} after a commit on {base}")
        self._delta.settle_log(table, base + 1)
        return base + 1

    def repair(self) -> list[str]:
        """Roll back every table that is above its released version now, instead of at its next commit.

        Returns the names of the tables that were.
        """
        with self._sessions.locked() as session:
            latest = self._releases.current(session)
            versions = dict(latest.versions)
            ahead = []
            for table, released in latest.versions.items():
                if self._delta.newest(table).version() > released:
                    versions[table] = self._delta.at_release(table, released).version()
                    ahead.append(table)
            if ahead:
                self._releases.add(session, latest, versions, [], 0, "repair", "", f"roll back {', '.join(ahead)}")
            return ahead

    # Releases

    def release(self, which: Literal["latest"] | int = "latest", *, as_of: datetime | None = None) -> Release:
        """The newest release, one by its id, or the newest at a moment.

        Raises:
            LakeReleaseError: there is none, or vacuum may have removed its files.
        """
        return self._releases.find(which, as_of=as_of)

    def pin(self, which: Literal["latest"] | int = "latest", *, as_of: datetime | None = None) -> Release:
        """The release to read: everything read through it stays the same whatever is published meanwhile."""
        return self.release(which, as_of=as_of)

    def releases(self, *, limit: int = 50) -> list[Release]:
        """The newest releases, newest first, expired ones included."""
        return self._releases.newest(limit=limit)

    def keep(self, release_id: int, *, kept: bool = True, note: str | None = None) -> Release:
        """Keep a release readable for good (a statement reads it), or let it go again.

        Raises:
            LakeReleaseError: there is no such release, or vacuum may already have removed its files.
        """
        return self._releases.keep(release_id, kept=kept, note=note)

    def expire(self, *, superseded_before: datetime) -> list[int]:
        """Mark releases that were the newest for the last time before that moment as no longer readable, but for kept
        ones. Returns their ids.

        ``release(as_of=…)`` thus answers for every moment since then. Their files go with the next vacuum; their rows
        stay, for they are the lake's history.
        """
        return self._releases.expire(superseded_before=superseded_before)

    def readable_versions(self) -> dict[str, set[int]]:
        """The versions of every table that a release which has not expired still reads."""
        return self._releases.readable_versions()

    def nothing_staged(self) -> AbstractContextManager[None]:
        """Hold off staging for the time of the block.

        Raises:
            LakeBusyError: a process is staging files.
        """
        return self._sessions.nothing_staged()

    def close(self) -> None:
        """Close the Postgres sessions."""
        self._holds.close()
        self._sessions.close()

    def __enter__(self) -> Lake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
