"""Generated over every route of the OpenAPI document: who may call it, and that no tenant reaches another's things."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from control.agents.repository import NewTask, create_tasks
from control.interruptions.views import message_id
from tests.control.api import ADMIN_KEY, Api, Tenant
from tests.control.routes import AGENT, ANALYST, CUSTOMER, ML, PLATFORM, PUSHER, ROUTES, Call, Ids
from warehouse.postgres.models import new_id

PREFIX = "/api/v1"
ROLES = (PLATFORM, CUSTOMER, ANALYST, ML, AGENT, PUSHER)


def documented(api: Api) -> set[tuple[str, str]]:
    return {
        (method.upper(), path.removeprefix(PREFIX))
        for path, operations in api.app.openapi()["paths"].items()
        if path.startswith(PREFIX)
        for method in operations
    }


def unknown_ids() -> Ids:
    nobody = Tenant(uuid4(), uuid4(), "", "", "")
    return Ids(nobody, *(str(uuid4()) for _ in range(6)))


async def things_of(api: Api, tenant: Tenant) -> Ids:
    """One of everything that routes name by id."""
    user = await api.ok(
        "POST",
        "/users",
        json={
            "customer_id": str(tenant.customer_id),
            "email": f"{uuid4().hex}@example.com",
            "password": "a long password",
            "role": "analyst",
        },
    )
    key = await api.ok(
        "POST", "/api-keys", json={"customer_id": str(tenant.customer_id), "name": "k", "role": "analyst"}
    )
    interruption, message = new_id(), uuid4().hex
    async with api.db.system() as conn:
        (task,) = await create_tasks(
            conn,
            [
                NewTask(
                    customer_id=tenant.customer_id,
                    cluster_id=tenant.cluster_id,
                    task_type="collect_state",
                    parameters={},
                    dedupe_key="matrix",
                )
            ],
        )
        await conn.execute(
            text("""INSERT INTO interruptions (id, customer_id, cluster_id, region, interruption_key, instance_id,
                        instance_action, kind, notice_at, received_at, deadline_at, detected_by, state)
                    VALUES (:id, :customer, :cluster, 'us-east-1', 'i-1', 'i-1', 'terminate', 'spot_interruption',
                        now(), now(), now(), ARRAY['sqs'], 'open')"""),
            {"id": interruption, "customer": tenant.customer_id, "cluster": tenant.cluster_id},
        )
        await conn.execute(
            text("""INSERT INTO inbox_messages (customer_id, source, dedupe_key, body_sha256, outcome, reason, body)
                    VALUES (:customer, 'sqs', :key, 'x', 'quarantined', 'test', '{}')"""),
            {"customer": tenant.customer_id, "key": message},
        )
        await conn.execute(
            text("""INSERT INTO customer_config (customer_id, config_key, config_value)
                    VALUES (:customer, 'approval_required', 'true')"""),
            {"customer": tenant.customer_id},
        )
        await conn.execute(
            text("""INSERT INTO savings_statements (id, customer_id, period, period_start, period_end, baseline_name,
                        baseline_usd, actual_usd, net_savings_usd, fee_usd, coverage, lake_release_id, body)
                    VALUES (:id, :customer, 'month', '2026-10-01', '2026-11-01', 'b1_list', 100, 60, 40, 0, 1, 1,
                        '{"clusters": [], "stage": "realised"}')"""),
            {"id": new_id(), "customer": tenant.customer_id},
        )
    return Ids(
        tenant,
        user["id"],
        key["id"],
        str(task),
        str(interruption),
        message_id(tenant.customer_id, "sqs", message),
        str(uuid4()),
    )


async def send(api: Api, route: tuple[str, str], call: Call, ids: Ids, key: str | None) -> httpx.Response:
    method, template = route
    values = {"customer_id": str(ids.tenant.customer_id), "cluster_id": str(ids.tenant.cluster_id)}
    own = call.path(ids) if call.path else ""
    path = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1]) or own, template)
    options: dict[str, Any] = {}
    if call.params:
        options["params"] = call.params(ids)
    if call.body:
        options["json"] = call.body(ids)
    return await api.call(method, path, key, **options)


@pytest.fixture(scope="module")
async def keys(api: Api) -> dict[str, str]:
    """A key of each role; those of a customer belong to one of its own."""
    tenant = await api.tenant("Roles")
    ml_key = (await api.ok("POST", "/api-keys", json={"name": "ml", "role": "ml_server"}))["key"]
    return {
        PLATFORM: ADMIN_KEY,
        CUSTOMER: tenant.admin_key,
        ANALYST: tenant.analyst_key,
        ML: ml_key,
        AGENT: tenant.agent_key,
        PUSHER: (await api.ok("POST", "/api-keys", tenant.admin_key, json={"name": "push", "role": PUSHER}))["key"],
    }


def test_every_route_is_in_the_table(api):
    assert documented(api) == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
async def test_roles(api, keys, route):
    call = ROUTES[route]
    if "anonymous" in call.roles:
        assert (await send(api, route, call, unknown_ids(), None)).status_code in (200, 204, 401, 429)
        return
    anonymous = await send(api, route, call, unknown_ids(), None)
    assert anonymous.status_code == 401
    assert anonymous.headers["www-authenticate"] == "Bearer"
    assert anonymous.headers["content-type"] == "application/problem+json"
    for role in ROLES:
        answer = await send(api, route, call, unknown_ids(), keys[role])
        if role in call.roles:
            assert answer.status_code not in (401, 403), (role, answer.text)
            assert answer.status_code < 500, (role, answer.text)
        else:
            assert answer.status_code == 403, (role, answer.text)


@pytest.fixture(scope="module")
async def strangers(api: Api) -> tuple[Tenant, Ids]:
    """A tenant, and the things of another one."""
    return await api.tenant("Mallory"), await things_of(api, await api.tenant("Victim"))


@pytest.mark.parametrize("route", [route for route, call in ROUTES.items() if call.scoped], ids=" ".join)
async def test_another_tenants_things_are_not_there(api, strangers, route):
    """404 with the body an unknown id gets: never 403, never 200."""
    mallory, victim = strangers
    call = ROUTES[route]
    keys = [
        key
        for role, key in (
            (CUSTOMER, mallory.admin_key),
            (ANALYST, mallory.analyst_key),
            (AGENT, mallory.agent_key),
        )
        if role in call.roles
    ]
    assert keys
    for key in keys:
        foreign = await send(api, route, call, victim, key)
        unknown = await send(api, route, call, unknown_ids(), key)
        assert foreign.status_code == unknown.status_code == 404, foreign.text
        bodies = [answer.json() for answer in (foreign, unknown)]
        for body in bodies:
            body.pop("request_id")
        assert bodies[0] == bodies[1]


async def test_lists_show_ones_own_only(api, strangers):
    mallory, victim = strangers
    text_of = {
        path: (await api.call("GET", path, mallory.admin_key)).text
        for path in ("/customers", "/clusters", "/users", "/api-keys", "/interruptions", "/quarantine")
    }
    for path, body in text_of.items():
        assert str(victim.tenant.customer_id) not in body, path
        assert str(victim.tenant.cluster_id) not in body, path
    for path in ("/interruptions", "/users", "/api-keys", "/clusters"):
        answer = await api.call("GET", path, mallory.admin_key, params={"cluster_id": str(victim.tenant.cluster_id)})
        assert victim.interruption not in answer.text


async def test_a_thing_cannot_refer_to_another_tenants_cluster(api, strangers):
    mallory, victim = strangers
    body = {"name": "k", "role": "agent", "cluster_id": str(victim.tenant.cluster_id)}
    assert (await api.call("POST", "/api-keys", mallory.admin_key, json=body)).status_code == 404
