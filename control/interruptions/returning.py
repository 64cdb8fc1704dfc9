"""Back to Spot: On-Demand nodes that stand in for interrupted ones are replaced when the rule's evidence allows it.

``consider`` judges and writes the plan with its evidence and steps in one transaction; ``advance`` moves running plans,
one step a round, from what tables say. Launching is the launch branch's work, draining the agent's; ending the old
node is behind a tag read again and within the cluster's round of terminations. Every step is known by its key before
it is taken, so a worker that dies is followed by any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from control.agents.repository import NewTask, create_tasks
from control.gateways.aws import AwsError
from control.interruptions import launch_repository, market_repository, metrics, repository, return_repository
from control.interruptions.caps import Caps
from control.interruptions.choosing import Market, TypeFacts
from control.interruptions.freezing import limits_of
from control.interruptions.launch_repository import ClusterFacts
from control.interruptions.launching import Launcher
from control.interruptions.market_repository import SpotPrice
from control.interruptions.moving import apply_events
from control.interruptions.reconcilers import refusals_repository
from control.interruptions.reconcilers.ending import claim_endings, note_refused, terminate_ours
from control.interruptions.reconcilers.repository import Place, adopt_only
from control.interruptions.reconcilers.rounds import each_due
from control.interruptions.return_repository import Plan
from control.interruptions.return_rule import STEPS, Move, Progress, StandIn, Verdict, judge, next_move
from control.interruptions.states import Cancel
from warehouse.contracts import TaskType
from warehouse.postgres.models import new_id

log = structlog.get_logger(__name__)

# Quiet hours are counted in hours; a minute more is nothing.
CONSIDER_SECONDS = 60.0
LOOK_SECONDS = 10.0
ADVANCE_SECONDS = 2.0
LIMIT = 200
# For the launch of the Spot node, and for a gentle drain; nothing is forced for the sake of money.
LAUNCH_SECONDS = 900.0
DRAIN_LEAD = timedelta(minutes=15)
GRACE_SECONDS = 600
HOURS_A_MONTH = 730
_OVER = ("shutting-down", "terminated")


@dataclass(frozen=True, slots=True)
class Judged:
    """A stand-in with the rule's verdict on it."""

    row: Row
    node: StandIn
    verdict: Verdict


async def judged(
    conn: AsyncConnection, now: datetime, *, customer_id: UUID | None = None, region: str | None = None
) -> list[Judged]:
    """All stand-ins the connection's scope shows, each judged by what tables say now."""
    found = await return_repository.stand_ins(conn, customer_id=customer_id, region=region, limit=LIMIT)
    markets: dict[str, tuple[dict[str, TypeFacts], list[SpotPrice]]] = {}
    known: dict[tuple[UUID, str, UUID], tuple[Any, ...]] = {}
    result = []
    for row, node in found:
        if row.region not in markets:
            markets[row.region] = await market_repository.prices(conn, row.region)
        key = (row.customer_id, row.region, row.id)
        if key not in known:
            types, prices = markets[row.region]
            names = await market_repository.zone_names(conn, row.id)
            known[key] = (
                types,
                market_repository.spot_by_pool(prices, names),
                await return_repository.config(conn, row.customer_id),
                await return_repository.records(conn, row.customer_id, row.region),
                await market_repository.standings(conn, row.customer_id, row.region),
                await launch_repository.recent_launches(conn, row.customer_id, row.region, row.id),
            )
        types, spot, config, records, standings, recent = known[key]
        market = Market([row.availability_zone], types, spot, standings)
        caps = Caps.of(config, recent.launches_last_hour, recent.spend_last_hour_usd)
        verdict = judge(node, market, limits_of(config), records, caps, config, now)
        result.append(Judged(row, node, verdict))
    return result


async def consider(launcher: Launcher) -> int:
    """Begin the returns that the rule allows; returns how many."""
    runtime = launcher.runtime

    async def one(place: Place) -> int:
        async with runtime.db.system() as conn:
            # The evidence is read in the transaction that acts on it, one at a time per customer.
            await launch_repository.lock_launches(conn, place.customer_id)
            begun = 0
            for found in await judged(conn, runtime.db.now(), customer_id=place.customer_id, region=place.region):
                if found.verdict.go and await _begin(conn, found, runtime.db.now()):
                    begun += 1
        if begun:
            await runtime.bells.ring("launches")
            await runtime.bells.ring("outbox")
        return begun

    return await each_due(runtime, "returns", CONSIDER_SECONDS * 0.95, one)


async def _begin(conn: AsyncConnection, found: Judged, now: datetime) -> bool:
    pool, node, row = found.verdict.pool, found.node, found.row
    assert pool is not None
    if row.spare_plan_id is not None:
        return await _resume(conn, found)
    plan_id = new_id()
    target = {"instance_type": pool.instance_type, "availability_zone": pool.availability_zone}
    parameters = {"instance_id": node.instance_id, "node_name": row.node_name}
    saving = max((node.usd_per_hour or 0.0) - (pool.price_usd_per_hour or 0.0), 0.0)
    reason = f"{node.instance_id} back to Spot: {pool.instance_type} in {pool.availability_zone}"
    begun = await return_repository.begin(
        conn,
        {
            "id": plan_id,
            "customer_id": row.customer_id,
            "cluster_id": row.id,
            "key": f"return:{node.instance_id}:{now:%Y%m%dT%H%M%S}",
            "recommendations": [parameters | {"pool": target, "usd_per_hour": pool.price_usd_per_hour}],
            "steps": [
                {
                    "step_no": number,
                    "kind": kind,
                    "parameters": target if kind == "launch" else parameters,
                    "effect_key": f"plan:{plan_id}:step:{number}",
                    "state": "running" if kind == "launch" else "pending",
                }
                for number, kind in enumerate(STEPS, 1)
            ],
            "evidence": found.verdict.as_evidence(),
            "savings": round(saving * HOURS_A_MONTH, 6),
            "reason": reason,
            "intent_id": new_id(),
            "requirements": parameters
            | {
                "instance_type": node.instance_type,
                "availability_zone": node.availability_zone,
                "node_type": "spot",
                "pool": target,
            },
            "launch_seconds": LAUNCH_SECONDS,
        },
    )
    if begun:
        metrics.RETURNS.labels("begun").inc()
        log.info("return.begun", customer_id=str(row.customer_id), cluster_id=str(row.id), reason=reason)
        await repository.insert_outbox(
            conn,
            [_event("optimization.started", row.customer_id, plan_id, row.id, {})],
        )
    return begun


async def _resume(conn: AsyncConnection, found: Judged) -> bool:
    row = found.row
    reason = f"{found.node.instance_id} back to Spot, once more: to {row.spare_instance_id}, launched the first time"
    resumed = await return_repository.resume(
        conn, row.spare_plan_id, reason=reason, evidence=found.verdict.as_evidence()
    )
    if resumed:
        metrics.RETURNS.labels("resumed").inc()
        log.info("return.resumed", customer_id=str(row.customer_id), cluster_id=str(row.id), reason=reason)
        event = _event("optimization.started", row.customer_id, row.spare_plan_id, row.id, {})
        await repository.insert_outbox(conn, [event])
    return resumed


async def advance(launcher: Launcher) -> int:
    """Take the next step of every running return; returns how many moved."""
    runtime = launcher.runtime
    cancelled: list[UUID] = []
    terminating: list[Plan] = []
    bells: set[UUID] = set()
    moved = 0
    async with runtime.db.system() as conn:
        now = runtime.db.now()
        for plan in await return_repository.running(conn, limit=LIMIT):
            move = next_move(_progress(plan), now)
            if move.do == "wait":
                continue
            moved += 1
            if move.do == "cancel_launch":
                cancelled.append(plan.intent_id)
            if move.do == "drain":
                await return_repository.step(conn, plan.id, 1, "done")
                await return_repository.step(conn, plan.id, 2, "running")
                await create_tasks(conn, [_drain(plan, now)])
                bells.add(plan.cluster_id)
            if move.do == "terminate":
                await return_repository.step(conn, plan.id, 2, "done")
                await return_repository.step(conn, plan.id, 3, "running")
                terminating.append(plan)
            if move.end is not None:
                await _end(conn, plan, move)
                if move.uncordon:
                    await create_tasks(conn, [_uncordon(plan)])
                    bells.add(plan.cluster_id)
    for cluster_id in bells:
        await runtime.bells.ring("tasks", cluster_id)
    if cancelled:
        await apply_events(runtime, dict.fromkeys(cancelled, Cancel("the plan that wanted it ended")))
    for plan in terminating:
        try:
            await _terminate(launcher, plan)
        except AwsError as error:
            metrics.LOOP_FAILURES.labels("returns", error.code).inc()
            log.warning("return.not_terminated", plan_id=str(plan.id), code=error.code)
    if moved:
        await runtime.bells.ring("outbox")
    return moved


def _progress(plan: Plan) -> Progress:
    return Progress(
        launch=plan.launch,
        drain=plan.drain,
        drained_at=plan.drained_at,
        terminating=plan.terminating,
        old_gone=plan.old_gone,
        old_cordoned=plan.old_cordoned,
        new_ready=plan.new_ready,
        interruptions_in_flight=plan.in_flight,
        stopped=plan.stopped,
        stop_requested=plan.stop_requested_at is not None,
    )


async def _terminate(launcher: Launcher, plan: Plan) -> None:
    runtime = launcher.runtime
    async with runtime.db.system() as conn:
        if await adopt_only(conn, plan.customer_id):
            return
        if await refusals_repository.waiting(conn, plan.customer_id, [plan.instance_id]):
            return
        cluster = (await launch_repository.cluster_facts(conn, [plan.cluster_id]))[plan.cluster_id]
    try:
        await _end_old(launcher, plan, cluster)
    except AwsError as error:
        await note_refused(runtime, cluster, {plan.instance_id: error}, "return_to_spot")
        raise


async def _end_old(launcher: Launcher, plan: Plan, cluster: ClusterFacts) -> None:
    runtime = launcher.runtime
    credentials = await launcher.accounts.credentials(cluster)
    instances: Mapping[str, Any] = await launcher.accounts.describe(cluster.region, credentials, [plan.instance_id])
    # EC2 forgets an instance about an hour after its end, and its node went long before.
    forgotten = plan.old_gone and plan.instance_id not in instances
    if not forgotten and not _ending(instances.get(plan.instance_id)):
        if not await claim_endings(runtime, plan.cluster_id):
            return

        async def still(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> Sequence[str]:
            return instance_ids if await return_repository.may_end(conn, plan.id) else []

        ended = await terminate_ours(
            launcher, cluster, credentials, [plan.instance_id], reason="return_to_spot", most=1, still=still
        )
        instances = ended.instances
    if not forgotten and not _ending(instances.get(plan.instance_id)):
        return
    async with runtime.db.system() as conn:
        await return_repository.step(conn, plan.id, 3, "done")
        await _end(conn, plan, Move("end", f"{plan.instance_id} went back to Spot", "succeeded"))


def _ending(instance: Mapping[str, Any] | None) -> bool:
    return instance is not None and instance.get("State", {}).get("Name") in _OVER


async def _end(conn: AsyncConnection, plan: Plan, move: Move) -> None:
    assert move.end is not None
    reason = move.reason + (f"; {plan.launch_reason}" if plan.launch == "exhausted" and plan.launch_reason else "")
    await return_repository.finish(conn, plan, status=move.end, reason=reason)
    metrics.RETURNS.labels(move.end).inc()
    if move.end == "stuck":
        metrics.ALARMS.labels("return_stuck").inc()
    log.info("return.ended", plan_id=str(plan.id), customer_id=str(plan.customer_id), status=move.end, reason=reason)
    event = _event("optimization.completed", plan.customer_id, plan.id, plan.cluster_id, {"status": move.end})
    await repository.insert_outbox(conn, [event])


def _event(topic: str, customer_id: UUID, plan_id: UUID, cluster_id: UUID, more: Mapping[str, Any]) -> dict[str, Any]:
    payload = {"customer_id": customer_id, "cluster_id": cluster_id, "optimization_id": plan_id} | dict(more)
    return {"id": new_id(), "customer_id": customer_id, "topic": topic, "payload": payload}


def _drain(plan: Plan, now: datetime) -> NewTask:
    return NewTask(
        customer_id=plan.customer_id,
        cluster_id=plan.cluster_id,
        task_type=TaskType.DRAIN_NODE,
        parameters={
            "node_name": plan.node_name,
            "instance_id": plan.instance_id,
            "grace_seconds": GRACE_SECONDS,
            "force_at_deadline": False,
        },
        dedupe_key=plan.drain_key,
        deadline_at=now + DRAIN_LEAD,
    )


def _uncordon(plan: Plan) -> NewTask:
    return NewTask(
        customer_id=plan.customer_id,
        cluster_id=plan.cluster_id,
        task_type=TaskType.UNCORDON_NODE,
        parameters={"node_name": plan.node_name, "instance_id": plan.instance_id},
        dedupe_key=plan.drain_key.replace(":step:2", ":step:-2"),
    )
