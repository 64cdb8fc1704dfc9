"""Ports, secrets and variables of a home, and supervisord's configuration."""

import configparser
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from control.embedded import free_port
from control.supervisor.checks import check_port, port_cause
from control.supervisor.daemon import MAX_PAUSE_SECONDS, End, Program, Restarts, Supervisord, render_programs
from control.supervisor.environment import (
    PORTS,
    SECRETS,
    choose_ports,
    generated_secrets,
    port_is_free,
    sandbox_environment,
    uses_sandbox,
    with_config_file,
)
from control.supervisor.errors import UpError
from control.supervisor.plan import dagster_storage_url
from control.supervisor.sweep import end_all, processes_of
from control.supervisor.up import telling_line, text_since


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"AWS_REGION": "eu-west-1"}, True),
        ({"AWS_PROFILE": "production"}, False),
        ({"AWS_ACCOUNT_ID": "123456789012"}, False),
        ({"AWS_PROFILE": "production", "CLOUDOPTIM_SANDBOX": "1"}, True),
        ({"CLOUDOPTIM_SANDBOX": "0"}, False),
        ({"CLOUDOPTIM_SANDBOX": "false"}, False),
    ],
)
def test_sandbox_runs_unless_a_real_account_is_meant(environ, expected):
    assert uses_sandbox(environ) is expected


def test_sandbox_hides_every_real_credential():
    real = {"AWS_PROFILE": "p", "AWS_SESSION_TOKEN": "t", "AWS_ROLE_ARN": "r", "AWS_WEB_IDENTITY_TOKEN_FILE": "f"}
    merged = sandbox_environment(14566, {**real, "PATH": "/bin", "AWS_REGION": "eu-west-1"})
    assert not real.keys() & merged.keys()
    assert (merged["PATH"], merged["AWS_REGION"]) == ("/bin", "eu-west-1")
    assert merged["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    assert merged["AWS_CONFIG_FILE"] == merged["AWS_SHARED_CREDENTIALS_FILE"] == "/dev/null"


def test_free_port_is_kept_for_later_starts(tmp_path):
    zero = {"CENTRAL_SERVER_PORT": "0", "CLOUDOPTIM_POSTGRES_PORT": "0"}
    first = choose_ports(["control", "postgres"], tmp_path, zero)
    assert choose_ports(["control", "postgres"], tmp_path, zero) == first
    assert all(port_is_free(port) for port in first.values())


def test_public_defaults_do_not_wander(tmp_path):
    assert choose_ports(["control", "dagster", "dashboards"], tmp_path, {}) == {
        "control": 8000,
        "dagster": 3000,
        "dashboards": 5006,
    }


def test_internal_port_nobody_chose_gives_way_and_the_new_one_is_kept(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setitem(PORTS, "postgres", type(PORTS["postgres"])(("CLOUDOPTIM_POSTGRES_PORT",), port))
        chosen = choose_ports(["postgres"], tmp_path, {})["postgres"]
        assert chosen != port
    assert choose_ports(["postgres"], tmp_path, {})["postgres"] == chosen


@pytest.mark.parametrize("text", ["", "{", "[15432]", '{"postgres": "many"}', '{"postgres": 70000}'])
def test_a_spoilt_file_of_kept_ports_means_new_ports(tmp_path, text):
    (tmp_path / "ports.json").write_text(text)
    first = choose_ports(["control", "postgres"], tmp_path, {"CLOUDOPTIM_POSTGRES_PORT": "0"})
    assert port_is_free(first["postgres"])
    assert choose_ports(["control", "postgres"], tmp_path, {"CLOUDOPTIM_POSTGRES_PORT": "0"}) == first


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("localhost", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
    ],
)
def test_each_server_is_asked_where_it_listens(host, url):
    assert PORTS["control"].url(8000, {"CENTRAL_SERVER_HOST": host}) == url


@pytest.mark.parametrize("text", ["eighty", "-1", "65536", "80.5"])
def test_wrong_port_is_refused_by_name(tmp_path, text):
    with pytest.raises(UpError, match=r"CLOUDOPTIM_REDIS_PORT .* port number"):
        choose_ports(["redis"], tmp_path, {"CLOUDOPTIM_REDIS_PORT": text})


def test_secrets_are_made_once_and_only_for_the_owner(tmp_path):
    first = generated_secrets(tmp_path, {}, all_of_them=True)
    assert set(first) == set(SECRETS)
    assert len(set(first.values())) == len(SECRETS)
    assert generated_secrets(tmp_path, {}, all_of_them=True) == first
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    given = generated_secrets(tmp_path, {"JWT_SECRET_KEY": "own"}, all_of_them=True)
    assert given == {**first, "JWT_SECRET_KEY": "own"}


def test_outside_the_sandbox_only_the_first_admin_key_is_made(tmp_path):
    assert set(generated_secrets(tmp_path, {}, all_of_them=False)) == {"CLOUDOPTIM_ADMIN_API_KEY"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p%40@h:5/d", "postgresql+psycopg2://u:p%40@h:5/d?options=-csearch_path%3Ddagster"),
        (
            "postgresql://u:p@h/d?sslmode=require",
            "postgresql+psycopg2://u:p@h/d?sslmode=require&options=-csearch_path%3Ddagster",
        ),
    ],
)
def test_dagster_gets_its_schema_and_driver(url, expected):
    assert dagster_storage_url(url) == expected


def test_supervisord_configuration_survives_odd_paths_and_values():
    program = Program("worker", ["/odd path/100%/python", "-c", "print('x')"], environment={"KEY": "50%,=;#'x"})
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read_string(render_programs([program], Path("/logs")))
    section = parser["program:worker"]
    assert section["environment"] == 'KEY="50%%,=;#\'x"'
    assert "'/odd path/100%%/python'" in section["command"]
    assert parser["group:apps"]["programs"] == "worker"


def test_a_value_supervisord_cannot_carry_is_refused():
    with pytest.raises(UpError, match="KEY holds a quotation mark"):
        render_programs([Program("worker", ["x"], environment={"KEY": 'a"b'})], Path("/logs"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "2026-01-01 00:00:00,000 WARN exited: worker (terminated by SIGKILL; not expected)",
            End("worker", "terminated by SIGKILL", 1),
        ),
        (
            "2026-01-01 00:00:00,000 WARN exited: control (exit status 1; not expected)",
            End("control", "exit status 1", 1),
        ),
        ("2026-01-01 00:00:00,000 INFO exited: agent-a (exit status 0; expected)", End("agent-a", "exit status 0", 1)),
        ("2026-01-01 00:00:00,000 INFO stopped: worker (exit status 0)", None),
        ("2026-01-01 00:00:00,000 INFO spawned: 'worker' with pid 1", None),
    ],
)
def test_ends_are_read_from_supervisords_log(line, expected):
    assert Restarts().read(line, now=0.0) == expected


def test_pauses_grow_until_the_process_stayed_up():
    restarts = Restarts()
    end = "WARN exited: worker (exit status 1; not expected)"
    other = "WARN exited: redis (exit status 1; not expected)"
    up = "INFO success: worker entered RUNNING state, process has stayed up for > than 30 seconds (startsecs)"
    found = [restarts.read(line, now=0.0) for line in (end, end, other, end, up, end, end)]
    pauses = [end.pause_seconds for end in found if end]
    assert pauses == [1, 2, 1, 3, 0, 1]


def test_pauses_are_bounded():
    restarts = Restarts()
    end = "WARN exited: worker (exit status 1; not expected)"
    pauses = [restarts.read(end, now=0.0).pause_seconds for _ in range(MAX_PAUSE_SECONDS + 2)]
    assert pauses == list(range(1, MAX_PAUSE_SECONDS + 3))
    assert restarts.due(1e9) == []
    for began in (1000.0, 2000.0):
        assert restarts.read(end, now=began).pause_seconds == MAX_PAUSE_SECONDS
        assert restarts.due(began + MAX_PAUSE_SECONDS - 1) == []
        assert restarts.due(began + MAX_PAUSE_SECONDS) == ["worker"]
        assert restarts.due(began + MAX_PAUSE_SECONDS) == []


@pytest.fixture
def daemon(tmp_path):
    """A real supervisord with nothing to do."""
    (tmp_path / "run").mkdir()
    daemon = Supervisord(tmp_path, {"PATH": os.environ["PATH"]})
    yield daemon
    daemon.stop()


def spawns(daemon: Supervisord, count: int, seconds: float) -> list[float]:
    """When supervisord started its program the first ``count`` times, in seconds of a monotonic clock."""
    seen: list[float] = []
    deadline = time.monotonic() + seconds
    while len(seen) < count:
        assert time.monotonic() < deadline, daemon.log.read_text()
        if daemon.log.read_text().count("spawned: 'p'") > len(seen):
            seen.append(time.monotonic())
        time.sleep(0.02)
    return seen


def test_a_process_that_dies_some_seconds_after_each_start_gets_growing_pauses(daemon):
    lifetime = 2  # more than supervisord's own measure of a good start
    program = Program("p", [shutil.which("sleep"), str(lifetime)])
    daemon.start([program])
    daemon.launch(program)
    first, second, third = spawns(daemon, 3, 30)
    pauses = [second - first - lifetime, third - second - lifetime]
    assert pauses[0] >= 0.9
    assert pauses[1] >= 1.9
    restarts = Restarts()
    ends = [restarts.read(line, now=0.0) for line in daemon.log.read_text().splitlines()]
    assert [end.pause_seconds for end in ends if end] == [1, 2]


def test_a_waiting_process_can_be_started_before_its_pause_is_over(daemon):
    program = Program("p", [shutil.which("false")])
    daemon.start([program])
    daemon.launch(program)
    spawns(daemon, 3, 20)  # the next pause is 3 s
    began = time.monotonic()
    while daemon.states()["p"]["statename"] != "BACKOFF":
        assert time.monotonic() < began + 2
    daemon.start_waiting(program)
    assert daemon.log.read_text().count("spawned: 'p'") == 4
    while daemon.states()["p"]["statename"] != "BACKOFF":
        assert time.monotonic() < began + 4


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "no output"),
        ("starting\nready\n", "ready"),
        (
            "Traceback\nUndefinedColumn: error: no column\nLINE 1: SELECT x\n        ^\n",
            "UndefinedColumn: error: no column",
        ),
        (
            "Traceback (most recent call last):\n"
            '  File "a.py", line 1, in a\n'
            "    raise KeyError\n"
            "    ^^^^~~~~~~~~~~\n"
            "KeyError: 'first'\n\n"
            "The above exception was the direct cause of the following exception:\n\n"
            "Traceback (most recent call last):\n"
            '  File "b.py", line 1, in b\n'
            "    connect()\n"
            "sqlalchemy.exc.OperationalError: (psycopg.OperationalError) connection refused\n"
            "[SQL: SELECT failed\n"
            "FROM error_log]\n"
            "[parameters: {'error': 1}]\n"
            "(Background on this error at: https://sqlalche.me/e/20/e3q8)\n"
            "INFO: shutting down\n"
            "ERROR:    Application startup failed. Exiting.\n",
            "sqlalchemy.exc.OperationalError: (psycopg.OperationalError) connection refused",
        ),
        (
            "Traceback (most recent call last):\nValueError: long ago\n"
            + "working\n" * 60
            + "FATAL: out of memory\nbye\n",
            "FATAL: out of memory",
        ),
    ],
)
def test_the_line_that_tells_most_is_shown(log, expected):
    assert telling_line(log) == expected


def test_an_error_of_an_earlier_run_is_not_shown(tmp_path):
    log = tmp_path / "worker.log"
    assert text_since(log, 0) == ""
    log.write_text("KeyError: of yesterday\n")
    start = log.stat().st_size
    assert telling_line(text_since(log, start)) == "no output"
    with log.open("a") as file:
        file.write("stopped by itself\n")
    assert telling_line(text_since(log, start)) == "stopped by itself"
    log.write_text("rotated\n")
    assert text_since(log, start) == "rotated\n"


def test_what_stands_in_a_servers_folder_is_swept_only_if_it_is_the_server(tmp_path):
    """The same long-lived program once under a person's name and once under the server's."""
    folder = tmp_path / "postgres" / "data"
    folder.mkdir(parents=True)
    server = tmp_path / "bin" / "postgres"
    server.parent.mkdir()
    shutil.copy(shutil.which("sleep"), server)
    shell, left_over = (
        subprocess.Popen([program, "60"], cwd=folder, env={}) for program in (shutil.which("sleep"), server)
    )
    try:
        assert [process.pid for process in processes_of(tmp_path)] == [left_over.pid]
        server.unlink()  # an upgraded package replaces the file under the running server
        assert end_all(tmp_path, grace_seconds=2) == ["postgres"]
        assert left_over.poll() is not None
        assert shell.poll() is None
    finally:
        for process in (shell, left_over):
            process.kill()
            process.wait()


@pytest.fixture
def taken():
    """Listens on a loopback port of the given family; returns the port."""
    sockets = []

    def take(host: str) -> int:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sockets.append(listener)
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(f"this machine has no {host}: {error}")
        listener.listen()
        return listener.getsockname()[1]

    yield take
    for listener in sockets:
        listener.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_names_the_variable_that_was_set(taken, host):
    port = taken("127.0.0.1")
    for variable in PORTS["control"].variables:
        with pytest.raises(UpError, match=rf"port {port} for control is in use.* set {variable} to"):
            check_port("control", port, {variable: str(port), "CENTRAL_SERVER_HOST": host})


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6_addresses_are_checked(taken, host):
    port = taken("::1")
    with pytest.raises(UpError, match=f"port {port} for dashboards is in use"):
        check_port("dashboards", port, {"CLOUDOPTIM_DASHBOARDS_HOST": host})
    check_port("dashboards", port, {})


def test_each_server_is_checked_where_it_listens(taken):
    port = taken("127.0.0.1")
    check_port("dashboards", port, {"CLOUDOPTIM_DASHBOARDS_HOST": "127.0.0.2"})
    with pytest.raises(UpError, match="in use"):
        check_port("dashboards", port, {"CENTRAL_SERVER_HOST": "127.0.0.2"})
    with pytest.raises(UpError, match="in use"):
        check_port("dagster", port, {"CENTRAL_SERVER_HOST": "127.0.0.2"})


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "no.such.host.invalid"])
@pytest.mark.parametrize(
    ("name", "setting"), [("control", "CENTRAL_SERVER_HOST"), ("dashboards", "CLOUDOPTIM_DASHBOARDS_HOST")]
)
def test_a_foreign_address_names_the_hosts_setting(name, setting, host):
    with pytest.raises(UpError, match=f"{re.escape(host)}: it is no address of this machine; set {setting} to"):
        check_port(name, free_port(), {setting: host})


def test_a_privileged_port_is_told_from_a_used_one():
    # Some kernels let anyone have these ports and root always may, so the kernel's answer is given here.
    cause = port_cause(PermissionError(errno.EACCES, "Permission denied"), "dagster", 80, {})
    assert (
        cause == "port 80 for dagster needs root, as ports below 1024 do; set CLOUDOPTIM_DAGSTER_PORT to a higher one"
    )


def test_config_file_stands_below_the_environment(tmp_path):
    file = tmp_path / "cloudoptim.yaml"
    file.write_text("CENTRAL_SERVER_PORT: 8001\nCLOUDOPTIM_DAGSTER_PORT: 3001\n")
    merged = with_config_file({"CLOUDOPTIM_CONFIG": str(file), "CENTRAL_SERVER_PORT": "8002"})
    assert choose_ports(["control", "dagster"], tmp_path, merged) == {"control": 8002, "dagster": 3001}


@pytest.mark.parametrize("text", [None, "- a list", "a: [", "just text"])
def test_unusable_config_file_is_named(tmp_path, text):
    file = tmp_path / "cloudoptim.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UpError, match=r"CLOUDOPTIM_CONFIG names .*cloudoptim.yaml"):
        with_config_file({"CLOUDOPTIM_CONFIG": str(file)})
