"""SQL of people, sessions and keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from warehouse.postgres.models import ApiKey, Cluster, Customer, User, UserSession

_LIVE_CUSTOMER = Customer.status.not_in(("suspended", "offboarding", "offboarded"))

_USER_COLUMNS = (User.id, User.customer_id, User.email, User.role, User.disabled_at, User.created_at)
_KEY_COLUMNS = (
    ApiKey.id,
    ApiKey.customer_id,
    ApiKey.cluster_id,
    ApiKey.name,
    ApiKey.role,
    ApiKey.prefix,
    ApiKey.last_used_at,
    ApiKey.expires_at,
    ApiKey.revoked_at,
    ApiKey.created_at,
)


async def find_key(conn: AsyncConnection, prefix: str) -> Row | None:
    """A key that may be used now, with its hash. Notes the use at most once a minute."""
    query = (
        select(ApiKey.id, ApiKey.role, ApiKey.customer_id, ApiKey.cluster_id, ApiKey.secret_hmac, ApiKey.last_used_at)
        .outerjoin(Customer, Customer.id == ApiKey.customer_id)
        .outerjoin(Cluster, Cluster.id == ApiKey.cluster_id)
        .where(
            ApiKey.prefix == prefix,
            ApiKey.revoked_at.is_(None),
            (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.now()),
            (ApiKey.customer_id.is_(None)) | _LIVE_CUSTOMER,
            (ApiKey.cluster_id.is_(None)) | (Cluster.status != "deleted"),
        )
    )
    row = (await conn.execute(query)).one_or_none()
    if row is not None:
        await conn.execute(
            text("""UPDATE api_keys SET last_used_at = now()
                    WHERE id = :id AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')"""),
            {"id": row.id},
        )
    return row


async def find_session(conn: AsyncConnection, user_id: UUID, session_id: UUID) -> Row | None:
    """The user of a live session, with the role of this moment."""
    query = (
        select(User.id, User.email, User.role, User.customer_id)
        .join(UserSession, UserSession.user_id == User.id)
        .outerjoin(Customer, Customer.id == User.customer_id)
        .where(
            User.id == user_id,
            UserSession.id == session_id,
            UserSession.revoked_at.is_(None),
            UserSession.expires_at > func.now(),
            User.disabled_at.is_(None),
            (User.customer_id.is_(None)) | _LIVE_CUSTOMER,
        )
    )
    return (await conn.execute(query)).one_or_none()


async def find_user_by_email(conn: AsyncConnection, email: str) -> Row | None:
    """A user who may sign in, with the password's hash."""
    query = (
        select(*_USER_COLUMNS, User.password_hash)
        .outerjoin(Customer, Customer.id == User.customer_id)
        .where(
            User.email == email,
            User.disabled_at.is_(None),
            (User.customer_id.is_(None)) | _LIVE_CUSTOMER,
        )
    )
    return (await conn.execute(query)).one_or_none()


async def insert_session(conn: AsyncConnection, values: dict[str, Any]) -> None:
    """A new sign-in. Ended ones older than a month go."""
    await conn.execute(text("DELETE FROM user_sessions WHERE expires_at < now() - interval '30 days'"))
    await conn.execute(insert(UserSession).values(**values))


async def rotate_session(
    conn: AsyncConnection, session_id: UUID, user_id: UUID, used: UUID, new: UUID, expires_at: datetime
) -> bool:
    """Exchange the refresh token; False when ``used`` is not the one the session expects."""
    result = await conn.execute(
        update(UserSession)
        .where(
            UserSession.id == session_id,
            UserSession.user_id == user_id,
            UserSession.refresh_token_id == used,
            UserSession.revoked_at.is_(None),
            UserSession.expires_at > func.now(),
        )
        .values(refresh_token_id=new, expires_at=expires_at)
    )
    return result.rowcount == 1


async def revoke_session(conn: AsyncConnection, session_id: UUID) -> None:
    """End a sign-in."""
    await conn.execute(
        update(UserSession)
        .where(UserSession.id == session_id, UserSession.revoked_at.is_(None))
        .values(revoked_at=func.now())
    )


async def revoke_sessions_of(conn: AsyncConnection, user_id: UUID) -> None:
    """End all sign-ins of a person."""
    await conn.execute(
        update(UserSession)
        .where(UserSession.user_id == user_id, UserSession.revoked_at.is_(None))
        .values(revoked_at=func.now())
    )


async def list_users(conn: AsyncConnection, customer_id: UUID | None, after: UUID | None, limit: int) -> Sequence[Row]:
    """Users in order of creation; all that the scope shows when ``customer_id`` is None."""
    query = select(*_USER_COLUMNS).order_by(User.id).limit(limit)
    if customer_id is not None:
        query = query.where(User.customer_id == customer_id)
    if after is not None:
        query = query.where(User.id > after)
    return (await conn.execute(query)).all()


async def get_user(conn: AsyncConnection, user_id: UUID) -> Row | None:
    """One user."""
    return (await conn.execute(select(*_USER_COLUMNS).where(User.id == user_id))).one_or_none()


async def insert_user(conn: AsyncConnection, values: dict[str, Any]) -> Row | None:
    """A new user, or None when the address is taken."""
    query = pg_insert(User).values(**values).on_conflict_do_nothing(index_elements=["email"]).returning(*_USER_COLUMNS)
    return (await conn.execute(query)).one_or_none()


async def update_user(conn: AsyncConnection, user_id: UUID, values: dict[str, Any]) -> Row | None:
    """The changed user, or None when there is none."""
    query = update(User).where(User.id == user_id).values(**values).returning(*_USER_COLUMNS)
    return (await conn.execute(query)).one_or_none()


async def delete_user(conn: AsyncConnection, user_id: UUID) -> bool:
    """Whether there was such a user."""
    return (await conn.execute(delete(User).where(User.id == user_id))).rowcount == 1


async def insert_key(conn: AsyncConnection, values: dict[str, Any]) -> Row:
    """A new key."""
    return (await conn.execute(insert(ApiKey).values(**values).returning(*_KEY_COLUMNS))).one()


async def upsert_admin_key(conn: AsyncConnection, prefix: str, secret_hmac: bytes) -> None:
    """The operator's first key, whatever happened to it before."""
    query = pg_insert(ApiKey).values(
        name="first admin key", role="platform_admin", prefix=prefix, secret_hmac=secret_hmac
    )
    await conn.execute(
        query.on_conflict_do_update(
            index_elements=["prefix"], set_={"secret_hmac": secret_hmac, "revoked_at": None, "role": "platform_admin"}
        )
    )


async def list_keys(conn: AsyncConnection, customer_id: UUID | None, after: UUID | None, limit: int) -> Sequence[Row]:
    """Keys in order of creation, without secrets."""
    query = select(*_KEY_COLUMNS).order_by(ApiKey.id).limit(limit)
    if customer_id is not None:
        query = query.where(ApiKey.customer_id == customer_id)
    if after is not None:
        query = query.where(ApiKey.id > after)
    return (await conn.execute(query)).all()


async def get_key(conn: AsyncConnection, key_id: UUID) -> Row | None:
    """One key, without its secret."""
    return (await conn.execute(select(*_KEY_COLUMNS).where(ApiKey.id == key_id))).one_or_none()


async def revoke_key(conn: AsyncConnection, key_id: UUID) -> Row | None:
    """The revoked key, or None when there is none."""
    query = (
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(*_KEY_COLUMNS)
    )
    return (await conn.execute(query)).one_or_none()


async def customer_exists(conn: AsyncConnection, customer_id: UUID) -> bool:
    """Whether the scope shows this customer, not off-boarded."""
    query = select(Customer.id).where(Customer.id == customer_id, Customer.status != "offboarded")
    return (await conn.execute(query)).one_or_none() is not None


async def cluster_of(conn: AsyncConnection, cluster_id: UUID) -> Row | None:
    """(id, customer_id) of a cluster that the scope shows and that is not deleted."""
    query = select(Cluster.id, Cluster.customer_id).where(Cluster.id == cluster_id, Cluster.status != "deleted")
    return (await conn.execute(query)).one_or_none()
