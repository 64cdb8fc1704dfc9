"""/reports/savings in every format."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal

import pyarrow.parquet as pq
import pytest
from sqlalchemy import text

from control.reports.formats import FOCUS_COLUMNS, safe_cell
from warehouse.postgres.models import new_id


async def write(
    api,
    tenant,
    period: str,
    start: str,
    end: str,
    net: str,
    *,
    name: str = "main",
    revision: int = 1,
    covered: float = 744.0,
    expected: float = 744.0,
    rework: str | None = None,
):
    part = {
        "cluster_id": str(tenant.cluster_id),
        "baseline_usd": "100.10",
        "actual_usd": "60.05",
        "gross_usd": "40.05",
        "overlap_usd": "0.05",
        "fallback_premium_usd": "0",
        "displaced_commitment_usd": "0.01",
        "rework_usd": rework,
        "net_usd": net,
        "hours_covered": covered,
        "hours_expected": expected,
        "days": 31,
    }
    unknown = {} if rework else {"not_measured": {"rework_usd": "no agent <reports> it"}}
    async with api.db.system() as conn:
        await conn.execute(
            text("""INSERT INTO savings_statements (id, customer_id, period, period_start, period_end, revision,
                        baseline_name, baseline_usd, actual_usd, net_savings_usd, fee_usd, coverage, lake_release_id,
                        body)
                    VALUES (:id, :customer, :period, :start, :end, :revision, 'b1_list', 100.10, 60.05, :net, 8, 0.99,
                        7, CAST(:body AS jsonb))"""),
            {
                "id": new_id(),
                "customer": tenant.customer_id,
                "period": period,
                "start": start,
                "end": end,
                "revision": revision,
                "net": Decimal(net),
                "body": json.dumps({"stage": "realised", "fee_rate": "0.2", "clusters": [part]} | unknown),
            },
        )
        await conn.execute(
            text("UPDATE clusters SET cluster_name = :name WHERE id = :id"), {"name": name, "id": tenant.cluster_id}
        )


async def get(api, tenant, **params):
    return await api.call("GET", "/reports/savings", tenant.analyst_key, params=params)


async def test_reports_are_not_for_strangers(api):
    assert (await api.call("GET", "/reports/savings", None, params={"month": "2026-10"})).status_code == 401


async def test_the_newest_revision_of_a_month(api, tenant):
    await write(api, tenant, "month", "2026-10-01", "2026-11-01", "39.00")
    await write(api, tenant, "month", "2026-10-01", "2026-11-01", "40.00", revision=2)
    statement = (await get(api, tenant, month="2026-10")).json()
    assert (statement["net_savings_usd"], statement["revision"]) == ("40.00000000", 2)
    assert (statement["baseline_name"], statement["partial"], statement["coverage"]) == ("b1_list", False, 0.99)
    assert statement["lake_release_ids"] == [7]
    assert statement["clusters"][0]["cluster_name"] == "main"


async def test_a_month_that_is_not_over_is_the_sum_of_its_days(api, tenant):
    await write(api, tenant, "day", "2026-11-01", "2026-11-02", "40.00", rework="1")
    await write(api, tenant, "day", "2026-11-02", "2026-11-03", "-10.00")
    month = (await get(api, tenant, month="2026-11")).json()
    assert (month["net_savings_usd"], month["partial"], month["period_end"]) == ("30.00000000", True, "2026-11-03")
    (cluster,) = month["clusters"]
    assert Decimal(cluster["displaced_commitment_usd"]) == Decimal("0.02")
    assert cluster["rework_usd"] is None, "a sum of the days that are known would pass for the whole"
    assert month["not_measured"] == {"rework_usd": "no agent <reports> it"}
    # A losing day comes off the month's gain before a fee is taken, as in the statement of the whole month.
    assert Decimal(month["fee_usd"]) == 6
    day = (await get(api, tenant, day="2026-11-02")).json()
    assert (day["net_savings_usd"], day["period"]) == ("-10.00000000", "day")


async def test_a_month_that_lost_owes_nothing_and_its_hours_weigh_alike(api, tenant):
    await write(api, tenant, "day", "2026-11-01", "2026-11-02", "10.00", covered=6.0, expected=6.0)
    await write(api, tenant, "day", "2026-11-02", "2026-11-03", "-12.00", covered=12.0, expected=24.0)
    month = (await get(api, tenant, month="2026-11")).json()
    assert Decimal(month["fee_usd"]) == 0
    assert month["coverage"] == pytest.approx(18 / 30)


async def test_every_format_says_the_same(api, tenant):
    await write(api, tenant, "month", "2026-10-01", "2026-11-01", "40.00", name="=cmd|' /C calc'!A0<b>")
    answers = {
        kind: await get(api, tenant, month="2026-10", format=kind) for kind in ("csv", "parquet", "html", "focus")
    }
    assert all(answer.status_code == 200 for answer in answers.values())
    (row,) = csv.DictReader(io.StringIO(answers["csv"].text))
    assert row["cluster_name"] == "'=cmd|' /C calc'!A0<b>", "a spreadsheet must not run it"
    assert Decimal(row["net_usd"]) == 40
    assert (row["displaced_commitment_usd"], row["rework_usd"]) == ("0.01", "")
    table = pq.read_table(io.BytesIO(answers["parquet"].content))
    assert table.column("net_usd").to_pylist() == [Decimal("40.00000000")]
    assert table.column("rework_usd").to_pylist() == [None]
    page = answers["html"].text
    assert "<b>" not in page.split("</style>")[1]
    assert "&lt;b&gt;" in page
    assert "40.00" in page
    assert "Rework is not measured: no agent &lt;reports&gt; it." in page
    assert "http" not in page, "it loads nothing"
    charges = list(csv.DictReader(io.StringIO(answers["focus"].text)))
    assert tuple(charges[0]) == FOCUS_COLUMNS
    assert [Decimal(charge["BilledCost"]) for charge in charges] == [Decimal("60.05"), 8]
    assert charges[0]["ChargePeriodStart"] == "2026-10-01T00:00:00Z"
    again = await get(api, tenant, month="2026-10", format="csv")
    assert again.content == answers["csv"].content
    for kind, answer in answers.items():
        assert answer.headers["content-disposition"].startswith("attachment; filename="), kind


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"month": "2026-10", "day": "2026-10-01"},
        {"month": "2026-13"},
        {"month": "October"},
        {"day": "2026-02-30"},
        {"month": "2026-10", "format": "exe"},
        {"month": "0000-01"},
    ],
)
async def test_bad_questions_are_422(api, tenant, params):
    assert (await get(api, tenant, **params)).status_code == 422


async def test_a_period_without_a_statement_is_404_and_says_why(api, tenant):
    answer = await get(api, tenant, month="2020-01")
    assert answer.status_code == 404
    assert "schedule" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("@x", "'@x"),
        ("\tx", "'\tx"),
        ("fine", "fine"),
        (-3.5, "-3.5"),
        (None, ""),
    ],
)
def test_cells_are_text_where_a_spreadsheet_would_run_them(value, cell):
    assert safe_cell(value) == cell
