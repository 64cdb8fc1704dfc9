"""Regions that could not be read when they were last asked: why, since when, and when they are asked again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from cloudoptim_pipelines.pacing import RETRY_AFTER

# Somebody has to allow a region before it answers; whoever did fills its gaps at once, or waits no longer than this.
DENIED_WAIT = timedelta(hours=6)

_LOAD = text(
    "SELECT series, message, denied, asked_from, failing_since, failed_at FROM source_failures "
    "WHERE table_name = :table_name"
)
_FAILED = text(
    """
    INSERT INTO source_failures (table_name, series, code, message, denied, asked_from, failing_since, failed_at)
    VALUES (:table_name, :series, :code, :message, :denied, :asked_from, :now, :now)
    ON CONFLICT (table_name, series) DO UPDATE SET
        code = excluded.code, message = excluded.message, denied = excluded.denied, failed_at = excluded.failed_at,
        asked_from = least(source_failures.asked_from, excluded.asked_from)
    """
)
_ANSWERED = text("DELETE FROM source_failures WHERE table_name = :table_name AND series = :series")


@dataclass(frozen=True, slots=True)
class Refusal:
    """``denied``: asking again changes nothing until somebody allows it. ``asked_from``: the earliest moment asked for
    in vain.
    """

    message: str
    denied: bool
    asked_from: datetime
    failing_since: datetime
    failed_at: datetime

    @property
    def ask_again_at(self) -> datetime:
        """When a denied region's turn comes: it waits for as long as it has been refusing, up to ``DENIED_WAIT``."""
        refused = self.failed_at - self.failing_since
        return self.failed_at + min(max(refused, RETRY_AFTER), DENIED_WAIT)


def load(connection: Connection, table_name: str) -> dict[str, Refusal]:
    """What refuses now, by region."""
    return {
        row.series: Refusal(row.message, row.denied, row.asked_from, row.failing_since, row.failed_at)
        for row in connection.execute(_LOAD, {"table_name": table_name})
    }


def failed(
    connection: Connection, table_name: str, series: str, error: Any, *, denied: bool, since: datetime, now: datetime
) -> None:
    """Note that a series could not be read: ``error`` has the source's ``code``; ``since`` is what was asked for."""
    connection.execute(
        _FAILED,
        {
            "table_name": table_name,
            "series": series,
            "code": error.code,
            "message": str(error),
            "denied": denied,
            "asked_from": since,
            "now": now,
        },
    )


def answered(connection: Connection, table_name: str, series: str) -> None:
    """The series was read: nothing refuses any more."""
    connection.execute(_ANSWERED, {"table_name": table_name, "series": series})


def neighbours(regions: Sequence[str], wanted: Collection[str]) -> list[list[str]]:
    """The wanted regions as stretches of the list: a run takes a range, and would take all between its ends."""
    out: list[list[str]] = []
    following = False
    for region in regions:
        if region in wanted:
            out[-1].append(region) if following else out.append([region])
        following = region in wanted
    return out


def denied_now(refusals: Mapping[str, Refusal], regions: Iterable[str]) -> dict[str, Refusal]:
    """The regions that nobody has allowed yet: they are asked by themselves, so that they fail no other's run."""
    return {region: refusals[region] for region in regions if region in refusals and refusals[region].denied}


def waiting(denied: Mapping[str, Refusal], now: datetime) -> dict[str, Refusal]:
    """Those of the denied regions whose turn has not come, the next one first."""
    later = {region: refusal for region, refusal in denied.items() if refusal.ask_again_at > now.astimezone(UTC)}
    return dict(sorted(later.items(), key=lambda item: item[1].ask_again_at))
