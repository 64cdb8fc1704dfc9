"""Password hashes (argon2id) off the event loop: one check costs tens of milliseconds of processor by design."""

from __future__ import annotations

import asyncio
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

MIN_PASSWORD_LENGTH = 12
_hasher = PasswordHasher()
# Two at a time: a burst of logins must not take every thread and 64 MiB each.
_turn = asyncio.Semaphore(2)


@cache
def _nobody() -> str:
    """Checked when the e-mail address is unknown, so that an unknown address takes as long as a wrong password."""
    return _hasher.hash("nobody has this password")


async def hash_password(password: str) -> str:
    """The stored form of a password."""
    async with _turn:
        return await asyncio.to_thread(_hasher.hash, password)


async def verify_password(stored: str | None, password: str) -> bool:
    """Whether the password fits; ``None`` (no such user) takes as long and is False."""

    def check() -> bool:
        try:
            return _hasher.verify(stored or _nobody(), password)
        except (VerificationError, InvalidHashError):
            return False

    async with _turn:
        return await asyncio.to_thread(check) and stored is not None
