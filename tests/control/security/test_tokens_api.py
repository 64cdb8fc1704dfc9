"""Sign-in, refresh, and every forged token of RELIABILITY.md S-09."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from sqlalchemy import text

from control.security import tokens
from control.security.audit import first_broken_entry
from tests.control.api import Api, Tenant

PASSWORD = "correct horse battery"


@pytest.fixture
async def person(api: Api, tenant: Tenant) -> dict[str, Any]:
    email = f"{uuid4().hex}@example.com"
    user = await api.ok(
        "POST", "/users", tenant.admin_key, json={"email": email, "password": PASSWORD, "role": "customer_admin"}
    )
    signed_in = await api.ok("POST", "/auth/token", None, json={"email": email, "password": PASSWORD})
    return user | signed_in


async def status(api: Api, token: str) -> int:
    return (await api.call("GET", "/clusters", token)).status_code


async def test_a_person_signs_in_and_sees_its_own_customer(api, tenant, person):
    assert (person["role"], person["customer_id"]) == ("customer_admin", str(tenant.customer_id))
    assert (await api.ok("GET", "/customers", person["access_token"]))["customers"][0]["id"] == str(tenant.customer_id)


async def test_wrong_password_and_unknown_address_look_the_same(api, person):
    answers = [
        await api.call("POST", "/auth/token", None, json={"email": email, "password": "wrong password"})
        for email in (person["email"], "nobody@example.com")
    ]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]


async def test_ten_wrong_passwords_lock_the_address_out_for_a_minute(api, person):
    body = {"email": person["email"], "password": "wrong password"}
    codes = {(await api.call("POST", "/auth/token", None, json=body)).status_code for _ in range(11)}
    last = await api.call("POST", "/auth/token", None, json=body | {"password": PASSWORD})
    assert codes <= {401, 429}
    assert last.status_code == 429
    assert int(last.headers["retry-after"]) > 0
    await api.app.state.context.redis.flushdb()


def claims(person: dict[str, Any], **changes: Any) -> dict[str, Any]:
    good = jwt.decode(person["access_token"], options={"verify_signature": False})
    return {name: value for name, value in (good | changes).items() if value is not ...}


def forged(person: dict[str, Any], secret: str, **changes: Any) -> str:
    headers = changes.pop("headers", None)
    return jwt.encode(claims(person, **changes), secret, algorithm=changes.pop("algorithm", "HS256"), headers=headers)


def unsigned(person: dict[str, Any]) -> str:
    def part(value: dict) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims(person))}."


async def test_forged_tokens_are_401(api, person, tenant, other):
    secret = api.settings.jwt_secret_key.get_secret_value()
    past = datetime.now(UTC) - timedelta(hours=1)
    attacks = {
        "alg none": unsigned(person),
        "another secret": forged(person, "x" * 40),
        "HS512": jwt.encode(claims(person), secret * 2, algorithm="HS512"),
        "kid path": forged(person, "x" * 40, headers={"kid": "../../dev/null"}),
        "kid sql": forged(person, "x" * 40, headers={"kid": "' OR 1=1 --"}),
        "jku": forged(person, "x" * 40, headers={"jku": "https://example.com/keys"}),
        "jwk": forged(person, "x" * 40, headers={"jwk": {"kty": "oct", "k": "eHh4"}}),
        "expired": forged(person, secret, exp=past),
        "no exp": forged(person, secret, exp=...),
        "no iat": forged(person, secret, iat=...),
        "no jti": forged(person, secret, jti=...),
        "no sub": forged(person, secret, sub=...),
        "not yet valid": forged(person, secret, nbf=datetime.now(UTC) + timedelta(hours=1)),
        "other audience": forged(person, secret, aud="somebody"),
        "other issuer": forged(person, secret, iss="somebody"),
        "refresh as access": person["refresh_token"],
        "unknown session": forged(person, secret, sid=str(uuid4())),
        "unknown user": forged(person, secret, sub=str(uuid4())),
        "sub is no id": forged(person, secret, sub="admin"),
        "cut signature": person["access_token"][:-4],
        "garbage": "a.b.c",
    }
    found = {name: await status(api, token) for name, token in attacks.items()}
    await api.app.state.context.redis.flushdb()
    assert {name for name, code in found.items() if code not in (401, 429)} == set()


async def test_an_edited_role_or_customer_changes_nothing(api, person, other):
    secret = api.settings.jwt_secret_key.get_secret_value()
    token = forged(person, secret, role="platform_admin", customer_id=str(other.customer_id))
    assert (await api.call("POST", "/customers", token, json={})).status_code == 403
    assert (await api.call("GET", f"/customers/{other.customer_id}", token)).status_code == 404


async def test_a_refresh_token_works_once_and_a_second_use_ends_the_session(api, person):
    second = await api.ok("POST", "/auth/refresh", None, json={"refresh_token": person["refresh_token"]})
    assert await status(api, second["access_token"]) == 200
    stolen = await api.call("POST", "/auth/refresh", None, json={"refresh_token": person["refresh_token"]})
    assert stolen.status_code == 401
    assert await status(api, second["access_token"]) == 401
    third = await api.call("POST", "/auth/refresh", None, json={"refresh_token": second["refresh_token"]})
    assert third.status_code == 401


async def test_concurrent_refreshes_give_one_session(api, person):
    body = {"refresh_token": person["refresh_token"]}
    answers = await asyncio.gather(*(api.call("POST", "/auth/refresh", None, json=body) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers)[0] == 200
    assert [answer.status_code for answer in answers].count(200) == 1


async def test_signing_out_ends_the_access_token_too(api, person):
    await api.ok("POST", "/auth/logout", None, json={"refresh_token": person["refresh_token"]})
    assert await status(api, person["access_token"]) == 401


async def test_disabling_a_person_takes_effect_at_once(api, tenant, person):
    assert await status(api, person["access_token"]) == 200
    await api.ok("PATCH", f"/users/{person['id']}", tenant.admin_key, json={"disabled": True})
    assert await status(api, person["access_token"]) == 401
    again = await api.call("POST", "/auth/token", None, json={"email": person["email"], "password": PASSWORD})
    assert again.status_code == 401


async def test_a_role_taken_away_in_the_database_holds_within_five_seconds(api, person):
    assert (await api.call("GET", "/users", person["access_token"])).status_code == 200
    async with api.db.system() as conn:
        await conn.execute(text("UPDATE users SET role = 'analyst' WHERE id = :id"), {"id": UUID(person["id"])})
    started = time.monotonic()
    while (await api.call("GET", "/users", person["access_token"])).status_code != 403:
        assert time.monotonic() - started < 5
        await asyncio.sleep(0.2)


async def test_a_customer_admin_makes_no_platform_admin_and_nobody_elsewhere(api, tenant, other):
    body = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD, "role": "platform_admin"}
    assert (await api.call("POST", "/users", tenant.admin_key, json=body)).status_code == 403
    body |= {"role": "analyst", "customer_id": str(other.customer_id)}
    assert (await api.call("POST", "/users", tenant.admin_key, json=body)).status_code == 404
    taken = body | {"customer_id": str(tenant.customer_id)}
    assert (await api.call("POST", "/users", tenant.admin_key, json=taken)).status_code == 201
    assert (await api.call("POST", "/users", tenant.admin_key, json=taken)).status_code == 409


async def test_sign_ins_are_audited_and_the_chain_holds(api, tenant, person):
    await api.call("POST", "/auth/token", None, json={"email": person["email"], "password": "wrong password"})
    async with api.db.tenant(tenant.customer_id) as conn:
        actions = set((await conn.execute(text("SELECT action FROM audit_log"))).scalars())
        assert {"login.succeeded", "login.failed", "user.created", "cluster.created"} <= actions
        assert await first_broken_entry(conn, tenant.customer_id) is None


def test_short_secrets_are_refused():
    with pytest.raises(ValueError, match="JWT_SECRET_KEY"):
        tokens.Tokens("short")
