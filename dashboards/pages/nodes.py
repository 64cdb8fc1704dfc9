"""Clusters and nodes: what runs where, as what, at which price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from dashboards.data import Data, LakeMissing, saved_share
from dashboards.shell import View, heading, live, offer, restore

ALL = "All clusters"
KINDS = {"Spot and on-demand": None, "Spot": "spot", "On-demand": "on-demand"}
TABLE_ROWS = 200
# An agent reports every 15 s or less; past this it is away.
AGENT_SILENT = timedelta(minutes=2)
STATUS: dict[str, ui.Tone] = {
    "active": "good",
    "ready": "good",
    "pending": "warn",
    "away": "bad",
    "not_ready": "bad",
    "cordoned": "warn",
}


class NodeFilter(param.Parameterized):
    """What the page shows; kept in its address."""

    cluster: Any = param.Selector(default=ALL, objects=[ALL])
    bought: Any = param.Selector(default="Spot and on-demand", objects=list(KINDS))


def build(view: View) -> Any:
    """The page's content."""
    clusters = view.data.clusters(view.customer_id)
    chosen = NodeFilter()
    offer(chosen, "cluster", [ALL, *clusters])
    restore(chosen, {"cluster": "cluster", "bought": "bought"})
    if not clusters:
        return ui.stack(
            heading("Clusters and nodes"),
            ui.html(
                ui.empty(
                    "No cluster is connected",
                    "Add one with POST /api/v1/clusters and start its agent; it appears with its first report.",
                )
            ),
        )
    figures, cluster_rows, node_rows = (ui.html("") for _ in range(3))
    links = ui.inline()
    hours = plots.source({name: [] for name in ("ts", "end", "spot", "on_demand", "total")})

    chart = ui.stack()

    def drawn() -> Any:
        return plots.pane(plots.stacked_nodes(hours))

    def refresh(*_: Any) -> None:
        now = datetime.now(UTC)
        cluster_id, node_type = clusters.get(chosen.cluster), KINDS[chosen.bought]
        states = view.data.cluster_states(view.customer_id)
        nodes = view.data.nodes(view.customer_id, cluster_id, node_type)
        ui.put(figures, headline([state for state in states if cluster_id in (None, state["id"])], nodes))
        ui.put(cluster_rows, cluster_table(states, now))
        ui.put(node_rows, node_table(nodes, now))
        ui.put(
            links,
            ui.downloads(
                "nodes",
                {"cluster": cluster_id and chosen.cluster, "bought": node_type and chosen.bought},
            ),
        )
        history = _history(view, cluster_id)
        plots.replace(hours, history)
        ui.swap(chart, "chart" if history["ts"] else "nothing", drawn if history["ts"] else nothing_computed)

    refresh()
    chosen.param.watch(refresh, ["cluster", "bought"])
    live(view, refresh)
    return ui.stack(
        heading("Clusters and nodes", "All times UTC."),
        ui.controls(
            pmui.Select.from_param(chosen.param.cluster, size="small", width=220, margin=0),
            ui.choice(chosen.param.bought),
            links,
        ),
        figures,
        ui.card("Clusters", cluster_rows, note="What each agent last reported."),
        ui.card(
            "Nodes over the last 7 days",
            ui.html(ui.legend({"Spot": plots.SPOT, "On-demand": plots.ON_DEMAND})),
            chart,
            note="Mean number of nodes in each hour.",
        ),
        ui.card("Nodes now", node_rows, note="At the newest known price of each node's own pool."),
    )


def nothing_computed() -> Any:
    """In the chart's place while the lake has no hour."""
    return ui.html(
        ui.empty(
            "No hour has been computed yet",
            "Dagster computes node hours every five minutes; the running one appears soon after the first start.",
        )
    )


def _history(view: View, cluster_id: UUID | None) -> dict[str, list[Any]]:
    try:
        rows = view.data.node_counts(view.customer_id, 168, cluster_id).to_pydict()
    except LakeMissing:
        return {name: [] for name in ("ts", "end", "spot", "on_demand", "total")}
    starts = plots.milliseconds(rows["ts"])
    return {
        "ts": starts,
        "end": [start + plots.HOUR_MS for start in starts],
        "spot": rows["spot"],
        "on_demand": rows["on_demand"],
        "total": [spot + other for spot, other in zip(rows["spot"], rows["on_demand"], strict=True)],
    }


def headline(states: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]]) -> Markup:
    """Counts and size."""
    spot = sum(node["node_type"] == "spot" for node in nodes)
    ready = sum(node["status"] == "ready" for node in nodes)
    return ui.kpis(
        [
            ui.Kpi("Clusters", ui.count(len(states)), f"{sum(s['status'] == 'active' for s in states)} active"),
            ui.Kpi("Nodes", ui.count(len(nodes)), f"{ready} ready", "" if ready == len(nodes) else "warn"),
            ui.Kpi(
                "Spot share", ui.percent(spot / len(nodes), digits=0) if nodes else ui.DASH, f"{spot} of {len(nodes)}"
            ),
            ui.Kpi("CPU", f"{sum(node['cpu_cores'] for node in nodes):,.0f} cores", "of all nodes shown"),
            ui.Kpi("Memory", ui.gib(sum(node["memory_bytes"] for node in nodes)), "of all nodes shown"),
        ]
    )


def cluster_table(states: Sequence[Mapping[str, Any]], now: datetime) -> Markup:
    """One row for each cluster."""

    def seen(state: Mapping[str, Any]) -> Markup:
        late = state["last_seen_at"] is None or now - state["last_seen_at"] > AGENT_SILENT
        return Markup('<span class="{}">{}</span>').format("bad" if late else "", ui.ago(state["last_seen_at"], now))

    def status(state: Mapping[str, Any]) -> Markup:
        stopped = Markup(" ") + ui.chip("stopped by kill switch", "bad") if state["kill_switch"] else Markup("")
        return ui.chip(state["status"], STATUS.get(state["status"], "")) + stopped

    return ui.table(
        [
            ui.Column("Cluster", lambda state: state["cluster_name"]),
            ui.Column("Region", lambda state: state["region"]),
            ui.Column("Status", status),
            ui.Column("Agent", lambda state: state["agent_version"] or ui.DASH),
            ui.Column("Agent seen", seen),
            ui.Column("Nodes", lambda state: f"{state['nodes']} ({state['spot_nodes']} Spot)", number=True),
            ui.Column("Not ready", lambda state: ui.count(state["not_ready"]), number=True),
            ui.Column("CPU", lambda state: f"{state['cpu_cores']:,.0f} cores", number=True),
            ui.Column("Memory", lambda state: ui.gib(state["memory_bytes"]), number=True),
        ],
        states,
    )


def node_table(nodes: Sequence[Mapping[str, Any]], now: datetime) -> Markup:
    """The most expensive nodes."""
    if not nodes:
        return ui.empty("No node to show", "Choose another cluster or purchase option; new nodes appear by themselves.")
    largest = max((node["price_usd_per_hour"] or Decimal() for node in nodes), default=Decimal())

    def price(node: Mapping[str, Any]) -> Markup:
        paid = node["price_usd_per_hour"]
        return ui.bar(paid, largest, ui.usd_per_hour(paid), node["node_type"])

    return ui.table(
        [
            ui.Column("Node", lambda node: node["node_name"]),
            ui.Column("Cluster", lambda node: node["cluster_name"]),
            ui.Column("Type", lambda node: node["instance_type"]),
            ui.Column("Zone", lambda node: node["availability_zone"]),
            ui.Column("Bought as", lambda node: ui.chip(node["node_type"], node["node_type"])),
            ui.Column("Status", lambda node: ui.chip(node["status"], STATUS.get(node["status"], ""))),
            ui.Column("Price", price, number=True),
            ui.Column(
                "Below list",
                lambda node: ui.percent(saved_share(node["on_demand_usd_per_hour"], node["price_usd_per_hour"])),
                number=True,
            ),
            ui.Column("Runs for", lambda node: ui.lasted(now - node["created_at"]), number=True),
        ],
        nodes[:TABLE_ROWS],
        caption=f"The {TABLE_ROWS} most expensive of {len(nodes)}; the download has all."
        if len(nodes) > TABLE_ROWS
        else "",
    )


def export(data: Data, customer_id: UUID, params: Mapping[str, str]) -> pa.Table:
    """The nodes the page shows."""
    clusters = data.clusters(customer_id)
    return data.nodes_export(customer_id, clusters.get(params.get("cluster", "")), KINDS.get(params.get("bought", "")))
