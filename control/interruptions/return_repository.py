"""SQL of returns to Spot: stand-ins, the records of pools, plans and their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import to_json
from control.interruptions.return_rule import PoolRecord, StandIn
from control.interruptions.wanted_repository import GOING, IN_FLIGHT

TYPE = "return_to_spot"
_STAND_INS = text(f"""
    WITH here AS (
        SELECT c.id, c.customer_id, c.region, c.kill_switch OR m.kill_switch AS stopped, c.last_seen_at,
               {IN_FLIGHT} AS in_flight,
               EXISTS (SELECT FROM optimization_history p WHERE p.customer_id = c.customer_id AND p.cluster_id = c.id
                       AND p.status IN ('running', 'compensating')) AS plan_running,
               (SELECT max(p.finished_at) FROM optimization_history p
                WHERE p.customer_id = c.customer_id AND p.cluster_id = c.id
                  AND p.status IN ('rolled_back', 'stuck', 'stopped')) AS last_failure_at,
               (SELECT count(*) FROM nodes n WHERE n.cluster_id = c.id AND n.terminated_at IS NULL) AS nodes,
               (SELECT count(*) FROM nodes n WHERE n.cluster_id = c.id AND n.terminated_at IS NULL
                  AND n.status <> 'ready') AS nodes_disturbed,
               (SELECT count(*) FROM nodes n WHERE n.cluster_id = c.id AND n.terminated_at IS NULL
                  AND n.node_type = 'on-demand') AS nodes_on_demand
        FROM clusters c JOIN customers m ON m.id = c.customer_id
        WHERE (CAST(:customer_id AS uuid) IS NULL OR c.customer_id = :customer_id)
          AND (CAST(:region AS text) IS NULL OR c.region = :region)
          AND c.status <> 'deleted' AND m.status IN ('active', 'degraded')
    )
    SELECT c.*, n.id AS node_id, n.node_name, n.instance_id, n.instance_type, n.availability_zone, n.cpu_cores,
           n.memory_bytes / 1073741824.0 AS memory_gib,
           CAST(a.price_usd_per_hour AS double precision) AS price_usd_per_hour,
           coalesce(a.ready_at, n.ready_at, n.created_at) AS ready_at,
           spare.plan_id AS spare_plan_id, spare.instance_id AS spare_instance_id, spare.status AS spare_status
    FROM here c
    JOIN nodes n ON n.cluster_id = c.id AND n.terminated_at IS NULL AND n.node_type = 'on-demand'
    JOIN launch_attempts a ON a.customer_id = n.customer_id AND a.instance_id = n.instance_id AND a.state = 'ready'
    JOIN launch_intents l ON l.id = a.intent_id AND l.requirements ->> 'node_type' = 'spot'
    -- The Spot node that an earlier return of this node launched and could not move to.
    LEFT JOIN LATERAL (
        SELECT p.id AS plan_id, s.instance_id, s.status
        FROM launch_intents i
        JOIN optimization_history p ON p.customer_id = i.customer_id AND p.id = i.plan_id
            AND p.optimization_type = '{TYPE}' AND p.status IN ('stuck', 'stopped', 'rolled_back')
        JOIN launch_attempts t ON t.intent_id = i.id
        JOIN nodes s ON s.cluster_id = n.cluster_id AND s.instance_id = t.instance_id AND s.terminated_at IS NULL
        WHERE i.cluster_id = n.cluster_id AND i.requirements ->> 'instance_id' = n.instance_id
        ORDER BY p.created_at DESC LIMIT 1
    ) spare ON true
    WHERE n.status = 'ready'
    ORDER BY n.instance_id LIMIT :limit
""")


async def stand_ins(
    conn: AsyncConnection, *, customer_id: UUID | None, region: str | None, limit: int
) -> list[tuple[Row, StandIn]]:
    """On-Demand nodes that we launched in the place of Spot nodes, with their clusters as they stand."""
    rows = await conn.execute(_STAND_INS, {"customer_id": customer_id, "region": region, "limit": limit})
    return [
        (
            row,
            StandIn(
                instance_id=row.instance_id,
                instance_type=row.instance_type,
                availability_zone=row.availability_zone,
                usd_per_hour=row.price_usd_per_hour,
                ready_at=row.ready_at,
                cpu_cores=row.cpu_cores,
                memory_gib=float(row.memory_gib),
                interruptions_in_flight=row.in_flight,
                plan_running=row.plan_running,
                last_failure_at=row.last_failure_at,
                stopped=row.stopped,
                agent_seen_at=row.last_seen_at,
                nodes=row.nodes,
                nodes_disturbed=row.nodes_disturbed,
                nodes_on_demand=row.nodes_on_demand,
                spare_instance_id=row.spare_instance_id,
                spare_ready=row.spare_status == "ready",
            ),
        )
        for row in rows
    ]


_RECORDS = text("""
    SELECT availability_zone, instance_type, max(troubled_at) AS troubled_at, max(seen_at) AS seen_at FROM (
        SELECT availability_zone, instance_type, updated_at AS troubled_at, CAST(NULL AS timestamptz) AS seen_at
        FROM pool_standings WHERE customer_id = :customer_id AND region = :region
        UNION ALL
        SELECT n.availability_zone, n.instance_type, NULL, max(n.last_seen_at)
        FROM nodes n JOIN clusters c ON c.id = n.cluster_id
        WHERE n.customer_id = :customer_id AND c.region = :region AND n.node_type = 'spot'
          AND n.terminated_at IS NULL AND n.status = 'ready'
        GROUP BY n.availability_zone, n.instance_type
        UNION ALL
        SELECT a.availability_zone, a.instance_type, NULL, max(a.launched_at)
        FROM launch_attempts a JOIN launch_batches b ON b.id = a.batch_id
        WHERE a.customer_id = :customer_id AND b.region = :region AND a.node_type = 'spot' AND a.instance_id IS NOT NULL
          AND a.created_at > now() - interval '1 day'
        GROUP BY a.availability_zone, a.instance_type
    ) found GROUP BY availability_zone, instance_type
""")


async def records(conn: AsyncConnection, customer_id: UUID, region: str) -> dict[tuple[str, str], PoolRecord]:
    """What pools did to a customer, by (zone, type)."""
    result = await conn.execute(_RECORDS, {"customer_id": customer_id, "region": region})
    return {(row.availability_zone, row.instance_type): PoolRecord(row.troubled_at, row.seen_at) for row in result}


_CONFIG = text("SELECT config_key, config_value FROM customer_config WHERE customer_id = :customer_id")


async def config(conn: AsyncConnection, customer_id: UUID) -> dict[str, Any]:
    """A customer's configuration as it is stored."""
    result = await conn.execute(_CONFIG, {"customer_id": customer_id})
    return {row.config_key: row.config_value for row in result}


# --- plans

_BEGIN = text("""
    WITH plan AS (
        INSERT INTO optimization_history (id, customer_id, cluster_id, optimization_type, idempotency_key,
            recommendations, execution_plan, safety_report, decided_by, estimated_savings, status, reason,
            requested_by, executed_at)
        VALUES (:id, :customer_id, :cluster_id, :type, :key, CAST(:recommendations AS jsonb), CAST(:steps AS jsonb),
            CAST(:evidence AS jsonb), 'rule', :savings, 'running', :reason, 'cloudoptim', now())
        ON CONFLICT DO NOTHING RETURNING id, customer_id, cluster_id
    ), steps AS (
        INSERT INTO plan_steps (customer_id, plan_id, step_no, kind, parameters, effect_key, state, started_at)
        SELECT plan.customer_id, plan.id, s.step_no, s.kind, s.parameters, s.effect_key, s.state,
               CASE WHEN s.state = 'running' THEN now() END
        FROM plan, jsonb_to_recordset(CAST(:steps AS jsonb))
            AS s (step_no integer, kind text, parameters jsonb, effect_key text, state text)
    ), intent AS (
        INSERT INTO launch_intents (id, customer_id, cluster_id, plan_id, step_no, requirements, state, deadline_at)
        SELECT :intent_id, plan.customer_id, plan.cluster_id, plan.id, 1, CAST(:requirements AS jsonb), 'planned',
               now() + make_interval(secs => :launch_seconds)
        FROM plan
    ), history AS (
        INSERT INTO plan_history (customer_id, plan_id, version, event, status, detail)
        SELECT customer_id, id, 1, 'begun', 'running', jsonb_build_object('reason', CAST(:reason AS text)) FROM plan
    )
    SELECT id FROM plan
""")
# The Spot node is there already: its launch is done, and the drain is tried again under a key of its own.
_RESUME = text("""
    WITH plan AS (
        UPDATE optimization_history p SET status = 'running', reason = :reason, finished_at = NULL,
            stop_requested_at = NULL, safety_report = CAST(:evidence AS jsonb), version = p.version + 1
        WHERE p.id = :plan_id AND p.status IN ('stuck', 'stopped', 'rolled_back')
          AND NOT EXISTS (SELECT FROM optimization_history o WHERE o.customer_id = p.customer_id
                          AND o.cluster_id = p.cluster_id AND o.status IN ('running', 'compensating'))
        RETURNING p.customer_id, p.id, p.version
    ), steps AS (
        UPDATE plan_steps s SET state = CASE s.kind WHEN 'launch' THEN 'done' ELSE 'pending' END,
            started_at = CASE s.kind WHEN 'launch' THEN s.started_at END,
            finished_at = CASE s.kind WHEN 'launch' THEN coalesce(s.finished_at, now()) END,
            effect_key = CASE s.kind WHEN 'drain' THEN 'plan:' || plan.id || ':step:2:try:' || plan.version
                                     ELSE s.effect_key END,
            version = s.version + 1
        FROM plan WHERE s.plan_id = plan.id
    ), history AS (
        INSERT INTO plan_history (customer_id, plan_id, version, event, status, detail)
        SELECT customer_id, id, version, 'resumed', 'running', jsonb_build_object('reason', CAST(:reason AS text))
        FROM plan
    )
    SELECT id FROM plan
""")


async def resume(conn: AsyncConnection, plan_id: UUID, *, reason: str, evidence: Sequence[Mapping[str, Any]]) -> bool:
    """Go on with a return that could not drain its node, with the Spot node it launched then; False when another plan
    runs in the cluster, or it is not over."""
    values = {"plan_id": plan_id, "reason": reason, "evidence": to_json(evidence)}
    return (await conn.execute(_RESUME, values)).one_or_none() is not None


async def begin(conn: AsyncConnection, plan: Mapping[str, Any]) -> bool:
    """Write a plan with its steps and its launch; False when one runs in the cluster already."""
    values = dict(plan) | {
        name: to_json(plan[name]) for name in ("recommendations", "steps", "evidence", "requirements")
    }
    return (await conn.execute(_BEGIN, values | {"type": TYPE})).one_or_none() is not None


@dataclass(frozen=True, slots=True)
class Plan:
    """A running return with everything its next move depends on; locked."""

    id: UUID
    customer_id: UUID
    cluster_id: UUID
    region: str
    instance_id: str
    node_name: str
    intent_id: UUID
    launch: str
    launch_reason: str | None
    drain_key: str
    drain: str | None
    drained_at: datetime | None
    terminating: bool
    old_gone: bool
    old_cordoned: bool
    new_ready: bool
    in_flight: int
    stopped: bool
    stop_requested_at: datetime | None


_RUNNING = text(f"""
    SELECT p.id, p.customer_id, p.cluster_id, c.region, l.requirements ->> 'instance_id' AS instance_id,
           l.requirements ->> 'node_name' AS node_name, l.id AS intent_id, l.state AS launch, l.reason AS launch_reason,
           d.effect_key AS drain_key, t.state AS drain, t.finished_at AS drained_at, s.state = 'running' AS terminating,
           o.id IS NULL OR o.terminated_at IS NOT NULL AS old_gone,
           coalesce(o.status = 'cordoned', false) AS old_cordoned,
           coalesce(n.status = 'ready' AND n.terminated_at IS NULL AND NOT {GOING}, false) AS new_ready,
           {IN_FLIGHT} AS in_flight, c.kill_switch OR m.kill_switch AS stopped, p.stop_requested_at
    FROM optimization_history p
    JOIN clusters c ON c.id = p.cluster_id
    JOIN customers m ON m.id = p.customer_id
    JOIN launch_intents l ON l.customer_id = p.customer_id AND l.plan_id = p.id
    JOIN plan_steps s ON s.plan_id = p.id AND s.kind = 'terminate'
    JOIN plan_steps d ON d.plan_id = p.id AND d.kind = 'drain'
    LEFT JOIN agent_tasks t ON t.customer_id = p.customer_id AND t.cluster_id = p.cluster_id
        AND t.dedupe_key = d.effect_key
    LEFT JOIN nodes o ON o.cluster_id = p.cluster_id AND o.instance_id = l.requirements ->> 'instance_id'
    LEFT JOIN LATERAL (
        SELECT instance_id FROM launch_attempts a WHERE a.intent_id = l.id ORDER BY attempt_no DESC LIMIT 1
    ) a ON true
    LEFT JOIN nodes n ON n.cluster_id = p.cluster_id AND n.instance_id = a.instance_id
    WHERE p.status = 'running' AND p.optimization_type = '{TYPE}'
    ORDER BY p.id LIMIT :limit
    FOR UPDATE OF p SKIP LOCKED
""")


async def running(conn: AsyncConnection, *, limit: int) -> list[Plan]:
    """Running returns that nobody else is moving."""
    return [Plan(**row._mapping) for row in await conn.execute(_RUNNING, {"limit": limit})]


_MAY_END = text(f"""
    SELECT EXISTS (
        SELECT FROM optimization_history p
        JOIN clusters c ON c.id = p.cluster_id
        JOIN customers m ON m.id = p.customer_id
        JOIN plan_steps s ON s.plan_id = p.id AND s.kind = 'terminate' AND s.state = 'running'
        WHERE p.id = :plan_id AND p.status = 'running' AND NOT (c.kill_switch OR m.kill_switch) AND {IN_FLIGHT} = 0)
""")


async def may_end(conn: AsyncConnection, plan_id: UUID) -> bool:
    """Whether a plan may end its old node now: it is at that step, nothing is in flight and no kill switch is on."""
    return bool((await conn.execute(_MAY_END, {"plan_id": plan_id})).scalar_one())


_STEP = text("""
    WITH moved AS (
        UPDATE plan_steps SET state = :state, version = version + 1,
            started_at = CASE WHEN :state = 'running' THEN coalesce(started_at, now()) ELSE started_at END,
            finished_at = CASE WHEN :state IN ('done', 'failed', 'skipped') THEN now() ELSE finished_at END
        WHERE plan_id = :plan_id AND step_no = :step_no AND state <> :state
        RETURNING plan_id, kind, state
    ), plan AS (
        UPDATE optimization_history p SET version = p.version + 1 FROM moved WHERE p.id = moved.plan_id
        RETURNING p.customer_id, p.id, p.version, p.status, moved.kind, moved.state
    )
    INSERT INTO plan_history (customer_id, plan_id, version, event, status, detail)
    SELECT customer_id, id, version, kind || '_' || state, status, '{}' FROM plan
""")
_FINISH = text("""
    WITH plan AS (
        UPDATE optimization_history SET status = :status, reason = :reason, finished_at = now(), version = version + 1
        WHERE id = :plan_id AND status = 'running' RETURNING customer_id, id, version, status
    ), steps AS (
        UPDATE plan_steps s SET state = CASE WHEN s.state = 'running' THEN 'failed' ELSE 'skipped' END,
            finished_at = now(), version = s.version + 1
        FROM plan WHERE s.plan_id = plan.id AND s.state IN ('pending', 'running')
    )
    INSERT INTO plan_history (customer_id, plan_id, version, event, status, detail)
    SELECT customer_id, id, version, 'ended', status, jsonb_build_object('reason', CAST(:reason AS text)) FROM plan
""")


async def step(conn: AsyncConnection, plan_id: UUID, step_no: int, state: str) -> None:
    """Move one step of a locked plan."""
    await conn.execute(_STEP, {"plan_id": plan_id, "step_no": step_no, "state": state})


async def finish(conn: AsyncConnection, plan: Plan, *, status: str, reason: str) -> None:
    """End a plan: what was under way has failed, what was to come is skipped."""
    await conn.execute(_FINISH, {"plan_id": plan.id, "status": status, "reason": reason})


_PLANS = text("""
    SELECT p.id, p.customer_id, p.cluster_id, p.status, p.reason, p.decided_by, p.safety_report, p.estimated_savings,
           p.created_at, p.finished_at, l.requirements ->> 'instance_id' AS instance_id,
           l.requirements #>> '{pool,instance_type}' AS spot_instance_type,
           l.requirements #>> '{pool,availability_zone}' AS spot_availability_zone,
           (SELECT jsonb_agg(jsonb_build_object('step_no', s.step_no, 'kind', s.kind, 'state', s.state,
                'started_at', s.started_at, 'finished_at', s.finished_at) ORDER BY s.step_no)
            FROM plan_steps s WHERE s.plan_id = p.id) AS steps,
           (SELECT coalesce(jsonb_agg(jsonb_build_object('version', h.version, 'at', h.at, 'event', h.event,
                'state', h.status, 'detail', h.detail) ORDER BY h.version), '[]')
            FROM plan_history h WHERE h.plan_id = p.id) AS history,
           (SELECT a.instance_id FROM launch_attempts a WHERE a.intent_id = l.id ORDER BY attempt_no DESC LIMIT 1)
               AS spot_instance_id
    FROM optimization_history p JOIN launch_intents l ON l.customer_id = p.customer_id AND l.plan_id = p.id
    WHERE p.optimization_type = :type AND (CAST(:customer_id AS uuid) IS NULL OR p.customer_id = :customer_id)
    ORDER BY p.created_at DESC, p.id LIMIT :limit
""")


async def plans(conn: AsyncConnection, *, customer_id: UUID | None, limit: int) -> Sequence[Row]:
    """Returns, newest first, with their evidence and steps."""
    return (await conn.execute(_PLANS, {"type": TYPE, "customer_id": customer_id, "limit": limit})).all()
