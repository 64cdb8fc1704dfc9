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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import pyarrow as pa

from warehouse.lake.errors import LakeError, LakeQueryError, TenantScopeError
from warehouse.lake.plans import Plan, beneath, plan_table, quoted_name, quoted_text, scoped, select_files
from warehouse.lake.pruning import DAY, Days, days_read
from warehouse.lake.releases import Release
from warehouse.lake.staging import batches
from warehouse.lake.storage import refuse_forked_child
from warehouse.lake.store import Lake
from warehouse.lake.tables import TableSpec
from warehouse.lake.texts import first_lines, parsed, reading_statement

if TYPE_CHECKING:
    import polars as pl

# Releases whose views stay planned; a dashboard page pins one for a few minutes.
PLANNED_RELEASES = 8
# Tables of so few files are read through the views that all queries share.
FEW_FILES = 64
# What unqualified names mean: every row, one customer's rows, only what belongs to nobody.
SCOPES = ("all", "tenant", "shared")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one reader may use. ``statement_seconds`` ends a query with a clear error; None lets it run."""

    memory: str = "1GB"
    threads: int = 2
    spill: str = "8GB"
    statement_seconds: float | None = 120.0


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
        self._plans: dict[tuple[str, int], Plan] = {}
        # Releases in the order of their last use; those with views stand in ``_viewed`` too.
        self._planned: OrderedDict[int, Mapping[str, int]] = OrderedDict()
        self._viewed: set[int] = set()
        self._in_use: dict[int, int] = {}
        self._spill = tempfile.mkdtemp(prefix="cloudoptim-spill-")
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._spill, ignore_errors=True)
        self._db = _connect(self.limits, self._spill)
        if not self.lake.storage.remote:
            self._db.execute(f"SET allowed_directories = [{quoted_text(self.lake.storage.root)}]")
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

    def plan(self, release: Release) -> dict[str, Plan]:
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
    def cursor(
        self, release: Release, scope: str, customer_id: str | None, days: Mapping[str, Days] | None = None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB cursor whose unqualified names are the release's tables in one scope (all, tenant, shared).

        ``days``: what will be read of some of them; they need not show the rest.

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
                    self._narrow(cursor, plans, scope, days or {})
                    cursor.execute("SET VARIABLE customer_id = $c", {"c": customer_id})
                except duckdb.Error as error:
                    raise LakeError(
                        f"lake release {release.id} cannot be opened: {first_lines(error)}; when its files can be "
                        "read again, so can the release"
                    ) from error
                yield cursor
        finally:
            with self._guard:
                self._in_use[release.id] -= 1
                if not self._in_use[release.id]:
                    del self._in_use[release.id]

    def _open(
        self, release: Release, plans: Mapping[str, Plan], scope: str, opened: ExitStack
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

    def _narrow(
        self, cursor: duckdb.DuckDBPyConnection, plans: Mapping[str, Plan], scope: str, days: Mapping[str, Days]
    ) -> None:
        """Hide long tables behind temporary views of the days that are read, which only this cursor sees."""
        if self.lake.storage.remote:
            return  # Arrow leaves out files by itself
        for table, read in days.items():
            plan = plans.get(table)
            if plan is None or DAY not in plan.partition_by or len(plan.uris) <= FEW_FILES:
                continue
            base = f"({select_files(plan.within(read))})"
            if select := scoped(self.spec(table), plan.schema, base).get(scope):
                cursor.execute(f"CREATE TEMPORARY VIEW {quoted_name(table)} AS {select}")

    def _prepare(self, release: Release, plans: Mapping[str, Plan]) -> None:
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
                base = f"versions.{quoted_name(f'{table}_v{version}')}"
                db.execute(f"CREATE VIEW IF NOT EXISTS {base} AS {select_files(plans[table])}")
                for scope, select in scoped(self.spec(table), plans[table].schema, base).items():
                    db.execute(f"CREATE VIEW {scope}_{release.id}.{quoted_name(table)} AS {select}")
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
                self._db.execute(f"DROP VIEW IF EXISTS versions.{quoted_name(f'{table}_v{version}')}")
                self._plans.pop((table, version), None)

    def _register(self, cursor: duckdb.DuckDBPyConnection, plans: Mapping[str, Plan], scope: str) -> None:
        """Temporary views over Arrow datasets, which live on one cursor."""
        for table, plan in plans.items():
            base = f"({select_files(plan)})"
            if plan.dataset is not None:
                base = quoted_name(beneath(table))
                cursor.register(beneath(table), plan.dataset)
            select = scoped(self.spec(table), plan.schema, base).get(scope)
            if select:
                cursor.execute(f"CREATE TEMPORARY VIEW {quoted_name(table)} AS {select}")


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
        reading = parsed(sql)
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
        days = days_read(reading.mentions, used)
        with self.reader.cursor(self.release, scope, given.get("customer_id"), days) as cursor:
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


_ABSENT = re.compile(r"Table with name (\w+) does not exist")


def _explained(error: duckdb.Error, reader: LakeReader, scope: str) -> LakeQueryError:
    text = first_lines(error)
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
                base = f"({select_files(plan)})"
                if plan.dataset is not None:
                    base = quoted_name(beneath(table))
                    db.register(beneath(table), plan.dataset)
                elif plan.groups:
                    files.extend(plan.uris)
                select = scoped(snapshot.reader.spec(table), plan.schema, base)[scope]
                # A view over a registered dataset can only be temporary.
                kind = "TEMPORARY VIEW" if plan.dataset is not None else "VIEW"
                db.execute(f"CREATE {kind} {quoted_name(table)} AS {select}")
            db.execute(f"SET allowed_paths = [{', '.join(map(quoted_text, files))}]")
            db.execute("SET enable_external_access = false")
            db.execute("SET lock_configuration = true")
            yield db
        finally:
            db.close()
