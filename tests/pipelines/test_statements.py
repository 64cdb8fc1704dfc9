"""What a statement says of days that nobody reported on."""

from __future__ import annotations

from datetime import date

import pytest

from cloudoptim_pipelines.defs.savings.assets import periods
from cloudoptim_pipelines.defs.savings.statements import Period, recompute, write_statements
from tests.pipelines.conftest import World, add_nodes, add_tenant, at
from tests.pipelines.test_costs import COSTS, feed

MONTH = Period("month", date(2026, 11, 1), date(2026, 12, 1))


@pytest.mark.parametrize(("status", "coverage"), [("active", 48 / (13 * 24)), ("deleted", 1.0)])
def test_days_without_a_word_lower_the_months_coverage(world: World, serve, status: str, coverage: float) -> None:
    feed(world, serve)
    tenant = add_tenant(world)
    # Two days of hours, then nothing until the month is over: 18 to 30 November are 13 days.
    add_nodes(world, tenant.node(1, "m5.large", at(18), at(20)))
    world.run([*COSTS, "interruptions", "savings_daily"], "2026-11-18", "2026-11-19")
    world.sql("UPDATE clusters SET status = :status", status=status)
    warehouse = world.warehouse()
    try:
        (statement_id,) = write_statements(warehouse, MONTH)
        world.sql("UPDATE clusters SET status = 'deleted'")
        (row,) = world.sql("SELECT id, coverage, body FROM savings_statements")
        assert str(row["id"]) == statement_id
        assert row["coverage"] == pytest.approx(coverage, abs=1e-6)
        assert recompute(warehouse, row["id"]).body == row["body"]
    finally:
        warehouse.close()


def test_a_month_is_told_with_its_last_day_and_again_when_a_day_of_it_changes() -> None:
    month = Period("month", date(2026, 11, 1), date(2026, 12, 1))

    def told(day: date, today: date) -> list[Period]:
        return [period for period in periods([day], today) if period.kind == "month"]

    assert told(date(2026, 11, 30), date(2026, 12, 1)) == [month]
    assert told(date(2026, 11, 18), date(2026, 11, 19)) == []
    assert told(date(2026, 11, 18), date(2026, 12, 1)) == []
    assert told(date(2026, 11, 18), date(2026, 12, 2)) == [month]
