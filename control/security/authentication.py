"""From a request's header to a principal.

Answers are kept for three seconds: a revoked key or session, a disabled user and a suspended customer are shut out
within five seconds, open sockets included (they ask again, see ``still_valid``).
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from starlette.requests import HTTPConnection

from control.errors import Unauthenticated
from control.security import keys, repository
from control.security.limits import FAILURES, Limiter
from control.security.outbound import Network
from control.security.principal import Principal, Role
from control.security.tokens import Tokens
from warehouse.postgres.session import Database

CACHE_SECONDS = 3.0
CACHE_ENTRIES = 20_000


@dataclass(slots=True)
class _Known:
    at: float
    secret_hmac: bytes | None
    principal: Principal | None


class Authenticator:
    """Checks API keys and access tokens against the database, with a short memory."""

    def __init__(
        self, db: Database, tokens: Tokens, pepper: bytes, limiter: Limiter, trusted_proxies: Sequence[Network] = ()
    ) -> None:
        self._db = db
        self._tokens = tokens
        self._pepper = pepper
        self._limiter = limiter
        self._trusted = trusted_proxies
        self._keys: dict[str, _Known] = {}
        self._sessions: dict[tuple[UUID, UUID], _Known] = {}

    async def authenticate(self, connection: HTTPConnection, db: Database | None = None) -> Principal:
        """The caller of a request; looked up on connections of ``db`` where they are not the usual ones.

        Raises:
            Unauthenticated: no, malformed, unknown, revoked or expired credentials.
            TooMany: ten wrong ones from one address within a minute.
        """
        credential = credential_of(connection)
        if credential is None:
            raise Unauthenticated()
        return await self.check(credential, self.address(connection), db)

    async def check(self, credential: str, address: str, db: Database | None = None) -> Principal:
        """The principal of a key or token presented from an address."""
        principal = await self._principal(credential, db or self._db)
        if principal is None:
            await self._limiter.hit(FAILURES, "failures", address, what="failed authentications of your address")
            raise Unauthenticated("The key or token is unknown, expired or revoked.")
        return principal

    async def _principal(self, credential: str, db: Database) -> Principal | None:
        if credential.count(".") == 2:
            claims = self._tokens.read_access(credential)
            if claims is None:
                return None
            return await self._session(db, claims.user_id, claims.session_id)
        parts = keys.split(self._pepper, credential)
        if parts is None:
            return None
        prefix, secret = parts
        known = self._keys.get(prefix)
        if known is None or time.monotonic() - known.at > CACHE_SECONDS:
            known = await self._load_key(db, prefix)
        if not keys.matches(self._pepper, prefix, secret, known.secret_hmac):
            return None
        return known.principal

    async def _load_key(self, db: Database, prefix: str) -> _Known:
        async with db.system() as conn:
            row = await repository.find_key(conn, prefix)
        known = _Known(time.monotonic(), None, None)
        if row is not None:
            principal = Principal(row.id, f"key:{prefix}", Role(row.role), row.customer_id, row.cluster_id)
            known = _Known(known.at, bytes(row.secret_hmac), principal)
            # Unknown prefixes are not remembered: they could be made up without end.
            _remember(self._keys, prefix, known)
        else:
            self._keys.pop(prefix, None)
        return known

    async def _session(self, db: Database, user_id: UUID, session_id: UUID) -> Principal | None:
        known = self._sessions.get((user_id, session_id))
        if known is None or time.monotonic() - known.at > CACHE_SECONDS:
            async with db.system() as conn:
                row = await repository.find_session(conn, user_id, session_id)
            principal = Principal(row.id, f"user:{row.email}", Role(row.role), row.customer_id) if row else None
            known = _Known(time.monotonic(), None, principal)
            _remember(self._sessions, (user_id, session_id), known)
        return known.principal

    def forget(self) -> None:
        """Drop everything remembered, after a change made by this process."""
        self._keys.clear()
        self._sessions.clear()

    def address(self, connection: HTTPConnection) -> str:
        """The caller's address: the peer's, or what the last trusted proxy says it forwarded for."""
        peer = connection.client.host if connection.client else "unknown"
        if not self._is_trusted(peer):
            return peer
        forwarded = [part.strip() for part in connection.headers.get("x-forwarded-for", "").split(",") if part.strip()]
        for address in reversed(forwarded):
            if not self._is_trusted(address):
                return address
        return peer

    def _is_trusted(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed.version == network.version and parsed in network for network in self._trusted)


def _remember(cache: dict, key: object, known: _Known) -> None:
    if len(cache) >= CACHE_ENTRIES:
        cache.clear()
    cache[key] = known


def credential_of(connection: HTTPConnection) -> str | None:
    """The key or token of the Authorization or X-API-Key header. A query string is never read: it ends up in logs."""
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return connection.headers.get("x-api-key", "").strip() or None
