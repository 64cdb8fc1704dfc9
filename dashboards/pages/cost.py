"""Cost: what runs now and what it costs, the baseline, the savings and the month they point to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import panel_material_ui as pmui
import param
import pyarrow as pa
from markupsafe import Markup

from dashboards import components as ui
from dashboards import plots
from dashboards.data import HOURS_PER_MONTH, CostHour, Data, LakeMissing, LiveCost, project, saved_share
from dashboards.shell import View, heading, live, offer, restore

WINDOWS = {"48 hours": 48, "7 days": 168, "30 days": 720}
ALL = "All clusters"
BASELINE = "B1 list: the same machines on demand"


class CostFilter(param.Parameterized):
    """What the page shows; kept in its address."""

    cluster: Any = param.Selector(default=ALL, objects=[ALL])
    window: Any = param.Selector(default="7 days", objects=list(WINDOWS))


def build(view: View) -> Any:
    """The page's content."""
    clusters = view.data.clusters(view.customer_id)
    if not clusters:
        return ui.stack(
            heading("Cost"),
            ui.html(
                ui.empty(
                    "No cluster is connected",
                    "Add one with POST /api/v1/clusters and start its agent; costs appear with its first report.",
                )
            ),
        )
    chosen = CostFilter()
    offer(chosen, "cluster", [ALL, *clusters])
    restore(chosen, {"cluster": "cluster", "window": "window"})

    head = heading("Cost", "All times UTC. Money in USD.")
    figures, trend_note, by_cluster, by_type = (ui.html("") for _ in range(4))
    hours = plots.source({name: [] for name in plots.COST_COLUMNS})
    ratios = plots.source({"ts": [], "end": [], "ratio": []})
    links = ui.inline()
    charts = ui.stack()

    def cost_card() -> Any:
        legend = {"Spot": plots.SPOT, "On-demand": plots.ON_DEMAND, f"Baseline {BASELINE}": plots.BASELINE}
        return ui.card(
            "Cost of each hour", trend_note, ui.html(ui.legend(legend)), plots.pane(plots.cost_hourly(hours))
        )

    def all_cards() -> Any:
        return ui.stack(
            cost_card(),
            ui.card(
                "Savings against B1 list",
                plots.pane(plots.ratio_line(ratios, "ts", "ratio", "saved")),
                note="Share of the baseline saved in each complete hour; below zero means that Spot cost more.",
            ),
        )

    def refresh(*_: Any) -> None:
        cluster_id = clusters.get(chosen.cluster)
        span = WINDOWS[chosen.window]
        now = datetime.now(UTC)
        cost = view.data.live_cost(view.customer_id)
        rows = _hours(view.data, view.customer_id, span, cluster_id)
        week = rows if span == 168 else _hours(view.data, view.customer_id, 168, cluster_id)
        ui.put(figures, headline(cost.of(cluster_id), week))
        ui.put(by_cluster, cluster_table(cost, view.data, view.customer_id, clusters))
        ui.put(by_type, type_table(cost.of(cluster_id)))
        ui.put(links, ui.downloads("cost", {"cluster": cluster_id and chosen.cluster, "window": chosen.window}))
        ui.put(trend_note, coverage_note(rows, span))
        plots.replace(hours, hour_columns(rows, now))
        saved = ratio_columns(rows)
        plots.replace(ratios, saved)
        if saved["ts"]:
            ui.swap(charts, "cost and savings", all_cards)
        elif rows:
            ui.swap(charts, "cost", cost_card)
        else:
            ui.swap(charts, "nothing", nothing_computed)

    refresh()
    chosen.param.watch(refresh, ["cluster", "window"])
    live(view, refresh)
    return ui.stack(
        head,
        ui.controls(
            pmui.Select.from_param(chosen.param.cluster, size="small", width=220, margin=0),
            ui.choice(chosen.param.window),
            links,
        ),
        figures,
        charts,
        ui.card("By cluster", by_cluster, note="Now, and complete hours of the last 7 days."),
        ui.card("By node type", by_type, note="Nodes running now at the newest known prices."),
    )


def nothing_computed() -> Any:
    """In the charts' place while the lake has no hour."""
    return ui.html(
        ui.empty(
            "No hour has been computed yet",
            "Dagster computes costs every five minutes from node hours and prices; the running hour appears a few "
            "minutes after the first start, earlier days after a backfill of cluster_cost_hourly.",
        )
    )


def _hours(data: Data, customer_id: UUID, span: int, cluster_id: UUID | None) -> list[CostHour]:
    try:
        return data.cost_hours(customer_id, span, cluster_id)
    except LakeMissing:
        return []


def headline(cost: LiveCost, week: list[CostHour]) -> Markup:
    """The figures on top: now, baseline, savings, month, coverage."""
    saved = cost.savings
    projection = project(week)
    month = projection.actual if projection else cost.actual and cost.actual * HOURS_PER_MONTH
    complete = [hour for hour in week if hour.complete and hour.actual is not None and hour.b1 is not None]
    actual = sum((hour.actual or Decimal() for hour in complete), Decimal())
    b1 = sum((hour.b1 or Decimal() for hour in complete), Decimal())
    realised = saved_share(b1, actual)
    return ui.kpis(
        [
            ui.Kpi(
                "Cost now",
                ui.usd_per_hour(cost.actual),
                f"{cost.nodes} nodes, {cost.spot_nodes} Spot · at {cost.at:%H:%M:%S} UTC",
            ),
            ui.Kpi("Baseline B1 list now", ui.usd_per_hour(cost.b1), "the same machines on demand"),
            ui.Kpi(
                "Saved now, estimated",
                ui.percent(saved),
                f"{ui.usd_per_hour((cost.b1 or 0) - (cost.actual or 0))} against B1"
                if cost.priced
                else "no price known",
                _tone(saved),
            ),
            ui.Kpi(
                "Saved in 7 days, gross",
                ui.usd(b1 - actual) if complete else ui.DASH,
                f"{ui.percent(realised)} of B1 {ui.usd(b1)}" if complete else "no complete hour yet",
                _tone(realised),
            ),
            ui.Kpi(
                "Projected month",
                ui.usd(month, digits=0),
                f"{ui.usd(projection.low, digits=0)} to {ui.usd(projection.high, digits=0)} · "
                f"{projection.hours} complete h × 730"
                if projection
                else "cost now × 730 h, until an hour is complete",
            ),
            ui.Kpi(
                "Coverage now",
                ui.percent(cost.coverage, digits=0),
                f"{cost.priced} of {cost.nodes} nodes priced",
                "warn" if cost.coverage is not None and cost.coverage < 1 else "",
            ),
        ]
    )


def _tone(share: Decimal | None) -> ui.Tone:
    return "" if not share else "bad" if share < 0 else "good"


def coverage_note(rows: list[CostHour], span: int) -> Markup:
    """How much of the window is there."""
    complete = sum(hour.complete for hour in rows)
    return Markup('<p class="note">{} of {} hours are complete; paler bars are not.</p>').format(complete, span)


def hour_columns(rows: list[CostHour], now: datetime) -> dict[str, list[Any]]:
    """The figure's columns. Hours without a known cost are left out: a gap is shown as a gap."""
    shown = [hour for hour in rows if hour.actual is not None]
    starts = plots.milliseconds([hour.ts for hour in shown])
    return {
        "ts": starts,
        "end": [start + plots.HOUR_MS for start in starts],
        "left": [start + 0.06 * plots.HOUR_MS for start in starts],
        "right": [start + 0.94 * plots.HOUR_MS for start in starts],
        "spot": [hour.spot or 0 for hour in shown],
        "total": [hour.actual for hour in shown],
        # The running hour's baseline is only a part of an hour too; a line would seem to fall.
        "b1": [hour.b1 if hour.ts + timedelta(hours=1) <= now else None for hour in shown],
        "saved": [hour.b1 - hour.actual if hour.b1 is not None and hour.actual is not None else None for hour in shown],
        "coverage": [hour.coverage for hour in shown],
        "nodes": [hour.nodes for hour in shown],
        "alpha": [0.95 if hour.complete else 0.4 for hour in shown],
        "state": [
            "complete" if hour.complete else "running" if hour.ts + timedelta(hours=1) > now else "not complete"
            for hour in shown
        ],
    }


def ratio_columns(rows: list[CostHour]) -> dict[str, list[Any]]:
    """Savings of complete hours as a share of B1."""
    shares = [(hour.ts, saved_share(hour.b1, hour.actual)) for hour in rows if hour.complete]
    known = [(ts, share) for ts, share in shares if share is not None]
    starts = plots.milliseconds([ts for ts, _ in known])
    return {
        "ts": starts,
        "end": [start + plots.HOUR_MS for start in starts],
        "ratio": [share for _, share in known],
    }


def cluster_table(cost: LiveCost, data: Data, customer_id: UUID, clusters: Mapping[str, UUID]) -> Markup:
    """One row for each cluster."""
    try:
        week = data.cost_by_cluster(customer_id, 168)
    except LakeMissing:
        week = {}
    rows = [(name, cost.of(id_), week.get(str(id_))) for name, id_ in clusters.items()]
    largest = max((now.actual or Decimal() for _, now, _ in rows), default=Decimal())
    return ui.table(
        [
            ui.Column("Cluster", lambda row: row[0]),
            ui.Column("Nodes", lambda row: f"{row[1].nodes} ({row[1].spot_nodes} Spot)", number=True),
            ui.Column("Now", lambda row: ui.bar(row[1].actual, largest, ui.usd_per_hour(row[1].actual)), number=True),
            ui.Column("B1 list", lambda row: ui.usd_per_hour(row[1].b1), number=True),
            ui.Column("Saved", lambda row: _share(row[1].savings), number=True),
            ui.Column("7 days", lambda row: ui.usd(row[2]["actual"]) if row[2] else ui.DASH, number=True),
            ui.Column("Saved in 7 days", lambda row: _saved(row[2]), number=True),
        ],
        rows,
    )


def _share(share: Decimal | None) -> Markup:
    return Markup('<span class="{}">{}</span>').format(_tone(share), ui.percent(share))


def _saved(week: Mapping[str, Any] | None) -> Markup | str:
    if not week or week["b1"] is None or week["actual"] is None:
        return ui.DASH
    saved = week["b1"] - week["actual"]
    return Markup('<span class="{}">{}</span>').format("bad" if saved < 0 else "good", ui.usd(saved))


def type_table(cost: LiveCost) -> Markup:
    """One row for each node type and purchase option, most expensive first."""
    merged: dict[tuple[str, str], list[Any]] = {}
    for group in cost.groups:
        sums = merged.setdefault((group.instance_type, group.node_type), [0, None, None])
        sums[0] += group.nodes
        sums[1] = _add(sums[1], group.actual)
        sums[2] = _add(sums[2], group.b1)
    rows = sorted(merged.items(), key=lambda item: (-(item[1][1] or Decimal()), item[0]))
    if not rows:
        return ui.empty("No node is running", "Nodes appear as soon as an agent reports them.")
    largest = rows[0][1][1] or Decimal()
    return ui.table(
        [
            ui.Column("Type", lambda row: row[0][0]),
            ui.Column("Bought as", lambda row: ui.chip(row[0][1], row[0][1])),
            ui.Column("Nodes", lambda row: ui.count(row[1][0]), number=True),
            ui.Column(
                "Now", lambda row: ui.bar(row[1][1], largest, ui.usd_per_hour(row[1][1]), row[0][1]), number=True
            ),
            ui.Column("Saved", lambda row: _share(saved_share(row[1][2], row[1][1])), number=True),
        ],
        rows[:14],
        caption=f"The 14 most expensive of {len(rows)}; the rest is under Nodes." if len(rows) > 14 else "",
    )


def _add(left: Decimal | None, right: Decimal | None) -> Decimal | None:
    return right if left is None else left if right is None else left + right


def export(data: Data, customer_id: UUID, params: Mapping[str, str]) -> pa.Table:
    """The hourly rows the page shows."""
    clusters = data.clusters(customer_id)
    return data.cost_export(
        customer_id, WINDOWS.get(params.get("window", ""), 168), clusters.get(params.get("cluster", ""))
    )
