"""What Postgres forgets, and what it keeps."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import dagster as dg

from cloudoptim_pipelines.defs.maintenance.runs import forgettable_runs
from tests.pipelines.conftest import Tenant, World, add_tenant
from warehouse.postgres.models import AgentTask, InboxMessage, Interruption, SpotEventRecord, TaskReport, new_id


def test_messages_nobody_can_repeat_are_forgotten_and_quarantine_stays(world: World) -> None:
    tenant = add_tenant(world)
    world.insert(
        InboxMessage,
        *(
            {
                "customer_id": tenant.customer_id,
                "source": "sqs",
                "dedupe_key": f"{outcome}-{days}",
                "body_sha256": "x",
                "outcome": outcome,
                "received_at": world.now - timedelta(days=days),
            }
            for outcome in ("handled", "dropped", "quarantined", "waiting")
            for days in (29, 31)
        ),
    )
    world.run_unpartitioned(["inbox_retention"])
    left = {row["dedupe_key"] for row in world.sql("SELECT dedupe_key FROM inbox_messages")}
    assert left == {
        *("handled-29", "dropped-29", "quarantined-29", "waiting-29"),
        *("quarantined-31", "waiting-31"),
    }


def interruption(tenant: Tenant, when: datetime, number: int, **changes: Any) -> dict[str, Any]:
    """A row of interruptions."""
    return {
        "id": new_id(),
        "customer_id": tenant.customer_id,
        "cluster_id": tenant.cluster_id,
        "interruption_key": f"i-{number:017x}",
        "instance_id": f"i-{number:017x}",
        "region": "us-east-1",
        "kind": "spot_interruption",
        "instance_action": "terminate",
        "notice_at": when,
        "received_at": when,
        "deadline_at": when,
        "detected_by": ["sqs"],
        "state": "closed",
        "outcome": "handled",
        "closed_at": when,
        **changes,
    }


def test_old_tasks_and_events_go_when_they_are_over_and_the_lake_holds_them(world: World) -> None:
    world.now += timedelta(days=365)
    tenant = add_tenant(world)
    closed, still_open = (
        interruption(tenant, world.now - timedelta(days=401), 1),
        interruption(tenant, world.now - timedelta(days=401), 2, state="open", outcome=None, closed_at=None),
    )
    world.insert(Interruption, closed, still_open)
    tasks = [
        {
            "id": new_id(),
            "customer_id": tenant.customer_id,
            "cluster_id": tenant.cluster_id,
            "interruption_id": of["id"] if of else None,
            "task_type": "drain_node",
            "parameters": {},
            "dedupe_key": name,
            "state": state,
            "created_at": world.now - timedelta(days=days),
        }
        for name, state, days, of in [
            ("plain-old", "done", 91, None),
            ("plain-young", "done", 89, None),
            ("plain-waiting", "queued", 500, None),
            ("drain-old", "failed", 401, closed),
            ("drain-younger", "done", 399, closed),
            ("drain-of-open", "done", 401, still_open),
        ]
    ]
    world.insert(AgentTask, *tasks)
    report = {"lease_epoch": 1, "status": "done", "detail": {}, "applied": True, "report_id": new_id()}
    world.insert(TaskReport, {**report, "customer_id": tenant.customer_id, "task_id": tasks[0]["id"]})

    def event(name: str, days: int, of: dict[str, Any] | None) -> dict[str, Any]:
        when = world.now - timedelta(days=days)
        return {
            "id": new_id(),
            "customer_id": tenant.customer_id,
            "cluster_id": tenant.cluster_id,
            "event_type": "spot_interruption",
            "received_at": when,
            "occurred_at": when,
            "source": "sqs",
            "dedupe_key": name,
            "interruption_id": of["id"] if of else None,
            "payload": {},
        }

    world.insert(SpotEventRecord, event("old", 401, closed), event("young", 399, None), event("open", 401, still_open))
    for day in (401, 399):
        world.run(["events"], (world.now - timedelta(days=day)).date().isoformat())
    # Told after its day was written: the lake does not hold it yet.
    world.insert(SpotEventRecord, event("unheld", 401, None))
    world.run_unpartitioned(["record_retention"])
    assert {row["dedupe_key"] for row in world.sql("SELECT dedupe_key FROM agent_tasks")} == {
        "plain-young",
        "plain-waiting",
        "drain-younger",
        "drain-of-open",
    }
    assert {row["dedupe_key"] for row in world.sql("SELECT dedupe_key FROM spot_events")} == {"young", "open", "unheld"}
    assert world.sql("SELECT * FROM task_reports") == []


def test_dagsters_superseded_runs_may_go_and_what_its_page_and_schedules_read_stays() -> None:
    days = dg.StaticPartitionsDefinition(["1", "2"])

    @dg.asset(partitions_def=days)
    def written() -> None:
        """An asset with partitions."""

    with dg.DagsterInstance.ephemeral() as instance:
        first, second, other = (
            dg.materialize([written], instance=instance, partition_key=key).run_id for key in ("1", "1", "2")
        )
        (latest,) = (dg.materialize([written], instance=instance, partition_key="1").run_id,)
        later = datetime.now().astimezone() + timedelta(days=1)
        assert forgettable_runs(instance, later, 10) == [first, second]
        assert forgettable_runs(instance, later, 1) == [first]
        assert forgettable_runs(instance, later - timedelta(days=2), 10) == []
        for run_id in forgettable_runs(instance, later, 10):
            instance.delete_run(run_id)
        assert set(instance.get_materialized_partitions(dg.AssetKey("written"))) == {"1", "2"}
        assert {run.run_id for run in instance.get_runs()} == {other, latest}
