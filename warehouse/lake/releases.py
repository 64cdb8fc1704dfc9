"""Releases: which version of every table readers see, one row of ``lake_releases`` for each state of the lake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg
from psycopg.types.json import Jsonb

from warehouse.lake.errors import LakeConflictError, LakeError, LakeReleaseError
from warehouse.lake.sessions import Sessions

_COLUMNS = "id, released_at, versions, replaced, rows, run_id, code_version, kept, expired_at, note"
_SELECT = f"SELECT {_COLUMNS} FROM lake_releases"


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


class Releases:
    """The rows of ``lake_releases``: readers ask for one, the holder of the lake's lock adds one."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def find(self, which: Literal["latest"] | int = "latest", *, as_of: datetime | None = None) -> Release:
        """The newest release, one by its id, or the newest at a moment.

        Raises:
            LakeReleaseError: there is none, or vacuum may have removed its files.
        """
        if as_of is not None:
            if as_of.tzinfo is None:
                raise LakeReleaseError(f"as_of {as_of.isoformat()} has no time zone; give UTC, e.g. 2024-01-31T12:00Z")
            row = self._sessions.read(f"{_SELECT} WHERE released_at <= %s ORDER BY id DESC LIMIT 1", [as_of])
            missing = f"the lake has no release at or before {as_of.isoformat()}"
        elif which == "latest":
            row = self._sessions.read(f"{_SELECT} ORDER BY id DESC LIMIT 1", [])
            missing = "the lake has no release yet; run `cloudoptim migrate` to create its tables"
        else:
            row = self._sessions.read(f"{_SELECT} WHERE id = %s", [which])
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

    def newest(self, *, limit: int = 50) -> list[Release]:
        """The newest releases, newest first, expired ones included."""
        return [Release(*row) for row in self._sessions.read(f"{_SELECT} ORDER BY id DESC LIMIT %s", [limit])]

    def keep(self, release_id: int, *, kept: bool = True, note: str | None = None) -> Release:
        """Keep a release readable for good (a statement reads it), or let it go again.

        Raises:
            LakeReleaseError: there is no such release, or vacuum may already have removed its files.
        """
        with self._sessions.locked() as session:
            self.find(release_id)
            session.execute(
                "UPDATE lake_releases SET kept = %s, note = coalesce(%s, note) WHERE id = %s", [kept, note, release_id]
            )
        return self.find(release_id)

    def expire(self, *, superseded_before: datetime) -> list[int]:
        """Mark releases that were the newest for the last time before that moment as no longer readable, but for kept
        ones. Returns their ids.

        ``release(as_of=…)`` thus answers for every moment since then. Their files go with the next vacuum; their rows
        stay, for they are the lake's history.
        """
        with self._sessions.locked() as session:
            rows = session.execute(
                "UPDATE lake_releases old SET expired_at = clock_timestamp() WHERE NOT kept AND expired_at IS NULL AND "
                "(SELECT released_at FROM lake_releases WHERE id > old.id ORDER BY id LIMIT 1) < %s RETURNING id",
                [superseded_before],
            ).fetchall()
        return sorted(row[0] for row in rows)

    def readable_versions(self) -> dict[str, set[int]]:
        """The versions of every table that a release which has not expired still reads."""
        versions: dict[str, set[int]] = {}
        for (release,) in self._sessions.read("SELECT versions FROM lake_releases WHERE expired_at IS NULL", []):
            for table, version in release.items():
                versions.setdefault(table, set()).add(version)
        return versions

    def latest(self, session: psycopg.Connection) -> Release | None:
        """The newest release as the holder of the lock sees it, if there is any."""
        row = session.execute(f"{_SELECT} ORDER BY id DESC LIMIT 1").fetchone()
        return Release(*row) if row else None

    def current(self, session: psycopg.Connection) -> Release:
        """The newest release as the holder of the lock sees it.

        Raises:
            LakeReleaseError: there is none.
        """
        latest = self.latest(session)
        if latest is None:
            raise LakeReleaseError("the lake has no release yet; run `cloudoptim migrate` to create its tables")
        return latest

    def add(
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
        """Publish versions after ``base``; the session holds the lake's lock.

        Raises:
            LakeConflictError: somebody else released since ``base``.
            LakeError: the answer was lost; the message says what is known of the release.
        """
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
            with self._sessions.connect("cloudoptim lake writer") as session:
                self._sessions.wait_for_lock(session)
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
