"""Rows of Postgres as Arrow, over a million a second (ADBC)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import adbc_driver_postgresql.dbapi
import pyarrow as pa

from warehouse.lake.sessions import libpq_dsn
from warehouse.postgres.session import SYSTEM_ROLE


@contextmanager
def arrow_rows(dsn: str, query: str) -> Iterator[pa.RecordBatchReader]:
    """Stream a query's rows as the system role; ids are to be cast to text in the query.

    The query takes no parameters: what varies is written by the caller as a literal of a type that cannot carry SQL
    (a number, ``sql_time``).
    """
    url = libpq_dsn(dsn)
    role = quote(f"-c role={SYSTEM_ROLE}", safe="")
    separator = "&" if "?" in url else "?"
    with (
        adbc_driver_postgresql.dbapi.connect(f"{url}{separator}options={role}") as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(query)
        yield cursor.fetch_record_batch()
