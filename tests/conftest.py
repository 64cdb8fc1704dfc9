"""Servers and data every test may ask for: a real Postgres and Redis per test process, from the product's own wheels.

postgres_url    a migrated database, shared by the tests of one process; keep to your own customers
database_url    a migrated, empty database for one test
redis_url       a Redis shared by the tests of one process
clean_redis_url the same, emptied first
shared_data     the folder of real data sets, or the test is skipped with the reason
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
import structlog

from control.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from warehouse.postgres.migrate import upgrade

# Rich tracebacks take seconds each, in the process whose loops the tests time.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

REPOSITORY = Path(__file__).resolve().parents[1]
PREFIX = "cloudoptim-test-"
TEMPLATE = "cloudoptim_template"
MIN_MEMORY_DISK_BYTES = 1 << 30


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests about root's rights are for root; for everybody else there is nothing in them to run or to skip."""
    if os.geteuid() != 0:
        for_root = [item for item in items if item.get_closest_marker("root")]
        items[:] = [item for item in items if item not in for_root]
        config.hook.pytest_deselected(items=for_root)


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """A folder for servers' data, in memory where there is room: fsync stays on and costs nothing."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > MIN_MEMORY_DISK_BYTES
    base = memory if roomy else Path(tempfile.gettempdir())
    for left_over in base.glob(f"{PREFIX}*"):
        if not psutil.pid_exists(int(left_over.name.split("-")[2])):
            shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    """The process's own Postgres, with a migrated database and a template of it."""
    server = EmbeddedPostgres(server_folder / "postgres", port=free_port()).start()
    server.ensure_database(TEMPLATE)
    upgrade(server.url(TEMPLATE))
    _copy_template(server, "cloudoptim_shared")
    yield server
    server.stop()


def _copy_template(server: EmbeddedPostgres, database: str) -> None:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{database}" TEMPLATE {TEMPLATE} STRATEGY file_copy')


@pytest.fixture(scope="session")
def postgres_url(postgres_server: EmbeddedPostgres) -> str:
    """URL of a migrated database that the tests of this process share."""
    return postgres_server.url("cloudoptim_shared")


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a migrated, empty database that only this test sees; dropped afterwards."""
    name = f"test_{abs(hash(request.node.nodeid)):x}"
    _copy_template(postgres_server, name)
    yield postgres_server.url(name)
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def redis_url(server_folder: Path) -> Iterator[str]:
    """URL of the process's own Redis."""
    server = EmbeddedRedis(server_folder / "redis", port=free_port()).start()
    yield server.url
    server.stop()


@pytest.fixture
def clean_redis_url(redis_url: str) -> str:
    """URL of the process's own Redis, emptied for this test."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: CLOUDOPTIM_SHARED_DATA, else ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("CLOUDOPTIM_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; put the data sets there or set CLOUDOPTIM_SHARED_DATA")
    return folder
