"""The memory of pools: what a pool (instance type × zone) did to a customer, forgotten by half every half hour.

Karpenter blocks a refused pool for three minutes and forgets at once; a learned standing makes a pool that fails again
and again worse than one that failed once, and a zone where many types fail at the same time is held back as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
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
# The row of a whole zone: every refusal and interruption adds this much to it, so that about six failing types within
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
        for key, share in (((region, zone, instance_type), 1.0), ((region, zone, ZONE), ZONE_SHARE)):
            row = rows.setdefault(
                key,
                {
                    "customer_id": customer_id,
                    "region": region,
                    "availability_zone": zone,
                    "instance_type": key[2],
                    "penalty": 0.0,
                    "last_reason": what,
                },
            )
            row["penalty"] += weights[what] * share
            row["last_reason"] = what
            counts[key][f"{what}s"] += 1
    return [
        row | {name: counts[key].get(name, 0) for name in ("interruptions", "refusals", "rebalances")}
        for key, row in rows.items()
    ]
