"""SQL of clusters, their nodes and events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from warehouse.postgres.models import ApiKey, Cluster, Customer, SpotEventRecord

_COLUMNS = (
    Cluster.id,
    Cluster.customer_id,
    Cluster.cluster_name,
    Cluster.region,
    Cluster.k8s_api_endpoint,
    Cluster.k8s_token.is_not(None).label("has_k8s_token"),
    Cluster.node_count,
    Cluster.status,
    Cluster.kill_switch,
    Cluster.agent_version,
    Cluster.agent_understands,
    Cluster.last_seen_at,
    Cluster.created_at,
)


async def list_clusters(
    conn: AsyncConnection, customer_id: UUID | None, after: UUID | None, limit: int
) -> Sequence[Row]:
    """Clusters that are not deleted, in order of creation."""
    query = select(*_COLUMNS).where(Cluster.status != "deleted").order_by(Cluster.id).limit(limit)
    if customer_id is not None:
        query = query.where(Cluster.customer_id == customer_id)
    if after is not None:
        query = query.where(Cluster.id > after)
    return (await conn.execute(query)).all()


async def get_cluster(conn: AsyncConnection, cluster_id: UUID) -> Row | None:
    """One cluster that is not deleted."""
    query = select(*_COLUMNS).where(Cluster.id == cluster_id, Cluster.status != "deleted")
    return (await conn.execute(query)).one_or_none()


async def get_state(conn: AsyncConnection, cluster_id: UUID) -> Row | None:
    """Status and newest state."""
    query = select(Cluster.id, Cluster.status, Cluster.last_seen_at, Cluster.state, func.now().label("now")).where(
        Cluster.id == cluster_id, Cluster.status != "deleted"
    )
    return (await conn.execute(query)).one_or_none()


async def insert_cluster(conn: AsyncConnection, values: dict[str, Any]) -> Row:
    """A new cluster."""
    return (await conn.execute(insert(Cluster).values(**values).returning(*_COLUMNS))).one()


async def update_cluster(conn: AsyncConnection, cluster_id: UUID, values: dict[str, Any]) -> Row | None:
    """The changed cluster."""
    query = (
        update(Cluster)
        .where(Cluster.id == cluster_id, Cluster.status != "deleted")
        .values(**values)
        .returning(*_COLUMNS)
    )
    return (await conn.execute(query)).one_or_none()


async def name_taken(conn: AsyncConnection, customer_id: UUID, name: str, other_than: UUID | None) -> bool:
    """Whether another cluster of the customer has this name; deleted ones keep theirs out of the way."""
    query = select(Cluster.id).where(Cluster.customer_id == customer_id, Cluster.cluster_name == name)
    if other_than is not None:
        query = query.where(Cluster.id != other_than)
    return (await conn.execute(query)).first() is not None


async def delete_cluster(conn: AsyncConnection, cluster_id: UUID) -> None:
    """Mark a cluster deleted: its secrets go at once, its name becomes free, its keys open nothing, its history
    stays. Tasks nobody took end."""
    await conn.execute(
        text("""UPDATE clusters SET status = 'deleted', k8s_token = NULL, k8s_ca = NULL, k8s_api_endpoint = NULL,
                       cluster_name = cluster_name || ' (deleted ' || id || ')'
                WHERE id = :id"""),
        {"id": cluster_id},
    )
    await conn.execute(
        update(ApiKey).where(ApiKey.cluster_id == cluster_id, ApiKey.revoked_at.is_(None)).values(revoked_at=func.now())
    )
    await conn.execute(
        text("""UPDATE agent_tasks SET state = 'superseded', finished_at = now()
                WHERE cluster_id = :id AND state IN ('queued', 'leased')"""),
        {"id": cluster_id},
    )
    await conn.execute(
        text("""UPDATE nodes SET status = 'terminated', terminated_at = last_seen_at
                WHERE cluster_id = :id AND terminated_at IS NULL"""),
        {"id": cluster_id},
    )


async def data_key_of(conn: AsyncConnection, customer_id: UUID) -> bytes | None:
    """The customer's wrapped data key."""
    return (await conn.execute(select(Customer.data_key).where(Customer.id == customer_id))).scalar_one_or_none()


async def set_data_key(conn: AsyncConnection, customer_id: UUID, data_key: bytes) -> None:
    """Store the data key of a customer that has none."""
    await conn.execute(
        update(Customer).where(Customer.id == customer_id, Customer.data_key.is_(None)).values(data_key=data_key)
    )


_PRICED = """
    SELECT n.id, n.cluster_id, n.customer_id, n.node_name, n.instance_id, n.instance_type, n.availability_zone,
           n.zone_id, n.node_type, n.status, n.cpu_cores, n.memory_bytes, n.created_at, n.ready_at, n.last_seen_at,
           n.terminated_at,
           CAST(CASE WHEN n.node_type = 'spot' THEN s.price_usd_per_hour ELSE o.price_usd_per_hour END
                AS double precision) AS price_usd_per_hour,
           CAST(o.price_usd_per_hour AS double precision) AS on_demand_usd_per_hour
    FROM nodes n
    JOIN clusters c ON c.id = n.cluster_id
    LEFT JOIN on_demand_price o
        ON o.region = c.region AND o.instance_type = n.instance_type AND o.product = 'Linux/UNIX'
    LEFT JOIN LATERAL (
        SELECT p.price_usd_per_hour FROM spot_price_current p
        WHERE p.region = c.region AND p.instance_type = n.instance_type AND p.product LIKE 'Linux/UNIX%'
          AND (p.zone_id = n.zone_id OR (n.zone_id IS NULL AND p.availability_zone = n.availability_zone))
        ORDER BY p.effective_at DESC LIMIT 1
    ) s ON n.node_type = 'spot'
"""

_NODES = text(f"""{_PRICED}
    WHERE n.cluster_id = :cluster_id AND (:ended OR n.terminated_at IS NULL)
      AND (CAST(:after AS uuid) IS NULL OR n.id > CAST(:after AS uuid))
    ORDER BY n.id LIMIT :limit
""")

_COST = text(f"""
    SELECT c.id AS cluster_id, c.customer_id, c.cluster_name, c.status, now() AS at,
           count(n.id) AS nodes,
           count(n.price_usd_per_hour) AS priced_nodes,
           count(n.id) FILTER (WHERE n.node_type = 'spot') AS spot_nodes,
           coalesce(sum(n.price_usd_per_hour), 0) AS actual_usd_per_hour,
           coalesce(sum(coalesce(n.on_demand_usd_per_hour, n.price_usd_per_hour))
                    FILTER (WHERE n.price_usd_per_hour IS NOT NULL), 0) AS on_demand_usd_per_hour
    FROM clusters c
    LEFT JOIN ({_PRICED} WHERE n.terminated_at IS NULL) n ON n.cluster_id = c.id
    WHERE c.status <> 'deleted' AND (CAST(:cluster_id AS uuid) IS NULL OR c.id = CAST(:cluster_id AS uuid))
      AND (CAST(:customer_id AS uuid) IS NULL OR c.customer_id = CAST(:customer_id AS uuid))
    GROUP BY c.id ORDER BY c.id
""")


async def list_nodes(
    conn: AsyncConnection, cluster_id: UUID, *, ended: bool, after: UUID | None, limit: int
) -> Sequence[Row]:
    """Nodes with the newest known prices."""
    return (
        await conn.execute(_NODES, {"cluster_id": cluster_id, "ended": ended, "after": after, "limit": limit})
    ).all()


async def current_costs(
    conn: AsyncConnection, *, cluster_id: UUID | None = None, customer_id: UUID | None = None
) -> Sequence[Row]:
    """Cost per hour of the live nodes, by cluster, at the newest known prices."""
    return (await conn.execute(_COST, {"cluster_id": cluster_id, "customer_id": customer_id})).all()


async def list_events(conn: AsyncConnection, cluster_id: UUID, before: UUID | None, limit: int) -> Sequence[Row]:
    """Events of a cluster, newest first (ids are ordered by time)."""
    table = SpotEventRecord
    query = (
        select(
            table.id,
            table.event_type,
            table.instance_id,
            table.received_at,
            table.occurred_at,
            table.source,
            table.interruption_id,
            table.action_taken,
            table.replacement_instance_id,
            table.payload,
        )
        .where(table.cluster_id == cluster_id)
        .order_by(table.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(table.id < before)
    return (await conn.execute(query)).all()


async def set_kill_switch(conn: AsyncConnection, cluster_id: UUID, engaged: bool) -> Row | None:
    """The cluster with its switch set."""
    return await update_cluster(conn, cluster_id, {"kill_switch": engaged})
