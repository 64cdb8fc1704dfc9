"""The generated market: the same everywhere, shaped like the real one."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from control.sandbox.fleet.plan import CUSTOMERS
from control.sandbox.market import GeneratedMarket, Parameters, PriceChanges, load_catalogue, load_parameters

# spans the border of two generated blocks
END = datetime(2026, 3, 20, 13, 37, tzinfo=UTC)


@pytest.fixture(scope="module")
def market() -> GeneratedMarket:
    return GeneratedMarket(seed=11)


def joined(market: GeneratedMarket, start: datetime, end: datetime) -> set[tuple[int, int, float]]:
    return {
        record
        for chunk in market.changes("us-east-2", start, end)
        for record in zip(chunk.pool.tolist(), chunk.at.tolist(), chunk.usd_per_hour.tolist(), strict=True)
    }


def test_any_window_asked_in_any_order_has_the_same_records(market: GeneratedMarket) -> None:
    start = END - timedelta(days=50)
    whole = joined(market, start, END)
    fresh = GeneratedMarket(seed=11)
    pieces: set[tuple[int, int, float]] = set()
    for day in (40, 3, 17, 28):
        lower = start + timedelta(days=day)
        part = joined(fresh, lower, lower + timedelta(days=5))
        # the record in force at the start of a piece lies before it, and is one of the whole's too
        pieces |= part
    assert pieces <= whole
    assert len(pieces) > 1_000
    assert joined(fresh, start, END) == whole
    last = END - timedelta(days=5)
    assert joined(GeneratedMarket(seed=12), last, END) != joined(fresh, last, END)


def test_records_are_changes_and_one_per_pool_is_in_force_at_the_start(
    market: GeneratedMarket,
) -> None:
    start = END - timedelta(days=40)
    chunks = list(market.changes("us-east-2", start, END))
    pool = np.concatenate([c.pool for c in chunks])
    at = np.concatenate([c.at for c in chunks])
    usd = np.concatenate([c.usd_per_hour for c in chunks])
    order = np.lexsort((at, pool))
    pool, at, usd = pool[order], at[order], usd[order]
    start_us, end_us = (int((m - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)) for m in (start, END))
    assert at.max() <= end_us
    before = at <= start_us
    assert np.array_equal(np.sort(pool[before]), np.arange(len(market.pools("us-east-2"))))
    same_pool = pool[1:] == pool[:-1]
    assert (usd[1:][same_pool] != usd[:-1][same_pool]).all(), "a repeated price is no change"
    # not on a grid: hardly any two pools change in the same second
    assert len(np.unique(at)) > 0.9 * len(at)
    assert {int(a) % 3_600_000_000 for a in at[:500]} != {0}


def test_price_in_force_is_the_last_record(market: GeneratedMarket) -> None:
    pool = market.pools("us-east-2")[5]
    records = [
        (at, usd)
        for chunk in market.changes("us-east-2", END - timedelta(days=10), END, instance_types=[pool.instance_type])
        for i, at, usd in zip(chunk.pool, chunk.at, chunk.usd_per_hour, strict=True)
        if market.pools("us-east-2")[i] == pool
    ]
    assert market.price_usd_per_hour(pool, END) == max(records)[1]
    with pytest.raises(ValueError, match="time zone"):
        market.price_usd_per_hour(pool, END.replace(tzinfo=None))


def test_prices_stay_between_floor_and_on_demand_with_four_decimals(market: GeneratedMarket) -> None:
    catalogue, floor = load_catalogue(), load_parameters().floor_ratio
    for region in market.regions():
        for chunk in market.changes(region, END - timedelta(days=40), END):
            listed = np.array([catalogue.types[p.instance_type].on_demand_usd_per_hour[region] for p in chunk.pools])
            assert (chunk.usd_per_hour <= listed[chunk.pool] + 5e-5).all()
            assert (chunk.usd_per_hour >= floor * listed[chunk.pool] - 5e-5).all()
            assert np.allclose(chunk.usd_per_hour, chunk.usd_per_hour.round(4), atol=1e-12)


def test_hazard_rises_with_price_pressure_and_in_shortages(market: GeneratedMarket) -> None:
    moments = [END - timedelta(days=d) for d in range(0, 180, 3)]
    pools = market.pools("us-east-1")[::25]
    rising = []
    for pool in pools:
        calm = [m for m in moments if not market.scarce(pool, m)]
        hazards = np.array([market.hazard_per_hour(pool, m) for m in calm])
        prices = np.array([market.price_usd_per_hour(pool, m) for m in calm])
        assert ((hazards > 0) & (hazards < 0.05)).all()
        rising.append(np.corrcoef(hazards, prices)[0, 1])
    assert np.median(rising) > 0.7
    short = [(p, m) for p in market.pools("us-east-1") for m in moments[:20] if market.scarce(p, m)]
    assert 0.005 < len(short) / (20 * len(market.pools("us-east-1"))) < 0.06
    pool, when = short[0]
    assert market.capacity(pool, when, spot=True) == 0 < market.capacity(pool, when, spot=False)
    relaxed = GeneratedMarket(seed=11, parameters=_with(scarce_share=0.0))
    assert market.hazard_per_hour(pool, when) == pytest.approx(10 * relaxed.hazard_per_hour(pool, when))


def _with(**changes: float) -> Parameters:
    from dataclasses import replace

    return replace(load_parameters(), **changes)  # type: ignore[arg-type]


def test_parameters_survive_json_and_unknown_fields_are_named() -> None:
    parameters = load_parameters()
    assert Parameters.from_json(parameters.to_json()) == parameters
    with pytest.raises(ValueError, match="volatility"):
        Parameters.from_json('{"volatility": 1}')
    for shares in (parameters.regime_share, parameters.noise_share):
        assert sum(shares.values()) == pytest.approx(1.0)


def test_regions_and_pools_of_the_catalogue() -> None:
    catalogue = load_catalogue()
    assert 60 <= len(catalogue.types) <= 100
    assert catalogue.on_demand_usd_per_hour("us-east-1", "m5.xlarge") == 0.192
    assert catalogue.on_demand_usd_per_hour("eu-west-1", "m5.xlarge") == 0.214
    assert catalogue.on_demand_usd_per_hour("us-east-1", "nope") is None
    assert catalogue.pools("nowhere") == ()
    assert "SkyPilot" in catalogue.source


def test_ninety_days_of_a_region_take_seconds() -> None:
    market = GeneratedMarket(seed=99)
    chunks: list[PriceChanges] = list(market.changes("us-east-1", END - timedelta(days=90), END))
    records = sum(len(c) for c in chunks)
    # 485 pools, two to three changes a day each
    assert 60_000 < records < 200_000


@pytest.mark.soak
def test_the_fleets_interruptions_are_as_frequent_as_documented() -> None:
    """`CLOUDOPTIM_SANDBOX_INTERRUPTION_SCALE` in docs/sandbox.md: three years of the fleet's 30 Spot nodes."""
    market = GeneratedMarket()
    groups = [(c.region, g) for customer in CUSTOMERS for c in customer.clusters for g in c.groups]
    spot = [(region, g) for region, g in groups if g.capacity == "spot"]
    assert sum(g.count for _, g in spot) == 30
    rates = []
    for day in range(0, 3 * 365, 8):
        at = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=day, hours=day * 5 % 24)
        rates.append(
            sum(
                g.count
                * np.mean(
                    [market.hazard_per_hour(p, at) for p in market.pools(r) if p.instance_type == g.instance_type]
                )
                for r, g in spot
            )
        )
    assert 0.011 < np.mean(rates) < 0.016
    low, middle, high = np.quantile(rates, [0.05, 0.5, 0.95])
    assert 0.002 < low < 0.003 < 0.005 < middle < 0.007 < 0.035 < high < 0.055
