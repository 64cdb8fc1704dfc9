"""Read the lake with DuckDB over pinned versions.

    reader = LakeReader(lake)
    page = reader.pin()                                     # everything below sees one release
    page.query("SELECT ts, actual_usd FROM cluster_cost_hourly WHERE day >= $since",
               {"customer_id": customer_id, "since": since})
    reader.pin(as_of=sent_at).frame("SELECT …", {"customer_id": customer_id})   # Polars, as it was then

A view for each table reads the Parquet files of that table's pinned version; only tables whose version moved are
planned anew. Filter by ``day`` (and ``region``): that skips files without opening them.

Tenants: with ``customer_id`` among the parameters every tenant table shows that customer's rows only, whether the text
filters or not. Without it tenant tables do not exist, unless ``all_customers=True`` says that all are meant. The scope
is a search path; it holds because a text that names a schema, a file or a function that reads one is refused first.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from deltalake import DeltaTable

from warehouse.lake.errors import LakeError, LakeQueryError, TenantScopeError
from warehouse.lake.staging import batches
from warehouse.lake.storage import refuse_forked_child
from warehouse.lake.store import Lake, Release, delta_arrow_schema
from warehouse.lake.tables import TableSpec, duckdb_type

if TYPE_CHECKING:
    import polars as pl

# Releases whose views stay planned; a dashboard page pins one for a few minutes.
PLANNED_RELEASES = 8
# What unqualified names mean: every row, one customer's rows, only what belongs to nobody.
SCOPES = ("all", "tenant", "shared")
# Reader features of Delta that do not change what a Parquet file holds.
HARMLESS_FEATURES = frozenset({"timestampNtz", "vacuumProtocolCheck", "v2Checkpoint"})
# Nodes of a parsed query that only read. DuckDB 2 parses COPY and INSERT inside WITH and still calls it a SELECT.
READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
# Functions a text may read from. A list of what is allowed: DuckDB has a hundred others, and each of its releases adds
# some, that run text, read files, write logs or reach a table by a name given as text.
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"})
# Functions of one value that run text, look outside or leave something behind.
REFUSED_FUNCTIONS = frozenset(
    {
        "currval",
        "getenv",
        "json_execute_serialized_sql",
        "nextval",
        "query",
        "query_table",
        "read_blob",
        "read_text",
        "setseed",
        "setval",
        "write_log",
    }
)
# A table's name. Anything else in its place is a file, or the unfiltered rows below a view (see ``_beneath``).
_PLAIN_NAME = re.compile(r"\w+")
# Texts whose parsed form is kept; a dashboard page has some thirty.
KEPT_TEXTS = 512


@dataclass(frozen=True, slots=True)
class Limits:
    """What one reader may use. ``statement_seconds`` ends a query with a clear error; None lets it run."""

    memory: str = "1GB"
    threads: int = 2
    spill: str = "8GB"
    statement_seconds: float | None = 120.0


@dataclass(frozen=True, slots=True)
class _Files:
    """Files that hold the same columns."""

    uris: tuple[str, ...]
    columns: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to read one version of one table."""

    table: str
    schema: pa.Schema
    partition_by: tuple[str, ...]
    groups: tuple[_Files, ...]
    dataset: pads.Dataset | None

    @property
    def uris(self) -> list[str]:
        return [uri for group in self.groups for uri in group.uris]


def _name(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def plan_table(lake: Lake, table: str, version: int) -> _Plan:
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
        return _Plan(table, schema, partition_by, (), None)
    stored = [name for name in schema.names if name not in partition_by]
    uris = [f"{handle.table_uri.rstrip('/').removeprefix('file://')}/{path}" for path in actions["path"].to_pylist()]
    groups: dict[frozenset[str], list[str]] = {}
    for uri, columns in zip(uris, _columns_of_files(actions, stored), strict=True):
        groups.setdefault(columns, []).append(uri)
    plan = tuple(_Files(tuple(sorted(files)), columns) for columns, files in groups.items())
    dataset = _dataset(lake, schema, partition_by, actions, uris) if lake.storage.remote else None
    return _Plan(table, schema, partition_by, plan, dataset)


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


def _beneath(table: str) -> str:
    """The name under which a cursor knows an Arrow dataset: one that no text can name."""
    return f"{table} of everybody"


def _select(plan: _Plan) -> str:
    """SQL that reads the plan's files with all columns in the table's order."""
    types = {field.name: duckdb_type(field.type) for field in plan.schema}
    if not plan.groups:
        columns = ", ".join(f"CAST(NULL AS {types[name]}) AS {_name(name)}" for name in plan.schema.names)
        return f"SELECT {columns} WHERE false"
    hive = ", ".join(f"{_text(name)}: {types[name]}" for name in plan.partition_by)
    parts = []
    for group in plan.groups:
        columns = ", ".join(
            _name(name)
            if name in plan.partition_by or name in group.columns
            else f"CAST(NULL AS {types[name]}) AS {_name(name)}"
            for name in plan.schema.names
        )
        files = ", ".join(map(_text, group.uris))
        parts.append(
            f"SELECT {columns} FROM read_parquet([{files}], hive_partitioning = true, hive_types = {{{hive}}})"
        )
    return " UNION ALL ".join(parts)


class LakeReader:
    """A DuckDB instance over the lake, shared by threads; each query runs on a cursor of its own.

    Args:
        lake: the lake, or ``(root, database_dsn)``.
        limits: memory, threads, spill space and time a query may use.
    """

    def __init__(self, lake: Lake | tuple[Any, str], limits: Limits | None = None) -> None:
        refuse_forked_child()
        self.lake = lake if isinstance(lake, Lake) else Lake(*lake)
        self.limits = limits or Limits()
        self._guard = threading.Lock()
        self._plans: dict[tuple[str, int], _Plan] = {}
        # Releases in the order of their last use; those with views stand in ``_viewed`` too.
        self._planned: OrderedDict[int, Mapping[str, int]] = OrderedDict()
        self._viewed: set[int] = set()
        self._in_use: dict[int, int] = {}
        self._spill = tempfile.mkdtemp(prefix="cloudoptim-spill-")
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._spill, ignore_errors=True)
        self._db = _connect(self.limits, self._spill)
        if not self.lake.storage.remote:
            self._db.execute(f"SET allowed_directories = [{_text(self.lake.storage.root)}]")
        self._db.execute("SET enable_external_access = false")
        self._db.execute("SET lock_configuration = true")

    def pin(self, which: Literal["latest"] | int | Release = "latest", *, as_of: datetime | None = None) -> Snapshot:
        """One release to read, whatever is published meanwhile.

        Raises:
            LakeReleaseError: there is no such release, or it expired.
        """
        return Snapshot(self, which if isinstance(which, Release) else self.lake.release(which, as_of=as_of))

    def query(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        all_customers: bool = False,
        as_of: datetime | None = None,
    ) -> pa.Table:
        """One query on the newest release (or the one at ``as_of``); see ``Snapshot.query``."""
        return self.pin(as_of=as_of).query(sql, parameters, all_customers=all_customers)

    def close(self) -> None:
        """Close DuckDB and delete what it spilled."""
        self._db.close()
        self._cleanup()

    def plan(self, release: Release) -> dict[str, _Plan]:
        """How to read every table of the release; listed anew only where the version moved."""
        with self._guard:
            plans = {item: self._plans[item] for item in release.versions.items() if item in self._plans}
        missing = [item for item in release.versions.items() if item not in plans]
        if missing:
            # On S3 every table costs several round trips: list them side by side.
            with ThreadPoolExecutor(max_workers=8 if self.lake.storage.remote else 2) as pool:
                plans.update(zip(missing, pool.map(lambda i: plan_table(self.lake, *i), missing), strict=True))
        with self._guard:
            self._plans.update(plans)
            self._planned[release.id] = release.versions
            self._planned.move_to_end(release.id)
            idle = [id_ for id_ in self._planned if id_ not in self._in_use]
            for old in idle[: max(0, len(self._planned) - PLANNED_RELEASES)]:
                self._forget(old)
        return {table: plans[table, version] for table, version in release.versions.items()}

    def spec(self, table: str) -> TableSpec | None:
        """The table's declaration; None for a table that the code no longer declares."""
        return self.lake.tables.get(table)

    @contextmanager
    def cursor(self, release: Release, scope: str, customer_id: str | None) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB cursor whose unqualified names are the release's tables in one scope (all, tenant, shared).

        Raises:
            LakeError: the release's files cannot be opened.
        """
        refuse_forked_child()
        with self._guard:
            self._in_use[release.id] = self._in_use.get(release.id, 0) + 1
        try:
            plans = self.plan(release)
            with ExitStack() as opened:
                try:
                    cursor = self._open(release, plans, scope, opened)
                    cursor.execute("SET VARIABLE customer_id = $c", {"c": customer_id})
                except duckdb.Error as error:
                    raise LakeError(
                        f"lake release {release.id} cannot be opened: {_first_lines(error)}; when its files can be "
                        "read again, so can the release"
                    ) from error
                yield cursor
        finally:
            with self._guard:
                self._in_use[release.id] -= 1
                if not self._in_use[release.id]:
                    del self._in_use[release.id]

    def _open(
        self, release: Release, plans: Mapping[str, _Plan], scope: str, opened: ExitStack
    ) -> duckdb.DuckDBPyConnection:
        if self.lake.storage.remote:
            cursor = opened.enter_context(closing(self._db.cursor()))
            self._register(cursor, plans, scope)
            return cursor
        with self._guard:
            if release.id not in self._viewed:
                self._prepare(release, plans)
        cursor = opened.enter_context(closing(self._db.cursor()))
        cursor.execute(f"USE {scope}_{release.id}")
        return cursor

    def _prepare(self, release: Release, plans: Mapping[str, _Plan]) -> None:
        """Views of the release in three schemas; tables whose version another release planned are shared.

        Binding a view opens files, which may fail: then nothing of the release stays, so that the next query begins
        anew.
        """
        db = self._db
        try:
            db.execute("CREATE SCHEMA IF NOT EXISTS versions")
            for scope in SCOPES:
                db.execute(f"CREATE SCHEMA {scope}_{release.id}")
            for table, version in release.versions.items():
                base = f"versions.{_name(f'{table}_v{version}')}"
                db.execute(f"CREATE VIEW IF NOT EXISTS {base} AS {_select(plans[table])}")
                for scope, select in _scoped(self.spec(table), plans[table].schema, base).items():
                    db.execute(f"CREATE VIEW {scope}_{release.id}.{_name(table)} AS {select}")
        except BaseException:
            self._drop_schemas(release.id)
            raise
        self._viewed.add(release.id)

    def _drop_schemas(self, release_id: int) -> None:
        for scope in SCOPES:
            self._db.execute(f"DROP SCHEMA IF EXISTS {scope}_{release_id} CASCADE")
        self._viewed.discard(release_id)

    def _forget(self, release_id: int) -> None:
        versions = self._planned.pop(release_id)
        self._drop_schemas(release_id)
        alive = {item for other in self._planned.values() for item in other.items()}
        for table, version in versions.items():
            if (table, version) not in alive:
                self._db.execute(f"DROP VIEW IF EXISTS versions.{_name(f'{table}_v{version}')}")
                self._plans.pop((table, version), None)

    def _register(self, cursor: duckdb.DuckDBPyConnection, plans: Mapping[str, _Plan], scope: str) -> None:
        """Temporary views over Arrow datasets, which live on one cursor."""
        for table, plan in plans.items():
            base = f"({_select(plan)})"
            if plan.dataset is not None:
                base = _name(_beneath(table))
                cursor.register(_beneath(table), plan.dataset)
            select = _scoped(self.spec(table), plan.schema, base).get(scope)
            if select:
                cursor.execute(f"CREATE TEMPORARY VIEW {_name(table)} AS {select}")


def _scoped(spec: TableSpec | None, schema: pa.Schema, base: str) -> dict[str, str]:
    """What each scope sees of a table: everything, one customer's rows, or nothing that belongs to customers."""
    everything = f"SELECT * FROM {base}"
    if "customer_id" not in schema.names:
        return {"all": everything, "tenant": everything, "shared": everything}
    shared = " OR customer_id IS NULL" if spec is not None and spec.shared_when_null else ""
    return {"all": everything, "tenant": f"{everything} WHERE customer_id = getvariable('customer_id'){shared}"}


def _connect(limits: Limits, spill: str) -> duckdb.DuckDBPyConnection:
    db = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": limits.memory,
            "threads": limits.threads,
            "temp_directory": spill,
            "max_temp_directory_size": limits.spill,
            "autoload_known_extensions": False,
            "autoinstall_known_extensions": False,
            "allow_community_extensions": False,
            # A Python variable's name in the text would otherwise be read as a table.
            "python_enable_replacements": False,
        },
    )
    db.execute("SET GLOBAL TimeZone = 'UTC'")
    db.execute("SET GLOBAL parquet_metadata_cache = true")  # lake files never change
    db.execute("SET GLOBAL asof_loop_join_threshold = 0")  # 0.1 s instead of 4-9 s for an ASOF join of 10 M rows
    return db


class Snapshot:
    """The lake at one release. Cheap; keep it for a page, a report, a computation."""

    def __init__(self, reader: LakeReader, release: Release) -> None:
        self.reader = reader
        self.release = release

    def query(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        all_customers: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> pa.Table:
        """Run one SELECT with named parameters (``$name``) and return its rows as an Arrow table.

        ``customer_id`` among the parameters limits every tenant table to that customer, used in the text or not.
        ``inputs`` are frames the text may read as tables of those names, beside the lake's.

        Raises:
            TenantScopeError: the text reads tenant data, and neither ``customer_id`` nor ``all_customers`` is given; or
                it names a schema without ``all_customers``.
            LakeQueryError: the text is not one reading statement, is wrong, too slow or too large.
        """
        seconds = self.reader.limits.statement_seconds
        run = self._run(sql, parameters, all_customers, inputs)
        with run as (cursor, statement, used), _limited(cursor, seconds):
            return cursor.sql(statement, params=used).to_arrow_table()

    def frame(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        all_customers: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> pl.DataFrame:
        """The same as a Polars frame."""
        import polars as pl  # 20 MB that a process which only wants Arrow (the dashboards) does not pay

        return pl.DataFrame(pl.from_arrow(self.query(sql, parameters, all_customers=all_customers, inputs=inputs)))

    @contextmanager
    def stream(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        all_customers: bool = False,
        inputs: Mapping[str, Any] | None = None,
        batch_rows: int = 131_072,
    ) -> Iterator[pa.RecordBatchReader]:
        """The rows as a stream of batches, without the time limit: for results larger than memory.

        with snapshot.stream("SELECT …", all_customers=True) as rows:
            lake.publish([PartitionWrite("node_cost_hourly", {"day": day}, rows)], run_id=run_id)
        """
        with self._run(sql, parameters, all_customers, inputs) as (cursor, statement, used):
            yield cursor.sql(statement, params=used).to_arrow_reader(batch_rows)

    @contextmanager
    def ask(self, sql: str, *, customer_id: str | None = None) -> Iterator[pa.RecordBatchReader]:
        """Stream the answer to text an operator typed (``cloudoptim lake sql``), in a DuckDB locked to this release.

        ``customer_id`` narrows the tables for convenience. Only the check of the text stands between it and the files
        of all customers, so never pass a customer's own text.

        Raises:
            LakeQueryError: the text does more than read, reads anything but the lake, is wrong, too slow or too large.
        """
        statement, names = reading_statement(sql)
        if names:
            raise LakeQueryError(
                f"a typed query has no parameters; write the value instead of ${', $'.join(sorted(names))}"
            )
        limits = self.reader.limits
        with restricted(self, limits, customer_id=customer_id) as db, _limited(db, limits.statement_seconds):
            try:
                yield db.sql(statement).to_arrow_reader(65_536)
            except duckdb.InterruptException:
                raise
            except duckdb.Error as error:
                raise _explained(error, self.reader, "all") from error

    def columns(self, table: str) -> pa.Schema:
        """The table's columns in this release."""
        return self.reader.plan(self.release)[table].schema

    @contextmanager
    def _run(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None,
        all_customers: bool,
        inputs: Mapping[str, Any] | None,
    ) -> Iterator[tuple[duckdb.DuckDBPyConnection, str, dict[str, Any] | None]]:
        given = dict(parameters or {})
        customer_id = given.get("customer_id")
        if "customer_id" in given and customer_id is None:
            raise TenantScopeError(
                "customer_id is None; give the customer's id, or all_customers=True if all are meant"
            )
        if customer_id is not None and all_customers:
            raise TenantScopeError("customer_id and all_customers=True contradict each other; give one of them")
        reading = _read(sql)
        if not all_customers and reading.qualified is not None:
            raise TenantScopeError(
                f"{reading.qualified} names a schema; name lake tables alone, so that they show what the query may see"
            )
        statement, names = reading.statement, reading.parameters
        if customer_id is not None:
            given["customer_id"] = str(customer_id)
        missing = sorted(names - given.keys())
        if missing:
            raise LakeQueryError(f"the query names ${', $'.join(missing)}, but no such parameter is given")
        unused = sorted(given.keys() - names - {"customer_id"})
        if unused:
            raise LakeQueryError(f"parameter {', '.join(unused)} is given, but the query does not name it")
        used = {name: given[name] for name in names}
        scope = "all" if all_customers else "tenant" if customer_id is not None else "shared"
        with self.reader.cursor(self.release, scope, given.get("customer_id")) as cursor:
            for name, data in (inputs or {}).items():
                if name in self.release.versions:
                    raise LakeQueryError(f"input {name!r} would hide the lake table of that name; call it otherwise")
                cursor.register(name, batches(data).read_all())
            try:
                yield cursor, statement, used or None
            except duckdb.InterruptException:
                raise
            except duckdb.Error as error:
                raise _explained(error, self.reader, scope) from error


@dataclass(frozen=True, slots=True)
class _Reading:
    """A text that only reads, its parameters, and a table in it that is named with a schema."""

    statement: str
    parameters: frozenset[str]
    qualified: str | None


def reading_statement(sql: str) -> tuple[str, set[str]]:
    """The text of the one reading statement in ``sql`` and the names of its parameters.

    Raises:
        LakeQueryError: there are several statements, or something in it does more than read tables.
    """
    reading = _read(sql)
    return reading.statement, set(reading.parameters)


@lru_cache(maxsize=KEPT_TEXTS)
def _read(sql: str) -> _Reading:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise LakeQueryError(f"the query cannot be read: {_first_lines(error)}") from error
    if len(statements) != 1:
        raise LakeQueryError(f"give exactly one statement; this text has {len(statements)}")
    statement = statements[0]
    if statement.type != duckdb.StatementType.SELECT:
        raise LakeQueryError(
            f"only reading is allowed here (SELECT, WITH, FROM, VALUES, DESCRIBE, SUMMARIZE), not {statement.type.name}"
        )
    qualified = _refuse_writing(statement.query)
    return _Reading(statement.query, frozenset(statement.named_parameters), qualified)


# One instance only parses: it sees no file and no table.
_PARSER = threading.local()


def _refuse_writing(sql: str) -> str | None:
    """Refuse what hides inside a SELECT: DuckDB 2 runs ``WITH x AS (COPY … TO 'file') SELECT …`` as one.

    Returns a table that is named with a schema or catalog, if there is one.
    """
    if not hasattr(_PARSER, "db"):
        _PARSER.db = duckdb.connect(":memory:", config={"enable_external_access": False, "threads": 1})
    tree = msgspec.json.decode(_PARSER.db.execute("SELECT json_serialize_sql($sql)", {"sql": sql}).fetchall()[0][0])
    if tree.get("error"):
        raise LakeQueryError(
            f"only plain reading statements are allowed here: {tree.get('error_message', 'not a SELECT')}"
        )
    qualified: str | None = None
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            kind = node.get("type")
            if isinstance(kind, str) and kind.endswith("_NODE") and kind not in READING_NODES:
                what = kind.removesuffix("_NODE").removesuffix("_QUERY")
                raise LakeQueryError(f"only reading is allowed here; the text contains {what}")
            _refuse_function(node)
            qualified = _named_with_schema(node) or qualified
            stack.extend(node.values())
    return qualified


def _refuse_function(node: Mapping[str, Any]) -> None:
    if node.get("type") == "TABLE_FUNCTION":
        name = node["function"].get("function_name")
        if not isinstance(name, str) or name.lower() not in TABLE_FUNCTIONS:
            raise LakeQueryError(
                f"reading from function {name} is not allowed in lake queries; allowed are "
                f"{', '.join(sorted(TABLE_FUNCTIONS))}"
            )
    name = node.get("function_name")
    if isinstance(name, str) and name.lower() in REFUSED_FUNCTIONS:
        raise LakeQueryError(f"function {name} is not allowed in lake queries")


def _named_with_schema(node: Mapping[str, Any]) -> str | None:
    """The table's or listing's name if it has a schema; None for what has none.

    Raises:
        LakeQueryError: a file stands in the table's place.
    """
    kind = node.get("type")
    if kind not in ("BASE_TABLE", "SHOW_REF"):
        return None
    table = node["table_name"].strip('"')  # SHOW TABLES asks for "tables", with the quotes
    if table and not _PLAIN_NAME.fullmatch(table):
        raise LakeQueryError(f"{table!r} is no table; lake queries read tables, not files")
    path = [node["catalog_name"], node["schema_name"], table]
    return ".".join(filter(None, path)) if any(path[:2]) else None


@contextmanager
def _limited(cursor: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[None]:
    """Interrupt what runs on the cursor after so many seconds."""
    if seconds is None:
        yield
        return
    expired = threading.Event()

    def interrupt() -> None:
        expired.set()
        cursor.interrupt()

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException as error:
        if expired.is_set():
            raise LakeQueryError(
                f"the query ran longer than {seconds:g} s; filter by day and region, or aggregate in SQL"
            ) from error
        raise
    finally:
        timer.cancel()


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).split("\n\n")[0].splitlines() if line.strip())


_ABSENT = re.compile(r"Table with name (\w+) does not exist")


def _explained(error: duckdb.Error, reader: LakeReader, scope: str) -> LakeQueryError:
    text = _first_lines(error)
    absent = _ABSENT.search(text)
    if absent and scope == "shared" and (spec := reader.spec(absent.group(1))) is not None and spec.tenant:
        return TenantScopeError(
            f"{spec.name} holds customers' data: pass customer_id, or all_customers=True for platform-wide computations"
        )
    if absent:
        return LakeQueryError(f"there is no table {absent.group(1)}; the tables are {', '.join(reader.lake.tables)}")
    if isinstance(error, duckdb.OutOfMemoryException):
        return LakeQueryError(
            f"the query needs more than {reader.limits.memory} of memory and {reader.limits.spill} of disk; filter by "
            "day and region, or aggregate"
        )
    return LakeQueryError(text)


@contextmanager
def restricted(
    snapshot: Snapshot, limits: Limits, *, customer_id: str | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own for text a person typed: the release's tables, its files and nothing else.

    External access is off but for the pinned files, extensions are off, the configuration is locked. With a customer
    the tables show that customer's rows only. Run only text that ``reading_statement`` let pass: the allowed files
    could otherwise be written to.
    """
    plans = snapshot.reader.plan(snapshot.release)
    scope = "all" if customer_id is None else "tenant"
    with tempfile.TemporaryDirectory(prefix="cloudoptim-spill-") as spill:
        db = _connect(limits, spill)
        try:
            db.execute("SET VARIABLE customer_id = $c", {"c": customer_id})
            files: list[str] = []
            for table, plan in plans.items():
                base = f"({_select(plan)})"
                if plan.dataset is not None:
                    base = _name(_beneath(table))
                    db.register(_beneath(table), plan.dataset)
                elif plan.groups:
                    files.extend(plan.uris)
                select = _scoped(snapshot.reader.spec(table), plan.schema, base)[scope]
                # A view over a registered dataset can only be temporary.
                kind = "TEMPORARY VIEW" if plan.dataset is not None else "VIEW"
                db.execute(f"CREATE {kind} {_name(table)} AS {select}")
            db.execute(f"SET allowed_paths = [{', '.join(map(_text, files))}]")
            db.execute("SET enable_external_access = false")
            db.execute("SET lock_configuration = true")
            yield db
        finally:
            db.close()
