"""Connections to Postgres, always inside an explicit tenant or system scope.

Every transaction drops to a non-owner role before its first statement, so row-level security holds whatever the
login may do: ``tenant`` sees one customer's rows, ``system`` (workers, pipelines, platform admins) sees all.
The role and the customer are set with ``SET LOCAL`` semantics and end with the transaction; a pooled connection
carries nothing over.

    async with db.tenant(customer_id) as conn:
        rows = (await conn.execute(select(Cluster.id))).all()
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

TENANT_ROLE = "cloudoptim_tenant"
SYSTEM_ROLE = "cloudoptim_system"
ML_ROLE = "ml_readonly"

# A process that freezes in the middle of a transaction keeps its row locks no longer than a lease (RELIABILITY R-08).
IDLE_SECONDS = 15

# The time comes along: every transaction asks anyway.
_SCOPE = text(
    "SELECT set_config('role', :role, true), set_config('app.customer_id', :customer_id, true), "
    f"set_config('idle_in_transaction_session_timeout', '{IDLE_SECONDS}s', true), clock_timestamp() AS at"
)


def _plan_afresh(connection: DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("SET plan_cache_mode = force_custom_plan")
    cursor.close()
    # Or the first transaction that is rolled back would take it along.
    connection.commit()


def driver_url(url: str) -> str:
    """The same address for our driver. A bare ``postgresql://`` would leave the choice to SQLAlchemy's default."""
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


async def narrow(conn: AsyncConnection, customer_id: UUID) -> None:
    """Drop from the system scope to one customer's for the rest of the transaction."""
    await conn.execute(_SCOPE, {"role": TENANT_ROLE, "customer_id": str(customer_id)})


async def widen(conn: AsyncConnection) -> None:
    """From one customer's scope to the system's, until ``narrow``; for questions that only the system may answer."""
    await conn.execute(_SCOPE, {"role": SYSTEM_ROLE, "customer_id": ""})


class ServerClock:
    """Postgres' time between two questions, carried on by this machine's monotonic clock.

    Leases and deadlines written here are judged by ``now()`` over there and by other machines, so all of them follow
    one clock: a process whose own is ten minutes off writes the same rows (RELIABILITY R-26). The reading is never
    ahead of Postgres by more than ``TOLERANCE_SECONDS``: what is due now is due there too.
    """

    # Two clocks drift apart by less than this in a minute.
    TOLERANCE_SECONDS = 0.005

    def __init__(self) -> None:
        self._at: datetime | None = None
        self._monotonic = 0.0

    def heard(self, at: datetime, *, asked: float, answered: float) -> None:
        """Postgres said ``at`` to a question asked and answered at these moments of ``time.monotonic()``."""
        if self._at is not None:
            # Each answer is a lower bound of the time when it arrived, the later one the better.
            kept = self._reading(answered)
            latest = at + timedelta(seconds=answered - asked + self.TOLERANCE_SECONDS)
            if at <= kept <= latest:
                return
        self._at, self._monotonic = at.astimezone(UTC), answered

    def now(self) -> datetime:
        """Postgres' time (UTC); this machine's as long as Postgres was never asked."""
        return datetime.now(UTC) if self._at is None else self._reading(time.monotonic())

    def _reading(self, monotonic: float) -> datetime:
        assert self._at is not None
        return self._at + timedelta(seconds=monotonic - self._monotonic)


class Database:
    """An asyncio connection pool with scoped transactions.

    Args:
        url: libpq URL.
        pool_size: connections kept; ``max_overflow`` more may open in a burst.
        pool_timeout: seconds to wait for a connection before ``sqlalchemy.exc.TimeoutError``.
        fresh_plans: plan prepared statements at each execution, for the size that tables have then. A plan kept from
            when they were small reads all of a tenant's rows for every batch, until the next ANALYZE: the first storm
            after a start is slowed down by itself. Costs a millisecond or two per large statement.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 8,
        max_overflow: int = 4,
        pool_timeout: float = 2.0,
        fresh_plans: bool = False,
    ) -> None:
        self._clock = ServerClock()
        self.engine = create_async_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=pool_timeout,
            pool_pre_ping=False,
            connect_args={"connect_timeout": 5, "application_name": "cloudoptim"},
        )
        if fresh_plans:
            event.listen(self.engine.sync_engine, "connect", _plan_afresh)

    @asynccontextmanager
    async def _scope(self, role: str, customer_id: str) -> AsyncIterator[AsyncConnection]:
        async with self.engine.begin() as conn:
            asked = time.monotonic()
            scope = (await conn.execute(_SCOPE, {"role": role, "customer_id": customer_id})).one()
            self._clock.heard(scope.at, asked=asked, answered=time.monotonic())
            yield conn

    def now(self) -> datetime:
        """The time (UTC) by Postgres' clock, as of the transactions so far; see ``ServerClock``."""
        return self._clock.now()

    def tenant(self, customer_id: UUID):
        """One transaction that sees the rows of one customer."""
        return self._scope(TENANT_ROLE, str(customer_id))

    def system(self):
        """One transaction that sees all rows; for workers, pipelines and platform admins."""
        return self._scope(SYSTEM_ROLE, "")

    async def close(self) -> None:
        """Close all connections."""
        await self.engine.dispose()


class SyncDatabase:
    """The same scopes for code without an event loop (pipelines, command line, sandbox)."""

    def __init__(self, url: str, *, pool_size: int = 2, max_overflow: int = 4) -> None:
        self.url = url
        self.engine = create_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=max_overflow,
            connect_args={"connect_timeout": 5, "application_name": "cloudoptim"},
        )

    @contextmanager
    def _scope(self, role: str, customer_id: str) -> Iterator[Connection]:
        with self.engine.begin() as conn:
            conn.execute(_SCOPE, {"role": role, "customer_id": customer_id})
            yield conn

    def tenant(self, customer_id: UUID):
        """One transaction that sees the rows of one customer."""
        return self._scope(TENANT_ROLE, str(customer_id))

    def system(self):
        """One transaction that sees all rows."""
        return self._scope(SYSTEM_ROLE, "")

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
