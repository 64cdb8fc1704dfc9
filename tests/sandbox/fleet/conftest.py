"""One sandbox process for the tests that only look or add; those that stop or kill it start their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sandbox.fleet.harness import RunningSandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[RunningSandbox]:
    running = RunningSandbox(tmp_path_factory.mktemp("home"), DATABASE_URL=postgres_url)
    try:
        yield running.start()
    finally:
        running.kill()


@pytest.fixture
def make_sandbox(tmp_path: Path) -> Iterator[Callable[..., RunningSandbox]]:
    """Sandboxes on one home of the test's own; what still runs at the end is killed."""
    made = []

    def make(**environment: str) -> RunningSandbox:
        made.append(RunningSandbox(tmp_path / "home", **environment))
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.kill()
