"""What came too late: drains nobody came for, holders that went silent, notices from before an outage."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from control.agents import repository as tasks
from control.interruptions import closing, launch_repository
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import deadlines, ready
from control.interruptions.service import Received, ingest
from control.interruptions.states import LAUNCH_WINDOW
from tests.control.interruptions.harness import Stage
from tests.control.interruptions.tenants import Tenant
from warehouse.contracts import EventSource


async def _warn(tenant: Tenant, instance_id: str, **values: Any) -> None:
    message = Received(json.dumps(tenant.warning(instance_id, **values)), EventSource.SQS)
    await ingest(tenant.db, await tenant.facts(), [message])


async def test_a_drain_nobody_came_for_is_missed_told_and_the_node_still_replaced(
    stage: Stage, launcher: Launcher
) -> None:
    """C-23 by hand: the sweep ends the task, not the launch."""
    stage.agent_works = False
    (instance,) = await stage.launch_nodes()
    await _warn(stage.tenant, instance)
    for table in ("agent_tasks", "interruptions"):
        await stage.tenant.rows(f"UPDATE {table} SET deadline_at = now() - interval '1 second' RETURNING 1")
    assert await deadlines.run_once(launcher.runtime) == 1
    assert (await stage.tenant.row("SELECT state FROM agent_tasks")).state == "expired"
    assert await closing.close_ended(launcher.runtime) == 0, "its replacement is still to come"

    async def replaced() -> int:
        await launcher.plan_round()
        await launcher.finish_calls(10)
        return await ready.run_once(launcher.runtime)

    await stage.until(replaced, 10)
    assert await closing.close_ended(launcher.runtime) == 1
    (row,) = await stage.interruptions()
    assert (row.outcome, row.reason) == ("missed", "no agent drained the node before the deadline")
    told = await stage.tenant.row("SELECT payload FROM outbox WHERE topic = 'spot.interruption.closed'")
    replacement = stage.ours()[-1].instance_id
    assert (told.payload["outcome"], told.payload["replacement_instance_id"]) == ("missed", replacement)
    assert (await stage.tenant.row("SELECT replacement_instance_id AS i FROM spot_events")).i == replacement


async def test_a_task_whose_holder_went_silent_is_offered_again_and_its_agents_are_rung_for(
    stage: Stage, launcher: Launcher
) -> None:
    await stage.pause()
    node = await stage.tenant.node()
    await _warn(stage.tenant, node)
    async with stage.db.tenant(stage.tenant.customer_id) as conn:
        await tasks.lease_tasks(
            conn, cluster_id=stage.tenant.cluster_id, agent="silent", limit=1, understands=["drain_node"]
        )
    assert await deadlines.run_once(launcher.runtime) == 0, "its lease is alive"
    await stage.tenant.rows("UPDATE agent_tasks SET lease_until = now() RETURNING 1")
    async with stage.bells.listen("tasks", stage.tenant.cluster_id) as bell:
        assert await deadlines.run_once(launcher.runtime) == 1
        assert await bell.wait(5)
    assert (await stage.tenant.row("SELECT state FROM agent_tasks")).state == "queued"


@pytest.mark.parametrize(("seen_minutes_ago", "alive"), [(0, True), (12, False)])
async def test_a_notice_from_before_an_outage_is_judged_by_the_node_of_now(
    tenant: Tenant, seen_minutes_ago: int, alive: bool
) -> None:
    """C-24: a node that its agent sees has two minutes from now; one that is not seen any more is only written down."""
    now = datetime.now(UTC)
    node = await tenant.node(last_seen_at=now - timedelta(minutes=seen_minutes_ago))
    await _warn(tenant, node, time=(now - timedelta(minutes=20)).strftime("%Y-%m-%dT%H:%M:%SZ"))
    drains = await tenant.rows("SELECT deadline_at FROM agent_tasks WHERE customer_id = :customer_id")
    launches = await tenant.rows("SELECT 1 FROM launch_intents WHERE customer_id = :customer_id")
    assert (len(drains), len(launches)) == ((1, 1) if alive else (0, 0))
    for drain in drains:
        assert timedelta(seconds=100) < drain.deadline_at - now < timedelta(seconds=140)


async def test_replacements_of_nodes_that_still_have_time_are_launched_first(stage: Stage) -> None:
    """The shortest deadline before the others; those of nodes that are gone after all of them."""
    gone, later, soon = [await stage.tenant.node() for _ in range(3)]
    for node, seconds in ((gone, -300), (later, 100), (soon, 20)):
        await _warn(stage.tenant, node)
        await stage.tenant.rows(
            "UPDATE launch_intents SET deadline_at = now() + make_interval(secs => :seconds) "
            "WHERE requirements ->> 'instance_id' = :node RETURNING 1",
            seconds=LAUNCH_WINDOW.total_seconds() + seconds,
            node=node,
        )
    claimed = []
    for _ in range(3):
        async with stage.db.system() as conn:
            (intent,) = await launch_repository.claim_intents(conn, worker="w", limit=1)
        claimed.append(intent.requirements["instance_id"])
    assert claimed == [soon, later, gone]
