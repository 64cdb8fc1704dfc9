"""What runs on this machine: from the environment to addresses, variables and programs."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from control.embedded import EmbeddedPostgres, EmbeddedRedis
from control.settings import Settings
from control.supervisor import dagster_home
from control.supervisor.daemon import Program
from control.supervisor.environment import (
    FRUGAL,
    HOME_MARK,
    PORTS,
    REPOSITORY,
    choose_ports,
    generated_secrets,
    sandbox_environment,
    uses_sandbox,
    with_config_file,
)
from control.supervisor.errors import UpError

PROBE_TIMEOUT_SECONDS = 2
PYTHON = sys.executable
REPLAY_PRICES = "CLOUDOPTIM_SANDBOX_REPLAY_PRICES"
WORKER_ROUND = b"cloudoptim_worker_loop_seconds_count{"


@dataclass
class Plan:
    """Everything `up` needs to know before it starts the first process."""

    home: Path
    settings: Settings
    sandbox: bool
    ports: dict[str, int]
    environment: dict[str, str]
    postgres: EmbeddedPostgres | None
    redis: EmbeddedRedis | None
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def database_url(self) -> str:
        return self.environment["DATABASE_URL"]

    @property
    def database_setting(self) -> str:
        """What to correct when Postgres cannot be used."""
        return (
            "DATABASE_URL" if self.settings.database_url_setting.get_secret_value() else "DB_HOST, DB_USER, DB_PASSWORD"
        )

    @property
    def redis_setting(self) -> str:
        """What to correct when Redis cannot be used."""
        return "REDIS_URL" if self.settings.redis_url_setting.get_secret_value() else "REDIS_HOST, REDIS_PORT"

    @property
    def redis_url(self) -> str:
        return self.environment["REDIS_URL"]


def make_plan(settings: Settings, environ: Mapping[str, str]) -> Plan:
    """Choose ports, generate secrets and compose the environment of every process.

    Raises:
        UpError: a port variable is wrong, or the recording to replay is not there.
        SettingsError: outside the sandbox, a secret is missing or weak.
    """
    environ = with_config_file(environ)
    home = settings.home
    sandbox = uses_sandbox(environ)
    own_postgres = not (settings.database_url_setting.get_secret_value() or settings.db_host)
    own_redis = not (settings.redis_url_setting.get_secret_value() or settings.redis_host)
    names = ["control", "worker", "dagster", "dashboards", "dagster-code"]
    names += ["postgres"] * own_postgres + ["redis"] * own_redis + ["sandbox"] * sandbox
    ports = choose_ports(names, home, environ)
    postgres = EmbeddedPostgres(home / "postgres", port=ports["postgres"]) if own_postgres else None
    redis = EmbeddedRedis(home / "redis", port=ports["redis"]) if own_redis else None
    if not sandbox:
        settings.require_secrets()
    database_url = postgres.url() if postgres else settings.database_url
    urls = {name: PORTS[name].url(port, environ) for name, port in ports.items()}
    if sandbox and (recording := environ.get(REPLAY_PRICES)):
        # The processes have another working directory.
        environ[REPLAY_PRICES] = str(Path(recording).expanduser().resolve())
        if not Path(environ[REPLAY_PRICES]).is_dir():
            raise UpError(f"{REPLAY_PRICES} names {recording}, which is no folder; set it to one of recorded prices")
    environment = {
        **(sandbox_environment(ports["sandbox"], environ) if sandbox else {**environ, "CLOUDOPTIM_SANDBOX": "0"}),
        **{name: value for name, value in FRUGAL.items() if not environ.get(name)},
        **generated_secrets(home, environ, all_of_them=sandbox),
        HOME_MARK: str(home),
        "CLOUDOPTIM_HOME": str(home),
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url if redis else settings.redis_url,
        "CENTRAL_SERVER_PORT": str(ports["control"]),
        "CLOUDOPTIM_CONTROL_PORT": str(ports["control"]),
        "CLOUDOPTIM_CONTROL_URL": urls["control"],
        "CLOUDOPTIM_DAGSTER_PORT": str(ports["dagster"]),
        "CLOUDOPTIM_DAGSTER_URL": urls["dagster"],
        "CLOUDOPTIM_WORKER_METRICS_PORT": str(ports["worker"]),
        "CLOUDOPTIM_DASHBOARDS_PORT": str(ports["dashboards"]),
        "CLOUDOPTIM_CODE_SERVER_HOST": "127.0.0.1",
        "CLOUDOPTIM_CODE_SERVER_PORT": str(ports["dagster-code"]),
        "CLOUDOPTIM_DAGSTER_POSTGRES_URL": dagster_storage_url(database_url),
        "DAGSTER_HOME": str(home / "dagster"),
        "PATH": f"{Path(PYTHON).parent}:{environ.get('PATH', '')}",
    }
    plan = Plan(home, settings, sandbox, ports, environment, postgres, redis)
    plan.addresses = {
        "control": environment["CLOUDOPTIM_CONTROL_URL"],
        "dagster": environment["CLOUDOPTIM_DAGSTER_URL"],
        "dashboards": urls["dashboards"],
        "postgres": database_url,
        "redis": environment["REDIS_URL"],
        "aws": environment.get("AWS_ENDPOINT_URL", ""),
        "lake": settings.lake_root,
        "worker": f"{urls['worker']}/metrics",
        "dagster-code": f"grpc://127.0.0.1:{ports['dagster-code']}",
    }
    return plan


def dagster_storage_url(database_url: str) -> str:
    """The same database for Dagster: its own schema, and psycopg2.

    dagster-postgres sends statements psycopg 3 rejects (dagster#33958); naming the driver can go when that is closed.
    """
    parts = urlsplit(database_url)
    options = quote(f"-csearch_path={dagster_home.SCHEMA}")
    query = "&".join(part for part in (parts.query, f"options={options}") if part)
    return urlunsplit(("postgresql+psycopg2", parts.netloc, parts.path, query, ""))


def all_programs(plan: Plan) -> list[Program]:
    """Every program but the agents, whose clusters the sandbox names when it is up."""
    cli = [PYTHON, "-m", "control.cli"]
    programs: list[Program] = []
    servers: tuple[str, ...] = ()
    if plan.postgres:
        programs.append(
            Program(
                "postgres",
                plan.postgres.prepare(),
                group="servers",
                ready=partial(_database_made, plan.postgres),
                stop_signal=signal.SIGINT,
            )
        )
        servers += ("postgres",)
    if plan.redis:
        programs.append(Program("redis", plan.redis.prepare(), group="servers", ready=plan.redis.answers))
        servers += ("redis",)
    # The sandbox needs the database to be made, and a lake in one of its buckets needs the sandbox.
    lake_on_sandbox = plan.sandbox and plan.settings.lake_root.startswith("s3://")
    without_lake = ["--no-lake"] * lake_on_sandbox
    programs.append(
        Program("migrate", [*cli, "migrate", "--with-dagster", *without_lake], once=True, needs=servers[:1])
    )
    migrated = ("migrate", *servers)
    stage = migrated
    if plan.sandbox:
        programs.append(
            Program("sandbox", [*cli, "sandbox", "run"], needs=stage, ready=lambda: read_sandbox(plan.home) is not None)
        )
        stage += ("sandbox",)
    if lake_on_sandbox:
        programs.append(Program("lake", [*cli, "migrate"], once=True, needs=stage))
        stage += ("lake",)
        migrated += ("lake",)
    started_at = time.time()
    # A wheel carries the file beside this module.
    workspaces = (REPOSITORY / "workspace.yaml", Path(__file__).with_name("workspace.yaml"))
    workspace = ["-w", str(next(file for file in workspaces if file.exists()))]
    grpc = ["--host", "127.0.0.1", "--port", str(plan.ports["dagster-code"]), "--use-python-environment-entry-point"]
    module = ["--empty-working-directory", "--module-name", "cloudoptim_pipelines.definitions"]
    web = ["--host", "127.0.0.1", "--port", str(plan.ports["dagster"]), "--log-level", "warning"]
    programs += [
        Program("control", [*cli, "control"], needs=stage, ready=_answers(plan.addresses["control"] + "/readyz")),
        Program("worker", [*cli, "worker"], needs=stage, ready=_works(plan.ports["worker"])),
        Program(
            "dagster-code",
            [PYTHON, "-m", "dagster", "api", "grpc", *grpc, *module],
            # It opens Dagster's tables, so the first time it waits for them to be made.
            needs=servers if dagster_home.is_migrated(plan.home) else migrated,
            ready=lambda: _listens(plan.ports["dagster-code"]),
        ),
        Program(
            "dagster-web",
            [PYTHON, "-m", "dagster_webserver", *web, *workspace],
            needs=(*migrated, "dagster-code"),
            ready=_answers(plan.addresses["dagster"] + "/server_info"),
        ),
        Program(
            "dagster-daemon",
            [PYTHON, "-m", "dagster._daemon", "run", *workspace],
            needs=(*stage, "dagster-code"),
            ready=lambda: _daemon_beats(plan.database_url, since=started_at),
        ),
        Program("dashboards", [*cli, "dashboards"], needs=migrated, ready=_answers(plan.addresses["dashboards"] + "/")),
    ]
    return programs


def agent_programs(plan: Plan, sandbox: dict[str, Any]) -> list[Program]:
    """One reference agent for each of the sandbox's clusters."""
    started_at = time.time()
    return [
        Program(
            f"agent-{cluster['cluster_name']}",
            [PYTHON, "-m", "control.cli", "agent"],
            group="agents",
            needs=("control",),
            ready=partial(_agent_spoke, plan.database_url, cluster["cluster_id"], since=started_at),
            environment={
                "CLOUDOPTIM_AGENT_CLUSTER_ID": cluster["cluster_id"],
                "CLOUDOPTIM_AGENT_CLUSTER_NAME": cluster["cluster_name"],
                "CLOUDOPTIM_AGENT_KEY": cluster["agent_key"],
                "CLOUDOPTIM_AGENT_K8S_ENDPOINT": cluster["k8s_endpoint"],
                "CLOUDOPTIM_AGENT_K8S_TOKEN": cluster.get("k8s_token", ""),
            },
        )
        for customer in sandbox["customers"]
        for cluster in customer["clusters"]
    ]


def read_sandbox(home: Path) -> dict[str, Any] | None:
    """What the running sandbox says of itself (the ``sandbox`` part of addresses.json), else None."""
    file = home / "sandbox" / "addresses.json"
    return json.loads(file.read_text()) if file.exists() else None


def _database_made(postgres: EmbeddedPostgres) -> bool:
    if not postgres.answers():
        return False
    postgres.ensure_database()
    return True


def _answers(url: str) -> Callable[[], bool]:
    """A probe: the address answers without an error; a redirect (to a login page) is an answer."""
    return lambda: _get(url) is not None


def _works(port: int) -> Callable[[], bool]:
    """A probe: the worker has finished a round of a loop, which takes the database."""
    return lambda: WORKER_ROUND in (_get(f"http://127.0.0.1:{port}/metrics") or b"")


def _get(url: str) -> bytes | None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=PROBE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return response.read() if response.status < 400 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PROBE_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def _one_row(database_url: str, statement: str, *parameters: Any) -> bool:
    """Whether a query finds a row; false while the table is not there yet."""
    import psycopg

    try:
        with psycopg.connect(database_url, connect_timeout=PROBE_TIMEOUT_SECONDS) as connection:
            return connection.execute(statement, parameters).fetchone() is not None
    except psycopg.Error:
        return False


def _daemon_beats(database_url: str, *, since: float) -> bool:
    """The daemon has no port; it writes a heartbeat for each of its loops."""
    statement = (
        f"SELECT 1 FROM {dagster_home.SCHEMA}.daemon_heartbeats WHERE timestamp >= to_timestamp(%s) AT TIME ZONE 'UTC'"
    )
    return _one_row(database_url, statement, since)


def _agent_spoke(database_url: str, cluster_id: str, *, since: float) -> bool:
    statement = "SELECT 1 FROM clusters WHERE id = %s::uuid AND last_seen_at >= to_timestamp(%s)"
    return _one_row(database_url, statement, cluster_id, since)
