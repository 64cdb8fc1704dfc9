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

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, Field, Schema
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction
from psycopg.types.json import Jsonb

from warehouse.lake.errors import LakeBusyError, LakeConflictError, LakeDataError, LakeError, LakeReleaseError
from warehouse.lake.staging import Conformer, Scope, Staged, StagedFile, Stager, batches
from warehouse.lake.storage import Storage, refuse_forked_child
from warehouse.lake.tables import TABLES, TableSpec, duckdb_type
from warehouse.postgres.session import SYSTEM_ROLE

# Advisory lock names, one lake for each database.
COMMIT_LOCK = int.from_bytes(b"lakepub\0", "big")
STAGING_LOCK = int.from_bytes(b"lakestg\0", "big")
# A commit under the lock takes tens of milliseconds; a queue of two minutes means something is stuck.
LOCK_TIMEOUT_SECONDS = 120
# The server ends the session of a machine that vanished, and with it the lake's lock, after 20 + 3 x 10 s of silence:
# well before those who wait give up. Data on its way silences keepalives, so it has a limit of its own.
VANISHED_CLIENT = """
SELECT set_config(name, value, false) FROM (VALUES
    ('tcp_keepalives_idle', '20s'), ('tcp_keepalives_interval', '10s'), ('tcp_keepalives_count', '3'),
    ('tcp_user_timeout', '50s')
) AS settings (name, value)
"""
# The same the other way round: who waits for an answer of a server that vanished would wait for two hours.
VANISHED_SERVER: dict[str, Any] = {
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 50_000,
}

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


@dataclass(frozen=True, slots=True)
class Release:
    """One published state of the whole lake: ``versions`` has the Delta version of every table."""

    id: int
    released_at: datetime
    versions: Mapping[str, int]
    replaced: Sequence[Mapping[str, Any]]
    rows: int
    run_id: str
    code_version: str
    kept: bool
    expired_at: datetime | None
    note: str | None


@dataclass(slots=True)
class _Change:
    """What one release does to one table."""

    scopes: list[Scope]
    files: list[StagedFile]
    operation: Operation = "replace"


def libpq_dsn(dsn: str) -> str:
    """The address without SQLAlchemy's driver suffix."""
    scheme, separator, rest = dsn.partition("://")
    return f"{scheme.partition('+')[0]}{separator}{rest}" if separator else dsn


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
        self._dsn = libpq_dsn(database_dsn)
        self._handles: dict[str, DeltaTable] = {}
        self._write_guard = threading.RLock()
        self._writing: psycopg.Connection | None = None
        self._read_guard = threading.Lock()
        self._reading: psycopg.Connection | None = None
        self._staging_guard = threading.Lock()
        self._staging: psycopg.Connection | None = None
        # Staged files that wait for their release; False where vacuum was not kept away all the time.
        self._holds: dict[str, bool] = {}

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
        with self._locked() as session:
            latest = self._latest(session)
            released = dict(latest.versions) if latest else {}
            versions = dict(released)
            for spec in self.tables.values():
                if spec.name in released:
                    versions[spec.name] = self._add_declared_columns(spec, released[spec.name])
                else:
                    versions[spec.name] = self._create(spec, adopt=latest is not None)
            if latest and versions == released:
                return latest
            return self._release(session, latest, versions, [], 0, run_id, code_version, "create tables")

    def _create(self, spec: TableSpec, *, adopt: bool) -> int:
        uri, options = self.storage.uri(spec.name), self.storage.delta_options
        self.storage.prepare(self.storage.path(spec.name))
        if DeltaTable.is_deltatable(uri, options):
            handle = self._handle(spec.name)
            if handle.version() > 0 and not adopt:
                raise LakeReleaseError(
                    f"{uri} holds a table at version {handle.version()}, but this database has no release of it; point "
                    "CLOUDOPTIM_LAKE_ROOT at an empty folder, or DATABASE_URL at the database the lake belongs to"
                )
            if handle.version() > 0:
                handle.restore(0, commit_properties=_properties("roll back", "create-tables", ""))
                handle.update_incremental()
            return handle.version()
        DeltaTable.create(
            uri,
            schema=_delta_schema(spec),
            mode="error",
            partition_by=list(spec.partition_by),
            name=spec.name,
            description=spec.description,
            configuration=TABLE_PROPERTIES,
            storage_options=options,
            commit_properties=_properties("create", "create-tables", ""),
        )
        self._settle_log(spec.name, 0)
        return 0

    def _add_declared_columns(self, spec: TableSpec, released: int) -> int:
        handle = self._at_release(spec.name, released)
        known = {field.name for field in handle.schema().fields}
        missing = [column for column in spec.columns if column.name not in known]
        for column in missing:
            if column.required:
                raise LakeDataError(
                    f"table {spec.name} gained the required column {column.name!r}, but its old rows have no value for "
                    "it; declare it optional"
                )
        if missing:
            handle.alter.add_columns(
                [_delta_field(column.field(), column.description) for column in missing],
                commit_properties=_properties("add column", "create-tables", ""),
            )
            handle.update_incremental()
            self._settle_log(spec.name, handle.version())
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
            commit_properties=_properties("add column", "create-tables", ""),
        )
        handle.update_incremental()
        self._settle_log(spec.name, handle.version())

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
        with self._locked() as session:
            latest = self._current(session)
            handle = self._at_release(table, latest.versions[table])
            if field.name in {known.name for known in handle.schema().fields}:
                raise LakeDataError(f"table {table} already has a column {field.name!r}")
            handle.alter.add_columns(
                [_delta_field(field, (field.metadata or {}).get(b"comment", b"").decode())],
                commit_properties=_properties("add column", run_id, code_version),
            )
            handle.update_incremental()
            self._settle_log(table, handle.version())
            versions = {**latest.versions, table: handle.version()}
            note = f"add column {spec.name}.{field.name}"
            return self._release(session, latest, versions, [], 0, run_id, code_version, note)

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
        refuse_forked_child()
        uri = self.storage.uri(table)
        try:
            return DeltaTable(uri, version=version, storage_options=self.storage.delta_options)
        except TableNotFoundError:
            raise LakeReleaseError(
                f"there is no lake table at {uri}; run `cloudoptim migrate`, or correct CLOUDOPTIM_LAKE_ROOT"
            ) from None

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
        hold = self._hold_staging()
        try:
            files = Stager(self.storage, conformer).write(reader)
        except BaseException:
            self._release_staging(hold)
            raise
        if not files:
            self._release_staging(hold)
            return Staged(table, scope, ())
        return Staged(table, scope, tuple(files), hold)

    def discard(self, staged: Staged) -> None:
        """Delete staged files that will not be published. Files that were given to ``publish`` are left alone."""
        if staged.hold not in self._holds:
            return
        for file in staged.files:
            with suppress(OSError):
                self.storage.discard(self.storage.path(staged.table, file.path))
        self._release_staging(staged.hold)

    def _hold_staging(self) -> str:
        """Hold the shared staging lock while files wait for their release, so that no vacuum takes them for litter."""
        with self._staging_guard:
            self._lock_staging("pg_advisory_lock_shared")
            hold = uuid.uuid4().hex
            self._holds[hold] = True
            return hold

    def _lock_staging(self, function: Literal["pg_advisory_lock_shared", "pg_try_advisory_lock_shared"]) -> bool:
        """Take the lock, again if it is held: that tells whether its session still lives. False: a vacuum has it."""
        for attempt in (1, 2):
            if self._staging is None or self._staging.closed:
                self._holds = dict.fromkeys(self._holds, False)
                self._staging = self._connect("cloudoptim lake staging")
            try:
                answer = self._staging.execute(f"SELECT {function}(%s)", [STAGING_LOCK]).fetchone()
                return answer is not None and answer[0] is not False
            except psycopg.OperationalError:
                self._staging.close()  # a kept session whose server restarted; a new one may do
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _release_staging(self, hold: str) -> None:
        with self._staging_guard:
            if self._holds.pop(hold, None) is None or self._holds or self._staging is None:
                return
            try:
                self._staging.execute("SELECT pg_advisory_unlock_all()")
            except psycopg.Error:
                self._staging.close()

    def _refuse_vacuumed(self, staged: Sequence[Staged]) -> None:
        """Refuse files that a vacuum removed, or may be removing, since the session that held it off was lost.

        Asked when the newest Delta versions name the files: a vacuum that begins after this keeps them. The lock is
        only tried, because its holder may be waiting for ours.
        """
        waiting = [item for item in staged if item.hold]
        if not waiting:
            return
        with self._staging_guard:
            safe = self._lock_staging("pg_try_advisory_lock_shared")
            exposed = [item for item in waiting if not self._holds.get(item.hold)]
        for item in exposed:
            found = self.storage.filesystem.get_file_info([self.storage.path(item.table, f.path) for f in item.files])
            if not safe or any(info.type != pafs.FileType.File for info in found):
                raise LakeError(
                    f"table {item.table}: the session that kept vacuum away from the staged files was lost, and a "
                    "vacuum has run since; stage the data again, then publish"
                )

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
                    self._refuse_vacuumed(staged)
                    unpublished.pop_all()  # from here on the files may be what a release names

                return self._commit(changes, run_id, code_version, note, based_on, before_release)
        finally:
            for item in staged:
                self._release_staging(item.hold)

    def _commit(
        self,
        changes: Mapping[str, _Change],
        run_id: str,
        code_version: str,
        note: str | None,
        based_on: Release | None,
        before_release: Callable[[], None],
    ) -> Release:
        with self._locked() as session:
            latest = self._current(session)
            versions = dict(latest.versions)
            replaced: list[dict[str, Any]] = []
            for table, change in changes.items():
                if table not in versions:
                    raise LakeReleaseError(f"lake table {table} was never created; run `cloudoptim migrate`")
                handle = self._at_release(table, versions[table])
                if based_on is not None:
                    self._refuse_changed(handle, table, change, based_on, versions[table])
                versions[table] = self._commit_table(handle, table, change, run_id, code_version, replaced)
            if versions == dict(latest.versions):
                return latest
            before_release()
            rows = sum(entry["rows"] for entry in replaced)
            return self._release(session, latest, versions, replaced, rows, run_id, code_version, note)

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
                commit_properties=_properties(change.operation, run_id, code_version),
            )
        except CommitFailedError as error:
            self._handles.pop(table, None)
            raise LakeConflictError(
                f"table {table}: version {base + 1} was committed by something that does not hold the lake's lock "
                f"({error}); write only through warehouse.lake.store, then publish again"
            ) from error
        handle.update_incremental()
        if handle.version() != base + 1:
            raise LakeConflictError(f"table {table} is at version {handle.version()} after a commit on {base}")
        self._settle_log(table, base + 1)
        return base + 1

    def _settle_log(self, table: str, version: int) -> None:
        """Make a commit survive a power cut before a release names it: delta-rs does not sync its log."""
        if self.storage.remote:
            return
        for name in (f"{version:020d}.checkpoint.parquet", "_last_checkpoint", f"{version:020d}.json"):
            path = Path(self.storage.path(table, "_delta_log", name))
            if path.exists():
                self.storage.settle(str(path))

    def repair(self) -> list[str]:
        """Roll back every table that is above its released version now, instead of at its next commit.

        Returns the names of the tables that were.
        """
        with self._locked() as session:
            latest = self._current(session)
            versions = dict(latest.versions)
            ahead = []
            for table, released in latest.versions.items():
                if self._handle(table).version() > released:
                    versions[table] = self._at_release(table, released).version()
                    ahead.append(table)
            if ahead:
                self._release(session, latest, versions, [], 0, "repair", "", f"roll back {', '.join(ahead)}")
            return ahead

    # Releases

    def release(self, which: Literal["latest"] | int = "latest", *, as_of: datetime | None = None) -> Release:
        """The newest release, one by its id, or the newest at a moment.

        Raises:
            LakeReleaseError: there is none, or vacuum may have removed its files.
        """
        if as_of is not None:
            if as_of.tzinfo is None:
                raise LakeReleaseError(f"as_of {as_of.isoformat()} has no time zone; give UTC, e.g. 2024-01-31T12:00Z")
            row = self._read(f"{_SELECT} WHERE released_at <= %s ORDER BY id DESC LIMIT 1", [as_of])
            missing = f"the lake has no release at or before {as_of.isoformat()}"
        elif which == "latest":
            row = self._read(f"{_SELECT} ORDER BY id DESC LIMIT 1", [])
            missing = "the lake has no release yet; run `cloudoptim migrate` to create its tables"
        else:
            row = self._read(f"{_SELECT} WHERE id = %s", [which])
            missing = f"the lake has no release {which}; the table lake_releases in Postgres lists them"
        if not row:
            raise LakeReleaseError(missing)
        release = Release(*row[0])
        if release.expired_at is not None:
            raise LakeReleaseError(
                f"release {release.id} of {release.released_at.isoformat()} expired on "
                f"{release.expired_at.isoformat()} and its files may be gone; keep releases that must stay readable"
            )
        return release

    def pin(self, which: Literal["latest"] | int = "latest", *, as_of: datetime | None = None) -> Release:
        """The release to read: everything read through it stays the same whatever is published meanwhile."""
        return self.release(which, as_of=as_of)

    def releases(self, *, limit: int = 50) -> list[Release]:
        """The newest releases, newest first, expired ones included."""
        return [Release(*row) for row in self._read(f"{_SELECT} ORDER BY id DESC LIMIT %s", [limit])]

    def keep(self, release_id: int, *, kept: bool = True, note: str | None = None) -> Release:
        """Keep a release readable for good (a statement reads it), or let it go again.

        Raises:
            LakeReleaseError: there is no such release, or vacuum may already have removed its files.
        """
        with self._locked() as session:
            self.release(release_id)
            session.execute(
                "UPDATE lake_releases SET kept = %s, note = coalesce(%s, note) WHERE id = %s", [kept, note, release_id]
            )
        return self.release(release_id)

    def expire(self, *, superseded_before: datetime) -> list[int]:
        """Mark releases that were the newest for the last time before that moment as no longer readable, but for kept
        ones. Returns their ids.

        ``release(as_of=…)`` thus answers for every moment since then. Their files go with the next vacuum; their rows
        stay, for they are the lake's history.
        """
        with self._locked() as session:
            rows = session.execute(
                "UPDATE lake_releases old SET expired_at = clock_timestamp() WHERE NOT kept AND expired_at IS NULL AND "
                "(SELECT released_at FROM lake_releases WHERE id > old.id ORDER BY id LIMIT 1) < %s RETURNING id",
                [superseded_before],
            ).fetchall()
        return sorted(row[0] for row in rows)

    def readable_versions(self) -> dict[str, set[int]]:
        """The versions of every table that a release which has not expired still reads."""
        versions: dict[str, set[int]] = {}
        for (release,) in self._read("SELECT versions FROM lake_releases WHERE expired_at IS NULL", []):
            for table, version in release.items():
                versions.setdefault(table, set()).add(version)
        return versions

    @contextmanager
    def nothing_staged(self) -> Iterator[None]:
        """Hold off staging for the time of the block.

        Raises:
            LakeBusyError: a process is staging files now.
        """
        with self._connect("cloudoptim lake vacuum") as session:
            held = session.execute("SELECT pg_try_advisory_lock(%s)", [STAGING_LOCK]).fetchone()
            if not held or not held[0]:
                raise LakeBusyError(
                    "files are being staged for a commit, and a short retention could remove them; use the default "
                    "retention, or try again when no writer runs"
                )
            yield

    def _latest(self, session: psycopg.Connection) -> Release | None:
        row = session.execute(f"{_SELECT} ORDER BY id DESC LIMIT 1").fetchone()
        return Release(*row) if row else None

    def _current(self, session: psycopg.Connection) -> Release:
        latest = self._latest(session)
        if latest is None:
            raise LakeReleaseError("the lake has no release yet; run `cloudoptim migrate` to create its tables")
        return latest

    def _release(
        self,
        session: psycopg.Connection,
        base: Release | None,
        versions: Mapping[str, int],
        replaced: list[dict[str, Any]],
        rows: int,
        run_id: str,
        code_version: str,
        note: str | None,
    ) -> Release:
        # The condition fences a writer whose lock was lost: its session is gone then, and so is its insert; should a
        # proxy have reconnected it silently, another's release in between makes the insert write nothing.
        statement = (
            "INSERT INTO lake_releases (released_at, versions, replaced, rows, run_id, code_version, note) "
            "SELECT clock_timestamp(), %s, %s, %s, %s, %s, %s "
            "WHERE coalesce((SELECT max(id) FROM lake_releases), 0) = %s "
            f"RETURNING {_COLUMNS}"
        )
        after = base.id if base else 0
        values = [Jsonb(dict(versions)), Jsonb(replaced), rows, run_id, code_version, note, after]
        try:
            row = session.execute(statement, values).fetchone()
        except psycopg.OperationalError as error:
            session.close()
            return self._look_up(after, versions, run_id, error)
        if row is None:
            raise LakeConflictError(
                "another release was published while this writer believed it held the lock; connect to Postgres "
                "without a transaction pooler, then publish again"
            )
        return Release(*row)

    def _look_up(self, after: int, versions: Mapping[str, int], run_id: str, error: Exception) -> Release:
        """The release whose INSERT got no answer, if it is there.

        The lock is free once the lost session has ended: then the row is there, or never will be. It is the first one
        after ``after``, and nobody else's can name its versions, because a Delta version is one writer's commit and is
        rolled back by a newer one.
        """
        reason = str(error).strip().split("\n")[0]
        try:
            with self._connect("cloudoptim lake writer") as session:
                self._wait_for_lock(session)
                row = session.execute(f"{_SELECT} WHERE id > %s ORDER BY id LIMIT 1", [after]).fetchone()
        except (psycopg.Error, LakeError) as unknown:
            raise LakeError(
                f"Postgres was lost while run {run_id} was published ({reason}), and it is not known whether the "
                f"release was written; see lake_releases for an id above {after}, or run it again, which does no harm"
            ) from unknown
        release = Release(*row) if row else None
        if release is None or release.versions != versions:
            raise LakeError(
                f"Postgres was lost while run {run_id} was published ({reason}): nothing of it is visible; run it again"
            ) from error
        return release

    # Delta handles

    def _handle(self, table: str) -> DeltaTable:
        """The cached handle, moved to the newest version Delta has."""
        handle = self._handles.get(table)
        if handle is None:
            handle = self._handles[table] = self.delta_table(table)
        else:
            handle.update_incremental()
        return handle

    def _at_release(self, table: str, released: int) -> DeltaTable:
        """A handle whose content is the released one: whatever a dead writer committed above it is rolled back."""
        handle = self._handle(table)
        if handle.version() < released:
            # A cached handle of a folder that was replaced, or the wrong folder.
            handle = self._handles[table] = self.delta_table(table)
        if handle.version() < released:
            raise LakeReleaseError(
                f"{self.storage.uri(table)} is at version {handle.version()}, but version {released} was released: the "
                "folder is not the one this database belongs to, or was restored from an older backup"
            )
        if handle.version() > released:
            handle.restore(released, commit_properties=_properties("roll back", f"above-{released}", ""))
            handle.update_incremental()
            self._settle_log(table, handle.version())
        return handle

    # Postgres sessions

    def _connect(self, application: str) -> psycopg.Connection:
        try:
            session = psycopg.connect(
                self._dsn, autocommit=True, connect_timeout=5, application_name=application, **VANISHED_SERVER
            )
        except psycopg.OperationalError as error:
            reason = str(error).strip().split("\n")[0]
            raise LakeError(f"the lake cannot reach Postgres ({reason}); check DATABASE_URL") from error
        session.execute(
            "SELECT set_config('role', rolname, false) FROM pg_roles "
            "WHERE rolname = %s AND pg_has_role(session_user, oid, 'MEMBER')",
            [SYSTEM_ROLE],
        )
        session.execute(VANISHED_CLIENT)
        return session

    def _read(self, statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        refuse_forked_child()
        with self._read_guard:
            for attempt in (1, 2):
                if self._reading is None or self._reading.closed:
                    self._reading = self._connect("cloudoptim lake reader")
                try:
                    return self._reading.execute(statement, parameters).fetchall()
                except psycopg.OperationalError:
                    self._reading.close()
                    if attempt == 2:
                        raise
        raise AssertionError("unreachable")

    @contextmanager
    def _locked(self) -> Iterator[psycopg.Connection]:
        """Hold the lake's lock on a session of its own; whatever ends the session ends the lock."""
        refuse_forked_child()
        with self._write_guard:
            session = self._lock()
            try:
                yield session
            except BaseException:
                session.close()  # ends the lock whatever state the session is in
                raise
            try:
                session.execute("SELECT pg_advisory_unlock(%s)", [COMMIT_LOCK])
            except psycopg.Error:
                session.close()  # unlocks as well, and what was done under the lock stands
            except BaseException:
                session.close()
                raise

    def _lock(self) -> psycopg.Connection:
        for attempt in (1, 2):
            if self._writing is None or self._writing.closed:
                self._writing = self._connect("cloudoptim lake writer")
            try:
                self._wait_for_lock(self._writing)
                return self._writing
            except psycopg.OperationalError:
                self._writing.close()  # a kept session whose server restarted; a new one may do
                if attempt == 2:
                    raise
            except BaseException:
                self._writing.close()  # an interrupt may come when the lock is already ours
                raise
        raise AssertionError("unreachable")

    def _wait_for_lock(self, session: psycopg.Connection) -> None:
        session.execute("SELECT set_config('lock_timeout', %s, false)", [f"{LOCK_TIMEOUT_SECONDS}s"])
        try:
            session.execute("SELECT pg_advisory_lock(%s)", [COMMIT_LOCK])
        except psycopg.errors.LockNotAvailable:
            raise LakeBusyError(
                f"another writer has held the lake's lock for {LOCK_TIMEOUT_SECONDS} s; see pg_locks "
                "(locktype advisory) for its process, then publish again"
            ) from None

    def close(self) -> None:
        """Close the Postgres sessions."""
        for session in (self._reading, self._staging, self._writing):
            if session is not None:
                session.close()

    def __enter__(self) -> Lake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_COLUMNS = "id, released_at, versions, replaced, rows, run_id, code_version, kept, expired_at, note"
_SELECT = f"SELECT {_COLUMNS} FROM lake_releases"


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


def _delta_field(field: pa.Field, description: str) -> Field:
    delta = Schema.from_arrow(pa.schema([field.remove_metadata()])).fields[0]
    return Field(
        delta.name, delta.type, nullable=field.nullable, metadata={"comment": description} if description else None
    )


def _delta_schema(spec: TableSpec) -> Schema:
    return Schema([_delta_field(column.field(), column.description) for column in spec.columns])


def _properties(operation: Operation, run_id: str, code_version: str) -> CommitProperties:
    return CommitProperties(
        custom_metadata={"cloudoptim_operation": operation, "run_id": run_id, "code_version": code_version},
        max_commit_retries=0,
    )
