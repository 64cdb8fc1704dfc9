"""What pools did to a customer, as it is kept."""

from __future__ import annotations

import pytest

from control.interruptions import market_repository, pools, repository
from control.interruptions.market_repository import SpotPrice, spot_by_pool
from tests.control.interruptions.tenants import Tenant
from warehouse.postgres.session import Database

POOL = ("us-east-1", "us-east-1a", "m5.large")


async def _seen(db: Database, tenant: Tenant, what: str, times: int) -> float:
    """After so many more of these in one transaction: the pool's standing now."""
    rows = pools.penalties(tenant.customer_id, [(*POOL, what)] * times)
    async with db.system() as conn:
        await repository.add_penalties(conn, rows, half_life_seconds=pools.HALF_LIFE_SECONDS, ceiling=pools.CEILING)
        return (await market_repository.standings(conn, tenant.customer_id, "us-east-1"))["us-east-1a", "m5.large"]


async def test_points_add_up_and_halve(db: Database, tenant: Tenant, other_tenant: Tenant) -> None:
    assert await _seen(db, tenant, "interruption", 1) == pytest.approx(pools.INTERRUPTION_PENALTY)
    await tenant.rows(
        "UPDATE pool_standings SET updated_at = now() - interval '30 minutes' "
        "WHERE customer_id = :customer_id RETURNING 1"
    )
    two = pools.INTERRUPTION_PENALTY / 2 + pools.REFUSAL_PENALTY
    assert await _seen(db, tenant, "refusal", 1) == pytest.approx(two, rel=1e-3)
    row = await tenant.row(
        "SELECT interruptions, refusals, rebalances FROM pool_standings WHERE customer_id = :customer_id"
    )
    assert tuple(row) == (1, 1, 0)
    async with db.system() as conn:
        assert await market_repository.standings(conn, other_tenant.customer_id, "us-east-1") == {}


async def test_a_storm_holds_a_pool_back_no_longer_than_the_ceiling_says(db: Database, tenant: Tenant) -> None:
    assert await _seen(db, tenant, "interruption", 200) == pytest.approx(pools.CEILING), "the first word, too"
    assert await _seen(db, tenant, "interruption", 200) == pytest.approx(pools.CEILING, rel=1e-3)


def test_prices_are_those_of_the_zone_and_not_of_its_name() -> None:
    prices = [
        SpotPrice("use1-az1", "us-east-1a", "m5.large", 0.01),
        SpotPrice("use1-az2", "us-east-1b", "m5.large", 0.02),
        SpotPrice("use1-az3", "us-east-1c", "m5.large", 0.04),
        SpotPrice("use1-az3", "us-east-1c", "m5.large", 0.03),
    ]
    assert spot_by_pool(prices, {"use1-az1": "us-east-1b"}) == {
        ("us-east-1b", "m5.large"): 0.01,
        # Nobody knows what this account calls use1-az2: it is not us-east-1b.
        ("us-east-1c", "m5.large"): 0.03,
    }
    assert spot_by_pool(prices, {})["us-east-1a", "m5.large"] == 0.01, "no zone of the account was seen yet"
