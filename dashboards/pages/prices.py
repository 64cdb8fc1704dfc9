"""Spot prices: the history of each pool, its discount, and which pools moved most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import panel_material_ui as pmui
import param
import pyarrow as pa
from markupsafe import Markup

from dashboards import components as ui
from dashboards import plots
from dashboards.data import Data, DataError, LakeMissing, PriceRegion
from dashboards.shell import View, heading, live, offer, restore

WINDOWS = {"2 days": 2, "7 days": 7, "30 days": 30, "90 days": 90, "1 year": 366}


class PriceFilter(param.Parameterized):
    """What the page shows; kept in its address. An empty type means the one that moved most."""

    region: Any = param.Selector(default=None, objects=[None])
    instance_type: Any = param.String(default="", label="Instance type")
    window: Any = param.Selector(default="7 days", objects=list(WINDOWS))


def build(view: View) -> Any:
    """The page's content."""
    regions = _regions(view)
    if not regions:
        return ui.stack(
            heading("Spot prices"),
            ui.html(
                ui.empty(
                    "No price is in the lake yet",
                    "Prices are ingested by the Dagster asset spot_prices (day × region, refreshed hourly); "
                    "start a backfill there to fetch up to 90 days of history.",
                )
            ),
        )
    chosen = PriceFilter()
    offer(chosen, "region", list(regions))
    restore(chosen, {"region": "region", "instance_type": "type", "window": "window"})
    picker = pmui.AutocompleteInput(
        label="Instance type", options=[], restrict=True, min_characters=0, size="small", width=220, margin=0
    )
    figures, movers, legend = (ui.html("") for _ in range(3))
    links = ui.inline()
    chart = ui.stack()
    last: list[Any] = []

    def refresh(*_: Any) -> None:
        if chosen.region not in regions:
            chosen.region = next(iter(regions))
        region = _current(view, regions[chosen.region])
        days = WINDOWS[chosen.window]
        moved = view.data.price_movers(view.customer_id, region, days)
        types = view.data.price_types(view.customer_id, region)
        if picker.options != types:
            picker.options = types
        name = chosen.instance_type if chosen.instance_type in types else moved[0]["instance_type"] if moved else ""
        if picker.value != name:
            picker.value = name
        listed = view.data.list_price(view.customer_id, region.region, name)
        rows = view.data.spot_prices(view.customer_id, region, name, days)
        zones = zone_columns(rows)
        ui.put(figures, headline(zones, listed, region, days))
        ui.put(movers, mover_table(moved, region, chosen.window))
        ui.put(links, ui.downloads("prices", {"region": region.region, "type": name, "window": chosen.window}))
        colors = {zone: plots.SERIES[index % len(plots.SERIES)] for index, zone in enumerate(zones)}
        ui.put(legend, ui.legend({**colors, **({"On-demand": plots.BASELINE} if listed is not None else {})}))
        if last != [rows, listed]:
            last[:] = [rows, listed]
            sources = {zone: plots.source(columns) for zone, columns in zones.items()}
            chart.objects = [
                plots.pane(plots.price_lines(sources, colors, float(listed) if listed else None))
                if zones
                else ui.html(ui.empty("No price of this type in the window", "Choose another type or a longer window."))
            ]

    def pick(event: Any) -> None:
        if event.new:
            chosen.instance_type = event.new

    refresh()
    picker.param.watch(pick, "value")
    chosen.param.watch(refresh, ["region", "instance_type", "window"])
    live(view, refresh)
    return ui.stack(
        heading("Spot prices", "All times UTC. Linux/UNIX, USD per instance hour."),
        ui.controls(
            pmui.Select.from_param(chosen.param.region, size="small", width=160, margin=0),
            picker,
            ui.choice(chosen.param.window),
            links,
        ),
        figures,
        ui.card(
            "Price by zone",
            legend,
            chart,
            note="A price holds until the next change; zone ids name the same place in every account.",
        ),
        ui.card("Pools that moved most", movers, note="Highest over lowest price in the window. Choose one to see it."),
    )


def _current(view: View, region: PriceRegion) -> PriceRegion:
    """The region as it is in the newest release: its last day moves at midnight."""
    return _regions(view).get(region.region, region)


def _regions(view: View) -> dict[str, PriceRegion]:
    try:
        return {region.region: region for region in view.data.price_regions(view.customer_id)}
    except LakeMissing:
        return {}


def zone_columns(rows: pa.Table) -> dict[str, dict[str, list[Any]]]:
    """The rows of each zone as columns, the last price drawn on to the newest moment of all zones."""
    zones: dict[str, dict[str, list[Any]]] = {}
    for row in rows.to_pylist():
        columns = zones.setdefault(row["zone_id"], {"ts": [], "price": [], "lowest": [], "highest": []})
        columns["ts"].append(row["ts"].timestamp() * 1000)
        columns["price"].append(row["price"])
        for name in ("lowest", "highest"):
            columns[name].append(row[name] if row[name] is not None else row["price"])
    newest = max((columns["ts"][-1] for columns in zones.values()), default=0.0)
    for columns in zones.values():
        if columns["ts"][-1] < newest:
            columns["ts"].append(newest)
            for name in ("lowest", "highest", "price"):
                columns[name].append(columns["price"][-1])
    return zones


def headline(zones: Mapping[str, Mapping[str, Sequence[Any]]], listed: Any, region: PriceRegion, days: int) -> Markup:
    """Cheapest zone, discount, range."""
    newest = {zone: columns["price"][-1] for zone, columns in zones.items()}
    highest = {zone: max(columns["highest"]) for zone, columns in zones.items()}
    lowest = {zone: min(columns["lowest"]) for zone, columns in zones.items()}
    cheapest = min(newest, key=lambda zone: newest[zone], default=None)
    peak = max(highest, key=lambda zone: highest[zone], default=None)
    floor = min(lowest, key=lambda zone: lowest[zone], default=None)
    shock = listed is not None and peak is not None and highest[peak] > float(listed)
    return ui.kpis(
        [
            ui.Kpi(
                "Cheapest zone now",
                ui.pool_price(newest[cheapest]) if cheapest else ui.DASH,
                f"in {cheapest}, of {len(newest)} zones" if cheapest else "no price in the window",
            ),
            ui.Kpi(
                "On-demand", ui.pool_price(listed), "list price" if listed is not None else "list price not ingested"
            ),
            ui.Kpi(
                "Discount in that zone",
                ui.percent(1 - newest[cheapest] / float(listed)) if cheapest and listed else ui.DASH,
                "against the list price",
                "" if not cheapest or not listed else "good" if newest[cheapest] < float(listed) else "bad",
            ),
            ui.Kpi(
                "Highest in the window",
                ui.pool_price(highest[peak]) if peak else ui.DASH,
                (f"in {peak}" + (", above on-demand" if shock else "")) if peak else "",
                "bad" if shock else "",
            ),
            ui.Kpi(
                "Lowest in the window",
                ui.pool_price(lowest[floor]) if floor else ui.DASH,
                f"in {floor}" if floor else "",
            ),
            ui.Kpi("Prices to", f"{region.last:%d %b %Y}", f"from {region.first:%d %b %Y} in the lake"),
        ]
    )


def mover_table(rows: Sequence[Mapping[str, Any]], region: PriceRegion, window: str) -> Markup:
    """The pools with the largest moves."""
    largest = max((row["highest"] / row["lowest"] for row in rows), default=1.0)
    return ui.table(
        [
            ui.Column(
                "Type",
                lambda row: ui.link_here(
                    row["instance_type"], {"region": region.region, "type": row["instance_type"], "window": window}
                ),
            ),
            ui.Column("Zone", lambda row: row["zone_id"]),
            ui.Column("Lowest", lambda row: ui.pool_price(row["lowest"]), number=True),
            ui.Column("Highest", lambda row: ui.pool_price(row["highest"]), number=True),
            ui.Column("Highest at (UTC)", lambda row: ui.when(row["highest_at"]), number=True),
            ui.Column("Now", lambda row: ui.pool_price(row["newest"]), number=True),
            ui.Column(
                "Highest / lowest",
                lambda row: ui.bar(row["highest"] / row["lowest"], largest, f"× {row['highest'] / row['lowest']:.2f}"),
                number=True,
            ),
        ],
        rows,
    )


def export(data: Data, customer_id: UUID, params: Mapping[str, str]) -> pa.Table:
    """Every change of the type in the window."""
    regions = {region.region: region for region in data.price_regions(customer_id)}
    if not regions:
        raise DataError("There is nothing to download", "no price is in the lake", "run the Dagster asset spot_prices.")
    region = regions.get(params.get("region", ""), next(iter(regions.values())))
    return data.prices_export(customer_id, region, params.get("type", ""), WINDOWS.get(params.get("window", ""), 7))
