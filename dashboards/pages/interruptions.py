"""Interruptions: how often AWS takes instances, and the timeline of each against its deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any
from uuid import UUID

import panel_material_ui as pmui
import param
import pyarrow as pa
from markupsafe import Markup

from dashboards import components as ui
from dashboards import plots
from dashboards.data import Data, InterruptionRow, LakeMissing, PoolRate, rate
from dashboards.shell import View, heading, live, offer, restore

WINDOWS = {"24 hours": 1, "7 days": 7, "30 days": 30}
ALL = "All clusters"
# Rows of the chart; the table below it goes further.
TIMELINES = 16
TABLE_ROWS = 100
# How far timelines are drawn at least, and twice as far as their deadlines; what takes longer is in the table.
SHOWN_SECONDS = 240.0
DRAIN, REPLACEMENT = plots.BRAND, plots.SPOT
# Where in its row of the chart a colour runs: the drain above, the replacement below.
LANES = {DRAIN: 0.16, REPLACEMENT: -0.16, plots.BASELINE: 0.0}
OUTCOMES: dict[str, tuple[str, ui.Tone]] = {
    "handled": ("handled", "good"),
    "handled_late": ("late", "warn"),
    "missed": ("missed", "bad"),
    "cancelled": ("cancelled", "quiet"),
    "unmatched": ("not ours", "quiet"),
}


class InterruptionFilter(param.Parameterized):
    """What the page shows; kept in its address. ``interruption`` is the id whose timeline is open."""

    cluster: Any = param.Selector(default=ALL, objects=[ALL])
    window: Any = param.Selector(default="7 days", objects=list(WINDOWS))
    interruption: Any = param.String(default="")


def build(view: View) -> Any:
    """The page's content."""
    clusters = view.data.clusters(view.customer_id)
    chosen = InterruptionFilter()
    offer(chosen, "cluster", [ALL, *clusters])
    restore(chosen, {"cluster": "cluster", "window": "window", "interruption": "interruption"})

    figures, detail, table, pools = (ui.html("") for _ in range(4))
    links = ui.inline()
    chart = ui.stack()
    shown: list[tuple[Any, ...]] = []

    def refresh(*_: Any) -> None:
        cluster_id = clusters.get(chosen.cluster)
        now = datetime.now(UTC)
        since = now - timedelta(days=WINDOWS[chosen.window])
        rows = view.data.interruptions(view.customer_id, since, cluster_id)
        rates = _rates(view, since, cluster_id)
        ui.put(figures, headline(rows, rates))
        ui.put(table, interruption_table(rows, chosen, now))
        ui.put(pools, pool_table(rates))
        opened = timeline_detail(view, chosen.interruption)
        ui.put(detail, opened)
        detail.visible = bool(opened)
        ui.put(
            links, ui.downloads("interruptions", {"cluster": cluster_id and chosen.cluster, "window": chosen.window})
        )
        # The figure's rows are its axis, so a new interruption makes a new figure; a progressing one does too.
        state = [(row.id, row.state, row.cordoned_at, row.drained_at, row.ready_at) for row in rows[:TIMELINES]]
        if state != shown or not len(chart):
            shown[:] = state
            chart.objects = [timeline_chart(rows, now)]

    refresh()
    chosen.param.watch(refresh, ["cluster", "window", "interruption"])
    live(view, refresh)
    return ui.stack(
        heading("Interruptions", "All times UTC."),
        ui.controls(
            pmui.Select.from_param(chosen.param.cluster, size="small", width=220, margin=0),
            ui.choice(chosen.param.window),
            links,
        ),
        figures,
        detail,
        ui.card(
            "Timelines",
            ui.html(
                ui.legend(
                    {
                        "Drain: task, in the agent's hands, cordoned, drained": DRAIN,
                        "Replacement: launched, Ready": REPLACEMENT,
                        "Deadline": plots.BAD,
                    }
                )
            ),
            chart,
            note=f"The newest {TIMELINES}. What is left of its red line was done in time.",
        ),
        ui.card("Each interruption", table, note="Choose a time to open its timeline."),
        ui.card(
            "Rate by pool",
            pools,
            note="Spot interruptions per 1,000 instance hours with a 95% interval. Few hours make a wide interval: "
            "two pools whose intervals overlap cannot be told apart yet.",
        ),
    )


def _rates(view: View, since: datetime, cluster_id: UUID | None) -> list[PoolRate]:
    try:
        return view.data.interruption_rates(view.customer_id, since, cluster_id)
    except LakeMissing:
        return []


def headline(rows: Sequence[InterruptionRow], rates: Sequence[PoolRate]) -> Markup:
    """Rate, outcomes and speed."""
    hours, taken = sum(pool.hours for pool in rates), sum(pool.taken for pool in rates)
    overall = rate(taken, hours)
    closed = [row for row in rows if row.outcome in ("handled", "handled_late", "missed")]
    in_time = [row for row in closed if row.outcome == "handled"]
    drained = _since_notice(rows, lambda row: row.drained_at)
    ready = _since_notice(rows, lambda row: row.ready_at)
    is_open = sum(row.state != "closed" for row in rows)
    return ui.kpis(
        [
            ui.Kpi(
                "Rate per 1,000 instance hours",
                f"{overall.per_thousand:,.2f}" if overall else ui.DASH,
                f"95% interval {overall.low:,.2f} to {overall.high:,.2f} · {taken} in {hours:,.1f} h"
                if overall
                else "no Spot hour recorded in the lake yet",
            ),
            ui.Kpi("Interruptions", ui.count(len(rows)), f"{is_open} open now", "warn" if is_open else ""),
            ui.Kpi(
                "Drained before the deadline",
                ui.percent(len(in_time) / len(closed), digits=0) if closed else ui.DASH,
                f"{len(in_time)} of {len(closed)} closed",
                "" if not closed else "good" if len(in_time) == len(closed) else "bad",
            ),
            ui.Kpi(
                "Notice to drained, median",
                ui.lasted(median(drained)) if drained else ui.DASH,
                f"slowest {ui.lasted(max(drained))}" if drained else "none drained yet",
            ),
            ui.Kpi(
                "Notice to Ready, median",
                ui.lasted(median(ready)) if ready else ui.DASH,
                f"replacement; slowest {ui.lasted(max(ready))}" if ready else "no replacement Ready yet",
            ),
        ]
    )


def _since_notice(rows: Sequence[InterruptionRow], moment: Callable[[InterruptionRow], datetime | None]) -> list[float]:
    """Seconds from each notice to a moment; without what an earlier signal had brought about before it."""
    found = (row.after_notice(moment(row)) for row in rows)
    return [seconds for seconds in found if seconds is not None and seconds >= 0]


def moments(row: InterruptionRow) -> list[tuple[str, datetime | None, str]]:
    """The named moments of an interruption in the order they usually come, with their colour."""
    return [
        ("First signal", row.first_notice_at, plots.BASELINE),
        ("Notice", row.notice_at, plots.BASELINE),
        ("Received by us", row.received_at, plots.BASELINE),
        ("Drain task created", row.task_created_at, DRAIN),
        ("Task in the agent's hands", row.task_taken_at, DRAIN),
        ("Node cordoned", row.cordoned_at, DRAIN),
        ("Replacement launched", row.launched_at, REPLACEMENT),
        ("Replacement Ready", row.ready_at, REPLACEMENT),
        ("Node drained", row.drained_at, DRAIN),
        ("Closed", row.closed_at, plots.BASELINE),
    ]


def timeline_chart(rows: Sequence[InterruptionRow], now: datetime) -> Any:
    """The newest timelines as one figure."""
    newest = [row for row in rows if row.kind == "spot_interruption"][:TIMELINES]
    if not newest:
        return ui.html(
            ui.empty(
                "No Spot interruption in this window",
                "Choose a longer window. In the sandbox they arrive by themselves.",
            )
        )
    names = {row.id: f"{ui.when(row.notice_at)}  {row.instance_type or row.instance_id}" for row in newest}
    labels: dict[str, int] = {}
    for key, name in names.items():
        labels[name] = labels.get(name, 0) + 1
        if labels[name] > 1:
            names[key] = f"{name} ({labels[name]})"
    steps: dict[str, list[Any]] = {name: [] for name in ("row", "x", "what", "at", "color", "size")}
    spans: dict[str, list[Any]] = {name: [] for name in ("row", "start", "end", "color")}
    deadlines: dict[str, list[Any]] = {name: [] for name in ("x", "top", "bottom", "at")}
    # What took an hour, because nothing of ours ran, must not press the others together.
    edge = max(SHOWN_SECONDS, *(2 * (row.deadline_at - row.notice_at).total_seconds() for row in newest))

    def place(seconds: float) -> float:
        """What lies outside stands at the edge; its tooltip tells when it was. Left of the notice is what an earlier
        signal had begun."""
        return min(max(seconds, 0), edge)

    for row in newest:
        deadlines["x"].append((row.deadline_at - row.notice_at).total_seconds())
        deadlines["top"].append((names[row.id], 0.45))
        deadlines["bottom"].append((names[row.id], -0.45))
        deadlines["at"].append(ui.when(row.deadline_at, seconds=True))
        for what, at, color in moments(row):
            if at is None or what == "Closed":
                continue
            steps["row"].append((names[row.id], LANES[color]))
            steps["x"].append(place((at - row.notice_at).total_seconds()))
            steps["what"].append(what)
            steps["at"].append(ui.when(at, seconds=True))
            steps["color"].append(color)
            steps["size"].append(11 if what in ("Node drained", "Replacement Ready") else 7)
        running = (now - row.notice_at).total_seconds()
        for start, end, color in (
            (row.task_created_at, row.drained_at, DRAIN),
            (row.launched_at, row.ready_at, REPLACEMENT),
        ):
            if start is not None:
                spans["row"].append((names[row.id], LANES[color]))
                spans["start"].append(place((start - row.notice_at).total_seconds()))
                ended = row.after_notice(end)
                spans["end"].append(place(ended if ended is not None else running if row.state != "closed" else 0))
                spans["color"].append(color)
    return plots.pane(
        plots.timelines(
            plots.source(steps),
            plots.source(spans),
            plots.source(deadlines),
            list(names.values()),
            height=90 + 32 * len(newest),
        )
    )


def outcome_chip(row: InterruptionRow) -> Markup:
    """State or outcome as a word on a tinted ground."""
    if row.outcome is None:
        return ui.chip(row.state, "warn")
    word, tone = OUTCOMES.get(row.outcome, (row.outcome, ""))
    return ui.chip(word, tone)


def interruption_table(rows: Sequence[InterruptionRow], chosen: InterruptionFilter, now: datetime) -> Markup:
    """The newest interruptions."""
    if not rows:
        return ui.empty("Nothing was interrupted in this window", "Choose a longer window or another cluster.")

    def opened(row: InterruptionRow) -> Markup:
        query = {"interruption": str(row.id), "window": chosen.window}
        if chosen.cluster != ALL:
            query["cluster"] = chosen.cluster
        return ui.link_here(ui.when(row.notice_at, seconds=True), query)

    shown = list(rows[:TABLE_ROWS])
    current = next((row for row in shown if str(row.id) == chosen.interruption), None)
    return ui.table(
        [
            ui.Column("Notice (UTC)", opened),
            ui.Column("Cluster", lambda row: row.cluster_name or ui.DASH),
            ui.Column("Node", lambda row: row.node_name or row.instance_id),
            ui.Column("Pool", lambda row: f"{row.instance_type or '?'} · {row.availability_zone or '?'}"),
            ui.Column("Seen by", lambda row: ", ".join(row.detected_by)),
            ui.Column("Cordoned", lambda row: ui.lasted(row.after_notice(row.cordoned_at)), number=True),
            ui.Column("Ready", lambda row: ui.lasted(row.after_notice(row.ready_at)), number=True),
            ui.Column("Drained", lambda row: ui.lasted(row.after_notice(row.drained_at)), number=True),
            ui.Column("Margin", _margin, number=True),
            ui.Column("Outcome", outcome_chip),
        ],
        shown,
        current=current,
        caption=f"The newest {TABLE_ROWS} of {len(rows)}; the download has all." if len(rows) > TABLE_ROWS else "",
    )


def _margin(row: InterruptionRow) -> Markup:
    tone = "" if row.margin is None else "bad" if row.margin < 0 else ""
    return Markup('<span class="{}">{}</span>').format(tone, ui.lasted(row.margin))


def timeline_detail(view: View, wanted: str) -> Markup:
    """The opened interruption step by step; nothing when none is open."""
    if not wanted:
        return Markup()
    try:
        row = view.data.interruption(view.customer_id, UUID(wanted))
    except ValueError:
        row = None
    if row is None:
        return ui.problem(
            "This interruption cannot be shown",
            f"there is no interruption {wanted} for this customer.",
            "choose one in the table below.",
        )
    steps = sorted(
        [(what, at) for what, at, _ in moments(row) if at is not None] + [("Deadline", row.deadline_at)],
        key=lambda step: step[1],
    )
    history = view.data.interruption_history(view.customer_id, row.id)
    facts = {
        "Node": row.node_name or ui.DASH,
        "Instance": row.instance_id,
        "Pool": f"{row.instance_type or '?'} · {row.availability_zone or '?'}",
        "Action": row.instance_action,
        "Seen by": ", ".join(row.detected_by),
        "Replacement": row.replacement_instance_id or row.launch_state or ui.DASH,
        "Replacement pool": f"{row.replacement_type} · {row.replacement_zone} · {row.replacement_node_type}"
        if row.replacement_type
        else ui.DASH,
        "Launch attempts": str(row.attempts),
        "Reason": row.reason or ui.DASH,
    }
    return Markup(
        '<div class="card-like"><div class="head"><div><h2>Interruption of {}</h2><p>Notice {} UTC</p></div>'
        '<div class="actions">{} {}</div></div><dl class="facts">{}</dl><div class="columns"><div>{}</div><div>{}</div>'
        "</div></div>"
    ).format(
        row.node_name or row.instance_id,
        ui.when(row.notice_at, seconds=True),
        outcome_chip(row),
        ui.link_here("Close", {}),
        Markup("").join(
            Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in facts.items()
        ),
        ui.table(
            [
                ui.Column("Moment", lambda step: step[0]),
                ui.Column("Time (UTC)", lambda step: step[1].astimezone(UTC).strftime("%H:%M:%S.%f")[:-3], number=True),
                ui.Column("After the notice", lambda step: ui.lasted(step[1] - row.notice_at), number=True),
                ui.Column("To the deadline", lambda step: ui.lasted(row.deadline_at - step[1]), number=True),
            ],
            steps,
        ),
        ui.table(
            [
                ui.Column("#", lambda change: change["version"], number=True),
                ui.Column("Recorded change", lambda change: change["event"]),
                ui.Column("State", lambda change: change["state"]),
                ui.Column("At (UTC)", lambda change: ui.when(change["at"], seconds=True), number=True),
            ],
            history,
        ),
    )


def pool_table(rates: Sequence[PoolRate]) -> Markup:
    """Rate of each pool with its interval."""
    if not rates:
        return ui.empty(
            "No Spot hours yet",
            "The rate needs instance hours from the lake (node_cost_hourly); Dagster computes them hourly.",
        )
    known = {id(pool): rate(pool.taken, pool.hours) for pool in rates}
    largest = max((found.per_thousand for found in known.values() if found), default=0.0)

    def interval(pool: PoolRate) -> str:
        found = known[id(pool)]
        return f"{found.low:,.2f} to {found.high:,.2f}" if found else ui.DASH

    def shown(pool: PoolRate) -> Markup | str:
        found = known[id(pool)]
        return ui.bar(found.per_thousand, largest, f"{found.per_thousand:,.2f}") if found else ui.DASH

    return ui.table(
        [
            ui.Column("Type", lambda pool: pool.instance_type or ui.DASH),
            ui.Column("Zone", lambda pool: pool.availability_zone or ui.DASH),
            ui.Column("Instance hours", lambda pool: f"{pool.hours:,.1f}", number=True),
            ui.Column("Interruptions", lambda pool: ui.count(pool.taken), number=True),
            ui.Column("Per 1,000 h", shown, number=True),
            ui.Column("95% interval", interval, number=True),
        ],
        rates[:40],
        caption=f"The 40 most used of {len(rates)} pools." if len(rates) > 40 else "",
    )


def export(data: Data, customer_id: UUID, params: Mapping[str, str]) -> pa.Table:
    """The interruptions of the window with every moment."""
    clusters = data.clusters(customer_id)
    since = datetime.now(UTC) - timedelta(days=WINDOWS.get(params.get("window", ""), 7))
    return data.interruptions_export(customer_id, since, clusters.get(params.get("cluster", "")))
