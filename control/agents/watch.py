"""One look for everybody: the poll behind the doorbells, shared by all agents that wait on this process.

A thousand waiting agents would ask Postgres five hundred times a second; this asks once every two seconds which of
their clusters have work, and which keys were revoked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from control.agents import repository
from control.bus.bells import POLL_SECONDS, Bell, Bells
from warehouse.postgres.session import Database

log = structlog.get_logger(__name__)


class Watch:
    """Wakes waiting agents of this process."""

    def __init__(self, db: Database, bells: Bells) -> None:
        self._db = db
        self._bells = bells
        self._local: dict[UUID, set[Bell]] = {}
        self._revoked: frozenset[UUID] = frozenset()
        self.stopping = False
        """The process is about to end: nobody waits any more, and nothing is leased to who waited."""

    def stop(self) -> None:
        """Answer everybody who waits, so that the server can close their connections. Safe in a signal handler."""
        self.stopping = True
        for bells in list(self._local.values()):
            for bell in list(bells):
                bell.ring()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look every two seconds until the block ends."""
        task = asyncio.create_task(self._look_for_ever(), name="watch")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @asynccontextmanager
    async def tasks_of(self, cluster_id: UUID) -> AsyncIterator[Bell]:
        """A bell that rings when the cluster may have work, through Redis at once or through the poll."""
        async with self._bells.listen("tasks", cluster_id) as bell:
            bells = self._local.setdefault(cluster_id, set())
            bells.add(bell)
            try:
                yield bell
            finally:
                bells.discard(bell)
                if not bells:
                    self._local.pop(cluster_id, None)

    def is_revoked(self, key_id: UUID) -> bool:
        """Whether a key was revoked lately; known within two seconds."""
        return key_id in self._revoked

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self._look()
            except (SQLAlchemyError, OSError) as error:
                log.warning("watch.database_away", error=type(error).__name__)

    async def _look(self) -> None:
        clusters = list(self._local)
        async with self._db.system() as conn:
            self._revoked = await repository.lately_revoked_keys(conn)
            busy = await repository.clusters_with_work(conn, clusters) if clusters else []
        for cluster_id in busy:
            for bell in self._local.get(cluster_id, ()):
                bell.ring()
