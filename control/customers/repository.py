"""SQL of customers and their configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from warehouse.postgres.models import Customer, CustomerConfig, IntakeHealth

_COLUMNS = (
    Customer.id,
    Customer.company_name,
    Customer.email,
    Customer.aws_role_arn,
    Customer.aws_account_id,
    Customer.sqs_queue_url,
    Customer.external_id,
    Customer.status,
    Customer.kill_switch,
    Customer.created_at,
)


async def list_customers(conn: AsyncConnection, after: UUID | None, limit: int) -> Sequence[Row]:
    """Customers that are not off-boarded, in order of creation."""
    query = select(*_COLUMNS).where(Customer.status != "offboarded").order_by(Customer.id).limit(limit)
    if after is not None:
        query = query.where(Customer.id > after)
    return (await conn.execute(query)).all()


async def get_customer(conn: AsyncConnection, customer_id: UUID) -> Row | None:
    """One customer that is not off-boarded."""
    query = select(*_COLUMNS).where(Customer.id == customer_id, Customer.status != "offboarded")
    return (await conn.execute(query)).one_or_none()


async def intake_of(conn: AsyncConnection, customer_id: UUID) -> Sequence[Row]:
    """Health of the customer's event intake, by detector."""
    query = select(IntakeHealth.__table__).where(IntakeHealth.customer_id == customer_id).order_by("detector")
    return (await conn.execute(query)).all()


async def account_taken(conn: AsyncConnection, account_id: str, other_than: UUID | None) -> bool:
    """Whether another customer has this AWS account. Needs the system scope to see them."""
    query = select(Customer.id).where(Customer.aws_account_id == account_id)
    if other_than is not None:
        query = query.where(Customer.id != other_than)
    return (await conn.execute(query)).first() is not None


async def insert_customer(conn: AsyncConnection, values: dict[str, Any]) -> Row:
    """A new customer."""
    return (await conn.execute(insert(Customer).values(**values).returning(*_COLUMNS))).one()


async def update_customer(conn: AsyncConnection, customer_id: UUID, values: dict[str, Any]) -> Row | None:
    """The changed customer."""
    query = update(Customer).where(Customer.id == customer_id).values(**values).returning(*_COLUMNS)
    return (await conn.execute(query)).one_or_none()


async def begin_offboarding(conn: AsyncConnection, customer_id: UUID) -> None:
    """Destroy the customer's secrets, keys and sign-ins at once, and begin nothing more. History and audit stay.

    The role stays until what is in flight has ended (``leaving_repository.give_up_role``).
    """
    values = {"id": customer_id}
    for statement in (
        "UPDATE customers SET status = 'offboarding', data_key = NULL WHERE id = :id",
        """UPDATE clusters SET status = 'deleted', k8s_token = NULL, k8s_ca = NULL, k8s_api_endpoint = NULL
           WHERE customer_id = :id""",
        "DELETE FROM customer_config WHERE customer_id = :id",
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE customer_id = :id",
        "UPDATE user_sessions SET revoked_at = coalesce(revoked_at, now()) WHERE customer_id = :id",
        "UPDATE users SET disabled_at = coalesce(disabled_at, now()) WHERE customer_id = :id",
        """UPDATE agent_tasks SET state = 'superseded', finished_at = now()
           WHERE customer_id = :id AND state IN ('queued', 'leased')""",
        """UPDATE launch_intents SET state = 'cancelled', reason = 'customer off-boarded', version = version + 1
           WHERE customer_id = :id AND state = 'planned'""",
    ):
        await conn.execute(text(statement), values)


_ADOPT_ONLY = text("""
    SELECT m.adopt_only_since AS since, m.adopt_only_reason AS reason,
           ARRAY(SELECT a.instance_id FROM adopted_instances a
                 WHERE a.customer_id = m.id AND a.reason = 'restored' AND a.ended_at IS NULL ORDER BY 1) AS instances
    FROM customers m WHERE m.id = :id AND m.adopt_only_since IS NOT NULL
""")
_LIFT_ADOPT_ONLY = text("""
    UPDATE customers SET adopt_only_since = NULL, adopt_only_reason = NULL
    WHERE id = :id AND adopt_only_since IS NOT NULL
""")
_ADOPT_ONLY_CUSTOMERS = text("""
    SELECT m.id, m.company_name, m.adopt_only_since, m.adopt_only_reason,
           ARRAY(SELECT a.instance_id FROM adopted_instances a
                 WHERE a.customer_id = m.id AND a.reason = 'restored' AND a.ended_at IS NULL ORDER BY 1) AS instances
    FROM customers m WHERE m.adopt_only_since IS NOT NULL AND m.status <> 'offboarded' ORDER BY m.id
""")


async def adopt_only_of(conn: AsyncConnection, customer_id: UUID) -> Row | None:
    """Since when and why nothing of the customer is terminated, with the instances that were adopted."""
    return (await conn.execute(_ADOPT_ONLY, {"id": customer_id})).one_or_none()


async def lift_adopt_only(conn: AsyncConnection, customer_id: UUID) -> bool:
    """Allow terminations again; False when they were allowed."""
    return (await conn.execute(_LIFT_ADOPT_ONLY, {"id": customer_id})).rowcount > 0


async def adopt_only_customers(conn: AsyncConnection) -> Sequence[Row]:
    """All customers of whom nothing is terminated."""
    return (await conn.execute(_ADOPT_ONLY_CUSTOMERS)).all()


async def list_config(conn: AsyncConnection, customer_id: UUID) -> dict[str, Row]:
    """Configured values by key."""
    query = select(CustomerConfig.config_key, CustomerConfig.config_value, CustomerConfig.updated_at).where(
        CustomerConfig.customer_id == customer_id
    )
    return {row.config_key: row for row in await conn.execute(query)}


async def put_config(conn: AsyncConnection, customer_id: UUID, key: str, value: Any) -> Row:
    """Set a value."""
    query = pg_insert(CustomerConfig).values(customer_id=customer_id, config_key=key, config_value=value)
    changed = query.on_conflict_do_update(
        index_elements=["customer_id", "config_key"],
        set_={"config_value": query.excluded.config_value, "updated_at": func.now()},
    )
    table = CustomerConfig
    return (await conn.execute(changed.returning(table.config_key, table.config_value, table.updated_at))).one()


async def delete_config(conn: AsyncConnection, customer_id: UUID, key: str) -> bool:
    """Whether there was a value."""
    query = delete(CustomerConfig).where(CustomerConfig.customer_id == customer_id, CustomerConfig.config_key == key)
    return (await conn.execute(query)).rowcount == 1
