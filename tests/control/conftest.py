"""One running control API for the tests of this folder; each test makes its own customers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.control.api import Api, Tenant, serving, settings_for


@pytest.fixture(scope="session")
async def api(postgres_url: str, redis_url: str) -> AsyncIterator[Api]:
    settings = settings_for(
        postgres_url, redis_url, CLOUDOPTIM_RATE_LIMIT_PER_KEY="none", CLOUDOPTIM_RATE_LIMIT_PER_CUSTOMER="none"
    )
    async with serving(settings) as running:
        yield running


@pytest.fixture
async def tenant(api: Api) -> Tenant:
    return await api.tenant()


@pytest.fixture
async def other(api: Api) -> Tenant:
    return await api.tenant("Other")
