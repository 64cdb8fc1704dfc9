"""The lake's sessions with Postgres and the advisory locks they hold: one lake for each database."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from warehouse.lake.errors import LakeBusyError, LakeError
from warehouse.lake.storage import refuse_forked_child
from warehouse.postgres.session import SYSTEM_ROLE

# Advisory lock names.
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


def libpq_dsn(dsn: str) -> str:
    """The address without SQLAlchemy's driver suffix."""
    scheme, separator, rest = dsn.partition("://")
    return f"{scheme.partition('+')[0]}{separator}{rest}" if separator else dsn


class Sessions:
    """One session for readers and one for writers, opened when they are needed and again when they were lost.

    Args:
        dsn: Postgres address; sessions hold advisory locks, so no transaction pooler.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = libpq_dsn(dsn)
        self._write_guard = threading.RLock()
        self._writing: psycopg.Connection | None = None
        self._read_guard = threading.Lock()
        self._reading: psycopg.Connection | None = None

    def connect(self, application: str) -> psycopg.Connection:
        """A session of the caller's own, in autocommit.

        Raises:
            LakeError: Postgres cannot be reached.
        """
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

    def read(self, statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Rows of one statement on the session that readers share."""
        refuse_forked_child()
        with self._read_guard:
            for attempt in (1, 2):
                if self._reading is None or self._reading.closed:
                    self._reading = self.connect("cloudoptim lake reader")
                try:
                    return self._reading.execute(statement, parameters).fetchall()
                except psycopg.OperationalError:
                    self._reading.close()
                    if attempt == 2:
                        raise
        raise AssertionError("unreachable")

    @contextmanager
    def locked(self) -> Iterator[psycopg.Connection]:
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
                self._writing = self.connect("cloudoptim lake writer")
            try:
                self.wait_for_lock(self._writing)
                return self._writing
            except psycopg.OperationalError:
                self._writing.close()  # a kept session whose server restarted; a new one may do
                if attempt == 2:
                    raise
            except BaseException:
                self._writing.close()  # an interrupt may come when the lock is already ours
                raise
        raise AssertionError("unreachable")

    def wait_for_lock(self, session: psycopg.Connection) -> None:
        """Take the lake's lock on the session.

        Raises:
            LakeBusyError: another writer held it for ``LOCK_TIMEOUT_SECONDS``.
        """
        session.execute("SELECT set_config('lock_timeout', %s, false)", [f"{LOCK_TIMEOUT_SECONDS}s"])
        try:
            session.execute("SELECT pg_advisory_lock(%s)", [COMMIT_LOCK])
        except psycopg.errors.LockNotAvailable:
            raise LakeBusyError(
                f"another writer has held the lake's lock for {LOCK_TIMEOUT_SECONDS} s; see pg_locks "
                "(locktype advisory) for its process, then publish again"
            ) from None

    @contextmanager
    def nothing_staged(self) -> Iterator[None]:
        """Hold off staging for the time of the block.

        Raises:
            LakeBusyError: a process is staging files now.
        """
        with self.connect("cloudoptim lake vacuum") as session:
            held = session.execute("SELECT pg_try_advisory_lock(%s)", [STAGING_LOCK]).fetchone()
            if not held or not held[0]:
                raise LakeBusyError(
                    "files are being staged for a commit, and a short retention could remove them; use the default "
                    "retention, or try again when no writer runs"
                )
            yield

    def close(self) -> None:
        """Close what is open."""
        for session in (self._reading, self._writing):
            if session is not None:
                session.close()
