"""From the rows AWS answered with to the rows the lake keeps: pure functions over frames, no I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import cast

import polars as pl

from cloudoptim_pipelines.partitions import DAY, DayRange, day_start, price_key

KEY = ["region", "zone_id", "instance_type", "product", "ts"]
# AWS caps Spot at the on-demand price; fifty times it is a unit mistake or test data, never an offer.
SUSPECT_MULTIPLE = 50.0
# NUMERIC(18,8): what has more decimals was not a price of AWS (it uses six).
MAX_DECIMALS_ERROR = 1e-9
# A row this young when it is fetched was observed as it happened; an older one was fetched again from AWS's history.
OBSERVED_WITHIN = timedelta(days=2)
# A moment at which this share of a day's pools has a row is a snapshot of all prices, not a chance meeting of changes.
SNAPSHOT_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Rows fit for the lake, and how many were refused for which reason (with one example each)."""

    rows: pl.DataFrame
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def clean(raw: pl.DataFrame, *, fetched_at: datetime, list_prices: pl.DataFrame) -> Cleaned:
    """Check prices, drop doubles, name the source.

    Args:
        raw: ts, region, zone_id, availability_zone, instance_type, product, price_usd_per_hour (text or number).
        fetched_at: when AWS was asked.
        list_prices: instance_type, list_price (USD per hour) of the region; empty when none is known yet.

    Refused: a price that is no number, is not positive, has more than eight decimals, or is over fifty times the
    on-demand price; a row without its zone or type. Of two rows with one key the later stays (AWS's last word).
    """
    number = pl.col("price_usd_per_hour").cast(pl.Float64, strict=False)
    reason = (
        pl.when(pl.any_horizontal(pl.col("zone_id", "instance_type", "product", "ts").is_null()))
        .then(pl.lit("incomplete"))
        .when(number.is_null() | ~number.is_finite())
        .then(pl.lit("not_a_number"))
        .when(number <= 0)
        .then(pl.lit("not_positive"))
        .when((number - number.round(8)).abs() > MAX_DECIMALS_ERROR * 0.1)
        .then(pl.lit("too_many_decimals"))
        .when(number > SUSPECT_MULTIPLE * pl.col("list_price"))
        .then(pl.lit("over_50x_on_demand"))
    )
    judged = raw.join(list_prices, on="instance_type", how="left").with_columns(reason=reason, number=number)
    refused = judged.filter(pl.col("reason").is_not_null())
    rejected = Counter(dict(refused.group_by("reason").len().sort("reason").iter_rows()))
    examples = {
        row["reason"]: f"{row['instance_type']} {row['zone_id']} {row['ts']}: {row['price_usd_per_hour']!r}"
        for row in refused.unique("reason", keep="first", maintain_order=True).iter_rows(named=True)
    }
    good = judged.filter(pl.col("reason").is_null())
    # Exact doubles are normal: AWS repeats the last change before the window, pages overlap. A second price for the
    # same key is not, and is counted.
    good = good.unique([*KEY, "number"], keep="last", maintain_order=True)
    single = good.unique(KEY, keep="last", maintain_order=True)
    if conflicting := good.height - single.height:
        rejected["second_price_same_time"] = conflicting
    observed = pl.lit(fetched_at) - pl.col("ts") <= OBSERVED_WITHIN
    rows = single.select(
        "ts",
        "zone_id",
        "availability_zone",
        "instance_type",
        "product",
        pl.col("number").alias("price_usd_per_hour"),
        pl.when(observed).then(pl.lit("observed")).otherwise(pl.lit("aws_history")).alias("source"),
        pl.lit(fetched_at).alias("fetched_at"),
        "region",
    )
    return Cleaned(rows, rejected, examples)


def inside(rows: pl.DataFrame, days: DayRange) -> pl.DataFrame:
    """Rows whose day is one of ``days``; the last change before them belongs to an earlier partition."""
    return rows.filter((pl.col("ts") >= days.start) & (pl.col("ts") < days.end))


def before(rows: pl.DataFrame, days: DayRange) -> pl.DataFrame:
    """The price in force at the start of ``days`` of every pool and product, where it is from an earlier day."""
    return newest(rows.filter(pl.col("ts") < days.start))


def newest(rows: pl.DataFrame) -> pl.DataFrame:
    """The last row of every pool and product."""
    return rows.sort("ts").unique(["zone_id", "instance_type", "product"], keep="last", maintain_order=True)


@dataclass(frozen=True, slots=True)
class DayFacts:
    """What a day's partition holds, for its coverage row and for people."""

    key: str
    start: datetime
    end: datetime
    rows: int
    pools: int
    snapshots: list[datetime]


def day_facts(
    rows: pl.DataFrame, region: str, days: DayRange, *, asked_until: datetime, priced_before: bool
) -> list[DayFacts]:
    """Facts of every day of ``days``.

    Args:
        rows: rows inside ``days``.
        asked_until: end of what AWS was asked for; a day that was not over then is covered up to here.
        priced_before: a price in force at the first day's start is known. If not, the days are covered only from the
            first row on.
    """
    per_moment = rows.group_by(pl.col("ts").dt.date().alias("day"), "ts").len()
    per_day = rows.group_by(pl.col("ts").dt.date().alias("day")).agg(
        pl.len().alias("rows"), pl.struct("zone_id", "instance_type").n_unique().alias("pools")
    )
    counts = {row["day"]: row for row in per_day.iter_rows(named=True)}
    moments: dict = {}
    for day, ts, count in per_moment.sort("ts").iter_rows():
        if count >= SNAPSHOT_SHARE * counts[day]["pools"] and counts[day]["pools"] > 1:
            moments.setdefault(day, []).append(ts)
    first = cast(datetime | None, None if priced_before else rows["ts"].min())
    out = []
    for day in days.days():
        start, end = day_start(day), min(day_start(day) + DAY, max(asked_until, day_start(day)))
        if not priced_before:
            start = end if first is None else min(end, max(start, first))
        found = counts.get(day, {"rows": 0, "pools": 0})
        out.append(DayFacts(price_key(day, region), start, end, found["rows"], found["pools"], moments.get(day, [])))
    return out
