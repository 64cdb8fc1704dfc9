"""One transaction per batch: whatever is delivered how often and in which order, there is one set of rows."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from control.agents.repository import lease_tasks
from control.interruptions.service import Received, accept_agent_events, ingest
from warehouse.contracts import EventKind, EventSource, InterruptionAction, SpotEvent
from warehouse.postgres.session import Database


def sqs(document: dict[str, Any] | str) -> Received:
    return Received(document if isinstance(document, str) else json.dumps(document), EventSource.SQS)


async def test_a_warning_becomes_a_drain_and_a_launch_in_one_transaction(db: Database, tenant) -> None:
    instance = await tenant.node()
    done = await ingest(db, await tenant.facts(), [sqs(tenant.warning(instance))])
    assert (done.new, done.handled, done.clusters) == (1, 1, {tenant.cluster_id})

    interruption = await tenant.row("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert (interruption.state, interruption.instance_id, interruption.detected_by) == ("open", instance, ["sqs"])
    assert interruption.deadline_at - interruption.notice_at == timedelta(seconds=120)
    history = await tenant.rows("SELECT * FROM interruption_history WHERE interruption_id = :id", id=interruption.id)
    assert [(row.version, row.event, row.state) for row in history] == [(1, "detected", "open")]
    intent = await tenant.row("SELECT * FROM launch_intents WHERE customer_id = :customer_id")
    assert (intent.interruption_id, intent.state) == (interruption.id, "planned")
    assert intent.requirements["instance_type"] == "m5.large"
    event = await tenant.row("SELECT * FROM spot_events WHERE customer_id = :customer_id")
    assert (event.interruption_id, event.action_taken, event.event_type) == (
        interruption.id,
        "drain",
        "spot_interruption",
    )
    topics = await tenant.rows("SELECT topic FROM outbox WHERE customer_id = :customer_id")
    assert {row.topic for row in topics} == {"spot.interruption.detected", "task.created"}

    async with db.tenant(tenant.customer_id) as conn:
        (task,) = await lease_tasks(conn, cluster_id=tenant.cluster_id, agent="a", limit=10, understands=["drain_node"])
    assert task.parameters["instance_id"] == instance
    assert task.parameters["node_name"] == f"node-{instance}"
    assert task.deadline == interruption.deadline_at


async def test_second_delivery_changes_nothing(db: Database, tenant) -> None:
    instance = await tenant.node()
    message = sqs(tenant.warning(instance))
    facts = await tenant.facts()
    await ingest(db, facts, [message])
    done = await ingest(db, facts, [message, message])
    assert (done.new, done.duplicates, done.clusters) == (0, 2, set())
    counts = await tenant.row("""
        SELECT (SELECT count(*) FROM interruptions WHERE customer_id = :customer_id) AS interruptions,
               (SELECT count(*) FROM agent_tasks WHERE customer_id = :customer_id) AS tasks,
               (SELECT count(*) FROM launch_intents WHERE customer_id = :customer_id) AS intents,
               (SELECT count(*) FROM spot_events WHERE customer_id = :customer_id) AS events,
               (SELECT receive_count FROM inbox_messages WHERE customer_id = :customer_id) AS received""")
    assert tuple(counts) == (1, 1, 1, 1, 3)


async def test_any_number_of_deliveries_to_three_consumers_make_one_set(db: Database, tenant) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    instances = [await tenant.node() for _ in range(40)]
    deliveries = [sqs(document) for document in map(tenant.warning, instances) for _ in range(rng.randint(1, 10))]
    rng.shuffle(deliveries)
    facts = await tenant.facts()

    async def consume(share: list[Received]) -> None:
        while share:
            size = rng.randint(1, 10)
            batch, share = share[:size], share[size:]
            await ingest(db, facts, batch)

    await asyncio.gather(*(consume(deliveries[start::3]) for start in range(3)))
    counts = await tenant.row("""
        SELECT (SELECT count(*) FROM interruptions WHERE customer_id = :customer_id) AS interruptions,
               (SELECT count(DISTINCT instance_id) FROM interruptions WHERE customer_id = :customer_id) AS instances,
               (SELECT count(*) FROM agent_tasks WHERE customer_id = :customer_id) AS tasks,
               (SELECT count(*) FROM launch_intents WHERE customer_id = :customer_id) AS intents,
               (SELECT count(*) FROM inbox_messages WHERE customer_id = :customer_id) AS inbox""")
    assert tuple(counts) == (40, 40, 40, 40, 40), f"seed {seed}"


async def test_four_signals_of_one_instance_in_any_order_are_one_interruption(db: Database, tenant) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    facts = await tenant.facts()
    for _ in range(6):
        instance = await tenant.node()
        agent = SpotEvent(
            event_type=EventKind.SPOT_INTERRUPTION,
            instance_id=instance,
            occurred_at=datetime.now(UTC),
            instance_action=InterruptionAction.TERMINATE,
        )
        signals = [
            sqs(tenant.warning(instance)),
            sqs(tenant.rebalance(instance)),
            sqs(tenant.state_change(instance, "shutting-down")),
            agent,
        ]
        rng.shuffle(signals)
        for signal in signals:
            if isinstance(signal, SpotEvent):
                await accept_agent_events(
                    db,
                    customer_id=tenant.customer_id,
                    cluster_id=tenant.cluster_id,
                    region=tenant.region,
                    events=[signal],
                )
            else:
                await ingest(db, facts, [signal])
        interruption = await tenant.row(
            "SELECT * FROM interruptions WHERE customer_id = :customer_id AND instance_id = :i", i=instance
        )
        assert set(interruption.detected_by) == {
            "sqs",
            "agent",
            "rebalance_recommendation",
            "instance_state_change",
        }, f"seed {seed}"
        assert interruption.kind == "spot_interruption"
        history = await tenant.rows(
            "SELECT version FROM interruption_history WHERE interruption_id = :id ORDER BY version", id=interruption.id
        )
        assert [row.version for row in history] == list(range(1, interruption.version + 1))
        tasks = await tenant.rows("SELECT * FROM agent_tasks WHERE interruption_id = :id", id=interruption.id)
        assert len(tasks) == 1
        events = await tenant.rows("SELECT * FROM spot_events WHERE interruption_id = :id", id=interruption.id)
        assert len(events) == 4


async def test_terminated_before_the_warning_drains_nothing(db: Database, tenant) -> None:
    instance = await tenant.node()
    facts = await tenant.facts()
    await ingest(db, facts, [sqs(tenant.state_change(instance, "terminated"))])
    await ingest(db, facts, [sqs(tenant.warning(instance))])
    assert await tenant.rows("SELECT id FROM agent_tasks WHERE customer_id = :customer_id") == []
    interruption = await tenant.row("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert interruption.instance_gone_at is not None
    node = await tenant.row("SELECT * FROM nodes WHERE instance_id = :i", i=instance)
    assert (node.status, node.terminated_at is not None) == ("terminated", True)


async def test_instance_of_another_tenant_is_quarantined_with_an_alarm(db: Database, tenant, other_tenant) -> None:
    theirs = await other_tenant.node()
    done = await ingest(db, await tenant.facts(), [sqs(tenant.warning(theirs))])
    assert (done.quarantined, done.clusters) == (1, set())
    row = await tenant.row("SELECT * FROM inbox_messages WHERE customer_id = :customer_id")
    assert row.reason.startswith("foreign_instance")
    assert json.loads(row.body)["detail"]["instance-id"] == theirs
    for table in ("interruptions", "agent_tasks", "spot_events"):
        assert await tenant.rows(f"SELECT 1 FROM {table} WHERE customer_id = :customer_id") == []


async def test_good_messages_are_handled_between_poison(db: Database, tenant) -> None:
    instance = await tenant.node()
    poison = [sqs(text) for text in ("", "null", "{", '{"a":1,"a":2}', "[" * 100_000, '"\\ud800"', "\x00")]
    done = await ingest(db, await tenant.facts(), [*poison, sqs(tenant.warning(instance))])
    assert (done.quarantined, done.handled) == (len(poison), 1)
    kept = await tenant.rows(
        "SELECT reason, body FROM inbox_messages WHERE outcome = 'quarantined' AND customer_id = :customer_id"
    )
    assert all(row.reason and row.body is not None for row in kept)


async def test_events_of_a_suspended_customer_are_dropped(db: Database, tenant) -> None:
    instance = await tenant.node()
    async with db.system() as conn:
        from sqlalchemy import text

        await conn.execute(text("UPDATE customers SET status = 'suspended' WHERE id = :id"), {"id": tenant.customer_id})
    done = await ingest(db, await tenant.facts(), [sqs(tenant.warning(instance))])
    assert (done.dropped, done.clusters) == (1, set())
