"""Fixtures of the interruption path's tests: customers in a real Postgres, and the whole path over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.control.interruptions.harness import Stage
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.tenants import Tenant, create_tenant
from warehouse.postgres.session import Database


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(postgres_url)
    yield database
    await database.close()


@pytest.fixture
async def tenant(db: Database) -> Tenant:
    return await create_tenant(db)


@pytest.fixture
async def other_tenant(db: Database) -> Tenant:
    return await create_tenant(db)


@pytest.fixture
async def stage(database_url: str, clean_redis_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """The path over real sockets, with a database of its own; the test starts the workers."""
    async with open_stage(database_url, clean_redis_url, tmp_path) as found:
        yield found
