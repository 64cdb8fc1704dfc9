"""/client/tasks over HTTP: long polls, leases, results."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import text as sql

from control.agents.repository import NewTask, create_tasks
from tests.control.api import Api, Tenant
from warehouse.contracts import TaskType


async def add(api: Api, tenant: Tenant, count: int = 1, *, ring: bool = True, **changes) -> list[UUID]:
    async with api.db.system() as conn:
        created = await create_tasks(
            conn,
            [
                NewTask(
                    customer_id=tenant.customer_id,
                    cluster_id=tenant.cluster_id,
                    task_type=TaskType.DRAIN_NODE,
                    parameters={"node_name": "n", "instance_id": "i-1234567890"},
                    dedupe_key=str(uuid4()),
                    **changes,
                )
                for _ in range(count)
            ],
        )
    if ring:
        await api.app.state.context.bells.ring("tasks", tenant.cluster_id)
    return created


async def poll(api: Api, tenant: Tenant, wait: float = 0, **params):
    params = {"cluster_id": str(tenant.cluster_id), "wait": wait} | params
    return (await api.ok("GET", "/client/tasks", tenant.agent_key, params=params))["tasks"]


def result(task: dict, status: str = "done", **changes) -> dict:
    return {"lease_epoch": task["lease_epoch"], "report_id": str(uuid4()), "status": status} | changes


async def test_tasks_are_for_agents_only(api, tenant):
    params = {"cluster_id": str(tenant.cluster_id)}
    assert (await api.call("GET", "/client/tasks", None, params=params)).status_code == 401
    assert (await api.call("GET", "/client/tasks", tenant.admin_key, params=params)).status_code == 403


async def test_a_waiting_agent_gets_a_new_task_at_once(api, tenant):
    await poll(api, tenant)
    waiting = asyncio.create_task(poll(api, tenant, wait=20))
    await asyncio.sleep(0.3)
    started = time.monotonic()
    (created,) = await add(api, tenant)
    (task,) = await waiting
    assert task["task_id"] == str(created)
    assert time.monotonic() - started < 1.0


async def test_a_lost_bell_costs_two_seconds_at_most(api, tenant):
    waiting = asyncio.create_task(poll(api, tenant, wait=20))
    await asyncio.sleep(0.3)
    started = time.monotonic()
    await add(api, tenant, ring=False)
    assert len(await waiting) == 1
    assert time.monotonic() - started < 3.5


async def test_a_poll_without_work_ends_in_time_and_empty(api, tenant):
    started = time.monotonic()
    assert await poll(api, tenant, wait=0.5) == []
    assert 0.4 < time.monotonic() - started < 2


async def test_an_agent_that_hung_up_is_leased_nothing(api, tenant):
    waiting = asyncio.create_task(poll(api, tenant, wait=20))
    await asyncio.sleep(0.3)
    waiting.cancel()
    await asyncio.sleep(0.2)
    await add(api, tenant)
    await asyncio.sleep(0.3)
    (task,) = await poll(api, tenant)
    assert task["lease_epoch"] == 1


async def test_the_cycle_of_a_task(api, tenant):
    await add(api, tenant, deadline_at=datetime.now(UTC) + timedelta(seconds=100))
    (task,) = await poll(api, tenant, understands="drain_nodes,cordon_node")
    path = f"/client/tasks/{task['task_id']}/result"
    running = await api.ok(
        "POST", path, tenant.agent_key, json=result(task, "running", detail={"progress": "cordoned"})
    )
    assert running["state"] == "leased"
    assert datetime.fromisoformat(running["lease_until"]) > datetime.now(UTC) + timedelta(seconds=10)
    assert running["deadline"] == task["deadline"]
    # A sharper notice came: whoever works on the task learns of it with the next answer.
    async with api.db.system() as conn:
        await conn.execute(sql("UPDATE agent_tasks SET deadline_at = deadline_at - interval '80 seconds'"))
    heard = await api.ok("POST", path, tenant.agent_key, json=result(task, "running"))
    sooner = datetime.fromisoformat(task["deadline"]) - timedelta(seconds=80)
    assert datetime.fromisoformat(heard["deadline"]) == sooner
    done = result(task, detail={"evicted": 3})
    first = await api.ok("POST", path, tenant.agent_key, json=done)
    again = await api.ok("POST", path, tenant.agent_key, json=done)
    ended = {"task_id": task["task_id"], "state": "done", "applied": True, "lease_until": None}
    assert first == again == ended | {"deadline": heard["deadline"]}


async def test_an_earlier_deadline_reaches_its_holder_through_the_open_poll_once(api, tenant):
    deadline = datetime.now(UTC) + timedelta(seconds=100)
    await add(api, tenant, deadline_at=deadline)
    (task,) = await poll(api, tenant)
    path = f"/client/tasks/{task['task_id']}/result"
    await api.ok("POST", path, tenant.agent_key, json=result(task, "running"))
    waiting = asyncio.create_task(poll(api, tenant, wait=20))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    async with api.db.system() as conn:
        await conn.execute(sql("UPDATE agent_tasks SET deadline_at = deadline_at - interval '80 seconds'"))
    started = time.monotonic()
    await api.app.state.context.bells.ring("tasks", tenant.cluster_id)
    (again,) = await waiting
    assert time.monotonic() - started < 1.0
    assert datetime.fromisoformat(again["deadline"]) == deadline - timedelta(seconds=80)
    assert (again["task_id"], again["lease_epoch"]) == (task["task_id"], task["lease_epoch"])
    assert await poll(api, tenant) == []


async def test_a_stale_lease_is_409_and_an_unknown_task_404(api, tenant, other):
    await add(api, tenant)
    (task,) = await poll(api, tenant)
    path = f"/client/tasks/{task['task_id']}/result"
    stale = await api.call("POST", path, tenant.agent_key, json=result(task, lease_epoch=7))
    assert stale.status_code == 409
    assert stale.json()["type"].endswith("stale_lease")
    unknown = await api.call("POST", f"/client/tasks/{uuid4()}/result", tenant.agent_key, json=result(task))
    foreign = await api.call("POST", path, other.agent_key, json=result(task))
    assert unknown.status_code == foreign.status_code == 404
    assert unknown.json()["detail"] == foreign.json()["detail"]


async def test_another_clusters_tasks_are_not_there(api, tenant, other):
    answer = await api.call("GET", "/client/tasks", tenant.agent_key, params={"cluster_id": str(other.cluster_id)})
    assert answer.status_code == 404


async def test_a_nul_in_a_report_is_refused(api, tenant):
    await add(api, tenant)
    (task,) = await poll(api, tenant)
    path = f"/client/tasks/{task['task_id']}/result"
    for text in ("a\x00b", "\ud800"):
        body = json.dumps(result(task, detail={"log": text}))
        answer = await api.call(
            "POST", path, tenant.agent_key, content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422, answer.text
    too_long = await api.call("POST", path, tenant.agent_key, json=result(task, detail={"log": "x" * 70_000}))
    assert too_long.status_code == 422


async def test_unknown_task_types_are_named(api, tenant):
    params = {"cluster_id": str(tenant.cluster_id), "understands": "drain_node,fly"}
    answer = await api.call("GET", "/client/tasks", tenant.agent_key, params=params)
    assert answer.status_code == 422
    assert "'fly'" in answer.json()["detail"]


async def test_asking_makes_a_pending_cluster_active(api, tenant):
    await api.call(
        "GET",
        "/client/tasks",
        tenant.agent_key,
        params={"cluster_id": str(tenant.cluster_id), "understands": "drain_node"},
        headers={"User-Agent": "cloudoptim-agent/1.2.3"},
    )
    cluster = await api.ok("GET", f"/clusters/{tenant.cluster_id}")
    assert (cluster["status"], cluster["agent_version"]) == ("active", "1.2.3")
    assert cluster["agent_understands"] == ["drain_node"]


async def test_ten_workers_do_every_task_once(api, tenant):
    """One lease, one applied end. Under load a lease that nobody reported on within a second is shown to the same key
    again, under the same epoch: that is no second lease."""
    await add(api, tenant, 120)
    leases: dict[str, set[int]] = {}
    ends: dict[str, int] = {}

    async def work() -> None:
        while tasks := await poll(api, tenant, limit=2):
            for task in tasks:
                leases.setdefault(task["task_id"], set()).add(task["lease_epoch"])
                path = f"/client/tasks/{task['task_id']}/result"
                answer = await api.ok("POST", path, tenant.agent_key, json=result(task))
                ends[task["task_id"]] = ends.get(task["task_id"], 0) + answer["applied"]

    await asyncio.gather(*(work() for _ in range(10)))
    assert len(leases) == 120
    assert all(epochs == {1} for epochs in leases.values())
    assert set(ends.values()) == {1}
