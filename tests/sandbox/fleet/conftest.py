"""One sandbox process for the tests that only look or add; those that stop or kill it start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.fleet.harness import RunningSandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[RunningSandbox]:
    running = RunningSandbox(tmp_path_factory.mktemp("home"), DATABASE_URL=postgres_url).start()
    yield running
    running.stop()


@pytest.fixture
def own_home(tmp_path: Path) -> Path:
    return tmp_path / "home"
