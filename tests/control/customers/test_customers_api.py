"""/customers: onboarding, the confused deputy, configuration, off-boarding."""

from __future__ import annotations

import asyncio
import json
from uuid import uuid4

import pytest
from sqlalchemy import text

from control.customers import registry
from control.customers.service import open_channels
from control.sandbox.aws.server import SandboxAWS
from tests.control.api import serving, settings_for

ROLE = "arn:aws:iam::{}:role/cloudoptim"
QUEUE = "https://sqs.us-east-1.amazonaws.com/{}/cloudoptim-events"


def account() -> str:
    return f"{uuid4().int % 10**12:012d}"


async def test_customers_are_made_by_the_platform_only(api, tenant):
    body = {"company_name": "X", "email": "x@example.com"}
    assert (await api.call("POST", "/customers", None, json=body)).status_code == 401
    assert (await api.call("POST", "/customers", tenant.admin_key, json=body)).status_code == 403


@pytest.mark.parametrize(
    "extra", ["external_id", "status", "aws_account_id", "id", "kill_switch", "data_key", "tenant_id"]
)
async def test_nothing_is_assigned_by_the_caller(api, tenant, extra):
    value = str(uuid4())
    body = {"company_name": "X", "email": "x@example.com", extra: value}
    assert (await api.call("POST", "/customers", json=body)).status_code == 422
    answer = await api.call("PATCH", f"/customers/{tenant.customer_id}", json={extra: value})
    assert answer.status_code == 422
    assert extra in answer.text


async def test_the_external_id_is_random_and_stays(api, tenant):
    before = await api.ok("GET", f"/customers/{tenant.customer_id}")
    changed = await api.ok("PATCH", f"/customers/{tenant.customer_id}", json={"company_name": "New name"})
    assert changed["external_id"] == before["external_id"]
    assert changed["company_name"] == "New name"


async def test_an_account_belongs_to_one_customer(api, tenant, other):
    theirs = await api.ok("GET", f"/customers/{other.customer_id}")
    for method, path in (("POST", "/customers"), ("PATCH", f"/customers/{tenant.customer_id}")):
        body = {"company_name": "X", "email": "x@example.com", "aws_role_arn": theirs["aws_role_arn"]}
        if method == "PATCH":
            body["sqs_queue_url"] = QUEUE.format(theirs["aws_account_id"])
        answer = await api.call(method, path, json=body)
        assert answer.status_code == 409, answer.text
        assert theirs["company_name"] not in answer.json()["detail"]


@pytest.mark.parametrize(
    ("role", "queue", "word"),
    [
        ("arn:aws:iam::123:role/x", None, "aws_role_arn"),
        ("arn:aws:iam::123456789012:user/x", None, "aws_role_arn"),
        ("arn:aws:sts::123456789012:assumed-role/x/y", None, "aws_role_arn"),
        (ROLE.format("123456789012"), "https://169.254.169.254/123456789012/q", "sqs_queue_url"),
        (ROLE.format("123456789012"), "https://sqs.xx-fake-9.amazonaws.com/123456789012/q", "sqs_queue_url"),
        (ROLE.format("123456789012"), QUEUE.format("999999999999"), "sqs_queue_url"),
    ],
)
async def test_roles_and_queues_must_fit(api, role, queue, word):
    body = {"company_name": "X", "email": "x@example.com", "aws_role_arn": role, "sqs_queue_url": queue}
    answer = await api.call("POST", "/customers", json=body)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]


async def test_a_new_role_has_to_be_verified_again(api, tenant):
    async with api.db.system() as conn:
        await conn.execute(text("UPDATE customers SET status = 'active' WHERE id = :id"), {"id": tenant.customer_id})
    number = account()
    changed = await api.ok(
        "PATCH",
        f"/customers/{tenant.customer_id}",
        json={"aws_role_arn": ROLE.format(number), "sqs_queue_url": QUEUE.format(number)},
    )
    assert (changed["status"], changed["aws_account_id"]) == ("pending", number)


@pytest.fixture
async def sandboxed(postgres_url, redis_url, monkeypatch):
    """The API against the sandbox's AWS."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    async with SandboxAWS() as aws:
        settings = settings_for(postgres_url, redis_url, AWS_ENDPOINT_URL=aws.url)
        async with serving(settings) as running:
            yield running, aws


async def test_verification_says_what_works_and_what_does_not(sandboxed):
    api, aws = sandboxed
    number = account()
    customer = await api.ok("POST", "/customers", json={"company_name": "V", "email": "v@example.com"})
    path = f"/customers/{customer['id']}/verify"
    nothing = await api.ok("POST", path)
    assert (nothing["ok"], nothing["checks"][0]["name"]) == (False, "role")
    known = aws.add_account(number, external_id="somebody else's")
    await api.ok(
        "PATCH",
        f"/customers/{customer['id']}",
        json={"aws_role_arn": known.role_arn, "sqs_queue_url": known.queue_url},
    )
    wrong = await api.ok("POST", path)
    assert (wrong["ok"], wrong["checks"][0]["name"], wrong["checks"][0]["ok"]) == (
        False,
        "role_with_external_id",
        False,
    )
    assert (
        wrong["trust_policy"]["Statement"][0]["Condition"]["StringEquals"]["sts:ExternalId"] == customer["external_id"]
    )
    aws.add_account(number, external_id=customer["external_id"])
    good = await api.ok("POST", path)
    assert good["ok"], good["checks"]
    assert good["status"] == "active"
    assert [check["name"] for check in good["checks"]] == [
        "role_with_external_id",
        "role_without_external_id",
        "role_with_another_external_id",
        "account",
        "queue",
        "ec2",
    ]
    template = json.loads(good["cloudformation"])
    assert template["Resources"]["Queue"]["Properties"]["QueueName"] == "cloudoptim-events"
    assert "aws_iam_role" in good["terraform"]
    # Optional, with a key that only pushes, and the queue for what cannot be delivered.
    assert all(template["Parameters"][name]["Default"] == "" for name in ("PushUrl", "PushKey"))
    push = {name: part for name, part in template["Resources"].items() if part.get("Condition") == "Push"}
    assert set(push) == {"PushConnection", "PushDestination", "PushRole", "PushRule"}
    key = push["PushConnection"]["Properties"]["AuthParameters"]["ApiKeyAuthParameters"]
    assert key == {"ApiKeyName": "X-API-Key", "ApiKeyValue": {"Ref": "PushKey"}}
    (target,) = push["PushRule"]["Properties"]["Targets"]
    assert target["DeadLetterConfig"] == {"Arn": {"Fn::GetAtt": ["Queue", "Arn"]}}
    for part in ("aws_cloudwatch_event_api_destination", 'variable "push_key"', "dead_letter_config"):
        assert part in good["terraform"]
    assert any(statement["Sid"] == "EndOwn" for statement in good["iam_policy"]["Statement"])

    # Trouble later on keeps the detectors at work; only another role or queue starts afresh.
    aws.revoke_role(number)
    for _ in range(2):
        worse = await api.ok("POST", path)
        assert (worse["ok"], worse["status"]) == (False, "degraded")
    aws.revoke_role(number, revoked=False)
    assert (await api.ok("POST", path))["status"] == "active"
    await api.ok("PATCH", f"/customers/{customer['id']}", json={"sqs_queue_url": known.queue_url + "-other"})
    moved = await api.ok("POST", path)
    assert (moved["ok"], moved["status"]) == (False, "pending")


async def test_a_role_that_works_without_its_external_id_is_refused(postgres_url, redis_url, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    number = account()

    async def trusting(reader, writer):
        """An STS whose role has no condition, and a queue and EC2 that say yes to everything."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0)
        body = (await reader.readexactly(length)).decode()
        if "AssumeRole" in body:
            answer = (
                "<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>ASIAX</AccessKeyId>"
                "<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
                "<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
            )
        elif "GetCallerIdentity" in body:
            answer = (
                f"<GetCallerIdentityResponse><GetCallerIdentityResult><Account>{number}</Account>"
                "</GetCallerIdentityResult></GetCallerIdentityResponse>"
            )
        elif "QueueUrl" in body:
            answer = '{"Attributes": {}}'
        else:
            answer = "<DescribeInstancesResponse><reservationSet/></DescribeInstancesResponse>"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n{answer}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(trusting, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with serving(settings_for(postgres_url, redis_url, AWS_ENDPOINT_URL=url)) as api:
        customer = await api.ok(
            "POST",
            "/customers",
            json={
                "company_name": "T",
                "email": "t@example.com",
                "aws_role_arn": ROLE.format(number),
                "sqs_queue_url": f"{url}/{number}/cloudoptim-events",
            },
        )
        verdict = await api.ok("POST", f"/customers/{customer['id']}/verify")
    server.close()
    await server.wait_closed()
    assert (verdict["ok"], verdict["status"]) == (False, "pending")
    failed = {check["name"]: check["remedy"] for check in verdict["checks"] if not check["ok"]}
    assert set(failed) == {"role_without_external_id", "role_with_another_external_id"}
    assert "sts:ExternalId" in failed["role_without_external_id"]


GOOD = {
    "event_policies": {"spot_interruption": "drain", "rebalance_recommendation": "pre_spin"},
    "on_demand_floor": {"nodes": 2, "ratio": 0.2},
    "allowed_instance_types": ["m5.large", "c7g.xlarge"],
    "allowed_zones": ["us-east-1a"],
    "price_cap_ratio": 0.8,
    "disruption_budget": {"ratio": 0.2, "nodes": 3},
    "disruption_windows": {
        "time_zone": "Europe/Berlin",
        "windows": [{"days": ["mon", "tue"], "start": "22:00:00", "end": "06:00:00"}],
    },
    "approval_required": True,
    "max_hourly_spend_usd": 12.5,
    "max_launches_per_hour": 10,
    "savings_fee": 0.2,
    "quiet_hours_before_spot": 4.0,
}
BAD = [
    ("event_policies", {"spot_interruption": "panic"}),
    ("event_policies", {"earthquake": "drain"}),
    ("on_demand_floor", {"nodes": -1}),
    ("on_demand_floor", {"count": 1}),
    ("on_demand_floor", 5),
    ("allowed_instance_types", ["m5"]),
    ("allowed_instance_types", "m5.large"),
    ("price_cap_ratio", 0),
    ("price_cap_ratio", 1.5),
    ("disruption_windows", {"time_zone": "Mars/Olympus", "windows": []}),
    ("disruption_windows", {"time_zone": "UTC", "windows": [{"days": [], "start": "1:00", "end": "2:00"}]}),
    ("disruption_windows", {"windows": [{"days": ["mon"], "start": "02:00", "end": "02:00"}]}),
    ("approval_required", "yes"),
    ("max_hourly_spend_usd", -1),
    ("savings_fee", 1.1),
    ("notification_channels", [{"name": "a", "url": "nonsense"}]),
    ("notification_channels", [{"name": "a", "url": "slack://x/y/z"}, {"name": "a", "url": "slack://x/y/z"}]),
    ("notification_channels", [{"name": "a", "url": "https://169.254.169.254/"}]),
    ("no_such_key", 1),
]


def test_every_key_of_the_registry_is_tried():
    assert set(GOOD) | {"notification_channels"} == set(registry.REGISTRY)
    for key in registry.REGISTRY.values():
        if not key.secret:
            assert key.validate(key.default) == key.default, key.name


@pytest.mark.parametrize("key", GOOD)
async def test_a_good_value_is_kept_and_taken_back(api, tenant, key):
    path = f"/customers/{tenant.customer_id}/config/{key}"
    default = await api.ok("GET", path)
    assert (default["configured"], default["value"]) == (False, registry.REGISTRY[key].default)
    stored = await api.ok("PUT", path, json={"value": GOOD[key]})
    assert (stored["configured"], stored["value"]) == (True, GOOD[key])
    assert (await api.ok("GET", path))["value"] == GOOD[key]
    await api.ok("DELETE", path)
    assert not (await api.ok("GET", path))["configured"]
    assert (await api.call("DELETE", path)).status_code == 404


@pytest.mark.parametrize(("key", "value"), BAD)
async def test_a_bad_value_is_named(api, tenant, key, value):
    answer = await api.call("PUT", f"/customers/{tenant.customer_id}/config/{key}", json={"value": value})
    assert answer.status_code == 422, answer.text
    assert key in answer.json()["detail"]


async def test_the_fee_is_set_by_the_platform(api, tenant):
    path = f"/customers/{tenant.customer_id}/config/savings_fee"
    assert (await api.call("PUT", path, tenant.admin_key, json={"value": 0})).status_code == 403


async def test_addresses_of_channels_are_secrets(api, tenant):
    secret = "slack://T0CANARY/B0CANARY/verysecretcanary1234"
    path = f"/customers/{tenant.customer_id}/config/notification_channels"
    stored = await api.ok("PUT", path, tenant.admin_key, json={"value": [{"name": "ops", "url": secret}]})
    assert stored["value"] == [{"name": "ops", "url": "…1234", "kinds": []}]
    everything = await api.ok("GET", f"/customers/{tenant.customer_id}/config", tenant.analyst_key)
    assert "canary1" not in json.dumps(everything)
    async with api.db.system() as conn:
        row = (
            await conn.execute(
                text("""SELECT k.config_value, c.data_key, (SELECT string_agg(detail::text, '') FROM audit_log a
                            WHERE a.customer_id = c.id) AS audit
                        FROM customer_config k JOIN customers c ON c.id = k.customer_id WHERE c.id = :id"""),
                {"id": tenant.customer_id},
            )
        ).one()
    assert "canary" not in json.dumps(row.config_value).replace("1234", "")
    assert "canary" not in row.audit
    (channel,) = open_channels(
        api.app.state.context.codec,
        customer_id=tenant.customer_id,
        data_key=bytes(row.data_key),
        value=row.config_value,
    )
    assert (channel.name, channel.url) == ("ops", secret)


async def test_off_boarding_destroys_secrets_and_ends_everything(api, tenant):
    await api.ok("PATCH", f"/clusters/{tenant.cluster_id}", tenant.admin_key, json={"k8s_token": "canary-token"})
    await api.ok("DELETE", f"/customers/{tenant.customer_id}")
    assert (await api.call("GET", "/clusters", tenant.admin_key)).status_code == 401
    assert (
        await api.call("GET", "/client/tasks", tenant.agent_key, params={"cluster_id": str(tenant.cluster_id)})
    ).status_code == 401
    assert (await api.call("GET", f"/customers/{tenant.customer_id}")).status_code == 404
    async with api.db.system() as conn:
        row = (
            await conn.execute(
                text("""SELECT m.data_key, m.aws_role_arn, c.k8s_token,
                               (SELECT count(*) FROM audit_log a WHERE a.customer_id = m.id) AS audit
                        FROM customers m JOIN clusters c ON c.customer_id = m.id WHERE m.id = :id"""),
                {"id": tenant.customer_id},
            )
        ).one()
    assert (row.data_key, row.aws_role_arn, row.k8s_token) == (None, None, None)
    assert row.audit > 0
    await api.app.state.context.redis.flushdb()


async def test_the_kill_switch_of_a_customer(api, tenant):
    path = f"/customers/{tenant.customer_id}/kill-switch"
    assert (await api.ok("POST", path, tenant.admin_key, json={"engaged": True, "reason": "drill"}))["kill_switch"]
    assert (await api.call("POST", path, tenant.admin_key, json={"engaged": True})).status_code == 422
