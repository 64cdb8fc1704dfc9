"""What dashboards are told without asking."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from control.clusters import repository as clusters
from control.clusters.service import cost_now
from control.context import AppContext
from control.security.principal import Principal
from control.streams import repository
from control.streams.schemas import ClusterCost, CostMessage, EventsMessage
from warehouse.postgres.models import new_id


def scope_of(principal: Principal, asked: UUID | None) -> UUID | None:
    """The customer a subscription is about; None is all of them, for platform admins only."""
    if principal.sees_everything and asked is None:
        return None
    return principal.customer(asked)


def now_id() -> UUID:
    """An id that every later event's is greater than."""
    return new_id()


async def costs(context: AppContext, principal: Principal, customer_id: UUID | None) -> CostMessage:
    """Cost of every cluster of the scope."""
    async with principal.scope(context.db) as conn:
        rows = await clusters.current_costs(conn, customer_id=customer_id)
    return CostMessage(
        at=datetime.now(UTC),
        clusters=[
            ClusterCost(
                **cost_now(row).model_dump(),
                cluster_id=row.cluster_id,
                customer_id=row.customer_id,
                cluster_name=row.cluster_name,
                status=row.status,
            )
            for row in rows
        ],
    )


async def events(
    context: AppContext, principal: Principal, customer_id: UUID | None, after: UUID
) -> tuple[EventsMessage | None, UUID]:
    """Events after the one named, and the newest one's id."""
    async with principal.scope(context.db) as conn:
        rows = await repository.events_after(conn, after, customer_id)
    if not rows:
        return None, after
    return EventsMessage(events=[dict(row._mapping) for row in rows]), rows[-1].id
