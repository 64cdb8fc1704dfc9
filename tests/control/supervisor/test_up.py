"""`cloudoptim up` as a person meets it: real processes in a home of their own, on free ports."""

import os
import signal
import socket
import stat
import subprocess
import sys

import psutil
import psycopg
import pytest

from control.supervisor.environment import PORTS
from control.supervisor.sweep import processes_of
from tests.control.supervisor.harness import START_SECONDS, STOP_SECONDS, environment, runs_in


@pytest.fixture
def start(tmp_path):
    """Starts runs in a home of the test's own and ends what is left of them."""
    with runs_in(tmp_path) as start:
        yield start


def test_life_of_a_home(start):
    """Ready, private, alone, mended after a kill, stopped without a trace, and resumed with its data."""
    run = start("--only", "redis,migrate").until_ready()
    file = run.home / "run" / "addresses.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run.addresses["version"] == 1
    assert run.addresses["admin_api_key"]
    assert set(run.addresses["processes"]) >= {"postgres", "redis"}
    dsn = run.addresses["addresses"]["postgres"]
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS value")
    # Secrets of the home are nobody else's, and no argument of a process shows one.
    for secret in (run.home / "secrets").iterdir():
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert not [p for p in processes_of(run.home) if secret.read_text() in " ".join(p.cmdline())]

    second = start("--only", "redis")
    assert second.process.wait(30) == 1
    assert f"another `cloudoptim up` (process {run.process.pid}) runs on {run.home}" in second.text
    assert file.exists()

    redis = run.addresses["processes"]["redis"]["pid"]
    os.kill(redis, signal.SIGKILL)
    run.until(lambda: "redis ended (terminated by SIGKILL) and is started again in 1 s" in run.text, 20)
    run.until(lambda: run.addresses["processes"].get("redis", {}).get("pid") not in {None, redis}, 20)

    assert run.stop() < STOP_SECONDS
    assert run.process.returncode == 0
    assert processes_of(run.home) == []
    assert not file.exists()

    again = start("--only", "migrate").until_ready()
    assert again.addresses["addresses"]["postgres"] == dsn
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (42,)
    # A killed `up` takes everything with it, and what it may leave does not disturb the next start.
    os.kill(again.process.pid, signal.SIGKILL)
    again.process.wait()
    third = start("--only", "migrate").until_ready()
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (42,)
    assert third.stop() < STOP_SECONDS
    assert processes_of(run.home) == []


def test_orphans_of_a_killed_manager_are_ended_by_the_next_start(start):
    run = start("--only", "redis").until_ready()
    manager = next(p for p in psutil.Process(run.process.pid).children() if "supervisord" in " ".join(p.cmdline()))
    # An orphan that ignores the polite signals, as a stuck run worker would.
    stubborn = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
        env={"CLOUDOPTIM_UP_HOME": str(run.home)},
        start_new_session=True,
    )
    manager.kill()
    assert run.process.wait(20) == 1
    assert "supervisord ended" in run.text
    stubborn.wait(5)
    assert processes_of(run.home) == []


def test_stop_while_starting_leaves_nothing(start):
    run = start("--only", "dagster-web,dashboards")
    run.until(lambda: "✓ postgres" in run.text)
    assert run.stop() < STOP_SECONDS
    assert processes_of(run.home) == []


def test_a_program_that_cannot_start_ends_the_start_with_its_own_words(start):
    run = start("--only", "dashboards", CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET="short")
    assert run.process.wait(START_SECONDS) == 1
    cause = run.text.strip().splitlines()[-1]
    assert "dashboards does not start (exit status 1)" in run.text
    assert "CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET is shorter" in run.text
    assert processes_of(run.home) == [], cause


def test_follow_shows_each_line_with_its_process(start):
    run = start("--only", "redis", "--follow").until_ready()
    run.until(
        lambda: any(line.startswith("redis ") and "Ready to accept" in line for line in run.text.splitlines()), 10
    )


@pytest.mark.parametrize("name", ["control", "dagster", "dashboards", "postgres", "redis", "sandbox"])
def test_port_in_use_names_process_and_variable(start, name):
    variable = PORTS[name].variables[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start(**{variable: str(port)})
        assert run.process.wait(30) == 1
    assert f"port {port} for {name} is in use by process {os.getpid()}" in run.text
    assert f"set {variable} to a free port" in run.text
    assert len(run.text.strip().splitlines()) == 1


def test_wrong_port_names_the_variable(start):
    run = start(CLOUDOPTIM_CONTROL_PORT="eighty")
    assert run.process.wait(30) == 1
    assert "CLOUDOPTIM_CONTROL_PORT" in run.text
    assert len(run.text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda url: url.replace(url.split("@")[0].rpartition(":")[2], "wrong"), "refuses the password of user"),
        (lambda url: url.rpartition("/")[0] + "/nowhere", 'database "nowhere" does not exist'),
        (lambda url: "postgresql://user:pw@127.0.0.1:1/x", "no Postgres answers at 127.0.0.1:1/x"),
        (lambda url: "postgresql://user:pw@127.0.0.1:port/x", "is not a Postgres address"),
    ],
    ids=["password", "database", "nobody", "form"],
)
def test_unusable_database_url_is_explained_in_one_line(start, postgres_url, change, cause):
    run = start(DATABASE_URL=change(postgres_url))
    assert run.process.wait(30) == 1
    assert "DATABASE_URL" in run.text
    assert cause in run.text
    assert "wrong" not in run.text
    assert len(run.text.strip().splitlines()) == 1


def test_unusable_redis_url_is_explained_in_one_line(start, redis_url):
    password = redis_url.split("@")[0].rpartition(":")[2]
    run = start(REDIS_URL=redis_url.replace(password, "wrong"))
    assert run.process.wait(30) == 1
    assert "REDIS_URL: Redis at 127.0.0.1" in run.text
    assert "refuses the password" in run.text
    assert len(run.text.strip().splitlines()) == 1


@pytest.mark.crash
def test_a_lake_in_a_bucket_of_the_sandbox_outlives_a_kill(start):
    root = {"CLOUDOPTIM_LAKE_ROOT": "s3://the-lake/of/a-test"}

    def tables(run):
        command = [sys.executable, "-m", "control.cli", "lake", "sql", "SELECT count(*) AS n FROM node_cost_hourly"]
        done = subprocess.run(
            [*command, "--format", "json"],
            env=environment(run.home, **root),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run = start("--only", "lake", **root).until_ready()
    assert set(run.addresses["processes"]) >= {"postgres", "sandbox"}
    first = tables(run)
    assert '"n"' in first
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    again = start("--only", "lake", **root).until_ready()
    assert tables(again) == first
    assert again.stop() < STOP_SECONDS


def test_a_recording_that_is_not_there_is_named(start, tmp_path):
    run = start(CLOUDOPTIM_SANDBOX_REPLAY_PRICES=str(tmp_path / "nowhere"), CLOUDOPTIM_SANDBOX_REPLAY_FROM="2023-03-20")
    assert run.process.wait(30) == 1
    assert "CLOUDOPTIM_SANDBOX_REPLAY_PRICES names" in run.text
    assert len(run.text.strip().splitlines()) == 1


def test_without_a_sandbox_weak_secrets_are_refused_by_name(start):
    run = start(CLOUDOPTIM_SANDBOX="0", JWT_SECRET_KEY="changeme")
    assert run.process.wait(30) == 1
    assert "JWT_SECRET_KEY is missing, an example or shorter" in run.text
    assert "changeme" not in run.text


@pytest.mark.root
def test_full_disk_names_folder_and_setting(start, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    try:
        run = start(home=small / "home")
        assert run.process.wait(30) == 1
        assert f"the disk of {small / 'home'} is full" in run.text
        assert "CLOUDOPTIM_HOME" in run.text
        assert len(run.text.strip().splitlines()) == 1
    finally:
        subprocess.run(["umount", "-l", small], check=True)
