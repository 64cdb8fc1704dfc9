"""Spot prices through the asset: over HTTP from the price endpoint, into a real lake and a real Postgres."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from dagster._core.errors import DagsterAssetCheckFailedError

from cloudoptim_pipelines.defs.spot_prices import shape
from cloudoptim_pipelines.partitions import DayRange
from control.sandbox.aws import Fault
from tests.pipelines.conftest import NOW, World, at, hourly, price

KEYS = "2026-11-18|us-east-1", "2026-11-20|us-east-1"


def some_prices() -> list[dict]:
    """Two pools of one region that change every few hours, one pool of another."""
    prices = [
        price(when, "m5.large", 0.03 + 0.0001 * i)
        for i, when in enumerate(hourly(at(15, 22), at(20, 11), timedelta(hours=3)))
    ]
    prices += [
        price(when, "m5.large", 0.05, zone="use1-az2") for when in hourly(at(17, 5), at(20, 11), timedelta(hours=11))
    ]
    prices += [
        price(when, "c5.large", 0.04, zone="euw1-az1", region="eu-west-1") for when in hourly(at(18, 1), at(20, 1))
    ]
    return prices


def test_the_lake_holds_exactly_the_records_of_the_days(world: World, serve) -> None:
    serve(some_prices())
    result = world.run(["spot_prices"], *KEYS)
    expected = sorted(
        (p["timestamp"], p["availability_zone"], Decimal(str(round(p["price_usd"], 6))))
        for p in some_prices()
        if p["region"] == "us-east-1" and p["timestamp"] >= at(18)
    )
    rows = world.query("SELECT * FROM spot_prices WHERE day >= $first", first=at(18).date())
    assert sorted((r["ts"], r["zone_id"], r["price_usd_per_hour"].normalize()) for r in rows) == [
        (ts, zone, usd.normalize()) for ts, zone, usd in expected
    ]
    assert {r["region"] for r in rows} == {"us-east-1"}
    # The day's own rows were observed as they happened, older ones fetched from the history.
    assert {r["source"] for r in rows if r["ts"] >= NOW - shape.OBSERVED_WITHIN} == {"observed"}
    assert {r["source"] for r in rows if r["ts"] < NOW - shape.OBSERVED_WITHIN} == {"aws_history"}
    metadata = result.asset_materializations_for_node("spot_prices")[0].metadata
    assert metadata["dagster/partition_row_count"].value == len(rows)
    assert metadata["rows_rejected"].value == 0


def test_the_current_price_is_the_newest_also_when_it_changed_before_the_window(world: World, serve) -> None:
    serve([price(at(12, 3), "m5.large", 0.031), price(at(20, 9), "m5.large", 0.044, zone="use1-az2")])
    world.run(["spot_prices"], "2026-11-20|us-east-1")
    current = world.sql("SELECT zone_id, price_usd_per_hour, effective_at FROM spot_price_current ORDER BY zone_id")
    assert [(row["zone_id"], row["price_usd_per_hour"], row["effective_at"]) for row in current] == [
        ("use1-az1", Decimal("0.03100000"), at(12, 3)),
        ("use1-az2", Decimal("0.04400000"), at(20, 9)),
    ]


def test_the_price_in_force_is_kept_in_its_own_day_which_stays_a_gap(world: World, serve) -> None:
    serve(
        [price(at(12, 3), "m5.large", 0.031), price(at(12, 4), "m5.large", 0.033), price(at(20, 9), "m5.large", 0.04)]
    )
    for _ in range(2):
        world.run(["spot_prices"], "2026-11-20|us-east-1")
    rows = world.query("SELECT ts, price_usd_per_hour AS usd, source FROM spot_prices ORDER BY ts")
    assert [(r["ts"], float(r["usd"]), r["source"]) for r in rows] == [
        (at(12, 4), 0.033, "aws_history"),
        (at(20, 9), 0.04, "observed"),
    ]
    assert [r["partition_key"] for r in world.sql("SELECT partition_key FROM partition_coverage")] == [
        "2026-11-20|us-east-1"
    ]
    # Reading that day brings the rest of it, and the day after it the price at its midnight.
    world.run(["spot_prices"], "2026-11-12|us-east-1")
    assert [
        r["ts"].hour for r in world.query("SELECT ts FROM spot_prices WHERE day = $d ORDER BY ts", d=at(12).date())
    ] == [3, 4]


def test_a_day_that_aws_has_half_forgotten_stays_as_covered_as_it_was(world: World, serve) -> None:
    prices = [
        price(at(17, 22), "m5.large", 0.03),
        price(at(18, 3), "m5.large", 0.04),
        price(at(18, 9), "m5.large", 0.05),
    ]
    serve(prices)
    world.run(["spot_prices"], "2026-11-18|us-east-1")
    coverage = (
        "SELECT covered_from, covered_until, present_points FROM partition_coverage WHERE partition_key LIKE '%18|%'"
    )
    once, content = world.sql(coverage), world.content("spot_prices")
    assert once[0]["present_points"] == 24 * 60
    serve(prices[2:])
    world.run(["spot_prices"], "2026-11-18|us-east-1")
    assert world.sql(coverage) == once
    assert world.content("spot_prices") == content


def test_a_list_price_that_changes_at_noon_leaves_the_morning_as_it_was(world: World, serve) -> None:
    listed = {"m5.large": [(at(1), 0.096), (at(20, 12), 0.09)]}
    found = "SELECT ts, price_usd_per_hour AS usd FROM on_demand_prices WHERE instance_type = 'm5.large' ORDER BY ts"
    for hour, wanted in ((8, [(at(20), 0.096)]), (13, [(at(20), 0.096), (at(20, 12), 0.09)])):
        world.now = at(20, hour)
        serve([price(at(20, 1), "m5.large", 0.03)], listed)
        world.run(["on_demand_prices"], "2026-11-20|us-east-1")
        assert [(row["ts"], float(row["usd"])) for row in world.query(found)] == wanted


def test_a_region_without_a_price_list_holds_up_no_other(world: World, serve) -> None:
    serve([price(at(20, 1), "m5.large", 0.03)])
    assert world.aws is not None
    denied = "You are not authorized to perform: pricing:GetProducts"
    world.aws.inject(
        Fault("error", action="GetProducts", count=1, code="AccessDeniedException", message=denied, status=400)
    )
    with pytest.raises(dg.Failure, match=r"eu-west-1: .*not authorized to perform: pricing:GetProducts"):
        world.run(["on_demand_prices"], "2026-11-20|eu-west-1", "2026-11-20|us-east-1")
    assert world.query("SELECT DISTINCT region FROM on_demand_prices") == [{"region": "us-east-1"}]
    assert world.sql("SELECT partition_key FROM partition_coverage") == [{"partition_key": "2026-11-20|us-east-1"}]


def test_an_older_day_does_not_take_back_the_current_price(world: World, serve) -> None:
    serve(some_prices())
    world.run(["spot_prices"], KEYS[1])
    newest = world.sql("SELECT * FROM spot_price_current ORDER BY zone_id")
    world.run(["spot_prices"], KEYS[0])
    assert [row["price_usd_per_hour"] for row in world.sql("SELECT * FROM spot_price_current ORDER BY zone_id")] == [
        row["price_usd_per_hour"] for row in newest
    ]


def test_one_run_covers_days_and_regions(world: World, serve) -> None:
    serve(some_prices())
    world.run(["spot_prices"], "2026-11-18|eu-west-1", "2026-11-19|us-east-2")
    assert {
        row["day"].day for row in world.query("SELECT DISTINCT day FROM spot_prices WHERE region = 'eu-west-1'")
    } == {18, 19}
    covered = world.sql("SELECT partition_key, present_points FROM partition_coverage ORDER BY 1")
    assert [row["partition_key"] for row in covered] == [
        f"2026-11-{day}|{region}" for day in (18, 19) for region in ("eu-west-1", "us-east-1", "us-east-2")
    ]


def test_running_a_partition_again_changes_nothing(world: World, serve) -> None:
    serve(some_prices())
    world.run(["spot_prices"], *KEYS)
    once = world.content("spot_prices")
    # The third run starts from what a run that changed nothing leaves, as every later one does.
    for _ in range(2):
        world.run(["spot_prices"], *KEYS)
        assert world.content("spot_prices") == once


def test_runs_of_one_partition_in_parallel_leave_what_one_leaves(world: World, serve) -> None:
    serve(some_prices())
    world.run(["spot_prices"], *KEYS)
    once = world.content("spot_prices")
    failures: list[BaseException] = []

    def again() -> None:
        try:
            assert world.run(["spot_prices"], *KEYS).success
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert world.content("spot_prices") == once


KILLED = """
import sys
sys.path.insert(0, {root!r})
import cloudoptim_pipelines.defs.spot_prices.assets as assets
assets.CHUNK_DAYS = 1
done = assets._ingest
def slow(*args):
    outcome = done(*args)
    print("chunk", flush=True)
    sys.stdin.readline()
    return outcome
assets._ingest = slow
from tests.pipelines.conftest import World
from datetime import datetime
from pathlib import Path
World({dsn!r}, Path({folder!r}), {endpoint!r}, datetime.fromisoformat({now!r})).run(["spot_prices"], *{keys!r})
"""


def test_a_run_killed_half_way_is_made_good_by_the_next(world: World, serve, database_url: str) -> None:
    serve(some_prices())
    script = KILLED.format(
        root=str(Path.cwd()),
        dsn=world.dsn,
        folder=str(world.folder),
        endpoint=world.endpoint,
        now=world.now.isoformat(),
        keys=KEYS,
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "chunk\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGKILL)
    half = world.query("SELECT count(DISTINCT day) AS days FROM spot_prices")[0]["days"]
    assert 0 < half < 3, "the run was to be killed between its first and its last day"
    started = time.monotonic()
    world.run(["spot_prices"], *KEYS)
    assert time.monotonic() - started < 30, "the dead run's locks ended with it"
    assert world.content("spot_prices") == clean_content(world, serve)


def clean_content(world: World, serve) -> str:
    """What one undisturbed run leaves, in a lake of its own."""
    import psycopg

    from warehouse.lake.store import Lake

    with psycopg.connect(world.dsn) as connection:
        connection.execute("TRUNCATE lake_releases, partition_coverage, data_gaps")
    fresh = World(world.dsn, world.folder / "fresh", world.endpoint, world.now)
    with Lake(fresh.folder / "lake", world.dsn) as lake:
        lake.create_tables()
    fresh.run(["spot_prices"], *KEYS)
    return fresh.content("spot_prices")


def test_what_was_observed_stays_when_the_history_says_otherwise_or_forgot(world: World, serve) -> None:
    serve([price(at(20, 1), "m5.large", 0.030), price(at(20, 2), "m5.large", 0.031)])
    world.run(["spot_prices"], "2026-11-20|us-east-1")
    world.now = at(20) + timedelta(days=100)
    serve([price(at(20, 2), "m5.large", 0.099), price(at(20, 3), "m5.large", 0.032)])
    world.run(["spot_prices"], "2026-11-20|us-east-1")
    rows = world.query("SELECT ts, price_usd_per_hour AS usd, source FROM spot_prices ORDER BY ts")
    assert [(r["ts"].hour, r["usd"], r["source"]) for r in rows] == [
        (1, Decimal("0.03000000"), "observed"),
        (2, Decimal("0.03100000"), "observed"),
        (3, Decimal("0.03200000"), "aws_history"),
    ]


def test_prices_no_market_can_have_are_refused_counted_and_shown(world: World, serve) -> None:
    bad = [price(at(20, 1), "m5.large", 0.0), price(at(20, 3), "m5.large", 96.0)]
    serve([price(at(20, 2), "m5.large", 0.03), *bad], {"m5.large": 0.096})
    world.run(["on_demand_prices"], "2026-11-20|us-east-1")
    result = world.run(["spot_prices"], "2026-11-20|us-east-1")
    metadata = result.asset_materializations_for_node("spot_prices")[0].metadata
    rejected = metadata["rejected"]
    assert isinstance(rejected, dg.TableMetadataValue)
    reasons = {record.data["reason"]: record.data["rows"] for record in rejected.records}
    assert reasons == {"not_positive": 1, "over_50x_on_demand": 1}
    assert [row["price_usd_per_hour"] for row in world.query("SELECT * FROM spot_prices")] == [Decimal("0.03000000")]


RAW: dict[str, Any] = {
    "ts": pl.Datetime("us", "UTC"),
    "region": pl.String,
    "zone_id": pl.String,
    "availability_zone": pl.String,
    "instance_type": pl.String,
    "product": pl.String,
    "price_usd_per_hour": pl.String,
}
LISTED = pl.DataFrame({"instance_type": ["m5.large"], "list_price": [0.096]})


def raw(*prices: str) -> pl.DataFrame:
    """Records with these price texts, an hour apart."""
    rows = [
        (at(20, i), "us-east-1", "use1-az1", "us-east-1a", "m5.large", "Linux/UNIX", p) for i, p in enumerate(prices)
    ]
    return pl.DataFrame(rows, schema=RAW, orient="row")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "not_a_number"),
        ("NaN", "not_a_number"),
        ("inf", "not_a_number"),
        ("0,0123", "not_a_number"),
        ("0", "not_positive"),
        ("-1", "not_positive"),
        ("1e9", "over_50x_on_demand"),
        ("0.012345678901", "too_many_decimals"),
    ],
)
def test_a_price_that_is_none_is_refused_and_its_neighbours_are_kept(given: str, reason: str) -> None:
    cleaned = shape.clean(raw("0.0031", given, "0.003100"), fetched_at=NOW, list_prices=LISTED)
    assert cleaned.rejected == {reason: 1}
    assert repr(given) in cleaned.examples[reason]
    assert cleaned.rows["price_usd_per_hour"].to_list() == [0.0031, 0.0031]


def test_exact_doubles_are_absorbed_and_a_second_price_for_one_moment_is_counted() -> None:
    twice = pl.concat([raw("0.03"), raw("0.03"), raw("0.04")])
    cleaned = shape.clean(twice, fetched_at=NOW, list_prices=LISTED)
    assert cleaned.rows["price_usd_per_hour"].to_list() == [0.04]
    assert cleaned.rejected == {"second_price_same_time": 1}


def test_unknown_types_and_products_are_stored() -> None:
    odd = raw("0.03").with_columns(instance_type=pl.lit("zz9.plural"), product=pl.lit("Red Hat BYOL Linux"))
    assert shape.clean(odd, fetched_at=NOW, list_prices=LISTED).rows.height == 1


def test_a_snapshot_is_told_from_changes_that_meet_by_chance() -> None:
    rows = pl.concat([raw("0.03").with_columns(zone_id=pl.lit(f"use1-az{i}")) for i in range(1, 5)])
    rows = pl.concat([rows, raw("0.03", "0.031").with_columns(zone_id=pl.lit("use1-az1"))])
    cleaned = shape.clean(rows, fetched_at=NOW, list_prices=LISTED).rows
    days = DayRange(at(20).date(), at(20).date())
    fact = shape.day_facts(cleaned, "us-east-1", days, asked_until=NOW, priced_before=True)[0]
    assert fact.snapshots == [at(20, 0)]
    assert (fact.start, fact.end) == (at(20), NOW)


def test_a_day_without_any_earlier_price_is_covered_from_its_first_price_on(world: World, serve) -> None:
    serve([price(at(18, 7, 12), "m5.large", 0.03), price(at(19, 1), "m5.large", 0.031)])
    world.run(["spot_prices"], "2026-11-18|us-east-1", "2026-11-19|us-east-1")
    covered = world.sql("SELECT covered_from, covered_until FROM partition_coverage ORDER BY partition_key")
    assert [(row["covered_from"], row["covered_until"]) for row in covered] == [
        (at(18, 7, 12), at(19)),
        (at(19), at(20)),
    ]


def test_checks_pass_on_a_market_and_fail_on_a_stub(world: World, serve) -> None:
    serve(some_prices())
    world.run(["on_demand_prices"], "2026-11-20|us-east-1")
    result = world.run(["spot_prices"], *KEYS, checks=True)
    passed = {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
    assert passed["prices_are_sane"]
    pools = [f"t{i}.large" for i in range(12)]
    serve([price(at(20, 5), pool, 0.00001) for pool in pools])
    world.sql("DELETE FROM partition_coverage")
    with pytest.raises(DagsterAssetCheckFailedError, match="prices_are_sane"):
        stub_only(world).run(["spot_prices"], "2026-11-20|us-east-1", checks=True)


def stub_only(world: World) -> World:
    """The same feed into an empty lake."""
    import psycopg

    from warehouse.lake.store import Lake

    with psycopg.connect(world.dsn) as connection:
        connection.execute("TRUNCATE lake_releases")
    fresh = World(world.dsn, world.folder / "stub", world.endpoint, world.now)
    with Lake(fresh.folder / "lake", world.dsn) as lake:
        lake.create_tables()
    return fresh
