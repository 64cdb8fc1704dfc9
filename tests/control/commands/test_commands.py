"""`cloudoptim lake sql` and `doctor` as a person types them."""

import fcntl
import json
import subprocess
from datetime import UTC, datetime
from uuid import UUID

import polars as pl
import psycopg
import pyarrow.parquet as pq
import pytest
from sqlalchemy import make_url

from tests.commands import cloudoptim
from warehouse.lake.store import Lake, PartitionWrite

MINE, OTHER = str(UUID(int=1)), str(UUID(int=2))
HOUR = datetime(2024, 5, 1, 10, tzinfo=UTC)


def node_hour(customer_id: str, instance_id: str) -> dict:
    return {
        "ts": HOUR,
        "customer_id": customer_id,
        "cluster_id": str(UUID(int=3)),
        "node_name": instance_id,
        "instance_id": instance_id,
        "zone_id": "use1-az1",
        "availability_zone": "us-east-1a",
        "instance_type": "m5.large",
        "product": "Linux/UNIX",
        "lifecycle": "spot",
        "minutes": 60.0,
        "cpu_cores": 2.0,
        "memory_bytes": 8 << 30,
        "source": "observed",
        "region": "us-east-1",
    }


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a command ended that could not do its work."""
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    assert done.stderr.startswith("cloudoptim: ")
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def database_of(database_url: str, **parts: str) -> str:
    return make_url(database_url).set(**parts).render_as_string(hide_password=False)


@pytest.fixture
def empty_database_url(database_url):
    """A database beside the test's own, without any table."""
    name = f"{make_url(database_url).database}_empty"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
        yield database_of(database_url, database=name)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def lake(tmp_path, database_url):
    """Environment of a lake with one node hour of each of two customers."""
    root = str(tmp_path / "lake")
    lake = Lake(root, database_url)
    lake.create_tables()
    rows = pl.DataFrame([node_hour(MINE, "i-1"), node_hour(OTHER, "i-2")])
    partition = {"day": "2024-05-01", "region": "us-east-1"}
    lake.publish([PartitionWrite("node_hours", partition, rows)], run_id="test")
    lake.close()
    return {"CLOUDOPTIM_HOME": str(tmp_path), "CLOUDOPTIM_LAKE_ROOT": root, "DATABASE_URL": database_url}


def test_json_has_every_row(lake):
    done = cloudoptim("lake", "sql", "SELECT instance_id FROM node_hours ORDER BY 1", "--format", "json", **lake)
    assert json.loads(done.stdout) == [{"instance_id": "i-1"}, {"instance_id": "i-2"}], done.stderr


def test_a_customer_sees_only_its_rows(lake):
    query = "SELECT instance_id FROM node_hours"
    done = cloudoptim("lake", "sql", query, "--format", "json", "--customer", MINE, **lake)
    assert json.loads(done.stdout) == [{"instance_id": "i-1"}], done.stderr


def test_parquet_keeps_types(lake, tmp_path):
    file = tmp_path / "out.parquet"
    done = cloudoptim(
        "lake", "sql", "SELECT ts, minutes FROM node_hours", "--format", "parquet", "--out", str(file), **lake
    )
    assert done.returncode == 0, done.stderr
    assert "2 rows" in done.stderr
    assert pq.read_table(file).to_pylist() == [{"ts": HOUR, "minutes": 60.0}] * 2


def test_table_is_for_people(lake):
    done = cloudoptim("lake", "sql", "SELECT count(*) AS nodes FROM node_hours", **lake)
    assert "nodes" in done.stdout
    assert "2" in done.stdout


def test_a_table_keeps_columns_of_one_name_apart(lake):
    done = cloudoptim("lake", "sql", "SELECT 1 AS a, 2 AS a, 3 AS b, '[red]' AS c", **lake)
    cells = [cell.strip() for cell in done.stdout.splitlines()[3].split("│")]
    assert cells == ["", "1", "2", "3", "[red]", ""], done.stdout


@pytest.mark.parametrize("output", ["json", "parquet"])
def test_formats_that_would_lose_a_column_ask_for_aliases(lake, output):
    done = cloudoptim("lake", "sql", "SELECT 1 AS a, 2 AS a, 3 AS b", "--format", output, **lake)
    assert "several columns are named a;" in refused(done)


def test_json_has_null_for_what_json_cannot_say(lake):
    query = "SELECT 'nan'::DOUBLE AS a, ['inf'::DOUBLE, 1.5] AS b, {'c': '-inf'::DOUBLE} AS d"
    done = cloudoptim("lake", "sql", query, "--format", "json", **lake)
    assert json.loads(done.stdout, parse_constant=pytest.fail) == [{"a": None, "b": [None, 1.5], "d": {"c": None}}]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--out", "missing/folder/x.json", "there is no folder"),
        ("--out", ".", "Is a directory"),
        ("--customer", "nonsense", "a UUID"),
        ("--as-of", "yesterday", "--as-of is 'yesterday'"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(lake, option, value, words):
    done = cloudoptim("lake", "sql", "SELECT 1 AS a", "--format", "json", option, value, **lake)
    assert words in refused(done)


def test_a_database_without_our_tables_wants_a_migration(tmp_path, empty_database_url):
    done = cloudoptim("lake", "sql", "SELECT 1", CLOUDOPTIM_HOME=str(tmp_path), DATABASE_URL=empty_database_url)
    assert "run `cloudoptim migrate`" in refused(done)


@pytest.mark.parametrize(
    ("url", "words"),
    [("postgresql://u:hush@127.0.0.1:1/x", "cannot reach Postgres"), ("hush", "is not a Postgres address")],
)
def test_a_database_that_is_none_is_named_without_its_password(tmp_path, url, words):
    done = cloudoptim("lake", "sql", "SELECT 1", CLOUDOPTIM_HOME=str(tmp_path), DATABASE_URL=url)
    line = refused(done)
    assert "DATABASE_URL" in line
    assert words in line
    assert "hush" not in line


def test_migrate_names_the_right_it_lacks(tmp_path, database_url, empty_database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE humble LOGIN PASSWORD 'a-password-of-a-test'")
        try:
            url = database_of(empty_database_url, username="humble", password="a-password-of-a-test")
            done = cloudoptim("migrate", CLOUDOPTIM_HOME=str(tmp_path), DATABASE_URL=url)
        finally:
            connection.execute("DROP ROLE humble")
    line = refused(done)
    assert "DATABASE_URL" in line
    assert "CREATEROLE" in line
    assert "a-password-of-a-test" not in line


@pytest.mark.parametrize("command", ["migrate", "doctor", "worker", "up"])
@pytest.mark.parametrize("text", ["a: [1", "- only\n- a list\n"])
def test_a_configuration_file_that_is_no_mapping_is_named_in_one_line(tmp_path, command, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    done = cloudoptim(command, CLOUDOPTIM_HOME=str(tmp_path), CLOUDOPTIM_CONFIG=str(file))
    assert f"CLOUDOPTIM_CONFIG names '{file}'" in refused(done)


def test_an_unknown_log_level_is_named_with_the_known_ones(tmp_path):
    done = cloudoptim("worker", CLOUDOPTIM_HOME=str(tmp_path), CLOUDOPTIM_LOG_LEVEL="loud")
    assert "CLOUDOPTIM_LOG_LEVEL: is 'loud'; choose one of DEBUG, INFO, WARNING, ERROR" in refused(done)


@pytest.mark.parametrize(
    "query", ["DELETE FROM node_hours", "COPY node_hours TO 'x.csv'", "SELECT nonsense FROM nowhere"]
)
def test_what_does_not_read_is_refused_in_one_line(lake, query):
    done = cloudoptim("lake", "sql", query, **lake)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("cloudoptim: ")
    assert "Traceback" not in done.stderr


def test_without_a_database_the_setting_is_named(tmp_path):
    done = cloudoptim("lake", "sql", "SELECT 1", CLOUDOPTIM_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "DATABASE_URL is not set" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_commands_find_a_running_server_through_its_home(lake, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    document = {"addresses": {"postgres": lake.pop("DATABASE_URL")}, "admin_api_key": "k"}
    (run / "addresses.json").write_text(json.dumps(document))
    query = ("lake", "sql", "SELECT count(*) AS n FROM node_hours", "--format", "json")
    with (run / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cloudoptim(*query, **lake)
    assert json.loads(done.stdout) == [{"n": 2}], done.stderr
    # A killed `up` leaves the file behind.
    assert "DATABASE_URL is not set" in refused(cloudoptim(*query, **lake))


def test_a_lake_that_cannot_be_made_is_named_in_one_line(tmp_path, database_url):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    root = str(in_the_way / "lake")
    done = cloudoptim("migrate", CLOUDOPTIM_HOME=str(tmp_path), DATABASE_URL=database_url, CLOUDOPTIM_LAKE_ROOT=root)
    assert done.returncode == 1
    assert f"CLOUDOPTIM_LAKE_ROOT: the lake at {root} cannot be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_doctor_is_content_with_a_good_machine(tmp_path, database_url, redis_url):
    done = cloudoptim(
        "doctor",
        CLOUDOPTIM_HOME=str(tmp_path),
        DATABASE_URL=database_url,
        REDIS_URL=redis_url,
        CENTRAL_SERVER_PORT="0",
        CLOUDOPTIM_DAGSTER_PORT="0",
        CLOUDOPTIM_DASHBOARDS_PORT="0",
    )
    assert done.returncode == 0, done.stdout
    assert "wrong" not in done.stdout


def test_doctor_names_what_is_wrong_and_never_a_secret(tmp_path, database_url):
    done = cloudoptim(
        "doctor",
        CLOUDOPTIM_HOME=str(tmp_path),
        DATABASE_URL=database_url.replace("cloudoptim:", "nobody:"),
        CLOUDOPTIM_SANDBOX="0",
        JWT_SECRET_KEY="changeme",
        AWS_ENDPOINT_URL="http://127.0.0.1:1",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        ML_SERVER_URL="http://127.0.0.1:1",
    )
    assert done.returncode == 1
    for words in ("refuses the password of user 'nobody'", "JWT_SECRET_KEY", "AWS", "ML server"):
        assert words in done.stdout
    password = database_url.split("@")[0].rpartition(":")[2]
    assert password not in done.stdout
    assert "changeme" not in done.stdout


def test_doctor_reports_an_unusable_home(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    done = cloudoptim("doctor", CLOUDOPTIM_HOME=str(in_the_way / "home"))
    assert done.returncode == 1
    assert "cannot write to" in done.stdout
    assert "is no folder" in done.stdout
    assert done.stderr == ""


def test_doctor_reads_the_configuration_file_as_up_does(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "CENTRAL_SERVER_PORT: 8123\nCLOUDOPTIM_SANDBOX:\nAWS_PROFILE:\nAWS_ENDPOINT_URL: http://127.0.0.1:1\n"
    )
    done = cloudoptim(
        "doctor",
        CLOUDOPTIM_HOME=str(tmp_path),
        CLOUDOPTIM_CONFIG=str(file),
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        CLOUDOPTIM_LAKE_ROOT="s3://nowhere/lake",
    )
    assert "8123" in done.stdout
    assert "because of AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL" in done.stdout
    assert "s3://nowhere/lake does not answer" in done.stdout
    assert done.stderr == ""


def test_doctor_does_not_trust_what_a_killed_up_left(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "up.lock").write_text("1")
    (run / "addresses.json").write_text(json.dumps({"addresses": {"postgres": "postgresql://nobody@127.0.0.1:1/x"}}))
    done = cloudoptim("doctor", CLOUDOPTIM_HOME=str(tmp_path))
    assert "cloudoptim up" not in done.stdout
    assert "embedded (DATABASE_URL is not set)" in done.stdout


def test_doctor_reports_addresses_that_are_none(tmp_path):
    done = cloudoptim(
        "doctor",
        CLOUDOPTIM_HOME=str(tmp_path),
        DATABASE_URL="postgresql://127.0.0.1:port/x",
        REDIS_URL="redis://127.0.0.1:port/0",
        ML_SERVER_URL="http://127.0.0.1:port",
    )
    assert done.stderr == ""
    for words in ("DATABASE_URL is not a Postgres address", "REDIS_URL is not a Redis address", "check ML_SERVER_URL"):
        assert words in done.stdout
