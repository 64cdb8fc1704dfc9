"""/clusters: registration, secrets, nodes with prices, events, cost, the kill switch."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

import pytest
from sqlalchemy import text

from tests.control.api import batch, cluster_state, node_state

CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"


async def test_anonymous_callers_see_no_clusters(api):
    assert (await api.call("GET", "/clusters", None)).status_code == 401


async def test_a_token_is_stored_encrypted_and_never_shown(api, tenant):
    body = {
        "cluster_name": f"c-{uuid4().hex[:6]}",
        "region": "eu-west-1",
        "k8s_api_endpoint": "https://8.8.8.8:6443",
        "k8s_ca": CA,
        "k8s_token": "canary-k8s-token",
    }
    answer = await api.call("POST", "/clusters", tenant.admin_key, json=body)
    assert answer.status_code == 201
    created = answer.json()
    assert created["has_k8s_token"]
    assert "canary" not in answer.text
    assert answer.headers["cache-control"] == "no-store"
    async with api.db.system() as conn:
        row = (
            await conn.execute(
                text("""SELECT c.id, c.k8s_token, m.data_key FROM clusters c JOIN customers m ON m.id = c.customer_id
                        WHERE c.id = :id"""),
                {"id": created["id"]},
            )
        ).one()
    assert b"canary" not in bytes(row.k8s_token)
    opened = api.app.state.context.codec.decrypt(
        bytes(row.k8s_token),
        data_key=bytes(row.data_key),
        customer_id=tenant.customer_id,
        table="clusters",
        column="k8s_token",
        row=row.id,
    )
    assert opened == "canary-k8s-token"


@pytest.mark.parametrize(
    "extra",
    [
        {"kubeconfig": "apiVersion: v1\nusers: [{user: {exec: {command: sh}}}]"},
        {"k8s_ca": "/etc/passwd"},
        {"insecure_skip_tls_verify": True},
        {"status": "active"},
        {"node_count": 5},
        {"region": "moon-1"},
        {"cluster_name": "a\nb"},
        {"cluster_name": ""},
    ],
)
async def test_only_endpoint_ca_and_token_are_taken(api, tenant, extra):
    body = {"cluster_name": "x", "region": "us-east-1"} | extra
    assert (await api.call("POST", "/clusters", tenant.admin_key, json=body)).status_code == 422


async def test_names_are_unique_within_a_customer_and_free_after_deletion(api, tenant, other):
    body = {"cluster_name": "main", "region": "us-east-1"}
    taken = await api.call("POST", "/clusters", tenant.admin_key, json=body)
    assert taken.status_code == 409
    assert "cluster_name" in taken.json()["detail"]
    await api.ok("DELETE", f"/clusters/{tenant.cluster_id}", tenant.admin_key)
    assert (await api.call("GET", f"/clusters/{tenant.cluster_id}", tenant.admin_key)).status_code == 404
    assert (await api.call("POST", "/clusters", tenant.admin_key, json=body)).status_code == 201
    gone = await api.call("GET", "/client/tasks", tenant.agent_key, params={"cluster_id": str(tenant.cluster_id)})
    assert gone.status_code == 401
    await api.app.state.context.redis.flushdb()


async def test_lists_are_paged(api, tenant):
    for number in range(3):
        await api.ok("POST", "/clusters", tenant.admin_key, json={"cluster_name": f"c{number}", "region": "us-east-1"})
    names, after = [], None
    while True:
        page = await api.ok(
            "GET", "/clusters", tenant.analyst_key, params={"limit": 2} | ({"after": after} if after else {})
        )
        names += [cluster["cluster_name"] for cluster in page["clusters"]]
        after = page["next"]
        if after is None:
            break
    assert names == ["main", "c0", "c1", "c2"]


async def prices(api, instance_type: str) -> None:
    async with api.db.system() as conn:
        await conn.execute(
            text("""INSERT INTO on_demand_price
                        (region, instance_type, product, price_usd_per_hour, effective_at, source)
                    VALUES ('us-east-1', :t, 'Linux/UNIX', 0.1, now(), 'test')"""),
            {"t": instance_type},
        )
        await conn.execute(
            text("""INSERT INTO spot_price_current (region, zone_id, instance_type, product, availability_zone,
                        price_usd_per_hour, effective_at, source)
                    VALUES ('us-east-1', 'use1-az1', :t, 'Linux/UNIX', 'us-east-1a', 0.03, now(), 'test')"""),
            {"t": instance_type},
        )


async def test_cost_now_is_the_live_nodes_at_the_newest_prices(api, tenant):
    kind = f"t{uuid4().hex[:6]}.large"
    await prices(api, kind)
    state = cluster_state(
        tenant.cluster_id,
        [
            node_state(1, instance_type=kind),
            node_state(2, instance_type=kind, node_type="on-demand"),
            node_state(3, instance_type="unknown.large"),
        ],
    )
    await api.ok("POST", "/client/metrics", tenant.agent_key, json=batch(tenant.cluster_id, state=state))
    cost = await api.ok("GET", f"/clusters/{tenant.cluster_id}/cost", tenant.analyst_key)
    now = cost["now"]
    assert (now["nodes"], now["priced_nodes"], now["spot_nodes"]) == (3, 2, 2)
    assert now["actual_usd_per_hour"] == pytest.approx(0.13)
    assert now["on_demand_usd_per_hour"] == pytest.approx(0.2)
    assert now["savings_ratio"] == pytest.approx(0.35)
    assert (cost["hours"], cost["lake_release_id"]) == ([], None)
    nodes = (await api.ok("GET", f"/clusters/{tenant.cluster_id}/nodes", tenant.analyst_key))["nodes"]
    assert [node["price_usd_per_hour"] for node in nodes] == [0.03, 0.1, None]


async def test_a_node_is_priced_by_its_zones_id_not_by_a_name_that_differs_between_accounts(api, tenant):
    kind = f"t{uuid4().hex[:6]}.large"
    await prices(api, kind)
    async with api.db.system() as conn:
        # A newer price of another zone, which our account knows by the name the customer's account gives to use1-az1.
        await conn.execute(
            text("""INSERT INTO spot_price_current (region, zone_id, instance_type, product, availability_zone,
                        price_usd_per_hour, effective_at, source)
                    VALUES ('us-east-1', 'use1-az4', :t, 'Linux/UNIX', :zone, 0.09, now() + interval '1 s', 'test')"""),
            {"t": kind, "zone": node_state(1)["availability_zone"]},
        )
    node = node_state(1, instance_type=kind, zone_id="use1-az1")
    state = cluster_state(tenant.cluster_id, [node])
    await api.ok("POST", "/client/metrics", tenant.agent_key, json=batch(tenant.cluster_id, state=state))
    nodes = (await api.ok("GET", f"/clusters/{tenant.cluster_id}/nodes", tenant.analyst_key))["nodes"]
    assert [node["price_usd_per_hour"] for node in nodes] == [0.03]


async def test_events_are_listed_newest_first_and_paged(api, tenant):
    state = cluster_state(tenant.cluster_id, [node_state(number) for number in range(3)])
    await api.ok("POST", "/client/metrics", tenant.agent_key, json=batch(tenant.cluster_id, state=state))
    for number in range(3):
        event = {
            "event_type": "rebalance_recommendation",
            "instance_id": f"i-{number:017x}",
            "occurred_at": datetime.now(UTC).isoformat(),
        }
        body = {"cluster_id": str(tenant.cluster_id), "events": [event]}
        answer = await api.ok("POST", "/client/events", tenant.agent_key, json=body)
        assert (answer["accepted"], answer["duplicate"]) == (1, 0)
        again = await api.ok("POST", "/client/events", tenant.agent_key, json=body)
        assert (again["accepted"], again["duplicate"]) == (0, 1)
    path = f"/clusters/{tenant.cluster_id}/events"
    page = await api.ok("GET", path, tenant.analyst_key, params={"limit": 2})
    rest = await api.ok("GET", path, tenant.analyst_key, params={"before": page["next"]})
    found = [event["instance_id"] for event in (*page["events"], *rest["events"])]
    assert found == [f"i-{number:017x}" for number in (2, 1, 0)]
    assert {event["source"] for event in page["events"]} == {"agent"}


async def test_the_kill_switch_is_set_with_a_reason(api, tenant):
    path = f"/clusters/{tenant.cluster_id}/kill-switch"
    engaged = await api.ok("POST", path, tenant.admin_key, json={"engaged": True, "reason": "drill"})
    assert engaged["kill_switch"]
    assert (await api.call("POST", path, tenant.analyst_key, json={"engaged": True, "reason": "x"})).status_code == 403
    async with api.db.tenant(tenant.customer_id) as conn:
        detail = (
            await conn.execute(text("SELECT detail FROM audit_log WHERE action = 'cluster.kill_switch'"))
        ).scalar_one()
    assert detail == {"engaged": True, "reason": "drill"}


async def test_the_state_of_a_silent_cluster_is_empty(api, tenant):
    state = await api.ok("GET", f"/clusters/{tenant.cluster_id}/state", tenant.analyst_key)
    assert (state["state"], state["age_seconds"], state["status"]) == (None, None, "pending")
