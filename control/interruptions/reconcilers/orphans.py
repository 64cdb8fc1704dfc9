"""Instances with our tag that no live attempt explains: ended where a launch of ours made them and they are no nodes,
adopted and told otherwise.

The cloud is listed first and the database second, so that the database is the newer view (Karpenter's order): an
instance launched in between has its row already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import structlog

from control.gateways.aws import AwsError, Credentials
from control.interruptions import launch_repository, metrics
from control.interruptions.launch_repository import ClusterFacts
from control.interruptions.launching import Launcher
from control.interruptions.moving import apply_events
from control.interruptions.reconcilers import refusals_repository, repository
from control.interruptions.reconcilers.ending import allowed, claim_endings, note_refused, terminate_ours
from control.interruptions.reconcilers.repository import Place
from control.interruptions.reconcilers.rounds import each_due
from control.interruptions.states import InstanceEnded
from control.interruptions.templates import (
    TAG_BATCH,
    TAG_CLUSTER,
    TAG_MANAGED,
    TAG_TENANT,
    is_alive,
    launched_by,
    tags_of,
)

log = structlog.get_logger(__name__)

INTERVAL_SECONDS = 60.0
LOOK_SECONDS = 5.0
# A launch under way has its attempt row before its instance; a minute covers clocks and slow answers.
MIN_AGE = timedelta(seconds=60)
_DEAD = ("shutting-down", "terminated")
_LIVE_ATTEMPTS = frozenset({"calling", "unknown", "launched", "adopted", "ready", "terminating"})
_UNANSWERED = frozenset({"calling", "unknown"})


async def run_once(launcher: Launcher) -> int:
    """Compare the places that are due; returns how many instances were ended."""

    async def one(place: Place) -> int:
        try:
            return await compare(launcher, place)
        except AwsError as error:
            metrics.LOOP_FAILURES.labels("orphans", error.code).inc()
            log.warning("orphans.failed", customer_id=str(place.customer_id), code=error.code)
            return 0

    return await each_due(launcher.runtime, "orphans", INTERVAL_SECONDS * 0.95, one, leaving=True)


async def compare(launcher: Launcher, place: Place) -> int:
    """One place; returns how many instances were ended."""
    runtime = launcher.runtime
    async with runtime.db.system() as conn:
        clusters = await launch_repository.cluster_facts(conn, [place.cluster_id])
    if place.cluster_id not in clusters:
        return 0
    facts = clusters[place.cluster_id]
    credentials = await launcher.accounts.credentials(facts)
    instances = await _ours(launcher, place, credentials)
    alive = {instance_id: instance for instance_id, instance in instances.items() if is_alive(instance)}
    running = [name for name, instance in alive.items() if instance["State"]["Name"] in ("pending", "running")]
    batch_ids = {batch for instance in alive.values() if (batch := _uuid(tags_of(instance).get(TAG_BATCH)))}
    async with runtime.db.system() as conn:
        await repository.mark_adopted(conn, place.customer_id, place.region, running=running)
        attempts = await repository.attempts_by_instance(conn, place.customer_id, sorted(instances))
        batches = await repository.batches(conn, place.customer_id, sorted(batch_ids))
        adopted = await repository.adopted(conn, place.customer_id, sorted(alive))
        nodes = await repository.ready_nodes(conn, place.customer_id, sorted(alive))
        left = await repository.left_nodes(conn, place.customer_id, sorted(alive))
        silent = await repository.silent_clusters(conn, place.customer_id)
        counts = await repository.node_counts(conn, place.customer_id)
        adopt_only = await repository.adopt_only(conn, place.customer_id)
    await _ended_by_others(launcher, instances, attempts)

    now = runtime.db.now()
    found: dict[Whose, list[str]] = {whose: [] for whose in Whose}
    for instance_id, instance in alive.items():
        if now - instance.get("LaunchTime", now) < MIN_AGE or instance_id in adopted:
            continue
        batch_id = _uuid(tags_of(instance).get(TAG_BATCH))
        whose = whose_is(instance, attempts.get(instance_id), batches.get(batch_id) if batch_id else None)
        was_ready = instance_id in attempts and attempts[instance_id].state == "ready"
        if (whose is Whose.NOBODY and instance_id in nodes) or (was_ready and instance_id in left):
            whose = Whose.NODE
        found[whose].append(instance_id)
    for whose in (Whose.NODE, Whose.COPIED, Whose.RESTORED):
        await _adopt(launcher, place, whose, [instances[instance_id] for instance_id in found[whose]])
    if found[Whose.RESTORED]:
        return 0
    nobodys = found[Whose.NOBODY]
    async with runtime.db.system() as conn:
        await refusals_repository.forget_orphans(conn, place.customer_id, place.region, except_for=nobodys)
        waiting = await refusals_repository.waiting(conn, place.customer_id, nobodys)
    due = [instance_id for instance_id in nobodys if instance_id not in waiting]
    if adopt_only or not due:
        return 0
    return await _end(launcher, facts, credentials, instances, due, counts, silent)


class Whose(StrEnum):
    """Whose an instance with our tags is. All but ``OURS`` and ``NOBODY`` are why it is adopted."""

    OURS = "ours"
    NOBODY = "nobody"
    NODE = "node"
    COPIED = "copied"
    RESTORED = "restored"


def whose_is(instance: Mapping[str, Any], attempt: Any, batch: Any) -> Whose:
    """From the attempt that EC2 named the instance to (``state``), and the call that its tag names (``state``, and what
    ``launched_by`` reads); None where there is no such row."""
    if attempt is not None:
        return Whose.OURS if attempt.state in _LIVE_ATTEMPTS else Whose.NOBODY
    if batch is None:
        return Whose.RESTORED
    call = (batch.client_token, batch.instance_type, batch.first_called_at)
    if not launched_by(instance, *call):
        # "Launch more like this", a template or a group made from an instance of ours: the tags come along.
        return Whose.COPIED
    # The launch loop repeats a call without an answer and learns of it, or adopts it by tag.
    return Whose.OURS if batch.state in _UNANSWERED else Whose.NOBODY


async def _ours(launcher: Launcher, place: Place, credentials: Credentials) -> dict[str, dict[str, Any]]:
    filters = {
        f"tag:{TAG_MANAGED}": [launcher.runtime.deployment_id],
        f"tag:{TAG_TENANT}": [str(place.customer_id)],
    }
    shown = launcher.accounts.instances(place.region, credentials, filters)
    return {instance["InstanceId"]: instance async for instance in shown}


async def _ended_by_others(launcher: Launcher, instances: dict[str, dict[str, Any]], attempts: dict[str, Any]) -> None:
    """Replacements that EC2 shows as ended before they were Ready. Only a state that was seen counts (C-10)."""
    over = {
        attempts[instance_id].intent_id: InstanceEnded()
        for instance_id, instance in instances.items()
        if instance.get("State", {}).get("Name") in _DEAD
        and instance_id in attempts
        and attempts[instance_id].state in ("launched", "adopted", "terminating")
    }
    await apply_events(launcher.runtime, over)


async def _adopt(launcher: Launcher, place: Place, whose: Whose, instances: list[dict[str, Any]]) -> None:
    """Remember instances that we may not end. Where the cloud has launches that the database never heard of, it was
    restored, and nothing of the customer is ended until a person has compared the two (C-34)."""
    if not instances:
        return
    runtime = launcher.runtime
    rows = [
        {
            "customer_id": place.customer_id,
            "instance_id": instance["InstanceId"],
            "cluster_id": _uuid(tags_of(instance).get(TAG_CLUSTER)),
            "region": place.region,
            "batch_id": _uuid(tags_of(instance).get(TAG_BATCH)),
            "launched_at": instance.get("LaunchTime"),
            "reason": whose.value,
            "instance_type": instance.get("InstanceType"),
        }
        for instance in instances
    ]
    reason = f"{len(rows)} instances carry our tag and are in no row: the database is older than they are"
    async with runtime.db.system() as conn:
        await repository.adopt_instances(conn, rows)
        new = whose is Whose.RESTORED and await repository.set_adopt_only(conn, place.customer_id, reason=reason)
    if new:
        metrics.ALARMS.labels("adopt_only").inc()
    log.error(
        "orphans.adopted",
        customer_id=str(place.customer_id),
        reason=reason if whose is Whose.RESTORED else whose.value,
        instance_ids=[row["instance_id"] for row in rows],
    )


async def _end(
    launcher: Launcher,
    facts: ClusterFacts,
    credentials: Credentials,
    instances: dict[str, dict[str, Any]],
    instance_ids: list[str],
    counts: dict[UUID, int],
    silent: set[UUID],
) -> int:
    by_cluster: dict[UUID | None, list[str]] = defaultdict(list)
    for instance_id in sorted(instance_ids):
        by_cluster[_uuid(tags_of(instances[instance_id]).get(TAG_CLUSTER))].append(instance_id)
    ended = 0
    for cluster_id, group in by_cluster.items():
        if cluster_id in silent:
            # It may have joined since: who did not hear from the agent does not know that it is no node with pods.
            away = AwsError("TerminateInstances", "AgentAway", "the cluster's agent was not heard for two minutes")
            await note_refused(launcher.runtime, facts, dict.fromkeys(group, away), "orphan", cluster_id=cluster_id)
            continue
        most = allowed(counts.get(cluster_id, 0)) if cluster_id else 1
        if len(group) > most:
            metrics.ALARMS.labels("orphans_over_cap").inc()
            log.error("orphans.over_cap", cluster_id=str(cluster_id), orphans=len(group), ended_now=most)
        if not await claim_endings(launcher.runtime, cluster_id or facts.customer_id):
            continue
        try:
            done = await terminate_ours(
                launcher, facts, credentials, group, reason="orphan", most=most, cluster_id=cluster_id
            )
        except AwsError as error:
            await note_refused(launcher.runtime, facts, dict.fromkeys(group, error), "orphan", cluster_id=cluster_id)
            raise
        ended += sum(done.instances[name]["State"]["Name"] in _DEAD for name in group if name in done.instances)
    return ended


def _uuid(value: str | None) -> UUID | None:
    try:
        return UUID(value) if value else None
    except ValueError:
        return None
