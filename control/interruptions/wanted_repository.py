"""SQL of whether a launch is still wanted: what came after it, came before it, or stands in for it."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.launch_repository import BatchRow

# Of a cluster ``c``: what is open. A maintenance of next week is an interruption too, and no reason to wait until then;
# interruptions of instances in its region that no cluster has claimed yet may be this cluster's.
_OPEN_HERE = """i.customer_id = c.customer_id AND i.state <> 'closed' AND i.deadline_at < now() + interval '1 hour'
    AND (i.cluster_id = c.id OR (i.cluster_id IS NULL AND i.region = c.region))"""
IN_FLIGHT = f"(SELECT count(*) FROM interruptions i WHERE {_OPEN_HERE})"

# Of a return's launch ``l``: interruptions go first. Where its old node is being lost itself, it is the replacement.
_HELD = f"""l.plan_id IS NOT NULL AND EXISTS (SELECT FROM interruptions i WHERE {_OPEN_HERE})
    AND NOT EXISTS (SELECT FROM interruptions i
                    WHERE {_OPEN_HERE} AND i.instance_id = l.requirements ->> 'instance_id')"""
_HELD_RETURNS = text(f"""
    SELECT l.id FROM launch_intents l JOIN clusters c ON c.id = l.cluster_id WHERE l.id = ANY(:ids) AND {_HELD}
""")


async def held_returns(conn: AsyncConnection, ids: Sequence[UUID]) -> set[UUID]:
    """Launches for returns to Spot that wait, because an interruption in their cluster is in flight."""
    return set((await conn.execute(_HELD_RETURNS, {"ids": list(ids)})).scalars())


# Prices, standings and what is wanted move on; after an outage of all workers this long a pool is chosen anew.
CHOICE_HOLDS_SECONDS = 600.0
_WITHHELD = text(f"""
    SELECT CASE
        WHEN c.kill_switch OR m.kill_switch THEN 'the kill switch is on'
        WHEN c.status = 'deleted' OR m.status IN ('suspended', 'offboarding', 'offboarded')
            THEN 'the cluster or its customer is gone'
        WHEN NOT EXISTS (SELECT FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id
                         WHERE a.batch_id = b.id AND l.state = 'launching' AND l.deadline_at > now())
            THEN 'nobody waits for it any more'
        WHEN EXISTS (SELECT FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id
                     WHERE a.batch_id = b.id AND {_HELD}) THEN 'an interruption is in flight'
        WHEN b.created_at < now() - make_interval(secs => :seconds) THEN 'the choice is too old'
    END AS reason
    FROM launch_batches b JOIN clusters c ON c.id = b.cluster_id JOIN customers m ON m.id = b.customer_id
    WHERE b.id = :id AND b.calls = 0 AND b.lease_epoch = :lease_epoch
""")


async def withheld(conn: AsyncConnection, batch: BatchRow) -> str | None:
    """Why a call that was never made is not made any more. One that was made may have launched, and is repeated
    whatever happens."""
    values = {"id": batch.id, "lease_epoch": batch.lease_epoch, "seconds": CHOICE_HOLDS_SECONDS}
    return (await conn.execute(_WITHHELD, values)).scalar_one_or_none()


_OVERTAKEN = text("""
    SELECT DISTINCT a.intent_id FROM launch_attempts a
    JOIN interruptions i ON i.customer_id = a.customer_id AND i.instance_id = a.instance_id
    JOIN launch_intents l ON l.customer_id = i.customer_id AND l.interruption_id = i.id
    WHERE a.intent_id = ANY(:ids) AND l.id <> a.intent_id
""")


async def overtaken_intents(conn: AsyncConnection, ids: Sequence[UUID]) -> set[UUID]:
    """Intents of which a replacement has an interruption with a launch of its own: one lost node, one launch (C-27)."""
    return set((await conn.execute(_OVERTAKEN, {"ids": list(ids)})).scalars())


# Of a node ``n``: EC2 announced its end, for about now. Who is to go soon stands in for nobody.
GOING = """EXISTS (SELECT FROM interruptions e WHERE e.customer_id = n.customer_id AND e.instance_id = n.instance_id
    AND e.kind <> 'rebalance_recommendation'
    AND e.deadline_at BETWEEN now() - interval '1 hour' AND now() + interval '1 hour')"""

_REPLACED = text(f"""
    WITH RECURSIVE lineage AS (
        SELECT l.id AS intent_id, l.customer_id, l.requirements ->> 'instance_id' AS lost, false AS replaced
        FROM launch_intents l WHERE l.id = ANY(:ids) AND l.interruption_id IS NOT NULL
        UNION
        -- What replaced the lost node, what replaced that, and so on. A return to Spot replaces too.
        SELECT g.intent_id, g.customer_id, a.instance_id, true
        FROM lineage g
        JOIN launch_intents l ON l.customer_id = g.customer_id AND l.requirements ->> 'instance_id' = g.lost
            AND l.id <> g.intent_id
        JOIN launch_attempts a ON a.intent_id = l.id AND a.state = 'ready'
    ), living AS (
        SELECT g.intent_id, max(n.instance_id) AS instance_id FROM lineage g
        JOIN nodes n ON n.customer_id = g.customer_id AND n.instance_id = g.lost
        WHERE g.replaced AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL AND NOT {GOING}
        GROUP BY g.intent_id
    ), coming AS (
        SELECT DISTINCT g.intent_id FROM lineage g
        JOIN launch_intents l ON l.customer_id = g.customer_id AND l.requirements ->> 'instance_id' = g.lost
        WHERE (g.replaced OR l.plan_id IS NOT NULL) AND l.state IN ('planned', 'launching', 'launched', 'blocked')
    )
    SELECT intent_id, living.instance_id FROM living FULL JOIN coming USING (intent_id)
""")


async def replaced_intents(conn: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, str | None]:
    """Intents whose lost node was replaced before, each with the replacement that lives; None: that one is being
    launched, for a return to Spot or because it was lost itself. A node that was drained on a recommendation, or
    stopped, and is taken later, left the cluster its replacement: one lost node, one launch."""
    return {row.intent_id: row.instance_id for row in await conn.execute(_REPLACED, {"ids": list(ids)})}


# Locked first, read then: a plan that is about to end its old node has said so by the time it is read.
_LOCK_RETURNS = text("""
    SELECT p.id FROM optimization_history p WHERE p.id IN (
        SELECT r.plan_id FROM launch_intents l
        JOIN launch_attempts a ON a.customer_id = l.customer_id AND a.instance_id = l.requirements ->> 'instance_id'
        JOIN launch_intents r ON r.id = a.intent_id
        WHERE l.id = ANY(:ids) AND l.interruption_id IS NOT NULL AND r.plan_id IS NOT NULL)
    ORDER BY p.id FOR SHARE
""")
_SPARE = text(f"""
    SELECT l.id AS intent_id, n.instance_id FROM launch_intents l
    JOIN launch_attempts a ON a.customer_id = l.customer_id AND a.instance_id = l.requirements ->> 'instance_id'
    JOIN launch_intents r ON r.id = a.intent_id
    JOIN plan_steps s ON s.plan_id = r.plan_id AND s.kind = 'terminate' AND s.state IN ('pending', 'skipped')
    JOIN nodes n ON n.customer_id = r.customer_id AND n.instance_id = r.requirements ->> 'instance_id'
    WHERE l.id = ANY(:ids) AND l.interruption_id IS NOT NULL AND r.plan_id = ANY(:plan_ids)
      AND n.status IN ('ready', 'cordoned') AND n.terminated_at IS NULL AND NOT {GOING}
""")


async def spare_intents(conn: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, str]:
    """Intents whose lost node was launched for a return to Spot that did not come so far, each with the old node: it
    lives, and is the one node that is wanted there. The plans keep from ending it until this transaction is over."""
    plans = list((await conn.execute(_LOCK_RETURNS, {"ids": list(ids)})).scalars())
    if not plans:
        return {}
    result = await conn.execute(_SPARE, {"ids": list(ids), "plan_ids": plans})
    return {row.intent_id: row.instance_id for row in result}
