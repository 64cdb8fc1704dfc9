"""Which hours count: those whose prices were read and whose agent was there; what comes late makes them count."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from cloudoptim_pipelines.definitions import defs
from cloudoptim_pipelines.defs.metrics.automation import stale_stretches
from tests.pipelines.conftest import Tenant, World, add_nodes, add_tenant, at, hourly, price
from tests.pipelines.test_metrics import every, send
from warehouse.postgres.models import DataGap, DirtyPartition, new_id

COSTS = ["node_hours", "node_cost_hourly", "cluster_cost_hourly"]
ON_DEMAND = {"m5.large": 0.096, "c5.large": 0.085}
MINUTE = timedelta(minutes=1)
DAY = "2026-11-18"
KEY = f"{DAY}|us-east-1"
# On the 18th the price doubles at five in the morning.
PRICES = [
    *(price(when, "m5.large", 0.03) for when in hourly(at(17), at(18, 4))),
    *(price(when, "m5.large", 0.06) for when in hourly(at(18, 5), at(20, 12))),
]


@pytest.fixture
def tenant(world: World, serve) -> Tenant:
    """A cluster, its prices served, those of the 17th read."""
    serve(PRICES, ON_DEMAND)
    world.run(["on_demand_prices"], "2026-11-17|us-east-1", "2026-11-20|us-east-1")
    world.run(["spot_prices"], "2026-11-17|us-east-1")
    return add_tenant(world)


def read_prices(world: World, first: str, last: str | None = None, *, now: datetime | None = None) -> None:
    """Spot prices of the days, as they are read at a moment."""
    usual, world.now = world.now, now or world.now
    world.run(["spot_prices"], f"{first}|us-east-1", f"{last or first}|us-east-1")
    world.now = usual


def complete(world: World, tenant: Tenant, day: int = 18) -> list[int]:
    """The complete hours of a day."""
    rows = world.query(
        "SELECT ts FROM cluster_cost_hourly WHERE complete AND day = $day AND cluster_id = $id ORDER BY ts",
        day=at(day).date(),
        id=str(tenant.cluster_id),
    )
    return [row["ts"].hour for row in rows]


def marked(world: World) -> list[tuple[str, str]]:
    """Stale partitions."""
    return [
        (row["table_name"], row["partition_key"])
        for row in world.sql("SELECT table_name, partition_key FROM dirty_partitions ORDER BY 1, 2")
    ]


def whole_day(tenant: Tenant, number: int, **changes: Any) -> dict[str, Any]:
    """A node that runs the day through, and more."""
    return tenant.node(number, "m5.large", at(17), at(20), **changes)


def test_a_day_whose_prices_nobody_read_counts_no_hour_on_spot_until_they_are_read(
    world: World, tenant: Tenant
) -> None:
    listed = add_tenant(world)
    add_nodes(world, whole_day(tenant, 1), whole_day(listed, 2, node_type="on-demand"))
    read_prices(world, "2026-11-19", "2026-11-20")
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-17", "2026-11-19")
    assert complete(world, tenant) == []
    assert [complete(world, tenant, day) for day in (17, 19)] == [list(range(24))] * 2
    assert complete(world, listed) == list(range(24)), "on-demand hours need no Spot price"

    read_prices(world, DAY)
    assert ("node_cost_hourly", DAY) in marked(world)
    world.run([*COSTS, "interruptions", "savings_daily"], DAY)
    assert ("node_cost_hourly", DAY) not in marked(world)
    assert complete(world, tenant) == list(range(24))
    (saved,) = world.query(
        "SELECT actual_usd, coverage_ratio FROM savings_daily WHERE day = $day AND cluster_id = $id",
        day=at(18).date(),
        id=str(tenant.cluster_id),
    )
    assert (saved["actual_usd"], saved["coverage_ratio"]) == (5 * Decimal("0.03") + 19 * Decimal("0.06"), 1.0)


def test_a_day_read_in_part_counts_the_hours_that_were_read(world: World, tenant: Tenant) -> None:
    add_nodes(world, whole_day(tenant, 1))
    read_prices(world, DAY, now=at(18, 9, 30))
    read_prices(world, "2026-11-19", "2026-11-20")
    world.run(COSTS, DAY)
    assert complete(world, tenant) == list(range(9))


def test_a_day_without_coverage_is_seen_before_the_ledger_knows(world: World, tenant: Tenant) -> None:
    add_nodes(world, whole_day(tenant, 1))
    read_prices(world, DAY, "2026-11-20")
    world.run(COSTS, DAY)
    assert complete(world, tenant) == list(range(24))
    world.sql("DELETE FROM partition_coverage WHERE partition_key = :key", key=KEY)
    world.run(COSTS, DAY)
    assert complete(world, tenant) == []


@pytest.mark.parametrize(
    ("reason", "state", "region", "counts"),
    [
        ("no_scrape", "open", "us-east-1", False),
        ("too_old", "unfillable", "us-east-1", False),
        ("api_error", "filling", "us-east-1", False),
        ("no_scrape", "filled", "us-east-1", True),
        ("did_not_exist", "unfillable", "us-east-1", True),
        ("no_scrape", "open", "eu-west-1", True),
    ],
)
def test_a_gap_counts_against_the_hours_it_touches(
    world: World, tenant: Tenant, reason: str, state: str, region: str, counts: bool
) -> None:
    add_nodes(world, whole_day(tenant, 1))
    read_prices(world, DAY, "2026-11-20")
    gap = {
        "id": new_id(),
        "table_name": "spot_prices",
        "series": region,
        "partition_key": f"{DAY}|{region}",
        "gap_start": at(18, 7, 10),
        "gap_end": at(18, 9, 10),
        "expected_points": 4,
        "missing_points": 1,
        "reason": reason,
        "state": state,
    }
    world.insert(DataGap, gap)
    world.run(COSTS, DAY)
    assert set(range(24)) - set(complete(world, tenant)) == (set() if counts else {7, 8, 9})


def test_an_hour_counts_as_soon_as_it_is_over_though_its_last_minutes_are_read_later(
    world: World, tenant: Tenant
) -> None:
    add_nodes(world, tenant.node(1, "m5.large", at(17), last_seen_at=at(20, 12)))
    read_prices(world, DAY, "2026-11-19", now=at(20))
    read_prices(world, "2026-11-20", now=at(20, 10, 5))
    world.now = at(20, 11, 2)
    world.run(COSTS, "2026-11-20")
    assert complete(world, tenant, 20) == list(range(11))
    # Nothing read for hours: what was not read is missing, without any run that says so.
    world.now = at(20, 14, 16)
    world.sql("UPDATE nodes SET last_seen_at = :at", at=world.now)
    world.run(COSTS, "2026-11-20")
    # The last two hours may still be read in their turn, as far as the ledger's grace goes.
    assert complete(world, tenant, 20) == [*range(10), 13]


def test_hours_of_late_samples_count_and_those_of_made_up_windows_do_not(world: World, tenant: Tenant) -> None:
    samples = every(MINUTE, at(18), at(19))
    late = [sample for sample in samples if at(18, 9, 20) <= sample[0] < at(18, 9, 40)]
    never = [sample for sample in samples if at(18, 14, 20) <= sample[0] < at(18, 14, 35)]
    send(world, tenant, [sample for sample in samples if sample not in late + never])
    add_nodes(world, whole_day(tenant, 1, node_type="on-demand"))
    world.run(["metric_5m", *COSTS], DAY)
    assert set(range(24)) - set(complete(world, tenant)) == {9, 14}

    # A fill makes up both holes; then the samples of one arrive after all.
    fill_id = "0192f0c0-0000-7000-8000-000000000001"
    world.sql(
        "INSERT INTO gap_fills (id, requested_by, table_name, partitions, created_at) "
        "VALUES (:id, 'test', 'metric_5m', to_jsonb(ARRAY[CAST(:day AS text)]), now())",
        id=fill_id,
        day=DAY,
    )
    world.run(["metric_5m"], DAY, tags={"cloudoptim/fill_id": fill_id})
    assert {row["state"] for row in world.sql("SELECT state FROM data_gaps WHERE reason = 'agent_away'")} == {"filled"}
    world.run(COSTS, DAY)
    assert set(range(24)) - set(complete(world, tenant)) == {9, 14}
    send(world, tenant, late)
    world.run(["metric_5m", *COSTS], DAY)
    assert set(range(24)) - set(complete(world, tenant)) == {14}


def test_what_is_missing_otherwise_than_before_makes_the_days_costs_stale_once(world: World, tenant: Tenant) -> None:
    read_prices(world, DAY, "2026-11-20")
    world.sql("DELETE FROM dirty_partitions")
    world.run_unpartitioned(["data_gaps"])
    assert marked(world) == []
    world.sql("DELETE FROM partition_coverage WHERE partition_key = :key", key=KEY)
    world.run_unpartitioned(["data_gaps"])
    assert marked(world) == [("node_cost_hourly", DAY)]
    world.run(COSTS, DAY)
    world.run_unpartitioned(["data_gaps"])
    assert marked(world) == []


def stale_at(world: World, now: datetime) -> list[tuple[int, int]]:
    """The stretches of days of November that are computed again at a moment."""
    warehouse = world.warehouse()
    try:
        with warehouse.database.system() as connection:
            return [(days.first.day, days.last.day) for days in stale_stretches(connection, now)]
    finally:
        warehouse.close()


def test_stale_metrics_and_stale_costs_are_computed_again_when_their_day_is_closed(world: World) -> None:
    assert stale_at(world, at(20, 12)) == []
    for table, day in [("metric_5m", 12), ("node_cost_hourly", 12), ("node_cost_hourly", 13), ("metric_5m", 19)]:
        world.insert(
            DirtyPartition, {"table_name": table, "partition_key": f"2026-11-{day}", "reason": "something came late"}
        )
    assert stale_at(world, at(20, 12)) == [(12, 13), (19, 19)]
    # Not closed yet: its first report is written at half past midnight.
    assert stale_at(world, at(20, 0, 20)) == [(12, 13)]


def test_days_are_computed_again_down_to_their_statements() -> None:
    job = defs.resolve_job_def("recompute_days")
    again = {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
    assert again == {
        "metric_5m",
        "metrics_summary",
        "interruptions",
        *COSTS,
        "savings_daily",
        "savings_statements",
    }


def test_prices_read_late_restate_the_days_statement(world: World, tenant: Tenant) -> None:
    add_nodes(world, whole_day(tenant, 1))
    read_prices(world, "2026-11-19", "2026-11-20")
    chain = [*COSTS, "interruptions", "savings_daily", "savings_statements"]
    world.run(chain, DAY)
    world.sql("DELETE FROM dirty_partitions")
    read_prices(world, DAY)
    assert stale_at(world, at(28, 12)) == [(18, 18)]
    world.run(chain, DAY)
    told = world.sql("SELECT revision, actual_usd FROM savings_statements WHERE period = 'day' ORDER BY revision")
    assert [row["revision"] for row in told] == list(range(1, len(told) + 1))
    assert told[-1]["actual_usd"] == Decimal("1.29")
    assert all(row["actual_usd"] == 0 for row in told[:-1])


def paid_on(world: World, day: int) -> set[float]:
    """Prices that a day's node hours were computed with."""
    found = world.query(
        "SELECT DISTINCT price_usd_per_hour AS usd FROM node_cost_hourly WHERE day = $d", d=at(day).date()
    )
    return {float(row["usd"]) for row in found}


def test_no_day_keeps_a_stale_price_from_one_that_was_read_in_part_or_told_late(
    world: World, tenant: Tenant, serve
) -> None:
    add_nodes(world, whole_day(tenant, 1))
    # Quiet from five in the morning of the 18th on: the 19th begins with that price and changes at noon.
    told = [*PRICES[:29], price(at(18, 5), "m5.large", 0.06), price(at(19, 12), "m5.large", 0.09)]
    serve(told, ON_DEMAND)
    read_prices(world, DAY, now=at(18, 3))
    read_prices(world, "2026-11-19")
    world.run(COSTS, "2026-11-19")
    assert paid_on(world, 19) == {0.06, 0.09}
    # AWS tells a change of the 18th late: it held until noon of the 19th, whose costs are computed again.
    world.sql("DELETE FROM dirty_partitions")
    serve([*told, price(at(18, 20), "m5.large", 0.07)], ON_DEMAND)
    read_prices(world, DAY)
    assert [day for table, day in marked(world) if table == "node_cost_hourly"] == [DAY, "2026-11-19"]
    world.run(COSTS, DAY, "2026-11-19")
    assert paid_on(world, 19) == {0.07, 0.09}
    assert marked(world) == []
    # Read again, nothing is new and nothing is stale.
    read_prices(world, DAY, "2026-11-19")
    assert marked(world) == []
