"""Whose prices should be there: the configured regions, those that clusters run in, and what refused when asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import Connection, text

from cloudoptim_pipelines import refusals
from cloudoptim_pipelines.partitions import REGIONS, START, day_start
from warehouse.gap_reasons import API_ERROR, DENIED, DID_NOT_EXIST, NOT_CONFIGURED, NOT_NEEDED


@dataclass(frozen=True, slots=True)
class Need:
    """A region whose Spot prices should be there.

    ``since``: from when on, where that is before its first partition or there is none; None when nothing is expected
    before the first partition. ``until``: until when, for a region that nobody needs any more: the end of what was
    found missing while somebody did. ``reason``: why what is missing after ``refused_from`` is missing.
    """

    region: str
    since: datetime | None = None
    until: datetime | None = None
    reason: str = API_ERROR
    refused_from: datetime | None = None

    def why(self, end: datetime) -> str:
        """The reason of a gap that ends then."""
        return self.reason if self.refused_from is not None and end > self.refused_from else API_ERROR


_CLUSTERED = text("SELECT region, min(created_at) FROM clusters WHERE status <> 'deleted' GROUP BY region")
_MISSED = text(
    f"""
    SELECT series, min(gap_start), max(gap_end) FROM data_gaps
    WHERE table_name = :table_name AND state <> 'filled' AND reason <> '{DID_NOT_EXIST}' GROUP BY series
    """
)


def price_needs(connection: Connection, table_name: str, delivered: Iterable[str]) -> list[Need]:
    """Regions whose prices should be there, in order of their names.

    A region that nothing was ever read of (not in ``delivered``) is needed from its oldest cluster on, or from the
    first day that was asked for in vain. What was once found missing stays expected until it is read: a region whose
    first answer came late lacks the days before it. A region that is neither listed nor used any more lacks what it
    lacked until then.
    """
    given = {"table_name": table_name}
    clustered = _times(connection.execute(_CLUSTERED))
    found = connection.execute(_MISSED, given).all()
    missed = _times((series, start) for series, start, _ in found)
    missed_until = _times((series, end) for series, _, end in found)
    failures = refusals.load(connection, table_name)
    known = set(delivered)
    oldest = day_start(date.fromisoformat(START))
    needs = []
    for region in sorted({*clustered, *REGIONS, *known}):
        reason, refused_from, until = API_ERROR, None, None
        moments = [missed.get(region)]
        if region not in REGIONS and region not in clustered:
            reason, refused_from = NOT_NEEDED, oldest
            until = missed_until.get(region, oldest)
        elif region not in REGIONS:
            reason, refused_from = NOT_CONFIGURED, oldest
        elif failure := failures.get(region):
            reason, refused_from = (DENIED if failure.denied else API_ERROR), failure.asked_from
            moments.append(failure.asked_from)
        if region not in known:
            moments.append(clustered.get(region))
        if reason == DENIED and region not in known:
            # Whatever was asked for: nothing was ever allowed.
            refused_from = oldest
        since = min((moment for moment in moments if moment), default=None)
        needs.append(Need(region, max(since, oldest) if since else None, until, reason, refused_from))
    return needs


def _times(rows: Iterable[Any]) -> dict[str, datetime]:
    return {name: at.astimezone(UTC) for name, at in rows}
