"""Sign-in, people and keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from control.context import AppContext
from control.errors import Conflict, Forbidden, Invalid, NotFound, Unauthenticated
from control.security import audit, keys, repository
from control.security.limits import FAILURES
from control.security.passwords import hash_password, verify_password
from control.security.principal import PLATFORM_ROLES, Principal, Role
from control.security.schemas import ApiKeyCreate, NewApiKeyAnswer, TokenAnswer, UserChange, UserCreate
from control.security.tokens import ACCESS_LIFETIME, REFRESH_LIFETIME
from warehouse.postgres.models import new_id

# What a role may hand out: never more than it has.
GRANTABLE: dict[Role, frozenset[Role]] = {
    Role.PLATFORM_ADMIN: frozenset(Role),
    Role.CUSTOMER_ADMIN: frozenset({Role.CUSTOMER_ADMIN, Role.ANALYST, Role.AGENT, Role.EVENT_PUSHER}),
}


async def ensure_admin_key(context: AppContext) -> None:
    """Make the operator's first key (CLOUDOPTIM_ADMIN_API_KEY) known, so that the first request can be made."""
    if key := context.settings.admin_api_key.get_secret_value():
        derived = keys.derive(context.pepper, key)
        async with context.db.system() as conn:
            await repository.upsert_admin_key(conn, derived.prefix, derived.secret_hmac)


async def sign_in(context: AppContext, *, email: str, password: str, address: str) -> TokenAnswer:
    """Tokens for a person.

    Raises:
        Unauthenticated: unknown address or wrong password; the two look and take the same.
        TooMany: ten wrong ones in a minute for this e-mail address or from this network address.
    """
    await context.limiter.refuse_when_reached(FAILURES, "failures", address, what="failed sign-ins of your address")
    await context.limiter.refuse_when_reached(FAILURES, "email", email, what="failed sign-ins for this e-mail address")
    async with context.db.system() as conn:
        user = await repository.find_user_by_email(conn, email)
    if not await verify_password(user.password_hash if user else None, password) or user is None:
        await context.limiter.count(FAILURES, "failures", address)
        await context.limiter.count(FAILURES, "email", email)
        async with context.db.system() as conn:
            await audit.record(
                conn,
                customer_id=user.customer_id if user else None,
                actor=f"user:{email}",
                action="login.failed",
                subject=email,
                detail={"address": address},
            )
        raise Unauthenticated("The e-mail address or the password is wrong.")
    session_id, token_id = new_id(), uuid4()
    async with context.db.system() as conn:
        await repository.insert_session(
            conn,
            {
                "id": session_id,
                "customer_id": user.customer_id,
                "user_id": user.id,
                "refresh_token_id": token_id,
                "expires_at": datetime.now(UTC) + REFRESH_LIFETIME,
            },
        )
        await audit.record(
            conn,
            customer_id=user.customer_id,
            actor=f"user:{email}",
            action="login.succeeded",
            subject=email,
            detail={"address": address, "session_id": session_id},
        )
    return _tokens(context, user, session_id, token_id)


def _tokens(context: AppContext, user: Row, session_id: UUID, token_id: UUID) -> TokenAnswer:
    return TokenAnswer(
        access_token=context.tokens.access(user.id, session_id),
        refresh_token=context.tokens.refresh(user.id, session_id, token_id),
        expires_in=int(ACCESS_LIFETIME / timedelta(seconds=1)),
        email=user.email,
        role=user.role,
        customer_id=user.customer_id,
    )


async def refresh(context: AppContext, token: str) -> TokenAnswer:
    """New tokens for a refresh token, which works once; a second use ends the whole session (it was stolen).

    Raises:
        Unauthenticated: unknown, used, expired, or of a person who may no longer sign in.
    """
    refused = Unauthenticated("The refresh token is unknown, expired or was used before; sign in again.")
    claims = context.tokens.read_refresh(token)
    if claims is None:
        raise refused
    token_id = uuid4()
    async with context.db.system() as conn:
        user = await repository.find_session(conn, claims.user_id, claims.session_id)
        rotated = user is not None and await repository.rotate_session(
            conn,
            claims.session_id,
            claims.user_id,
            claims.token_id,
            token_id,
            datetime.now(UTC) + REFRESH_LIFETIME,
        )
        if user is not None and not rotated:
            await repository.revoke_session(conn, claims.session_id)
            await audit.record(
                conn,
                customer_id=user.customer_id,
                actor=f"user:{user.email}",
                action="session.reused_refresh_token",
                subject=str(claims.session_id),
            )
    if not rotated or user is None:
        context.authenticator.forget()
        raise refused
    return _tokens(context, user, claims.session_id, token_id)


async def sign_out(context: AppContext, token: str) -> None:
    """End the session of a refresh token. An unknown one is ended already."""
    claims = context.tokens.read_refresh(token)
    if claims is None:
        return
    async with context.db.system() as conn:
        user = await repository.find_session(conn, claims.user_id, claims.session_id)
        if user is not None:
            await repository.revoke_session(conn, claims.session_id)
            await audit.record(
                conn,
                customer_id=user.customer_id,
                actor=f"user:{user.email}",
                action="logout",
                subject=str(claims.session_id),
            )
    context.authenticator.forget()


def _check_grant(principal: Principal, role: Role) -> None:
    if role not in GRANTABLE.get(principal.role, frozenset()):
        raise Forbidden(f"role: {principal.role} may not hand out the role {role}.")


async def _owner(conn: AsyncConnection, principal: Principal, role: Role, asked: UUID | None) -> UUID | None:
    """The customer a new user or key belongs to."""
    if role == Role.PLATFORM_ADMIN:
        if asked is not None:
            raise Invalid("customer_id: a platform_admin belongs to no customer; leave it out.")
        return None
    if asked is None and principal.sees_everything:
        if role in PLATFORM_ROLES:
            return None
        raise Invalid(f"customer_id: the role {role} belongs to a customer; say which.")
    customer_id = principal.customer(asked)
    if not await repository.customer_exists(conn, customer_id):
        raise NotFound("customer")
    return customer_id


async def list_users(
    context: AppContext, principal: Principal, customer_id: UUID | None, after: UUID | None, limit: int
) -> Sequence[Row]:
    """People of the caller's customer, or of all."""
    if customer_id is not None:
        principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        return await repository.list_users(conn, customer_id, after, limit)


async def get_user(context: AppContext, principal: Principal, user_id: UUID) -> Row:
    """One person.

    Raises:
        NotFound: none, or of another customer.
    """
    async with principal.scope(context.db) as conn:
        user = await repository.get_user(conn, user_id)
    if user is None:
        raise NotFound("user")
    return user


async def create_user(context: AppContext, principal: Principal, body: UserCreate) -> Row:
    """A new person.

    Raises:
        Forbidden: the caller may not hand out that role.
        Conflict: the address is taken.
    """
    _check_grant(principal, body.role)
    password_hash = await hash_password(body.password.get_secret_value())
    async with principal.scope(context.db) as conn:
        customer_id = await _owner(conn, principal, body.role, body.customer_id)
        user = await repository.insert_user(
            conn,
            {"customer_id": customer_id, "email": body.email, "password_hash": password_hash, "role": body.role.value},
        )
        if user is None:
            raise Conflict("email: there is a user with this address already; use another address.")
        await audit.record(
            conn,
            customer_id=customer_id,
            actor=principal.actor,
            action="user.created",
            subject=str(user.id),
            detail={"email": body.email, "role": body.role},
        )
    return user


async def change_user(context: AppContext, principal: Principal, user_id: UUID, body: UserChange) -> Row:
    """Change a person and end their sign-ins.

    Raises:
        NotFound: none, or of another customer.
        Forbidden: the caller may not hand out that role, or the person has a role above the caller's.
    """
    changes: dict[str, object] = {}
    if body.password is not None:
        changes["password_hash"] = await hash_password(body.password.get_secret_value())
    if body.role is not None:
        _check_grant(principal, body.role)
        changes["role"] = body.role.value
    if body.disabled is not None:
        changes["disabled_at"] = datetime.now(UTC) if body.disabled else None
    async with principal.scope(context.db) as conn:
        user = await repository.get_user(conn, user_id)
        if user is None:
            raise NotFound("user")
        _check_grant(principal, Role(user.role))
        if body.role is not None and (body.role == Role.PLATFORM_ADMIN) != (user.customer_id is None):
            raise Invalid("role: a person moves between the platform and a customer by a new account only.")
        if not changes:
            return user
        changed = await repository.update_user(conn, user_id, changes)
        await repository.revoke_sessions_of(conn, user_id)
        await audit.record(
            conn,
            customer_id=user.customer_id,
            actor=principal.actor,
            action="user.changed",
            subject=str(user_id),
            detail={"fields": sorted(changes)},
        )
    context.authenticator.forget()
    assert changed is not None
    return changed


async def delete_user(context: AppContext, principal: Principal, user_id: UUID) -> None:
    """Remove a person.

    Raises:
        NotFound: none, or of another customer.
    """
    async with principal.scope(context.db) as conn:
        user = await repository.get_user(conn, user_id)
        if user is None:
            raise NotFound("user")
        _check_grant(principal, Role(user.role))
        await repository.delete_user(conn, user_id)
        await audit.record(
            conn,
            customer_id=user.customer_id,
            actor=principal.actor,
            action="user.deleted",
            subject=str(user_id),
            detail={"email": user.email},
        )
    context.authenticator.forget()


async def add_key(
    conn: AsyncConnection,
    context: AppContext,
    *,
    actor: str,
    name: str,
    role: Role,
    customer_id: UUID | None,
    cluster_id: UUID | None = None,
    expires_at: datetime | None = None,
) -> NewApiKeyAnswer:
    """Make and store a key within a transaction; the answer is the only place its secret is in."""
    new = keys.generate(context.pepper)
    row = await repository.insert_key(
        conn,
        {
            "customer_id": customer_id,
            "cluster_id": cluster_id,
            "name": name,
            "role": role.value,
            "prefix": new.prefix,
            "secret_hmac": new.secret_hmac,
            "expires_at": expires_at,
        },
    )
    await audit.record(
        conn,
        customer_id=customer_id,
        actor=actor,
        action="api_key.created",
        subject=new.prefix,
        detail={"name": name, "role": role, "cluster_id": cluster_id},
    )
    return NewApiKeyAnswer(**row._mapping, key=new.key)


async def create_key(context: AppContext, principal: Principal, body: ApiKeyCreate) -> NewApiKeyAnswer:
    """A new key.

    Raises:
        Forbidden: the caller may not hand out that role.
        Invalid: an agent's key without a cluster, or a cluster for another role.
        NotFound: the customer or cluster is unknown or another's.
    """
    _check_grant(principal, body.role)
    if (body.role == Role.AGENT) != (body.cluster_id is not None):
        raise Invalid("cluster_id: the role agent takes a cluster_id, and no other role does.")
    if body.expires_at is not None and body.expires_at <= datetime.now(UTC):
        raise Invalid("expires_at: lies in the past; give a later time or leave it out.")
    async with principal.scope(context.db) as conn:
        if body.cluster_id is not None:
            cluster = await repository.cluster_of(conn, body.cluster_id)
            if cluster is None or body.customer_id not in (None, cluster.customer_id):
                raise NotFound("cluster")
            customer_id = cluster.customer_id
        else:
            customer_id = await _owner(conn, principal, body.role, body.customer_id)
        return await add_key(
            conn,
            context,
            actor=principal.actor,
            name=body.name,
            role=body.role,
            customer_id=customer_id,
            cluster_id=body.cluster_id,
            expires_at=body.expires_at,
        )


async def list_keys(
    context: AppContext, principal: Principal, customer_id: UUID | None, after: UUID | None, limit: int
) -> Sequence[Row]:
    """Keys of the caller's customer, or of all."""
    if customer_id is not None:
        principal.customer(customer_id)
    async with principal.scope(context.db) as conn:
        return await repository.list_keys(conn, customer_id, after, limit)


async def get_key(context: AppContext, principal: Principal, key_id: UUID) -> Row:
    """One key.

    Raises:
        NotFound: none, or of another customer.
    """
    async with principal.scope(context.db) as conn:
        key = await repository.get_key(conn, key_id)
    if key is None:
        raise NotFound("API key")
    return key


async def revoke_key(context: AppContext, principal: Principal, key_id: UUID) -> None:
    """End a key; it opens nothing within five seconds, in every process.

    Raises:
        NotFound: none, or of another customer.
    """
    async with principal.scope(context.db) as conn:
        key = await repository.revoke_key(conn, key_id)
        if key is None:
            raise NotFound("API key")
        await audit.record(
            conn,
            customer_id=key.customer_id,
            actor=principal.actor,
            action="api_key.revoked",
            subject=key.prefix,
        )
    context.authenticator.forget()
