"""The audit log: append-only, one hash chain per customer (and one for the platform).

An entry's hash covers its content and the hash before it, so a removed or changed entry breaks every later one.
Written in the transaction of the action it records: what is rolled back was not done and is not recorded.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

GENESIS = bytes(32)

# Everything that must be recorded; the test of the audit log walks this list.
ACTIONS = frozenset(
    {
        "login.succeeded",
        "login.failed",
        "logout",
        "session.reused_refresh_token",
        "user.created",
        "user.changed",
        "user.deleted",
        "api_key.created",
        "api_key.revoked",
        "customer.created",
        "customer.changed",
        "customer.verified",
        "customer.offboarding",
        "customer.offboarded",
        "customer.adopt_only_lifted",
        "config.changed",
        "config.removed",
        "cluster.created",
        "cluster.changed",
        "cluster.deleted",
        "cluster.kill_switch",
        "customer.kill_switch",
        "quarantine.replayed",
        "report.exported",
    }
)


def entry_hash(
    previous: bytes, customer_id: UUID | None, at: datetime, actor: str, action: str, subject: str, detail: Any
) -> bytes:
    """SHA-256 over the entry before and a canonical form of this one."""
    canonical = json.dumps(
        [str(customer_id or ""), at.astimezone(UTC).isoformat(timespec="microseconds"), actor, action, subject, detail],
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(previous + canonical.encode()).digest()


def _storable(value: Any) -> Any:
    """JSON that reads back from JSONB exactly as it went in; floats become text, as their notation may change."""
    if isinstance(value, dict):
        return {str(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_storable(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)


async def record(
    conn: AsyncConnection,
    *,
    customer_id: UUID | None,
    actor: str,
    action: str,
    subject: str,
    detail: dict[str, Any] | None = None,
) -> None:
    """Append one entry to the customer's chain (the platform's when ``customer_id`` is None).

    Never pass a secret in ``detail``. The platform's chain needs a system scope.
    """
    await conn.execute(
        text("SELECT pg_advisory_xact_lock(hashtext('audit'), hashtext(:chain))"), {"chain": str(customer_id or "")}
    )
    previous = (
        await conn.execute(
            text("""SELECT entry_hash FROM audit_log WHERE customer_id IS NOT DISTINCT FROM :customer_id
                    ORDER BY id DESC LIMIT 1"""),
            {"customer_id": customer_id},
        )
    ).scalar() or GENESIS
    at, stored = datetime.now(UTC), _storable(detail or {})
    await conn.execute(
        text("""INSERT INTO audit_log (customer_id, at, actor, action, subject, detail, previous_hash, entry_hash)
                VALUES (:customer_id, :at, :actor, :action, :subject, CAST(:detail AS jsonb), :previous, :hash)"""),
        {
            "customer_id": customer_id,
            "at": at,
            "actor": actor,
            "action": action,
            "subject": subject,
            "detail": json.dumps(stored),
            "previous": previous,
            "hash": entry_hash(previous, customer_id, at, actor, action, subject, stored),
        },
    )


async def first_broken_entry(conn: AsyncConnection, customer_id: UUID | None) -> int | None:
    """Id of the first entry whose chain does not hold, or None when all of it does."""
    rows = await conn.stream(
        text("""SELECT id, customer_id, at, actor, action, subject, detail, previous_hash, entry_hash FROM audit_log
                WHERE customer_id IS NOT DISTINCT FROM :customer_id ORDER BY id"""),
        {"customer_id": customer_id},
    )
    previous = GENESIS
    async for row in rows:
        expected = entry_hash(previous, row.customer_id, row.at, row.actor, row.action, row.subject, row.detail)
        if bytes(row.previous_hash) != previous or bytes(row.entry_hash) != expected:
            return row.id
        previous = expected
    return None
