"""Instances launched in the place of interrupted ones, in the states a test begins from."""

from __future__ import annotations

import json

from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import never_ready
from control.interruptions.service import Received, ingest
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from warehouse.contracts import EventSource


async def launched(stage: Stage, launcher: Launcher, count: int = 1, *, fault: Fault | None = None) -> list[str]:
    """Instances launched in the place of interrupted ones, which have not joined."""
    stage.join_seconds = 3600
    for instance in await stage.launch_nodes(count) if count else []:
        warning = json.dumps(stage.tenant.warning(instance))
        await ingest(stage.db, await stage.tenant.facts(), [Received(warning, EventSource.SQS)])
    if fault is not None:
        stage.aws.inject(fault)

    async def called() -> bool:
        # Not every pool that is priced offers the type: the ladder goes on.
        await launcher.plan_round()
        await launcher.finish_calls(10)
        return not await stage.tenant.rows("SELECT 1 FROM launch_intents WHERE state = 'planned'")

    await stage.until(called, 10)
    rows = await stage.tenant.rows(
        "SELECT instance_id FROM launch_attempts WHERE customer_id = :customer_id AND state = 'launched' ORDER BY id"
    )
    return [row.instance_id for row in rows]


async def never_ready_replacements(stage: Stage, launcher: Launcher, count: int = 1) -> list[str]:
    """Instances that ran for eleven minutes and are to be ended: their agent is heard and sees no Ready node."""
    found = await launched(stage, launcher, count)
    await stage.tenant.rows("UPDATE clusters SET last_seen_at = now() RETURNING 1")
    await stage.tenant.rows("UPDATE launch_attempts SET launched_at = now() - interval '11 minutes' RETURNING 1")
    assert await never_ready.run_once(launcher.runtime) == count
    return found
