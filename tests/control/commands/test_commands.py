"""`cloudoptim lake sql` and `doctor` as a person types them."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from uuid import UUID

import polars as pl
import pyarrow.parquet as pq
import pytest

from warehouse.lake.store import Lake, PartitionWrite

MINE, OTHER = str(UUID(int=1)), str(UUID(int=2))
HOUR = datetime(2024, 5, 1, 10, tzinfo=UTC)


def cloudoptim(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "control.cli", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


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
    done = cloudoptim("lake", "sql", "SELECT count(*) AS n FROM node_hours", "--format", "json", **lake)
    assert json.loads(done.stdout) == [{"n": 2}], done.stderr


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
