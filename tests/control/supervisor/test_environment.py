"""Ports, secrets and variables of a home, and supervisord's configuration."""

import configparser
import socket
import stat
from pathlib import Path

import pytest

from control.supervisor.daemon import Program, read_exit, render_programs
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
from control.supervisor.up import telling_line


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
            ("worker", "terminated by SIGKILL"),
        ),
        ("2026-01-01 00:00:00,000 WARN exited: control (exit status 1; not expected)", ("control", "exit status 1")),
        ("2026-01-01 00:00:00,000 INFO exited: agent-a (exit status 0; expected)", ("agent-a", "exit status 0")),
        ("2026-01-01 00:00:00,000 INFO stopped: worker (exit status 0)", None),
        ("2026-01-01 00:00:00,000 INFO spawned: 'worker' with pid 1", None),
    ],
)
def test_ends_are_read_from_supervisords_log(line, expected):
    assert read_exit(line) == expected


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "no output"),
        ("starting\nready\n", "ready"),
        (
            "Traceback\nUndefinedColumn: error: no column\nLINE 1: SELECT x\n        ^\n",
            "UndefinedColumn: error: no column",
        ),
    ],
)
def test_the_line_that_tells_most_is_shown(log, expected):
    assert telling_line(log) == expected


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
