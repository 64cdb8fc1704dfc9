"""Fixtures of the interruption path's tests: customers in a real Postgres, and the whole path over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from control.gateways.aws import AwsGateway
from control.interruptions.launching import Launcher
from control.interruptions.runtime import Runtime
from tests.control.interruptions.harness import DEPLOYMENT, Stage
from tests.control.interruptions.harness import stage as open_stage
from tests.control.interruptions.tenants import Tenant, create_tenant
from tests.control.interruptions.workers import Zygote
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


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks workers in milliseconds, for all tests of this process."""
    found = Zygote()
    yield found
    found.close()


@pytest.fixture
async def stage(database_url: str, clean_redis_url: str, tmp_path: Path, zygote: Zygote) -> AsyncIterator[Stage]:
    """The path over real sockets, with a database of its own; the test starts the workers."""
    async with open_stage(database_url, clean_redis_url, tmp_path, zygote=zygote) as found:
        yield found


@pytest.fixture
async def launchers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Launcher, Launcher]]:
    """The loops of two workers, turned by hand."""
    keys = stage.aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    gateways = [AwsGateway(endpoint_url=stage.aws.url) for _ in range(2)]
    first, second = (
        Launcher(Runtime(stage.db, stage.db, aws, stage.bells, f"by-hand-{number}", DEPLOYMENT))
        for number, aws in enumerate(gateways)
    )
    yield first, second
    for aws in gateways:
        await aws.close()


@pytest.fixture
def launcher(launchers: tuple[Launcher, Launcher]) -> Launcher:
    """The loops of a worker, turned by hand."""
    return launchers[0]
