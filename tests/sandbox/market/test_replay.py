"""Replay of recorded prices: by hand-made recordings, and the real one where it is present."""

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


class Wall:
    """Real time that passes when told."""

    def __init__(self) -> None:
        self.seconds = datetime(2026, 1, 10, tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.seconds

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)


def test_the_clock_stands_while_the_replay_is_stopped(tmp_path: Path) -> None:
    prices, home, wall = record(tmp_path / "prices"), tmp_path / "home", Wall()
    market = replay_market(prices, FIRST, 3600.0, home, clock=wall)
    wall.seconds += 10
    assert market.now() == FIRST + timedelta(hours=10)
    market.clock.close()
    wall.seconds += 86_400
    again = replay_market(prices, FIRST, 3600.0, home, clock=wall)
    assert again.now() == FIRST + timedelta(hours=10)
    wall.seconds += 1
    assert again.now() == FIRST + timedelta(hours=11)
    # killed: it goes on at most two seconds later than it was, and never earlier
    wall.seconds += 3600
    killed = replay_market(prices, FIRST, 3600.0, home, clock=wall)
    stood = killed.now()
    assert FIRST + timedelta(hours=11) <= stood <= FIRST + timedelta(hours=13)
    killed.clock.close()
    # another speed goes on from the same place, --again and another start begin anew
    slower = replay_market(prices, FIRST, 60.0, home, clock=wall)
    assert slower.now() == stood
    wall.seconds += 60
    assert slower.now() == stood + timedelta(hours=1)
    assert replay_market(prices, FIRST, 60.0, home, again=True, clock=wall).now() == FIRST
    later = FIRST + timedelta(days=1)
    assert replay_market(prices, later, 60.0, home, clock=wall).now() == later


def test_the_last_prices_hold_when_the_recording_is_over(tmp_path: Path) -> None:
    prices, wall = record(tmp_path / "prices"), Wall()
    last = FIRST + timedelta(days=4, hours=20)
    market = replay_market(prices, FIRST, 3600.0, tmp_path, clock=wall)
    assert not market.clock.ended
    wall.seconds += 86_400 * 365 * 1000
    assert market.now() == last
    assert market.clock.ended
    assert market.price_usd_per_hour(Pool("us-east-1", "use1-az1", "m5.large"), market.now()) == pytest.approx(0.0354)
    market.clock.close()
    assert replay_market(prices, FIRST, 3600.0, tmp_path, clock=wall).now() == last


def test_in_real_time_records_appear_when_the_clock_reaches_them_and_stay_there(tmp_path: Path) -> None:
    prices, home, wall = record(tmp_path / "prices"), tmp_path / "home", Wall()
    begun, day = wall.at, timedelta(days=1)

    def started() -> ReplayMarket:
        return replay_market(prices, FIRST + day, 24.0, home, in_real_time=True, clock=wall)

    def records(market: ReplayMarket) -> list[tuple[datetime, str, float]]:
        chunks = market.changes("us-east-1", begun - day, wall.at, zone_ids=["use1-az1"])
        return sorted(
            (datetime.fromtimestamp(at / 1e6, UTC), c.pools[i].instance_type, round(usd, 4))
            for c in chunks
            for i, at, usd in zip(c.pool, c.at, c.usd_per_hour, strict=True)
        )

    market = started()
    assert market.history_limit == timedelta(days=90)
    assert [pool.instance_type for pool in market.pools("us-east-1")] == ["m5.large"] * 2, "z9.huge is not sold"
    assert market.clock.recorded(datetime(2006, 1, 1, tzinfo=UTC)) < FIRST
    # what was recorded in the day before --from took the hour before the start
    before = records(market)
    assert [at for at, *_ in before] == [begun - timedelta(minutes=m * 2.5) for m in (24, 18, 11, 4, 0)]
    wall.seconds += 15 * 60  # six hours of the recording
    assert market.now() == wall.at
    running = records(market)
    assert running == [*before, (begun + timedelta(minutes=15), "m5.large", 0.0351)]
    pool = Pool("us-east-1", "use1-az1", "m5.large")
    assert market.price_usd_per_hour(pool, begun - timedelta(minutes=5)) == 0.035
    assert market.price_usd_per_hour(pool, wall.at) == 0.0351
    market.clock.close()
    wall.seconds += 5 * 3600
    market = started()
    assert records(market) == running, "nothing new appeared while it was stopped, and the past is what it was"
    assert market.price_usd_per_hour(pool, wall.at - timedelta(hours=1)) == 0.0351
    wall.seconds += 45 * 60
    market.now()
    assert records(market)[len(running) :] == [
        (wall.at - timedelta(minutes=45) + timedelta(minutes=m * 2.5), "m5.large", usd)
        for m, usd in ((7, 0.0351), (14, 0.0351), (18, 0.0352))
    ]
    # the list price that changed a recorded day after --from changed when that day was over
    assert market.on_demand_usd_per_hour("us-east-1", "m5.large", wall.at - timedelta(seconds=1)) == 0.096
    assert market.on_demand_usd_per_hour("us-east-1", "m5.large", wall.at) == 0.09
    assert market.on_demand_since("us-east-1", "m5.large", wall.at) == wall.at


def test_in_real_time_a_start_outside_the_recording_is_refused(tmp_path: Path) -> None:
    prices = record(tmp_path / "prices")
    with pytest.raises(ValueError, match="go from 2023-03-30 to 2023-04-03"):
        replay_market(prices, FIRST + timedelta(days=50), 1.0, None, in_real_time=True)


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
