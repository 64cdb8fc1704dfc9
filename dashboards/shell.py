"""What every page shares: navigation, theme, header, and the way a page fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import panel as pn
import panel_material_ui as pmui
import param
from markupsafe import Markup

from dashboards import components as ui
from dashboards.api import ControlApi
from dashboards.auth import Login, Logins
from dashboards.config import DashboardSettings
from dashboards.data import Alarm, Customer, Data, DataError

log = logging.getLogger("cloudoptim.dashboards")

REFRESH_MS = 5_000

THEME = {
    "light": {
        "palette": {
            "primary": {"main": "#3457d5", "contrastText": "#ffffff"},
            "background": {"default": "#f5f6fa", "paper": "#ffffff"},
            "text": {"primary": "#141a2a", "secondary": "#5b6478"},
            "divider": "#e1e5ee",
        },
    },
    "dark": {
        "palette": {
            "primary": {"main": "#8aa4ff", "contrastText": "#0e1118"},
            "background": {"default": "#0e1118", "paper": "#171b25"},
            "text": {"primary": "#eef1f8", "secondary": "#9aa4b8"},
            "divider": "#2a3040",
        },
    },
}
THEME_CONFIG = {
    mode: {**parts, "shape": {"borderRadius": 8}, "typography": {"fontSize": 13}} for mode, parts in THEME.items()
}
# The bar on top is part of the page, not a coloured banner; shadows give way to hairlines.
PAGE_SX = {
    "& .header": {
        "backgroundColor": "background.paper",
        "backgroundImage": "none",
        "color": "text.primary",
        "boxShadow": "none",
        "borderBottom": "1px solid",
        "borderColor": "divider",
    },
    "& .header .MuiToolbar-root > .MuiBox-root": {"minWidth": 0},
    "& .sidebar": {"backgroundImage": "none", "borderRight": "1px solid", "borderColor": "divider"},
    "& .main": {"backgroundColor": "background.default"},
    "& .logo": {"height": "30px"},
}


@dataclass(frozen=True, slots=True)
class Services:
    """What pages work with; made once per process."""

    settings: DashboardSettings
    data: Data
    api: ControlApi
    logins: Logins


@dataclass(frozen=True, slots=True)
class View:
    """One person's page: who, whose data, and where from."""

    services: Services
    login: Login
    customer_id: UUID
    # Stands above the content while the page cannot be refreshed.
    notice: pn.pane.HTML

    @property
    def data(self) -> Data:
        """All queries."""
        return self.services.data


@dataclass(frozen=True, slots=True)
class PageSpec:
    """A page in the navigation. ``build`` makes its content; it may raise DataError."""

    slug: str
    title: str
    icon: str
    build: Callable[[View], Any]
    platform_only: bool = False


THEME_COOKIE = "cloudoptim_theme"
_KEEP_THEME = f"""
const theme = cb_obj.dark_theme ? "dark" : "light"
document.cookie = `{THEME_COOKIE}=${{theme}}; path=/; SameSite=Lax; max-age=31536000`
"""


def login_of_session(logins: Logins) -> Login | None:
    """The login of the page being made: from the cookie of the request itself, never from what the page's token
    repeats."""
    context = pn.state.curdoc.session_context if pn.state.curdoc else None
    request = getattr(getattr(context, "request", None), "_request", None)
    return logins.from_request(request) if request is not None else None


def _wants_dark() -> bool:
    context = pn.state.curdoc.session_context if pn.state.curdoc else None
    request = getattr(getattr(context, "request", None), "_request", None)
    return request is not None and THEME_COOKIE in request.cookies and request.cookies[THEME_COOKIE].value == "dark"


def page(services: Services, pages: tuple[PageSpec, ...], spec: PageSpec) -> Any:
    """The whole page of one session."""
    login = login_of_session(services.logins)
    if login is None:
        return pmui.Page(main=[ui.html(ui.problem("Nobody is signed in", "The sign-in is over.", "reload the page."))])
    context = pn.state.curdoc.session_context if pn.state.curdoc else None
    if context is not None:
        services.logins.open_page(context.id, login)
        pn.state.on_session_destroyed(lambda ended: services.logins.close_page(ended.id))
    header, above, content = _content(services, spec, login)
    shell = pmui.Page(
        meta_title=f"{spec.title} · CloudOptim",
        logo={"xs": ui.ASSETS / "mark.svg", "md": ui.ASSETS / "logo.svg"},
        favicon=ui.ASSETS / "mark.svg",
        sidebar=[*above, _navigation(services, pages, spec, login)],
        sidebar_width=208,
        sidebar_resizable=False,
        header=header,
        main=[pn.Column(content, sizing_mode="stretch_width", margin=(20, 24, 40, 24))],
        theme_config=THEME_CONFIG,
        sx=PAGE_SX,
        dark_theme=_wants_dark(),
        busy_indicator="linear",
    )

    # The browser itself keeps it: who goes on to the next page at once leaves the server no time to hear of it.
    shell.jscallback(dark_theme=_KEEP_THEME)
    return shell


def _content(services: Services, spec: PageSpec, login: Login) -> tuple[list[Any], list[Any], Any]:
    """Header, what stands above the navigation, and the page's content or the error in its place."""
    try:
        customers = services.data.customers() if login.platform_admin else []
        if login.customer_id is None or (customers and login.customer_id not in {known.id for known in customers}):
            login.customer_id = customers[0].id if customers else None
        if login.customer_id is None:
            return (
                [_environment(services)],
                [],
                ui.html(
                    ui.empty(
                        "There is no customer yet",
                        "Create one with POST /api/v1/customers, connect its AWS account and its first cluster; "
                        "its pages appear here.",
                    )
                ),
            )
        notice = ui.html("")
        notice.visible = False
        view = View(services, login, login.customer_id, notice)
        return (
            [_header(view)],
            _customer_choice(view, customers),
            ui.stack(_alarms(view, customers), notice, spec.build(view)),
        )
    except DataError as error:
        return [_environment(services)], [], ui.html(ui.problem(error.what, error.why, error.next_step))
    except Exception:
        log.exception("page %s failed", spec.slug)
        return (
            [_environment(services)],
            [],
            ui.html(
                ui.problem(
                    "This page failed",
                    "The dashboards met an error of their own; it is in their log with its cause.",
                    "reload the page; if it stays, send the log of the process named dashboards.",
                )
            ),
        )


def _navigation(services: Services, pages: tuple[PageSpec, ...], current: PageSpec, login: Login) -> Any:
    shown = [spec for spec in pages if login.platform_admin or not spec.platform_only]
    items = [{"label": spec.title, "icon": spec.icon, "href": f"/{spec.slug}"} for spec in shown]
    active = shown.index(current) if current in shown else None
    return pmui.MenuList(items=items, active=active, dense=True, sizing_mode="stretch_width", margin=(8, 8))


def _environment(services: Services) -> Any:
    return ui.html(header_html("", sandbox=services.settings.sandbox, name=""), css_classes=["top"])


def header_html(freshness: str, *, sandbox: bool, name: str) -> Markup:
    """Environment, how fresh the data is, who is signed in."""
    return Markup(
        '<div class="top">{}<span class="fresh">{}</span><span class="grow"></span><span class="who">{}</span>{}</div>'
    ).format(
        ui.chip("sandbox", "warn") if sandbox else "",
        freshness,
        name,
        Markup('<a href="/logout">Sign out</a>') if name else "",
    )


def freshness_text(view: View, now: datetime) -> str:
    """The lake release shown and up to when its hours are complete."""
    fresh = view.data.freshness(view.customer_id)
    if fresh.release_id is None:
        return "no lake release yet"
    until = f"complete to {ui.when(fresh.complete_until)} UTC" if fresh.complete_until else "no complete hour yet"
    return f"{until} · lake release {fresh.release_id}, {ui.ago(fresh.released_at, now)}"


def _header(view: View) -> Any:
    sandbox, name = view.services.settings.sandbox, view.login.name

    def text() -> Markup:
        return header_html(freshness_text(view, datetime.now(UTC)), sandbox=sandbox, name=name)

    top = ui.html(text())

    def tick() -> None:
        # The page's own refresh says what is wrong; the line on top just stays.
        with suppress(DataError):
            ui.put(top, text())

    pn.state.add_periodic_callback(tick, period=2 * REFRESH_MS)
    return top


# What a detector that is degraded means to a person; the rest are detectors of interruptions.
ALARM_TITLES = {
    "ending": "Instances that cannot be ended",
    "launches": "Launches nobody can tell the end of, or that are refused",
    "never_ready": "Replacements that run and are not seen",
    "adopt_only": "Nothing is terminated",
    "adopted": "Instances with our tags that run in no cluster",
    "lifecycle": "Auto Scaling hooks that cannot be answered",
}


def alarms_html(alarms: list[Alarm], elsewhere: dict[str, int], now: datetime) -> Markup:
    """Open alarms of the customer shown, and how many other customers have; empty when there is none."""
    told = [
        ui.problem(
            f"{ALARM_TITLES.get(alarm.detector, f'Interruptions are not heard of by {alarm.detector}')}, "
            f"for {ui.lasted(now - alarm.changed_at)}",
            alarm.reason,
            alarm.remedy,
        )
        for alarm in alarms
    ]
    if elsewhere:
        names = ", ".join(f"{name} ({open_})" for name, open_ in elsewhere.items())
        told.append(Markup('<div class="problem" role="alert"><p>Open at other customers: {}</p></div>').format(names))
    return Markup("").join(told)


def _alarms(view: View, customers: list[Customer]) -> Any:
    """What stands above every page while something bills that we cannot end, find or see, or a detector is deaf."""

    def told() -> Markup:
        elsewhere: dict[str, int] = {}
        if view.login.platform_admin:
            names = {customer.id: customer.name for customer in customers if customer.id != view.customer_id}
            for alarm in view.data.alarms(None):
                if alarm.customer_id in names:
                    name = names[alarm.customer_id]
                    elsewhere[name] = elsewhere.get(name, 0) + 1
        return alarms_html(view.data.alarms(view.customer_id), elsewhere, datetime.now(UTC))

    above = ui.html(told())
    above.visible = bool(above.object)

    def tick() -> None:
        # The page's own refresh says when nothing can be read; what was told stays.
        with suppress(DataError):
            ui.put(above, told())
            above.visible = bool(above.object)

    pn.state.add_periodic_callback(tick, period=REFRESH_MS)
    return above


def _customer_choice(view: View, customers: list[Customer]) -> list[Any]:
    """Whose data to look at, for a platform admin of several customers. The choice lives in the login."""
    if len(customers) < 2:
        return []
    names: dict[str, UUID] = {}
    for customer in customers:
        names[customer.name if customer.name not in names else f"{customer.name} ({customer.id})"] = customer.id
    chosen = next((known for known, id_ in names.items() if id_ == view.customer_id), None)
    select = pmui.Select(
        label="Customer",
        options=list(names),
        value=chosen,
        size="small",
        sizing_mode="stretch_width",
        margin=(16, 12, 4, 12),
    )

    def change(event: Any) -> None:
        view.login.customer_id = names[event.new]
        if pn.state.location is not None:
            pn.state.location.param.update(search="", reload=True)

    select.param.watch(change, "value")
    return [select]


def live(view: View, refresh: Callable[[], None], *, period_ms: int = REFRESH_MS) -> None:
    """Call ``refresh`` while the page is open; nothing runs without an open page.

    What cannot be read now is tried again at the next tick: the page keeps what it shows and says that it stands still.
    """

    def tick() -> None:
        try:
            refresh()
        except DataError as error:
            if not view.notice.object:
                log.warning("pages stand still: %s", error)
            why = f"{error.why} The page shows what it last read and tries again by itself."
            ui.put(view.notice, ui.problem(error.what, why, error.next_step))
        else:
            ui.put(view.notice, "")
        view.notice.visible = bool(view.notice.object)

    pn.state.add_periodic_callback(tick, period=period_ms)


def heading(title: str, note: str | Markup = "") -> Any:
    """The page's own title."""
    return ui.html(Markup('<div class="title"><h1>{}</h1><p>{}</p></div>').format(title, note))


def restore(state: param.Parameterized, names: dict[str, str]) -> None:
    """Keep the state in the page's address; what an address cannot mean is left at its default."""
    if pn.state.location is not None:
        pn.state.location.sync(state, names, on_error=lambda _: None)


def offer(state: param.Parameterized, name: str, values: list[Any]) -> None:
    """Give a selector its options, which are known only with the data; the first one is chosen."""
    state.param[name].objects = values
    setattr(state, name, values[0])
