"""API keys: ``co_<prefix>.<secret>``, 256 random bits, shown once, kept as an HMAC with a pepper.

A fast keyed hash is right for a secret with full entropy; the pepper is outside the database, so a stolen table opens
nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from control.settings import Settings

PREFIX_BYTES = 8
SECRET_BYTES = 32
_CHOSEN = re.compile(r"^[A-Za-z0-9_-]{32,200}$")
_FORMAT = re.compile(r"^(co_[0-9a-f]{16})\.([A-Za-z0-9_-]{43})$")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the only moment its secret is known."""

    prefix: str
    key: str
    secret_hmac: bytes

    def __repr__(self) -> str:
        return f"NewKey({self.prefix}.***)"


def hash_secret(pepper: bytes, prefix: str, secret: str) -> bytes:
    """HMAC-SHA-256 over prefix and secret: a hash copied to another row does not fit there."""
    return hmac.digest(pepper, f"{prefix}.{secret}".encode(), hashlib.sha256)


def generate(pepper: bytes) -> NewKey:
    """A new random key."""
    prefix = "co_" + secrets.token_hex(PREFIX_BYTES)
    secret = secrets.token_urlsafe(SECRET_BYTES)
    return NewKey(prefix, f"{prefix}.{secret}", hash_secret(pepper, prefix, secret))


def split(pepper: bytes, key: str) -> tuple[str, str] | None:
    """(prefix, secret) of anything that may be a key, else None.

    A key that an operator chose (32 to 200 characters of A-Z a-z 0-9 _ -) has no prefix of its own; it gets one from
    its hash.
    """
    if match := _FORMAT.match(key):
        return match[1], match[2]
    if _CHOSEN.match(key):
        return "op_" + hmac.digest(pepper, b"prefix." + key.encode(), hashlib.sha256).hex()[:16], key
    return None


def derive(pepper: bytes, key: str) -> NewKey:
    """The stored form of a key made elsewhere: the operator's first admin key, the sandbox's agent keys.

    Raises:
        ValueError: the key is too short or holds other characters; the message does not repeat it.
    """
    parts = split(pepper, key)
    if parts is None:
        raise ValueError("an API key is 32 to 200 characters of A-Z a-z 0-9 _ -; make one with `openssl rand -hex 32`")
    return NewKey(parts[0], key, hash_secret(pepper, *parts))


def matches(pepper: bytes, prefix: str, secret: str, stored: bytes | None) -> bool:
    """Constant-time check; an unknown prefix costs the same as a wrong secret."""
    given = hash_secret(pepper, prefix, secret)
    return hmac.compare_digest(given, stored if stored is not None else bytes(32)) and stored is not None


def pepper_of(settings: Settings) -> bytes:
    """The key of all stored hashes, from API_KEY_SALT."""
    return settings.api_key_pepper.get_secret_value().encode()
