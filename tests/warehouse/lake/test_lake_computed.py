"""Computed tables: SQL files with a header, run on a pinned release, streamed into the lake."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from importlib import resources
from pathlib import Path

import polars as pl
import pytest

from tests.warehouse.lake.lake_rows import CUSTOMER_A, CUSTOMER_B, node_hours, prices
from warehouse.lake.computed import load_model, parse_model, run_model, stage_model
from warehouse.lake.errors import LakeDataError, LakeQueryError
from warehouse.lake.query import LakeReader
from warehouse.lake.store import Lake, PartitionWrite
from warehouse.lake.tables import TABLES

DAY_1 = {"day": "2024-01-01", "region": "us-east-1"}
HEADER = """-- What each node cost.
-- table: node_cost_hourly
-- grain: one row per node and hour
-- units: USD
-- keys: customer_id, cluster_id, instance_id, ts
"""
COST = (
    HEADER
    + """
SELECT h.ts, h.customer_id, h.cluster_id, h.node_name, h.instance_id, h.zone_id, h.instance_type, h.lifecycle,
       h.minutes, p.price_usd_per_hour, CAST(h.minutes / 60 * p.price_usd_per_hour AS DECIMAL(18, 8)) AS actual_usd,
       'spot_as_of' AS price_basis, 'observed' AS source
FROM node_hours h ASOF LEFT JOIN spot_prices p
  ON h.zone_id = p.zone_id AND h.instance_type = p.instance_type AND h.ts >= p.ts
WHERE h.day = $day AND h.region = 'us-east-1'
"""
)


@pytest.fixture
def filled(lake: Lake) -> Lake:
    hours = pl.concat([node_hours(CUSTOMER_A, 1, 24), node_hours(CUSTOMER_B, 1, 6)])
    lake.publish(
        [
            PartitionWrite("spot_prices", DAY_1, prices(1, 1, price="0.05")),
            PartitionWrite("node_hours", DAY_1, hours),
        ],
        run_id="fill",
    )
    return lake


def test_a_model_is_computed_from_a_pinned_release_and_published(filled: Lake, reader: LakeReader) -> None:
    pinned = reader.pin()
    filled.publish([PartitionWrite("node_hours", DAY_1, None)], run_id="later")
    release = run_model(
        filled, pinned, parse_model("cost", COST), DAY_1, {"day": date(2024, 1, 1)}, run_id="r", code_version="1"
    )
    assert release.rows == 30
    assert (release.run_id, release.code_version, release.note) == ("r", "1", "model cost")
    total = reader.query("SELECT sum(actual_usd) AS usd FROM node_cost_hourly", all_customers=True)["usd"][0].as_py()
    assert total == Decimal("1.50000000")


def test_computing_twice_from_one_release_is_identical(filled: Lake, reader: LakeReader) -> None:
    pinned, model = reader.pin(), parse_model("cost", COST)
    contents = []
    for run_id in ("one", "two"):
        run_model(filled, pinned, model, DAY_1, {"day": date(2024, 1, 1)}, run_id=run_id)
        contents.append(reader.query("SELECT * FROM node_cost_hourly ORDER BY ALL", all_customers=True))
    assert contents[0].equals(contents[1])


def test_a_key_that_occurs_twice_is_refused(filled: Lake, reader: LakeReader) -> None:
    doubled = COST.replace("FROM node_hours h", "FROM (FROM node_hours UNION ALL FROM node_hours) h")
    before = filled.release()
    with pytest.raises(LakeDataError, match=r"key \(customer_id, cluster_id, instance_id, ts\) occurs 2 times"):
        stage_model(filled, reader.pin(), parse_model("cost", doubled), DAY_1, {"day": date(2024, 1, 1)})
    assert filled.release() == before
    assert list(Path(filled.storage.uri("node_cost_hourly")).glob("day=*/**/*.parquet")) == []


def test_a_model_may_read_frames_of_its_caller(filled: Lake, reader: LakeReader) -> None:
    text = HEADER.replace("node_cost_hourly", "node_hours") + "SELECT * EXCLUDE (day, region) FROM nodes"
    staged = stage_model(
        filled,
        reader.pin(),
        parse_model("hours", text),
        DAY_1,
        inputs={"nodes": node_hours(CUSTOMER_A, 1, 3).with_columns(day=None, region=None)},
    )
    assert filled.publish([staged], run_id="r").rows == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-- grain: x\n-- units: y\n-- keys: z\nSELECT 1", "lacks a sentence"),
        ("-- What it is.\n-- units: y\n-- keys: z\nSELECT 1", "lacks grain"),
        ("-- What it is.\nSELECT 1", "lacks grain, units, keys"),
    ],
)
def test_a_header_must_say_what_the_table_is(text: str, message: str) -> None:
    with pytest.raises(LakeDataError, match=message):
        parse_model("broken", text)


def test_a_model_is_one_reading_statement() -> None:
    with pytest.raises(LakeQueryError, match="exactly one statement"):
        parse_model("two", HEADER + "SELECT 1; SELECT 2")
    with pytest.raises(LakeQueryError, match="only reading is allowed"):
        parse_model("copy", HEADER + "COPY (SELECT 1) TO 'x'")


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(LakeDataError, match="no model 'nothing'"):
        load_model("nothing")


def test_every_model_named_like_a_table_has_its_keys() -> None:
    names = sorted(
        file.name.removesuffix(".sql")
        for file in (resources.files("warehouse.lake") / "models").iterdir()
        if file.name.endswith(".sql")
    )
    models = {name: load_model(name) for name in names}  # every header is complete, every text only reads
    assert {name: model.keys for name, model in models.items() if name in TABLES} == {
        name: TABLES[name].keys for name in names if name in TABLES
    }
