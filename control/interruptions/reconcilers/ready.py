"""Replacements whose Node is Ready by its agent's word."""

from __future__ import annotations

from control.interruptions.moving import apply_events
from control.interruptions.reconcilers import replacements_repository
from control.interruptions.runtime import Runtime
from control.interruptions.states import NodeReady

# The drain and the closing wait for this; the query reads a few rows through an index.
INTERVAL_SECONDS = 1.0
LIMIT = 500


async def run_once(runtime: Runtime) -> int:
    """Mark attempts Ready; returns how many."""
    async with runtime.db.system() as conn:
        rows = await replacements_repository.ready_attempts(conn, limit=LIMIT)
    return await apply_events(runtime, {row.intent_id: NodeReady() for row in rows})
