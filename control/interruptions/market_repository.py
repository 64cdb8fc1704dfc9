"""SQL of the market as a choice sees it: prices, an account's names of its zones, and what pools did to a customer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions import pools
from control.interruptions.choosing import TypeFacts

_TYPES = text("""
    SELECT instance_type, vcpus, memory_gib, CAST(price_usd_per_hour AS double precision) AS price
    FROM on_demand_price
    WHERE region = :region AND product LIKE 'Linux%' AND vcpus > 0 AND memory_gib > 0 AND price_usd_per_hour > 0
""")
_SPOT = text("""
    SELECT zone_id, availability_zone, instance_type, CAST(price_usd_per_hour AS double precision) AS price
    FROM spot_price_current
    WHERE region = :region AND product LIKE 'Linux/UNIX%' AND availability_zone IS NOT NULL AND price_usd_per_hour > 0
    ORDER BY effective_at
""")
_STANDINGS = text("""
    SELECT availability_zone, instance_type,
           penalty * power(0.5, extract(epoch FROM now() - updated_at) / :half_life_seconds) AS penalty
    FROM pool_standings WHERE customer_id = :customer_id AND region = :region
""")


@dataclass(frozen=True, slots=True)
class SpotPrice:
    """The newest price of a pool. ``zone_name`` is what the account that was asked calls the zone."""

    zone_id: str
    zone_name: str
    instance_type: str
    usd_per_hour: float


async def prices(conn: AsyncConnection, region: str) -> tuple[dict[str, TypeFacts], list[SpotPrice]]:
    """A region's types by name, and its Spot prices, the newest last."""
    types = [TypeFacts(*row) for row in await conn.execute(_TYPES, {"region": region})]
    spot = [SpotPrice(*row) for row in await conn.execute(_SPOT, {"region": region})]
    return {facts.instance_type: facts for facts in types}, spot


_ZONE_NAMES = text("""
    SELECT zone_id, availability_zone FROM nodes
    WHERE cluster_id = :cluster_id AND terminated_at IS NULL AND zone_id IS NOT NULL
    UNION
    SELECT z.value, z.key FROM launch_templates t, jsonb_each_text(coalesce(t.template -> 'zone_ids', '{}')) AS z
    WHERE t.cluster_id = :cluster_id
""")


async def zone_names(conn: AsyncConnection, cluster_id: UUID) -> dict[str, str]:
    """Zone id to the name that the account of a cluster has for it, of the zones that were seen there."""
    return {row.zone_id: row.availability_zone for row in await conn.execute(_ZONE_NAMES, {"cluster_id": cluster_id})}


def spot_by_pool(prices: Iterable[SpotPrice], names: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """Spot prices by an account's own (zone name, type): us-east-1a of one account is not us-east-1a of another. A zone
    the account was not seen in keeps its name, unless that is the account's name for another zone."""
    taken = set(names.values())
    found = {}
    for price in prices:
        zone = names.get(price.zone_id) or (price.zone_name if price.zone_name not in taken else None)
        if zone is not None:
            found[zone, price.instance_type] = price.usd_per_hour
    return found


async def standings(conn: AsyncConnection, customer_id: UUID, region: str) -> dict[tuple[str, str], float]:
    """A customer's pools that did badly, by (zone, type), decayed to now; a whole zone under ``pools.ZONE``."""
    result = await conn.execute(
        _STANDINGS,
        {"customer_id": customer_id, "region": region, "half_life_seconds": pools.HALF_LIFE_SECONDS},
    )
    return pools.with_zones({(row.availability_zone, row.instance_type): row.penalty for row in result})
