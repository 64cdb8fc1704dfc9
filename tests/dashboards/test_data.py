"""Queries of the pages against a real Postgres and a real lake."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest
from bokeh.models import ColumnDataSource
from sqlalchemy import insert, text

from dashboards.data import MAX_POINTS, CostHour, Data, DataError, LakeMissing, project, rate, saved_share
from dashboards.pages.gaps import covered
from dashboards.pages.interruptions import headline, timeline_chart
from tests.dashboards.conftest import Seeded
from tests.dashboards.seed import REGION, TYPES, Fleet, spot_ratio
from warehouse.postgres.models import PartitionCoverage
from warehouse.postgres.session import SyncDatabase

NOW_RATIO = 0


def price_now(node: dict[str, Any]) -> Decimal:
    """What a seeded node costs per hour now."""
    list_price = TYPES[node["instance_type"]][0]
    if node["node_type"] == "on-demand":
        return list_price
    return (list_price * spot_ratio(node["instance_type"], node["zone_id"], NOW_RATIO)).quantize(Decimal("0.0001"))


def test_live_cost_prices_each_node_at_its_own_pool(data: Data, seeded: Seeded) -> None:
    fleet = seeded.world.first
    cost = data.live_cost(fleet.id)
    assert cost.nodes == len(fleet.nodes)
    assert cost.actual == sum(price_now(node) for node in fleet.nodes)
    assert cost.b1 == sum(TYPES[node["instance_type"]][0] for node in fleet.nodes)
    assert cost.coverage == 1.0
    one = fleet.clusters["production"]
    assert cost.of(one).actual == sum(price_now(node) for node in fleet.nodes if node["cluster_id"] == one)


def test_a_node_without_a_price_lowers_the_coverage_and_neither_sum(seeded: Seeded, database_url: str) -> None:
    from tests.dashboards.seed import fill_postgres, fill_prices

    fleet = Fleet(seeded.world.first.id, "Acme")
    db = SyncDatabase(database_url)
    with db.system() as conn:
        fill_postgres(conn, seeded.world.now, fleet, {"production": 4}, "333333333333")
        fill_prices(conn, seeded.world.now)
        conn.execute(text("DELETE FROM on_demand_price WHERE instance_type = 'm6i.large'"))
    db.close()
    reads = Data(seeded.settings(DATABASE_URL=database_url))
    cost = reads.live_cost(fleet.id)
    reads.close()
    priced = [node for node in fleet.nodes if node["instance_type"] != "m6i.large"]
    assert (cost.nodes, cost.priced) == (4, len(priced))
    assert cost.actual == sum(price_now(node) for node in priced)
    assert cost.b1 == sum(TYPES[node["instance_type"]][0] for node in priced)


def test_cost_hours_sum_the_clusters_and_mark_what_is_not_complete(data: Data, seeded: Seeded) -> None:
    fleet = seeded.world.first
    hours = data.cost_hours(fleet.id, 48)
    assert len(hours) == 49  # the running hour is shown too
    assert sum(not hour.complete for hour in hours) == 2  # the running one, and the one with a partly priced cluster
    parts = [data.cost_hours(fleet.id, 48, cluster) for cluster in fleet.clusters.values()]
    for whole, *split in zip(hours, *parts, strict=True):
        assert whole.actual == sum(part.actual for part in split)
        assert whole.b1 == sum(part.b1 for part in split)


def test_node_counts_hold_the_running_hour_as_the_cost_page_does(data: Data, seeded: Seeded) -> None:
    fleet = seeded.world.first
    counted = data.node_counts(fleet.id, 48).to_pylist()
    assert [row["ts"] for row in counted] == [hour.ts for hour in data.cost_hours(fleet.id, 48)]
    assert counted[-1]["spot"] + counted[-1]["on_demand"] == pytest.approx(len(fleet.nodes))


def test_points_that_are_not_due_yet_are_no_gap_and_the_tile_says_so() -> None:
    assert covered(1440, 1440, 0) == "1,440 of 1,440 points"
    assert covered(1440, 600, 40) == "600 of 1,440 points; 800 are not due yet and no gap"
    assert covered(0, 0, 0) == "nothing written yet"


def test_a_partition_never_written_counts_against_the_coverage(data: Data, seeded: Seeded) -> None:
    """Its points are expected although nobody wrote down that they are missing but the gap."""
    day = seeded.world.now.date() - timedelta(days=4)
    database = SyncDatabase(seeded.database_url)
    gone = {"table": "spot_prices", "key": f"{day}|{REGION}"}
    the_partition = "WHERE table_name = :table AND partition_key = :key"
    with database.system() as connection:
        written = connection.execute(
            text(
                "DELETE FROM partition_coverage WHERE table_name = 'spot_prices' AND partition_key = :key RETURNING *"
            ),
            gone,
        ).one()
        (missing,) = connection.execute(text(f"SELECT missing_points FROM data_gaps {the_partition}"), gone).one()
    try:
        data.forget()
        cells = {(row["table_name"], row["day"]): row for row in data.coverage_by_day(seeded.world.first.id, 30)}
        cell = cells["spot_prices", day]
        assert (cell["expected"], cell["present"], cell["missing"]) == (missing, 0, missing)
    finally:
        with database.system() as connection:
            connection.execute(insert(PartitionCoverage).values(**written._mapping))
        database.close()
        data.forget()


def test_no_read_of_one_customer_shows_another(data: Data, seeded: Seeded) -> None:
    first, second = seeded.world.first, seeded.world.second
    since = seeded.world.now - timedelta(days=30)
    day = seeded.world.now.date()
    region = data.price_regions(second.id)[0]
    reads = [
        data.clusters(second.id),
        data.live_cost(second.id),
        data.cost_hours(second.id, 24),
        data.cost_by_cluster(second.id, 24),
        data.cost_export(second.id, 24).to_pylist(),
        data.interruptions(second.id, since),
        data.interruptions_export(second.id, since).to_pylist(),
        data.interruption_rates(second.id, since),
        data.cluster_states(second.id),
        data.nodes(second.id),
        data.nodes_export(second.id, None, None).to_pylist(),
        data.node_counts(second.id, 24).to_pylist(),
        data.gaps(second.id, 60),
        data.coverage_by_day(second.id, 60),
        data.fills(second.id, False),
        data.savings_days(second.id, day - timedelta(days=30), day),
        data.savings_export(second.id, day - timedelta(days=30), day).to_pylist(),
        data.statements(second.id),
        data.freshness(second.id),
        data.alarms(second.id),
        data.price_movers(second.id, region, 7),
    ]
    foreign = {str(first.id), *map(str, first.clusters.values()), *first.clusters}
    foreign |= {node["instance_id"] for node in first.nodes}
    shown = repr(reads)
    assert not [name for name in foreign if name in shown]
    assert str(next(iter(second.clusters.values()))) in shown  # the check can see ids at all


def test_another_customers_ids_find_nothing(data: Data, seeded: Seeded) -> None:
    first, second = seeded.world.first, seeded.world.second
    taken = data.interruptions(first.id, seeded.world.now - timedelta(days=30))
    foreign_cluster = first.clusters["production"]
    assert taken
    assert data.interruption(first.id, taken[0].id) is not None
    assert data.interruption(second.id, taken[0].id) is None
    assert data.interruption_history(second.id, taken[0].id) == []
    assert data.nodes(second.id, foreign_cluster) == []
    assert data.cost_hours(second.id, 24, foreign_cluster) == []
    assert data.live_cost(second.id).of(foreign_cluster).nodes == 0


def test_timeline_of_an_interruption(data: Data, seeded: Seeded) -> None:
    rows = data.interruptions(seeded.world.first.id, seeded.world.now - timedelta(days=30))
    assert [row.outcome for row in rows] == [None, "handled", "handled", "handled", "handled_late", "handled"]
    late = rows[4]
    assert late.margin == pytest.approx(-20)
    assert late.after_notice(late.cordoned_at) == pytest.approx(2.4)
    assert rows[0].margin is None
    assert rows[0].drained_at is None
    assert rows[1].replacement_instance_id == "i-0rep00000001"


def test_the_chart_marks_the_deadline_of_each_interruption(data: Data, seeded: Seeded) -> None:
    now = seeded.world.now
    rows = data.interruptions(seeded.world.first.id, now - timedelta(days=30))[:2]
    hibernated = replace(rows[1], deadline_at=rows[1].notice_at + timedelta(seconds=20))
    sources = timeline_chart([rows[0], hibernated], now).object.select({"type": ColumnDataSource})
    (deadlines,) = (source.data for source in sources if "top" in source.data)
    assert deadlines["x"] == pytest.approx([120, 20])
    assert [row for row, _ in deadlines["top"]] == [row for row, _ in deadlines["bottom"]]
    assert len({row for row, _ in deadlines["top"]}) == 2


def test_a_replacement_of_an_hour_leaves_the_other_timelines_their_room(data: Data, seeded: Seeded) -> None:
    now = seeded.world.now
    row = data.interruptions(seeded.world.first.id, now - timedelta(days=30))[1]
    late = replace(row, launched_at=row.notice_at, ready_at=row.notice_at + timedelta(hours=1))
    sources = timeline_chart([late], now).object.select({"type": ColumnDataSource})
    (spans,) = (source.data for source in sources if "end" in source.data)
    assert max(spans["end"]) == 2 * (late.deadline_at - late.notice_at).total_seconds()


def test_what_an_earlier_signal_had_begun_is_no_speed_of_the_warning(data: Data, seeded: Seeded) -> None:
    rows = data.interruptions(seeded.world.first.id, seeded.world.now - timedelta(days=30))
    recommended = rows[5]
    assert recommended.notice_at - recommended.first_notice_at == timedelta(minutes=8)
    assert recommended.after_notice(recommended.cordoned_at) == pytest.approx(2.4 - 480)
    assert "−" not in headline(rows, [])
    assert "slowest 140 s" not in headline([recommended], [])
    assert "none drained yet" in headline([recommended], [])


def test_rates_count_spot_hours_only(data: Data, seeded: Seeded) -> None:
    fleet = seeded.world.first
    since = seeded.world.now - timedelta(hours=72)
    rates = data.interruption_rates(fleet.id, since)
    spot = sum(node["node_type"] == "spot" for node in fleet.nodes)
    assert sum(pool.hours for pool in rates) == pytest.approx(spot * 72, rel=0.02)
    assert sum(pool.taken for pool in rates) == 4  # of the last 72 h: 0, 20, 40 and 60 hours ago


@pytest.mark.parametrize(
    ("events", "low", "high"),
    # Exact (Garwood) limits of a Poisson mean from chi-square quantiles, two-sided 95%.
    [(0, 0.0, 3.689), (1, 0.02532, 5.572), (6, 2.202, 13.059), (20, 12.217, 30.888), (300, 267.01, 335.94)],
)
def test_interval_of_a_rate_follows_the_exact_one(events: int, low: float, high: float) -> None:
    found = rate(events, 1000.0)
    assert found is not None
    assert found.per_thousand == events
    assert found.low == pytest.approx(low, rel=0.001)
    assert found.high == pytest.approx(high, rel=0.001)
    assert rate(events, 0.0) is None


def test_a_price_shock_is_not_averaged_away_and_points_stay_few(data: Data, seeded: Seeded) -> None:
    customer = seeded.world.first.id
    region = data.price_regions(customer)[0]
    assert region.region == REGION
    assert data.price_types(customer, region) == sorted(TYPES)
    for days in (2, 7, 366):
        rows = data.spot_prices(customer, region, "c6i.xlarge", days)
        assert 0 < rows.num_rows <= MAX_POINTS
    shocked = rows.filter(pa.compute.equal(rows["zone_id"], "use1-az2"))
    assert max(shocked["highest"].to_pylist()) > float(TYPES["c6i.xlarge"][0])
    mover = data.price_movers(customer, region, 9)[0]
    assert (mover["instance_type"], mover["zone_id"]) == ("c6i.xlarge", "use1-az2")
    assert data.list_price(customer, REGION, "c6i.xlarge") == TYPES["c6i.xlarge"][0]
    assert data.list_price(customer, REGION, "none.large") is None


def test_a_new_release_is_seen_and_an_old_answer_is_not_kept_for_it(
    seeded: Seeded, database_url: str, tmp_path: Any
) -> None:
    from tests.dashboards.seed import fill_lake
    from warehouse.lake.store import Lake

    lake = Lake(str(tmp_path), database_url)
    lake.create_tables()
    fleet = seeded.world.first
    reads = Data(seeded.settings(DATABASE_URL=database_url, CLOUDOPTIM_LAKE_ROOT=str(tmp_path)))
    assert reads.cost_hours(fleet.id, 24) == []
    before = reads.freshness(fleet.id)
    assert before.complete_until is None
    fill_lake(lake, datetime.now(UTC), 30, [fleet])
    lake.close()
    reads.forget()
    assert len(reads.cost_hours(fleet.id, 24)) == 25
    after = reads.freshness(fleet.id)
    assert after.release_id is not None
    assert before.release_id is not None
    assert after.release_id > before.release_id
    reads.close()


def test_a_database_that_is_down_says_so_and_what_to_do(seeded: Seeded) -> None:
    reads = Data(seeded.settings(DATABASE_URL="postgresql://nobody:x@127.0.0.1:1/none"))
    for read in (reads.customers, lambda: reads.live_cost(seeded.world.first.id)):
        with pytest.raises(DataError) as failure:
            read()
        assert failure.value.what == "The database cannot be read"
        assert "DATABASE_URL" in failure.value.next_step
        assert "x@" not in str(failure.value)
    reads.close()


def test_a_lake_that_was_never_made_is_missing_not_broken(seeded: Seeded, database_url: str, tmp_path: Any) -> None:
    reads = Data(seeded.settings(DATABASE_URL=database_url, CLOUDOPTIM_LAKE_ROOT=str(tmp_path / "none")))
    with pytest.raises(LakeMissing) as failure:
        reads.cost_hours(seeded.world.first.id, 24)
    assert "cloudoptim migrate" in failure.value.next_step
    assert reads.freshness(UUID(int=1)).release_id is None
    reads.close()


def hour(back: int, actual: str | None, complete: bool = True, b1: str | None = "2") -> CostHour:
    """An hour for the projection."""
    ts = datetime(2026, 11, 1, tzinfo=UTC) + timedelta(hours=back)
    money = None if actual is None else Decimal(actual)
    return CostHour(ts, money, money, Decimal(), None if b1 is None else Decimal(b1), 1.0, 3, complete)


def test_the_month_is_projected_from_complete_hours_only() -> None:
    found = project([hour(0, "1"), hour(1, "3"), hour(2, "100", complete=False), hour(3, None)])
    assert found is not None
    assert (found.hours, found.actual, found.b1) == (2, Decimal(2) * 730, Decimal(2) * 730)
    assert found.low == Decimal(1) * 730
    assert found.high == Decimal(3) * 730
    assert project([hour(0, "5", complete=False)]) is None
    assert project([]) is None


@pytest.mark.parametrize(
    ("baseline", "actual", "share"),
    [("4", "1", "0.75"), ("1", "2", "-1"), ("0", "1", None), (None, "1", None), ("1", None, None)],
)
def test_savings_may_be_negative_and_need_a_baseline(
    baseline: str | None, actual: str | None, share: str | None
) -> None:
    def money(value: str | None) -> Decimal | None:
        return None if value is None else Decimal(value)

    assert saved_share(money(baseline), money(actual)) == money(share)
