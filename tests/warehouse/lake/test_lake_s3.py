"""The same lake on S3, credentials and endpoint from the environment."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import date

import boto3
import duckdb
import polars as pl
import pyarrow as pa
import pytest

from tests.warehouse.lake.lake_rows import CUSTOMER_A, CUSTOMER_B, node_costs, node_hours, prices
from warehouse.lake import maintenance
from warehouse.lake.computed import parse_model, run_model
from warehouse.lake.errors import LakeQueryError, TenantScopeError
from warehouse.lake.query import PLANNED_RELEASES, LakeReader, Limits, restricted
from warehouse.lake.store import Lake, PartitionWrite

DAY_1 = {"day": "2024-01-01", "region": "us-east-1"}
DAY_2 = {"day": "2024-01-02", "region": "us-east-1"}


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """moto's server in a process of its own: delta-rs keeps the interpreter to itself while it asks S3."""
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    url = next(match[0] for line in server.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
    drain = threading.Thread(target=server.stderr.read, daemon=True)
    drain.start()
    yield url
    server.terminate()
    server.wait(20)
    drain.join(20)
    server.stderr.close()


@pytest.fixture
def lake(s3_endpoint: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"lake-{database_url.rpartition('_')[2]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
    with Lake(f"s3://{bucket}/prefix", database_url) as lake:
        lake.create_tables()
        yield lake


def publish(lake: Lake, *writes: PartitionWrite):
    return lake.publish(list(writes), run_id="test")


def test_everything_works_on_s3_as_in_a_folder(lake: Lake, reader: LakeReader) -> None:
    first = publish(
        lake, PartitionWrite("spot_prices", DAY_1, prices(1, 10)), PartitionWrite("spot_prices", DAY_2, prices(2, 5))
    )
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    counts = "SELECT CAST(day AS VARCHAR), count(*), sum(price_usd_per_hour) FROM spot_prices GROUP BY 1 ORDER BY 1"
    assert [row[:2] for row in reader.pin().frame(counts).rows()] == [("2024-01-01", 3), ("2024-01-02", 5)]
    assert [row[:2] for row in reader.pin(first.id).frame(counts).rows()] == [("2024-01-01", 10), ("2024-01-02", 5)]
    filtered = "SELECT count(*) AS n FROM spot_prices WHERE day = $day AND ts >= $day AND price_usd_per_hour < 1"
    assert reader.query(filtered, {"day": date(2024, 1, 2)}).to_pylist() == [{"n": 5}]

    lake.add_column("spot_prices", pa.field("volatility", pa.float64()))
    publish(lake, PartitionWrite("spot_prices", DAY_2, prices(2, 2).with_columns(volatility=0.5)))
    assert reader.query("SELECT count(*) AS n, count(volatility) AS v FROM spot_prices").to_pylist() == [
        {"n": 5, "v": 2}
    ]
    publish(lake, PartitionWrite("spot_prices", DAY_1, None))
    assert reader.query("SELECT count(*) AS n FROM spot_prices").to_pylist() == [{"n": 2}]


def test_customers_stay_apart_on_s3(lake: Lake, reader: LakeReader) -> None:
    hours = pl.concat([node_hours(CUSTOMER_A, 1, 24), node_hours(CUSTOMER_B, 1, 10)])
    costs = pl.concat([node_costs(CUSTOMER_A, 1, 24, price="0.1"), node_costs(CUSTOMER_B, 1, 10, price="0.2")])
    publish(lake, PartitionWrite("node_hours", DAY_1, hours), PartitionWrite("node_cost_hourly", DAY_1, costs))
    joined = "SELECT count(*) AS n FROM node_hours JOIN node_cost_hourly USING (customer_id, instance_id, ts)"
    assert reader.query(joined, {"customer_id": CUSTOMER_B}).to_pylist() == [{"n": 10}]
    assert reader.query(joined, all_customers=True).to_pylist() == [{"n": 34}]
    with pytest.raises(TenantScopeError):
        reader.query(joined)
    for text in (
        "SELECT count(*) FROM dataset_node_hours",
        'SELECT count(*) FROM "node_hours of everybody"',
        "SELECT count(*) FROM temp.main.node_hours",
        "SELECT count(*) FROM query_table('node_hours of everybody')",
    ):
        with pytest.raises(LakeQueryError):
            reader.query(text, {"customer_id": CUSTOMER_B})


def test_a_reader_forgets_old_releases_on_s3(lake: Lake, reader: LakeReader) -> None:
    releases = [
        publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, rows))) for rows in range(1, PLANNED_RELEASES + 4)
    ]
    for _ in range(2):
        for rows, release in enumerate(releases, start=1):
            assert reader.pin(release.id).query("SELECT count(*) AS n FROM spot_prices").to_pylist() == [{"n": rows}]
    assert len(reader._planned) == PLANNED_RELEASES
    assert len(reader._plans) == len(releases[-1].versions) - 1 + PLANNED_RELEASES
    assert not reader._in_use


def test_models_and_asof_joins_run_on_s3(lake: Lake, reader: LakeReader) -> None:
    publish(
        lake,
        PartitionWrite("spot_prices", DAY_1, prices(1, 1, price="0.05")),
        PartitionWrite("node_hours", DAY_1, node_hours(CUSTOMER_A, 1, 24)),
    )
    model = parse_model(
        "cost",
        """-- Cost.
        -- table: node_cost_hourly
        """.replace("        ", "")
        + "-- grain: node and hour\n-- units: USD\n-- keys: customer_id, cluster_id, instance_id, ts\n"
        "SELECT h.* EXCLUDE (product, cpu_cores, memory_bytes, day, region), p.price_usd_per_hour, "
        "p.price_usd_per_hour AS actual_usd, 'spot_as_of' AS price_basis FROM node_hours h ASOF JOIN spot_prices p "
        "ON h.zone_id = p.zone_id AND h.instance_type = p.instance_type AND h.ts >= p.ts",
    )
    assert run_model(lake, reader.pin(), model, DAY_1, run_id="r").rows == 24
    total = reader.query("SELECT CAST(sum(actual_usd) AS VARCHAR) AS usd FROM node_cost_hourly", all_customers=True)
    assert total.to_pylist() == [{"usd": "1.20000000"}]


def test_a_persons_text_on_s3_reads_the_tables_and_nothing_else(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 4)))
    with restricted(reader.pin(), Limits()) as db:
        assert db.execute("SELECT count(*) FROM spot_prices").fetchall() == [(4,)]
        for text in ("SELECT * FROM read_text('/etc/passwd')", "COPY (SELECT 1) TO '/tmp/x.csv'"):
            with pytest.raises(duckdb.Error):
                db.execute(text)
    with pytest.raises(LakeQueryError):
        reader.query("SELECT * FROM read_text('/etc/passwd')")


def test_vacuum_and_compaction_on_s3(lake: Lake, reader: LakeReader) -> None:
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 1)))
    kept = publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 2)))
    lake.keep(kept.id)
    publish(lake, PartitionWrite("spot_prices", DAY_1, prices(1, 3)))
    report = maintenance.vacuum(lake, retention_hours=0)
    assert len(report.files["spot_prices"]) == 1
    assert reader.pin(kept.id).query("SELECT count(*) AS n FROM spot_prices").to_pylist() == [{"n": 2}]
    assert maintenance.compact(lake, reader, "spot_prices", run_id="c") == []


def test_two_writers_on_s3_need_no_lock_but_postgres(lake: Lake, database_url: str) -> None:
    failures: list[BaseException] = []

    def write(day: int) -> None:
        try:
            with Lake(lake.storage.root, database_url) as writer:
                for rows in range(1, 6):
                    partition = {"day": f"2024-01-0{day}", "region": "us-east-1"}
                    publish(writer, PartitionWrite("spot_prices", partition, prices(day, rows)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(day,)) for day in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert lake.delta_table("spot_prices").count() == 10
    assert lake.release().versions["spot_prices"] == 10
