"""Keep vacuum away from staged files that wait for their release."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Literal

import psycopg
import pyarrow.fs as pafs

from warehouse.lake.errors import LakeError
from warehouse.lake.sessions import STAGING_LOCK, Sessions
from warehouse.lake.staging import Staged
from warehouse.lake.storage import Storage


class StagingHolds:
    """The shared staging lock, held on a session of its own for as long as any staged file waits."""

    def __init__(self, sessions: Sessions, storage: Storage) -> None:
        self._sessions = sessions
        self._storage = storage
        self._guard = threading.Lock()
        self._session: psycopg.Connection | None = None
        # Staged files that wait for their release; False where vacuum was not kept away all the time.
        self._holds: dict[str, bool] = {}

    def __contains__(self, hold: str) -> bool:
        return hold in self._holds

    def take(self) -> str:
        """Hold the shared staging lock while files wait for their release, so that no vacuum takes them for litter."""
        with self._guard:
            self._lock("pg_advisory_lock_shared")
            hold = uuid.uuid4().hex
            self._holds[hold] = True
            return hold

    def _lock(self, function: Literal["pg_advisory_lock_shared", "pg_try_advisory_lock_shared"]) -> bool:
        """Take the lock, again if it is held: that tells whether its session still lives. False: a vacuum has it."""
        for attempt in (1, 2):
            if self._session is None or self._session.closed:
                self._holds = dict.fromkeys(self._holds, False)
                self._session = self._sessions.connect("cloudoptim lake staging")
            try:
                answer = self._session.execute(f"SELECT {function}(%s)", [STAGING_LOCK]).fetchone()
                return answer is not None and answer[0] is not False
            except psycopg.OperationalError:
                self._session.close()  # a kept session whose server restarted; a new one may do
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def release(self, hold: str) -> None:
        """The files wait no longer. A hold that was released already is none."""
        with self._guard:
            if self._holds.pop(hold, None) is None or self._holds or self._session is None:
                return
            try:
                self._session.execute("SELECT pg_advisory_unlock_all()")
            except psycopg.Error:
                self._session.close()

    def refuse_vacuumed(self, staged: Sequence[Staged]) -> None:
        """Refuse files that a vacuum removed, or may be removing, since the session that held it off was lost.

        Asked when the newest Delta versions name the files: a vacuum that begins after this keeps them. The lock is
        only tried, because its holder may be waiting for ours.
        """
        waiting = [item for item in staged if item.hold]
        if not waiting:
            return
        with self._guard:
            safe = self._lock("pg_try_advisory_lock_shared")
            exposed = [item for item in waiting if not self._holds.get(item.hold)]
        for item in exposed:
            found = self._storage.filesystem.get_file_info([self._storage.path(item.table, f.path) for f in item.files])
            if not safe or any(info.type != pafs.FileType.File for info in found):
                raise LakeError(
                    f"table {item.table}: the session that kept vacuum away from the staged files was lost, and a "
                    "vacuum has run since; stage the data again, then publish"
                )

    def close(self) -> None:
        """Close the session, and with it let go of everything."""
        if self._session is not None:
            self._session.close()
