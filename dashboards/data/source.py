"""Where every read goes: Postgres in a tenant's scope, one pinned lake release, and answers kept for a while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import psycopg
import pyarrow as pa
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from dashboards.config import DashboardSettings
from warehouse.lake.errors import LakeError, LakeReleaseError
from warehouse.lake.query import LakeReader, Limits, Snapshot
from warehouse.postgres.session import SyncDatabase

LIVE_SECONDS = 4.0
CACHE_ENTRIES = 400
STATEMENT_TIMEOUT = "5s"
PRODUCT = "Linux/UNIX"

# A page must never take the machine from the control service.
LIMITS = Limits(memory="256MB", threads=2, spill="2GB", statement_seconds=20.0)

T = TypeVar("T")

TIME = pa.timestamp("us", tz="UTC")


class DataError(Exception):
    """Data cannot be read; ``what``, ``why`` and ``next_step`` are fit for a person."""

    def __init__(self, what: str, why: str, next_step: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.next_step = what, why, next_step


class Cache:
    """Answers kept by key, the oldest given up first. ``seconds`` None keeps an answer until it is pushed out."""

    def __init__(self, entries: int = CACHE_ENTRIES) -> None:
        self._entries = entries
        self._kept: OrderedDict[tuple[Any, ...], tuple[float, Any]] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: tuple[Any, ...], seconds: float | None, make: Callable[[], T]) -> T:
        """The kept answer, else a new one. Two threads may make the same answer; both are right."""
        now = time.monotonic()
        with self._guard:
            kept = self._kept.get(key)
            if kept is not None and (seconds is None or now - kept[0] < seconds):
                self._kept.move_to_end(key)
                return kept[1]
        answer = make()
        with self._guard:
            self._kept[key] = (now, answer)
            self._kept.move_to_end(key)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
        return answer


class LakeMissing(DataError):
    """There is no lake yet."""


class Source:
    """Connections to both stores; safe to use from several threads."""

    def __init__(self, settings: DashboardSettings) -> None:
        self._settings = settings
        self._db = SyncDatabase(settings.database_url, pool_size=2, max_overflow=4)
        self._cache = Cache()
        self._lake: LakeReader | None = None
        self._lake_guard = threading.Lock()

    def close(self) -> None:
        """Close connections."""
        self._db.close()
        if self._lake is not None:
            self._lake.close()
            self._lake.lake.close()

    def forget(self) -> None:
        """Drop every kept answer, so that the next read sees what is there now."""
        self._cache = Cache()

    def _rows(self, scope_id: UUID | None, sql: str, /, **params: Any) -> list[Mapping[str, Any]]:
        """Rows of one statement in the scope of one customer, or of the platform when that is None."""
        scope = self._db.system() if scope_id is None else self._db.tenant(scope_id)
        with _database_errors(), scope as conn:
            conn.exec_driver_sql(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'")
            return [dict(row) for row in conn.execute(text(sql), params).mappings()]

    def _reader(self) -> LakeReader:
        with self._lake_guard:
            if self._lake is None:
                with _lake_errors():
                    self._lake = LakeReader((self._settings.lake_root, self._settings.database_url), LIMITS)
            return self._lake

    def _release(self) -> Snapshot:
        """The newest release, asked for at most every few seconds."""

        def pin() -> Snapshot:
            with _lake_errors(), _database_errors():
                return self._reader().pin()

        return self._cache.get(("release",), LIVE_SECONDS, pin)

    def _lake_table(self, customer_id: UUID, sql: str, **params: Any) -> pa.Table:
        """Rows of one lake query on the pinned release, limited to one customer; kept for that release."""
        snapshot = self._release()

        def read() -> pa.Table:
            with _lake_errors():
                return snapshot.query(sql, {**params, "customer_id": customer_id})

        key = (str(customer_id), snapshot.release.id, sql, tuple(sorted(params.items())))
        return self._cache.get(key, None, read)


def table_of(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Objects as an Arrow table; ids and lists as text."""
    columns = {}
    for column in schema:
        values = [getattr(row, column.name) for row in rows]
        if pa.types.is_string(column.type):
            values = [
                value if value is None else ",".join(value) if isinstance(value, list) else str(value)
                for value in values
            ]
        columns[column.name] = pa.array(values, column.type)
    return pa.table(columns, schema=schema)


def midnight_of(now: datetime) -> datetime:
    """The day's beginning."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def hour_of(now: datetime) -> datetime:
    """The hour's beginning."""
    return now.replace(minute=0, second=0, microsecond=0)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, psycopg.Error) as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()
        reason = cause[0] if cause else type(error).__name__
        if "statement timeout" in reason:
            raise DataError(
                "The database is too slow",
                f"a query did not end within {STATEMENT_TIMEOUT}",
                "look at the database's load; the page tries again by itself.",
            ) from error
        raise DataError(
            "The database cannot be read",
            reason,
            "see that Postgres runs (`cloudoptim doctor` tells) and that DATABASE_URL is right, then reload the page.",
        ) from error


@contextmanager
def _lake_errors() -> Iterator[None]:
    try:
        yield
    except LakeReleaseError as error:
        raise LakeMissing(
            "The lake holds no data yet", str(error), "run `cloudoptim migrate`, then let Dagster's first runs finish."
        ) from error
    except LakeError as error:
        raise DataError(
            "The lake cannot be read", str(error), "run `cloudoptim doctor`, then reload the page."
        ) from error
    except OSError as error:
        raise DataError(
            "The lake's files cannot be read", str(error), "see that CLOUDOPTIM_LAKE_ROOT is right and readable."
        ) from error
