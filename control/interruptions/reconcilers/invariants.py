"""The invariants of RELIABILITY §2.3 as queries over production's own tables; any hit is an alarm."""

from __future__ import annotations

import structlog

from control.interruptions import metrics
from control.interruptions.reconcilers import repository
from control.interruptions.runtime import Runtime

log = structlog.get_logger(__name__)

# A violation is a defect of ours, not an operating state: minutes do not matter, being told does.
INTERVAL_SECONDS = 600.0
LOOK_SECONDS = 60.0


async def run_once(runtime: Runtime) -> int:
    """Count violations; returns how many there are."""
    async with runtime.db.system() as conn:
        due = await repository.claim_rounds(
            conn, ["invariants"], worker=runtime.worker, seconds=INTERVAL_SECONDS * 0.95
        )
        if not due:
            return 0
        found = await repository.violations(conn)
    for name, count in found.items():
        metrics.INVARIANT_VIOLATIONS.labels(name).set(count)
        if count:
            metrics.ALARMS.labels("invariant").inc()
            log.error("invariant.violated", invariant=name, rows=count)
    return sum(found.values())
