"""Small pieces of pages: figures with their unit, tables, cards, empty states and errors.

Everything shown goes through markupsafe, so a cluster called ``<img onerror=…>`` is just an odd name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import panel as pn
import panel_material_ui as pmui
from markupsafe import Markup, escape

ASSETS = Path(__file__).with_name("assets")
# By address and not by text: a copy in each of thirty pieces would be half of what a page sends. The digest lets
# browsers keep the file for good.
_CSS_DIGEST = hashlib.sha256((ASSETS / "components.css").read_bytes()).hexdigest()[:16]
CSS = f"/assets/components.css?v={_CSS_DIGEST}"
DASH = "–"

Number = float | int | Decimal
Tone = Literal["", "good", "bad", "warn", "spot", "on-demand", "quiet"]


# Formats


def usd(value: Number | None, *, digits: int = 2) -> str:
    """Dollars, e.g. ``$1,234.50``, ``−$3.20``; a dash when unknown."""
    if value is None:
        return DASH
    sign = "−" if round(float(value), digits) < 0 else ""
    return f"{sign}${abs(value):,.{digits}f}"


def usd_per_hour(value: Number | None) -> str:
    """Dollars per hour, with more digits where two would hide the number: ``$12.34/h``, ``$0.0312/h``."""
    if value is None:
        return DASH
    size = abs(float(value))
    return f"{usd(value, digits=2 if size >= 1 or size == 0 else 3 if size >= 0.1 else 4)}/h"


def pool_price(value: Number | None) -> str:
    """A price per instance hour with the four digits AWS gives: ``$0.0312/h``."""
    return DASH if value is None else f"{usd(value, digits=4)}/h"


def percent(value: Number | None, *, digits: int = 1) -> str:
    """A ratio as a percentage, e.g. ``61.2%``."""
    if value is None:
        return DASH
    return f"{value * 100:,.{digits}f}%".replace("-", "−")


def count(value: Number | None) -> str:
    """A whole number with thousands separators."""
    return DASH if value is None else f"{value:,.0f}"


def when(value: datetime | None, *, seconds: bool = False) -> str:
    """A time in UTC, e.g. ``23 Nov 14:05``; the column or caption says UTC once."""
    if value is None:
        return DASH
    return value.astimezone(UTC).strftime("%d %b %H:%M:%S" if seconds else "%d %b %H:%M")


def lasted(value: timedelta | float | None) -> str:
    """A duration: ``0.8 s``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``, ``5 days``."""
    if value is None:
        return DASH
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    sign, seconds = ("−", -seconds) if seconds < 0 else ("", seconds)
    if seconds < 10:
        return f"{sign}{seconds:.1f} s"
    if seconds < 120:
        return f"{sign}{seconds:.0f} s"
    if seconds < 3600:
        return f"{sign}{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 48 * 3600:
        return f"{sign}{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{sign}{seconds / 86400:.0f} days"


def ago(value: datetime | None, now: datetime) -> str:
    """How long ago, e.g. ``12 s ago``."""
    return "never" if value is None else f"{lasted(max(now - value, timedelta()))} ago"


def gib(value: Number | None) -> str:
    """Bytes in GiB."""
    return DASH if value is None else f"{float(value) / 2**30:,.1f} GiB"


# Pieces of HTML


def chip(text: str, tone: Tone = "") -> Markup:
    """A word on a tinted ground."""
    return Markup('<span class="chip {}">{}</span>').format(tone, text)


def link(text: str, href: str) -> Markup:
    """A link within the dashboards."""
    return Markup('<a href="{}">{}</a>').format(href, text)


def link_here(text: str, query: Mapping[str, str]) -> Markup:
    """A link to the same page with other parameters."""
    return link(text, f"?{urlencode(query)}")


def bar(value: Number | None, largest: Number, text: str, tone: Tone = "") -> Markup:
    """A number with a bar as long as its share of the largest one."""
    share = 0.0 if not largest or value is None else max(0.0, min(1.0, float(value) / float(largest)))
    return Markup(
        '<span class="bar"><i class="{}" style="width:{:.1f}%"></i></span><span class="num">{}</span>'
    ).format(tone, share * 100, text)


@dataclass(frozen=True, slots=True)
class Kpi:
    """One headline figure: what it is, the value, and a line that makes it checkable."""

    label: str
    value: str
    note: str | Markup = ""
    tone: Tone = ""


def kpis(figures: Iterable[Kpi]) -> Markup:
    """A row of headline figures."""
    return Markup('<div class="kpis">{}</div>').format(
        Markup("").join(
            Markup(
                '<div class="kpi"><div class="label">{}</div>'
                '<div class="value {}">{}</div><div class="note">{}</div></div>'
            ).format(figure.label, figure.tone, figure.value, figure.note)
            for figure in figures
        )
    )


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. ``show`` makes the cell of a row; numbers are set right."""

    title: str
    show: Callable[[Any], Any]
    number: bool = False


def table(columns: Sequence[Column], rows: Sequence[Any], *, caption: str = "", current: Any = None) -> Markup:
    """A table of at most a few hundred rows; ``current`` is the row to mark."""
    head = Markup("").join(
        Markup('<th class="{}" scope="col">{}</th>').format("number" if column.number else "", column.title)
        for column in columns
    )
    body = Markup("").join(
        Markup('<tr class="{}">{}</tr>').format(
            "current" if current is not None and row is current else "",
            Markup("").join(
                Markup('<td class="{}">{}</td>').format("number" if column.number else "", column.show(row))
                for column in columns
            ),
        )
        for row in rows
    )
    note = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return Markup('<div class="scroll"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        note, head, body
    )


def empty(title: str, what_to_do: str | Markup) -> Markup:
    """Nothing to show, and what brings it."""
    return Markup('<div class="empty"><h3>{}</h3><p>{}</p></div>').format(title, what_to_do)


def problem(what: str, why: str, next_step: str) -> Markup:
    """Something is wrong: what, why, and what to do next."""
    return Markup(
        '<div class="problem" role="alert"><h3>{}</h3><p>{}</p><p class="next"><b>What to do:</b> {}</p></div>'
    ).format(what, why, next_step)


def legend(entries: Mapping[str, str]) -> Markup:
    """Names and colours of a chart's series."""
    return Markup('<div class="legend">{}</div>').format(
        Markup("").join(
            Markup('<span><i style="background:{}"></i>{}</span>').format(color, name)
            for name, color in entries.items()
        )
    )


def downloads(dataset: str, params: Mapping[str, Any]) -> Markup:
    """Links that download what the page shows, with the page's own parameters."""
    query = urlencode({key: value for key, value in params.items() if value not in (None, "")})
    suffix = f"?{query}" if query else ""
    return Markup('<span class="downloads">{}</span>').format(
        Markup("").join(
            Markup('<a download href="/download/{}.{}{}" title="Download as {}">{}</a>').format(
                dataset, kind, suffix, name, name
            )
            for kind, name in (("csv", "CSV"), ("parquet", "Parquet"))
        )
    )


# Panel objects


def html(content: str | Markup, *, css_classes: Sequence[str] = ()) -> pn.pane.HTML:
    """A pane with our own markup."""
    return pn.pane.HTML(
        str(escape(content)),
        sizing_mode="stretch_width",
        margin=0,
        stylesheets=[CSS],
        css_classes=list(css_classes),
    )


def inline(content: str | Markup = "") -> pn.pane.HTML:
    """A pane as wide as its content, at the right end of a row of filters."""
    return pn.pane.HTML(str(escape(content)), margin=0, stylesheets=[CSS], styles={"margin-left": "auto"})


def choice(parameter: Any, **options: Any) -> Any:
    """A few options side by side."""
    return pmui.RadioButtonGroup.from_param(
        parameter, label="", size="small", margin=0, sx={"& .MuiToggleButton-root": _PLAIN_BUTTON}, **options
    )


_PLAIN_BUTTON = {"textTransform": "none", "whiteSpace": "nowrap", "px": 1.5, "py": 0.75, "letterSpacing": 0}


def put(pane: pn.pane.HTML, content: str | Markup) -> None:
    """Change a pane's markup; nothing is sent when it is the same."""
    text = str(escape(content))
    if pane.object != text:
        pane.object = text


def card(title: str, *body: Any, note: str | Markup = "", actions: str | Markup = "") -> pn.Column:
    """A surface with a heading, an optional explaining line and actions at its right."""
    head = Markup('<div class="head"><div><h2>{}</h2><p>{}</p></div><div class="actions">{}</div></div>').format(
        title, note, actions
    )
    return pn.Column(html(head), *body, sizing_mode="stretch_width", margin=0, css_classes=["card"], stylesheets=[CSS])


def controls(*widgets: Any) -> pn.FlexBox:
    """A row of filters."""
    return pn.FlexBox(*widgets, gap="12px", align_items="center", sizing_mode="stretch_width", margin=0)


def swap(holder: pn.Column, key: str, make: Callable[[], Any]) -> None:
    """Put into the holder what ``key`` stands for, made only when it is not there already."""
    if holder.tags != [key]:
        holder.objects = [make()]
        holder.tags = [key]


def stack(*objects: Any) -> pn.Column:
    """A page's pieces below each other."""
    return pn.Column(*objects, sizing_mode="stretch_width", margin=0, css_classes=["stack"], stylesheets=[CSS])
