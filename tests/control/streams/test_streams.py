"""WS /client/stream and /admin/stream: who gets in, what is pushed, and when one is shown out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import websockets
from sqlalchemy import text
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.control.agents.test_tasks_api import add
from tests.control.api import batch, cluster_state, node_state
from warehouse.postgres.models import new_id


@asynccontextmanager
async def connected(api, path: str, key: str | None, first: dict[str, Any] | None, **options: Any):
    url = api.url.replace("http", "ws") + f"/api/v1{path}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with websockets.connect(url, additional_headers=headers, proxy=None, **options) as socket:
        if first is not None:
            await socket.send(json.dumps(first))
        yield socket


async def read(socket, kind: str, within: float = 5.0) -> dict[str, Any]:
    async with asyncio.timeout(within):
        while True:
            message = json.loads(await socket.recv())
            if message["type"] == kind:
                return message


HELLO = {"type": "hello"}


@pytest.mark.parametrize("path", ["/client/stream", "/admin/stream"])
async def test_strangers_are_refused(api, tenant, path):
    wrong_role = tenant.admin_key if path == "/client/stream" else tenant.agent_key
    for key in ("co_" + "0" * 16 + "." + "x" * 43, wrong_role):
        with pytest.raises(InvalidStatus) as refused:
            async with connected(api, path, key, None):
                pass
        assert refused.value.response.status_code == 403
    first = {"type": "hello" if path == "/client/stream" else "subscribe"}
    async with connected(api, path, None, first) as socket:
        assert (await read(socket, "error"))["code"] == "unauthenticated"
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd.code == 1008
    with pytest.raises(InvalidStatus):
        async with connected(api, path + f"?token={tenant.agent_key}", "wrong" * 10, None):
            pass
    await api.app.state.context.redis.flushdb()


async def test_a_silent_client_is_shown_out_after_five_seconds(api, tenant):
    started = time.monotonic()
    async with connected(api, "/client/stream", tenant.agent_key, None) as socket:
        assert (await read(socket, "error", within=8))["code"] == "invalid"
    assert 4 < time.monotonic() - started < 8


async def test_a_page_of_somebody_else_may_not_connect(api, tenant):
    for origin, allowed in (("https://evil.example", False), ("null", False), ("https://app.example.com", True)):
        try:
            async with connected(
                api, "/admin/stream", tenant.analyst_key, {"type": "subscribe"}, origin=origin
            ) as socket:
                await read(socket, "cost")
                assert allowed
        except InvalidStatus:
            assert not allowed


async def test_tasks_are_pushed_and_reports_acknowledged(api, tenant):
    async with connected(api, "/client/stream", tenant.agent_key, HELLO) as socket:
        await socket.send('{"type": "ping"}')
        await read(socket, "pong")
        started = time.monotonic()
        (task_id,) = await add(api, tenant)
        (task,) = (await read(socket, "tasks"))["tasks"]
        assert time.monotonic() - started < 1.5
        assert task["task_id"] == str(task_id)
        report = {"lease_epoch": task["lease_epoch"], "report_id": str(uuid4()), "status": "done"}
        message = {"type": "result", "task_id": task["task_id"], "report": report}
        for _ in range(2):
            await socket.send(json.dumps(message))
            ack = await read(socket, "ack")
            assert (ack["report_id"], ack["applied"], ack["stale"], ack["state"]) == (
                report["report_id"],
                True,
                False,
                "done",
            )
        stale = message | {"report": report | {"report_id": str(uuid4()), "lease_epoch": 99}}
        await socket.send(json.dumps(stale))
        assert (await read(socket, "ack"))["stale"]
        await socket.send(json.dumps(message | {"task_id": str(uuid4())}))
        error = await read(socket, "error")
        assert (error["code"], error["extra"]["report_id"]) == ("not_found", report["report_id"])


async def test_the_first_message_may_carry_the_key(api, tenant):
    await add(api, tenant)
    hello = HELLO | {"authorization": f"Bearer {tenant.agent_key}"}
    async with connected(api, "/client/stream", None, hello) as socket:
        assert len((await read(socket, "tasks"))["tasks"]) == 1


async def test_a_new_connection_resumes_what_the_last_one_left(api, tenant):
    held, lost = await add(api, tenant, 2)
    async with connected(api, "/client/stream", tenant.agent_key, HELLO) as socket:
        tasks = (await read(socket, "tasks"))["tasks"]
        assert len(tasks) == 2
    holding = [
        {"task_id": task["task_id"], "lease_epoch": task["lease_epoch"]}
        for task in tasks
        if task["task_id"] == str(held)
    ]
    async with connected(api, "/client/stream", tenant.agent_key, HELLO | {"holding": holding}) as socket:
        (again,) = (await read(socket, "tasks", within=1.5))["tasks"]
        assert (again["task_id"], again["lease_epoch"]) == (str(lost), 1)


async def test_an_earlier_deadline_is_pushed_to_its_holder_once_under_the_same_lease(api, tenant):
    deadline = datetime.now(UTC) + timedelta(seconds=100)
    await add(api, tenant, deadline_at=deadline)
    async with connected(api, "/client/stream", tenant.agent_key, HELLO) as socket:
        (task,) = (await read(socket, "tasks"))["tasks"]
        report = {"lease_epoch": task["lease_epoch"], "report_id": str(uuid4()), "status": "running"}
        await socket.send(json.dumps({"type": "result", "task_id": task["task_id"], "report": report}))
        assert datetime.fromisoformat((await read(socket, "ack"))["deadline"]) == deadline
        async with api.db.system() as conn:
            await conn.execute(text("UPDATE agent_tasks SET deadline_at = deadline_at - interval '80 seconds'"))
        await api.app.state.context.bells.ring("tasks", tenant.cluster_id)
        (again,) = (await read(socket, "tasks", within=1.0))["tasks"]
        assert (again["task_id"], again["lease_epoch"]) == (task["task_id"], task["lease_epoch"])
        assert datetime.fromisoformat(again["deadline"]) == deadline - timedelta(seconds=80)
        with pytest.raises(TimeoutError):
            await read(socket, "tasks", within=2.5)


@pytest.mark.parametrize("message", ["nonsense", "[]", '{"type": "fly"}', '{"type": "result"}', "[" * 100_000])
async def test_bad_messages_are_answered_and_the_socket_lives(api, tenant, message):
    async with connected(api, "/client/stream", tenant.agent_key, HELLO) as socket:
        await socket.send(message)
        assert (await read(socket, "error"))["code"] == "invalid"
        await socket.send('{"type": "ping"}')
        await read(socket, "pong")


async def test_a_frame_over_one_mebibyte_ends_the_socket(api, tenant):
    async with connected(api, "/client/stream", tenant.agent_key, HELLO) as socket:
        with contextlib.suppress(ConnectionClosed):
            await socket.send("x" * (16 << 20))
        with pytest.raises(ConnectionClosed):
            await read(socket, "never")


async def test_a_revoked_key_ends_its_open_sockets_within_five_seconds(api, tenant):
    async with connected(api, "/client/stream", tenant.agent_key, HELLO) as socket:
        await socket.send('{"type": "ping"}')
        await read(socket, "pong")
        async with api.db.system() as conn:
            await conn.execute(
                text("UPDATE api_keys SET revoked_at = now() WHERE prefix = :p"), {"p": tenant.agent_key.split(".")[0]}
            )
        started = time.monotonic()
        with pytest.raises(ConnectionClosed):
            await read(socket, "never", within=10)
        assert time.monotonic() - started < 5


async def test_one_key_opens_a_handful_of_sockets(api, tenant):
    async with asyncio.TaskGroup() as group:
        release = asyncio.Event()

        async def hold() -> None:
            async with connected(api, "/admin/stream", tenant.analyst_key, {"type": "subscribe"}) as socket:
                await read(socket, "cost")
                ready.append(1)
                if len(ready) == 8:
                    full.set()
                await release.wait()

        ready: list[int] = []
        full = asyncio.Event()
        for _ in range(8):
            group.create_task(hold())
        await full.wait()
        async with connected(api, "/admin/stream", tenant.analyst_key, {"type": "subscribe"}) as socket:
            assert (await read(socket, "error"))["code"] == "rate_limited"
        release.set()


async def test_dashboards_are_told_costs_and_events_of_their_own_customer(api, tenant, other):
    state = cluster_state(tenant.cluster_id, [node_state(1)])
    await api.ok("POST", "/client/metrics", tenant.agent_key, json=batch(tenant.cluster_id, state=state))
    async with connected(api, "/admin/stream", tenant.analyst_key, {"type": "subscribe"}) as socket:
        cost = await read(socket, "cost")
        assert [cluster["cluster_id"] for cluster in cost["clusters"]] == [str(tenant.cluster_id)]
        assert cost["clusters"][0]["nodes"] == 1
        async with api.db.system() as conn:
            for owner in (other, tenant):
                await conn.execute(
                    text("""INSERT INTO spot_events (id, customer_id, cluster_id, event_type, occurred_at, source,
                                dedupe_key, payload)
                            VALUES (:id, :customer, :cluster, 'spot_interruption', now(), 'sqs', :key, '{}')"""),
                    {"id": new_id(), "customer": owner.customer_id, "cluster": owner.cluster_id, "key": uuid4().hex},
                )
        events = (await read(socket, "events"))["events"]
        assert {event["customer_id"] for event in events} == {str(tenant.customer_id)}
    first = {"type": "subscribe", "customer_id": str(other.customer_id)}
    async with connected(api, "/admin/stream", tenant.analyst_key, first) as socket:
        assert (await read(socket, "error"))["code"] == "not_found"
