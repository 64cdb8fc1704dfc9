"""Registration of clusters and what is known of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from control.clusters import repository
from control.clusters.schemas import (
    ClusterAnswer,
    ClusterChange,
    ClusterCreate,
    CurrentCost,
    KillSwitch,
    NewClusterAnswer,
)
from control.context import AppContext
from control.errors import Conflict, NotFound
from control.security import audit
from control.security import repository as security_repository
from control.security.outbound import check_url, parse_networks
from control.security.principal import Principal, Role
from control.security.service import add_key
from control.settings import Settings
from warehouse.lake.errors import LakeError
from warehouse.postgres.models import new_id

if TYPE_CHECKING:
    from warehouse.lake.query import LakeReader

log = structlog.get_logger(__name__)


async def require_cluster(conn: AsyncConnection, cluster_id: UUID) -> Row:
    """A cluster the scope shows.

    Raises:
        NotFound: none, deleted, or of another customer.
    """
    cluster = await repository.get_cluster(conn, cluster_id)
    if cluster is None:
        raise NotFound("cluster")
    return cluster


async def list_clusters(
    context: AppContext, principal: Principal, customer_id: UUID | None, after: UUID | None, limit: int
) -> Sequence[Row]:
    """Clusters of the caller's customer, or of all."""
    if customer_id is not None:
        principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        return await repository.list_clusters(conn, customer_id, after, limit)


async def get_cluster(context: AppContext, principal: Principal, cluster_id: UUID) -> Row:
    """One cluster."""
    async with principal.scope(context.db) as conn:
        return await require_cluster(conn, cluster_id)


async def create_cluster(context: AppContext, principal: Principal, body: ClusterCreate) -> NewClusterAnswer:
    """Register a cluster and make its agent's key.

    Raises:
        NotFound: no such customer.
        Conflict: the name is taken.
        Invalid: the endpoint is not a public https address.
    """
    customer_id = principal.customer(body.customer_id)
    await _check_endpoint(context, body.k8s_api_endpoint)
    cluster_id = new_id()
    async with principal.scope(context.db) as conn:
        if not await security_repository.customer_exists(conn, customer_id):
            raise NotFound("customer")
        await _check_name(conn, customer_id, body.cluster_name, None)
        values: dict[str, Any] = {
            "id": cluster_id,
            "customer_id": customer_id,
            "cluster_name": body.cluster_name,
            "region": body.region,
            "k8s_api_endpoint": body.k8s_api_endpoint,
            "k8s_ca": body.k8s_ca,
        }
        if body.k8s_token is not None:
            values["k8s_token"] = await _encrypted(
                conn, context, customer_id, cluster_id, body.k8s_token.get_secret_value()
            )
        cluster = await repository.insert_cluster(conn, values)
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="cluster.created",
            subject=str(cluster_id),
            detail={"cluster_name": body.cluster_name, "region": body.region},
        )
        key = await add_key(
            conn,
            context,
            actor=principal.actor,
            name=f"agent of {body.cluster_name}",
            role=Role.AGENT,
            customer_id=customer_id,
            cluster_id=cluster_id,
        )
    return NewClusterAnswer(**ClusterAnswer.model_validate(cluster).model_dump(), agent_key=key.key)


async def change_cluster(context: AppContext, principal: Principal, cluster_id: UUID, body: ClusterChange) -> Row:
    """Change a cluster's name or how its Kubernetes API is reached."""
    await _check_endpoint(context, body.k8s_api_endpoint)
    changes: dict[str, Any] = body.model_dump(exclude_none=True, exclude={"k8s_token"})
    async with principal.scope(context.db) as conn:
        cluster = await require_cluster(conn, cluster_id)
        if body.cluster_name is not None:
            await _check_name(conn, cluster.customer_id, body.cluster_name, cluster_id)
        if body.k8s_token is not None:
            changes["k8s_token"] = await _encrypted(
                conn, context, cluster.customer_id, cluster_id, body.k8s_token.get_secret_value()
            )
        if not changes:
            return cluster
        changed = await repository.update_cluster(conn, cluster_id, changes)
        await audit.record(
            conn,
            customer_id=cluster.customer_id,
            actor=principal.actor,
            action="cluster.changed",
            subject=str(cluster_id),
            detail={"fields": sorted(changes)},
        )
    assert changed is not None
    return changed


async def delete_cluster(context: AppContext, principal: Principal, cluster_id: UUID) -> None:
    """Take a cluster out of service. Its instances are the customer's: nothing in AWS is touched."""
    async with principal.scope(context.db) as conn:
        cluster = await require_cluster(conn, cluster_id)
        await repository.delete_cluster(conn, cluster_id)
        await audit.record(
            conn,
            customer_id=cluster.customer_id,
            actor=principal.actor,
            action="cluster.deleted",
            subject=str(cluster_id),
            detail={"cluster_name": cluster.cluster_name},
        )
    context.authenticator.forget()


async def set_kill_switch(context: AppContext, principal: Principal, cluster_id: UUID, body: KillSwitch) -> Row:
    """Stop, or allow again, everything but interruption work in a cluster."""
    async with principal.scope(context.db) as conn:
        cluster = await require_cluster(conn, cluster_id)
        changed = await repository.set_kill_switch(conn, cluster_id, body.engaged)
        await audit.record(
            conn,
            customer_id=cluster.customer_id,
            actor=principal.actor,
            action="cluster.kill_switch",
            subject=str(cluster_id),
            detail={"engaged": body.engaged, "reason": body.reason},
        )
    await context.bells.ring("plans")
    assert changed is not None
    return changed


async def get_state(context: AppContext, principal: Principal, cluster_id: UUID) -> Row:
    """The newest state."""
    async with principal.scope(context.db) as conn:
        state = await repository.get_state(conn, cluster_id)
    if state is None:
        raise NotFound("cluster")
    return state


async def list_nodes(
    context: AppContext, principal: Principal, cluster_id: UUID, *, ended: bool, after: UUID | None, limit: int
) -> Sequence[Row]:
    """Nodes of a cluster."""
    async with principal.scope(context.db) as conn:
        await require_cluster(conn, cluster_id)
        return await repository.list_nodes(conn, cluster_id, ended=ended, after=after, limit=limit)


async def list_events(
    context: AppContext, principal: Principal, cluster_id: UUID, before: UUID | None, limit: int
) -> Sequence[Row]:
    """Events of a cluster."""
    async with principal.scope(context.db) as conn:
        await require_cluster(conn, cluster_id)
        return await repository.list_events(conn, cluster_id, before, limit)


def cost_now(row: Row) -> CurrentCost:
    """One row of current costs as an answer."""
    ratio = 1 - row.actual_usd_per_hour / row.on_demand_usd_per_hour if row.on_demand_usd_per_hour else None
    return CurrentCost(
        at=row.at,
        nodes=row.nodes,
        priced_nodes=row.priced_nodes,
        spot_nodes=row.spot_nodes,
        actual_usd_per_hour=row.actual_usd_per_hour,
        on_demand_usd_per_hour=row.on_demand_usd_per_hour,
        savings_ratio=ratio,
    )


async def get_cost(
    context: AppContext, principal: Principal, cluster_id: UUID, hours: int
) -> tuple[CurrentCost, list[dict[str, Any]], int | None]:
    """Cost now, by hour from the lake, and the release that was read (None while there is nothing to read)."""
    async with principal.scope(context.db) as conn:
        cluster = await require_cluster(conn, cluster_id)
        (row,) = await repository.current_costs(conn, cluster_id=cluster_id)
    since = datetime.now(UTC) - timedelta(hours=hours)
    try:
        rows, release = await asyncio.to_thread(_lake_hours, context.settings, cluster.customer_id, cluster_id, since)
    except (LakeError, OSError) as error:
        log.info("cost.no_lake", error=type(error).__name__)
        rows, release = [], None
    return cost_now(row), rows, release


_reader: LakeReader | None = None
_reader_guard = threading.Lock()


def lake_reader(settings: Settings) -> LakeReader:
    """The process's reader; opening one costs hundreds of milliseconds, and its libraries 100 MB: only a process that
    is asked about history pays."""
    from warehouse.lake.query import LakeReader, Limits

    global _reader
    with _reader_guard:
        if _reader is None or _reader.lake.storage.root != settings.lake_root:
            _reader = LakeReader(
                (settings.lake_root, settings.database_url),
                Limits(memory="256MB", threads=1, statement_seconds=20.0),
            )
        return _reader


def _lake_hours(
    settings: Settings, customer_id: UUID, cluster_id: UUID, since: datetime
) -> tuple[list[dict[str, Any]], int]:
    page = lake_reader(settings).pin()
    table = page.query(
        """SELECT ts, actual_usd, spot_usd, on_demand_usd, b1_list_usd, coverage_ratio, complete
           FROM cluster_cost_hourly
           WHERE cluster_id = $cluster_id AND day >= $day AND ts >= $since ORDER BY ts""",
        {"customer_id": str(customer_id), "cluster_id": str(cluster_id), "day": since.date(), "since": since},
    )
    return table.to_pylist(), page.release.id


async def _check_endpoint(context: AppContext, url: str | None) -> None:
    if url is not None:
        await check_url(url, field="k8s_api_endpoint", allow=parse_networks(context.settings.outbound_allow))


async def _check_name(conn: AsyncConnection, customer_id: UUID, name: str, other_than: UUID | None) -> None:
    if await repository.name_taken(conn, customer_id, name, other_than):
        raise Conflict("cluster_name: this customer has a cluster of that name already; choose another.")


async def _encrypted(
    conn: AsyncConnection, context: AppContext, customer_id: UUID, cluster_id: UUID, token: str
) -> bytes:
    data_key = await repository.data_key_of(conn, customer_id)
    if data_key is None:
        await repository.set_data_key(conn, customer_id, context.codec.new_data_key(customer_id))
        data_key = await repository.data_key_of(conn, customer_id)
        assert data_key is not None
    return context.codec.encrypt(
        token, data_key=bytes(data_key), customer_id=customer_id, table="clusters", column="k8s_token", row=cluster_id
    )
