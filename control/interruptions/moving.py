"""Changes of launch intents and their attempts: one event each, applied by ``states``, committed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions import launch_repository, metrics
from control.interruptions.launch_repository import AttemptRow, IntentRow
from control.interruptions.runtime import Runtime
from control.interruptions.states import (
    Alarm,
    Attempt,
    AttemptState,
    Command,
    Intent,
    IntentState,
    LaunchEvent,
    Plan,
    apply_launch,
)

log = structlog.get_logger(__name__)

# A denied account is asked again every minute while a replacement still makes sense.
BLOCKED_SECONDS = 60.0


async def apply_events(runtime: Runtime, events: Mapping[UUID, LaunchEvent]) -> int:
    """One event per intent, committed together; returns how many moved."""
    if not events:
        return 0
    moves = Moves(runtime.db.now())
    async with runtime.db.system() as conn:
        rows = await launch_repository.lock_intents(conn, sorted(events))
        attempts = await launch_repository.attempts_of(conn, list(rows))
        for intent_id, row in rows.items():
            moves.move(row, attempts[intent_id], intent_of(row, attempts[intent_id]), events[intent_id])
        await moves.save(conn)
    moves.report()
    await moves.ring(runtime)
    return len(moves.intents)


class Moves:
    """Changes of intents and attempts in one transaction, and what to do once it is committed."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.intents: list[dict[str, Any]] = []
        self.attempts: list[dict[str, Any]] = []
        self.commands: list[tuple[IntentRow, Command]] = []
        self.ended = False

    def move(
        self,
        row: IntentRow,
        attempts: Sequence[AttemptRow],
        before: Intent,
        event: LaunchEvent,
        *,
        decided_by: str | None = None,
    ) -> Intent:
        after, commands = apply_launch(before, event)
        stored = intent_of(row, attempts)
        if after == stored:
            return after
        next_action = self.now
        if after.state is IntentState.BLOCKED:
            next_action = self.now + timedelta(seconds=BLOCKED_SECONDS)
        self.intents.append(
            {
                "id": row.id,
                "version": row.version,
                "state": after.state.value,
                "reason": after.reason,
                "decided_by": decided_by,
                "next_action_at": next_action,
            }
        )
        for known, attempt in zip(attempts, after.attempts, strict=False):
            if (known.state, known.instance_id, known.failure) != (
                attempt.state,
                attempt.instance_id,
                attempt.failure,
            ):
                self.attempts.append(
                    {
                        "id": known.id,
                        "state": attempt.state.value,
                        "instance_id": attempt.instance_id,
                        "failure": attempt.failure,
                    }
                )
        self.commands += [(row, command) for command in commands]
        self.ended = self.ended or after.state.value in ("ready", "exhausted", "cancelled")
        return after

    async def save(self, conn: AsyncConnection, *, expect_attempts: bool = True) -> None:
        """Write all changes; the intents are locked, so a version that moved is a defect, not a race."""
        moved = await launch_repository.update_intents(conn, self.intents)
        if len(moved) != len(self.intents):
            raise RuntimeError("a locked launch intent changed its version")
        await launch_repository.update_attempts(conn, self.attempts)

    def report(self) -> None:
        """Tell people what they should know."""
        for row, command in self.commands:
            if isinstance(command, Alarm):
                metrics.ALARMS.labels("launch").inc()
                log.error(
                    "launch.alarm",
                    reason=command.reason,
                    intent_id=str(row.id),
                    customer_id=str(row.customer_id),
                    cluster_id=str(row.cluster_id),
                )

    async def ring(self, runtime: Runtime) -> None:
        """Wake whoever goes on from here."""
        if any(isinstance(command, Plan) for _, command in self.commands):
            await runtime.bells.ring("launches")
        if self.ended:
            await runtime.bells.ring("interruptions")


def intent_of(row: IntentRow, attempts: Sequence[AttemptRow]) -> Intent:
    return Intent(
        IntentState(row.state),
        tuple(
            Attempt(attempt.attempt_no, AttemptState(attempt.state), attempt.instance_id, attempt.failure)
            for attempt in attempts
        ),
        row.reason,
    )
