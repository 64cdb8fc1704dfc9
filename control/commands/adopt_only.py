"""`cloudoptim adopt-only`: customers of whom nothing is terminated because the database was restored."""

from __future__ import annotations

import asyncio
import getpass
from typing import Any
from uuid import UUID

from control.customers import repository, service
from control.errors import Conflict
from control.settings import Settings
from warehouse.postgres.session import Database


def held_back(settings: Settings) -> list[dict[str, Any]]:
    """Customers in the adopt-only state: id, name, since when, why, and the instances that were adopted."""
    return asyncio.run(_held_back(settings))


def lift(settings: Settings, customer_id: UUID, reason: str) -> None:
    """Allow terminations of one customer again; its audit log says who did it here and why.

    Raises:
        ValueError: nothing is held back for it.
    """
    try:
        asyncio.run(_lift(settings, customer_id, reason))
    except Conflict as error:
        raise ValueError(f"{customer_id}: {error}") from None


async def _held_back(settings: Settings) -> list[dict[str, Any]]:
    database = Database(settings.database_url, pool_size=1)
    try:
        async with database.system() as conn:
            rows = await repository.adopt_only_customers(conn)
    finally:
        await database.close()
    return [
        {
            "customer": str(row.id),
            "company": row.company_name,
            "since": f"{row.adopt_only_since:%Y-%m-%d %H:%M:%S}",
            "reason": row.adopt_only_reason,
            "adopted": " ".join(row.instances),
        }
        for row in rows
    ]


async def _lift(settings: Settings, customer_id: UUID, reason: str) -> None:
    database = Database(settings.database_url, pool_size=1)
    try:
        async with database.system() as conn:
            await service.lift(conn, customer_id, actor=f"command line ({getpass.getuser()})", reason=reason)
    finally:
        await database.close()
