"""Calls whose outcome nobody knows: the same token again, then adopt by tag or give up (C-08 to C-15)."""

from __future__ import annotations

import asyncio

import structlog

from control.gateways.aws import AwsError
from control.interruptions import launch_repository
from control.interruptions.answers import Meaning, Reading
from control.interruptions.launch_repository import BatchRow, ClusterFacts
from control.interruptions.launching import Launcher
from control.interruptions.templates import REPEATED_FOR, is_alive

log = structlog.get_logger(__name__)

# A batch becomes due 15 s after its worker went silent; looking every two seconds keeps the takeover below 20.
INTERVAL_SECONDS = 2.0
# Calls made at once; EC2's bucket for launches is small.
LIMIT = 20
# Calls of the rounds so far that were not answered yet.
MOST_UNDER_WAY = 100


async def run_once(launcher: Launcher) -> int:
    """Repeat or settle due batches; returns how many.

    An account that does not answer is waited for in the background: the others' calls go on in the next round.
    """
    runtime = launcher.runtime
    limit = min(LIMIT, MOST_UNDER_WAY - len(launcher.calls.under_way))
    if limit <= 0:
        return 0
    async with runtime.db.system() as conn:
        batches = await launch_repository.claim_batches(conn, worker=runtime.worker, limit=limit)
        if not batches:
            return 0
        clusters = await launch_repository.cluster_facts(conn, sorted({batch.cluster_id for batch in batches}))
    begun = [
        launcher.calls.in_background(_settle(launcher, batch, clusters[batch.cluster_id]), f"settle {batch.id}")
        for batch in batches
    ]
    await asyncio.wait(begun, timeout=INTERVAL_SECONDS)
    return len(batches)


async def _settle(launcher: Launcher, batch: BatchRow, cluster: ClusterFacts) -> None:
    since = batch.first_called_at
    given_up = since is not None and launcher.runtime.db.now() - since > REPEATED_FOR
    if not given_up:
        # Not by tag while the token still works: Describe may show a part of a batch, the token answers with all.
        if batch.error_code != "IdempotentParameterMismatch":
            await launcher.calls.call(batch, cluster)
        return
    try:
        async with launcher.calls.holding(batch):
            adopted = await adopt(launcher, batch, cluster)
    except AwsError as error:
        # Nobody can say whether it launched: the alarms tell that it may, and it is looked for again.
        log.warning("launch.adoption_failed", batch_id=str(batch.id), code=error.code)
        await launcher.calls.record(batch, Reading(Meaning.UNKNOWN, error.code, error.message[:500]))
        return
    if not adopted:
        await launcher.calls.record(
            batch, Reading(Meaning.UNKNOWN, "Abandoned", "no answer for ten minutes"), abandoned=True
        )


async def adopt(launcher: Launcher, batch: BatchRow, cluster: ClusterFacts) -> bool:
    """Record instances that carry the batch's tag. Finding none proves nothing (C-10) and returns False."""
    credentials = await launcher.accounts.credentials(cluster)
    found = await launcher.accounts.launched_by(batch, credentials)
    ids = [instance["InstanceId"] for instance in found if is_alive(instance)]
    if not ids:
        return False
    await launcher.calls.record(batch, Reading(Meaning.LAUNCHED, "", ""), instance_ids=ids, adopted=True)
    return True
