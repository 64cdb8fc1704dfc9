"""Interruptions being made or changed in one transaction, and the writing of all that follows from it.

``merging`` decides; here its answers are kept until they are written together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from control.agents.repository import create_tasks
from control.interruptions import drafts_repository, merging, pools, repository
from control.interruptions.drains import drain_task, grace_seconds
from control.interruptions.merging import Known, Merged
from control.interruptions.messages import told_closed
from control.interruptions.parsing import ParsedEvent
from control.interruptions.policies import Decision, NodeFacts, maintenance_launch_at
from control.interruptions.repository import InterruptionRow
from control.interruptions.states import LAUNCH_WINDOW
from warehouse.contracts import EventKind
from warehouse.postgres.models import new_id


class Raced(Exception):
    """Somebody else inserted the same interruption in the meantime: read again and merge."""


@dataclass(slots=True)
class Draft:
    """An interruption with what is to be done about it. ``identity`` are the columns no signal changes."""

    id: UUID
    identity: dict[str, Any]
    known: Known
    version: int
    new: bool
    changed: bool = False
    drain: NodeFacts | None = None
    launch: dict[str, Any] | None = None
    act_at: datetime | None = None
    hastens_to: datetime | None = None
    postponed: bool = False
    postponed_from: datetime | None = None
    drain_may_retry: bool = False
    shortened: bool = False
    matched: bool = False
    called_off: bool = False

    def row(self) -> dict[str, Any]:
        """The interruption as its table has it."""
        known = self.known
        return self.identity | {
            "id": self.id,
            "interruption_key": known.key,
            "kind": known.kind.value,
            "instance_action": known.action.value,
            "state": known.state,
            "outcome": known.outcome,
            "reason": known.reason,
            "notice_at": known.notice_at,
            "first_notice_at": known.first_notice_at,
            "received_at": known.received_at,
            "deadline_at": known.deadline_at,
            "detected_by": list(known.detected_by),
            "drain_pending": known.drain_pending,
            "instance_gone_at": known.gone_at,
            "closed_at": known.closed_at,
            "version": self.version,
        }


class Drafts:
    """A customer's drafts of one transaction, with their history and what else is written with them."""

    def __init__(self, customer_id: UUID, now: datetime) -> None:
        self.customer_id, self.now = customer_id, now
        self.all: list[Draft] = []
        self._by_instance: dict[str, list[Draft]] = {}
        self._last_entry: dict[UUID, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []
        self.links: list[dict[str, Any]] = []
        self.outbox: list[dict[str, Any]] = []
        self.pool_signals: list[tuple[str, str, str, str]] = []

    @property
    def clusters(self) -> set[UUID]:
        """Clusters with new tasks, or with tasks that end earlier."""
        drained = {draft.drain.cluster_id for draft in self.all if draft.drain}
        hurried = {draft.identity["cluster_id"] for draft in self.all if draft.shortened}
        return drained | (hurried - {None})

    @property
    def launches(self) -> bool:
        """Whether a launcher should look."""
        return any(draft.launch or draft.hastens_to for draft in self.all)

    @property
    def matched(self) -> list[UUID]:
        """Interruptions that waited for a node and have one."""
        return [draft.id for draft in self.all if draft.matched]

    @property
    def called_off(self) -> list[UUID]:
        """Interruptions that are closed, because what they were about will not come."""
        return [draft.id for draft in self.all if draft.called_off]

    # --- what signals do

    def load(self, row: InterruptionRow) -> Draft:
        """An interruption that exists, under its row lock."""
        identity = {
            "customer_id": row.customer_id,
            "cluster_id": row.cluster_id,
            # Columns that were not read are only ever filled, never emptied.
            "node_id": None,
            "instance_type": None,
            "availability_zone": None,
            "region": row.region,
            "account_id": row.account_id,
            "instance_id": row.instance_id,
        }
        return self._add(Draft(row.id, identity, row.known(), row.version, new=False))

    def find(self, instance_id: str, event: ParsedEvent, decision: Decision) -> Draft | None:
        """The interruption a signal belongs to; None when it is the first word of a new one."""
        mine = self._by_instance.get(instance_id, [])
        index = merging.owner([draft.known for draft in mine], event, decision, self.now)
        return None if index is None else mine[index]

    def begin(
        self, instance_id: str, event: ParsedEvent, decision: Decision, node: NodeFacts | None, label: str
    ) -> Draft:
        """A new interruption."""
        earlier = [draft.known for draft in self._by_instance.get(instance_id, [])]
        merged = merging.begin(earlier, event, decision, node, label, self.now)
        identity = {
            "customer_id": self.customer_id,
            "cluster_id": None,
            "node_id": None,
            "instance_type": None,
            "availability_zone": None,
            "region": node.region if node else event.region,
            "account_id": event.account_id,
            "instance_id": instance_id,
        }
        draft = self._add(Draft(new_id(), identity, merged.known, 1, new=True))
        self._take(draft, merged, event, node)
        return draft

    def merge(self, draft: Draft, event: ParsedEvent, decision: Decision, node: NodeFacts | None, label: str) -> None:
        """One more signal about an interruption."""
        self._take(draft, merging.merge(draft.known, event, decision, node, label, self.now), event, node)

    def hear(self, draft: Draft, label: str) -> None:
        """A signal that asks for nothing."""
        self._take(draft, merging.hear(draft.known, label), None, None)

    def call_off(self, draft: Draft, event: ParsedEvent, label: str) -> None:
        """AWS closes a maintenance."""
        merged = merging.call_off(draft.known, event, label, self.now)
        self._take(draft, merged, None, None)
        if merged.effects.closes:
            draft.called_off = True
            if draft.identity["cluster_id"]:
                self.outbox.append(self._told_closed(draft))

    def link(self, draft: Draft, kinds: Sequence[str], event_ids: Sequence[UUID]) -> None:
        """Events from before there was an interruption belong to it."""
        known = draft.known
        more = tuple(kind for kind in kinds if kind not in known.detected_by)
        draft.known = replace(known, detected_by=known.detected_by + more)
        self.links += [{"id": event_id, "interruption_id": draft.id} for event_id in event_ids]

    def _add(self, draft: Draft) -> Draft:
        self.all.append(draft)
        self._by_instance.setdefault(draft.identity["instance_id"], []).append(draft)
        return draft

    def _take(self, draft: Draft, merged: Merged, event: ParsedEvent | None, node: NodeFacts | None) -> None:
        draft.known = merged.known
        for note in merged.notes:
            self._note(draft, note.event, dict(note.detail))
        effects = merged.effects
        draft.matched = draft.matched or effects.matched
        draft.shortened = draft.shortened or effects.shortens
        draft.drain_may_retry = draft.drain_may_retry or effects.drain_may_retry
        if effects.hastens_to:
            draft.hastens_to = min(draft.hastens_to or effects.hastens_to, effects.hastens_to)
        if effects.postpones:
            draft.postponed = True
            if effects.act_at:
                draft.postponed_from = min(draft.postponed_from or effects.act_at, effects.act_at)
        if node is None or event is None:
            return
        if effects.drains:
            draft.drain = node
        if effects.begins:
            draft.identity |= {
                "cluster_id": node.cluster_id,
                "node_id": node.node_id,
                "instance_type": node.instance_type,
                "availability_zone": node.availability_zone,
            }
            self.outbox.append(self._told(draft, node))
        if effects.launches:
            draft.launch = {
                "instance_id": node.instance_id,
                "instance_type": node.instance_type,
                "availability_zone": node.availability_zone,
                "node_type": node.node_type,
                # A Spot instance that ended without a warning may have been ended by its owner: ask before replacing.
                "verify_ended_by_aws": event.kind is EventKind.INSTANCE_STATE_CHANGE,
            }
            draft.act_at = effects.act_at
        if effects.took_capacity:
            self.pool_signals.append((node.region, node.availability_zone, node.instance_type, "interruption"))

    def _note(self, draft: Draft, event: str, detail: dict[str, Any]) -> None:
        last = self._last_entry.get(draft.id)
        if last is not None:
            # One version per transaction; further events of it are told in the same history row's detail.
            last["detail"].setdefault("also", []).append({"event": event} | detail)
            return
        draft.changed = True
        if not draft.new:
            draft.version += 1
        entry = {
            "customer_id": self.customer_id,
            "interruption_id": draft.id,
            "version": draft.version,
            "at": self.now,
            "event": event,
            "detail": detail,
        }
        self.history.append(entry)
        self._last_entry[draft.id] = entry

    def _told_closed(self, draft: Draft) -> dict[str, Any]:
        return told_closed(
            customer_id=self.customer_id,
            cluster_id=draft.identity["cluster_id"],
            interruption_id=draft.id,
            instance_id=draft.identity["instance_id"],
            outcome=draft.known.outcome,
            reason=draft.known.reason,
            closed_at=self.now,
        )

    def _told(self, draft: Draft, node: NodeFacts) -> dict[str, Any]:
        return {
            "id": new_id(),
            "customer_id": self.customer_id,
            "topic": "spot.interruption.detected",
            "payload": {
                "interruption_id": draft.id,
                "customer_id": self.customer_id,
                "cluster_id": node.cluster_id,
                "instance_id": node.instance_id,
                "instance_type": node.instance_type,
                "availability_zone": node.availability_zone,
                "kind": draft.known.kind.value,
                "instance_action": draft.known.action.value,
                "notice_at": draft.known.notice_at,
                "deadline_at": draft.known.deadline_at,
            },
        }

    # --- writing

    async def persist(
        self,
        conn: AsyncConnection,
        *,
        inbox: Sequence[dict[str, Any]] = (),
        events: Sequence[dict[str, Any]] = (),
        gone: Sequence[dict[str, Any]] = (),
        hooks: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write everything that was decided, with the rows of the messages that said so.

        Raises:
            Raced: another consumer was first with one of the rows.
        """
        drafts = self.all
        states = {draft.id: draft.known.state for draft in drafts}
        alone = await drafts_repository.write_batch(
            conn,
            self.customer_id,
            inbox=inbox,
            fresh=[draft.row() for draft in drafts if draft.new],
            changed=[draft.row() for draft in drafts if draft.changed and not draft.new],
            history=[entry | {"state": states[entry["interruption_id"]]} for entry in self.history],
            intents=[self._intent(draft) for draft in drafts if draft.launch],
            events=events,
            links=self.links,
            gone=gone,
            outbox=self.outbox,
        )
        if not alone:
            raise Raced
        await drafts_repository.retire_drains(
            conn, [draft.id for draft in drafts if draft.drain_may_retry and not draft.new]
        )
        await create_tasks(
            conn,
            [
                drain_task(draft.id, draft.drain, draft.known.deadline_at, draft.known.action, now=self.now)
                for draft in drafts
                if draft.drain
            ],
        )
        await drafts_repository.shorten_deadlines(conn, [self._shorter(draft) for draft in drafts if draft.shortened])
        await drafts_repository.insert_hooks(conn, hooks)
        await drafts_repository.hasten_launches(
            conn,
            [{"interruption_id": draft.id, "at": draft.hastens_to} for draft in drafts if draft.hastens_to],
        )
        await drafts_repository.postpone_launches(conn, [self._later(draft) for draft in drafts if draft.postponed])
        await repository.release_waiting(
            conn, self.customer_id, self.matched + self.called_off, outcome="handled", reason=None
        )
        await repository.add_penalties(
            conn,
            pools.penalties(self.customer_id, self.pool_signals),
            half_life_seconds=pools.HALF_LIFE_SECONDS,
            ceiling=pools.CEILING,
        )

    def _shorter(self, draft: Draft) -> dict[str, Any]:
        known = draft.known
        return {
            "interruption_id": draft.id,
            "deadline_at": known.deadline_at,
            "grace_seconds": grace_seconds(known.deadline_at, known.action, now=self.now),
        }

    def _later(self, draft: Draft) -> dict[str, Any]:
        ends_at = draft.known.deadline_at
        return {
            "interruption_id": draft.id,
            "was_at": draft.postponed_from,
            "at": maintenance_launch_at(ends_at),
            "deadline_at": ends_at + LAUNCH_WINDOW,
        }

    def _intent(self, draft: Draft) -> dict[str, Any]:
        return {
            "id": new_id(),
            "customer_id": self.customer_id,
            "cluster_id": draft.identity["cluster_id"],
            "interruption_id": draft.id,
            "requirements": draft.launch,
            "state": "planned",
            "deadline_at": max(draft.known.deadline_at, self.now, draft.act_at or self.now) + LAUNCH_WINDOW,
            "next_action_at": draft.act_at or self.now,
        }
