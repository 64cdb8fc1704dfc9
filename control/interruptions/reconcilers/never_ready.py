"""Replacements that run and never become a Ready node are ended and tried again (C-25)."""

from __future__ import annotations

from control.interruptions.moving import apply_events
from control.interruptions.reconcilers import replacements_repository
from control.interruptions.runtime import Runtime
from control.interruptions.states import NeverReady

INTERVAL_SECONDS = 30.0
# Karpenter allows 15 minutes to register; an interruption's replacement is no use by then.
NEVER_READY_SECONDS = 600.0
LIMIT = 100


async def run_once(runtime: Runtime) -> int:
    """Mark what waited too long for termination; returns how many."""
    async with runtime.db.system() as conn:
        intents = await replacements_repository.never_ready_intents(conn, seconds=NEVER_READY_SECONDS, limit=LIMIT)
    return await apply_events(runtime, {intent_id: NeverReady() for intent_id in intents})
