"""Instances of ours that are to be ended: the tag is read again, then they are terminated (C-25, C-26, S-07).

The intention is a row in state ``terminating``; terminating twice is harmless, terminating a stranger is not, so
nothing is ended that does not carry this deployment's and this customer's tag at that moment.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog

from control.gateways.aws import AwsError, Credentials
from control.interruptions import answers, launch_repository, metrics
from control.interruptions.launch_repository import ClusterFacts
from control.interruptions.launching import Launcher, apply_events
from control.interruptions.reconcilers import repository
from control.interruptions.runtime import Runtime
from control.interruptions.states import InstanceEnded
from control.interruptions.templates import is_ours

log = structlog.get_logger(__name__)

# An instance nobody needs costs cents a minute.
INTERVAL_SECONDS = 5.0
LIMIT = 200
# At most this share of a cluster's nodes in one round, and at least one; a round is this long for all workers together.
MAX_SHARE = 0.05
ROUND_SECONDS = 20.0
# Describe may not show a young instance yet (C-10); one that was named this long ago and is not shown has ended.
FORGOTTEN_AFTER = timedelta(minutes=10)
# An account that refuses us is asked again every hour and told what still bills (C-33).
DENIED_SECONDS = 3600.0
_OVER = ("shutting-down", "terminated")


class Ending:
    """Remembers which accounts refused us, so that they are not asked every five seconds."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self._denied_until: dict[UUID, float] = {}

    async def run_once(self) -> int:
        """End what is to be ended; returns how many instances are on their way out."""
        runtime = self.launcher.runtime
        async with runtime.db.system() as conn:
            rows = await launch_repository.ending_attempts(conn, limit=LIMIT)
            if not rows or await repository.adopt_only(conn, runtime.deployment_id):
                return 0
            clusters = await launch_repository.cluster_facts(conn, sorted({row.cluster_id for row in rows}))
        by_cluster: dict[UUID, list[Any]] = defaultdict(list)
        for row in rows:
            by_cluster[row.cluster_id].append(row)
        ended = 0
        for cluster_id, group in by_cluster.items():
            cluster = clusters[cluster_id]
            if time.monotonic() < self._denied_until.get(cluster.customer_id, 0.0):
                continue
            try:
                ended += await self._end(cluster, group)
            except AwsError as error:
                self._failed(cluster, group, error)
        return ended

    async def _end(self, cluster: ClusterFacts, rows: Sequence[Any]) -> int:
        runtime = self.launcher.runtime
        credentials = await self.launcher.credentials(cluster)
        instances = await self.launcher.describe(cluster.region, credentials, [row.instance_id for row in rows])
        over = {row.intent_id for row in rows if _is_over(row, instances.get(row.instance_id), runtime.db.now())}
        ours = [
            row
            for row in rows
            if row.intent_id not in over
            and row.instance_id in instances
            and is_ours(
                instances[row.instance_id], deployment_id=runtime.deployment_id, customer_id=cluster.customer_id
            )
        ]
        strangers = [row.instance_id for row in rows if row.instance_id in instances and row not in ours]
        strangers = [instance_id for instance_id in strangers if not _ending(instances[instance_id])]
        if strangers:
            metrics.ALARMS.labels("not_ours").inc()
            log.error("ending.not_ours", customer_id=str(cluster.customer_id), instance_ids=strangers)
        if ours and await claim_endings(runtime, cluster.cluster_id):
            async with runtime.db.system() as conn:
                counts = await repository.node_counts(conn, cluster.customer_id)
            share = ours[: allowed(counts.get(cluster.cluster_id, 0))]
            now_as = await terminate_ours(
                self.launcher, cluster, credentials, [row.instance_id for row in share], reason="replacement"
            )
            over |= {row.intent_id for row in share if _ending(now_as.get(row.instance_id, {}))}
        await apply_events(runtime, dict.fromkeys(over, InstanceEnded()))
        return len(over)

    def _failed(self, cluster: ClusterFacts, rows: Sequence[Any], error: AwsError) -> None:
        denied = error.code in answers.DENIED_CODES
        if denied:
            self._denied_until[cluster.customer_id] = time.monotonic() + DENIED_SECONDS
            metrics.ALARMS.labels("cannot_terminate").inc()
        log.error(
            "ending.failed",
            customer_id=str(cluster.customer_id),
            code=error.code,
            still_billing=[row.instance_id for row in rows],
            next_try_seconds=DENIED_SECONDS if denied else INTERVAL_SECONDS,
        )


def _ending(instance: Mapping[str, Any]) -> bool:
    return instance.get("State", {}).get("Name") in _OVER


def _is_over(row: Any, instance: Mapping[str, Any] | None, now: datetime) -> bool:
    """EC2 shows it ending; or EC2, which named it long ago, has forgotten it. A new one may only be invisible yet."""
    if instance is not None:
        return _ending(instance)
    return row.launched_at is not None and now - row.launched_at > FORGOTTEN_AFTER


async def claim_endings(runtime: Runtime, cluster_id: UUID) -> bool:
    """Take a cluster's round of terminations: whoever ends instances in it, in any worker, shares this one budget."""
    async with runtime.db.system() as conn:
        return bool(
            await repository.claim_rounds(conn, [f"endings:{cluster_id}"], worker=runtime.worker, seconds=ROUND_SECONDS)
        )


def allowed(nodes: int) -> int:
    """How many instances of a cluster may be ended in one round."""
    return max(1, int(nodes * MAX_SHARE))


async def terminate_ours(
    launcher: Launcher, cluster: ClusterFacts, credentials: Credentials, instance_ids: Sequence[str], *, reason: str
) -> Mapping[str, dict[str, Any]]:
    """Read the tags again, terminate what is ours and still alive, and return the instances as they are now."""
    runtime = launcher.runtime
    instances = await launcher.describe(cluster.region, credentials, instance_ids)
    strangers = [
        instance_id
        for instance_id, instance in instances.items()
        if not is_ours(instance, deployment_id=runtime.deployment_id, customer_id=cluster.customer_id)
    ]
    if strangers:
        metrics.ALARMS.labels("not_ours").inc()
        log.error("ending.not_ours", customer_id=str(cluster.customer_id), instance_ids=strangers)
    going = [
        instance_id
        for instance_id, instance in instances.items()
        if instance_id not in strangers and instance.get("State", {}).get("Name") not in _OVER
    ]
    if not going:
        return instances
    answer = await runtime.aws.call(
        "ec2", "TerminateInstances", {"InstanceIds": going}, region=cluster.region, credentials=credentials
    )
    metrics.TERMINATED.labels(reason).inc(len(going))
    log.info("ending.terminated", customer_id=str(cluster.customer_id), instance_ids=going, reason=reason)
    changed = {
        change["InstanceId"]: instances[change["InstanceId"]] | {"State": change["CurrentState"]}
        for change in answer.get("TerminatingInstances", [])
    }
    return dict(instances) | changed
