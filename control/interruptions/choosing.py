"""Where a replacement is launched: a pure choice from prices, the pools' standing and the customer's limits.

The ladder: same type in another zone, other types of comparable size, On-Demand. The interrupted pool is never chosen,
a pool an earlier attempt failed in neither, and nothing on Spot that costs more than the same shape On-Demand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from control.interruptions import pools
from control.interruptions.states import MAX_ATTEMPTS

# Of six attempts the last two are On-Demand: by then capacity is what counts.
ON_DEMAND_FROM_ATTEMPT = MAX_ATTEMPTS - 1
SAME_TYPE_ATTEMPTS = 2
# Comparable: everything that ran must fit again, and twice the size is paying for air.
MAX_SIZE_RATIO = 2.0
# A penalty point makes a pool look this much dearer when two are compared.
PRICE_PER_PENALTY = 0.10

_FAMILY = re.compile(r"^([a-z]+)(\d+)([a-z-]*)\.")


@dataclass(frozen=True, slots=True)
class Pool:
    """A purchase option of a type in a zone. ``node_type`` is ``spot`` or ``on-demand``."""

    instance_type: str
    availability_zone: str
    node_type: str
    price_usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class TypeFacts:
    """A type's size and On-Demand price."""

    instance_type: str
    vcpus: float
    memory_gib: float
    on_demand_usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """What has to be replaced."""

    instance_type: str
    availability_zone: str
    node_type: str
    cpu_cores: float = 0.0
    memory_gib: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """A customer's limits. Empty sets allow everything; the price cap is a share of the On-Demand price."""

    instance_types: frozenset[str] = frozenset()
    zones: frozenset[str] = frozenset()
    price_cap_ratio: float = 1.0
    on_demand_only: bool = False


@dataclass(frozen=True, slots=True)
class Market:
    """What is known of one region: zones with a subnet, types, Spot prices and standings by (zone, type)."""

    zones: Sequence[str]
    types: Mapping[str, TypeFacts] = field(default_factory=dict)
    spot: Mapping[tuple[str, str], float] = field(default_factory=dict)
    standings: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A pool and why it was chosen."""

    pool: Pool
    reason: str


def choose(wanted: Wanted, market: Market, limits: Limits, tried: Sequence[Pool]) -> Choice | str:
    """The pool for the next attempt, or the reason there is none.

    Args:
        tried: pools of earlier attempts of this intent, oldest first.
    """
    zones = [zone for zone in market.zones if not limits.zones or zone in limits.zones]
    if not zones:
        return "no zone with a subnet is allowed; check allowed_zones and the cluster's subnets"
    used = {(pool.instance_type, pool.availability_zone, pool.node_type) for pool in tried}
    used.add((wanted.instance_type, wanted.availability_zone, wanted.node_type))
    spot_allowed = wanted.node_type == "spot" and not limits.on_demand_only
    if spot_allowed and len(tried) + 1 < ON_DEMAND_FROM_ATTEMPT:
        for choice in (
            _same_type(wanted, market, limits, zones, used, tried),
            _other_types(wanted, market, limits, zones, used),
        ):
            if choice is not None:
                return choice
    return _on_demand(wanted, market, limits, zones, used) or "every allowed pool was tried"


def choose_only(
    wanted: Wanted, instance_type: str, zone: str, market: Market, limits: Limits, tried: Sequence[Pool]
) -> Choice | str:
    """That one Spot pool, once, as long as its standing and price allow it; or the reason why not."""
    if tried:
        return "the plan's pool refused; nothing else is tried"
    if limits.on_demand_only:
        return "replacements on Spot are interrupted one after the other"
    if zone not in market.zones:
        return f"the cluster has no subnet in {zone}"
    pool = _spot_pool(wanted, instance_type, zone, market, limits, price_needed=True)
    return Choice(pool, "the plan's pool") if pool else f"{instance_type} in {zone} is too dear or did badly meanwhile"


def _same_type(
    wanted: Wanted,
    market: Market,
    limits: Limits,
    zones: Sequence[str],
    used: set[tuple[str, str, str]],
    tried: Sequence[Pool],
) -> Choice | None:
    if limits.instance_types and wanted.instance_type not in limits.instance_types:
        return None
    if sum(pool.instance_type == wanted.instance_type for pool in tried) >= SAME_TYPE_ATTEMPTS:
        return None
    pools_left = []
    # Where the type has prices, a zone without one does not offer it.
    priced = any((zone, wanted.instance_type) in market.spot for zone in market.zones)
    for zone in zones:
        # The type's interrupted zone stays out even when the node itself was On-Demand there.
        if zone == wanted.availability_zone or (wanted.instance_type, zone, "spot") in used:
            continue
        pool = _spot_pool(wanted, wanted.instance_type, zone, market, limits, price_needed=priced)
        if pool is not None:
            pools_left.append(pool)
    if not pools_left:
        return None
    return Choice(min(pools_left, key=lambda pool: _worth(pool, market)), "same type in another zone")


def _other_types(
    wanted: Wanted, market: Market, limits: Limits, zones: Sequence[str], used: set[tuple[str, str, str]]
) -> Choice | None:
    best: Pool | None = None
    for name in comparable(wanted, market, limits):
        for zone in zones:
            if (name, zone, "spot") in used or name == wanted.instance_type:
                continue
            pool = _spot_pool(wanted, name, zone, market, limits, price_needed=True)
            if pool is not None and (best is None or _worth(pool, market) < _worth(best, market)):
                best = pool
    return Choice(best, "another type of comparable size") if best else None


def _on_demand(
    wanted: Wanted, market: Market, limits: Limits, zones: Sequence[str], used: set[tuple[str, str, str]]
) -> Choice | None:
    def standing(zone: str, name: str) -> float:
        return market.standings.get((zone, name), 0.0) + market.standings.get((zone, pools.ZONE), 0.0)

    names = [wanted.instance_type] if not limits.instance_types or wanted.instance_type in limits.instance_types else []
    names += [name for name in comparable(wanted, market, limits) if name != wanted.instance_type]
    for name in names:
        free = [zone for zone in zones if (name, zone, "on-demand") not in used]
        if free:
            # A zone that has no Spot price of the type, where others have one, does not offer it.
            offered = {zone for zone in free if (zone, name) in market.spot} or set(free)
            zone = min(offered, key=lambda candidate: (standing(candidate, name), candidate))
            facts = market.types.get(name)
            price = facts.on_demand_usd_per_hour if facts else None
            return Choice(Pool(name, zone, "on-demand", price), "On-Demand, so that the capacity is there")
    return None


def _spot_pool(
    wanted: Wanted, name: str, zone: str, market: Market, limits: Limits, *, price_needed: bool
) -> Pool | None:
    if market.standings.get((zone, name), 0.0) > pools.AVOID_ABOVE:
        return None
    if market.standings.get((zone, pools.ZONE), 0.0) > pools.ZONE_AVOID_ABOVE:
        return None
    price = market.spot.get((zone, name))
    if price is None:
        return None if price_needed else Pool(name, zone, "spot")
    cap = market.types.get(wanted.instance_type) or market.types.get(name)
    if cap is not None and price > cap.on_demand_usd_per_hour * limits.price_cap_ratio:
        return None
    return Pool(name, zone, "spot", price)


def comparable(wanted: Wanted, market: Market, limits: Limits) -> list[str]:
    """Types in which everything that ran fits, at most twice as large, of the same processor; cheapest first."""
    known = market.types.get(wanted.instance_type)
    vcpus = known.vcpus if known else wanted.cpu_cores
    memory = known.memory_gib if known else wanted.memory_gib
    if not vcpus or not memory:
        return []
    found = [
        facts
        for facts in market.types.values()
        if vcpus <= facts.vcpus <= vcpus * MAX_SIZE_RATIO
        and memory <= facts.memory_gib <= memory * MAX_SIZE_RATIO
        and processor(facts.instance_type) == processor(wanted.instance_type)
        and not _special(facts.instance_type, wanted.instance_type)
        and (not limits.instance_types or facts.instance_type in limits.instance_types)
    ]
    return [facts.instance_type for facts in sorted(found, key=lambda facts: facts.on_demand_usd_per_hour)]


def processor(instance_type: str) -> str:
    """``arm64`` or ``x86_64``, from the type's name: AWS marks Graviton with a g after the generation."""
    match = _FAMILY.match(instance_type)
    return "arm64" if match and ("g" in match.group(3) or match.group(1) == "a") else "x86_64"


def _special(candidate: str, wanted: str) -> bool:
    """Whether a type is of a kind that a node group does not take by accident: bare metal, burstable, macOS."""

    def kind(name: str) -> str:
        if ".metal" in name:
            return "metal"
        family = name.split(".")[0]
        return family.rstrip("0123456789") if family.startswith(("mac", "t2", "t3", "t4")) else ""

    return kind(candidate) not in ("", kind(wanted))


def _worth(pool: Pool, market: Market) -> tuple[float, str, str]:
    penalty = market.standings.get((pool.availability_zone, pool.instance_type), 0.0)
    price = pool.price_usd_per_hour if pool.price_usd_per_hour is not None else float("inf")
    return price * (1 + PRICE_PER_PENALTY * penalty), pool.instance_type, pool.availability_zone
