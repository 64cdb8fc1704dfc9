"""Dependencies that endpoints use to say who may call them.

    @router.get("/clusters")
    async def list_clusters(principal: Annotated[Principal, Depends(require(*READERS))]) -> ...:

Each route says its roles once; the matrix test of roles and routes reads them from here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import HTTPConnection

from control.context import Context
from control.errors import Forbidden
from control.security.limits import parse_limit
from control.security.principal import Principal, Role

ADMINS = (Role.PLATFORM_ADMIN,)
CUSTOMER_ADMINS = (Role.PLATFORM_ADMIN, Role.CUSTOMER_ADMIN)
READERS = (Role.PLATFORM_ADMIN, Role.CUSTOMER_ADMIN, Role.ANALYST)
AGENTS = (Role.AGENT,)
PUSHERS = (*CUSTOMER_ADMINS, Role.EVENT_PUSHER)
EVERYONE = tuple(Role)


def require(*roles: Role, intake: bool = False) -> Callable[..., Awaitable[Principal]]:
    """A dependency that answers 401 to strangers, 403 to other roles and 429 over the limits, else the principal.

    ``intake``: this is how interruptions come in, so the caller is looked up on the connections reserved for them.
    """

    async def dependency(connection: HTTPConnection, context: Context) -> Principal:
        db = context.intake_db if intake else None
        principal = await context.authenticator.authenticate(connection, db)
        await check_limits(context, principal)
        check_role(principal, roles)
        connection.scope["principal"] = principal
        return principal

    dependency.roles = frozenset(roles)  # type: ignore[attr-defined]
    return dependency


def check_role(principal: Principal, roles: tuple[Role, ...]) -> None:
    """Refuse other roles.

    Raises:
        Forbidden: names the roles that may.
    """
    if principal.role not in roles:
        raise Forbidden(
            f"The role {principal.role} may not do this; it takes one of: {', '.join(sorted(roles))}.",
        )


async def check_limits(context: Context, principal: Principal) -> None:
    """Count one request of a key or person, and of its customer.

    Raises:
        TooMany: one of the two limits is reached.
    """
    settings = context.settings
    per_key, per_customer = parse_limit(settings.rate_limit_per_key), parse_limit(settings.rate_limit_per_customer)
    await context.limiter.hit(per_key, "caller", str(principal.id), what="one key or person")
    if principal.customer_id is not None:
        await context.limiter.hit(per_customer, "customer", str(principal.customer_id), what="one customer")
