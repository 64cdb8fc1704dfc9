"""Cost and savings against a computation of the test's own: plain Python over minutes, no SQL."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from cloudoptim_pipelines.defs.savings.statements import Period, recompute, write_statements
from tests.pipelines.conftest import NOW, Tenant, World, add_nodes, add_tenant, at, hourly, price
from warehouse.postgres.models import (
    Interruption,
    LaunchAttempt,
    LaunchBatch,
    LaunchIntent,
    OptimizationHistory,
    PartitionCoverage,
    new_id,
)

COSTS = ["node_hours", "node_cost_hourly", "cluster_cost_hourly"]
ON_DEMAND = {"m5.large": 0.096, "c5.large": 0.085}
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)

SPOT = {
    "m5.large": [
        (when, 0.03 + 0.0007 * i) for i, when in enumerate(hourly(at(17, 20, 10), at(20, 11), timedelta(hours=2)))
    ],
    "c5.large": [
        (when, 0.021 + 0.0011 * (i % 5)) for i, when in enumerate(hourly(at(17, 21), at(20, 11), timedelta(hours=5)))
    ],
}


def feed(world: World, serve) -> None:
    """Prices of four days into the lake."""
    serve([price(when, type_, usd) for type_, rows in SPOT.items() for when, usd in rows], ON_DEMAND)
    world.run(["on_demand_prices"], "2026-11-17|us-east-1", "2026-11-20|us-east-1")
    world.run(["spot_prices"], "2026-11-17|us-east-1", "2026-11-20|us-east-1")


def spot_at(type_: str, when: datetime) -> float:
    """The price last changed at or before a moment."""
    return [usd for ts, usd in SPOT[type_] if ts <= when][-1]


def expected_hours(
    node: dict[str, Any], first: datetime, last: datetime
) -> dict[datetime, tuple[int, Decimal, Decimal]]:
    """Minutes, cost paid and cost on demand of every hour of a node, counted minute by minute."""
    minutes: dict[datetime, int] = {}
    moment = max(node["created_at"], first)
    until = min(node["terminated_at"] or NOW, last)
    while moment < until:
        hour = moment.replace(minute=0)
        minutes[hour] = minutes.get(hour, 0) + 1
        moment += MINUTE
    out = {}
    for hour, count in minutes.items():
        paid = spot_at(node["instance_type"], hour) if node["node_type"] == "spot" else ON_DEMAND[node["instance_type"]]
        cost = Decimal(str(round(paid, 6))) * count / 60
        listed = Decimal(str(ON_DEMAND[node["instance_type"]])) * count / 60
        out[hour] = (count, cost.quantize(Decimal("1e-8")), listed.quantize(Decimal("1e-8")))
    return out


def fleet(tenant: Tenant) -> list[dict[str, Any]]:
    """Nodes that start and end inside hours, on days' borders, Spot and on demand."""
    return [
        tenant.node(1, "m5.large", at(17, 23, 17), at(19, 4, 41)),
        tenant.node(2, "c5.large", at(18, 0), at(19, 0)),
        tenant.node(3, "m5.large", at(18, 9, 59), None, node_type="on-demand"),
        tenant.node(4, "c5.large", at(18, 13, 5), at(18, 13, 52)),
    ]


def test_every_node_hour_costs_its_minutes_at_the_price_of_that_hour(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    nodes = fleet(tenant)
    add_nodes(world, *nodes)
    world.run(COSTS, "2026-11-18", "2026-11-19")
    rows = world.query("SELECT * FROM node_cost_hourly")
    found = {(r["instance_id"], r["ts"]): (r["minutes"], r["actual_usd"], r["b1_list_usd"]) for r in rows}
    expected = {
        (node["instance_id"], hour): values
        for node in nodes
        for hour, values in expected_hours(node, at(18), at(20)).items()
    }
    assert found == expected
    assert {r["price_basis"] for r in rows} == {"spot_as_of", "on_demand"}


def test_a_cluster_hour_is_the_sum_of_its_nodes_and_complete_when_all_is_known(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    nodes = fleet(tenant)
    add_nodes(world, *nodes)
    world.run(COSTS, "2026-11-18", "2026-11-19")
    expected: dict[datetime, list] = {}
    for node in nodes:
        for hour, values in expected_hours(node, at(18), at(20)).items():
            expected.setdefault(hour, []).append(values)
    rows = {row["ts"]: row for row in world.query("SELECT * FROM cluster_cost_hourly")}
    assert set(rows) == set(expected)
    for hour, parts in expected.items():
        row = rows[hour]
        assert row["actual_usd"] == sum(part[1] for part in parts)
        assert row["b1_list_usd"] == sum(part[2] for part in parts)
        assert row["spot_usd"] + row["on_demand_usd"] == row["actual_usd"]
        assert (row["node_count"], row["node_minutes"]) == (len(parts), sum(part[0] for part in parts))
        assert row["complete"]
        assert row["coverage_ratio"] == 1.0
        assert row["b2_shape_usd"] is None
        assert row["b3_commit_usd"] is None


def test_an_unknown_price_is_a_hole_not_a_zero(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    add_nodes(
        world,
        tenant.node(1, "m5.large", at(18), at(18, 1)),
        tenant.node(2, "m5.large", at(18), at(18, 1), zone_id=None),  # the zone's name says nothing about the place
    )
    world.run(COSTS, "2026-11-18")
    nodes = {row["node_name"]: row for row in world.query("SELECT * FROM node_cost_hourly")}
    assert (nodes["node-2"]["actual_usd"], nodes["node-2"]["price_basis"]) == (None, "missing")
    row = world.query("SELECT * FROM cluster_cost_hourly")[0]
    assert (row["coverage_ratio"], row["complete"]) == (0.5, False)
    # Cost and baseline are of the same minutes, or savings would be made of the difference.
    assert row["actual_usd"] == nodes["node-1"]["actual_usd"]
    assert row["b1_list_usd"] == nodes["node-1"]["b1_list_usd"]


def test_the_running_hour_is_not_complete_and_a_silent_node_is_not_counted_on(world: World, serve) -> None:
    feed(world, serve)
    tenant, other = add_tenant(world), add_tenant(world)
    world.now = at(20, 10, 30)
    add_nodes(
        world,
        tenant.node(1, "m5.large", at(20, 8), last_seen_at=at(20, 10, 29)),
        other.node(2, "m5.large", at(20, 8), last_seen_at=at(20, 9, 15)),
    )
    world.run(COSTS, "2026-11-20")
    rows = world.query("SELECT cluster_id, ts, node_minutes, complete FROM cluster_cost_hourly ORDER BY ts")
    mine = [(r["ts"].hour, r["node_minutes"], r["complete"]) for r in rows if r["cluster_id"] == str(tenant.cluster_id)]
    assert mine == [(8, 60, True), (9, 60, True), (10, 30, False)]
    silent = [
        (r["ts"].hour, r["node_minutes"], r["complete"]) for r in rows if r["cluster_id"] == str(other.cluster_id)
    ]
    assert silent == [(8, 60, True), (9, 15, False)]


def test_no_hour_is_complete_before_its_cluster_was_connected(world: World, serve) -> None:
    """A node is older than our first look at it: what it cost before is known, what we saved then is nothing."""
    feed(world, serve)
    tenant = add_tenant(world, created_at=at(18, 12, 57))
    add_nodes(world, tenant.node(1, "m5.large", at(18, 11), at(18, 15)))
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
    rows = world.query("SELECT ts, actual_usd, complete FROM cluster_cost_hourly ORDER BY ts")
    assert [(r["ts"].hour, r["complete"]) for r in rows] == [(11, False), (12, False), (13, True), (14, True)]
    (saved,) = world.query("SELECT hours_covered, actual_usd FROM savings_daily WHERE baseline = 'b1_list'")
    assert (saved["hours_covered"], saved["actual_usd"]) == (2, rows[2]["actual_usd"] + rows[3]["actual_usd"])


def test_no_hour_is_complete_before_the_agents_first_metrics(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world, created_at=at(18, 10))
    add_nodes(world, tenant.node(1, "m5.large", at(18, 11), at(18, 15)))
    rows = [
        {
            "table_name": "metric_5m",
            "partition_key": day,
            "series": str(tenant.cluster_id),
            "customer_id": tenant.customer_id,
            "covered_from": start,
            "covered_until": start + 24 * HOUR,
            "expected_points": 288,
            "present_points": 0,
            "detail": {"expected": [0, 288], "present": present, "measured": present},
            "run_id": "",
        }
        for day, start, present in [("2026-11-18", at(18), "146-287"), ("2026-11-19", at(19), "0-287")]
    ]
    world.insert(PartitionCoverage, *rows)
    world.run(COSTS, "2026-11-18")
    found = world.query("SELECT ts, complete FROM cluster_cost_hourly ORDER BY ts")
    assert [(r["ts"].hour, r["complete"]) for r in found] == [(11, False), (12, False), (13, True), (14, True)]


@pytest.mark.parametrize("one_by_one", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_day_is_the_same_alone_again_and_in_a_range(world: World, serve, one_by_one: bool) -> None:
    feed(world, serve)
    add_nodes(world, *fleet(add_tenant(world)))
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-17", "2026-11-19")
    tables = ("node_hours", "node_cost_hourly", "cluster_cost_hourly", "savings_daily")
    once = [world.content(table) for table in tables]
    for day in ("2026-11-18", "2026-11-17", "2026-11-19") if one_by_one else ("2026-11-18",) * 3:
        world.run([*COSTS, "interruptions", "savings_daily"], day)
    assert [world.content(table) for table in tables] == once


def interrupt(world: World, tenant: Tenant, old: dict[str, Any], new: dict[str, Any], notice: datetime) -> None:
    """An interruption of one node with its replacement, as the worker leaves it."""
    interruption = new_id()
    common = {"customer_id": tenant.customer_id}
    world.insert(
        Interruption,
        {
            "id": interruption,
            **common,
            "cluster_id": tenant.cluster_id,
            "node_id": old["id"],
            "region": "us-east-1",
            "interruption_key": old["instance_id"],
            "instance_id": old["instance_id"],
            "instance_type": old["instance_type"],
            "availability_zone": old["availability_zone"],
            "instance_action": "terminate",
            "kind": "spot_interruption",
            "notice_at": notice,
            "received_at": notice,
            "deadline_at": notice + 2 * MINUTE,
            "detected_by": ["sqs"],
            "state": "closed",
            "outcome": "handled",
            "instance_gone_at": old["terminated_at"],
            "closed_at": old["terminated_at"],
        },
    )
    launch(world, tenant, new, notice + HOUR, interruption_id=interruption)


def launch(world: World, tenant: Tenant, new: dict[str, Any], deadline: datetime, **origin: Any) -> None:
    """The launch of a node for an interruption or a plan, as the worker leaves it."""
    intent, batch = new_id(), new_id()
    common = {"customer_id": tenant.customer_id}
    world.insert(
        LaunchIntent,
        {
            "id": intent,
            **common,
            "cluster_id": tenant.cluster_id,
            "requirements": {},
            "state": "ready",
            "deadline_at": deadline,
            **origin,
        },
    )
    world.insert(
        LaunchBatch,
        {
            "id": batch,
            **common,
            "cluster_id": tenant.cluster_id,
            "region": "us-east-1",
            "client_token": str(uuid4()),
            "request_json": "{}",
            "size": 1,
            "state": "answered",
        },
    )
    world.insert(
        LaunchAttempt,
        {
            "id": new_id(),
            **common,
            "intent_id": intent,
            "attempt_no": 1,
            "batch_id": batch,
            "slot": 0,
            "instance_type": new["instance_type"],
            "availability_zone": new["availability_zone"],
            "node_type": new["node_type"],
            "state": "ready",
            "instance_id": new["instance_id"],
            # EC2 launched it a while before it joined as a node.
            "launched_at": new["created_at"] - 80 * SECOND,
            "ready_at": new["created_at"] + 2 * MINUTE,
        },
    )


def test_net_savings_take_off_the_second_machine_and_the_fallback(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    old, new = tenant.node(1, "m5.large", at(18), at(18, 10, 7)), tenant.node(2, "m5.large", at(18, 9, 55), at(18, 20))
    lost, fallback = (
        tenant.node(3, "c5.large", at(18), at(18, 14, 3)),
        tenant.node(4, "m5.large", at(18, 14, 1), at(18, 16), node_type="on-demand"),
    )
    nodes = [old, new, lost, fallback]
    add_nodes(world, *nodes)
    interrupt(world, tenant, old, new, at(18, 9, 54))
    interrupt(world, tenant, lost, fallback, at(18, 14, 0))
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
    hours = [expected_hours(node, at(18), at(19)) for node in nodes]
    baseline = sum((values[2] for node in hours for values in node.values()), Decimal(0))
    actual = sum((values[1] for node in hours for values in node.values()), Decimal(0))
    eight = Decimal("1e-8")
    m5 = Decimal("0.096")
    # 9:55-10:00 and 10:00-10:07 beside node 1; 14:01-14:03 beside node 3. Until then node 3 was the Spot machine: those
    # minutes of node 4 are a second machine in full, not also a fallback.
    overlap = sum(((m5 * minutes / 60).quantize(eight) for minutes in (5, 7, 2)), Decimal(0))
    premium = sum(
        (
            ((m5 - Decimal(str(round(spot_at("c5.large", at(18, hour)), 6)))) * minutes / 60).quantize(eight)
            for hour, minutes in ((14, 57), (15, 60))
        ),
        Decimal(0),
    )
    row = world.query("SELECT * FROM savings_daily")[0]
    assert row["baseline"] == "b1_list"
    assert (row["baseline_usd"], row["actual_usd"], row["gross_usd"]) == (baseline, actual, baseline - actual)
    assert row["overlap_usd"] == overlap
    assert row["fallback_premium_usd"] == premium
    assert row["net_usd"] == baseline - actual - overlap - premium
    assert (row["rework_usd"], row["displaced_commitment_usd"]) == (None, None), "not measured is not zero"
    # 20 hours have nodes; the day has 24
    assert row["hours_covered"] == 20
    assert row["coverage_ratio"] == pytest.approx(20 / 24)
    assert row["stage"] == "estimated"


def test_a_node_on_demand_replaced_on_demand_is_no_fallback(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    old = tenant.node(1, "m5.large", at(18, 2), at(18, 5), node_type="on-demand")
    new = tenant.node(2, "m5.large", at(18, 5), at(18, 9), node_type="on-demand")
    add_nodes(world, old, new)
    interrupt(world, tenant, old, new, at(18, 4, 50))
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
    (row,) = world.query("SELECT * FROM savings_daily")
    assert (row["gross_usd"], row["fallback_premium_usd"], row["net_usd"]) == (0, 0, 0)


def test_a_fallback_counts_for_its_days_whatever_else_is_computed_with_them(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    # 30 days before the 18th, 31 before the 19th.
    notice = at(18, 12) - timedelta(days=30)
    old = tenant.node(1, "m5.large", notice - HOUR, notice + MINUTE)
    new = tenant.node(2, "m5.large", notice + MINUTE, at(19, 6), node_type="on-demand")
    add_nodes(world, old, new)
    interrupt(world, tenant, old, new, notice)
    world.run(["interruptions"], f"{notice:%Y-%m-%d}")
    world.run([*COSTS, "savings_daily"], "2026-11-18", "2026-11-19")
    together = world.query("SELECT day, fallback_premium_usd AS usd FROM savings_daily ORDER BY day")
    assert together[0]["usd"] > 0
    assert together[1]["usd"] == 0
    for day in ("2026-11-19", "2026-11-18"):
        world.run(["savings_daily"], day)
    assert world.query("SELECT day, fallback_premium_usd AS usd FROM savings_daily ORDER BY day") == together


def test_a_node_on_its_way_back_to_spot_is_a_second_machine_too(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    fallback = tenant.node(1, "m5.large", at(18, 2), at(18, 6, 12), node_type="on-demand")
    spot = tenant.node(2, "m5.large", at(18, 5, 55), at(18, 9))
    add_nodes(world, fallback, spot)
    plan = new_id()
    world.insert(
        OptimizationHistory,
        {
            "id": plan,
            "customer_id": tenant.customer_id,
            "cluster_id": tenant.cluster_id,
            "optimization_type": "return_to_spot",
            "status": "succeeded",
            "requested_by": "cloudoptim",
        },
    )
    needs = {"instance_id": fallback["instance_id"], "node_name": fallback["node_name"]}
    launch(world, tenant, spot, at(18, 6), plan_id=plan, step_no=1, requirements=needs)
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
    (row,) = world.query("SELECT * FROM savings_daily")
    # 5:55 to 6:00 and 6:00 to 6:12
    assert row["overlap_usd"] == sum((Decimal("0.096") * m / 60).quantize(Decimal("1e-8")) for m in (5, 12))
    assert row["fallback_premium_usd"] == 0
    assert row["net_usd"] == row["gross_usd"] - row["overlap_usd"]


def test_dearer_than_on_demand_is_a_negative_saving(world: World, serve) -> None:
    serve([price(when, "m5.large", 0.25) for when in (at(17, 22), at(18, 1))], ON_DEMAND)
    world.run(["on_demand_prices"], "2026-11-17|us-east-1", "2026-11-18|us-east-1")
    world.run(["spot_prices"], "2026-11-17|us-east-1", "2026-11-18|us-east-1")
    tenant = add_tenant(world)
    add_nodes(world, tenant.node(1, "m5.large", at(18), at(18, 2)))
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
    assert world.query("SELECT net_usd FROM savings_daily")[0]["net_usd"] == 2 * (Decimal("0.096") - Decimal("0.25"))


def test_a_day_becomes_realised_two_full_days_later(world: World, serve) -> None:
    feed(world, serve)
    add_nodes(world, *fleet(add_tenant(world)))
    stages = []
    for now in (at(19, 1), at(20, 23), at(21, 0)):
        world.now = now
        world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
        stages.append(world.query("SELECT stage FROM savings_daily")[0]["stage"])
    assert stages == ["estimated", "estimated", "realised"]


DAY = Period("day", at(18).date(), at(19).date())


def test_a_statement_can_be_told_again_to_the_cent_after_everything_moved_on(world: World, serve) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    nodes = fleet(tenant)
    add_nodes(world, *nodes)
    names = [*COSTS, "interruptions", "savings_daily", "savings_statements"]
    world.run(names, "2026-11-18")
    told = world.sql("SELECT * FROM savings_statements")
    assert len(told) == 1
    outbox = world.sql("SELECT topic, customer_id, payload FROM outbox")
    assert [(row["topic"], row["customer_id"]) for row in outbox] == [("savings.report.ready", tenant.customer_id)]
    assert outbox[0]["payload"]["statement_id"] == str(told[0]["id"])

    # The same day again, nothing new: nothing is written and nobody is told twice.
    world.run(names, "2026-11-18")
    assert len(world.sql("SELECT 1 FROM savings_statements")) == 1
    assert len(world.sql("SELECT 1 FROM outbox")) == 1

    # A node nobody had reported: the day changes, the first statement stays what it was.
    add_nodes(world, tenant.node(9, "m5.large", at(18, 1), at(18, 23)))
    world.run(names, "2026-11-18")
    first, second = world.sql("SELECT * FROM savings_statements ORDER BY revision")
    assert (first["revision"], second["revision"]) == (1, 2)
    assert first["net_savings_usd"] == told[0]["net_savings_usd"] != second["net_savings_usd"]
    warehouse = world.warehouse()
    try:
        for row in (first, second):
            again = recompute(warehouse, row["id"])
            assert again.body == row["body"]
            assert (again.baseline_usd, again.actual_usd, again.net_usd) == (
                row["baseline_usd"],
                row["actual_usd"],
                row["net_savings_usd"],
            )
        kept = world.sql("SELECT id FROM lake_releases WHERE kept ORDER BY id")
        assert [row["id"] for row in kept] == [first["lake_release_id"], second["lake_release_id"]]
    finally:
        warehouse.close()


def test_a_statement_adds_up_and_takes_the_agreed_fee_of_a_gain_only(world: World, serve) -> None:
    feed(world, serve)
    tenant, losing = add_tenant(world), add_tenant(world)
    add_nodes(world, *fleet(tenant))
    add_nodes(world, losing.node(1, "m5.large", at(18), at(18, 2), instance_id="i-0000000000000beef"))
    for customer in (tenant, losing):
        world.sql(
            "INSERT INTO customer_config (customer_id, config_key, config_value) VALUES (:id, 'savings_fee', '0.2')",
            id=customer.customer_id,
        )
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18")
    warehouse = world.warehouse()
    try:
        write_statements(warehouse, DAY)
    finally:
        warehouse.close()
    row = world.sql("SELECT * FROM savings_statements WHERE customer_id = :id", id=tenant.customer_id)[0]
    total = world.query(
        "SELECT sum(net_usd) AS net FROM savings_daily WHERE customer_id = $id", id=str(tenant.customer_id)
    )
    assert row["net_savings_usd"] == total[0]["net"] == row["baseline_usd"] - row["actual_usd"]
    assert row["fee_usd"] == (total[0]["net"] * Decimal("0.2")).quantize(Decimal("0.01"))
    assert row["baseline_name"] == "b1_list"
    totals = row["body"]["totals"]
    assert (
        {name for name, value in totals.items() if value is None}
        == set(row["body"]["not_measured"])
        == {
            "displaced_commitment_usd",
            "rework_usd",
        }
    )


def test_the_end_of_a_month_tells_the_month_too(world: World, serve) -> None:
    serve([price(when, "m5.large", 0.03) for when in hourly(at(29), at(30, 12))], ON_DEMAND)
    world.now = at(30) + timedelta(days=1, hours=2)
    world.run(["on_demand_prices"], "2026-11-29|us-east-1", "2026-11-30|us-east-1")
    world.run(["spot_prices"], "2026-11-29|us-east-1", "2026-11-30|us-east-1")
    tenant = add_tenant(world)
    add_nodes(world, tenant.node(1, "m5.large", at(29, 12), at(30, 12)))
    world.run([*COSTS, "interruptions", "savings_daily", "savings_statements"], "2026-11-29", "2026-11-30")
    rows = world.sql("SELECT period, period_start, period_end, net_savings_usd FROM savings_statements ORDER BY 1, 2")
    assert [(r["period"], r["period_start"].isoformat(), r["period_end"].isoformat()) for r in rows] == [
        ("day", "2026-11-29", "2026-11-30"),
        ("day", "2026-11-30", "2026-12-01"),
        ("month", "2026-11-01", "2026-12-01"),
    ]
    assert rows[2]["net_savings_usd"] == rows[0]["net_savings_usd"] + rows[1]["net_savings_usd"]
