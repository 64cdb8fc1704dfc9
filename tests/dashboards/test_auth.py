"""Who gets in, and whose data they see."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from bokeh.util.token import get_token_payload
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus, WebSocketException

from dashboards.auth import COOKIE, Logins, may_enter_without_password, safe_next
from dashboards.config import DashboardSettings, DashboardSettingsError
from tests.dashboards.conftest import ADMIN_KEY, SECRETS, Seeded, Served


def visitor(served: Served, **options: Any) -> httpx.Client:
    """A browser without scripts."""
    return httpx.Client(base_url=served.url, trust_env=False, timeout=30, **options)


@contextmanager
def signed_in(served: Served) -> Iterator[httpx.Client]:
    """The sandbox's administrator."""
    with visitor(served, follow_redirects=True) as client:
        assert client.get("/cost").status_code == 200
        yield client


def rows_of(answer: httpx.Response) -> list[dict[str, str]]:
    """A CSV answer."""
    assert answer.status_code == 200, answer.text
    return list(csv.DictReader(io.StringIO(answer.text)))


@pytest.mark.parametrize("path", ["/cost", "/prices?region=x", "/download/cost.csv", "/report/2026-11.csv"])
def test_nobody_is_sent_to_sign_in(dashboards: Served, path: str) -> None:
    with visitor(dashboards) as client:
        answer = client.get(path)
    assert answer.status_code == 302
    assert answer.headers["location"].lstrip(".").startswith("/login")


def test_the_sandbox_lets_a_person_on_its_machine_straight_in(dashboards: Served) -> None:
    with visitor(dashboards, follow_redirects=True) as client:
        answer = client.get("/")
        assert answer.status_code == 200
        assert answer.url.path == "/cost"
        cookie = next(cookie for cookie in client.cookies.jar if cookie.name == COOKIE)
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Lax"


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"X-Forwarded-For": "10.0.0.9"}, {"Forwarded": "for=10.0.0.9"}]
)
def test_the_sandbox_asks_everybody_else_for_a_password(dashboards: Served, headers: dict[str, str]) -> None:
    with visitor(dashboards) as client:
        answer = client.get("/login", headers=headers)
        assert answer.status_code == 200
        assert "Password" in answer.text
        assert "sandbox" not in answer.text
        refused = client.post("/login", data={"sandbox": "1"}, headers=headers)
    assert refused.status_code == 403
    assert COOKIE not in refused.cookies


def test_outside_the_sandbox_there_is_no_way_around_the_password(seeded: Seeded) -> None:
    from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

    line = RequestStartLine("GET", "/login", "HTTP/1.1")
    request = HTTPServerRequest(start_line=line, headers=HTTPHeaders({"Host": "127.0.0.1:5006"}))
    request.remote_ip = "127.0.0.1"
    assert may_enter_without_password(seeded.settings(), request)
    assert not may_enter_without_password(seeded.settings(CLOUDOPTIM_SANDBOX="0"), request)
    assert not may_enter_without_password(seeded.settings(CLOUDOPTIM_ADMIN_API_KEY=""), request)


def test_a_forged_cookie_is_nobody(dashboards: Served) -> None:
    forged = Logins("another-secret-of-at-least-32-characters", 1.0)
    from dashboards.auth import Login

    login = forged.add(Login("x", "platform_admin", None, 9e12, "key"))
    for value in (forged.cookie_value(login), "2|1:0|10:1|", "", "x" * 5000):
        with visitor(dashboards, cookies={COOKIE: value}) as client:
            assert client.get("/download/cost.csv").status_code == 302


def test_a_tenant_in_the_query_string_changes_nothing(dashboards: Served, seeded: Seeded) -> None:
    second = seeded.world.second
    with signed_in(dashboards) as client:
        plain = client.get("/download/nodes.csv")
        asked = client.get("/download/nodes.csv", params={"customer_id": str(second.id), "tenant": str(second.id)})
        assert rows_of(asked) == rows_of(plain)
        foreign = client.get("/download/cost.csv", params={"cluster": "shop"})
    assert {row["instance_id"] for row in rows_of(plain)} == {n["instance_id"] for n in seeded.world.first.nodes}
    assert not {row["cluster_id"] for row in rows_of(foreign)} & set(map(str, second.clusters.values()))


def test_downloads_keep_hostile_names_as_text(dashboards: Served) -> None:
    with signed_in(dashboards) as client:
        answer = client.get("/download/nodes.csv")
    assert answer.headers["content-disposition"].startswith('attachment; filename="cloudoptim-nodes-')
    names = {row["cluster_name"] for row in rows_of(answer)}
    assert any(name.startswith("'=<img") for name in names)


@pytest.mark.parametrize("dataset", ["cost", "interruptions", "gaps", "nodes", "prices", "savings"])
def test_every_page_can_be_downloaded_in_both_formats(dashboards: Served, dataset: str) -> None:
    import pyarrow.parquet as pq

    with signed_in(dashboards) as client:
        params = {"type": "c6i.xlarge"} if dataset == "prices" else {}
        rows = rows_of(client.get(f"/download/{dataset}.csv", params=params))
        parquet = client.get(f"/download/{dataset}.parquet", params=params)
        assert client.get("/download/nothing.csv").status_code == 404
    assert rows
    assert pq.read_table(io.BytesIO(parquet.content)).num_rows == len(rows)


def test_signing_out_ends_the_login_not_only_the_cookie(dashboards: Served) -> None:
    with signed_in(dashboards) as client:
        kept = client.cookies[COOKIE]
        page = client.get("/logout")
        assert "Enter as sandbox administrator" in page.text
    with visitor(dashboards, cookies={COOKIE: kept}) as client:
        assert client.get("/download/cost.csv").status_code == 302


def test_another_sites_form_cannot_sign_in(dashboards: Served) -> None:
    with visitor(dashboards) as client:
        answer = client.post("/login", data={"sandbox": "1"}, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403
    assert COOKIE not in answer.cookies


@pytest.mark.parametrize(
    ("target", "goes_to"),
    [
        ("/prices?type=m5.large", "/prices?type=m5.large"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("/x\r\nSet-Cookie: a=b", "/"),
        ("", "/"),
        (None, "/"),
    ],
)
def test_sign_in_goes_on_to_our_own_pages_only(target: str | None, goes_to: str) -> None:
    assert safe_next(target) == goes_to


def test_a_page_gives_away_neither_cookie_nor_key(dashboards: Served) -> None:
    with signed_in(dashboards) as client:
        answer = client.get("/cost")
        cookie = client.cookies[COOKIE]
    policy = answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert answer.headers["cache-control"] == "no-store"
    token = re.search(r'"token":"([^"]+)"', answer.text)
    assert token is not None
    payload = str(get_token_payload(token.group(1)))
    assert "User-Agent".lower() in payload.lower()  # the check reads the right part
    for secret in (cookie, ADMIN_KEY, SECRETS["JWT_SECRET_KEY"]):
        assert secret not in answer.text
        assert secret not in payload


async def page_socket(served: Served, cookie: str | None, token: str, origin: str) -> None:
    """Open a page's WebSocket and wait for its first message."""
    headers = {"Cookie": f"{COOKIE}={cookie}"} if cookie else {}
    async with connect(
        f"ws://127.0.0.1:{served.port}/cost/ws",
        subprotocols=["bokeh", token],  # type: ignore[list-item]
        origin=origin,  # type: ignore[arg-type]
        additional_headers=headers,
        proxy=None,
    ) as socket:
        await socket.recv()


async def test_a_pages_socket_belongs_to_the_person_and_the_origin(dashboards: Served) -> None:
    with signed_in(dashboards) as mine, signed_in(dashboards) as theirs:
        answer = mine.get("/cost")
        token = re.search(r'"token":"([^"]+)"', answer.text)
        assert token is not None
        own, other = mine.cookies[COOKIE], theirs.cookies[COOKIE]
    await page_socket(dashboards, own, token.group(1), dashboards.url)
    for cookie, origin in ((own, "http://evil.example"), (None, dashboards.url), (other, dashboards.url)):
        with pytest.raises(InvalidStatus):
            await page_socket(dashboards, cookie, token.group(1), origin)
    with pytest.raises(WebSocketException):
        await page_socket(dashboards, own, token.group(1)[:-4] + "AAAA", dashboards.url)


def test_a_session_id_of_ones_own_making_is_refused(dashboards: Served) -> None:
    with signed_in(dashboards) as client:
        assert client.get("/cost", params={"bokeh-session-id": "mine"}).status_code == 403


def test_people_sign_in_with_the_control_services_users(
    seeded: Seeded, serve: Callable[..., Any], control_url: str
) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    person = {"email": "analyst@contoso.example", "password": "a long enough password 1"}
    created = httpx.post(
        f"{control_url}/api/v1/users",
        json={**person, "role": "analyst", "customer_id": str(seeded.world.second.id)},
        headers=admin,
        trust_env=False,
    )
    assert created.status_code == 201, created.text
    with serve(
        DATABASE_URL=seeded.database_url,
        CLOUDOPTIM_LAKE_ROOT=str(seeded.lake_root),
        CLOUDOPTIM_CONTROL_URL=control_url,
        CLOUDOPTIM_SANDBOX="0",
    ) as served:
        with visitor(served, follow_redirects=True) as client:
            assert "Password" in client.get("/nodes").text
            wrong = client.post("/login", data={**person, "password": "wrong"})
            assert wrong.status_code == 401
            assert "E-mail or password is wrong" in wrong.text
            inside = client.post("/login", data={**person, "next": "/nodes"})
            assert inside.url.path == "/nodes"
            rows = rows_of(client.get("/download/nodes.csv"))
        assert {row["instance_id"] for row in rows} == {n["instance_id"] for n in seeded.world.second.nodes}


def test_sign_in_says_when_the_control_service_is_away(dashboards: Served) -> None:
    with visitor(dashboards) as client:
        answer = client.post("/login", data={"email": "a@b.example", "password": "x" * 12})
    assert answer.status_code == 502
    assert "CLOUDOPTIM_CONTROL_URL" in answer.text


def test_settings_refuse_weak_secrets_and_name_the_variable() -> None:
    with pytest.raises(DashboardSettingsError, match="CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET"):
        _ = DashboardSettings(CLOUDOPTIM_DASHBOARDS_COOKIE_SECRET="short").cookie_secret  # type: ignore[call-arg]
    with pytest.raises(DashboardSettingsError, match="COOKIE_SECRET is not set"):
        _ = DashboardSettings(CLOUDOPTIM_SANDBOX="0", JWT_SECRET_KEY="").cookie_secret  # type: ignore[call-arg]
    with pytest.raises(DashboardSettingsError, match="DATABASE_URL"):
        _ = DashboardSettings(DATABASE_URL="", DB_HOST="").database_url  # type: ignore[call-arg]
    derived = DashboardSettings(JWT_SECRET_KEY="j" * 40).cookie_secret  # type: ignore[call-arg]
    assert len(derived) == 64
    assert derived != "j" * 40


def test_origins_are_exact() -> None:
    settings = DashboardSettings(  # type: ignore[call-arg]
        CLOUDOPTIM_DASHBOARDS_ORIGINS="https://costs.example.com, pages.example.com:8443"
    )
    assert settings.allowed_origins(5006) == [
        "127.0.0.1:5006",
        "costs.example.com",
        "localhost:5006",
        "pages.example.com:8443",
    ]


@pytest.mark.soak
def test_the_process_stays_small(dashboards: Served) -> None:
    with signed_in(dashboards) as client:
        for path in ("/cost", "/interruptions", "/gaps", "/nodes", "/prices", "/reports"):
            assert client.get(path).status_code == 200
    # PSS, as the footprint of `up` counts: pages of libraries that other processes map too are shared among them.
    assert psutil.Process(dashboards.process.pid).memory_full_info().pss < 350 * 2**20
