"""What should be there and is not: expected grid minus coverage. Pure functions over coverage rows.

Nothing here reads the lake: every partition's coverage was kept when it was written, so looking through a year of
prices reads a few hundred small rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from statistics import median
from uuid import UUID

from cloudoptim_pipelines.coverage import Coverage
from cloudoptim_pipelines.defs.gaps.needs import Need
from cloudoptim_pipelines.defs.metrics import windows
from cloudoptim_pipelines.partitions import DAY, DayRange, day_start, price_key
from warehouse.gap_reasons import AGENT_AWAY, DID_NOT_EXIST, NO_SCRAPE, TOO_OLD, UNFILLABLE

PRICES = "spot_prices"

# What AWS keeps of Spot prices; older holes cannot be filled from it.
AWS_KEEPS = timedelta(days=90)
# The current day is refreshed every hour and may miss one turn.
REFRESH_GRACE = timedelta(hours=2, minutes=10)
# A snapshot that comes at an hour at which fewer days than this have one came late, or by hand.
REGULAR_SHARE = 0.02
BIN = timedelta(minutes=5)
# Samplers are never early by more than their clock is wrong.
EARLY = timedelta(minutes=15)
# A rhythm is believed after this many days; fewer cannot tell it from chance.
DAYS_FOR_A_RHYTHM = 7


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of one series that should be there and is not.

    ``reason`` is one of no_scrape (the sampler missed it), agent_away, api_error (we did not get it), denied (the
    source refuses us), not_configured (a cluster needs a region that nobody reads), not_needed (nobody needs the region
    any more), did_not_exist (before the first data), too_old (no source keeps it any more). ``fillable`` says whether a
    run may bring it back.
    """

    table_name: str
    series: str
    partition_key: str
    start: datetime
    end: datetime
    expected: int
    missing: int
    reason: str
    customer_id: UUID | None = None

    @property
    def fillable(self) -> bool:
        """False when no run can bring it back as things are."""
        return self.reason not in UNFILLABLE


def price_gaps(rows: Sequence[Coverage], *, now: datetime, need: Need | None = None) -> list[Gap]:
    """Gaps of one region's Spot prices; points are minutes, for snapshots the snapshots.

    Expected is every minute from the first day there is a partition of, or from when on the region is needed, until the
    last refresh was due, and, where prices come as snapshots in a daily rhythm, every snapshot of the rhythm.

    Args:
        rows: the region's coverage, all of it; none when nothing was ever read.
        need: since and until when the region is needed and why it may be missing.
    """
    if need is None:
        if not rows:
            return []
        need = Need(rows[0].series)
    table, region = PRICES, need.region
    by_day = {date.fromisoformat(row.partition_key[:10]): row for row in rows}
    needed_from = need.since.astimezone(UTC).date() if need.since else None
    if not by_day and needed_from is None:
        return []
    first, today = min([*by_day, *([needed_from] if needed_from else [])]), now.astimezone(UTC).date()
    gaps: list[Gap] = []

    def add(day: date, start: datetime, end: datetime, reason: str) -> None:
        minutes = int((end - start).total_seconds() // 60)
        if minutes > 0:
            gaps.append(Gap(table, region, price_key(day, region), start, end, 24 * 60, minutes, reason))

    expected_until = now - REFRESH_GRACE if need.until is None else need.until
    last = max([today if need.until is None else need.until.date(), *by_day])
    for day in DayRange(first, last).days():
        start, end = day_start(day), day_start(day) + DAY
        lost = TOO_OLD if end < now - AWS_KEEPS else need.why(end)
        due = min(end, expected_until)
        row = by_day.get(day)
        if row is None or row.present == 0:
            add(day, start, due, lost)
            continue
        if row.start > start:
            add(day, start, row.start, DID_NOT_EXIST if day == first else lost)
        if row.end < due:
            add(day, row.end, due, lost)
    gaps += snapshot_gaps(table, region, [by_day[day] for day in sorted(by_day)])
    if need.until is None:
        return gaps
    return [gap if gap.reason in UNFILLABLE else replace(gap, reason=need.reason) for gap in gaps]


def snapshot_gaps(table: str, region: str, rows: Sequence[Coverage]) -> list[Gap]:
    """Snapshots missing from a daily rhythm that the data itself shows; none where prices come as changes."""
    moments = [datetime.fromisoformat(text) for row in rows for text in row.detail.get("snapshots", ())]
    rhythm = daily_rhythm(moments)
    if not rhythm:
        return []
    slots = expected_slots(rhythm, min(moments), max(moments))
    taken = set(match_slots(slots, moments))
    gaps = []
    for index, slot in enumerate(slots):
        if index not in taken:
            end = slots[index + 1] if index + 1 < len(slots) else slot + DAY / len(rhythm)
            key = price_key(slot.date(), region)
            gaps.append(Gap(table, region, key, slot, end, len(rhythm), 1, NO_SCRAPE))
    return gaps


def daily_rhythm(moments: Sequence[datetime]) -> list[time]:
    """The times of day at which snapshots usually begin to arrive, earliest arrival of each; empty without a rhythm.

    The number of snapshots a day is the median one; times of day at which hardly any day has a snapshot (a late run,
    one by hand) are set aside, and the rest falls into that many groups at its widest pauses.
    """
    per_day = Counter(moment.date() for moment in moments)
    if len(per_day) < DAYS_FOR_A_RHYTHM:
        return []
    count = round(median(per_day.values()))
    bins = Counter(_since_midnight(moment) // BIN for moment in moments)
    regular = sorted(bin_ for bin_, seen in bins.items() if seen >= max(2, REGULAR_SHARE * len(per_day)))
    if count < 1 or len(regular) < count:
        return []
    bins_per_day = DAY // BIN
    pauses = [
        ((following - bin_) % bins_per_day or bins_per_day, following)
        for bin_, following in zip(regular, [*regular[1:], regular[0]], strict=True)
    ]
    starts = sorted(following for _, following in sorted(pauses, reverse=True)[:count])
    return [(day_start(date.min) + start * BIN).time() for start in starts]


def _since_midnight(moment: datetime) -> timedelta:
    return moment - day_start(moment.date())


def expected_slots(rhythm: Sequence[time], first: datetime, last: datetime) -> list[datetime]:
    """Every moment of the rhythm from the slot of the first snapshot to the slot of the last."""
    slots = [
        datetime.combine(day, slot, UTC)
        for day in DayRange((first - DAY).date(), last.date()).days()
        for slot in rhythm
    ]
    return [
        slot
        for slot, following in zip(slots, [*slots[1:], slots[-1] + DAY], strict=True)
        if following - EARLY > first and slot - EARLY <= last
    ]


def match_slots(slots: Sequence[datetime], moments: Iterable[datetime]) -> list[int]:
    """For each snapshot the slot it belongs to: the last one that had begun, a late run included."""
    out = []
    position = 0
    for moment in sorted(moments):
        while position + 1 < len(slots) and slots[position + 1] - EARLY <= moment:
            position += 1
        out.append(position)
    return out


def metric_gaps(rows: Sequence[Coverage]) -> list[Gap]:
    """Gaps of clusters' metrics: runs of five-minute windows without any sample of the cluster."""
    gaps = []
    born: dict[str, datetime] = {}
    for row in sorted(rows, key=lambda row: row.partition_key):
        day = date.fromisoformat(row.partition_key)
        present = windows.decode(row.detail.get("present", ""))
        if present and row.series not in born:
            born[row.series] = day_start(day) + min(present) * windows.WINDOW
        first, until = row.detail.get("expected", (0, 0))
        for begin, end in windows.missing_runs((first, until), present):
            start = day_start(day) + begin * windows.WINDOW
            stop = day_start(day) + end * windows.WINDOW
            known = row.series in born and start >= born[row.series]
            gaps.append(
                Gap(
                    row.table_name,
                    row.series,
                    row.partition_key,
                    start,
                    stop,
                    until - first,
                    end - begin,
                    AGENT_AWAY if known else DID_NOT_EXIST,
                    row.customer_id,
                )
            )
    return gaps
