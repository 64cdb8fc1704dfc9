"""Partitions: prices by day × region, everything else by day. Ten years of ten regions stay under 40,000 keys.

``CLOUDOPTIM_DATA_START`` is the first day there can be a partition of, ``CLOUDOPTIM_PRICE_REGIONS`` the regions. The
current day is a partition too (``end_offset=1``) and is simply refreshed while it lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import dagster as dg
from dagster import MultiPartitionKey

from control.settings import get_settings

START = get_settings().data_start.isoformat()
REGIONS = sorted(get_settings().regions)
DAY = timedelta(days=1)

# The range tags of one run over many partitions. A range over both dimensions means their cross product.
RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"

by_day = dg.DailyPartitionsDefinition(start_date=START, timezone="UTC", end_offset=1)
by_day_and_region = dg.MultiPartitionsDefinition({"day": by_day, "region": dg.StaticPartitionsDefinition(REGIONS)})


@dataclass(frozen=True, slots=True)
class DayRange:
    """Consecutive days, both ends included."""

    first: date
    last: date

    @property
    def start(self) -> datetime:
        """The first moment of the first day."""
        return day_start(self.first)

    @property
    def end(self) -> datetime:
        """The first moment after the last day."""
        return day_start(self.last) + DAY

    def days(self) -> list[date]:
        """Every day of the range."""
        return [self.first + timedelta(days=offset) for offset in range((self.last - self.first).days + 1)]

    def chunks(self, days: int) -> list[DayRange]:
        """The same days in ranges of at most ``days``, so that memory does not grow with the length of a backfill."""
        out = []
        first = self.first
        while first <= self.last:
            last = min(self.last, first + timedelta(days=days - 1))
            out.append(DayRange(first, last))
            first = last + DAY
        return out


def day_start(day: date) -> datetime:
    """Midnight UTC of a day."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def consecutive(days: Iterable[date]) -> list[DayRange]:
    """The days as ranges without holes, in order."""
    out: list[DayRange] = []
    for day in sorted(set(days)):
        if out and out[-1].last + DAY == day:
            out[-1] = DayRange(out[-1].first, day)
        else:
            out.append(DayRange(day, day))
    return out


def days_of(keys: Sequence[str]) -> list[DayRange]:
    """Keys of ``by_day`` as ranges."""
    return consecutive(date.fromisoformat(key) for key in keys)


def ranges_by_region(keys: Sequence[str]) -> dict[str, list[DayRange]]:
    """Keys of ``by_day_and_region`` as ranges for each region. A run never assumes that its keys are one rectangle."""
    days: dict[str, list[date]] = {}
    for key in keys:
        dimensions = _dimensions(key)
        days.setdefault(dimensions["region"], []).append(date.fromisoformat(dimensions["day"]))
    return {region: consecutive(found) for region, found in sorted(days.items())}


def _dimensions(key: str) -> dict[str, str]:
    if isinstance(key, MultiPartitionKey):
        return dict(key.keys_by_dimension)
    day, _, region = key.partition("|")
    return {"day": day, "region": region}


def price_key(day: date, region: str) -> str:
    """The key of a day × region partition, as Dagster writes it."""
    return f"{day.isoformat()}|{region}"


def dagster_key(key: str) -> MultiPartitionKey:
    """A day × region key as Dagster's own type, which its events need."""
    return MultiPartitionKey(_dimensions(key))


def range_tags(first: str, last: str) -> dict[str, str]:
    """Tags that make one run materialise every partition from ``first`` to ``last``."""
    return {RANGE_START: first, RANGE_END: last}
