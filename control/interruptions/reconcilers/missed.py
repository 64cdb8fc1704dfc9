"""The second detector: what the queue did not bring is found by asking EC2 (R-07).

Spot notices are best effort, so a perfect reader of the queue still misses some. EC2 marks an interrupted instance's
Spot request before it takes the instance, and shows instances that are ending. The same answers teach us how the
cluster's nodes are launched, while they still live.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from control.gateways.aws import AwsError, Credentials
from control.interruptions import intake_repository, launch_repository, metrics
from control.interruptions import repository as events_repository
from control.interruptions.intake import explain
from control.interruptions.launching import Launcher
from control.interruptions.parsing import STALE_AFTER, TERMINAL_OR_ENDING_STATES, Outcome, ParsedEvent
from control.interruptions.reconcilers import repository
from control.interruptions.reconcilers.repository import Place
from control.interruptions.reconcilers.rounds import each_due
from control.interruptions.service import Ingested, Received, ingest_outcomes
from warehouse.contracts import EventKind, EventSource, InterruptionAction

log = structlog.get_logger(__name__)

# Half of a notice is left when the poll finds it; three calls a minute and region are no load on EC2's limits.
INTERVAL_SECONDS = 60.0
LOOK_SECONDS = 5.0
# EC2 forgets a terminated instance within the hour, and shows a young one late; an agent reports every 30 s.
SILENT_SECONDS = 600.0
MARKED = {
    "marked-for-termination": InterruptionAction.TERMINATE,
    "marked-for-stop": InterruptionAction.STOP,
    "marked-for-hibernation": InterruptionAction.HIBERNATE,
}
# "User initiated (2026-01-02 03:04:05 GMT)"
_TRANSITION_AT = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


async def run_once(launcher: Launcher) -> int:
    """Poll the places that are due; returns how many interruptions only this found."""

    async def one(place: Place) -> int:
        try:
            return await poll(launcher, place)
        except AwsError as error:
            await _degraded(launcher, place, error)
            return 0

    return await each_due(launcher.runtime, "poll", INTERVAL_SECONDS * 0.95, one)


async def poll(launcher: Launcher, place: Place) -> int:
    """One place: warnings on Spot requests, instances that are ending, and templates of those that live."""
    runtime = launcher.runtime
    async with runtime.db.system() as conn:
        clusters = await launch_repository.cluster_facts(conn, [place.cluster_id])
        nodes = await repository.spot_nodes(conn, place)
        silent = await repository.silent_nodes(conn, place, seconds=SILENT_SECONDS)
        facts = await events_repository.customer_facts(conn, place.customer_id)
    if facts is None or place.cluster_id not in clusters:
        return 0
    credentials = await launcher.accounts.credentials(clusters[place.cluster_id])
    now = runtime.db.now()
    events = await _marked(launcher, place, credentials, now, set(nodes))
    instances = await launcher.accounts.describe(place.region, credentials, sorted(nodes))
    marked = {instance_id for event in events for instance_id in event.instance_ids}
    for instance_id, instance in instances.items():
        state = instance.get("State", {}).get("Name", "")
        if state in TERMINAL_OR_ENDING_STATES and instance_id not in marked:
            events.append(ending(place, instance_id, state, instance, now))
    for instance_id, seen in vanished(instances, silent):
        events.append(ending(place, instance_id, "terminated", {}, seen, stale=now - seen > STALE_AFTER))
    await _learn(launcher, nodes, instances, credentials)
    outcomes: list[tuple[Received, Outcome]] = [
        (Received(events_repository.to_json(event.detail), EventSource.POLL), event) for event in events
    ]
    done = await ingest_outcomes(runtime.db, facts, outcomes, now=now) if outcomes else Ingested()
    await done.ring(runtime.bells)
    async with runtime.db.system() as conn:
        await intake_repository.mark_healthy(conn, [place.customer_id], detector="poll")
    if done.interruptions:
        log.info("poll.found", customer_id=str(place.customer_id), interruptions=len(done.interruptions))
    return len(done.interruptions)


async def _marked(
    launcher: Launcher, place: Place, credentials: Credentials, now: datetime, ours: set[str]
) -> list[ParsedEvent]:
    events: list[ParsedEvent] = []
    filters = [{"Name": "status-code", "Values": sorted(MARKED)}]
    async for request in launcher.runtime.aws.pages(
        "ec2",
        "DescribeSpotInstanceRequests",
        {"Filters": filters},
        "SpotInstanceRequests",
        region=place.region,
        credentials=credentials,
    ):
        status = request.get("Status", {})
        instance_id, action = request.get("InstanceId"), MARKED.get(status.get("Code"))
        # Other machines of the account are none of our business.
        if instance_id not in ours or action is None:
            continue
        at = status.get("UpdateTime") or now
        events.append(
            ParsedEvent(
                kind=EventKind.SPOT_INTERRUPTION,
                dedupe_key=f"poll:{instance_id}:{at:%Y-%m-%dT%H:%M}",
                region=place.region,
                account_id=None,
                occurred_at=min(at, now),
                instance_ids=(instance_id,),
                action=action,
                detail={"status": status.get("Code"), "instance-id": instance_id},
            )
        )
    return events


def vanished(instances: Mapping[str, Any], silent: Mapping[str, datetime]) -> list[tuple[str, datetime]]:
    """Nodes that neither EC2 nor their agent knows any more, with the moment they were last seen.

    Not when EC2 knows none of the place's nodes at all: then we ask in the wrong account, and nothing has ended.
    """
    return [(instance_id, seen) for instance_id, seen in silent.items() if instance_id not in instances and instances]


def ending(
    place: Place, instance_id: str, state: str, instance: Mapping[str, Any], at: datetime, *, stale: bool = False
) -> ParsedEvent:
    """The end of an instance that EC2 shows in ``state``, seen at ``at``.

    An instance is stopped as often as it is started, and EC2 shows an end for as long as it lasts: one start and one
    state are one event, however often it is asked for. The moment is EC2's, where it tells one.
    """
    reason = str(instance.get("StateTransitionReason") or "")
    if found := _TRANSITION_AT.search(reason):
        with contextlib.suppress(ValueError):
            at = min(at, datetime.fromisoformat(found.group(1)).replace(tzinfo=UTC))
    started = instance.get("LaunchTime")
    run = f":{started:%Y-%m-%dT%H:%M:%S}" if isinstance(started, datetime) else ""
    return ParsedEvent(
        kind=EventKind.INSTANCE_STATE_CHANGE,
        dedupe_key=f"poll:{instance_id}:{state}{run}",
        region=place.region,
        account_id=None,
        occurred_at=at,
        instance_ids=(instance_id,),
        state=state,
        flags=frozenset({"stale"}) if stale else frozenset(),
        detail={"state": state, "reason": reason, "instance-id": instance_id},
    )


async def _learn(
    launcher: Launcher, nodes: dict[str, UUID], instances: dict[str, dict[str, Any]], credentials: Credentials
) -> None:
    by_cluster: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for instance_id, instance in instances.items():
        if instance.get("State", {}).get("Name") == "running" and instance.get("SubnetId"):
            by_cluster[nodes[instance_id]].append(instance)
    if not by_cluster:
        return
    async with launcher.runtime.db.system() as conn:
        clusters = await launch_repository.cluster_facts(conn, sorted(by_cluster))
        customers = {clusters[cluster_id].customer_id for cluster_id in by_cluster if cluster_id in clusters}
        known = {i for customer in customers for i in await repository.instances_with_template(conn, customer)}
    for cluster_id, group in by_cluster.items():
        new = [instance for instance in group if instance["InstanceId"] not in known]
        if new and cluster_id in clusters:
            await launcher.accounts.learn_templates(clusters[cluster_id], new, credentials)


async def _degraded(launcher: Launcher, place: Place, error: AwsError) -> None:
    trouble = explain(error)
    metrics.LOOP_FAILURES.labels("poll", error.code).inc()
    log.warning("poll.failed", customer_id=str(place.customer_id), region=place.region, code=error.code)
    if not trouble.lasting:
        return
    remedy = trouble.remedy
    if error.operation.startswith("Describe"):
        remedy = "let the role use ec2:DescribeInstances and ec2:DescribeSpotInstanceRequests"
    try:
        async with launcher.runtime.db.system() as conn:
            await intake_repository.mark_degraded(
                conn, place.customer_id, detector="poll", reason=trouble.reason, remedy=remedy
            )
    except SQLAlchemyError as trouble:
        log.warning("poll.health_not_written", error=type(trouble).__name__)
