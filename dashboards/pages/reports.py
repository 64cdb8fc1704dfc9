"""Reports: savings by day against the named baseline, and the statements as they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import panel_material_ui as pmui
import param
import pyarrow as pa
from bokeh.models import Range1d
from markupsafe import Markup

from dashboards import components as ui
from dashboards import plots
from dashboards.data import Data, LakeMissing, saved_share
from dashboards.shell import View, heading, live, offer, restore

DAY_MS = 24 * plots.HOUR_MS
# What the control service can write for a month.
FORMATS = ("html", "csv", "parquet", "json", "focus")


class ReportFilter(param.Parameterized):
    """What the page shows; kept in its address."""

    month: Any = param.Selector(default="", objects=[""])


def build(view: View) -> Any:
    """The page's content."""
    months = _months(view)
    if not months:
        return ui.stack(
            heading("Reports"),
            ui.html(
                ui.empty(
                    "No savings have been computed yet",
                    "Dagster computes savings_daily from complete hours once a day; a backfill of that asset brings "
                    "past days.",
                )
            ),
        )
    chosen = ReportFilter()
    offer(chosen, "month", months)
    restore(chosen, {"month": "month"})
    figures, table, statements, files = (ui.html("") for _ in range(4))
    links = ui.inline()
    days = plots.source(
        {
            name: []
            for name in (
                "left",
                "right",
                "day",
                "net",
                "baseline",
                "actual",
                "gross",
                "coverage",
                "color",
                "alpha",
                "state",
            )
        }
    )

    # The whole month, however few of its days are known.
    span = Range1d()
    chart = ui.stack()

    def drawn() -> Any:
        return plots.pane(plots.savings_bars(days, span))

    def refresh(*_: Any) -> None:
        first, last = month_days(chosen.month)
        rows = view.data.savings_days(view.customer_id, first, last)
        ui.put(figures, headline(rows))
        ui.put(table, day_table(rows))
        ui.put(statements, statement_table(view.data.statements(view.customer_id)))
        ui.put(links, ui.downloads("savings", {"month": chosen.month}))
        ui.put(files, report_links(chosen.month))
        plots.replace(days, bar_columns(rows))
        start, end = plots.milliseconds([datetime.combine(day, time(), UTC) for day in (first, last)])
        span.update(start=start - DAY_MS / 2, end=end + DAY_MS / 2)
        ui.swap(chart, "chart" if rows else "nothing", drawn if rows else nothing_computed)

    refresh()
    chosen.param.watch(refresh, ["month"])
    live(view, refresh)
    return ui.stack(
        heading("Reports", "Days are UTC days. Money in USD."),
        ui.controls(pmui.Select.from_param(chosen.param.month, size="small", width=160, margin=0), links),
        figures,
        ui.card(
            "Net savings of each day against B1 list",
            chart,
            note="Complete hours only. Below zero means that Spot cost more; paler days are not yet realised.",
        ),
        ui.card(
            "Days",
            table,
            note="Net is gross less overlap and fallback premium. Displaced commitments and rework after interruptions "
            "are not measured: no commitments of the account are read, and no agent reports work that was done again.",
        ),
        ui.card(
            "The month as a report",
            files,
            note="Made by the control service; the same month gives the same figures to the cent.",
        ),
        ui.card(
            "Statements",
            statements,
            note="As they were written, with the lake release each one read.",
        ),
    )


def nothing_computed() -> Any:
    """In the chart's place for a month without a day."""
    return ui.html(ui.empty("No day of this month has been computed", "Choose another month."))


def _months(view: View) -> list[str]:
    try:
        return [f"{month:%Y-%m}" for month in view.data.savings_months(view.customer_id)]
    except LakeMissing:
        return []


def month_days(month: str) -> tuple[date, date]:
    """First and last day of ``2026-11``."""
    first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).date()
    following = (first.replace(day=28) + timedelta(days=4)).replace(day=1)
    return first, following - timedelta(days=1)


def headline(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """The month's sums."""
    total = {name: sum((row[name] for row in rows), Decimal()) for name in ("baseline", "actual", "gross", "net")}
    deducted = total["gross"] - total["net"]
    share = saved_share(total["baseline"], total["baseline"] - total["net"])
    hours = sum(row["hours"] for row in rows)
    coverage = sum(row["coverage"] for row in rows) / len(rows) if rows else None
    tone: ui.Tone = "bad" if total["net"] < 0 else "good" if total["net"] > 0 else ""
    return ui.kpis(
        [
            ui.Kpi("Net savings", ui.usd(total["net"]), f"{ui.percent(share)} of B1 list", tone),
            ui.Kpi("Baseline B1 list", ui.usd(total["baseline"]), "the same machines on demand"),
            ui.Kpi("Cost", ui.usd(total["actual"]), f"{hours:,} complete cluster hours"),
            ui.Kpi("Gross savings", ui.usd(total["gross"]), f"{ui.usd(deducted)} deducted"),
            ui.Kpi("Coverage", ui.percent(coverage), f"mean of {len(rows)} days"),
        ]
    )


def bar_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The figure's columns."""
    starts = [
        datetime(row["day"].year, row["day"].month, row["day"].day, tzinfo=UTC).timestamp() * 1000 for row in rows
    ]
    return {
        # Around the day's tick, so that the label stands below its bar.
        "left": [start - 0.38 * DAY_MS for start in starts],
        "right": [start + 0.38 * DAY_MS for start in starts],
        "day": starts,
        **{name: [row[name] for row in rows] for name in ("net", "baseline", "actual", "gross", "coverage")},
        "color": [plots.BAD if row["net"] < 0 else plots.SPOT for row in rows],
        "alpha": [0.95 if row["realised"] else 0.5 for row in rows],
        "state": ["realised" if row["realised"] else "estimated" for row in rows],
    }


def day_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """One row for each day, newest first."""

    def net(row: Mapping[str, Any]) -> Markup:
        return Markup('<span class="{}">{}</span>').format("bad" if row["net"] < 0 else "good", ui.usd(row["net"]))

    return ui.table(
        [
            ui.Column("Day", lambda row: f"{row['day']:%a %d %b %Y}"),
            ui.Column("B1 list", lambda row: ui.usd(row["baseline"]), number=True),
            ui.Column("Cost", lambda row: ui.usd(row["actual"]), number=True),
            ui.Column("Gross", lambda row: ui.usd(row["gross"]), number=True),
            ui.Column("Overlap", lambda row: ui.usd(-row["overlap"]), number=True),
            ui.Column("Fallback premium", lambda row: ui.usd(-row["fallback"]), number=True),
            ui.Column("Net", net, number=True),
            ui.Column(
                "Of B1", lambda row: ui.percent(saved_share(row["baseline"], row["baseline"] - row["net"])), number=True
            ),
            ui.Column("Coverage", lambda row: ui.percent(row["coverage"], digits=0), number=True),
            ui.Column(
                "Stage", lambda row: ui.chip("realised", "good") if row["realised"] else ui.chip("estimated", "warn")
            ),
        ],
        list(reversed(rows)),
    )


def report_links(month: str) -> Markup:
    """Downloads of the month's report in each format."""
    return Markup('<p class="files">{}</p>').format(
        Markup(" ").join(
            Markup('<a download href="/report/{}.{}">{}</a>').format(month, kind, kind.upper()) for kind in FORMATS
        )
    )


def statement_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Statements, newest period first."""
    if not rows:
        return ui.empty(
            "No statement has been written yet",
            "A Dagster schedule writes one for every finished day; a month's follows when the month is over.",
        )

    def period(row: Mapping[str, Any]) -> str:
        return f"{row['period_start']:%B %Y}" if row["period"] == "month" else f"{row['period_start']:%a %d %b %Y}"

    return ui.table(
        [
            ui.Column("Period", period),
            ui.Column("Kind", lambda row: row["period"]),
            ui.Column("Revision", lambda row: row["revision"], number=True),
            ui.Column(
                "Baseline",
                lambda row: f"{row['baseline_name'].replace('_', ' ')} {ui.usd(row['baseline_usd'])}",
                number=True,
            ),
            ui.Column("Cost", lambda row: ui.usd(row["actual_usd"]), number=True),
            ui.Column("Net savings", lambda row: ui.usd(row["net_savings_usd"]), number=True),
            ui.Column("Fee", lambda row: ui.usd(row["fee_usd"]), number=True),
            ui.Column("Coverage", lambda row: ui.percent(row["coverage"], digits=0), number=True),
            ui.Column("Lake release", lambda row: row["lake_release_id"], number=True),
            ui.Column("Written (UTC)", lambda row: ui.when(row["created_at"]), number=True),
        ],
        rows,
    )


def export(data: Data, customer_id: UUID, params: Mapping[str, str]) -> pa.Table:
    """Savings by cluster and day of the month."""
    try:
        first, last = month_days(params.get("month", ""))
    except ValueError:
        first, last = month_days(f"{datetime.now(UTC):%Y-%m}")
    return data.savings_export(customer_id, first, last)
