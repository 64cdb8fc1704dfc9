"""A seeded Postgres and lake, the dashboards and the control service as processes of their own, and a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from control.supervisor.environment import FRUGAL
from dashboards.config import DashboardSettings
from dashboards.data import Data
from tests.dashboards.seed import World, seed
from warehouse.postgres.migrate import upgrade

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")  # as deploy/browser looks for it
ADMIN_KEY = "0123456789abcdef" * 4
SECRETS = {
    "JWT_SECRET_KEY": "a-secret-of-the-dashboards-tests-only-000001",
    "API_KEY_SALT": "a-secret-of-the-dashboards-tests-only-000002",
    "CLOUDOPTIM_MASTER_KEY": "a-secret-of-the-dashboards-tests-only-000003",
    "CLOUDOPTIM_ADMIN_API_KEY": ADMIN_KEY,
}
START_SECONDS = 150.0


@dataclass
class Seeded:
    """The world, and where it is."""

    world: World
    database_url: str
    lake_root: Path

    def settings(self, **changes: Any) -> DashboardSettings:
        """Settings that read this world."""
        values = {
            "DATABASE_URL": self.database_url,
            "CLOUDOPTIM_LAKE_ROOT": str(self.lake_root),
            "CLOUDOPTIM_SANDBOX": "1",
            **SECRETS,
            **changes,
        }
        return DashboardSettings(**values)


@pytest.fixture(scope="session")
def seeded(postgres_server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Seeded:
    """The seeded world in a database and a lake of its own."""
    postgres_server.ensure_database("dashboards")
    url = postgres_server.url("dashboards")
    upgrade(url)
    lake = tmp_path_factory.mktemp("dashboards-lake")
    return Seeded(seed(url, lake), url, lake)


@pytest.fixture(scope="session")
def data(seeded: Seeded) -> Iterator[Data]:
    """All queries over the seeded world."""
    reads = Data(seeded.settings())
    yield reads
    reads.close()


def environment(**changes: str) -> dict[str, str]:
    """A process's environment as `cloudoptim up` makes it: this one's without our settings, frugal, and the given."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUDOPTIM_", "AWS_", "DB_"))}
    return {**own, **FRUGAL, **SECRETS, **changes}


@contextmanager
def running(command: list[str], env: dict[str, str], probe: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers at ``probe``, ended afterwards."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(probe, timeout=2, trust_env=False).status_code < 500:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Served:
    """A running dashboards process."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Start a dashboards process with the given variables: ``with serve(DATABASE_URL=…) as served``."""

    @contextmanager
    def start(**variables: str) -> Iterator[Served]:
        port = free_port()
        home = tmp_path_factory.mktemp("dashboards-home")
        log = home / "dashboards.log"
        env = environment(
            CLOUDOPTIM_DASHBOARDS_PORT=str(port),
            CLOUDOPTIM_HOME=str(home),
            **{"CLOUDOPTIM_SANDBOX": "1", "CLOUDOPTIM_CONTROL_URL": f"http://127.0.0.1:{free_port()}", **variables},
        )
        url = f"http://127.0.0.1:{port}"
        with running([sys.executable, "-m", "dashboards.app"], env, f"{url}/liveness", log) as process:
            yield Served(url, port, process, log)

    return start


@pytest.fixture(scope="session")
def dashboards(seeded: Seeded, serve: Callable[..., Any]) -> Iterator[Served]:
    """The dashboards over the seeded world, as in the sandbox; the control service is away."""
    with serve(DATABASE_URL=seeded.database_url, CLOUDOPTIM_LAKE_ROOT=str(seeded.lake_root)) as served:
        yield served


@pytest.fixture(scope="session")
def control_url(seeded: Seeded, server_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real control service over the seeded world.

    Its Redis is its own: failed sign-ins of other modules' tests count against the same address.
    """
    home = tmp_path_factory.mktemp("control-home")
    port = free_port()
    redis = EmbeddedRedis(server_folder / "redis-dashboards", port=free_port()).start()
    env = environment(
        DATABASE_URL=seeded.database_url,
        REDIS_URL=redis.url,
        CLOUDOPTIM_HOME=str(home),
        CLOUDOPTIM_LAKE_ROOT=str(seeded.lake_root),
        CENTRAL_SERVER_PORT=str(port),
        CLOUDOPTIM_SANDBOX="1",
        CLOUDOPTIM_DAGSTER_URL=f"http://127.0.0.1:{free_port()}",
    )
    command = [
        *(sys.executable, "-m", "uvicorn", "--factory", "control.app:create_app"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
    ]
    url = f"http://127.0.0.1:{port}"
    try:
        with running(command, env, f"{url}/healthz", home / "control.log"):
            yield url
    finally:
        redis.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The machine's Chromium, kept from talking to anybody by itself.

    One for each module: Playwright's event loop counts as running until it stops, so no other test may need one.
    """
    chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if chromium is None:
        pytest.skip(f"none of {', '.join(CHROMIUM_NAMES)} is installed; Debian: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        yield started
        started.close()
