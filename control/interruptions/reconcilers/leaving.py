"""The end of customers that are off-boarded and of clusters that were deleted (C-32): nothing new, what is in flight is
brought to a known end, and only then the role is given up.

Replacements that are no Ready node yet are ended: no agent will say what becomes of them. Ready ones are the
customer's, with its pods.
"""

from __future__ import annotations

import structlog

from control.interruptions.moving import apply_events
from control.interruptions.reconcilers import leaving_repository
from control.interruptions.runtime import Runtime
from control.interruptions.states import Cancel
from control.security import audit

log = structlog.get_logger(__name__)

INTERVAL_SECONDS = 5.0
LIMIT = 500


async def run_once(runtime: Runtime) -> int:
    """Cancel what is wanted for nobody any more and finish off-boardings with nothing in flight; returns how many."""
    async with runtime.db.system() as conn:
        wanted = await leaving_repository.unwanted_intents(conn, limit=LIMIT)
        await leaving_repository.stop_plans(conn)
    cancelled = await apply_events(runtime, dict.fromkeys(wanted, Cancel("the cluster or its customer is gone")))
    finished = 0
    async with runtime.db.system() as conn:
        for customer_id in await leaving_repository.leaving_customers(conn):
            if (await leaving_repository.in_flight(conn, customer_id)).nothing:
                await leaving_repository.give_up_role(conn, customer_id)
                await audit.record(
                    conn,
                    customer_id=customer_id,
                    actor="cloudoptim",
                    action="customer.offboarded",
                    subject=str(customer_id),
                    detail={"in_flight": "ended"},
                )
                finished += 1
                log.info("leaving.finished", customer_id=str(customer_id))
    return cancelled + finished
