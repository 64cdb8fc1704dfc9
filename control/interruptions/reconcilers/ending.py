"""Instances of ours that are to be ended: the tag is read again, then they are terminated (C-25, C-26, S-07).

The intention is a row in state ``terminating``; terminating twice is harmless, terminating a stranger is not, so
nothing is ended that does not carry this deployment's and this customer's tag at that moment.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import structlog

from control.gateways.aws import AwsError, Credentials
from control.interruptions import answers, launch_repository, metrics
from control.interruptions.launch_repository import ClusterFacts
from control.interruptions.launching import Launcher, apply_events
from control.interruptions.reconcilers import repository
from control.interruptions.states import InstanceEnded
from control.interruptions.templates import is_ours

log = structlog.get_logger(__name__)

# An instance nobody needs costs cents a minute.
INTERVAL_SECONDS = 5.0
LIMIT = 200
# At most this share of a cluster's nodes in one round, and at least one.
MAX_SHARE = 0.05
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
        credentials = await self.launcher.credentials(cluster)
        async with self.launcher.runtime.db.system() as conn:
            counts = await repository.node_counts(conn, cluster.customer_id)
        share = rows[: allowed(counts.get(cluster.cluster_id, 0))]
        instances = await terminate_ours(
            self.launcher, cluster, credentials, [row.instance_id for row in share], reason="replacement"
        )
        over = {
            row.intent_id: InstanceEnded()
            for row in share
            if instances.get(row.instance_id, {}).get("State", {}).get("Name") in _OVER
        }
        await apply_events(self.launcher.runtime, over)
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
