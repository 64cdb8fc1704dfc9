"""Pages as a person sees them, in Chromium."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from dashboards.data import Data
from tests.dashboards.conftest import Seeded, Served
from tests.dashboards.seed import HOSTILE
from warehouse.postgres.session import SyncDatabase

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

# The machine may be busy with other tests; a page that is right is shown long before.
PATIENCE_MS = 60_000


@dataclass
class Tab:
    """One page in its own browser profile, with everything that went wrong in it."""

    page: Any
    base: str
    problems: list[str] = field(default_factory=list)

    def open(self, path: str, *, canvas: bool = True) -> None:
        """Go to a page and wait for its chart, or for its title."""
        self.page.goto(self.base + path)
        self.page.wait_for_selector("canvas" if canvas else "h1, .problem", timeout=PATIENCE_MS)

    def see(self, wanted: str) -> None:
        """Wait until the text is on the page."""
        self.page.get_by_text(wanted).first.wait_for(timeout=PATIENCE_MS)

    def kpi(self, label: str) -> str:
        """The value under a headline's label."""
        found = self.page.locator(".kpi").filter(has=self.page.locator(".label", has_text=label))
        return found.first.locator(".value").inner_text()


def attend(tab: Tab) -> None:
    """Note errors of scripts, refused or failed requests, and any request that leaves this machine."""
    page = tab.page
    page.on("pageerror", lambda error: tab.problems.append(f"script: {error}"))
    page.on("console", lambda said: tab.problems.append(f"console: {said.text}") if said.type == "error" else None)
    # A download is a navigation that ends without a page, and a font still on its way when the next page is opened is
    # given up: Chromium reports both as aborted. A font that the server lacks is a 404, which is caught below.
    page.on(
        "requestfailed",
        lambda request: (
            None
            if request.failure == "net::ERR_ABORTED" and ("/download/" in request.url or request.url.endswith(".woff2"))
            else tab.problems.append(f"failed: {request.url} {request.failure}")
        ),
    )
    page.on(
        "response",
        lambda answer: tab.problems.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None,
    )
    page.on(
        "request",
        lambda request: (
            tab.problems.append(f"left the machine: {request.url}")
            if not request.url.startswith((tab.base, "data:", "blob:"))
            else None
        ),
    )


@pytest.fixture
def tab(browser: Any, dashboards: Served) -> Iterator[Tab]:
    """A fresh tab on the seeded dashboards; at the end nothing may have gone wrong in it."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, accept_downloads=True)
    opened = Tab(context.new_page(), dashboards.url)
    attend(opened)
    yield opened
    context.close()
    assert opened.problems == []


@pytest.mark.parametrize(
    ("path", "title", "shows"),
    [
        ("/cost", "Cost", "Baseline B1 list now"),
        ("/interruptions", "Interruptions", "Rate per 1,000 instance hours"),
        ("/gaps", "Gap filler", "Fill gaps"),
        ("/nodes", "Clusters and nodes", "Spot share"),
        ("/prices", "Spot prices", "Pools that moved most"),
        ("/reports", "Reports", "Net savings of each day against B1 list"),
    ],
)
def test_each_page_draws_its_chart_and_asks_nobody_else(tab: Tab, path: str, title: str, shows: str) -> None:
    tab.open(path)
    tab.see(shows)
    assert tab.page.title() == f"{title} · CloudOptim"
    tab.page.locator("h1", has_text=re.compile(f"^{title}$")).first.wait_for(timeout=PATIENCE_MS)
    assert tab.page.locator(".problem").count() == 0


def test_the_address_restores_what_was_chosen(tab: Tab, seeded: Seeded, data: Data) -> None:
    tab.open("/cost?cluster=production&window=48%20hours")
    nodes = [n for n in seeded.world.first.nodes if n["cluster_id"] == seeded.world.first.clusters["production"]]
    tab.see(f"{len(nodes)} nodes, ")
    tab.page.get_by_role("button", name="7 days").click()
    tab.page.wait_for_url("**window=7*", timeout=PATIENCE_MS)
    assert "cluster=production" in tab.page.url
    tab.page.reload()
    tab.page.wait_for_selector("canvas", timeout=PATIENCE_MS)
    tab.see(f"{len(nodes)} nodes, ")
    tab.see("of 168 hours are complete")


def test_an_address_that_means_nothing_falls_back_to_the_default(tab: Tab, seeded: Seeded) -> None:
    tab.open("/cost?cluster=shop&window=eternity&customer_id=" + str(seeded.world.second.id))
    tab.see(f"{len(seeded.world.first.nodes)} nodes, ")
    tab.see("of 168 hours are complete")


def test_one_interruption_opens_with_its_timeline(tab: Tab, seeded: Seeded, data: Data) -> None:
    late = data.interruptions(seeded.world.first.id, seeded.world.now - timedelta(days=30))[4]
    tab.open("/interruptions")
    tab.page.locator("tbody tr").filter(has_text="late").locator("a").first.click()
    tab.see("Interruption of")
    assert f"interruption={late.id}" in tab.page.url
    steps = tab.page.locator(".card-like table").first.locator("tbody tr td:first-child").all_inner_texts()
    order = ["Notice", "Drain task created", "Node cordoned", "Replacement Ready", "Deadline", "Node drained"]
    assert [step for step in steps if step in order] == order


def test_another_customers_interruption_does_not_open(tab: Tab, seeded: Seeded) -> None:
    tab.open("/interruptions?interruption=01a20673-0000-7000-8000-000000000000")
    tab.see("This interruption cannot be shown")


def test_a_download_holds_what_the_page_shows(tab: Tab, seeded: Seeded, tmp_path: Path) -> None:
    tab.open("/nodes?cluster=production")
    with tab.page.expect_download() as started:
        tab.page.locator(".downloads a").first.click()
    file = tmp_path / started.value.suggested_filename
    started.value.save_as(file)
    production = seeded.world.first.clusters["production"]
    wanted = {node["instance_id"] for node in seeded.world.first.nodes if node["cluster_id"] == production}
    with file.open(newline="") as rows:
        assert {row["instance_id"] for row in csv.DictReader(rows)} == wanted


def test_markup_in_a_name_stays_text(tab: Tab) -> None:
    tab.open("/nodes")
    tab.see(HOSTILE)
    assert tab.page.title() == "Clusters and nodes · CloudOptim"
    assert tab.page.locator('img[src="x"]').count() == 0


def test_a_cost_that_moves_is_seen_without_a_reload(tab: Tab, seeded: Seeded) -> None:
    tab.open("/cost")
    before = tab.kpi("Cost now")
    tab.page.evaluate("window.sameDocument = true")
    db = SyncDatabase(seeded.database_url)
    double = "UPDATE spot_price_current SET price_usd_per_hour = price_usd_per_hour * :factor"
    try:
        with db.system() as conn:
            conn.execute(text(double), {"factor": 2})
        tab.page.wait_for_function(
            """before => { const all = root => [...root.querySelectorAll('*')].flatMap(
                 e => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
               const value = all(document).find(e => e.className === 'kpi')?.querySelector('.value')?.innerText;
               return value && value !== before }""",
            arg=before,
            timeout=PATIENCE_MS,
        )
    finally:
        with db.system() as conn:
            conn.execute(text(double), {"factor": 0.5})
        db.close()
    assert tab.page.evaluate("window.sameDocument") is True


def test_an_open_alarm_stands_above_every_page_until_it_is_over(tab: Tab, seeded: Seeded) -> None:
    reason = "i-0123456789abcdef0 (orphan, 0.0960 USD/h) is to end since 2026-11-01 10:00 UTC and still bills"
    db = SyncDatabase(seeded.database_url)
    told = """
        INSERT INTO intake_health (customer_id, detector, state, reason, remedy, changed_at)
        VALUES (:id, 'ending', 'degraded', :reason, 'Lift the protection of <b>it</b>.', now() - interval '3 hours')
    """
    with db.system() as conn:
        conn.execute(text(told), {"id": seeded.world.first.id, "reason": reason})
        conn.execute(text(told), {"id": seeded.world.second.id, "reason": "i-0fedcba9876543210 bills"})
    try:
        for path in ("/cost", "/interruptions"):
            tab.open(path)
            tab.see("Instances that cannot be ended")
            alarm = tab.page.locator(".problem").first.inner_text()
            assert reason in alarm
            assert "for 3 h" in alarm
            assert "Lift the protection of <b>it</b>." in alarm
            assert "i-0fedcba9876543210" not in alarm
            tab.see(f"Open at other customers: {seeded.world.second.name} (1)")
    finally:
        with db.system() as conn:
            conn.execute(text("UPDATE intake_health SET state = 'ok', reason = NULL WHERE detector = 'ending'"))
        db.close()
    tab.page.get_by_text("Instances that cannot be ended").wait_for(state="detached", timeout=PATIENCE_MS)


def test_dark_is_kept_on_the_next_page(tab: Tab) -> None:
    tab.open("/cost")
    tab.page.get_by_label("Toggle theme").click()
    tab.page.wait_for_selector(".mui-dark", timeout=PATIENCE_MS)
    tab.page.get_by_text("Clusters and nodes").first.click()
    tab.page.wait_for_url("**/nodes*", timeout=PATIENCE_MS)
    # The old page's elements may still be there for a moment: the new heading first.
    tab.page.locator("h1", has_text="Clusters and nodes").wait_for(timeout=PATIENCE_MS)
    tab.page.wait_for_selector(".mui-dark", timeout=PATIENCE_MS)
    tab.page.get_by_label("Toggle theme").click()
    tab.page.wait_for_selector(".mui-light", timeout=PATIENCE_MS)
    tab.open("/cost")
    assert tab.page.locator(".mui-dark").count() == 0


def test_a_platform_admin_changes_the_customer_and_sees_only_that_one(tab: Tab, seeded: Seeded) -> None:
    tab.open("/nodes")
    tab.page.get_by_role("combobox").filter(has_text=seeded.world.first.name).click()
    tab.page.get_by_role("menuitem", name=seeded.world.second.name).click(timeout=PATIENCE_MS)
    shop = seeded.world.second.nodes[0]["node_name"]
    tab.page.locator("td", has_text="shop").first.wait_for(timeout=PATIENCE_MS)
    assert tab.page.locator("td", has_text="production").count() == 0
    assert tab.page.locator("td", has_text=shop).count() == 1


def test_filling_gaps_says_so_when_the_control_service_is_away(tab: Tab) -> None:
    tab.open("/gaps")
    tab.see("You are not authorized. Allow ec2:DescribeSpotPriceHistory")
    tab.page.get_by_role("button", name="Fill gaps").click()
    tab.see("The gaps were not filled")
    tab.see("CLOUDOPTIM_CONTROL_URL")


def test_a_report_says_so_when_the_control_service_is_away(browser: Any, dashboards: Served) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{dashboards.url}/login")
    answer = page.request.get(f"{dashboards.url}/report/2026-11.csv")
    assert answer.status == 503
    assert "does not answer" in answer.text()
    context.close()


def test_a_database_that_is_down_is_an_answer_with_a_next_step(browser: Any, serve: Callable[..., Any]) -> None:
    with serve(DATABASE_URL="postgresql://nobody:x@127.0.0.1:1/none") as served:
        context = browser.new_context()
        down = Tab(context.new_page(), served.url)
        attend(down)
        down.open("/cost", canvas=False)
        down.see("The database cannot be read")
        down.see("What to do:")
        assert down.problems == []
        context.close()


def test_an_empty_lake_is_an_empty_state_that_says_what_brings_data(
    browser: Any, serve: Callable[..., Any], seeded: Seeded, database_url: str, tmp_path: Path
) -> None:
    from tests.dashboards.seed import Fleet, fill_postgres, fill_prices

    db = SyncDatabase(database_url)
    with db.system() as conn:
        fill_postgres(conn, seeded.world.now, Fleet(seeded.world.first.id, "Acme"), {"production": 4}, "444444444444")
        fill_prices(conn, seeded.world.now)
    db.close()
    expected = {
        "/cost": "No hour has been computed yet",
        "/interruptions": "Nothing was interrupted in this window",
        "/gaps": "Nothing has been written in this lookback",
        "/nodes": "Nodes now",
        "/prices": "No price is in the lake yet",
        "/reports": "No savings have been computed yet",
    }
    with serve(DATABASE_URL=database_url, CLOUDOPTIM_LAKE_ROOT=str(tmp_path / "none")) as served:
        context = browser.new_context()
        fresh = Tab(context.new_page(), served.url)
        attend(fresh)
        for path, wanted in expected.items():
            fresh.open(path, canvas=False)
            fresh.see(wanted)
        assert fresh.problems == []
        context.close()
