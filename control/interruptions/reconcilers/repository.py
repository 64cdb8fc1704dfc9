"""SQL of the reconcilers that compare the database with the cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import insert_rows

_CLAIM = text("""
    INSERT INTO round_claims AS r (name, claimed_until, claimed_by)
    SELECT name, now() + make_interval(secs => :seconds), :worker FROM unnest(CAST(:names AS text[])) AS name
    ORDER BY name
    ON CONFLICT (name) DO UPDATE SET claimed_until = excluded.claimed_until, claimed_by = excluded.claimed_by,
        rounds = r.rounds + 1
    WHERE r.claimed_until <= now()
    RETURNING name
""")


async def claim_rounds(conn: AsyncConnection, names: Sequence[str], *, worker: str, seconds: float) -> set[str]:
    """Those of the named rounds that are due, now this worker's: nobody else does them for ``seconds``."""
    if not names:
        return set()
    result = await conn.execute(_CLAIM, {"names": list(names), "worker": worker, "seconds": seconds})
    return {row.name for row in result}


_PREPARE = text("""
    INSERT INTO round_claims (name, claimed_until, claimed_by, rounds)
    SELECT name, to_timestamp(0), :worker, 0 FROM unnest(CAST(:names AS text[])) AS name ORDER BY name
    ON CONFLICT (name) DO NOTHING
""")
_CLAIM_LONGEST = text("""
    UPDATE round_claims r SET claimed_until = now() + make_interval(secs => :seconds), claimed_by = :worker,
        rounds = r.rounds + 1
    WHERE r.name = (
        SELECT name FROM round_claims WHERE name = ANY(:names) AND claimed_until <= now()
        ORDER BY claimed_until, name LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING r.name
""")


async def prepare_rounds(conn: AsyncConnection, names: Sequence[str], *, worker: str) -> None:
    """Rounds that nobody ever did are due."""
    if names:
        await conn.execute(_PREPARE, {"names": list(names), "worker": worker})


async def claim_longest(conn: AsyncConnection, names: Sequence[str], *, worker: str, seconds: float) -> str | None:
    """The prepared round that is due for longest, now this worker's; None when none is."""
    values = {"names": list(names), "worker": worker, "seconds": seconds}
    return (await conn.execute(_CLAIM_LONGEST, values)).scalar_one_or_none()


@dataclass(frozen=True, slots=True)
class Place:
    """A customer's region with clusters of ours, one of which stands for the customer's role."""

    customer_id: UUID
    region: str
    cluster_id: UUID


_PLACES = text("""
    SELECT DISTINCT ON (c.customer_id, c.region) c.customer_id, c.region, c.id AS cluster_id
    FROM clusters c JOIN customers m ON m.id = c.customer_id
    WHERE m.aws_role_arn IS NOT NULL
      AND ((m.status IN ('active', 'degraded') AND c.status <> 'deleted')
           OR (:leaving AND m.status IN ('active', 'degraded', 'offboarding')))
    ORDER BY c.customer_id, c.region, c.status = 'deleted', c.id
""")


async def places(conn: AsyncConnection, *, leaving: bool = False) -> list[Place]:
    """Every account and region with clusters of ours; with ``leaving``, also where all of them were deleted, and of
    customers that are off-boarded and whose instances have not all ended."""
    return [Place(**row._mapping) for row in await conn.execute(_PLACES, {"leaving": leaving})]


_SPOT_NODES = text("""
    SELECT n.cluster_id, n.instance_id FROM nodes n JOIN clusters c ON c.id = n.cluster_id
    WHERE n.customer_id = :customer_id AND c.region = :region AND c.status <> 'deleted'
      AND n.node_type = 'spot' AND n.terminated_at IS NULL
    ORDER BY n.instance_id
""")


async def spot_nodes(conn: AsyncConnection, place: Place) -> dict[str, UUID]:
    """Instance id to cluster of the Spot nodes that are alive as far as we know."""
    result = await conn.execute(_SPOT_NODES, {"customer_id": place.customer_id, "region": place.region})
    return {row.instance_id: row.cluster_id for row in result}


_SILENT_NODES = text("""
    SELECT n.instance_id, n.last_seen_at FROM nodes n JOIN clusters c ON c.id = n.cluster_id
    WHERE n.customer_id = :customer_id AND c.region = :region AND c.status <> 'deleted'
      AND n.node_type = 'spot' AND n.terminated_at IS NULL
      AND n.last_seen_at < now() - make_interval(secs => :seconds)
      AND n.created_at < now() - make_interval(secs => :seconds)
    ORDER BY n.instance_id
""")


async def silent_nodes(conn: AsyncConnection, place: Place, *, seconds: float) -> dict[str, datetime]:
    """When agents last saw the Spot nodes of which they have said nothing for ``seconds``."""
    result = await conn.execute(
        _SILENT_NODES, {"customer_id": place.customer_id, "region": place.region, "seconds": seconds}
    )
    return {row.instance_id: row.last_seen_at for row in result}


# Only what was seen to be gone can come back: until then the node is cordoned because it is being taken. A warning
# that came true later than its own end is another interruption, and is open.
_CAME_BACK = text("""
    SELECT i.id AS interruption_id, i.customer_id, i.cluster_id, n.node_name, n.instance_id
    FROM nodes n
    JOIN LATERAL (
        SELECT * FROM interruptions i WHERE i.customer_id = n.customer_id AND i.instance_id = n.instance_id
        ORDER BY i.received_at DESC LIMIT 1
    ) i ON true
    WHERE n.terminated_at IS NULL AND n.status = 'cordoned'
      AND i.state = 'closed' AND i.instance_action IN ('stop', 'hibernate')
      AND i.instance_gone_at < n.last_seen_at - interval '1 minute'
      AND NOT EXISTS (SELECT FROM agent_tasks t WHERE t.customer_id = i.customer_id AND t.cluster_id = i.cluster_id
                        AND t.dedupe_key = 'uncordon:' || i.id)
    ORDER BY i.id LIMIT :limit
""")


async def nodes_that_came_back(conn: AsyncConnection, *, limit: int) -> list[Any]:
    """Cordoned nodes that are Ready again after EC2 stopped or hibernated them, not given back yet."""
    return list(await conn.execute(_CAME_BACK, {"limit": limit}))


_KNOWN_TEMPLATES = text("""
    SELECT DISTINCT unnest(instance_ids) AS instance_id FROM launch_templates WHERE customer_id = :customer_id
""")


async def instances_with_template(conn: AsyncConnection, customer_id: UUID) -> set[str]:
    """Instances whose way of launching is kept."""
    return {row.instance_id for row in await conn.execute(_KNOWN_TEMPLATES, {"customer_id": customer_id})}


_ATTEMPTS = text("""
    SELECT a.instance_id, a.state, a.intent_id, a.batch_id FROM launch_attempts a
    WHERE a.customer_id = :customer_id AND a.instance_id = ANY(:instance_ids)
""")
_BATCHES = text("""
    SELECT id, state, client_token, first_called_at, CAST(request_json AS jsonb) ->> 'InstanceType' AS instance_type
    FROM launch_batches WHERE customer_id = :customer_id AND id = ANY(:batch_ids)
""")


async def attempts_by_instance(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> dict[str, Any]:
    """Attempts of instances."""
    values = {"customer_id": customer_id, "instance_ids": list(instance_ids)}
    return {row.instance_id: row for row in await conn.execute(_ATTEMPTS, values)}


async def batches(conn: AsyncConnection, customer_id: UUID, batch_ids: Sequence[UUID]) -> dict[UUID, Any]:
    """What identifies calls and what became of them, by id."""
    values = {"customer_id": customer_id, "batch_ids": list(batch_ids)}
    return {row.id: row for row in await conn.execute(_BATCHES, values)}


_READY_NODES = text("""
    SELECT instance_id FROM nodes
    WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids)
      AND status IN ('ready', 'cordoned') AND terminated_at IS NULL
""")
# A node that is ending leaves its cluster a little before EC2 shows it so.
_LEFT_NODES = text("""
    SELECT instance_id FROM nodes WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids)
    GROUP BY instance_id HAVING max(coalesce(terminated_at, 'infinity')) < now() - interval '10 minutes'
""")
_SILENT_CLUSTERS = text("""
    SELECT c.id FROM clusters c JOIN customers m ON m.id = c.customer_id
    WHERE c.customer_id = :customer_id AND c.status <> 'deleted' AND m.status NOT IN ('offboarding', 'offboarded')
      AND (c.last_seen_at IS NULL OR c.last_seen_at < now() - interval '2 minutes')
""")


async def ready_nodes(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> set[str]:
    """Which of the instances are Ready nodes by their agents' word: pods may run there."""
    values = {"customer_id": customer_id, "instance_ids": list(instance_ids)}
    return set((await conn.execute(_READY_NODES, values)).scalars())


async def left_nodes(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> set[str]:
    """Which of the instances were nodes, and left their cluster ten minutes ago or earlier."""
    values = {"customer_id": customer_id, "instance_ids": list(instance_ids)}
    return set((await conn.execute(_LEFT_NODES, values)).scalars())


async def silent_clusters(conn: AsyncConnection, customer_id: UUID) -> set[UUID]:
    """Clusters whose agent was not heard for two minutes: nobody knows which instances are their nodes now."""
    return set((await conn.execute(_SILENT_CLUSTERS, {"customer_id": customer_id})).scalars())


_NODE_COUNTS = text("""
    SELECT cluster_id, count(*) AS nodes FROM nodes
    WHERE customer_id = :customer_id AND terminated_at IS NULL GROUP BY cluster_id
""")


async def node_counts(conn: AsyncConnection, customer_id: UUID) -> dict[UUID, int]:
    """Living nodes per cluster of a customer."""
    result = await conn.execute(_NODE_COUNTS, {"customer_id": customer_id})
    return {row.cluster_id: row.nodes for row in result}


_ADOPT_ONLY = text("SELECT adopt_only_since IS NOT NULL AS adopt_only FROM customers WHERE id = :customer_id")
_SET_ADOPT_ONLY = text("""
    UPDATE customers SET adopt_only_since = now(), adopt_only_reason = :reason
    WHERE id = :customer_id AND adopt_only_since IS NULL
""")


async def adopt_only(conn: AsyncConnection, customer_id: UUID) -> bool:
    """Whether nothing of a customer may be terminated until a person says so."""
    return bool((await conn.execute(_ADOPT_ONLY, {"customer_id": customer_id})).scalar_one_or_none())


async def set_adopt_only(conn: AsyncConnection, customer_id: UUID, *, reason: str) -> bool:
    """Stop a customer's terminations; True when they were not stopped before."""
    result = await conn.execute(_SET_ADOPT_ONLY, {"customer_id": customer_id, "reason": reason})
    return result.rowcount > 0


async def adopt_instances(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Remember instances that carry our tags and that we may not end."""
    await insert_rows(
        conn,
        "adopted_instances",
        rows,
        order="instance_id",
        conflict="(customer_id, instance_id) DO NOTHING",
    )


_ADOPTED = text("""
    SELECT instance_id FROM adopted_instances WHERE customer_id = :customer_id AND instance_id = ANY(:instance_ids)
""")


# One that is not shown, or not with our tags, is none of our business any more.
_MARK_ADOPTED = text("""
    UPDATE adopted_instances SET ended_at = CASE WHEN instance_id = ANY(:running) THEN NULL ELSE now() END
    WHERE customer_id = :customer_id AND region = :region
      AND (ended_at IS NOT NULL) = (instance_id = ANY(:running))
""")


async def mark_adopted(conn: AsyncConnection, customer_id: UUID, region: str, *, running: Sequence[str]) -> None:
    """Say of a region's adopted instances which of them run."""
    values = {"customer_id": customer_id, "region": region, "running": list(running)}
    await conn.execute(_MARK_ADOPTED, values)


async def adopted(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> set[str]:
    """Which of the instances were adopted."""
    values = {"customer_id": customer_id, "instance_ids": list(instance_ids)}
    return {row.instance_id for row in await conn.execute(_ADOPTED, values)}


# I-1, I-3, I-4, I-8 and I-12 of RELIABILITY §2.3 as queries that find nothing.
INVARIANTS = {
    "message_in_no_end": """
        SELECT count(*) FROM inbox_messages
        WHERE outcome = 'waiting' AND received_at < now() - interval '15 minutes'""",
    "interruption_never_closed": """
        SELECT count(*) FROM interruptions
        WHERE state <> 'closed' AND greatest(received_at, deadline_at) < now() - interval '1 hour'""",
    "two_live_attempts": """
        SELECT count(*) FROM (SELECT intent_id FROM launch_attempts
        WHERE state IN ('planned', 'calling', 'unknown', 'launched', 'adopted', 'ready')
        GROUP BY intent_id HAVING count(*) > 1) doubled""",
    "live_attempt_of_ended_intent": """
        SELECT count(*) FROM launch_attempts a JOIN launch_intents l ON l.id = a.intent_id
        WHERE a.state IN ('launched', 'adopted') AND l.state IN ('exhausted', 'cancelled')""",
    "result_of_an_old_epoch": """
        SELECT count(*) FROM agent_tasks WHERE result_epoch IS NOT NULL AND result_epoch <> lease_epoch""",
    "history_with_holes": """
        SELECT count(*) FROM (
            SELECT i.id FROM interruptions i JOIN interruption_history h ON h.interruption_id = i.id
            WHERE i.received_at > now() - interval '1 day'
            GROUP BY i.id, i.version HAVING count(*) <> i.version) holed""",
    "plan_history_with_holes": """
        SELECT count(*) FROM (
            SELECT p.id FROM optimization_history p LEFT JOIN plan_history h ON h.plan_id = p.id
            WHERE p.optimization_type = 'return_to_spot' AND p.created_at > now() - interval '1 day'
            GROUP BY p.id, p.version HAVING count(h.version) <> p.version) holed""",
    "task_without_drain_offer": """
        SELECT count(*) FROM interruptions i JOIN agent_tasks t ON t.interruption_id = i.id
        JOIN clusters c ON c.id = t.cluster_id
        WHERE t.state = 'expired' AND t.first_leased_at IS NULL AND c.last_seen_at > t.deadline_at
          AND i.received_at > now() - interval '1 day' AND t.created_at < t.deadline_at - interval '30 seconds'""",
}


async def violations(conn: AsyncConnection) -> dict[str, int]:
    """How many rows break each invariant."""
    return {name: (await conn.execute(text(sql))).scalar_one() for name, sql in INVARIANTS.items()}


_LAUNCHED_AT = text("""
    SELECT instance_id, launched_at FROM launch_attempts
    WHERE customer_id = :customer_id AND state IN ('launched', 'adopted') AND instance_id IS NOT NULL
""")


async def launched_instances(conn: AsyncConnection, customer_id: UUID) -> dict[str, datetime | None]:
    """Replacements that are not Ready yet."""
    result = await conn.execute(_LAUNCHED_AT, {"customer_id": customer_id})
    return {row.instance_id: row.launched_at for row in result}
