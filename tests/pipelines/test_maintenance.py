"""What Postgres forgets, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

from control.supervisor.dagster_home import SCHEMA, write_dagster_home
from control.supervisor.plan import dagster_storage_url
from tests.pipelines.conftest import ASSETS, QUIET, Tenant, World, add_tenant
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


@pytest.fixture
def dagster(world: World, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance as `cloudoptim up` has it: its tables in a schema of our database."""
    write_dagster_home(world.folder)
    monkeypatch.setenv("CLOUDOPTIM_DAGSTER_POSTGRES_URL", dagster_storage_url(database_url))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {SCHEMA}")
    with dg.DagsterInstance.from_config(str(world.folder / "dagster")) as instance:
        yield instance


def test_dagsters_superseded_runs_go_and_what_its_page_schedules_and_backfills_read_stays(
    world: World, dagster: dg.DagsterInstance
) -> None:
    days = dg.StaticPartitionsDefinition(["1", "2", "3"])

    @dg.asset(partitions_def=days)
    def written(context) -> None:
        """An asset with partitions."""
        if "fails" in context.run.tags:
            raise ValueError("told to fail")

    def run(key: str, **tags: str) -> str:
        done = dg.materialize(
            [written], instance=dagster, partition_key=key, tags=tags, raise_on_error=False, run_config=QUIET
        )
        return done.run_id

    @dg.job
    def another() -> None:
        """A job that a run of is under way."""

    def events(run_ids: Sequence[str]) -> int:
        with psycopg.connect(world.dsn) as connection:
            found = connection.execute(
                f"SELECT count(*) FROM {SCHEMA}.event_logs WHERE run_id = ANY(%s)", [list(run_ids)]
            ).fetchone()
        assert found is not None
        return found[0]

    def partitions() -> dict[str, list[str]]:
        """What Dagster's page shows of each partition."""
        key = dg.AssetKey("written")
        failed = dagster.event_log_storage.get_latest_asset_partition_materialization_attempts_without_materializations(
            key
        )
        return {
            "written": sorted(dagster.get_materialized_partitions(key)),
            "failed": sorted(
                name
                for name, (run_id, _) in failed.items()
                if (found := dagster.get_run_by_id(run_id)) and found.status == dg.DagsterRunStatus.FAILURE
            ),
        }

    under_way = dagster.create_run_for_job(another, status=dg.DagsterRunStatus.STARTED).run_id
    superseded = [run("1"), run("1", fails="yes"), run("3", fails="yes")]
    other = run("2")
    never_written = run("3", fails="yes")
    of_a_backfill = run("1", **{"dagster/backfill": "under-way"})
    latest = run("1")
    dagster.add_backfill(
        PartitionBackfill(
            backfill_id="under-way",
            status=BulkActionStatus.REQUESTED,
            from_failure=False,
            tags={},
            backfill_timestamp=datetime.now(UTC).timestamp(),
            asset_selection=[dg.AssetKey("written")],
            partition_names=["1"],
        )
    )
    shown = partitions()
    assert shown == {"written": ["1", "2"], "failed": ["3"]}

    def maintain(days_later: int) -> None:
        world.now = datetime.now(UTC) + timedelta(days=days_later)
        dg.materialize(
            [ASSETS["record_retention"]],
            instance=dagster,
            resources={"warehouse": world.warehouse()},
            run_config=QUIET,
        )

    before = events([*superseded, other])
    maintain(29)
    assert events([*superseded, other]) == before
    maintain(31)
    left = {found.run_id for found in dagster.get_runs()}
    assert left & {*superseded, under_way, other, never_written, of_a_backfill, latest} == {
        under_way, other, never_written, of_a_backfill, latest,
    }  # fmt: skip
    assert events(superseded) == 0
    assert all(events([kept]) for kept in (other, never_written, of_a_backfill, latest))
    assert partitions() == shown
