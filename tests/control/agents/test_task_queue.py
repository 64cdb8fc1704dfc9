"""The task queue: leases with epochs, fenced reports, sweeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from control.agents import repository
from control.agents.repository import NewTask
from warehouse.contracts import TaskResult, TaskStatus, TaskType
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database

ALL_TYPES = [kind.value for kind in TaskType]


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(postgres_url)
    yield database
    await database.close()


@pytest.fixture
async def cluster(db: Database) -> tuple[UUID, UUID]:
    """(customer_id, cluster_id) of a fresh cluster."""
    customer_id, cluster_id = new_id(), new_id()
    async with db.system() as conn:
        await conn.execute(
            text("INSERT INTO customers (id, company_name, email, external_id) VALUES (:id, 'Queue Ltd', 'q@x', :ext)"),
            {"id": customer_id, "ext": uuid4()},
        )
        await conn.execute(
            text("INSERT INTO clusters (id, customer_id, cluster_name, region) VALUES (:id, :c, 'main', 'us-east-1')"),
            {"id": cluster_id, "c": customer_id},
        )
    return customer_id, cluster_id


def new_task(cluster: tuple[UUID, UUID], key: str = "", **changes) -> NewTask:
    values = {
        "customer_id": cluster[0],
        "cluster_id": cluster[1],
        "task_type": TaskType.DRAIN_NODE,
        "parameters": {"node_name": "n1", "instance_id": "i-0123456789"},
        "dedupe_key": key or str(uuid4()),
    }
    return NewTask(**(values | changes))


async def create(db: Database, *tasks: NewTask) -> list[UUID]:
    async with db.system() as conn:
        return await repository.create_tasks(conn, tasks)


async def lease(db: Database, cluster: tuple[UUID, UUID], agent: str = "a1", limit: int = 10, understands=None):
    async with db.tenant(cluster[0]) as conn:
        return await repository.lease_tasks(
            conn, cluster_id=cluster[1], agent=agent, limit=limit, understands=understands or ALL_TYPES
        )


async def report(db: Database, cluster: tuple[UUID, UUID], task, status=TaskStatus.DONE, **changes):
    body = TaskResult(**({"lease_epoch": task.lease_epoch, "report_id": uuid4(), "status": status} | changes))
    async with db.tenant(cluster[0]) as conn:
        return await repository.record_report(conn, cluster_id=cluster[1], task_id=task.task_id, report=body)


async def end_lease(db: Database, task_id: UUID) -> None:
    async with db.system() as conn:
        await conn.execute(
            text("UPDATE agent_tasks SET lease_until = now() - interval '1 second' WHERE id = :id"), {"id": task_id}
        )


async def test_second_creation_with_the_same_key_changes_nothing(db, cluster):
    first = await create(db, new_task(cluster, "drain:1"), new_task(cluster, "drain:2"))
    second = await create(db, new_task(cluster, "drain:1"))
    assert len(first) == 2
    assert second == []
    assert len(await lease(db, cluster)) == 2


async def test_creation_and_end_are_told_through_the_outbox(db, cluster):
    (task_id,) = await create(db, new_task(cluster))
    (task,) = await lease(db, cluster)
    await report(db, cluster, task)
    async with db.tenant(cluster[0]) as conn:
        rows = (await conn.execute(text("SELECT topic, payload->>'task_id' FROM outbox ORDER BY created_at"))).all()
    assert [tuple(row) for row in rows] == [("task.created", str(task_id)), ("task.finished", str(task_id))]


async def test_earliest_deadline_comes_first_and_the_overdue_never(db, cluster):
    now = datetime.now(UTC)
    await create(
        db,
        new_task(cluster, "none"),
        new_task(cluster, "late", deadline_at=now + timedelta(seconds=100)),
        new_task(cluster, "soon", deadline_at=now + timedelta(seconds=50)),
        new_task(cluster, "over", deadline_at=now - timedelta(seconds=1)),
    )
    (first,) = await lease(db, cluster, limit=1)
    rest = await lease(db, cluster)
    assert abs((first.deadline - now).total_seconds() - 50) < 0.01
    assert [task.deadline is None for task in rest] == [False, True]


async def test_of_equal_deadlines_interruption_work_comes_first(db, cluster):
    deadline = datetime.now(UTC) + timedelta(seconds=100)
    await create(db, new_task(cluster, "plan", deadline_at=deadline))
    (drain,) = await create(db, new_task(cluster, "drain", deadline_at=deadline, priority=0))
    (first,) = await lease(db, cluster, limit=1)
    assert first.task_id == drain


async def test_two_agents_never_hold_one_task(db, cluster):
    await create(db, *(new_task(cluster) for _ in range(200)))
    batches = await asyncio.gather(*(lease(db, cluster, agent=f"a{n % 8}", limit=25) for n in range(8)))
    ids = [task.task_id for batch in batches for task in batch]
    assert len(ids) == len(set(ids)) == 200


async def test_a_type_the_agent_does_not_understand_stays(db, cluster):
    await create(db, new_task(cluster, task_type=TaskType.RESIZE_WORKLOAD))
    assert await lease(db, cluster, understands=["drain_node"]) == []
    assert len(await lease(db, cluster, understands=["resize_workload"])) == 1


async def test_own_unacknowledged_lease_comes_back_under_its_epoch(db, cluster):
    await create(db, new_task(cluster))
    (first,) = await lease(db, cluster)
    assert await lease(db, cluster) == [], "not in a tight loop"
    async with db.system() as conn:
        await conn.execute(
            text("UPDATE agent_tasks SET lease_until = lease_until - interval '2 seconds' WHERE id = :id"),
            {"id": first.task_id},
        )
    assert await lease(db, cluster, agent="other") == []
    (again,) = await lease(db, cluster)
    assert (again.task_id, again.lease_epoch) == (first.task_id, first.lease_epoch)
    await report(db, cluster, again, TaskStatus.RUNNING)
    async with db.system() as conn:
        await conn.execute(
            text("UPDATE agent_tasks SET lease_until = lease_until - interval '2 seconds' WHERE id = :id"),
            {"id": first.task_id},
        )
    assert await lease(db, cluster) == [], "acknowledged: the agent knows"


async def test_a_lost_lease_goes_to_another_and_fences_the_first(db, cluster):
    await create(db, new_task(cluster))
    (zombie,) = await lease(db, cluster, agent="zombie")
    await end_lease(db, zombie.task_id)
    (heir,) = await lease(db, cluster, agent="heir")
    assert heir.lease_epoch == zombie.lease_epoch + 1
    late = await report(db, cluster, zombie)
    assert (late.applied, late.stale, late.state) == (False, True, "leased")
    done = await report(db, cluster, heir)
    assert (done.applied, done.state) == (True, "done")
    async with db.tenant(cluster[0]) as conn:
        kept = (
            await conn.execute(
                text("SELECT applied FROM task_reports WHERE task_id = :id ORDER BY lease_epoch"), {"id": heir.task_id}
            )
        ).scalars()
        assert list(kept) == [False, True]


async def test_a_task_that_was_swept_back_is_its_holders_until_another_takes_it(db, cluster):
    kept, lost = await create(db, new_task(cluster, "kept"), new_task(cluster, "lost"))
    zombies = {task.task_id: task for task in await lease(db, cluster, agent="zombie")}
    for task_id in (kept, lost):
        await end_lease(db, task_id)
    async with db.system() as conn:
        moved = {task.task_id for task in await repository.requeue_expired_leases(conn)}
    assert {kept, lost} <= moved
    again = await report(db, cluster, zombies[kept], TaskStatus.RUNNING)
    assert (again.applied, again.state) == (True, "leased"), "nobody else began it"
    (heir,) = await lease(db, cluster, agent="heir")
    assert (heir.task_id, heir.lease_epoch) == (lost, zombies[lost].lease_epoch + 1)
    late = await report(db, cluster, zombies[lost])
    assert (late.applied, late.stale, late.state) == (False, True, "leased")


async def test_an_earlier_deadline_is_offered_to_the_holder_and_to_nobody_else(db, cluster):
    await create(db, new_task(cluster, deadline_at=datetime.now(UTC) + timedelta(seconds=100)))
    (held,) = await lease(db, cluster, agent="holder")
    await report(db, cluster, held, TaskStatus.RUNNING)
    async with db.system() as conn:
        await conn.execute(
            text("UPDATE agent_tasks SET deadline_at = deadline_at - interval '60 seconds' WHERE id = :id"),
            {"id": held.task_id},
        )
    assert await lease(db, cluster, agent="other") == []
    (again,) = await lease(db, cluster, agent="holder")
    assert (again.task_id, again.lease_epoch) == (held.task_id, held.lease_epoch)


async def test_running_extends_the_lease_and_marks_the_cordon(db, cluster):
    await create(db, new_task(cluster))
    (task,) = await lease(db, cluster)
    await end_lease(db, task.task_id)
    outcome = await report(db, cluster, task, TaskStatus.RUNNING, detail={"progress": "cordoned"})
    assert outcome.applied
    assert outcome.lease_until > datetime.now(UTC) + timedelta(seconds=10)
    async with db.tenant(cluster[0]) as conn:
        cordoned = await conn.execute(text("SELECT cordoned_at FROM agent_tasks WHERE id = :id"), {"id": task.task_id})
        assert cordoned.scalar_one() is not None


async def test_the_same_report_twice_is_one_report(db, cluster):
    await create(db, new_task(cluster))
    (task,) = await lease(db, cluster)
    report_id = uuid4()
    first = await report(db, cluster, task, report_id=report_id)
    second = await report(db, cluster, task, report_id=report_id)
    other_id = await report(db, cluster, task)
    contradiction = await report(db, cluster, task, TaskStatus.FAILED)
    assert (first.applied, first.stale) == (second.applied, second.stale) == (True, False)
    assert (other_id.applied, other_id.stale) == (False, False)
    assert (contradiction.applied, contradiction.stale) == (False, True)


async def test_sweeps_requeue_and_expire(db, cluster):
    now = datetime.now(UTC)
    await create(
        db,
        new_task(cluster, "open"),
        new_task(cluster, "alive"),
        new_task(cluster, "dead", deadline_at=now + timedelta(milliseconds=300)),
        new_task(cluster, "held", deadline_at=now + timedelta(milliseconds=300)),
    )
    tasks = {task.task_id: task for task in await lease(db, cluster)}
    async with db.system() as conn:
        rows = await conn.execute(
            text("SELECT dedupe_key, id FROM agent_tasks WHERE cluster_id = :c"), {"c": cluster[1]}
        )
        by_key = {row.dedupe_key: row.id for row in rows}
        await conn.execute(text("SELECT pg_sleep_until(:t)"), {"t": now + timedelta(milliseconds=350)})
    await end_lease(db, by_key["open"])
    await end_lease(db, by_key["dead"])
    async with db.system() as conn:
        requeued = {moved.task_id for moved in await repository.requeue_expired_leases(conn)}
        expired = {moved.task_id for moved in await repository.expire_overdue_tasks(conn)}
        told = await conn.execute(
            text(
                "SELECT payload ->> 'task_id' AS id FROM outbox "
                "WHERE customer_id = :c AND topic = 'task.finished' AND payload ->> 'state' = 'expired'"
            ),
            {"c": cluster[0]},
        )
        assert [row.id for row in told] == [str(by_key["dead"])]
    assert by_key["open"] in requeued
    assert by_key["dead"] in expired - requeued
    assert not {by_key["held"], by_key["alive"]} & (requeued | expired)
    assert (await report(db, cluster, tasks[by_key["held"]])).applied, "a holder that is alive may finish late"
    assert (await report(db, cluster, tasks[by_key["dead"]])).stale


@pytest.mark.parametrize(("switched", "of"), [("clusters", 1), ("customers", 0)])
async def test_a_stopped_cluster_is_given_interruption_work_and_what_is_harmless(db, cluster, switched, of):
    await create(db, new_task(cluster, "plan"))
    given = await create(
        db,
        new_task(cluster, "interruption", interruption_id=new_id()),
        new_task(cluster, "uncordon", task_type=TaskType.UNCORDON_NODE),
        new_task(cluster, "state", task_type=TaskType.COLLECT_STATE),
    )
    async with db.system() as conn:
        await conn.execute(text(f"UPDATE {switched} SET kill_switch = true WHERE id = :id"), {"id": cluster[of]})
    assert {task.task_id for task in await lease(db, cluster)} == set(given)


async def test_a_task_of_another_cluster_cannot_be_reported(db, cluster):
    await create(db, new_task(cluster))
    (task,) = await lease(db, cluster)
    body = TaskResult(lease_epoch=task.lease_epoch, report_id=uuid4(), status=TaskStatus.DONE)
    async with db.tenant(cluster[0]) as conn:
        assert await repository.record_report(conn, cluster_id=new_id(), task_id=task.task_id, report=body) is None
    async with db.tenant(new_id()) as conn:
        assert await repository.record_report(conn, cluster_id=cluster[1], task_id=task.task_id, report=body) is None
