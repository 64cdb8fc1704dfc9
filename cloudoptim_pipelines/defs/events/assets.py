"""What happened: received events and interruptions, from Postgres to the lake."""

from typing import Any

import dagster as dg
import polars as pl
from sqlalchemy import text

from cloudoptim_pipelines.coverage import partition_locks
from cloudoptim_pipelines.merging import merge
from cloudoptim_pipelines.partitions import DAY, by_day, day_start, days_of
from cloudoptim_pipelines.policies import OWNERS, RETRY, SINGLE_RUN
from cloudoptim_pipelines.resources import Warehouse
from warehouse.lake.store import PartitionWrite

TIME = pl.Datetime("us", "UTC")
_SHARED: dict[str, Any] = {
    "partitions_def": by_day,
    "backfill_policy": SINGLE_RUN,
    "retry_policy": RETRY,
    "group_name": "events",
    "owners": OWNERS,
    "kinds": {"postgres", "deltalake"},
    "tags": {"domain": "events"},
}

EVENT_COLUMNS: dict[str, Any] = {
    "ts": TIME,
    "event_id": pl.String,
    "customer_id": pl.String,
    "cluster_id": pl.String,
    "event_type": pl.String,
    "instance_id": pl.String,
    "region": pl.String,
    "occurred_at": TIME,
    "received_from": pl.String,
    "action_taken": pl.String,
    "payload": pl.String,
    "source": pl.String,
}
_EVENTS = """
    SELECT e.received_at, e.id::text, e.customer_id::text, e.cluster_id::text, e.event_type, e.instance_id,
           coalesce(c.region, e.payload ->> 'region'), e.occurred_at, e.source, e.action_taken, e.payload::text,
           'observed'
    FROM spot_events e LEFT JOIN clusters c ON c.id = e.cluster_id
    WHERE e.received_at >= :start AND e.received_at < :end
    ORDER BY e.id
"""

INTERRUPTION_COLUMNS: dict[str, Any] = {
    "ts": TIME,
    "customer_id": pl.String,
    "cluster_id": pl.String,
    "interruption_id": pl.String,
    "instance_id": pl.String,
    "node_name": pl.String,
    "zone_id": pl.String,
    "availability_zone": pl.String,
    "instance_type": pl.String,
    "region": pl.String,
    "kind": pl.String,
    "deadline_at": TIME,
    "task_created_at": TIME,
    "cordoned_at": TIME,
    "drained_at": TIME,
    "replacement_ready_at": TIME,
    "closed_at": TIME,
    "ended_at": TIME,
    "replacement_instance_id": pl.String,
    "replacement_launched_at": TIME,
    "state": pl.String,
    "outcome": pl.String,
    "lifecycle": pl.String,
    "source": pl.String,
}
# The drain that ended first and the attempt that lived are the ones that handled it. The replacement costs from the
# creation of its node, or from its launch where the node never joined.
_INTERRUPTIONS = """
    SELECT i.received_at, i.customer_id::text, i.cluster_id::text, i.id::text, i.instance_id, n.node_name,
           coalesce(n.zone_id, 'unknown'), coalesce(i.availability_zone, n.availability_zone),
           coalesce(i.instance_type, n.instance_type, 'unknown'), i.region, i.kind, i.deadline_at,
           t.created_at, t.cordoned_at, t.finished_at, a.ready_at, i.closed_at,
           least(n.terminated_at, i.instance_gone_at), a.instance_id, coalesce(r.created_at, a.launched_at),
           i.state, i.outcome, n.node_type, 'observed'
    FROM interruptions i
    LEFT JOIN nodes n ON n.customer_id = i.customer_id AND n.id = i.node_id
    LEFT JOIN LATERAL (
        SELECT created_at, cordoned_at, CASE WHEN state = 'done' THEN finished_at END AS finished_at FROM agent_tasks
        WHERE agent_tasks.interruption_id = i.id AND agent_tasks.customer_id = i.customer_id
          AND task_type IN ('drain_node', 'drain_nodes')
        ORDER BY (state = 'done') DESC, created_at LIMIT 1
    ) t ON true
    LEFT JOIN LATERAL (
        SELECT la.instance_id, la.ready_at, la.launched_at
        FROM launch_intents li JOIN launch_attempts la ON la.intent_id = li.id AND la.customer_id = li.customer_id
        WHERE li.customer_id = i.customer_id AND li.interruption_id = i.id AND la.instance_id IS NOT NULL
        ORDER BY (la.ready_at IS NOT NULL) DESC, la.attempt_no DESC LIMIT 1
    ) a ON true
    LEFT JOIN nodes r ON r.customer_id = i.customer_id AND r.instance_id = a.instance_id
    WHERE i.received_at >= :start AND i.received_at < :end AND i.cluster_id IS NOT NULL
    ORDER BY i.id
"""


def _replace(
    context: dg.AssetExecutionContext, warehouse: Warehouse, table: str, query: str, schema: dict[str, Any], key: str
) -> dg.MaterializeResult:
    """Replace the run's days with what Postgres knows now; rows Postgres no longer has are kept."""
    reader = warehouse.reader
    rows = 0
    for days in days_of(context.partition_keys):
        with partition_locks(warehouse.database, table, [day.isoformat() for day in days.days()]):
            with warehouse.database.system() as connection:
                found = connection.execute(
                    text(query), {"start": day_start(days.first), "end": day_start(days.last) + DAY}
                ).all()
            fresh = pl.DataFrame([tuple(row) for row in found], schema=schema, orient="row")
            existing = reader.pin().frame(
                f"SELECT * EXCLUDE (day) FROM {table} WHERE day BETWEEN $first AND $last",
                {"first": days.first, "last": days.last},
                all_customers=True,
            )
            frame = merge(existing, fresh, [key])
            warehouse.publish([PartitionWrite(table, {"day": days.days()}, frame)], context.run.run_id)
        rows += frame.height
    return dg.MaterializeResult(metadata={"dagster/partition_row_count": rows})


@dg.asset(**_SHARED)
def events(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Every distinct event received, from any source, with what was done about it."""
    return _replace(context, warehouse, "events", _EVENTS, EVENT_COLUMNS, "event_id")


@dg.asset(**_SHARED)
def interruptions(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Every interruption from its notice to its end, with its replacement."""
    return _replace(context, warehouse, "interruptions", _INTERRUPTIONS, INTERRUPTION_COLUMNS, "interruption_id")
