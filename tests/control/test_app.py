"""The application as a whole: errors, limits, pages, headers, readiness, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from datetime import UTC, datetime
from uuid import uuid4

import pytest
import structlog
from starlette.exceptions import HTTPException

from control.app import create_app
from control.embedded import EmbeddedRedis, free_port
from control.security.body import check_json
from control.security.redaction import configure_logging, redact, redact_text
from control.settings import SettingsError
from tests.control.api import ADMIN_KEY, serving, settings_for


async def test_every_error_is_a_problem_with_an_id(api, tenant):
    answers = {
        401: await api.call("GET", "/clusters", None),
        403: await api.call("POST", "/customers", tenant.admin_key, json={}),
        404: await api.call("GET", f"/clusters/{uuid4()}"),
        405: await api.call("PUT", "/clusters"),
        409: await api.call(
            "POST", "/clusters", tenant.admin_key, json={"cluster_name": "main", "region": "us-east-1"}
        ),
        415: await api.call("POST", "/clusters", content=b"{}", headers={"Content-Encoding": "gzip"}),
        422: await api.call("GET", "/clusters/no-uuid"),
    }
    for status, answer in answers.items():
        problem = answer.json()
        assert answer.status_code == problem["status"] == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem["type"].startswith("urn:cloudoptim:problem:")
        assert problem["title"]
        assert problem["detail"]
        assert problem["request_id"] == answer.headers["x-request-id"]
    assert (await api.call("GET", "/nowhere")).json()["type"].endswith("not_found")
    assert answers[422].json()["errors"][0]["field"] == "path.cluster_id"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 40 + b"1" + b"}" * 40, 400),
        (b'{"company_name": "\\u0000"}', 422),
        (b'{"company_name": "\\ud800", "email": "a@b.co"}', 422),
        (b'{"company_name": 1' + b"0" * 5000 + b"}", 422),
        (b" " * (1024 * 1024 + 1), 413),
    ],
)
async def test_bodies_that_cannot_be_read(api, content, status):
    answer = await api.call("POST", "/customers", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status or {answer.status_code, status} == {400, 422}, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_body_that_trickles_is_cut_off(api, monkeypatch):
    monkeypatch.setattr("control.security.body.RECEIVE_SECONDS", 0.5)

    async def slowly():
        for _ in range(20):
            yield b" "
            await asyncio.sleep(0.2)

    started = time.monotonic()
    answer = await api.call("POST", "/customers", content=slowly(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 408
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("value", ["' OR 1=1 --", "1; DROP TABLE nodes", "\x00", "%00", "../../etc/passwd", "{{7*7}}"])
async def test_hostile_text_in_filters_is_just_text(api, tenant, value):
    for path, name in (("/clusters", "after"), ("/users", "customer_id"), ("/interruptions", "state")):
        answer = await api.call("GET", path, tenant.admin_key, params={name: value})
        assert answer.status_code == 422
    answer = await api.call("GET", "/clusters", headers={"X-Request-Id": '"} {"event": "x' * 9, "User-Agent": "a\tb"})
    assert answer.status_code == 200
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_headers_of_security_are_on_every_answer(api):
    for path in ("/healthz", "/docs", "/openapi.json", "/nowhere", "/api/v1/clusters"):
        answer = await api.http.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src" in answer.headers["content-security-policy"]
    assert (await api.http.request("TRACE", "/api/v1/clusters")).status_code == 405


@pytest.mark.parametrize(
    ("origin", "allowed"), [("https://app.example.com", True), ("https://evil.example", False), ("null", False)]
)
async def test_only_listed_origins_are_answered(api, origin, allowed):
    answer = await api.http.options(
        "/api/v1/clusters", headers={"Origin": origin, "Access-Control-Request-Method": "GET"}
    )
    assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    assert "access-control-allow-credentials" not in answer.headers


async def test_pages_ask_nobody_else_for_anything(api):
    for path in ("/docs", "/asyncapi", "/docs/start.js"):
        page = await api.http.get(path)
        assert page.status_code == 200
        assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", page.text), path
        for reference in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert (await api.http.get(reference)).status_code == 200, reference
    style = (await api.http.get("/docs/assets/swagger-ui.css")).text
    assert not re.search(r"url\([\"']?https?:", style)


async def test_the_documents_describe_everything(api):
    openapi = (await api.http.get("/openapi.json")).json()
    assert openapi["openapi"].startswith("3.1")
    names = set(openapi["components"]["schemas"])
    assert {"MetricsData", "ClusterState", "TaskResult", "Problem"} <= names
    for reference in re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', json.dumps(openapi)):
        assert reference in names
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description") or operation.get("summary"), (method, path)
    asyncapi = (await api.http.get("/asyncapi.json")).json()
    assert asyncapi["asyncapi"].startswith("3.")
    page = (await api.http.get("/asyncapi")).text
    for topic in (
        "optimization.started",
        "optimization.completed",
        "spot.interruption.detected",
        "cluster.state.changed",
        "task.created",
        "task.finished",
        "gap.filled",
        "model.activated",
        "savings.report.ready",
        "client.metrics.updated",
        "ml.prediction.ready",
    ):
        assert topic in page, topic


async def test_health_and_readiness(api):
    assert (await api.http.get("/healthz")).json() == {"status": "ok"}
    started = time.monotonic()
    while (ready := (await api.http.get("/readyz")).json())["status"] != "ready":
        assert time.monotonic() - started < 15, ready
        await asyncio.sleep(0.2)
    assert ready["parts"] == {"postgres": "ok", "redis": "ok", "subscribers": "ok"}


async def test_metrics_count_requests_by_route_and_not_by_path(api, tenant):
    await api.ok("GET", f"/clusters/{tenant.cluster_id}")
    await api.http.get(f"/made-up/{uuid4()}")
    text = (await api.http.get("/metrics")).text
    assert 'route="/clusters/{cluster_id}"' in text or 'route="/api/v1/clusters/{cluster_id}"' in text
    assert str(tenant.cluster_id) not in text
    assert "made-up" not in text


async def test_without_redis_the_api_serves_and_says_what_is_missing(postgres_url, server_folder):
    server = EmbeddedRedis(server_folder / f"app-{uuid4().hex[:6]}", port=free_port()).start()
    async with serving(settings_for(postgres_url, server.url)) as api:
        tenant = await api.tenant()
        server.stop()
        answer = await api.http.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
        assert "redis" in answer.json()["missing"]
        assert "REDIS_URL" in answer.json()["parts"]["redis"]
        started = time.monotonic()
        assert (await api.call("GET", "/clusters", tenant.analyst_key)).status_code == 200
        assert time.monotonic() - started < 3


async def test_limits_are_shared_by_processes_and_kept_apart_by_customer(postgres_url, clean_redis_url):
    settings = settings_for(postgres_url, clean_redis_url, CLOUDOPTIM_RATE_LIMIT_PER_KEY="20/minute")
    async with serving(settings) as first, serving(settings) as second:
        tenant, other = await first.tenant(), await first.tenant()
        codes = []
        for number in range(30):
            running = (first, second)[number % 2]
            codes.append((await running.call("GET", "/clusters", tenant.analyst_key)).status_code)
        assert codes[:18] == [200] * 18
        assert 18 <= codes.count(200) <= 22, "within ten per cent over two processes"
        refused = await first.call("GET", "/clusters", tenant.analyst_key)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await second.call("GET", "/clusters", other.analyst_key)).status_code == 200


async def test_limits_of_a_customer_are_shared_by_its_keys_and_by_nobody_else(postgres_url, clean_redis_url):
    settings = settings_for(postgres_url, clean_redis_url, CLOUDOPTIM_RATE_LIMIT_PER_CUSTOMER="10/minute")
    async with serving(settings) as api:
        tenant, other = await api.tenant(), await api.tenant()
        keys = (tenant.analyst_key, tenant.admin_key)
        codes = [(await api.call("GET", "/clusters", keys[number % 2])).status_code for number in range(14)]
        assert (codes[:9], codes[-1]) == ([200] * 9, 429)
        assert (await api.call("GET", "/clusters", other.analyst_key)).status_code == 200


async def test_limits_hold_without_redis(postgres_url):
    settings = settings_for(
        postgres_url, f"redis://127.0.0.1:{free_port()}/0", CLOUDOPTIM_RATE_LIMIT_PER_KEY="40/minute"
    )
    async with serving(settings) as api:
        codes = [(await api.call("GET", "/clusters")).status_code for _ in range(50)]
    assert set(codes) == {200, 429}
    assert codes[0] == 200


async def test_forwarded_addresses_are_believed_from_trusted_proxies_only(postgres_url, clean_redis_url):
    for trusted, locked_out in (("", True), ("127.0.0.0/8", False)):
        settings = settings_for(postgres_url, clean_redis_url, CLOUDOPTIM_TRUSTED_PROXIES=trusted)
        async with serving(settings) as api:
            codes = {
                (
                    await api.call("GET", "/clusters", "w" * 40, headers={"X-Forwarded-For": f"203.0.113.{number}"})
                ).status_code
                for number in range(15)
            }
        assert (429 in codes) is locked_out


async def test_an_exhausted_pool_is_503_within_seconds_and_the_intake_still_works(postgres_url, redis_url):
    settings = settings_for(postgres_url, redis_url, DB_POOL_SIZE=2)
    async with serving(settings) as api:
        tenant = await api.tenant()
        context = api.app.state.context
        async with asyncio.TaskGroup() as group:
            held, release = asyncio.Barrier(5), asyncio.Event()

            async def hold() -> None:
                async with context.db.system():
                    await held.wait()
                    await release.wait()

            for _ in range(4):
                group.create_task(hold())
            await held.wait()
            started = time.monotonic()
            answer = await api.call("GET", "/customers")
            assert answer.status_code == 503, answer.text
            assert time.monotonic() - started < 4
            assert int(answer.headers["retry-after"]) >= 1
            assert context.intake_db.engine.pool is not context.db.engine.pool
            # Keys that this process has not seen: whose they are is asked on the reserved connections too.
            now = datetime.now(UTC).isoformat()
            notice = {"event_type": "spot_interruption", "instance_id": "i-0123456789abcdef0", "occurred_at": now}
            events = {"cluster_id": str(tenant.cluster_id), "events": [notice]}
            told = await api.call("POST", "/client/events", tenant.agent_key, json=events)
            assert (told.status_code, told.json().get("accepted")) == (200, 1), told.text
            pushed = await api.call("POST", "/events/aws", tenant.admin_key, json={"id": "no event"})
            assert (pushed.status_code, pushed.json().get("outcome")) == (202, "quarantined"), pushed.text
            release.set()


async def test_an_unforeseen_error_tells_nothing(api, tenant, monkeypatch):
    async def explode(*_args, **_kwargs):
        raise RuntimeError("SELECT secret FROM somewhere; arn:aws:iam::123456789012:role/x")

    monkeypatch.setattr("control.clusters.service.list_clusters", explode)
    answer = await api.call("GET", "/clusters", tenant.analyst_key)
    assert answer.status_code == 500
    assert set(answer.json()) == {"type", "title", "status", "detail", "request_id"}
    assert "SELECT" not in answer.text
    assert "arn:" not in answer.text


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"JWT_SECRET_KEY": "changeme"}, "JWT_SECRET_KEY"),
        ({"JWT_SECRET_KEY": ""}, "JWT_SECRET_KEY"),
        ({"API_KEY_SALT": ""}, "API_KEY_SALT"),
        ({"CLOUDOPTIM_MASTER_KEY": "short"}, "CLOUDOPTIM_MASTER_KEY"),
        ({"CORS_ORIGINS": "*"}, "CORS_ORIGINS"),
        ({"CLOUDOPTIM_OUTBOUND_ALLOW_CIDRS": "10.0.0.1/8"}, "CLOUDOPTIM_OUTBOUND_ALLOW_CIDRS"),
        ({"CLOUDOPTIM_RATE_LIMIT_PER_KEY": "lots"}, "CLOUDOPTIM_RATE_LIMIT_PER_KEY"),
    ],
)
def test_weak_settings_refuse_to_start_and_are_named(changes, variable):
    settings = settings_for("postgresql://x@127.0.0.1/x", "redis://127.0.0.1/0", **changes)
    with pytest.raises(SettingsError, match=variable) as refused:
        create_app(settings)
    assert "changeme" not in str(refused.value), "the variable is named, never its value"


@pytest.fixture
def json_logs(capsys):
    """What the test writes to standard error; its handlers go with it and those of before come back."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield capsys
    root.handlers[:], root.level = before


CANARIES = {
    "key": "co_0123456789abcdef." + "C" * 43,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    "dsn": "postgresql://user:canarypassword@db/x",
    "bearer": "Bearer canarybearertoken",
    "slack": "https://hooks.slack.com/services/T/B/canary",
    "aws": "AKIACANARYCANARY1234",
}


@pytest.mark.parametrize("name", CANARIES)
def test_secrets_are_taken_out_of_logs_by_shape(name, json_logs):
    configure_logging("INFO")
    structlog.get_logger("test").info("event", text=f"before {CANARIES[name]} after", items=[{"deep": CANARIES[name]}])
    logging.getLogger("library").warning("said %s", CANARIES[name])
    try:
        raise ValueError(CANARIES[name])
    except ValueError:
        structlog.get_logger("test").exception("failed")
    lines = [line for line in json_logs.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 3
    for line in lines:
        json.loads(line)
        assert "canary" not in line.lower().replace("test_app", "") or name == "key"
        assert CANARIES[name] not in line


@pytest.mark.parametrize("text", ["-eyJ" * 250_000, "eyJa." * 200_000, "://a:b" * 170_000, "bearer " * 150_000])
def test_a_text_that_is_nearly_full_of_secrets_is_read_in_no_time(text):
    started = time.process_time()
    redact_text(text)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_json_whose_text_does_not_end_is_judged_in_no_time(end):
    started = time.process_time()
    check_json(b"[" + b"[], " * 40 + b'"' + b'\\"' * 500_000 + end)
    assert time.process_time() - started < 1.0
    with pytest.raises(HTTPException, match="nested deeper"):
        check_json(b'["\\" [", ' + b"[" * 40 + b"]" * 41)
    check_json(b'["' + b"[" * 100 + b'"]')


def test_secrets_are_taken_out_of_logs_by_name():
    event = redact({"k8s_token": "a", "password": "b", "nested": {"api_key": "c", "node": "n"}, "client_token": "t"})
    assert event == {
        "k8s_token": "***",
        "password": "***",
        "nested": {"api_key": "***", "node": "n"},
        "client_token": "t",
    }


def test_a_log_line_is_one_line_whatever_is_in_it(json_logs):
    configure_logging("INFO")
    structlog.get_logger("test").info("event", node='evil\n{"event": "fake"}\x1b[31m')
    (line,) = json_logs.readouterr().err.splitlines()
    assert json.loads(line)["node"].startswith("evil\n")
    assert "\x1b" not in line


async def test_the_admin_key_of_the_settings_opens_the_api_at_once(api):
    assert (await api.call("GET", "/customers", ADMIN_KEY)).status_code == 200
