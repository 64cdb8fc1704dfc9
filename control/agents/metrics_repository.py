"""SQL of the metrics' landing: batch keys, samples, late days, cluster states and nodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.agents.samples import COPY_COLUMNS, COPY_HEADER, COPY_TRAILER, Batch
from warehouse.contracts import ClusterState, NodeState
from warehouse.postgres.dirty import MARK, mark_values
from warehouse.postgres.models import new_id

ZONE_ID_LABEL = "topology.k8s.aws/zone-id"
# A node that is still coming up is not seen by the agent yet; after this long it is not coming.
PENDING_GRACE = "30 minutes"

_CLAIM = text("""
    INSERT INTO metric_batches (customer_id, cluster_id, batch_id, seq, body_sha256, samples, rejected, late, answer,
                                sent_at)
    SELECT * FROM unnest(CAST(:customer_ids AS uuid[]), CAST(:cluster_ids AS uuid[]), CAST(:batch_ids AS uuid[]),
                         CAST(:seqs AS int[]), CAST(:hashes AS text[]), CAST(:samples AS int[]),
                         CAST(:rejected AS int[]), CAST(:late AS int[]), CAST(:answers AS text[]),
                         CAST(:sent_at AS timestamptz[]))
    ON CONFLICT (cluster_id, batch_id) DO NOTHING
    RETURNING cluster_id, batch_id
""")

_STORED = text("""
    SELECT b.cluster_id, b.batch_id, b.body_sha256, b.answer
    FROM unnest(CAST(:cluster_ids AS uuid[]), CAST(:batch_ids AS uuid[])) AS k (cluster_id, batch_id)
    JOIN metric_batches b USING (cluster_id, batch_id)
""")


async def claim_batches(conn: AsyncConnection, batches: Sequence[Batch]) -> dict[tuple[UUID, UUID], tuple[str, bytes]]:
    """Insert the batches' keys; returns hash and answer of those that were counted before."""
    result = await conn.execute(
        _CLAIM,
        {
            "customer_ids": [batch.customer_id for batch in batches],
            "cluster_ids": [batch.cluster_id for batch in batches],
            "batch_ids": [batch.batch_id for batch in batches],
            "seqs": [batch.seq for batch in batches],
            "hashes": [batch.body_sha256 for batch in batches],
            "samples": [batch.accepted for batch in batches],
            "rejected": [len(batch.rejected) for batch in batches],
            "late": [batch.late for batch in batches],
            "answers": [batch.answer().decode() for batch in batches],
            "sent_at": [batch.sent_at for batch in batches],
        },
    )
    new = {(row.cluster_id, row.batch_id) for row in result}
    old = [(batch.cluster_id, batch.batch_id) for batch in batches if (batch.cluster_id, batch.batch_id) not in new]
    if not old:
        return {}
    rows = await conn.execute(_STORED, {"cluster_ids": [key[0] for key in old], "batch_ids": [key[1] for key in old]})
    return {(row.cluster_id, row.batch_id): (row.body_sha256, row.answer.encode()) for row in rows}


async def copy_samples(conn: AsyncConnection, batches: Sequence[Batch]) -> None:
    """One binary COPY per day, straight into the day's partition."""
    raw = await conn.get_raw_connection()
    driver: Any = raw.driver_connection
    for day in sorted({day for batch in batches for day in batch.rows}):
        async with (
            driver.cursor() as cursor,
            cursor.copy(f"COPY metric_samples_{day:%Y%m%d} ({COPY_COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            parts = [batch.rows[day] for batch in batches if day in batch.rows]
            await copy.write(b"".join((COPY_HEADER, *parts, COPY_TRAILER)))


async def ensure_partitions(conn: AsyncConnection, first: date, last: date) -> None:
    """Partitions for the days, made where they are missing."""
    await conn.execute(text("SELECT ensure_metric_partitions(:first, :last)"), {"first": first, "last": last})


async def mark_late_days(conn: AsyncConnection, days: set[date]) -> None:
    """Have the days' summaries computed again."""
    if days:
        await conn.execute(MARK, mark_values("metric_5m", days, "late samples"))


_SEEN = text("""
    UPDATE clusters c
    SET last_seen_at = now(),
        status = CASE WHEN c.status IN ('pending', 'away') THEN 'active' ELSE c.status END,
        agent_version = coalesce(s.agent_version, c.agent_version)
    FROM unnest(CAST(:cluster_ids AS uuid[]), CAST(:versions AS text[])) AS s (id, agent_version)
    WHERE c.id = s.id
      AND (c.last_seen_at IS NULL OR c.last_seen_at < now() - interval '5 seconds' OR c.status <> 'active'
           OR c.agent_version IS DISTINCT FROM coalesce(s.agent_version, c.agent_version))
""")

_LOCK_CLUSTER = text("""
    SELECT customer_id, state ->> 'captured_at' AS captured_at, state ->> 'state_hash' AS state_hash
    FROM clusters WHERE id = :cluster_id FOR UPDATE
""")

_STORE_STATE = text("""
    UPDATE clusters SET state = CAST(:state AS jsonb), node_count = :node_count WHERE id = :cluster_id
""")

_UPSERT_NODES = text("""
    INSERT INTO nodes (id, customer_id, cluster_id, node_name, instance_id, instance_type, availability_zone, zone_id,
                       node_type, status, cpu_cores, memory_bytes, created_at, ready_at, last_seen_at)
    SELECT n.id, :customer_id, :cluster_id, n.node_name, n.instance_id, n.instance_type, n.availability_zone,
           n.zone_id, n.node_type, n.status, n.cpu_cores, n.memory_bytes, coalesce(n.created_at, :captured_at),
           CASE WHEN n.ready THEN CAST(:captured_at AS timestamptz) END, :captured_at
    FROM jsonb_to_recordset(CAST(:nodes AS jsonb)) AS n (
        id uuid, node_name text, instance_id text, instance_type text, availability_zone text, zone_id text,
        node_type text, status text, ready boolean, cpu_cores double precision, memory_bytes bigint,
        created_at timestamptz)
    ORDER BY n.instance_id
    ON CONFLICT (cluster_id, instance_id) DO UPDATE SET
        node_name = excluded.node_name,
        instance_type = excluded.instance_type,
        availability_zone = excluded.availability_zone,
        zone_id = coalesce(excluded.zone_id, nodes.zone_id),
        node_type = excluded.node_type,
        status = CASE WHEN excluded.status = 'pending' AND nodes.ready_at IS NOT NULL THEN 'not_ready'
                      ELSE excluded.status END,
        cpu_cores = excluded.cpu_cores,
        memory_bytes = excluded.memory_bytes,
        ready_at = coalesce(nodes.ready_at, excluded.ready_at),
        last_seen_at = excluded.last_seen_at,
        terminated_at = NULL
    WHERE nodes.last_seen_at <= excluded.last_seen_at
      AND (nodes.terminated_at IS NULL
           OR (excluded.ready_at IS NOT NULL AND excluded.last_seen_at > nodes.terminated_at))
""")

# Missing from this state and from the one before: gone since it was last seen.
_END_MISSING = text(f"""
    UPDATE nodes SET status = 'terminated', terminated_at = last_seen_at
    WHERE cluster_id = :cluster_id AND terminated_at IS NULL
      AND last_seen_at < CAST(:previous_captured_at AS timestamptz)
      AND (status <> 'pending' OR last_seen_at < CAST(:captured_at AS timestamptz) - interval '{PENDING_GRACE}')
""")

_TELL_CHANGE = text("""
    INSERT INTO outbox (id, customer_id, topic, payload)
    VALUES (:id, :customer_id, 'cluster.state.changed', CAST(:payload AS jsonb))
""")


async def mark_seen(conn: AsyncConnection, versions: dict[UUID, str | None]) -> None:
    """Note that the clusters' agents (of these versions) were heard of."""
    if versions:
        await conn.execute(_SEEN, {"cluster_ids": list(versions), "versions": list(versions.values())})


async def apply_states(conn: AsyncConnection, batches: Sequence[Batch]) -> list[tuple[UUID, UUID]]:
    """Take in the clusters' newest states; returns (customer_id, cluster_id) of those whose nodes changed.

    A state older than the one already stored changes nothing.
    """
    newest: dict[UUID, ClusterState] = {}
    for batch in batches:
        known = newest.get(batch.cluster_id)
        if batch.state is not None and (known is None or batch.state.captured_at > known.captured_at):
            newest[batch.cluster_id] = batch.state
    changed = []
    for cluster_id in sorted(newest):
        if (customer_id := await _apply_state(conn, newest[cluster_id])) is not None:
            changed.append((customer_id, cluster_id))
    return changed


async def _apply_state(conn: AsyncConnection, state: ClusterState) -> UUID | None:
    cluster = (await conn.execute(_LOCK_CLUSTER, {"cluster_id": state.cluster_id})).one()
    captured_at = state.captured_at
    state_hash = state.state_hash or hash_of(state)
    stored = state.model_copy(update={"state_hash": state_hash}).model_dump(mode="json")
    previous = datetime.fromisoformat(cluster.captured_at) if cluster.captured_at is not None else None
    if previous is not None and previous >= captured_at:
        return None
    nodes = {node.instance_id: node for node in state.nodes}
    await conn.execute(
        _UPSERT_NODES,
        {
            "customer_id": cluster.customer_id,
            "cluster_id": state.cluster_id,
            "captured_at": captured_at,
            "nodes": json.dumps([_node_row(node) for node in nodes.values()]),
        },
    )
    if previous is not None:
        await conn.execute(
            _END_MISSING,
            {
                "cluster_id": state.cluster_id,
                "previous_captured_at": previous,
                "captured_at": captured_at,
            },
        )
    await conn.execute(
        _STORE_STATE,
        {"state": json.dumps(stored), "node_count": state.node_count, "cluster_id": state.cluster_id},
    )
    if cluster.state_hash == state_hash:
        return None
    await conn.execute(
        _TELL_CHANGE,
        {
            "id": new_id(),
            "customer_id": cluster.customer_id,
            "payload": json.dumps(
                {
                    "customer_id": str(cluster.customer_id),
                    "cluster_id": str(state.cluster_id),
                    "captured_at": stored["captured_at"],
                    "state_hash": state_hash,
                    "node_count": state.node_count,
                }
            ),
        },
    )
    return cluster.customer_id


def hash_of(state: ClusterState) -> str:
    """A hash over nodes, readiness and schedulability, for agents that send none."""
    facts = sorted((node.instance_id, node.node_name, node.ready, node.schedulable) for node in state.nodes)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _node_row(node: NodeState) -> dict[str, Any]:
    status = ("ready" if node.schedulable else "cordoned") if node.ready else "pending"
    return {
        "id": str(new_id()),
        "node_name": node.node_name,
        "instance_id": node.instance_id,
        "instance_type": node.instance_type,
        "availability_zone": node.availability_zone,
        "zone_id": node.zone_id or node.labels.get(ZONE_ID_LABEL),
        "node_type": node.node_type.value,
        "status": status,
        "ready": node.ready,
        "cpu_cores": node.cpu_cores,
        "memory_bytes": node.memory_bytes,
        "created_at": node.created_at.isoformat() if node.created_at else None,
    }
