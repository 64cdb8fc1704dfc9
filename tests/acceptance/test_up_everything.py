"""The whole product started by one command, as a new user starts it, measured against the milestone's bars."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest
import redis

from control.supervisor.sweep import processes_of
from tests.control.supervisor.harness import STOP_SECONDS, Run, environment, runs_in

LATER_START_SECONDS = 45
IDLE_MEMORY_MB = 2200
IDLE_CPU_PERCENT = 25

PROCESSES = {
    *("postgres", "redis", "sandbox", "control", "worker", "dashboards"),
    *("dagster-code", "dagster-web", "dagster-daemon"),
}


@pytest.mark.acceptance
@pytest.mark.timeout(400)
def test_everything_starts_answers_stops_and_resumes(tmp_path):
    with runs_in(tmp_path) as start:
        run = start().until_ready()
        addresses = run.addresses
        _everything_is_there(run)
        _a_killed_worker_is_mended(run)
        _it_is_small(run)
        _it_stops_without_a_trace(run)

        began = time.monotonic()
        again = start().until_ready()
        took = time.monotonic() - began
        # A figure to read, not to fail on: other tests share the machine.
        print(f"second start: {took:.1f} s, {took / LATER_START_SECONDS:.2f} of its bar")  # noqa: T201
        for part in ("addresses", "admin_api_key", "sandbox"):
            assert again.addresses[part] == addresses[part]
        with psycopg.connect(again.addresses["addresses"]["postgres"]) as connection:
            assert connection.execute("SELECT count(*) FROM clusters").fetchone() == (3,)
        _it_stops_without_a_trace(again)


def _everything_is_there(run: Run) -> None:
    addresses = run.addresses
    assert stat.S_IMODE((run.home / "run" / "addresses.json").stat().st_mode) == 0o600
    public = {"control", "dagster", "dashboards"}
    assert set(addresses["addresses"]) == public | {"postgres", "redis", "aws", "lake", "worker", "dagster-code"}
    assert addresses["up"] == {"pid": run.process.pid}
    assert httpx.get(addresses["addresses"]["worker"]).text.startswith("# HELP")
    for name in ("control", "dagster", "dashboards"):
        assert httpx.get(addresses["addresses"][name] + ("/readyz" if name == "control" else "/")).status_code < 400
    with redis.Redis.from_url(addresses["addresses"]["redis"]) as client:
        assert client.ping()

    clusters = [c for customer in addresses["sandbox"]["customers"] for c in customer["clusters"]]
    assert (len(addresses["sandbox"]["customers"]), len(clusters)) == (2, 3)
    for cluster in clusters:
        assert {"cluster_id", "cluster_name", "region", "k8s_endpoint", "agent_key"} <= set(cluster)
    for customer in addresses["sandbox"]["customers"]:
        assert {"customer_id", "company_name", "account_id", "role_arn", "external_id", "queue_url"} <= set(customer)
    assert set(addresses["processes"]) == PROCESSES | {f"agent-{c['cluster_name']}" for c in clusters}
    for process in addresses["processes"].values():
        os.kill(process["pid"], 0)

    api = httpx.Client(
        base_url=addresses["addresses"]["control"] + "/api/v1",
        headers={"Authorization": f"Bearer {addresses['admin_api_key']}", "X-API-Key": addresses["admin_api_key"]},
    )
    with api:
        assert api.get("/clusters").status_code == 200

    # All of it listens on loopback only.
    loopback = {"127.0.0.1", "::1"}
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in addresses["processes"].values()
        for connection in psutil.Process(process["pid"]).net_connections("inet")
        if connection.status == "LISTEN"
    }
    assert listening <= loopback


def _a_killed_worker_is_mended(run: Run) -> None:
    worker = run.addresses["processes"]["worker"]["pid"]
    os.kill(worker, signal.SIGKILL)
    run.until(lambda: run.addresses["processes"].get("worker", {}).get("pid") not in {None, worker}, 30)
    assert "worker ended (terminated by SIGKILL)" in run.text


def _it_is_small(run: Run) -> None:
    footprint = _footprint(run, seconds=5)
    print(footprint)  # noqa: T201
    assert float(footprint.splitlines()[-1].split()[-2]) <= IDLE_MEMORY_MB, footprint


def _footprint(run: Run, *, seconds: int) -> str:
    return subprocess.run(
        [sys.executable, "-m", "control.supervisor.footprint", "--seconds", str(seconds)],
        env=environment(run.home),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _it_stops_without_a_trace(run: Run) -> None:
    addresses = run.addresses
    assert run.stop() < STOP_SECONDS
    assert processes_of(run.home) == []
    assert not (run.home / "run" / "addresses.json").exists()
    for url in (addresses["addresses"][name] for name in ("control", "dagster", "dashboards", "aws")):
        with socket.socket() as probe:
            assert probe.connect_ex((urlsplit(url).hostname, urlsplit(url).port)) != 0


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_quiet_machine_starts_again_soon_and_stays_idle(tmp_path):
    """Idle is measured over two minutes, after the first prices and metrics are in.

    The bars are those of a machine that does nothing else.
    """
    with runs_in(tmp_path) as start:
        start().until_ready().stop()
        began = time.monotonic()
        run = start().until_ready()
        took = time.monotonic() - began
        print(f"second start: {took:.1f} s")  # noqa: T201
        assert took <= LATER_START_SECONDS
        _footprint(run, seconds=120)
        footprint = _footprint(run, seconds=120)
        print(footprint)  # noqa: T201
        memory_mb, cpu_percent = (float(figure) for figure in footprint.splitlines()[-1].split()[-2:])
        assert memory_mb <= IDLE_MEMORY_MB, footprint
        assert cpu_percent <= IDLE_CPU_PERCENT, footprint
