"""What happens to events: one transaction per receive batch, whatever brought them.

SQS, the push endpoint, agents and the poll of instance states all end in ``ingest_outcomes``. The message may be
deleted, and bells rung, only after it returned.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from control.agents.repository import NewTask, create_tasks
from control.bus.bells import Bells
from control.interruptions import metrics, pools, repository
from control.interruptions.parsing import (
    Drop,
    Outcome,
    ParsedEvent,
    Quarantine,
    QueueOwner,
    kept_body,
    parse,
)
from control.interruptions.policies import (
    SOFT_KINDS,
    Act,
    Decision,
    NodeFacts,
    Policy,
    decide,
    interruption_key,
    policies_from_config,
)
from control.interruptions.repository import CustomerFacts, InterruptionRow
from warehouse.contracts import EventKind, EventSource, InterruptionAction, TaskType
from warehouse.postgres.models import new_id
from warehouse.postgres.session import Database, narrow, widen

log = structlog.get_logger(__name__)

# Interruption work is served before everything else of equal deadline.
DRAIN_PRIORITY = 0
# Pods get their own grace up to here; what is left of the two minutes is for what ignores it.
GRACE_MARGIN_SECONDS = 20
MIN_GRACE_SECONDS = 5
# The ladder of a replacement ends this long after the deadline: later, the cluster has helped itself.
LAUNCH_WINDOW = timedelta(minutes=15)
# More than this in quarantine within an hour is told to the customer.
QUARANTINE_ALARM_PER_HOUR = 10
FACTS_SECONDS = 5.0
# A state change this long after a notice is what the notice announced. EC2 leaves two minutes, queues add some.
COMES_TRUE_WITHIN = timedelta(minutes=15)
# A node that was drained for a maintenance, or on a recommendation, is back at work or gone after this long.
MAINTENANCE_TAKES = timedelta(hours=1)
# Characters parsed without a pause: a customer's large bodies must not hold up the others of this process.
PARSED_AT_ONCE = 256 * 1024
# Two batches may still meet on one row; Postgres picks the victim, which starts again. A history row whose
# interruption somebody else inserted first shows as a foreign key violation.
RETRIES = 5
RETRIED_STATES = {"40001", "40P01", "23503"}

_STRENGTH = {
    EventKind.SPOT_INTERRUPTION: 3,
    EventKind.CAPACITY_RESERVATION_INTERRUPTION: 3,
    EventKind.INSTANCE_STATE_CHANGE: 2,
}
_CAPACITY_OF_TYPE = re.compile(r"sufficient ([a-z0-9-]{1,32}\.[a-z0-9-]{1,32}) capacity")


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came. ``sent_at`` is when the queue got it."""

    body: str | bytes
    source: EventSource
    sqs_message_id: str | None = None
    sent_at: datetime | None = None
    receive_count: int = 1
    # Whoever told us may speak for this cluster only (an agent's key).
    cluster_id: UUID | None = None


@dataclass(slots=True)
class Ingested:
    """What a batch became. ``clusters`` have new tasks: ring their bells, now that it is committed."""

    new: int = 0
    duplicates: int = 0
    handled: int = 0
    waiting: int = 0
    dropped: int = 0
    quarantined: int = 0
    interruptions: list[UUID] = field(default_factory=list)
    clusters: set[UUID] = field(default_factory=set)
    launches: bool = False

    def add(self, other: Ingested) -> None:
        """Count another batch in."""
        for name in ("new", "duplicates", "handled", "waiting", "dropped", "quarantined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.interruptions += other.interruptions
        self.clusters |= other.clusters
        self.launches |= other.launches

    async def ring(self, bells: Bells | None) -> None:
        """Wake agents, launchers and the outbox."""
        if bells is None or not self.new:
            return
        for cluster_id in self.clusters:
            await bells.ring("tasks", cluster_id)
        if self.launches:
            await bells.ring("launches")
        await bells.ring("outbox")


class UnknownCustomer(LookupError):
    """No customer has this id."""


class Facts:
    """Customers' facts, read again every five seconds."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._known: dict[UUID, tuple[float, CustomerFacts]] = {}

    async def of(self, customer_id: UUID) -> CustomerFacts:
        """Facts of one customer.

        Raises:
            UnknownCustomer: there is no such customer.
        """
        known = self._known.get(customer_id)
        if known and time.monotonic() - known[0] < FACTS_SECONDS:
            return known[1]
        async with self._db.tenant(customer_id) as conn:
            facts = await repository.customer_facts(conn, customer_id)
        if facts is None:
            raise UnknownCustomer(f"no customer {customer_id}")
        self._known[customer_id] = (time.monotonic(), facts)
        return facts


async def ingest(
    db: Database,
    facts: CustomerFacts,
    messages: Sequence[Received],
    *,
    queue_region: str = "",
    now: datetime | None = None,
) -> Ingested:
    """Take a batch of raw messages of one customer in: parsed, judged and committed in one transaction.

    Args:
        facts: the customer the queue belongs to; never taken from the body.
        queue_region: where the queue is; events may come from there besides the regions of the customer's clusters.
    """
    now = now or db.now()
    owner = queue_owner(facts, queue_region)
    outcomes: list[tuple[Received, Outcome]] = []
    parsed = 0
    for message in messages:
        outcomes.append((message, parse(message.body, owner=owner, received_at=now, sent_at=message.sent_at)))
        parsed += len(message.body)
        if parsed > PARSED_AT_ONCE:
            parsed = 0
            await asyncio.sleep(0)
    return await ingest_outcomes(db, facts, outcomes, now=now)


def queue_owner(facts: CustomerFacts, queue_region: str = "") -> QueueOwner:
    """Whose message it is, before its body is read. A customer without clusters may be told of any region."""
    regions = facts.regions | {queue_region} if facts.regions and queue_region else facts.regions
    return QueueOwner(facts.account_id, regions, queue_region)


async def ingest_outcomes(
    db: Database, facts: CustomerFacts, outcomes: Sequence[tuple[Received, Outcome]], *, now: datetime
) -> Ingested:
    """Commit what messages mean. Safe to call again with the same messages, from any number of processes.

    Raises:
        sqlalchemy.exc.DBAPIError: Postgres is away; nothing was taken in and the messages must stay where they are.
    """
    if not outcomes:
        return Ingested()
    started = time.perf_counter()
    for attempt in range(RETRIES):
        try:
            async with db.tenant(facts.customer_id) as conn:
                batch = Batch(facts, now)
                done = await batch.commit(conn, outcomes)
            break
        except Raced:
            continue
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in RETRIED_STATES or attempt == RETRIES - 1:
                raise
            await asyncio.sleep(0.01 * (attempt + 1))
    else:
        raise RuntimeError(f"a batch met other writers {RETRIES} times; it stays in its queue")
    metrics.COMMIT_SECONDS.observe(time.perf_counter() - started)
    batch.observe()
    return done


class Raced(Exception):
    """Somebody else inserted the same interruption in the meantime: read again and merge."""


@dataclass(slots=True)
class _Draft:
    """An interruption being made or changed in this transaction."""

    row: dict[str, Any]
    new: bool
    changed: bool = False
    drain: NodeFacts | None = None
    launch: dict[str, Any] | None = None
    act_at: datetime | None = None
    shortened: bool = False

    @property
    def id(self) -> UUID:
        return self.row["id"]


class Batch:
    """One transaction's worth of messages of one customer."""

    def __init__(self, facts: CustomerFacts, now: datetime) -> None:
        self.facts, self.now = facts, now
        self.policies = policies_from_config(facts.event_policies)
        self.drafts: list[_Draft] = []
        self._by_instance: dict[str, list[_Draft]] = {}
        self._last_entry: dict[UUID, dict[str, Any]] = {}
        self.inbox: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.links: list[dict[str, Any]] = []
        self.outbox: list[dict[str, Any]] = []
        self.gone: list[dict[str, Any]] = []
        self.hooks: list[dict[str, Any]] = []
        self.hastened: list[UUID] = []
        self.matched: list[UUID] = []
        self.pool_signals: list[tuple[str, str, str, str]] = []
        self.counts: list[tuple[str, str, str]] = []
        self.lags: list[float] = []
        self.security: list[tuple[str, str]] = []
        self.alarm = False

    async def commit(self, conn: AsyncConnection, outcomes: Sequence[tuple[Received, Outcome]]) -> Ingested:
        """All of it, on a connection in the customer's scope: one statement reads, one writes."""
        customer_id = self.facts.customer_id
        context, nodes = await self._read(conn, outcomes)
        known = {(source, key) for source, key in context.known}
        earlier = {signals.instance_id: (signals.kinds, signals.event_ids) for signals in context.earlier}
        for locked in context.locked:
            self._add(_Draft(_as_dict(locked), new=False))

        first: dict[tuple[str, str], tuple[Received, Outcome, list[tuple[str, Decision]]]] = {}
        again: list[dict[str, Any]] = []
        labels: dict[tuple[str, str], str] = {}
        for message, outcome in outcomes:
            judged, decisions = self._judge(message, outcome, nodes)
            key = (message.source.value, judged.dedupe_key)
            if key in first or key in known:
                again.append({"source": key[0], "dedupe_key": key[1], "receive_count": message.receive_count})
                continue
            first[key] = (message, judged, decisions)
            row, labels[key] = self._inbox_row(message, judged, decisions)
            self.inbox.append(row)
        await repository.count_again(conn, customer_id, again)

        done = Ingested(new=len(first), duplicates=len(again))
        for row in self.inbox:
            key = (row["source"], row["dedupe_key"])
            message, judged, decisions = first[key]
            setattr(done, row["outcome"], getattr(done, row["outcome"]) + 1)
            self.counts.append((row["source"], row["outcome"], labels[key]))
            if isinstance(judged, ParsedEvent):
                self._act(message, judged, decisions, nodes, earlier)
                self.lags.append((self.now - judged.occurred_at).total_seconds())
            elif isinstance(judged, Quarantine) and judged.security:
                self.security.append((judged.reason, judged.detail))
        self.counts += [(row["source"], "duplicate", "") for row in again]
        await self._persist(conn)
        done.interruptions = [draft.id for draft in self.drafts if draft.new]
        done.clusters = {draft.drain.cluster_id for draft in self.drafts if draft.drain}
        done.launches = bool(self.hastened) or any(draft.launch for draft in self.drafts)
        if done.quarantined:
            lately = await repository.quarantined_last_hour(conn, customer_id)
            # Once, when the limit is crossed: a flood of poison must not become a flood of alarms.
            self.alarm = lately - done.quarantined <= QUARANTINE_ALARM_PER_HOUR < lately
        return done

    async def _read(
        self, conn: AsyncConnection, outcomes: Sequence[tuple[Received, Outcome]]
    ) -> tuple[repository.Context, dict[str, NodeFacts]]:
        """What is known of a batch's messages and instances, other tenants' instances included."""
        customer_id = self.facts.customer_id
        instance_ids: set[str] = set()
        keys: set[str] = set()
        for _, outcome in outcomes:
            if isinstance(outcome, ParsedEvent):
                instance_ids.update(outcome.instance_ids)
                stopped = InterruptionAction.STOP
                keys.update(interruption_key(outcome, i, stopped) for i in outcome.instance_ids)
        context = await repository.read_context(
            conn,
            customer_id,
            instance_ids=sorted(instance_ids),
            keys=sorted(keys | instance_ids),
            messages=sorted({(message.source.value, outcome.dedupe_key) for message, outcome in outcomes}),
        )
        nodes = repository.best_nodes(context.nodes, customer_id)
        strange = instance_ids - set(nodes)
        if strange:
            # Nobody's, or another tenant's: that one must be seen to be refused, and only its owner is read.
            await widen(conn)
            nodes |= await repository.nodes_of_instances(conn, customer_id, sorted(strange))
            await narrow(conn, customer_id)
        return context, nodes

    def _add(self, draft: _Draft) -> None:
        self.drafts.append(draft)
        self._by_instance.setdefault(draft.row["instance_id"], []).append(draft)

    async def rematch(self, conn: AsyncConnection, rows: Sequence[InterruptionRow]) -> Ingested:
        """Give unmatched interruptions, locked by the caller, to the nodes that registered since."""
        nodes = await repository.nodes_of_instances(
            conn, self.facts.customer_id, sorted({row.instance_id for row in rows})
        )
        await narrow(conn, self.facts.customer_id)
        done = Ingested()
        for row in rows:
            node = nodes.get(row.instance_id)
            if node is None or node.customer_id != self.facts.customer_id:
                continue
            draft = _Draft(_as_dict(row), new=False)
            self._add(draft)
            event = ParsedEvent(
                kind=EventKind(row.kind),
                dedupe_key="",
                region=row.region,
                account_id=row.account_id,
                occurred_at=row.notice_at,
                instance_ids=(row.instance_id,),
                action=InterruptionAction(row.instance_action),
            )
            decision = decide(event, row.instance_id, node, self.policies, self.now)
            if decision.act is Act.INTERRUPT:
                self._merge(draft, event, decision, node, row.detected_by[0])
        await self._persist(conn)
        done.new = len(self.matched)
        done.clusters = {draft.drain.cluster_id for draft in self.drafts if draft.drain}
        done.launches = any(draft.launch for draft in self.drafts)
        return done

    async def replay(
        self, conn: AsyncConnection, message: Received, outcome: Outcome
    ) -> tuple[str, str | None, Ingested]:
        """Act on a message whose inbox row exists and is locked; returns its new outcome and reason."""
        context, nodes = await self._read(conn, [(message, outcome)])
        for locked in context.locked:
            self._add(_Draft(_as_dict(locked), new=False))
        judged, decisions = self._judge(message, outcome, nodes)
        row, label = self._inbox_row(message, judged, decisions)
        done = Ingested(new=1)
        if isinstance(judged, ParsedEvent):
            self._act(message, judged, decisions, nodes, {})
            await self._persist(conn)
            done.interruptions = [draft.id for draft in self.drafts if draft.new or draft.changed]
            done.clusters = {draft.drain.cluster_id for draft in self.drafts if draft.drain}
            done.launches = any(draft.launch for draft in self.drafts)
        self.counts.append((row["source"], row["outcome"], label))
        return row["outcome"], row["reason"], done

    def observe(self) -> None:
        """Count and log, once the transaction is committed."""
        for source, outcome, reason in self.counts:
            metrics.MESSAGES.labels(source, outcome).inc()
            if outcome == "dropped":
                metrics.DROPPED.labels(reason).inc()
            elif outcome == "quarantined":
                metrics.QUARANTINED.labels(reason).inc()
        if self.alarm:
            metrics.ALARMS.labels("quarantine").inc()
            log.warning(
                "quarantine.many", customer_id=str(self.facts.customer_id), per_hour_limit=QUARANTINE_ALARM_PER_HOUR
            )
        for lag in self.lags:
            metrics.RECEIVE_LAG_SECONDS.observe(max(lag, 0.0))
        for reason, detail in self.security:
            metrics.SECURITY_ALARMS.labels(reason).inc()
            log.error("intake.security_alarm", customer_id=str(self.facts.customer_id), reason=reason, detail=detail)

    # --- judging

    def _judge(
        self, message: Received, outcome: Outcome, nodes: dict[str, NodeFacts]
    ) -> tuple[Outcome, list[tuple[str, Decision]]]:
        if not isinstance(outcome, ParsedEvent):
            return outcome, []
        event_type = outcome.kind.value
        if self.facts.status in ("suspended", "offboarded"):
            return Drop(f"customer_{self.facts.status}", outcome.dedupe_key, event_type), []
        decisions: list[tuple[str, Decision]] = []
        foreign = 0
        for instance_id in outcome.instance_ids:
            node = nodes.get(instance_id)
            if node is not None and (
                node.customer_id != self.facts.customer_id or message.cluster_id not in (None, node.cluster_id)
            ):
                foreign += 1
                continue
            decisions.append((instance_id, decide(outcome, instance_id, node, self.policies, self.now)))
        if foreign and not decisions:
            return (
                Quarantine(
                    "foreign_instance",
                    "the instance is a node of another cluster than the agent's"
                    if message.cluster_id
                    else "the instance belongs to a node of another customer",
                    "sha256:" + _sha256(message.body),
                    event_type,
                    security=True,
                ),
                [],
            )
        if decisions and all(decision.act is Act.DROP for _, decision in decisions):
            return Drop("cluster_deleted", outcome.dedupe_key, event_type), []
        return outcome, decisions

    def _inbox_row(
        self, message: Received, outcome: Outcome, decisions: list[tuple[str, Decision]]
    ) -> tuple[dict[str, Any], str]:
        """The message's row, and its reason as a metric's label."""
        state: str
        reason: str | None
        kind: str | None
        match outcome:
            case Drop():
                state, reason, label, kind = "dropped", outcome.reason, outcome.reason, outcome.event_type
            case Quarantine():
                state, kind = "quarantined", outcome.event_type
                reason, label = f"{outcome.reason}: {outcome.detail}", outcome.reason
            case ParsedEvent():
                waiting = any(decision.act is Act.UNMATCHED for _, decision in decisions)
                state, kind = ("waiting" if waiting else "handled"), outcome.kind.value
                reason, label = ", ".join(sorted(outcome.flags)) or None, ""
        row = {
            "customer_id": self.facts.customer_id,
            "source": message.source.value,
            "dedupe_key": outcome.dedupe_key,
            "sqs_message_id": message.sqs_message_id,
            "receive_count": message.receive_count,
            "body_sha256": _sha256(message.body),
            "event_type": kind,
            "outcome": state,
            "reason": reason,
            "body": kept_body(message.body) if state in ("quarantined", "waiting") else None,
            "sent_at": message.sent_at,
            "received_at": self.now,
        }
        return row, label

    # --- acting

    def _act(
        self,
        message: Received,
        event: ParsedEvent,
        decisions: list[tuple[str, Decision]],
        nodes: dict[str, NodeFacts],
        earlier: dict[str, tuple[list[str], list[UUID]]],
    ) -> None:
        single = len(event.instance_ids) <= 1
        concerned: Sequence[tuple[str | None, Decision | None]] = decisions or [(None, None)]
        for instance_id, decision in concerned:
            self._apply(message, event, instance_id, decision, nodes, earlier, single=single)

    async def _persist(self, conn: AsyncConnection) -> None:
        """Write everything that was decided.

        Raises:
            Raced: another consumer was first with one of the rows.
        """
        customer_id = self.facts.customer_id
        states = {draft.id: draft.row["state"] for draft in self.drafts}
        alone = await repository.write_batch(
            conn,
            customer_id,
            inbox=self.inbox,
            fresh=[draft.row for draft in self.drafts if draft.new],
            changed=[draft.row for draft in self.drafts if draft.changed and not draft.new],
            history=[entry | {"state": states[entry["interruption_id"]]} for entry in self.history],
            intents=[self._intent(draft) for draft in self.drafts if draft.launch],
            events=self.events,
            links=self.links,
            gone=self.gone,
            outbox=self.outbox,
        )
        if not alone:
            raise Raced
        drains = [draft for draft in self.drafts if draft.drain]
        await repository.retire_drains(conn, [draft.id for draft in drains if not draft.new])
        await create_tasks(conn, [self._drain_task(draft) for draft in drains])
        await repository.shorten_deadlines(
            conn,
            [
                {"interruption_id": draft.id, "deadline_at": draft.row["deadline_at"]}
                for draft in self.drafts
                if draft.shortened
            ],
        )
        await repository.insert_hooks(conn, self.hooks)
        await repository.hasten_launches(conn, self.hastened, now=self.now)
        await repository.release_waiting(conn, customer_id, self.matched, outcome="handled", reason=None)
        await repository.add_penalties(
            conn,
            pools.penalties(customer_id, self.pool_signals),
            half_life_seconds=pools.HALF_LIFE_SECONDS,
            ceiling=pools.CEILING,
        )

    def _find(self, instance_id: str, decision: Decision, event: ParsedEvent) -> _Draft | None:
        """The interruption that a signal about an instance belongs to, or None: it is the first word of a new one."""
        mine = self._by_instance.get(instance_id, [])
        if event.kind is EventKind.INSTANCE_STATE_CHANGE:
            # What was announced has come true, though it may have been handled and closed by now: a stop's or
            # hibernation's key carries the minute of its notice, not of its end.
            announced = [
                d
                for d in mine
                if not _left_alive(d.row, self.now) and d.row["notice_at"] > event.occurred_at - COMES_TRUE_WITHIN
            ]
            if announced:
                return max(announced, key=lambda draft: draft.row["notice_at"])
        for draft in mine:
            if decision.key and draft.row["interruption_key"] == decision.key:
                return draft
        # Any signal about an instance with an interruption under way belongs to that one.
        for draft in mine:
            if draft.row["state"] != "closed":
                return draft
        if not decision.key:
            return mine[0] if mine else None
        if decision.action is InterruptionAction.TERMINATE:
            # An instance ends once: nothing is to be done again about one that was told to end, or was drained.
            for draft in mine:
                if draft.row["instance_action"] == decision.action.value and not _left_alive(draft.row, self.now):
                    return draft
        return None

    def _apply(
        self,
        message: Received,
        event: ParsedEvent,
        instance_id: str | None,
        decision: Decision | None,
        nodes: dict[str, NodeFacts],
        earlier: dict[str, tuple[list[str], list[UUID]]],
        *,
        single: bool,
    ) -> None:
        node = nodes.get(instance_id) if instance_id else None
        draft = self._find(instance_id, decision, event) if instance_id and decision else None
        label = _label(message.source, event.kind)
        if instance_id and decision and decision.act in (Act.INTERRUPT, Act.UNMATCHED):
            if draft is None:
                draft = self._create(event, instance_id, decision, node, label)
                kinds, event_ids = earlier.get(instance_id, ([], []))
                draft.row["detected_by"] += [kind for kind in kinds if kind not in draft.row["detected_by"]]
                self.links += [{"id": event_id, "interruption_id": draft.id} for event_id in event_ids]
            else:
                self._merge(draft, event, decision, node, label)
        elif draft is not None and label not in draft.row["detected_by"]:
            self._change(draft, "detected_again", {"by": label})
            draft.row["detected_by"] = [*draft.row["detected_by"], label]
        if event.state == "terminated" and node is not None:
            self.gone.append({"instance_id": instance_id, "at": event.occurred_at})
        self._score(event, decision, node)
        if instance_id and decision and decision.answers_hook:
            self.hooks.append(self._hook(event, instance_id, draft, node))
        self.events.append(
            {
                "id": new_id(),
                "customer_id": self.facts.customer_id,
                "cluster_id": node.cluster_id if node else None,
                "event_type": event.kind.value,
                "instance_id": instance_id,
                "received_at": self.now,
                "occurred_at": event.occurred_at,
                "source": message.source.value,
                "dedupe_key": event.dedupe_key if single else f"{event.dedupe_key}#{instance_id}",
                "interruption_id": draft.id if draft else None,
                "action_taken": decision.reason if decision else "counted",
                "payload": event.detail,
            }
        )

    def _create(
        self, event: ParsedEvent, instance_id: str, decision: Decision, node: NodeFacts | None, label: str
    ) -> _Draft:
        draft = _Draft(
            {
                "id": new_id(),
                "customer_id": self.facts.customer_id,
                "cluster_id": node.cluster_id if node else None,
                "node_id": node.node_id if node else None,
                "region": node.region if node else event.region,
                "interruption_key": decision.key,
                "account_id": event.account_id,
                "instance_id": instance_id,
                "instance_type": node.instance_type if node else None,
                "availability_zone": node.availability_zone if node else None,
                "instance_action": decision.action.value,
                "kind": event.kind.value,
                "notice_at": event.occurred_at,
                "received_at": self.now,
                "deadline_at": decision.deadline_at,
                "detected_by": [label],
                "state": "open" if node else "unmatched",
                "outcome": None,
                "reason": None,
                "drain_pending": decision.drain_after_launch,
                "instance_gone_at": self.now if decision.gone else None,
                "closed_at": None,
                "version": 1,
            },
            new=True,
        )
        self._add(draft)
        self._write_history(draft, "detected", {"by": label, "flags": sorted(event.flags)})
        if node:
            self._begin(draft, event, decision, node)
        return draft

    def _begin(self, draft: _Draft, event: ParsedEvent, decision: Decision, node: NodeFacts) -> None:
        if decision.wants_drain and node.node_name:
            draft.drain = node
        if decision.wants_launch:
            draft.launch = {
                "instance_id": node.instance_id,
                "instance_type": node.instance_type,
                "availability_zone": node.availability_zone,
                "node_type": node.node_type,
                # A Spot instance that ended without a warning may have been ended by its owner: ask before replacing.
                "verify_ended_by_aws": event.kind is EventKind.INSTANCE_STATE_CHANGE,
            }
            draft.act_at = decision.act_at
        self.outbox.append(
            {
                "id": new_id(),
                "customer_id": self.facts.customer_id,
                "topic": "spot.interruption.detected",
                "payload": {
                    "interruption_id": draft.id,
                    "customer_id": self.facts.customer_id,
                    "cluster_id": node.cluster_id,
                    "instance_id": node.instance_id,
                    "instance_type": node.instance_type,
                    "availability_zone": node.availability_zone,
                    "kind": event.kind.value,
                    "instance_action": decision.action.value,
                    "notice_at": draft.row["notice_at"],
                    "deadline_at": draft.row["deadline_at"],
                },
            }
        )
        if node.node_type == "spot" and event.kind in (
            EventKind.SPOT_INTERRUPTION,
            EventKind.INSTANCE_STATE_CHANGE,
        ):
            self.pool_signals.append((node.region, node.availability_zone, node.instance_type, "interruption"))

    def _merge(self, draft: _Draft, event: ParsedEvent, decision: Decision, node: NodeFacts | None, label: str) -> None:
        row = draft.row
        was_unmatched = row["state"] == "unmatched" or row["outcome"] == "unmatched"
        if was_unmatched and node is not None:
            self._change(draft, "matched", {"by": label})
            self.matched.append(draft.id)
            row |= {
                "state": "open",
                "outcome": None,
                "reason": None,
                "closed_at": None,
                "cluster_id": node.cluster_id,
                "node_id": node.node_id,
                "instance_type": node.instance_type,
                "availability_zone": node.availability_zone,
                "deadline_at": decision.deadline_at,
                "drain_pending": decision.drain_after_launch,
            }
            self._begin(draft, event, decision, node)
        elif row["state"] == "open" and node is not None:
            self._escalate(draft, event, decision, node, label)
        if decision.gone and row["instance_gone_at"] is None:
            self._change(draft, "instance_gone", {"by": label})
            row["instance_gone_at"] = self.now
        if label not in row["detected_by"]:
            self._change(draft, "detected_again", {"by": label})
            row["detected_by"] = [*row["detected_by"], label]

    def _escalate(self, draft: _Draft, event: ParsedEvent, decision: Decision, node: NodeFacts, label: str) -> None:
        """A more urgent signal about an interruption under way: rebalance first, then the warning."""
        row = draft.row
        stronger = _STRENGTH.get(event.kind, 1) > _STRENGTH.get(EventKind(row["kind"]), 1)
        if stronger:
            self._change(draft, "escalated", {"by": label, "kind": event.kind.value})
            row["kind"], row["instance_action"] = event.kind.value, decision.action.value
            if decision.wants_launch and decision.act_at is None:
                # A replacement planned for the day of a maintenance is wanted now.
                self.hastened.append(draft.id)
        if decision.wants_drain and node.node_name and (stronger or row["drain_pending"]):
            draft.drain = node
            row["drain_pending"] = False
        if decision.deadline_at and not decision.gone and decision.deadline_at < row["deadline_at"]:
            if not draft.changed:
                self._change(draft, "deadline_moved", {"by": label})
            row["deadline_at"] = decision.deadline_at
            draft.shortened = True

    def _change(self, draft: _Draft, event: str, detail: dict[str, Any]) -> None:
        # One version per transaction; further events of it are told in the same history row's detail.
        if draft.changed or draft.new:
            self._last_entry[draft.id]["detail"].setdefault("also", []).append({"event": event} | detail)
            return
        draft.changed = True
        draft.row["version"] += 1
        self._write_history(draft, event, detail)

    def _write_history(self, draft: _Draft, event: str, detail: dict[str, Any]) -> None:
        entry = {
            "customer_id": self.facts.customer_id,
            "interruption_id": draft.id,
            "version": draft.row["version"],
            "at": self.now,
            "event": event,
            "detail": detail,
        }
        self.history.append(entry)
        self._last_entry[draft.id] = entry

    def _drain_task(self, draft: _Draft) -> NewTask:
        assert draft.drain is not None
        return drain_task(
            draft.id,
            draft.drain,
            draft.row["deadline_at"],
            InterruptionAction(draft.row["instance_action"]),
            now=self.now,
        )

    def _intent(self, draft: _Draft) -> dict[str, Any]:
        assert draft.launch is not None
        return {
            "id": new_id(),
            "customer_id": self.facts.customer_id,
            "cluster_id": draft.row["cluster_id"],
            "interruption_id": draft.id,
            "requirements": draft.launch,
            "state": "planned",
            "deadline_at": max(draft.row["deadline_at"], self.now, draft.act_at or self.now) + LAUNCH_WINDOW,
            "next_action_at": draft.act_at or self.now,
        }

    def _score(self, event: ParsedEvent, decision: Decision | None, node: NodeFacts | None) -> None:
        policy = self.policies[event.kind]
        if policy is Policy.IGNORE:
            return
        if event.kind is EventKind.REBALANCE_RECOMMENDATION and node is not None:
            self.pool_signals.append((node.region, node.availability_zone, node.instance_type, "rebalance"))
        if event.kind is EventKind.SPOT_INTERRUPTION and policy is Policy.SCORE and node is not None:
            # Nothing is done about it, and the pool is what it is.
            self.pool_signals.append((node.region, node.availability_zone, node.instance_type, "interruption"))
        if event.kind is EventKind.LAUNCH_UNSUCCESSFUL:
            details = event.detail.get("Details")
            zone = details.get("Availability Zone") if isinstance(details, dict) else None
            lacking = _CAPACITY_OF_TYPE.search(str(event.detail.get("StatusMessage", "")))
            if isinstance(zone, str) and lacking:
                self.pool_signals.append((event.region, zone, lacking.group(1), "refusal"))

    def _hook(
        self, event: ParsedEvent, instance_id: str, draft: _Draft | None, node: NodeFacts | None
    ) -> dict[str, Any]:
        return {
            "customer_id": self.facts.customer_id,
            "token": str(event.detail["LifecycleActionToken"]),
            "region": node.region if node else event.region,
            "group_name": str(event.detail["AutoScalingGroupName"]),
            "hook_name": str(event.detail["LifecycleHookName"]),
            "instance_id": instance_id,
            "transition": "launching" if event.kind is EventKind.ASG_LAUNCH else "terminating",
            "interruption_id": draft.id if draft else None,
            "received_at": self.now,
            "next_action_at": self.now,
        }


def drain_task(
    interruption_id: UUID, node: NodeFacts, deadline_at: datetime, action: InterruptionAction, *, now: datetime
) -> NewTask:
    """The drain of an interrupted node: one per interruption, with what the agent must find there."""
    assert node.node_name is not None
    left = (deadline_at - now).total_seconds()
    grace = MIN_GRACE_SECONDS if action is InterruptionAction.HIBERNATE else left - GRACE_MARGIN_SECONDS
    return NewTask(
        customer_id=node.customer_id,
        cluster_id=node.cluster_id,
        task_type=TaskType.DRAIN_NODE,
        parameters={
            "node_name": node.node_name,
            "instance_id": node.instance_id,
            "grace_seconds": int(max(grace, MIN_GRACE_SECONDS)),
            "force_at_deadline": True,
        },
        dedupe_key=f"drain:{interruption_id}",
        priority=DRAIN_PRIORITY,
        deadline_at=deadline_at,
        interruption_id=interruption_id,
    )


def _left_alive(row: Mapping[str, Any], now: datetime) -> bool:
    """Whether an interruption is over and its node lives on, so that what comes later about it is news: it was kept, or
    was drained for a maintenance so long ago that it is back at work."""
    if row["state"] != "closed" or EventKind(row["kind"]) not in SOFT_KINDS:
        return False
    drained = row["outcome"] in ("handled", "handled_late")
    return not drained or (row["closed_at"] is not None and now - row["closed_at"] > MAINTENANCE_TAKES)


def _label(source: EventSource, kind: EventKind) -> str:
    """How a detector is named in ``detected_by``: warnings by who told us, other signals by what they are."""
    if kind is EventKind.SPOT_INTERRUPTION or source in (EventSource.AGENT, EventSource.POLL):
        return source.value
    return kind.value


def _as_dict(row: InterruptionRow) -> dict[str, Any]:
    # Columns that were not read are only ever filled, never emptied.
    unread = {"node_id": None, "instance_type": None, "availability_zone": None}
    return {name: getattr(row, name) for name in InterruptionRow.__slots__} | unread


def _sha256(body: str | bytes) -> str:
    return hashlib.sha256(body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")).hexdigest()
