"""Agents' metrics from Postgres to five-minute rows and summaries."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from math import fsum

import pytest

from cloudoptim_pipelines.coverage import Coverage
from cloudoptim_pipelines.defs.maintenance.assets import droppable_before
from cloudoptim_pipelines.defs.metrics import windows
from tests.pipelines.conftest import Tenant, World, add_nodes, add_tenant, at
from warehouse.postgres.models import DirtyPartition, MetricSample

DAY = "2026-11-20"
CPU = "node_cpu_usage_cores"


def send(
    world: World, tenant: Tenant, samples: list[tuple[datetime, float]], *, subject: str = "node-1", metric: str = CPU
) -> None:
    """Samples as the API's ingestion leaves them."""
    world.sql("SELECT ensure_metric_partitions(:first, :last)", first=at(10).date(), last=at(21).date())
    world.insert(
        MetricSample,
        *(
            {
                "customer_id": tenant.customer_id,
                "cluster_id": tenant.cluster_id,
                "metric": metric,
                "subject": subject,
                "ts": ts,
                "value": value,
            }
            for ts, value in samples
        ),
    )


def every(step: timedelta, first: datetime, last: datetime) -> list[tuple[datetime, float]]:
    """A value at each step, from first to before last."""
    values = random.Random(7)
    return [(first + i * step, values.random() * 4) for i in range(int((last - first) / step))]


def expected_windows(samples: list[tuple[datetime, float]]) -> dict[datetime, tuple]:
    """Smallest, mean, largest, last and count of each five minutes."""
    grouped: dict[datetime, list[tuple[datetime, float]]] = {}
    for ts, value in samples:
        grouped.setdefault(ts.replace(minute=ts.minute // 5 * 5, second=0, microsecond=0), []).append((ts, value))
    out = {}
    for start, rows in grouped.items():
        values = [value for _, value in sorted(rows)]
        out[start] = (min(values), fsum(values) / len(values), max(values), values[-1], len(values))
    return out


def test_five_minute_rows_say_what_the_samples_say(world: World) -> None:
    tenant = add_tenant(world)
    samples = every(timedelta(seconds=47), at(20, 8, 2), at(20, 11, 3))
    send(world, tenant, samples)
    world.run(["metric_5m", "metrics_summary"], DAY)
    rows = world.query("SELECT * FROM metric_5m ORDER BY ts")
    expected = expected_windows(samples)
    assert [row["ts"] for row in rows] == sorted(expected)
    for row in rows:
        smallest, mean, largest, last, count = expected[row["ts"]]
        assert (row["min"], row["max"], row["last"], row["samples"]) == (smallest, largest, last, count)
        assert row["mean"] == pytest.approx(mean, rel=1e-12)
        assert (row["node_name"], row["source"]) == ("node-1", "observed")
    hourly = world.sql("SELECT * FROM metrics_summary WHERE resolution = '1h' ORDER BY timestamp")
    nine = [value for ts, value in samples if ts.hour == 9]
    assert hourly[1]["value"] == pytest.approx(fsum(nine) / len(nine))
    assert (hourly[1]["min"], hourly[1]["max"], hourly[1]["samples"]) == (min(nine), max(nine), len(nine))
    assert len(world.sql("SELECT 1 FROM metrics_summary WHERE resolution = '5m'")) == len(rows)


def test_of_two_values_for_one_moment_the_first_received_counts(world: World) -> None:
    tenant = add_tenant(world)
    send(world, tenant, [(at(20, 9), 1.0)])
    send(world, tenant, [(at(20, 9), 5.0)])
    world.run(["metric_5m"], DAY)
    assert [(r["mean"], r["samples"]) for r in world.query("SELECT * FROM metric_5m")] == [(1.0, 1)]


def test_refreshing_a_running_day_ends_where_reading_it_whole_ends(world: World) -> None:
    tenant = add_tenant(world)
    samples = every(timedelta(seconds=30), at(20, 9), at(20, 11))
    for hour, minute in ((9, 40), (9, 57), (10, 31), (11, 1)):
        world.now = at(20, hour, minute)
        known = {row["ts"] for row in world.sql("SELECT ts FROM metric_samples")}
        send(world, tenant, [s for s in samples if s[0] < world.now and s[0] not in known])
        world.run(["metric_5m", "metrics_summary"], DAY)
    rows = {row["ts"]: row["samples"] for row in world.query("SELECT ts, samples FROM metric_5m")}
    assert rows == {start: values[4] for start, values in expected_windows(samples).items()}
    refreshed = world.content("metric_5m"), world.sql("SELECT sum(value) FROM metrics_summary")
    world.now = at(22)
    world.run(["metric_5m", "metrics_summary"], DAY)
    assert (world.content("metric_5m"), world.sql("SELECT sum(value) FROM metrics_summary")) == refreshed


def test_late_samples_end_in_the_same_rows_as_samples_in_order(world: World) -> None:
    tenant = add_tenant(world)
    samples = every(timedelta(seconds=60), at(20, 1), at(20, 6))
    late = samples[30:90]
    send(world, tenant, [s for s in samples if s not in late])
    world.run(["metric_5m"], DAY)
    send(world, tenant, late)
    world.insert(DirtyPartition, {"table_name": "metric_5m", "partition_key": DAY, "reason": "late samples"})
    world.run(["metric_5m"], DAY)
    rows = {row["ts"]: row["samples"] for row in world.query("SELECT ts, samples FROM metric_5m")}
    assert rows == {start: values[4] for start, values in expected_windows(samples).items()}
    # The metrics are settled; the costs of the day, in which the agent was there after all, are not yet.
    assert [row["table_name"] for row in world.sql("SELECT * FROM dirty_partitions")] == ["node_cost_hourly"]


def test_an_agent_that_was_away_is_a_gap_and_its_return_closes_none(world: World) -> None:
    tenant = add_tenant(world, created_at=at(20, 7))
    send(
        world,
        tenant,
        every(timedelta(seconds=60), at(20, 7), at(20, 9)) + every(timedelta(seconds=60), at(20, 10, 30), at(20, 12)),
    )
    world.run(["metric_5m"], DAY)
    gaps = world.sql("SELECT * FROM data_gaps")
    assert [(g["gap_start"], g["gap_end"], g["missing_points"], g["reason"], g["state"]) for g in gaps] == [
        (at(20, 9), at(20, 10, 30), 18, "agent_away", "open")
    ]
    assert gaps[0]["customer_id"] == tenant.customer_id


def test_an_hour_in_which_the_agent_was_away_is_not_complete(world: World) -> None:
    tenant = add_tenant(world, created_at=at(20, 7))
    send(
        world,
        tenant,
        every(timedelta(seconds=60), at(20, 7), at(20, 9)) + every(timedelta(seconds=60), at(20, 9, 30), at(20, 12)),
    )
    world.run(["metric_5m"], DAY)
    add_nodes(world, tenant.node(1, "m5.large", at(20, 7), at(20, 11), node_type="on-demand"))
    world.run(["node_hours", "node_cost_hourly", "cluster_cost_hourly"], DAY)
    rows = {row["ts"].hour: row["complete"] for row in world.query("SELECT ts, complete FROM cluster_cost_hourly")}
    assert rows[9] is False


def test_a_short_hole_is_interpolated_only_in_a_fill_and_says_so(world: World) -> None:
    tenant = add_tenant(world, created_at=at(20, 7))
    line = [(at(20, 7) + i * timedelta(minutes=5), float(i)) for i in range(60)]
    send(world, tenant, [s for i, s in enumerate(line) if not 10 <= i < 16 and not 30 <= i < 50])
    fill_id = "0192f0c0-0000-7000-8000-000000000001"
    world.run(["metric_5m"], DAY)
    assert {row["source"] for row in world.query("SELECT source FROM metric_5m")} == {"observed"}
    world.sql(
        "INSERT INTO gap_fills (id, requested_by, table_name, partitions, created_at) "
        "VALUES (:id, 'test', 'metric_5m', '[\"2026-11-20\"]', now())",
        id=fill_id,
    )
    world.sql("UPDATE data_gaps SET state = 'filling', fill_id = :id", id=fill_id)
    world.run(["metric_5m"], DAY, tags={"cloudoptim/fill_id": fill_id})
    made_up = world.query("SELECT * FROM metric_5m WHERE source = 'interpolated' ORDER BY ts")
    # The straight line is found again; the longer hole stays a hole.
    assert [(row["ts"], row["mean"]) for row in made_up] == [(ts, pytest.approx(value)) for ts, value in line[10:16]]
    assert {(row["samples"], row["min"], row["max"], row["last"], row["fill_method"]) for row in made_up} == {
        (0, None, None, None, "linear")
    }
    assert all(row["fill_run_id"] and row["filled_at"] for row in made_up)
    fill = world.sql("SELECT * FROM gap_fills")[0]
    assert (fill["state"], fill["records_filled"], fill["sources_used"]) == ("succeeded", 6, ["interpolated"])
    states = {row["gap_start"]: row["state"] for row in world.sql("SELECT gap_start, state FROM data_gaps")}
    assert states == {at(20, 7, 50): "filled", at(20, 9, 30): "unfillable"}
    assert [row["topic"] for row in world.sql("SELECT topic FROM outbox")] == ["gap.filled"]

    # Samples that come after all replace what was made up; running again changes nothing else.
    send(world, tenant, line[12:14])
    world.now = at(21, 1)
    world.run(["metric_5m"], DAY)
    rows = {row["ts"]: row["source"] for row in world.query("SELECT ts, source FROM metric_5m")}
    assert [rows[ts] for ts, _ in line[10:16]] == ["interpolated"] * 2 + ["observed"] * 2 + ["interpolated"] * 2
    # Summaries, and with them decisions and grades, know nothing of made-up values.
    world.run(["metrics_summary"], DAY)
    summed = {row["timestamp"] for row in world.sql("SELECT timestamp FROM metrics_summary WHERE resolution = '5m'")}
    assert summed == {ts for ts, source in rows.items() if source == "observed"}


def test_raw_samples_are_dropped_only_after_the_lake_has_their_day_and_the_lake_keeps_them(world: World) -> None:
    tenant = add_tenant(world, created_at=at(10))
    for day in (10, 11, 12, 13):
        send(world, tenant, [(at(day, 3), float(day))])
    for day in (10, 11, 13):
        world.run(["metric_5m"], f"2026-11-{day}")
    world.now = at(21)
    world.run_unpartitioned(["metric_retention"])
    # The 12th never reached the lake: it and what follows stay.
    assert [row["ts"].day for row in world.sql("SELECT ts FROM metric_samples ORDER BY ts")] == [12, 13]
    world.run(["metric_5m"], "2026-11-10", "2026-11-13")
    assert [row["ts"].day for row in world.query("SELECT ts FROM metric_5m ORDER BY ts")] == [10, 11, 12, 13]


def covered(day: int, until: datetime) -> Coverage:
    """A covered day."""
    return Coverage("metric_5m", f"2026-11-{day:02}", "c", at(day), until, 288, 288)


@pytest.mark.parametrize(
    ("days", "oldest", "expected"),
    [
        ([10, 11, 12], 10, 13),
        ([10, 12], 10, 11),
        ([], 10, 10),
        ([], None, 14),
        ([], 21, 14),
    ],
)
def test_droppable_days(days: list[int], oldest: int | None, expected: int) -> None:
    rows = {row.partition_key: row for row in (covered(day, at(day + 1)) for day in days)}
    found = droppable_before(at(21).date(), at(oldest).date() if oldest else None, rows)
    assert found == at(expected).date()


def test_a_day_read_before_it_was_over_is_not_droppable() -> None:
    rows = {row.partition_key: row for row in [covered(10, at(10, 23, 59))]}
    assert droppable_before(at(21).date(), at(10).date(), rows) == at(10).date()


@pytest.mark.parametrize("numbers", [[], [0], [287], [0, 1, 2, 5, 9, 10], list(range(288))])
def test_window_numbers_survive_their_text(numbers: list[int]) -> None:
    assert windows.decode(windows.encode(numbers)) == numbers


def test_nothing_is_expected_of_a_window_that_is_not_over_or_before_the_cluster() -> None:
    day = at(20).date()
    assert windows.expected_windows(day, first_seen=at(19), now=at(21, 1)) == (0, 288)
    assert windows.expected_windows(day, first_seen=at(20, 7, 3), now=at(20, 12, 4)) == (84, 143)
    assert windows.expected_windows(day, first_seen=at(21), now=at(22)) == (288, 288)
    assert windows.missing_runs((0, 10), [0, 1, 4, 9]) == [(2, 4), (5, 9)]
