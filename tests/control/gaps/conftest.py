"""The product's Dagster (code server, webserver, daemon) on a database and lake of its own, and the API beside it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from control.embedded import EmbeddedPostgres, free_port
from control.sandbox.aws import SandboxAWSThread, SandboxConfig
from control.sandbox.market import ReplayMarket
from control.supervisor.dagster_home import SCHEMA, write_dagster_home
from control.supervisor.plan import dagster_storage_url
from tests.control.api import Api, serving, settings_for
from tests.pipelines.conftest import World, hourly, price, recording
from warehouse.lake.store import Lake
from warehouse.postgres.migrate import upgrade

REPOSITORY = Path(__file__).resolve().parents[3]
READY_SECONDS = 120


@dataclass
class Stack:
    """Addresses of what runs, and the settings that lead to it."""

    database_url: str
    dagster_url: str
    prices_url: str
    home: Path
    environment: dict[str, str]

    def materialize(self, first: str, last: str | None = None) -> None:
        """Write partitions of Spot prices in this process: what a run of Dagster does, without its start."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, self.environment[name])
            self._materialize(first, last)

    def _materialize(self, first: str, last: str | None) -> None:
        world = World(self.database_url, self.home, self.prices_url, datetime.now(UTC))
        assert world.run(["spot_prices"], first, last).success

    def sql(self, statement: str, *parameters: Any) -> list[tuple]:
        """Rows of Postgres, as its owner would see them."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("SET ROLE cloudoptim_system")
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """What Dagster's own page would ask."""
        answer = httpx.post(f"{self.dagster_url}/graphql", json={"query": query, "variables": variables}, timeout=30)
        found = answer.json()
        assert "errors" not in found, found
        return found["data"]


def children_of(pid: int) -> list[psutil.Process]:
    """Everything a process started, that still runs."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def day(offset: int) -> date:
    """A day counted from today."""
    return (datetime.now(UTC) + timedelta(days=offset)).date()


def key(offset: int, region: str = "us-east-1") -> str:
    """The partition of a day counted from today."""
    return f"{day(offset).isoformat()}|{region}"


def until(ready: Any, what: str, process: subprocess.Popen | None = None, seconds: float = READY_SECONDS) -> Any:
    """Ask until the answer is true."""
    deadline = time.monotonic() + seconds
    while True:
        if found := ready():
            return found
        if process is not None and process.poll() is not None:
            pytest.fail(f"{what} ended with {process.returncode}")
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {seconds} s")
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether an address answers with 200."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def listens(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ten days of recorded prices of two regions behind the sandbox's endpoint, the clock running."""
    now = datetime.now(UTC)
    moments = hourly(now - timedelta(days=12), now)
    rows = [price(when, "m5.large", 0.03) for when in moments]
    rows += [price(when, "m5.large", 0.03, zone="euw1-az1", region="eu-west-1") for when in moments]
    folder = recording(tmp_path_factory.mktemp("recording"), rows, {"m5.large": 0.096})
    with SandboxAWSThread(SandboxConfig(market=ReplayMarket(folder, now))) as aws:
        yield aws.url


@pytest.fixture(scope="module")
def stack(postgres_server: EmbeddedPostgres, prices: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Code server and webserver as `cloudoptim up` starts them; schedules stopped, so that only the tests launch."""
    home = tmp_path_factory.mktemp("home")
    name = f"gaps_{os.getpid()}"
    postgres_server.ensure_database(name)
    url = postgres_server.url(name)
    upgrade(url)
    with Lake(home / "lake", url) as lake:
        lake.create_tables()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    write_dagster_home(home)
    code_port, web_port = free_port(), free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "CLOUDOPTIM_HOME": str(home),
        "CLOUDOPTIM_LAKE_ROOT": str(home / "lake"),
        "AWS_ENDPOINT_URL": prices,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "DAGSTER_HOME": str(home / "dagster"),
        "CLOUDOPTIM_DAGSTER_POSTGRES_URL": dagster_storage_url(url),
        "CLOUDOPTIM_CODE_SERVER_HOST": "127.0.0.1",
        "CLOUDOPTIM_CODE_SERVER_PORT": str(code_port),
    }
    made = Stack(url, f"http://127.0.0.1:{web_port}", prices, home, environment)
    running: list[subprocess.Popen] = []

    def start(label: str, *arguments: str) -> subprocess.Popen:
        log = (home / f"{label}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        running.append(process)
        return process

    try:
        done = subprocess.run(
            [sys.executable, "-m", "dagster", "instance", "migrate"],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        code = start(
            "code",
            *("dagster", "api", "grpc", "--host", "127.0.0.1", "--port", str(code_port)),
            *("--use-python-environment-entry-point", "--module-name", "cloudoptim_pipelines.definitions"),
        )
        until(lambda: listens(code_port), "the code server", code)
        web = start(
            "web",
            "dagster_webserver",
            "--host",
            "127.0.0.1",
            "--port",
            str(web_port),
            "-w",
            str(REPOSITORY / "workspace.yaml"),
        )
        until(lambda: answers(f"{made.dagster_url}/server_info"), "the webserver", web)
        stop_schedules(made)
        daemon = start("daemon", "dagster._daemon", "run", "-w", str(REPOSITORY / "workspace.yaml"))
        until(lambda: beating(made), "the daemon", daemon)
        yield made
    finally:
        # Runs are children of the code server, which waits for them when asked to end.
        children = [child for process in running for child in children_of(process.pid)]
        for process in reversed(running):
            process.terminate()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        for process in running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def stop_schedules(stack: Stack) -> None:
    """As on Dagster's page: switch every schedule off."""
    selector = {"repositoryName": "__repository__", "repositoryLocationName": "cloudoptim"}
    found = stack.graphql(
        "query($s: RepositorySelector!) { schedulesOrError(repositorySelector: $s) "
        "{ ... on Schedules { results { name id } } } }",
        s=selector,
    )
    schedules = found["schedulesOrError"]["results"]
    assert schedules
    for schedule in schedules:
        stack.graphql(
            "mutation($id: String!) { stopRunningSchedule(id: $id) { __typename ... on PythonError { message } } }",
            id=schedule["id"],
        )


def beating(stack: Stack) -> bool:
    """Whether the daemons that launch runs and backfills are up."""
    found = stack.graphql("{ instance { daemonHealth { allDaemonStatuses { daemonType healthy } } } }")
    healthy = {row["daemonType"] for row in found["instance"]["daemonHealth"]["allDaemonStatuses"] if row["healthy"]}
    return {"BACKFILL", "QUEUED_RUN_COORDINATOR"} <= healthy


@pytest.fixture(scope="module")
async def filler(stack: Stack, redis_url: str) -> AsyncIterator[Api]:
    """The API in front of that Dagster."""
    settings = settings_for(stack.database_url, redis_url, CLOUDOPTIM_DAGSTER_URL=stack.dagster_url)
    async with serving(settings) as api:
        yield api
