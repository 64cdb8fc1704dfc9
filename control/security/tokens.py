"""People's tokens: short access tokens and refresh tokens that are used once.

A token says who and which session, never what they may do: that is read from the database. One algorithm; every
claim is required (PyJWT accepts a token without ``exp`` otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import jwt

from control.settings import MIN_SECRET_LENGTH, SettingsError

ALGORITHM = "HS256"
ISSUER = "cloudoptim"
ACCESS_AUDIENCE = "cloudoptim-api"
REFRESH_AUDIENCE = "cloudoptim-refresh"
ACCESS_LIFETIME = timedelta(minutes=15)
REFRESH_LIFETIME = timedelta(days=7)
LEEWAY = timedelta(seconds=10)
REQUIRED = ["exp", "iat", "aud", "iss", "sub", "jti"]


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says."""

    user_id: UUID
    session_id: UUID
    token_id: UUID


class Tokens:
    """Makes and checks tokens with one secret."""

    def __init__(self, secret: str) -> None:
        if len(secret) < MIN_SECRET_LENGTH:
            raise SettingsError(f"JWT_SECRET_KEY is shorter than {MIN_SECRET_LENGTH} characters; set a random one")
        self._secret = secret

    def _make(self, audience: str, lifetime: timedelta, user_id: UUID, session_id: UUID, token_id: UUID) -> str:
        now = datetime.now(UTC)
        return jwt.encode(
            {
                "iss": ISSUER,
                "aud": audience,
                "sub": str(user_id),
                "sid": str(session_id),
                "jti": str(token_id),
                "iat": now,
                "exp": now + lifetime,
            },
            self._secret,
            algorithm=ALGORITHM,
        )

    def access(self, user_id: UUID, session_id: UUID) -> str:
        """An access token for 15 minutes."""
        return self._make(ACCESS_AUDIENCE, ACCESS_LIFETIME, user_id, session_id, uuid4())

    def refresh(self, user_id: UUID, session_id: UUID, token_id: UUID) -> str:
        """A refresh token; ``token_id`` is the only one its session accepts next."""
        return self._make(REFRESH_AUDIENCE, REFRESH_LIFETIME, user_id, session_id, token_id)

    def read_access(self, token: str) -> Claims | None:
        """Claims of a valid access token, else None."""
        return self._read(token, ACCESS_AUDIENCE)

    def read_refresh(self, token: str) -> Claims | None:
        """Claims of a valid refresh token, else None."""
        return self._read(token, REFRESH_AUDIENCE)

    def _read(self, token: str, audience: str) -> Claims | None:
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=[ALGORITHM],
                audience=audience,
                issuer=ISSUER,
                leeway=LEEWAY,
                options={"require": REQUIRED},
            )
            return Claims(UUID(claims["sub"]), UUID(claims["sid"]), UUID(claims["jti"]))
        except (jwt.InvalidTokenError, ValueError, KeyError, TypeError, AttributeError):
            return None
