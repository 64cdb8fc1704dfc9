"""Instances of ours that are to be ended: the tag is read again, then they are terminated (C-25, C-26, S-07).

The intention is a row in state ``terminating``; terminating twice is harmless, terminating a stranger is not, so
nothing is ended that does not carry this deployment's and this customer's tag at that moment. Nor is a node that became
Ready after all: pods may run there. What EC2 or the account refuses to end is remembered by instance, asked again later
and told (C-33); it holds up no other.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from control.gateways.aws import THROTTLE_CODES, AwsError, Credentials, Role
from control.interruptions import answers, launch_repository, metrics
from control.interruptions.launch_repository import ClusterFacts
from control.interruptions.launching import Launcher
from control.interruptions.moving import Moves, apply_events, intent_of
from control.interruptions.reconcilers import refusals_repository, replacements_repository, repository
from control.interruptions.runtime import Runtime
from control.interruptions.states import NEVER_READY, InstanceEnded, NodeReady
from control.interruptions.templates import is_ours

log = structlog.get_logger(__name__)

# An instance nobody needs costs cents a minute.
INTERVAL_SECONDS = 5.0
LIMIT = 200
# Of one cluster in one look: what EC2 does not know or show yet must not fill the whole of it.
CLUSTER_LIMIT = 50
# At most this share of a cluster's nodes in one round, and at least one; a round is this long for all workers together.
MAX_SHARE = 0.05
ROUND_SECONDS = 20.0
# Describe may not show a young instance yet (C-10); one that was named this long ago and is not shown has ended.
FORGOTTEN_AFTER = timedelta(minutes=10)
# An account that refuses us is asked again every hour, after a week every day, and told what still bills (C-33). So is
# EC2, about an instance that is protected: only a person lifts that.
DENIED_SECONDS = 3600.0
_OVER = ("shutting-down", "terminated")
# Of a customer's instances, those that are still to end.
Still = Callable[[AsyncConnection, UUID, Sequence[str]], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class Terminated:
    """Instances by id as they are after the calls, and what would not end."""

    instances: dict[str, dict[str, Any]]
    refused: dict[str, AwsError] = field(default_factory=dict)


class Ending:
    """Ends what is to be ended, cluster by cluster; one that does not answer holds up nobody else."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self._under_way: dict[UUID, asyncio.Task[int]] = {}

    async def run_once(self) -> int:
        """End what is to be ended; returns how many instances are on their way out."""
        runtime = self.launcher.runtime
        self._under_way = {cluster: task for cluster, task in self._under_way.items() if not task.done()}
        async with runtime.db.system() as conn:
            rows = await replacements_repository.ending_attempts(
                conn, share=CLUSTER_LIMIT, limit=LIMIT, busy=list(self._under_way)
            )
            if not rows:
                return 0
            clusters = await launch_repository.cluster_facts(conn, sorted({row.cluster_id for row in rows}))
        by_cluster: dict[UUID, list[Any]] = defaultdict(list)
        for row in rows:
            by_cluster[row.cluster_id].append(row)
        begun = {
            cluster_id: asyncio.create_task(self._guarded(clusters[cluster_id], group), name=f"end {cluster_id}")
            for cluster_id, group in by_cluster.items()
        }
        self._under_way |= begun
        for task in begun.values():
            self.launcher.others.add(task)
            task.add_done_callback(self.launcher.others.discard)
        done, _ = await asyncio.wait(begun.values(), timeout=INTERVAL_SECONDS)
        return sum(task.result() for task in done)

    async def _guarded(self, cluster: ClusterFacts, rows: Sequence[Any]) -> int:
        try:
            return await self._end(cluster, rows)
        except AwsError as error:
            await note_refused(
                self.launcher.runtime, cluster, dict.fromkeys((row.instance_id for row in rows), error), "replacement"
            )
        except (SQLAlchemyError, OSError) as error:
            metrics.LOOP_FAILURES.labels("ending", type(error).__name__).inc()
            log.warning("ending.interrupted", cluster_id=str(cluster.cluster_id), error=type(error).__name__)
        return 0

    async def _end(self, cluster: ClusterFacts, rows: Sequence[Any]) -> int:
        runtime = self.launcher.runtime
        credentials = await self.launcher.accounts.credentials(cluster)
        instances = await self.launcher.accounts.describe(
            cluster.region, credentials, [row.instance_id for row in rows]
        )
        over = {row.intent_id for row in rows if _is_over(row, instances.get(row.instance_id), runtime.db.now())}
        ours = [row for row in rows if row.intent_id not in over and row.instance_id in instances]
        unwanted = await _still_unwanted(runtime, cluster, ours) if ours else []
        if unwanted and await claim_endings(runtime, cluster.cluster_id):
            async with runtime.db.system() as conn:
                counts = await repository.node_counts(conn, cluster.customer_id)
            most = allowed(counts.get(cluster.cluster_id, 0))
            ended = await terminate_ours(
                self.launcher,
                cluster,
                credentials,
                [row.instance_id for row in unwanted],
                reason="replacement",
                most=most,
            )
            over |= {row.intent_id for row in unwanted if _ending(ended.instances.get(row.instance_id, {}))}
        await apply_events(runtime, dict.fromkeys(over, InstanceEnded()))
        return len(over)


async def _still_unwanted(runtime: Runtime, cluster: ClusterFacts, rows: Sequence[Any]) -> list[Any]:
    """Those of the rows that are still to end. One whose node is Ready by now is kept instead, in the transaction that
    decides it; one that was given up as never Ready waits while nobody hears whether it still is not."""
    moves = Moves(runtime.db.now())
    async with runtime.db.system() as conn:
        intents = await launch_repository.lock_intents(conn, [row.intent_id for row in rows])
        attempts = await launch_repository.attempts_of(conn, list(intents))
        nodes = await replacements_repository.nodes_of(
            conn, cluster.customer_id, cluster.cluster_id, [row.instance_id for row in rows]
        )
        unwanted = []
        for row in rows:
            node, intent = nodes[row.instance_id], intents[row.intent_id]
            if node.ready:
                state = intent_of(intent, attempts[intent.id])
                moves.move(intent, attempts[intent.id], state, NodeReady())
                log.info("ending.kept", intent_id=str(intent.id), instance_id=row.instance_id)
            elif node.agent_heard or row.failure != NEVER_READY or cluster.leaving:
                unwanted.append(row)
        await moves.save(conn)
    moves.report()
    await moves.ring(runtime)
    return unwanted


async def note_refused(
    runtime: Runtime,
    cluster: ClusterFacts,
    refused: Mapping[str, AwsError],
    why: str,
    *,
    cluster_id: UUID | None = None,
) -> None:
    """Remember what could not be ended, and when it is asked again."""
    if not refused:
        return
    rows = []
    for instance_id, error in refused.items():
        if error.code in answers.EXPIRED_CODES | answers.DENIED_CODES and cluster.role_arn:
            runtime.aws.forget(Role(cluster.customer_id, cluster.role_arn, cluster.external_id))
        # AWS's own no does not change by asking; a lost answer, a throttle or ended credentials may the next time.
        lasting = error.code in answers.DENIED_CODES or (
            error.definite and error.code not in THROTTLE_CODES | answers.EXPIRED_CODES
        )
        rows.append(
            {
                "instance_id": instance_id,
                "operation": error.operation,
                "code": error.code,
                "message": error.message[:300],
                "lasting": lasting,
                "seconds": DENIED_SECONDS if lasting else None,
            }
        )
    metrics.LOOP_FAILURES.labels("ending", next(iter(refused.values())).code).inc()
    log.error(
        "ending.failed",
        customer_id=str(cluster.customer_id),
        code=next(iter(refused.values())).code,
        still_billing=sorted(refused),
    )
    async with runtime.db.system() as conn:
        await refusals_repository.refused(
            conn,
            customer_id=cluster.customer_id,
            cluster_id=cluster_id or cluster.cluster_id,
            region=cluster.region,
            why=why,
            rows=rows,
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
    launcher: Launcher,
    cluster: ClusterFacts,
    credentials: Credentials,
    instance_ids: Sequence[str],
    *,
    reason: str,
    most: int,
    cluster_id: UUID | None = None,
    still: Still | None = None,
) -> Terminated:
    """Read the tags again and terminate what is ours and still alive, at most ``most``; what was refused is remembered.

    One that EC2 will not end counts for nothing: the next one takes its place. ``still`` says, right before the call,
    which of the instances are still to end; without it, those that are no Ready node by then.

    Raises:
        AwsError: the account refuses or does not answer, whichever instance it is.
    """
    runtime = launcher.runtime
    result = Terminated(
        await launcher.accounts.describe(cluster.region, credentials, instance_ids) if instance_ids else {}
    )
    strangers = [
        instance_id
        for instance_id, instance in result.instances.items()
        if not _ending(instance)
        and not is_ours(instance, deployment_id=runtime.deployment_id, customer_id=cluster.customer_id)
    ]
    if strangers:
        metrics.ALARMS.labels("not_ours").inc()
        log.error("ending.not_ours", customer_id=str(cluster.customer_id), instance_ids=strangers)
        message = "the instance does not carry this deployment's and customer's tags (any more)"
        stranger = AwsError("TerminateInstances", "NotOurs", message, status=403)
        result.refused |= dict.fromkeys(strangers, stranger)
    going = [
        instance_id
        for instance_id in instance_ids
        if instance_id in result.instances
        and instance_id not in strangers
        and not _ending(result.instances[instance_id])
    ]
    if going:
        # EC2 took its time to answer: what held before may not hold any more.
        async with runtime.db.system() as conn:
            held = await repository.adopt_only(conn, cluster.customer_id)
            wanted = await (still or _no_nodes)(conn, cluster.customer_id, going)
        going = [] if held else list(wanted)
    ended: list[str] = []
    # All in one call; when EC2 refuses that because of one of them, one by one.
    for planned in _groups(going, most):
        group = [instance_id for instance_id in planned if instance_id not in ended]
        if not group:
            continue
        if len(ended) >= most:
            break
        try:
            answer = await runtime.aws.call(
                "ec2", "TerminateInstances", {"InstanceIds": group}, region=cluster.region, credentials=credentials
            )
        except AwsError as error:
            if not error.definite or error.code in answers.DENIED_CODES | THROTTLE_CODES | answers.EXPIRED_CODES:
                # Nothing about these instances: the others of this account would meet the same.
                await note_refused(runtime, cluster, result.refused, reason, cluster_id=cluster_id)
                raise
            if len(group) == 1:
                result.refused[group[0]] = error
            continue
        for change in answer.get("TerminatingInstances", []):
            result.instances[change["InstanceId"]] |= {"State": change["CurrentState"]}
        ended += group
    if ended:
        metrics.TERMINATED.labels(reason).inc(len(ended))
        log.info("ending.terminated", customer_id=str(cluster.customer_id), instance_ids=ended, reason=reason)
    await note_refused(runtime, cluster, result.refused, reason, cluster_id=cluster_id)
    async with runtime.db.system() as conn:
        await refusals_repository.forget(conn, cluster.customer_id, ended)
    return result


async def _no_nodes(conn: AsyncConnection, customer_id: UUID, instance_ids: Sequence[str]) -> Sequence[str]:
    ready = await repository.ready_nodes(conn, customer_id, instance_ids)
    return [instance_id for instance_id in instance_ids if instance_id not in ready]


def _groups(instance_ids: Sequence[str], most: int) -> list[list[str]]:
    """The first ``most`` together, then each alone: those of the first group only matter when it was refused."""
    together = list(instance_ids[:most])
    if len(together) < 2:
        return [[instance_id] for instance_id in instance_ids]
    return [together, *([instance_id] for instance_id in instance_ids)]
