"""Envelope encryption of single values (``clusters.k8s_token``, webhook addresses).

A customer has one random data key, kept wrapped by the master key in ``customers.data_key``. A value is AES-256-GCM
under the data key with ``tenant|table|column|row`` as associated data: a ciphertext moved to another row, column or
customer does not open. Layout of both: version (1 byte), key id (8), nonce (12), ciphertext with tag.

Rotation: put the new master key first and the old one after a comma, ``rewrap`` every data key, drop the old one.
"""

from __future__ import annotations

import hashlib
import os
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

VERSION = b"\x01"
KEY_ID_BYTES = 8
NONCE_BYTES = 12
_HEADER = 1 + KEY_ID_BYTES + NONCE_BYTES


class CodecError(ValueError):
    """A value cannot be opened: wrong key, wrong place, or changed bytes. Says which, never what was inside."""


class Codec:
    """Wraps data keys and encrypts values.

    Args:
        master_key: one or more secrets separated by commas, the first is used for wrapping.
    """

    def __init__(self, master_key: str) -> None:
        secrets = [part.strip() for part in master_key.split(",") if part.strip()]
        if not secrets:
            raise CodecError("the master key is empty; set CLOUDOPTIM_MASTER_KEY")
        keys = [_derive(secret) for secret in secrets]
        self._current = _key_id(keys[0])
        self._keys = {_key_id(key): key for key in keys}

    def __repr__(self) -> str:
        return "Codec(***)"

    def new_data_key(self, customer_id: UUID) -> bytes:
        """A fresh data key for a customer, wrapped."""
        return self._wrap(os.urandom(32), customer_id)

    def rewrap(self, data_key: bytes, customer_id: UUID) -> bytes:
        """The same data key under the current master key."""
        return self._wrap(self._unwrap(data_key, customer_id), customer_id)

    def encrypt(self, value: str, *, data_key: bytes, customer_id: UUID, table: str, column: str, row: object) -> bytes:
        """Encrypt a value for one place."""
        return _seal(self._unwrap(data_key, customer_id), value.encode(), _place(customer_id, table, column, row))

    def decrypt(self, value: bytes, *, data_key: bytes, customer_id: UUID, table: str, column: str, row: object) -> str:
        """The value again, in its own place only.

        Raises:
            CodecError: another place, another key, or changed bytes.
        """
        key = self._unwrap(data_key, customer_id)
        return _open(key, value, _place(customer_id, table, column, row)).decode()

    def _wrap(self, key: bytes, customer_id: UUID) -> bytes:
        return _seal(self._keys[self._current], key, f"data-key|{customer_id}".encode())

    def _unwrap(self, wrapped: bytes, customer_id: UUID) -> bytes:
        master = self._keys.get(bytes(wrapped[1 : 1 + KEY_ID_BYTES]))
        if master is None:
            raise CodecError(
                "the data key was wrapped by a master key that is not configured; "
                "add the earlier one to CLOUDOPTIM_MASTER_KEY after a comma"
            )
        return _open(master, wrapped, f"data-key|{customer_id}".encode())


def _derive(secret: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"cloudoptim master key").derive(secret.encode())


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"key id" + key).digest()[:KEY_ID_BYTES]


def _place(customer_id: UUID, table: str, column: str, row: object) -> bytes:
    return f"{customer_id}|{table}|{column}|{row}".encode()


def _seal(key: bytes, plain: bytes, place: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return VERSION + _key_id(key) + nonce + AESGCM(key).encrypt(nonce, plain, place)


def _open(key: bytes, sealed: bytes, place: bytes) -> bytes:
    sealed = bytes(sealed)
    if len(sealed) <= _HEADER or sealed[:1] != VERSION:
        raise CodecError("not an encrypted value of a known version")
    if sealed[1 : 1 + KEY_ID_BYTES] != _key_id(key):
        raise CodecError("the value was encrypted under another key")
    try:
        return AESGCM(key).decrypt(sealed[1 + KEY_ID_BYTES : _HEADER], sealed[_HEADER:], place)
    except InvalidTag:
        raise CodecError("the value was changed, or belongs to another place") from None
