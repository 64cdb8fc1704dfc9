"""The memory of pools: what a pool (instance type × zone) did to a customer, forgotten by half every half hour.

Karpenter blocks a refused pool for three minutes and forgets at once; a learned standing makes a pool that fails again
and again worse than one that failed once, and a zone where many types fail at the same time is held back as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

HALF_LIFE_SECONDS = 1800.0
CEILING = 32.0
# An interruption says the pool is being reclaimed now; a refusal says it is empty now; a rebalance is a rumour.
INTERRUPTION_PENALTY = 4.0
REFUSAL_PENALTY = 3.0
REBALANCE_PENALTY = 0.5
# A pool above this is not asked again: one refusal holds for about 18 minutes, one interruption for half an hour.
AVOID_ABOVE = 2.0
# A zone's own standing, under this name: each of its types adds this share of its points, and none more than one
# interruption's worth. One type that fails again and again says nothing about the others; five or six that fail within
# minutes hold the zone back.
ZONE = "*"
ZONE_SHARE = 0.25
ZONE_AVOID_ABOVE = 4.0


def decayed(penalty: float, age_seconds: float) -> float:
    """A penalty after some time."""
    return penalty * 0.5 ** (max(age_seconds, 0.0) / HALF_LIFE_SECONDS)


def penalties(customer_id: UUID, seen: Iterable[tuple[str, str, str, str]]) -> list[dict[str, Any]]:
    """Rows to add for what was seen: (region, zone, type, ``interruption`` | ``refusal`` | ``rebalance``)."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    weights = {
        "interruption": INTERRUPTION_PENALTY,
        "refusal": REFUSAL_PENALTY,
        "rebalance": REBALANCE_PENALTY,
    }
    counts: dict[tuple[str, str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for region, zone, instance_type, what in seen:
        key = region, zone, instance_type
        row = rows.setdefault(
            key,
            {
                "customer_id": customer_id,
                "region": region,
                "availability_zone": zone,
                "instance_type": instance_type,
                "penalty": 0.0,
                "last_reason": what,
            },
        )
        row["penalty"] += weights[what]
        row["last_reason"] = what
        counts[key][f"{what}s"] += 1
    return [
        row | {name: counts[key].get(name, 0) for name in ("interruptions", "refusals", "rebalances")}
        for key, row in rows.items()
    ]


def with_zones(standings: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Standings by (zone, type), with one for each whole zone under (zone, ``ZONE``)."""
    found = {key: penalty for key, penalty in standings.items() if key[1] != ZONE}
    zones: dict[tuple[str, str], float] = defaultdict(float)
    for (zone, _), penalty in found.items():
        zones[zone, ZONE] += min(penalty, INTERRUPTION_PENALTY) * ZONE_SHARE
    return found | zones
