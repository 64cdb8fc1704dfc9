"""API keys: shown once, hashed, revoked within seconds, and never read from a query string."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

from sqlalchemy import text

from control.security import keys
from tests.control.api import ADMIN_KEY
from tests.control.test_app_matrices import documented


async def test_the_secret_is_shown_once_and_not_stored(api, tenant):
    created = await api.ok("POST", "/api-keys", tenant.admin_key, json={"name": "ci", "role": "analyst"})
    secret = created["key"].split(".")[1]
    assert secret not in (await api.call("GET", "/api-keys", tenant.admin_key)).text
    assert secret not in (await api.call("GET", f"/api-keys/{created['id']}", tenant.admin_key)).text
    async with api.db.system() as conn:
        row = (await conn.execute(text("SELECT * FROM api_keys WHERE prefix = :p"), {"p": created["prefix"]})).one()
    assert secret not in str(row)
    assert len(row.secret_hmac) == 32


async def test_both_headers_work_and_the_query_string_does_not(api, tenant):
    assert (await api.call("GET", "/clusters", None, headers={"X-API-Key": tenant.analyst_key})).status_code == 200
    for name in ("api_key", "key", "token", "access_token"):
        answer = await api.call("GET", "/clusters", None, params={name: tenant.analyst_key})
        assert answer.status_code == 401


async def test_a_wrong_secret_of_a_known_prefix_is_401(api, tenant):
    prefix, secret = tenant.analyst_key.split(".")
    wrong = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    assert (await api.call("GET", "/clusters", f"{prefix}.{wrong}")).status_code == 401
    await api.app.state.context.redis.flushdb()


async def test_a_revoked_key_opens_nothing(api, tenant):
    created = await api.ok("POST", "/api-keys", tenant.admin_key, json={"name": "ci", "role": "analyst"})
    assert (await api.call("GET", "/clusters", created["key"])).status_code == 200
    await api.ok("DELETE", f"/api-keys/{created['id']}", tenant.admin_key)
    assert (await api.call("GET", "/clusters", created["key"])).status_code == 401
    await api.app.state.context.redis.flushdb()


async def test_a_key_revoked_by_another_process_opens_nothing_within_five_seconds(api, tenant):
    assert (await api.call("GET", "/clusters", tenant.analyst_key)).status_code == 200
    async with api.db.system() as conn:
        await conn.execute(
            text("UPDATE api_keys SET revoked_at = now() WHERE prefix = :p"), {"p": tenant.analyst_key.split(".")[0]}
        )
    started = time.monotonic()
    while (await api.call("GET", "/clusters", tenant.analyst_key)).status_code != 401:
        assert time.monotonic() - started < 5
        await asyncio.sleep(0.2)
    await api.app.state.context.redis.flushdb()


async def test_ten_wrong_keys_from_one_address_are_429(api, tenant):
    codes = [
        (await api.call("GET", "/clusters", "co_" + uuid4().hex[:16] + "." + "x" * 43)).status_code for _ in range(12)
    ]
    assert set(codes) == {401, 429}
    assert codes[-1] == 429
    assert (await api.call("GET", "/clusters", tenant.analyst_key)).status_code == 200, "a right key still works"
    await api.app.state.context.redis.flushdb()


async def test_keys_of_a_suspended_customer_open_nothing(api, tenant):
    await api.ok("PATCH", f"/customers/{tenant.customer_id}", json={"suspended": True})
    assert (await api.call("GET", "/clusters", tenant.admin_key)).status_code == 401
    await api.ok("PATCH", f"/customers/{tenant.customer_id}", json={"suspended": False})
    assert (await api.call("GET", "/clusters", tenant.admin_key)).status_code == 200
    await api.app.state.context.redis.flushdb()


async def test_an_agents_key_opens_four_routes_only(api, tenant):
    opened = []
    for method, path in sorted(documented(api)):
        values = {"cluster_id": str(tenant.cluster_id), "customer_id": str(tenant.customer_id)}
        url = path.format_map(
            {
                **values,
                **dict.fromkeys(("user_id", "key_id", "task_id", "fill_id"), uuid4()),
                "interruption_id": uuid4(),
                "message_id": "x",
                "key": "savings_fee",
            }
        )
        answer = await api.call(method, url, tenant.agent_key, params=values, json={})
        if answer.status_code != 403 and not path.startswith("/auth"):
            opened.append(path)
    assert sorted(opened) == ["/client/events", "/client/metrics", "/client/tasks", "/client/tasks/{task_id}/result"]


async def test_what_an_agents_key_needs_is_checked(api, tenant):
    for body in (
        {"name": "k", "role": "agent"},
        {"name": "k", "role": "analyst", "cluster_id": str(tenant.cluster_id)},
        {"name": "k", "role": "analyst", "expires_at": "2020-01-01T00:00:00Z"},
        {"name": "k", "role": "emperor"},
        {"name": "", "role": "analyst"},
        {"name": "k", "role": "analyst", "secret_hmac": "x"},
    ):
        assert (await api.call("POST", "/api-keys", tenant.admin_key, json=body)).status_code == 422, body


def test_an_unknown_prefix_costs_what_a_wrong_secret_costs():
    pepper, known = b"p" * 40, keys.generate(b"p" * 40)
    prefix, secret = keys.split(pepper, known.key)

    def cost(stored: bytes | None) -> float:
        times = []
        for _ in range(3000):
            started = time.perf_counter()
            keys.matches(pepper, prefix, secret[:-1] + "_", stored)
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    assert abs(cost(known.secret_hmac) - cost(None)) < 0.1e-3
    assert keys.matches(pepper, prefix, secret, known.secret_hmac)
    assert not keys.matches(pepper, prefix, secret, keys.hash_secret(b"other", prefix, secret))
    assert secret not in repr(known)
    assert keys.split(pepper, ADMIN_KEY)[0] == keys.derive(pepper, ADMIN_KEY).prefix
    assert keys.split(pepper, "short") is None
