"""Where a replacement goes: the ladder, the memory of pools, the customer's limits."""

from __future__ import annotations

import pytest

from control.interruptions import pools
from control.interruptions.choosing import (
    Choice,
    Limits,
    Market,
    Pool,
    TypeFacts,
    Wanted,
    choose,
    choose_only,
    processor,
)
from control.interruptions.states import MAX_ATTEMPTS
from warehouse.postgres.models import new_id

ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
TYPES = {
    name: TypeFacts(name, vcpus, memory, price)
    for name, vcpus, memory, price in (
        ("m5.large", 2, 8, 0.096),
        ("m5a.large", 2, 8, 0.086),
        ("m6g.large", 2, 8, 0.077),
        ("t3.large", 2, 8, 0.083),
        ("m5.xlarge", 4, 16, 0.192),
        ("m5.4xlarge", 16, 64, 0.768),
        ("c5.large", 2, 4, 0.085),
        ("r5.large", 2, 16, 0.126),
    )
}
SPOT = {(zone, name): facts.on_demand_usd_per_hour * 0.4 for zone in ZONES for name, facts in TYPES.items()}
WANTED = Wanted("m5.large", "us-east-1a", "spot")


def market(**changes) -> Market:
    return Market(**({"zones": ZONES, "types": TYPES, "spot": SPOT} | changes))


def ladder(found: Market, limits: Limits = Limits(), wanted: Wanted = WANTED) -> list[Pool]:
    """The pools of all attempts when every one is refused."""
    tried: list[Pool] = []
    while isinstance(choice := choose(wanted, found, limits, tried), Choice) and len(tried) < MAX_ATTEMPTS:
        tried.append(choice.pool)
    return tried


def test_same_type_elsewhere_then_other_types_then_on_demand() -> None:
    tried = ladder(market())
    assert len(tried) == MAX_ATTEMPTS
    assert [pool.instance_type for pool in tried[:2]] == ["m5.large", "m5.large"]
    assert {pool.availability_zone for pool in tried[:2]} == {"us-east-1b", "us-east-1c"}
    assert {pool.instance_type for pool in tried[2:4]} <= {"m5a.large", "m5.xlarge"}
    assert [pool.node_type for pool in tried] == ["spot"] * 4 + ["on-demand"] * 2
    assert len(set(tried)) == MAX_ATTEMPTS
    assert Pool("m5.large", "us-east-1a", "spot") not in {
        Pool(pool.instance_type, pool.availability_zone, pool.node_type) for pool in tried
    }


def test_what_ran_fits_again_in_cores_and_in_memory() -> None:
    # r5.large has the memory of an m5.xlarge and half of its cores.
    tried = ladder(market(), wanted=Wanted("m5.xlarge", "us-east-1a", "spot"))
    assert {pool.instance_type for pool in tried} == {"m5.xlarge"}


def test_the_cheaper_zone_first() -> None:
    spot = SPOT | {("us-east-1c", "m5.large"): 0.01}
    choice = choose(WANTED, market(spot=spot), Limits(), [])
    assert isinstance(choice, Choice)
    assert choice.pool == Pool("m5.large", "us-east-1c", "spot", 0.01)


def test_nothing_on_spot_above_the_price_cap() -> None:
    dear = dict.fromkeys(SPOT, 1.0)
    assert {pool.node_type for pool in ladder(market(spot=dear))} == {"on-demand"}
    cheap_enough = ladder(market(), Limits(price_cap_ratio=0.39))
    assert "m5.large" not in [pool.instance_type for pool in cheap_enough if pool.node_type == "spot"]


def test_pools_that_failed_are_left_alone_and_a_zone_of_failures_too() -> None:
    standings = {("us-east-1b", "m5.large"): pools.AVOID_ABOVE + 0.1}
    assert ladder(market(standings=standings))[0].availability_zone == "us-east-1c"
    zone_wide = {("us-east-1b", pools.ZONE): pools.ZONE_AVOID_ABOVE + 0.1}
    spot = [pool for pool in ladder(market(standings=zone_wide)) if pool.node_type == "spot"]
    assert "us-east-1b" not in {pool.availability_zone for pool in spot}


def test_allowed_types_and_zones_bind() -> None:
    limits = Limits(instance_types=frozenset({"m5.xlarge"}), zones=frozenset({"us-east-1b"}))
    assert {(pool.instance_type, pool.availability_zone) for pool in ladder(market(), limits)} == {
        ("m5.xlarge", "us-east-1b")
    }
    reason = choose(WANTED, market(), Limits(zones=frozenset({"eu-west-1a"})), [])
    assert isinstance(reason, str)
    assert "allowed_zones" in reason


def test_after_a_chain_of_interruptions_only_on_demand() -> None:
    assert ladder(market(), Limits(on_demand_only=True))[0].node_type == "on-demand"


def test_an_on_demand_node_is_replaced_on_demand() -> None:
    wanted = Wanted("m5.large", "us-east-1a", "on-demand")
    tried = ladder(market(), wanted=wanted)
    assert {pool.node_type for pool in tried} == {"on-demand"}
    assert tried[0].availability_zone != "us-east-1a"


def test_without_any_price_the_same_type_elsewhere_then_on_demand() -> None:
    tried = ladder(market(types={}, spot={}))
    assert [(pool.instance_type, pool.node_type) for pool in tried] == [
        ("m5.large", "spot"),
        ("m5.large", "spot"),
        ("m5.large", "on-demand"),
        ("m5.large", "on-demand"),
        ("m5.large", "on-demand"),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m5.large", "x86_64"),
        ("m6g.large", "arm64"),
        ("c7gn.xlarge", "arm64"),
        ("g4dn.xlarge", "x86_64"),
        ("g5g.xlarge", "arm64"),
        ("a1.large", "arm64"),
        ("im4gn.large", "arm64"),
        ("r6idn.large", "x86_64"),
        ("u-6tb1.metal", "x86_64"),
    ],
)
def test_processor_is_in_the_name(name: str, expected: str) -> None:
    assert processor(name) == expected


def test_penalties_add_up_per_pool_and_fade() -> None:
    customer = new_id()
    rows = {
        row["instance_type"]: row
        for row in pools.penalties(
            customer,
            [
                ("us-east-1", "us-east-1a", "m5.large", "interruption"),
                ("us-east-1", "us-east-1a", "m5.large", "refusal"),
                ("us-east-1", "us-east-1a", "c5.large", "rebalance"),
            ],
        )
    }
    assert rows["m5.large"]["penalty"] == pools.INTERRUPTION_PENALTY + pools.REFUSAL_PENALTY
    assert (rows["m5.large"]["interruptions"], rows["m5.large"]["refusals"]) == (1, 1)
    assert rows["c5.large"]["rebalances"] == 1
    assert pools.decayed(4.0, pools.HALF_LIFE_SECONDS) == pytest.approx(2.0)
    assert pools.decayed(4.0, -5.0) == 4.0


def test_a_zone_is_held_back_when_many_types_fail_and_not_when_one_fails_often() -> None:
    one = pools.with_zones({("us-east-1b", "m5.large"): pools.CEILING})
    assert one["us-east-1b", pools.ZONE] < pools.ZONE_AVOID_ABOVE
    failing = {("us-east-1b", f"m{number}.large"): pools.REFUSAL_PENALTY for number in range(6)}
    zone = pools.with_zones(failing)["us-east-1b", pools.ZONE]
    assert zone > pools.ZONE_AVOID_ABOVE
    spot = [pool for pool in ladder(market(standings=pools.with_zones(failing))) if pool.node_type == "spot"]
    assert spot
    assert "us-east-1b" not in {pool.availability_zone for pool in spot}
    # Half an hour later half of it is forgotten, and the zone is asked again.
    faded = {key: pools.decayed(points, pools.HALF_LIFE_SECONDS) for key, points in failing.items()}
    assert pools.with_zones(faded)["us-east-1b", pools.ZONE] < pools.ZONE_AVOID_ABOVE


def test_a_plans_pool_is_asked_once_and_only_while_it_is_fit() -> None:
    fit = choose_only(WANTED, "m5.large", "us-east-1b", market(), Limits(), [])
    assert isinstance(fit, Choice)
    assert fit.pool.node_type == "spot"
    bad = market(standings={("us-east-1b", "m5.large"): pools.AVOID_ABOVE + 0.1})
    dear = market(spot=dict.fromkeys(SPOT, 1.0))
    for found, tried in ((bad, []), (dear, []), (market(), [fit.pool]), (market(zones=("us-east-1a",)), [])):
        assert isinstance(choose_only(WANTED, "m5.large", "us-east-1b", found, Limits(), tried), str)
