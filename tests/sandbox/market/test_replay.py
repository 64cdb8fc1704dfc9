"""Replay of recorded prices: by hand-made recordings, and the real one where it is present."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from control.sandbox.aws.replay import replay_market
from control.sandbox.market import Pool, ReplayMarket

FIRST = datetime(2023, 3, 30, 0, 58, tzinfo=UTC)
HOURS = (0, 6, 13, 20)


def record(folder: Path, days: int = 5, region: str = "us-east-1") -> Path:
    """Snapshots four times a day over the end of a month: two types in two zones, one pool missing at times."""
    rows = [
        (FIRST + timedelta(days=day, hours=hour), region, zone, kind, "Linux/UNIX", round(base + 0.0001 * day, 4))
        for day in range(days)
        for hour in HOURS
        for zone in ("use1-az1", "use1-az2")
        for kind, base in (("m5.large", 0.035), ("z9.huge", 1.5))
        if not (kind == "z9.huge" and zone == "use1-az2" and day > 1)
    ]
    names = ["timestamp", "region", "availability_zone", "instance_type", "product_description", "price_usd"]
    frame = pl.DataFrame(rows, schema=names, orient="row").with_columns(pl.col("timestamp").dt.cast_time_unit("us"))
    target = folder / "spot_price" / f"region={region}"
    target.mkdir(parents=True)
    for month, part in frame.group_by(pl.col("timestamp").dt.strftime("%Y-%m")):
        part.write_parquet(target / f"month={month[0]}.parquet")
    pl.DataFrame(
        {
            "valid_from": [FIRST, FIRST, FIRST + timedelta(days=2)],
            "region": [region] * 3,
            "instance_type": ["m5.large", "z9.huge", "m5.large"],
            "vcpus": [2.0, 64.0, 2.0],
            "memory_gib": [8.0, 512.0, 8.0],
            "on_demand_price_usd": [0.096, 4.0, 0.09],
        }
    ).write_parquet(folder / "on_demand_price.parquet")
    return folder


def test_every_observation_is_a_record_and_the_one_in_force_comes_first(tmp_path: Path) -> None:
    market = ReplayMarket(record(tmp_path), FIRST + timedelta(days=5))
    start, end = FIRST + timedelta(days=1, hours=3), FIRST + timedelta(days=2, hours=7)
    chunks = list(market.changes("us-east-1", start, end))
    seen = [
        (datetime.fromtimestamp(at / 1e6, UTC), c.pools[i], usd)
        for c in chunks
        for i, at, usd in zip(c.pool, c.at, c.usd_per_hour, strict=True)
    ]
    assert len(seen) == len(set(seen))
    inside = [s for s in seen if s[0] > start]
    in_force = [s for s in seen if s[0] <= start]
    # 13 h and 20 h of day 1 with four pools; 0 h and 6 h of day 2 with three
    assert len(inside) == 3 * 4 + 2 * 3
    assert sorted(p.zone_id + p.instance_type for _, p, _ in in_force) == [
        "use1-az1m5.large", "use1-az1z9.huge", "use1-az2m5.large", "use1-az2z9.huge",
    ]  # fmt: skip
    assert {at for at, _, _ in in_force} == {FIRST + timedelta(days=1)}
    # chunks run backwards in time, over the border of the month's files
    assert [c.at.max() for c in chunks if len(c)] == sorted((c.at.max() for c in chunks if len(c)), reverse=True)


def test_filters_and_prices_in_force(tmp_path: Path) -> None:
    market = ReplayMarket(record(tmp_path), FIRST + timedelta(days=5))
    chunks = market.changes(
        "us-east-1", FIRST, FIRST + timedelta(days=9), instance_types=["m5.large"], zone_ids=["use1-az2"]
    )
    assert sum(len(c) for c in chunks) == 5 * 4
    pool = Pool("us-east-1", "use1-az1", "m5.large")
    assert market.price_usd_per_hour(pool, FIRST + timedelta(days=3, hours=1)) == pytest.approx(0.0353)
    with pytest.raises(KeyError, match="no recorded price"):
        market.price_usd_per_hour(pool, FIRST - timedelta(hours=1))
    assert market.on_demand_usd_per_hour("us-east-1", "m5.large", FIRST + timedelta(days=1)) == 0.096
    assert market.on_demand_usd_per_hour("us-east-1", "m5.large", FIRST + timedelta(days=4)) == 0.09
    assert market.on_demand_since("us-east-1", "m5.large", FIRST + timedelta(days=4)) == FIRST + timedelta(days=2)
    assert market.on_demand_since("us-east-1", "z9.huge", FIRST) == datetime(2023, 3, 1, tzinfo=UTC)
    assert market.size("z9.huge") == (64, 512.0)


def test_clock_runs_at_its_speed_and_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    prices, home = record(tmp_path / "prices"), tmp_path / "home"
    market = replay_market(prices, FIRST, 3600.0, home)
    assert abs((market.now() - FIRST) / timedelta(hours=1)) < 10
    again = replay_market(prices, FIRST, 3600.0, home)
    assert again.anchor_epoch_seconds == market.anchor_epoch_seconds
    other = replay_market(prices, FIRST, 60.0, home)
    assert other.anchor_epoch_seconds > market.anchor_epoch_seconds
    past = ReplayMarket(prices, FIRST, speed=86_400.0, anchor_epoch_seconds=time.time() - 2)
    assert past.now() >= FIRST + timedelta(days=2)


def test_a_folder_without_prices_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no recorded prices; expected"):
        ReplayMarket(tmp_path, FIRST)
    with pytest.raises(ValueError, match="time zone"):
        ReplayMarket(tmp_path, FIRST.replace(tzinfo=None))


def test_real_recording_is_found_whole(shared_data: Path) -> None:
    market = ReplayMarket(shared_data / "spot_price_catalog", datetime(2023, 9, 1, tzinfo=UTC), speed=0)
    assert market.now() == datetime(2023, 9, 1, tzinfo=UTC)
    pools = {region: len(market.pools(region)) for region in market.regions()}
    assert pools == {"eu-west-1": 1991, "us-east-1": 3196, "us-east-2": 1873}
    day = datetime(2023, 4, 12, tzinfo=UTC)
    rows = [
        at
        for c in market.changes("us-east-2", day, day + timedelta(days=1), instance_types=["m5.xlarge"])
        for at in c.at.tolist()
        if at > (day - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)
    ]
    expected = (
        pl.scan_parquet(shared_data / "spot_price_catalog/spot_price/region=us-east-2/month=2023-04.parquet")
        .filter((pl.col("instance_type") == "m5.xlarge") & (pl.col("timestamp").dt.date() == day.date()))
        .collect()
    )
    assert len(rows) == expected.height == 12
