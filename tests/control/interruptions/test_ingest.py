"""One transaction per batch: whatever is delivered how often and in which order, there is one set of rows."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import event, text

from control.agents.repository import lease_tasks
from control.interruptions.parsing import Outcome
from control.interruptions.reconcilers.missed import ending
from control.interruptions.reconcilers.repository import Place
from control.interruptions.service import Received, ingest, ingest_outcomes
from control.interruptions.taking import accept_agent_events
from tests.control.interruptions.tenants import Tenant
from warehouse.contracts import AgentEvent, EventKind, EventSource, InterruptionAction
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database

FAR_AHEAD = datetime.now(UTC) + timedelta(days=7)


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


async def test_deliveries_that_arrive_together_are_counted_too(db: Database, tenant) -> None:
    instance = await tenant.node()
    message = sqs(tenant.warning(instance))
    facts = await tenant.facts()
    labels = {"source": "sqs", "outcome": "duplicate"}
    before = REGISTRY.get_sample_value("cloudoptim_intake_messages_total", labels) or 0
    counts = []
    for batch in ([message] * 3, [replace(message, receive_count=7)], [message] * 2):
        done = await ingest(db, facts, batch)
        assert (done.new, done.duplicates) == (1 - bool(counts), len(batch) - 1 + bool(counts))
        row = await tenant.row("SELECT receive_count FROM inbox_messages WHERE customer_id = :customer_id")
        counts.append(row.receive_count)
    # SQS counts its own deliveries: what it says may be more than we have seen.
    assert counts == [3, 7, 9]
    assert REGISTRY.get_sample_value("cloudoptim_intake_messages_total", labels) == before + 5


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


async def test_detectors_that_hear_of_an_instance_at_once_write_it_once_and_without_an_error(
    db: Database, tenant: Tenant
) -> None:
    """Both have read that there is nothing yet before either writes: the second gives way, and Postgres sees no error
    (its log is an operator's)."""
    facts = await tenant.facts()
    errors: list[str] = []
    event.listen(db.engine.sync_engine, "handle_error", lambda context: errors.append(str(context.original_exception)))

    async def at_once(*batches: list[Received]) -> None:
        async with db.system() as gate:
            # Taken by whoever is about to write, not by whoever reads.
            await gate.execute(text("RESET ROLE"))
            await gate.execute(text("LOCK TABLE inbox_messages IN SHARE ROW EXCLUSIVE MODE"))
            writers = [asyncio.create_task(ingest(db, facts, batch)) for batch in batches]
            waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'inbox_messages'::regclass AND NOT granted"
            while (await gate.execute(text(waiting))).scalar_one() < len(batches):
                pass
        await asyncio.gather(*writers)

    def pushed(document: dict[str, Any]) -> Received:
        return Received(json.dumps(document), EventSource.PUSH)

    one, two, three, stopped, told_twice = await tenant.nodes(5)
    unknown = "i-0aaaabbbbcccc0042"
    warning, maintained = tenant.warning(told_twice), maintenance(tenant, unknown, starts=FAR_AHEAD)
    await at_once([sqs(tenant.warning(one))], [pushed(tenant.warning(one))], [pushed(tenant.warning(one))])
    await at_once(
        [sqs(tenant.warning(two)), sqs(tenant.warning(three))],
        [pushed(tenant.warning(three)), pushed(tenant.warning(two))],
    )
    await at_once([sqs(warning)], [sqs(warning)])
    # One of an instance is under way, whatever its key.
    await at_once([sqs(tenant.warning(stopped))], [pushed(tenant.warning(stopped, "stop"))])
    await at_once([sqs(tenant.warning(unknown))], [pushed(maintained)])
    assert errors == []
    found = await tenant.rows("SELECT instance_id, state, version FROM interruptions WHERE customer_id = :customer_id")
    assert {row.instance_id for row in found} == {one, two, three, stopped, told_twice, unknown}
    assert len(found) == 6
    history = await tenant.rows("SELECT version FROM interruption_history WHERE customer_id = :customer_id")
    assert len(history) == sum(row.version for row in found)
    for table in ("agent_tasks", "launch_intents"):
        assert len(await tenant.rows(f"SELECT 1 FROM {table} WHERE customer_id = :customer_id")) == 5


async def test_four_signals_of_one_instance_in_all_24_orders_are_one_interruption(db: Database, tenant: Tenant) -> None:
    """Q-15: whoever is first, one interruption that names all four, one drain, one replacement."""
    facts = await tenant.facts()
    orders = list(itertools.permutations(("warning", "rebalance", "state", "agent")))
    instances = await tenant.nodes(len(orders))

    async def tell(instance: str, order: Sequence[str]) -> None:
        messages = {
            "warning": sqs(tenant.warning(instance)),
            "rebalance": sqs(tenant.rebalance(instance)),
            "state": sqs(tenant.state_change(instance, "shutting-down")),
        }
        agent = AgentEvent(
            event_type=EventKind.SPOT_INTERRUPTION,
            instance_id=instance,
            occurred_at=datetime.now(UTC),
            instance_action=InterruptionAction.TERMINATE,
        )
        for name in order:
            if name == "agent":
                await accept_agent_events(
                    db,
                    None,
                    customer_id=tenant.customer_id,
                    cluster_id=tenant.cluster_id,
                    region=tenant.region,
                    events=[agent],
                )
            else:
                await ingest(db, facts, [messages[name]])

    for instance, order in zip(instances, orders, strict=True):
        await tell(instance, order)
    rows = await tenant.rows(
        """SELECT i.instance_id, i.detected_by, i.kind, i.instance_action, i.state,
                  (SELECT count(*) FROM agent_tasks t WHERE t.interruption_id = i.id) AS drains,
                  (SELECT count(*) FROM launch_intents l WHERE l.interruption_id = i.id) AS launches
           FROM interruptions i WHERE i.customer_id = :customer_id"""
    )
    assert sorted(row.instance_id for row in rows) == sorted(instances)
    told = ["agent", "instance_state_change", "rebalance_recommendation", "sqs"]
    by_instance = {row.instance_id: row for row in rows}
    for instance, order in zip(instances, orders, strict=True):
        row = by_instance[instance]
        became = (sorted(row.detected_by), row.kind, row.instance_action, row.state, row.drains, row.launches)
        assert became == (told, "spot_interruption", "terminate", "open", 1, 1), order
    drained = await tenant.rows("SELECT parameters FROM agent_tasks WHERE customer_id = :customer_id")
    assert sorted(row.parameters["instance_id"] for row in drained) == sorted(instances)


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


async def test_an_on_demand_node_that_ends_was_ended_by_somebody_who_meant_to(db: Database, tenant: Tenant) -> None:
    node = await tenant.node(node_type="on-demand")
    await ingest(db, await tenant.facts(), [sqs(tenant.state_change(node, "shutting-down"))])
    for table in ("interruptions", "agent_tasks", "launch_intents"):
        assert await tenant.rows(f"SELECT 1 FROM {table} WHERE customer_id = :customer_id") == []
    # A warning about it is none the less one.
    await ingest(db, await tenant.facts(), [sqs(tenant.warning(node))])
    assert len(await tenant.rows("SELECT 1 FROM interruptions WHERE customer_id = :customer_id")) == 1


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


async def test_a_warning_brings_a_replacement_planned_for_maintenance_forward(db: Database, tenant) -> None:
    instance = await tenant.node()
    facts = await tenant.facts()
    starts = datetime.now(UTC) + timedelta(days=7)
    maintenance = tenant.event(
        "AWS Health Event",
        {
            "service": "EC2",
            "eventTypeCategory": "scheduledChange",
            "eventTypeCode": "AWS_EC2_SYSTEM_REBOOT_MAINTENANCE_SCHEDULED",
            "startTime": f"{starts:%a, %d %b %Y %H:%M:%S} GMT",
            "affectedEntities": [{"entityValue": instance}],
        },
        source="aws.health",
    )
    await ingest(db, facts, [sqs(maintenance)])
    sql = "SELECT * FROM launch_intents WHERE customer_id = :customer_id"
    assert (await tenant.row(sql)).next_action_at > datetime.now(UTC) + timedelta(days=6)
    done = await ingest(db, facts, [sqs(tenant.warning(instance))])
    assert done.launches
    assert (await tenant.row(sql)).next_action_at <= datetime.now(UTC)
    interruption = await tenant.row("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert interruption.kind == "spot_interruption"
    assert interruption.deadline_at - datetime.now(UTC) < timedelta(seconds=121)
    assert len(await tenant.rows("SELECT 1 FROM agent_tasks WHERE customer_id = :customer_id")) == 1


async def test_pages_of_one_health_event_are_acted_on_one_by_one_in_any_order(db: Database, tenant) -> None:
    facts = await tenant.facts()
    nodes = [await tenant.node() for _ in range(4)]

    def page(number: int, instances: list[str]) -> dict[str, Any]:
        return tenant.event(
            "AWS Health Event",
            {
                "service": "EC2",
                "eventTypeCategory": "scheduledChange",
                "eventTypeCode": "AWS_EC2_PERSISTENT_INSTANCE_RETIREMENT_SCHEDULED",
                "communicationId": "abc-1",
                "startTime": "Thu, 1 Nov 2035 22:00:00 GMT",
                "affectedEntities": [{"entityValue": instance} for instance in instances],
                "page": str(number),
                "totalPages": "2",
            },
            source="aws.health",
        )

    second, first = page(2, nodes[2:]), page(1, nodes[:2])
    assert (await ingest(db, facts, [sqs(second)])).handled == 1
    # At least once: the same page under another event id is no news.
    again = await ingest(db, facts, [sqs(first), sqs(page(2, nodes[2:]))])
    assert (again.handled, again.duplicates) == (1, 1)
    rows = await tenant.rows("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert {row.instance_id for row in rows} == set(nodes)
    # Failing hardware is not waited for, whatever the date says.
    intents = await tenant.rows("SELECT next_action_at FROM launch_intents WHERE customer_id = :customer_id")
    assert len(intents) == 4
    assert all(row.next_action_at <= datetime.now(UTC) for row in intents)


@pytest.mark.parametrize(
    ("code", "at_once"),
    [
        # EC2's types of scheduled events: hardware that fails, and work on the host.
        ("AWS_EC2_INSTANCE_RETIREMENT_SCHEDULED", True),
        ("AWS_EC2_PERSISTENT_INSTANCE_RETIREMENT_SCHEDULED", True),
        ("AWS_EC2_INSTANCE_STOP_SCHEDULED", True),
        ("AWS_EC2_INSTANCE_REBOOT_MAINTENANCE_SCHEDULED", False),
        ("AWS_EC2_SYSTEM_REBOOT_MAINTENANCE_SCHEDULED", False),
        ("AWS_EC2_INSTANCE_NETWORK_MAINTENANCE_SCHEDULED", False),
        ("AWS_EC2_INSTANCE_POWER_MAINTENANCE_SCHEDULED", False),
    ],
)
async def test_failing_hardware_is_replaced_at_once_and_maintenance_on_its_day(
    db: Database, tenant, code: str, at_once: bool
) -> None:
    detail = {
        "service": "EC2",
        "eventTypeCategory": "scheduledChange",
        "eventTypeCode": code,
        "startTime": "Thu, 1 Nov 2035 22:00:00 GMT",
        "affectedEntities": [{"entityValue": await tenant.node()}],
    }
    await ingest(db, await tenant.facts(), [sqs(tenant.event("AWS Health Event", detail, source="aws.health"))])
    intent = await tenant.row("SELECT next_action_at FROM launch_intents WHERE customer_id = :customer_id")
    on_its_day = datetime(2035, 11, 1, 21, 30, tzinfo=UTC)
    assert (intent.next_action_at <= datetime.now(UTC)) if at_once else (intent.next_action_at == on_its_day)


async def test_terminate_stop_and_hibernate_are_three_plans(db: Database, tenant) -> None:
    facts = await tenant.facts()
    plans = {}
    for action in ("terminate", "stop", "hibernate"):
        instance = await tenant.node()
        await ingest(db, facts, [sqs(tenant.warning(instance, action))])
        row = await tenant.row(
            "SELECT i.*, t.parameters FROM interruptions i JOIN agent_tasks t ON t.interruption_id = i.id "
            "WHERE i.customer_id = :customer_id AND i.instance_id = :i",
            i=instance,
        )
        lead = (row.deadline_at - row.notice_at).total_seconds()
        plans[action] = (lead, row.parameters["grace_seconds"] > 60, row.interruption_key == instance)
    assert plans == {
        # An instance is terminated once; it can be stopped and hibernated again.
        "terminate": (120.0, True, True),
        "stop": (120.0, True, False),
        # Hibernation begins at once: what can still be evicted is evicted without grace.
        "hibernate": (20.0, False, False),
    }


async def test_a_stop_that_comes_true_after_it_was_handled_is_no_second_interruption(db: Database, tenant) -> None:
    facts = await tenant.facts()
    for action, states in (("stop", ("stopping", "stopped")), ("hibernate", ("stopping", "stopped"))):
        instance = await tenant.node()
        noticed = (datetime.now(UTC) - timedelta(seconds=125)).strftime("%Y-%m-%dT%H:%M:%SZ")
        await ingest(db, facts, [sqs(tenant.warning(instance, action, time=noticed))])
        await tenant.rows(
            "UPDATE interruptions SET state = 'closed', outcome = 'handled', closed_at = now() "
            "WHERE instance_id = :i RETURNING 1",
            i=instance,
        )
        for state in states:
            await ingest(db, facts, [sqs(tenant.state_change(instance, state))])
        sql = "SELECT * FROM interruptions WHERE customer_id = :customer_id AND instance_id = :i"
        interruption = await tenant.row(sql, i=instance)
        assert set(interruption.detected_by) == {"sqs", "instance_state_change"}
        assert interruption.instance_gone_at is not None
        intents = await tenant.rows("SELECT 1 FROM launch_intents WHERE interruption_id = :id", id=interruption.id)
        assert len(intents) == 1

        # Next month it may be stopped again.
        await tenant.rows(
            "UPDATE interruptions SET notice_at = notice_at - interval '30 days' WHERE id = :id RETURNING 1",
            id=interruption.id,
        )
        await ingest(db, facts, [sqs(tenant.warning(instance, action))])
        assert len(await tenant.rows(sql, i=instance)) == 2


async def test_every_stop_that_only_the_poll_sees_is_an_interruption_and_seen_twice_it_is_one(
    db: Database, tenant: Tenant
) -> None:
    """An instance that EC2 stops, starts and stops again: each poll shows the same end for as long as it lasts."""
    instance = await tenant.node()
    place = Place(tenant.customer_id, tenant.region, tenant.cluster_id)

    async def poll(state: str, started: datetime, reason: str = "") -> None:
        shown = {"LaunchTime": started, "StateTransitionReason": reason}
        event = ending(place, instance, state, shown, db.now())
        outcomes: list[tuple[Received, Outcome]] = [(Received("{}", EventSource.POLL), event)]
        await ingest_outcomes(db, await tenant.facts(), outcomes, now=db.now())

    starts = [datetime.now(UTC) - timedelta(days=days) for days in (3, 2, 1)]
    for number, started in enumerate(starts, 1):
        for state in ("stopping", "stopping", "stopped", "stopped"):
            await poll(state, started)
        found = await tenant.rows("SELECT * FROM interruptions WHERE customer_id = :customer_id ORDER BY id")
        assert [row.instance_action for row in found] == ["stop"] * number
        assert all(row.instance_gone_at for row in found)
        drains = await tenant.rows("SELECT 1 FROM agent_tasks WHERE customer_id = :customer_id")
        assert len(drains) == number
        # A day goes by, and the instance is started again.
        await tenant.rows(
            "UPDATE interruptions SET state = 'closed', outcome = 'handled', closed_at = now() - interval '1 day', "
            "received_at = received_at - interval '1 day', notice_at = notice_at - interval '1 day', "
            "interruption_key = interruption_key || id WHERE customer_id = :customer_id AND state <> 'closed' "
            "RETURNING 1"
        )


def test_the_moment_of_an_end_is_the_one_ec2_tells() -> None:
    seen = datetime(2026, 1, 2, 3, 10, tzinfo=UTC)
    place = Place(new_id(), "us-east-1", new_id())
    moments = {
        "User initiated (2026-01-02 03:04:05 GMT)": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "Server.SpotInstanceShutdown: (2026-13-41 03:04:05 GMT)": seen,
        "User initiated (2026-01-02 03:14:05 GMT)": seen,
        "": seen,
    }
    for reason, at in moments.items():
        event = ending(place, "i-0123456789", "stopped", {"StateTransitionReason": reason}, seen)
        assert event.occurred_at == at, reason


def maintenance(tenant: Any, *instances: str, starts: datetime, code: str = "SYSTEM_MAINTENANCE") -> dict[str, Any]:
    detail = {
        "service": "EC2",
        "eventTypeCategory": "scheduledChange",
        "eventTypeCode": f"AWS_EC2_{code}_EVENT",
        "startTime": f"{starts:%a, %d %b %Y %H:%M:%S} GMT",
        "affectedEntities": [{"entityValue": instance, "status": "PENDING"} for instance in instances],
    }
    return tenant.event("AWS Health Event", detail, source="aws.health")


async def kept(tenant: Any, instance: str) -> None:
    """There was no replacement and the node stayed: the recommendation was closed some minutes ago."""
    await tenant.rows(
        "UPDATE interruptions SET state = 'closed', outcome = 'cancelled', closed_at = now() - interval '3 minutes', "
        "notice_at = now() - interval '9 minutes' WHERE instance_id = :i AND state = 'open' RETURNING 1",
        i=instance,
    )


async def test_a_recommendation_about_a_node_that_was_kept_is_a_new_one(db: Database, tenant) -> None:
    await tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    facts = await tenant.facts()
    instance = await tenant.node()
    first = sqs(tenant.rebalance(instance, time=(datetime.now(UTC) - timedelta(minutes=9)).isoformat()))
    await ingest(db, facts, [first])
    await kept(tenant, instance)
    sql = "SELECT * FROM interruptions WHERE customer_id = :customer_id ORDER BY id"

    # The same recommendation, by its message again and by the agent: nothing new.
    await ingest(db, facts, [first])
    echo = AgentEvent(
        event_type=EventKind.REBALANCE_RECOMMENDATION,
        instance_id=instance,
        occurred_at=datetime.now(UTC) - timedelta(minutes=9, seconds=2),
    )
    await accept_agent_events(
        db, None, customer_id=tenant.customer_id, cluster_id=tenant.cluster_id, region=tenant.region, events=[echo]
    )
    assert [row.state for row in await tenant.rows(sql)] == ["closed"]

    # EC2 recommends it again, and two consumers hear of it at once, in two words.
    now = datetime.now(UTC)
    words = [sqs(tenant.rebalance(instance, time=moment.isoformat())) for moment in (now - timedelta(minutes=1), now)]
    await asyncio.gather(*(ingest(db, facts, [word]) for word in words))
    assert [row.state for row in await tenant.rows(sql)] == ["closed", "open"]
    await ingest(db, facts, words)
    await kept(tenant, instance)
    await ingest(db, facts, [sqs(tenant.rebalance(instance))])
    rows = await tenant.rows(sql)
    assert [row.state for row in rows] == ["closed", "closed", "open"]
    assert len({row.interruption_key for row in rows}) == 3
    assert len(await tenant.rows("SELECT 1 FROM launch_intents WHERE customer_id = :customer_id")) == 3


async def test_a_sharper_word_has_its_own_notice_beside_the_first(db: Database, tenant) -> None:
    await tenant.config("event_policies", {"rebalance_recommendation": "drain"})
    facts = await tenant.facts()
    instance = await tenant.node()
    recommended = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=7)
    await ingest(db, facts, [sqs(tenant.rebalance(instance, time=recommended.isoformat()))])
    warned = datetime.now(UTC).replace(microsecond=0)
    sharpened = await ingest(db, facts, [sqs(tenant.warning(instance, time=warned.isoformat()))])
    row = await tenant.row("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert sharpened.clusters == {row.cluster_id}, "its agent is rung for: the drain ends earlier"
    assert (row.first_notice_at, row.notice_at) == (recommended, warned)
    assert row.deadline_at == warned + timedelta(seconds=120)
    task = await tenant.row("SELECT * FROM agent_tasks WHERE customer_id = :customer_id")
    assert task.deadline_at == row.deadline_at
    assert task.parameters["grace_seconds"] <= 100
    (*_, entry) = await tenant.rows(
        "SELECT * FROM interruption_history WHERE interruption_id = :id ORDER BY version", id=row.id
    )
    assert (entry.event, entry.detail["kind"]) == ("escalated", "spot_interruption")
    assert datetime.fromisoformat(entry.detail["deadline_at"]) == row.deadline_at


async def test_each_instance_of_a_page_keeps_its_own_entity_only(db: Database, tenant) -> None:
    instances = [await tenant.node() for _ in range(3)]
    starts = datetime.now(UTC) + timedelta(days=7)
    await ingest(db, await tenant.facts(), [sqs(maintenance(tenant, *instances, starts=starts))])
    rows = await tenant.rows("SELECT instance_id, payload FROM spot_events WHERE customer_id = :customer_id")
    assert sorted(row.instance_id for row in rows) == sorted(instances)
    for row in rows:
        assert row.payload["affectedEntities"] == [{"entityValue": row.instance_id, "status": "PENDING"}]
        assert row.payload["eventTypeCode"] == "AWS_EC2_SYSTEM_MAINTENANCE_EVENT"


async def test_a_recommendation_does_not_drain_for_a_maintenance_of_next_week(db: Database, tenant) -> None:
    await tenant.config("event_policies", {"rebalance_recommendation": "pre_spin"})
    facts = await tenant.facts()
    instance = await tenant.node()
    starts = datetime.now(UTC) + timedelta(days=7)
    await ingest(db, facts, [sqs(maintenance(tenant, instance, starts=starts))])
    await ingest(db, facts, [sqs(tenant.rebalance(instance))])
    row = await tenant.row("SELECT * FROM interruptions WHERE customer_id = :customer_id")
    assert (row.kind, row.drain_pending) == ("scheduled_change", True)
    assert row.deadline_at > starts, "a rumour moves no announced end"
    intent = await tenant.row("SELECT * FROM launch_intents WHERE customer_id = :customer_id")
    assert intent.next_action_at <= datetime.now(UTC), "but its replacement is launched now"


@pytest.mark.parametrize(("minutes", "launches"), [(0, 1), (50, 1), (70, 2)])
async def test_a_stop_of_a_node_that_was_drained_within_the_hour_launches_nothing_more(
    db: Database, tenant: Tenant, minutes: int, launches: int
) -> None:
    await tenant.config("event_policies", {"rebalance_recommendation": "drain"})
    facts = await tenant.facts()
    instance = await tenant.node()
    await ingest(db, facts, [sqs(tenant.rebalance(instance))])
    await tenant.rows(
        "UPDATE interruptions SET state = 'closed', outcome = 'handled', closed_at = now() - ago.ago, "
        "notice_at = notice_at - ago.ago, received_at = received_at - ago.ago, deadline_at = deadline_at - ago.ago "
        "FROM (SELECT make_interval(mins => :minutes) AS ago) ago WHERE instance_id = :i RETURNING 1",
        i=instance,
        minutes=minutes,
    )
    await ingest(db, facts, [sqs(tenant.warning(instance, "stop"))])
    assert len(await tenant.rows("SELECT 1 FROM launch_intents WHERE customer_id = :customer_id")) == launches
