"""Gap filler: what is missing in the data, and filling it through the control service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import panel_material_ui as pmui
import param
import pyarrow as pa
from markupsafe import Markup

from dashboards import components as ui
from dashboards import plots
from dashboards.api import ApiError
from dashboards.data import Data
from dashboards.shell import View, heading, live, offer, restore
from warehouse.gap_reasons import REMEDIES

log = logging.getLogger("cloudoptim.dashboards")

LOOKBACKS = {"14 days": 14, "30 days": 30, "90 days": 90, "1 year": 366}
ALL = "All tables"
TABLES = {"Spot prices": "spot_prices", "On-demand prices": "on_demand_prices", "Metrics, 5 minutes": "metric_5m"}
NAMES = {table: name for name, table in TABLES.items()}
TABLE_ROWS = 100
DAY_MS = 24 * plots.HOUR_MS
POLL_SECONDS = 2.0
ENDED = ("succeeded", "failed", "cancelled")
# What a day of the calendar says, worst first.
COLORS = {
    "open": plots.BAD,
    "filling": plots.ON_DEMAND,
    "unfillable": plots.BASELINE,
    "filled": plots.BRAND,
    "complete": plots.SPOT,
}
STATES: dict[str, ui.Tone] = {
    "open": "bad",
    "filling": "warn",
    "filled": "good",
    "unfillable": "quiet",
    "requested": "warn",
    "running": "warn",
    "succeeded": "good",
    "failed": "bad",
    "cancelled": "quiet",
}


class GapFilter(param.Parameterized):
    """What the page shows; kept in its address."""

    table: Any = param.Selector(default=ALL, objects=[ALL, *TABLES])
    lookback: Any = param.Selector(default="30 days", objects=list(LOOKBACKS))


def build(view: View) -> Any:
    """The page's content."""
    chosen = GapFilter()
    offer(chosen, "table", [ALL, *TABLES])
    restore(chosen, {"table": "table", "lookback": "lookback"})
    figures, gap_rows, fills, progress = (ui.html("") for _ in range(4))
    links = ui.inline()
    chart = ui.stack()
    may_fill = view.login.platform_admin
    button = pmui.Button(label="Fill gaps", icon="auto_fix_high", color="primary", size="small", margin=0)
    cancel = pmui.Button(label="Cancel", variant="outlined", size="small", margin=0, visible=False)
    track = pmui.LinearProgress(value=0, variant="determinate", sizing_mode="stretch_width", margin=0, visible=False)
    shown: list[Any] = []
    running: dict[str, Any] = {}

    def refresh(*_: Any) -> None:
        days = LOOKBACKS[chosen.lookback]
        gaps = [gap for gap in view.data.gaps(view.customer_id, days) if wanted(chosen, gap)]
        coverage = [row for row in view.data.coverage_by_day(view.customer_id, days) if wanted(chosen, row)]
        ui.put(figures, headline(gaps, coverage, days))
        ui.put(gap_rows, gap_table(gaps, view.data.source_failures() if may_fill else {}))
        ui.put(fills, fill_table(view.data.fills(view.customer_id, view.login.platform_admin)))
        ui.put(links, ui.downloads("gaps", {"table": TABLES.get(chosen.table), "lookback": chosen.lookback}))
        button.disabled = not may_fill or bool(running) or not open_partitions(gaps)
        if shown != [coverage, days]:
            shown[:] = [coverage, days]
            chart.objects = [calendar(coverage, days)]

    async def fill(_: Any) -> None:
        gaps = [gap for gap in view.data.gaps(view.customer_id, LOOKBACKS[chosen.lookback]) if wanted(chosen, gap)]
        running["at"] = datetime.now(UTC)
        button.disabled, cancel.visible, track.visible = True, True, True
        try:
            for table, partitions in open_partitions(gaps).items():
                await fill_table_gaps(table, partitions)
        except ApiError as error:
            ui.put(progress, ui.problem("The gaps were not filled", str(error), "mend that and press Fill gaps again."))
        finally:
            running.clear()
            cancel.visible, track.visible = False, False
            refresh()

    async def fill_table_gaps(table: str, partitions: Sequence[str]) -> None:
        api, login = view.services.api, view.login
        state = await api.post(login, "/admin/gap-filler/fill", {"table_name": table, "partitions": list(partitions)})
        while True:
            running["id"] = state["fill_id"]
            track.value = round(100 * state["partitions_done"] / max(1, state["partitions"]))
            ui.put(progress, fill_summary(state))
            if state["state"] in ENDED:
                return
            await asyncio.sleep(POLL_SECONDS)
            state = await api.get(login, f"/admin/gap-filler/{state['fill_id']}")

    async def stop(_: Any) -> None:
        if "id" in running:
            try:
                await view.services.api.post(view.login, f"/admin/gap-filler/{running['id']}/cancel", {})
            except ApiError as error:
                ui.put(progress, ui.problem("The fill was not cancelled", str(error), "try again."))

    button.on_click(fill)
    cancel.on_click(stop)
    refresh()
    chosen.param.watch(refresh, ["table", "lookback"])
    live(view, refresh)
    hint = (
        "Fetches what is missing from the best source there is: AWS history, the cluster's Prometheus, else "
        "interpolation, marked as such. Observed data is never overwritten."
        if may_fill
        else "Only a platform administrator can fill gaps."
    )
    return ui.stack(
        heading("Gap filler", f"Today is {datetime.now(UTC):%d %b %Y} (UTC)."),
        ui.controls(
            pmui.Select.from_param(chosen.param.table, size="small", width=200, margin=0),
            ui.choice(chosen.param.lookback),
            links,
        ),
        figures,
        ui.card(
            "Calendar",
            ui.html(
                ui.legend(
                    {
                        "Complete": COLORS["complete"],
                        "Missing": COLORS["open"],
                        "Being filled": COLORS["filling"],
                        "Filled later": COLORS["filled"],
                        "Cannot be filled": COLORS["unfillable"],
                    }
                )
            ),
            chart,
            note="One square per UTC day; the stronger the red, the larger the missing share.",
        ),
        ui.card("Fill what is missing", ui.controls(button, cancel), track, progress, note=hint),
        ui.card("Gaps", gap_rows, note="Stretches of a series that should be there and are not."),
        ui.card("Past fills", fills),
    )


def wanted(chosen: GapFilter, row: Mapping[str, Any]) -> bool:
    """True when the row's table is chosen."""
    return chosen.table == ALL or row["table_name"] == TABLES[chosen.table]


def open_partitions(gaps: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Partitions with an open gap, by fillable table."""
    found: dict[str, set[str]] = {}
    for gap in gaps:
        if gap["state"] == "open" and gap["table_name"] in NAMES:
            found.setdefault(gap["table_name"], set()).add(gap["partition_key"])
    return {table: sorted(keys) for table, keys in sorted(found.items())}


def headline(gaps: Sequence[Mapping[str, Any]], coverage: Sequence[Mapping[str, Any]], days: int) -> Markup:
    """How much is missing."""
    still = [gap for gap in gaps if gap["state"] in ("open", "filling")]
    lost = [gap for gap in gaps if gap["state"] == "unfillable"]
    filled = [gap for gap in gaps if gap["state"] == "filled"]
    expected, present = (sum(row[name] for row in coverage) for name in ("expected", "present"))
    partitions = sum(len(keys) for keys in open_partitions(gaps).values())
    return ui.kpis(
        [
            ui.Kpi("Open gaps", ui.count(len(still)), f"in {partitions} partitions", "bad" if still else "good"),
            ui.Kpi("Points missing", ui.count(sum(gap["missing_points"] for gap in still)), f"of the last {days} days"),
            ui.Kpi(
                "Coverage",
                ui.percent(present / expected) if expected else ui.DASH,
                covered(expected, present, sum(row["missing"] for row in coverage)),
            ),
            ui.Kpi("Filled later", ui.count(len(filled)), "gaps, marked with their source"),
            ui.Kpi("Cannot be filled", ui.count(len(lost)), "no run can bring them"),
        ]
    )


def covered(expected: int, present: int, missing: int) -> str:
    """What the coverage counts: a running day's later points are expected of it, but nobody misses them yet."""
    if not expected:
        return "nothing written yet"
    waiting = max(expected - present - missing, 0)
    return f"{present:,} of {expected:,} points" + (f"; {waiting:,} are not due yet and no gap" if waiting else "")


def calendar(coverage: Sequence[Mapping[str, Any]], days: int) -> Any:
    """The days of the lookback, one row per table."""
    if not coverage:
        return ui.html(
            ui.empty(
                "Nothing has been written in this lookback",
                "Coverage appears with the first ingested day; start the Dagster assets spot_prices and metric_5m.",
            )
        )
    columns: dict[str, list[Any]] = {
        name: [] for name in ("left", "right", "day", "table", "color", "alpha", "gaps", "missing", "state")
    }
    for row in coverage:
        start = datetime(row["day"].year, row["day"].month, row["day"].day, tzinfo=UTC).timestamp() * 1000
        state = next((name for name in ("open", "filling", "unfillable", "filled") if row[name]), "complete")
        whole = max(row["expected"], row["present"] + row["missing"], 1)
        share = row["missing"] / whole
        columns["left"].append(start + 0.06 * DAY_MS)
        columns["right"].append(start + 0.94 * DAY_MS)
        columns["day"].append(start)
        columns["table"].append(NAMES.get(row["table_name"], row["table_name"]))
        columns["color"].append(COLORS[state])
        columns["alpha"].append(0.35 if state == "complete" else min(1.0, 0.45 + 0.55 * share))
        columns["gaps"].append(row["open"] + row["filling"] + row["unfillable"] + row["filled"])
        columns["missing"].append(row["missing"])
        columns["state"].append(state)
    tables = sorted(set(columns["table"]))
    until = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    return plots.pane(
        plots.calendar(
            plots.source(columns),
            tables,
            first_ms=(until - timedelta(days=days + 1)).timestamp() * 1000,
            last_ms=until.timestamp() * 1000,
            height=56 + 46 * len(tables),
        )
    )


def gap_table(gaps: Sequence[Mapping[str, Any]], refusals: Mapping[tuple[str, str], str]) -> Markup:
    """Gaps, those that can be filled first, with what mends each.

    Args:
        refusals: what sources said that refused, by table and series.
    """
    if not gaps:
        return ui.empty("Nothing is missing", "Every expected point of the lookback is there.")
    order = {"open": 0, "filling": 1, "unfillable": 2, "filled": 3}
    rows = sorted(gaps, key=lambda gap: order.get(gap["state"], 9))
    return ui.table(
        [
            ui.Column("Table", lambda gap: NAMES.get(gap["table_name"], gap["table_name"])),
            ui.Column("Series", lambda gap: gap["series"]),
            ui.Column("From (UTC)", lambda gap: ui.when(gap["gap_start"])),
            ui.Column("Lasts", lambda gap: ui.lasted(gap["gap_end"] - gap["gap_start"]), number=True),
            ui.Column("Missing", lambda gap: f"{gap['missing_points']:,} of {gap['expected_points']:,}", number=True),
            ui.Column("Reason", lambda gap: gap["reason"].replace("_", " ")),
            ui.Column("State", lambda gap: ui.chip(gap["state"], STATES.get(gap["state"], ""))),
            ui.Column("What mends it", lambda gap: remedy(gap, refusals)),
        ],
        rows[:TABLE_ROWS],
        caption=f"{TABLE_ROWS} of {len(rows)}; the download has all." if len(rows) > TABLE_ROWS else "",
    )


def remedy(gap: Mapping[str, Any], refusals: Mapping[tuple[str, str], str]) -> str:
    """What brings the gap's data, after what the source said when it refused."""
    if gap["state"] == "filled":
        return ""
    said = refusals.get((gap["table_name"], gap["series"]), "")
    return f"{said.rstrip('.')}. {REMEDIES.get(gap['reason'], '')}" if said else REMEDIES.get(gap["reason"], "")


def fill_table(fills: Sequence[Mapping[str, Any]]) -> Markup:
    """Requests to fill, newest first."""
    if not fills:
        return ui.empty("Nothing has been filled yet", "A fill started here, by the API or in Dagster is listed here.")
    return ui.table(
        [
            ui.Column("Asked (UTC)", lambda fill: ui.when(fill["created_at"], seconds=True)),
            ui.Column("By", lambda fill: fill["requested_by"]),
            ui.Column("Table", lambda fill: NAMES.get(fill["table_name"], fill["table_name"])),
            ui.Column("Partitions", lambda fill: ui.count(fill["partitions"]), number=True),
            ui.Column("Records filled", lambda fill: ui.count(fill["records_filled"]), number=True),
            ui.Column("Sources", lambda fill: ", ".join(fill["sources_used"] or []) or ui.DASH),
            ui.Column(
                "Took",
                lambda fill: ui.lasted(fill["finished_at"] - fill["created_at"]) if fill["finished_at"] else ui.DASH,
                number=True,
            ),
            ui.Column("State", lambda fill: ui.chip(fill["state"], STATES.get(fill["state"], ""))),
            ui.Column("Error", lambda fill: fill["error"] or ""),
        ],
        fills,
    )


def fill_summary(state: Mapping[str, Any]) -> Markup:
    """How a fill stands, or its summary when it has ended."""
    sources = ", ".join(state["sources_used"]) or "no source used yet"
    more = Markup(' · <a href="{}" target="_blank" rel="noopener">open in Dagster</a>').format(state["dagster_url"])
    left = len(state["gaps_left"])
    note = f" · {left} gap{'s' if left != 1 else ''} left" if state["state"] in ENDED else ""
    return Markup('<p class="summary">{} {} · {} of {} partitions · {:,} records · {} · {}{}{}{}</p>').format(
        ui.chip(state["state"], STATES.get(state["state"], "")),
        NAMES.get(state["table_name"], state["table_name"]),
        state["partitions_done"],
        state["partitions"],
        state["records_filled"],
        sources,
        ui.lasted(state["seconds"]),
        note,
        more if state["dagster_url"] else "",
        Markup('<br><span class="bad">{}</span>').format(state["error"]) if state["error"] else "",
    )


def export(data: Data, customer_id: UUID, params: Mapping[str, str]) -> pa.Table:
    """The gaps of the lookback."""
    gaps = data.gaps(customer_id, LOOKBACKS.get(params.get("lookback", ""), 30))
    table = params.get("table")
    return pa.Table.from_pylist(
        [dict(gap) for gap in gaps if not table or gap["table_name"] == table], schema=GAP_SCHEMA
    )


_TIME = pa.timestamp("us", tz="UTC")
GAP_SCHEMA = pa.schema(
    [
        ("table_name", pa.string()),
        ("series", pa.string()),
        ("partition_key", pa.string()),
        ("gap_start", _TIME),
        ("gap_end", _TIME),
        ("expected_points", pa.int64()),
        ("missing_points", pa.int64()),
        ("reason", pa.string()),
        ("state", pa.string()),
        ("found_at", _TIME),
        ("filled_at", _TIME),
    ]
)
