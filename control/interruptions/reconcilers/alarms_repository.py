"""SQL of what a person has to look at: instances of ours that bill and that we cannot end, find or see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

# What did not say no for good is told when it was tried so often.
TRIES_BEFORE_TOLD = 5

_REFUSED = text(f"""
    SELECT r.customer_id, r.instance_id, r.why, r.operation, r.code, r.message, r.first_at,
           CAST(a.price_usd_per_hour AS double precision) AS usd_per_hour
    FROM refused_endings r
    LEFT JOIN launch_attempts a ON a.customer_id = r.customer_id AND a.instance_id = r.instance_id
    WHERE r.lasting OR r.tries >= {TRIES_BEFORE_TOLD}
    ORDER BY r.customer_id, r.first_at, r.instance_id
""")


async def refused_endings(conn: AsyncConnection) -> Sequence[Any]:
    """Instances that are to end and that AWS, or the account, does not let us end."""
    return (await conn.execute(_REFUSED)).all()


_UNANSWERED = text("""
    SELECT b.customer_id, b.id AS batch_id, b.region, b.error_code, b.error_message, b.first_called_at,
           count(a.id) AS instances, CAST(sum(a.price_usd_per_hour) AS double precision) AS usd_per_hour
    FROM launch_batches b
    JOIN launch_attempts a ON a.batch_id = b.id AND a.state IN ('calling', 'unknown')
    WHERE b.state IN ('calling', 'unknown') AND b.first_called_at < now() - make_interval(secs => :seconds)
    GROUP BY b.id ORDER BY b.customer_id, b.first_called_at
""")


async def unanswered_launches(conn: AsyncConnection, *, seconds: float) -> Sequence[Any]:
    """Launches of which nobody could say for ``seconds`` whether they were carried out."""
    return (await conn.execute(_UNANSWERED, {"seconds": seconds})).all()


_BLOCKED = text("""
    SELECT customer_id, min(reason) AS reason, count(*) AS launches FROM launch_intents
    WHERE state = 'blocked' GROUP BY customer_id
""")


async def blocked_launches(conn: AsyncConnection) -> Sequence[Any]:
    """Customers whose account refuses launches that are wanted now."""
    return (await conn.execute(_BLOCKED)).all()


# Whoever hears the agent ends it by itself (never_ready); here is what nobody can judge.
_UNSEEN = text("""
    SELECT a.customer_id, a.instance_id, a.launched_at, c.cluster_name, c.last_seen_at,
           CAST(a.price_usd_per_hour AS double precision) AS usd_per_hour
    FROM launch_attempts a
    JOIN launch_batches b ON b.id = a.batch_id
    JOIN clusters c ON c.id = b.cluster_id
    WHERE (a.state IN ('launched', 'adopted') OR (a.state = 'terminating' AND a.failure = :never_ready))
      AND a.launched_at < now() - make_interval(secs => :seconds)
      AND (c.last_seen_at IS NULL OR c.last_seen_at < now() - interval '2 minutes')
      AND NOT EXISTS (SELECT FROM nodes n WHERE n.customer_id = a.customer_id AND n.instance_id = a.instance_id
                        AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL)
    ORDER BY a.customer_id, a.launched_at
""")


async def unseen_replacements(conn: AsyncConnection, *, seconds: float, never_ready: str) -> Sequence[Any]:
    """Replacements that run for ``seconds`` and more without a Ready node, in clusters whose agent is away."""
    return (await conn.execute(_UNSEEN, {"seconds": seconds, "never_ready": never_ready})).all()


_ADOPT_ONLY = text("""
    SELECT m.id AS customer_id, m.adopt_only_reason AS reason,
           (SELECT count(*) FROM adopted_instances a
            WHERE a.customer_id = m.id AND a.reason = 'restored' AND a.ended_at IS NULL) AS instances
    FROM customers m WHERE m.adopt_only_since IS NOT NULL AND m.status <> 'offboarded' ORDER BY m.id
""")


async def adopt_only_customers(conn: AsyncConnection) -> Sequence[Any]:
    """Customers of whom nothing is terminated until a person lifts it."""
    return (await conn.execute(_ADOPT_ONLY)).all()


# Nobody waits for these: as Ready nodes they are at work, otherwise only the bill knows of them. Spot costs less.
_ADOPTED = text("""
    SELECT a.customer_id, a.instance_id, a.reason, a.region, coalesce(a.launched_at, a.adopted_at) AS launched_at,
           (SELECT CAST(max(p.price_usd_per_hour) AS double precision) FROM on_demand_price p
            WHERE p.region = a.region AND p.instance_type = a.instance_type AND p.product LIKE 'Linux%') AS usd_per_hour
    FROM adopted_instances a JOIN customers m ON m.id = a.customer_id AND m.status <> 'offboarded'
    WHERE a.ended_at IS NULL AND coalesce(a.launched_at, a.adopted_at) < now() - make_interval(secs => :seconds)
      AND NOT EXISTS (SELECT FROM nodes n WHERE n.customer_id = a.customer_id AND n.instance_id = a.instance_id
                        AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL)
    ORDER BY a.customer_id, a.instance_id
""")


async def adopted_outside(conn: AsyncConnection, *, seconds: float) -> Sequence[Any]:
    """Adopted instances that run for ``seconds`` and more and are no Ready nodes."""
    return (await conn.execute(_ADOPTED, {"seconds": seconds})).all()


_TOLD = text("""
    SELECT h.customer_id, h.detector, h.reason, m.status <> 'active' AS shown
    FROM intake_health h JOIN customers m ON m.id = h.customer_id
    WHERE h.state = 'degraded' AND h.detector = ANY(:detectors)
""")


async def told(conn: AsyncConnection, detectors: Sequence[str]) -> Sequence[Any]:
    """What these detectors told last, where they are degraded. ``shown``: the customer is not called active."""
    return (await conn.execute(_TOLD, {"detectors": list(detectors)})).all()
