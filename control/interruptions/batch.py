"""One transaction's worth of messages of one customer: read what is known, judge, merge, write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions import metrics, repository
from control.interruptions.drafts import Draft, Drafts
from control.interruptions.judging import Decisions, inbox_row, judge
from control.interruptions.merging import STRENGTH
from control.interruptions.messages import Ingested, Received, label_of
from control.interruptions.parsing import Outcome, ParsedEvent, Quarantine, remembered
from control.interruptions.policies import (
    Act,
    Decision,
    NodeFacts,
    Policy,
    decide,
    interruption_key,
    policies_from_config,
)
from control.interruptions.repository import CustomerFacts, InterruptionRow
from warehouse.contracts import EventKind, InterruptionAction
from warehouse.postgres.models import new_id
from warehouse.postgres.session import narrow, widen

log = structlog.get_logger(__name__)

# More than this in quarantine within an hour is told to the customer.
QUARANTINE_ALARM_PER_HOUR = 10

_CAPACITY_OF_TYPE = re.compile(r"sufficient ([a-z0-9-]{1,32}\.[a-z0-9-]{1,32}) capacity")

Nodes = Mapping[str, NodeFacts]
Earlier = Mapping[str, repository.Earlier]


class Batch:
    """One transaction's worth of messages of one customer."""

    def __init__(self, facts: CustomerFacts, now: datetime) -> None:
        self.facts, self.now = facts, now
        self.policies = policies_from_config(facts.event_policies)
        self.drafts = Drafts(facts.customer_id, now)
        self.inbox: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.gone: list[dict[str, Any]] = []
        self.hooks: list[dict[str, Any]] = []
        self.counts: list[tuple[str, str, str]] = []
        self.lags: list[float] = []
        self.security: list[tuple[str, str]] = []
        self.alarm = False

    async def commit(self, conn: AsyncConnection, outcomes: Sequence[tuple[Received, Outcome]]) -> Ingested:
        """All of it, on a connection in the customer's scope: one statement reads, one writes.

        Raises:
            Raced: another consumer was first with one of the rows; begin again in a new transaction.
        """
        customer_id = self.facts.customer_id
        context, nodes = await self._read(conn, outcomes)
        known = {(source, key) for source, key in context.known}
        earlier = {signals.instance_id: signals for signals in context.earlier}

        first: dict[tuple[str, str], tuple[Received, Outcome, Decisions]] = {}
        fresh: dict[tuple[str, str], dict[str, Any]] = {}
        again: list[dict[str, Any]] = []
        duplicates: list[str] = []
        labels: dict[tuple[str, str], str] = {}
        for message, outcome in outcomes:
            judged, decisions = self._judge(message, outcome, nodes)
            key = (message.source.value, judged.dedupe_key)
            if key in known or key in fresh:
                duplicates.append(message.source.value)
            if key in known:
                again.append({"source": key[0], "dedupe_key": key[1], "receive_count": message.receive_count})
                continue
            if key in fresh:
                row = fresh[key]
                row["receive_count"] = max(row["receive_count"] + 1, message.receive_count)
                continue
            first[key] = (message, judged, decisions)
            fresh[key], labels[key] = inbox_row(message, judged, decisions, self.facts, self.now)
        self.inbox += fresh.values()
        await repository.count_again(conn, customer_id, again)

        done = Ingested(new=len(first), duplicates=len(duplicates))
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
        self.counts += [(source, "duplicate", "") for source in duplicates]
        await self._persist(conn)
        done.interruptions = [draft.id for draft in self.drafts.all if draft.new]
        done.clusters, done.launches = self.drafts.clusters, self.drafts.launches
        if done.quarantined:
            lately = await repository.quarantined_last_hour(conn, customer_id)
            # Once, when the limit is crossed: a flood of poison must not become a flood of alarms.
            self.alarm = lately - done.quarantined <= QUARANTINE_ALARM_PER_HOUR < lately
        return done

    async def rematch(self, conn: AsyncConnection, rows: Sequence[InterruptionRow]) -> Ingested:
        """Give unmatched interruptions, locked by the caller, to the nodes that registered since, with all that was
        said about them."""
        nodes = await repository.nodes_of_instances(
            conn, self.facts.customer_id, sorted({row.instance_id for row in rows})
        )
        said = await repository.signals_of(conn, self.facts.customer_id, [row.id for row in rows])
        await narrow(conn, self.facts.customer_id)
        for row in rows:
            node = nodes.get(row.instance_id)
            if node is None or node.customer_id != self.facts.customer_id:
                continue
            draft = self.drafts.load(row)
            signals = [
                remembered(
                    EventKind(signal.event_type),
                    row.instance_id,
                    action=InterruptionAction(row.instance_action),
                    region=row.region,
                    account_id=row.account_id,
                    occurred_at=signal.occurred_at,
                    received_at=signal.received_at,
                    detail=signal.payload,
                )
                for signal in said.get(row.id, ())
            ]
            # The sharpest first: it decides, the others add what they know, in the order they were said.
            for event in sorted(signals, key=lambda event: (-STRENGTH.get(event.kind, 0), event.occurred_at)):
                decision = decide(event, row.instance_id, node, self.policies, self.now)
                if decision.act is Act.INTERRUPT:
                    self.drafts.merge(draft, event, decision, node, row.detected_by[0])
        await self._persist(conn)
        return Ingested(new=len(self.drafts.matched), clusters=self.drafts.clusters, launches=self.drafts.launches)

    async def replay(
        self, conn: AsyncConnection, message: Received, outcome: Outcome
    ) -> tuple[str, str | None, Ingested]:
        """Act on a message whose inbox row exists and is locked; returns its new outcome and reason."""
        _, nodes = await self._read(conn, [(message, outcome)])
        judged, decisions = self._judge(message, outcome, nodes)
        row, label = inbox_row(message, judged, decisions, self.facts, self.now)
        done = Ingested(new=1)
        if isinstance(judged, ParsedEvent):
            self._act(message, judged, decisions, nodes, {})
            await self._persist(conn)
            done.interruptions = [draft.id for draft in self.drafts.all if draft.new or draft.changed]
            done.clusters, done.launches = self.drafts.clusters, self.drafts.launches
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
        metrics.CLOSED.labels("cancelled").inc(len(self.drafts.called_off))
        for lag in self.lags:
            metrics.RECEIVE_LAG_SECONDS.observe(max(lag, 0.0))
        for reason, detail in self.security:
            metrics.SECURITY_ALARMS.labels(reason).inc()
            log.error("intake.security_alarm", customer_id=str(self.facts.customer_id), reason=reason, detail=detail)

    # --- reading

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
        for locked in context.locked:
            self.drafts.load(locked)
        nodes = repository.best_nodes(context.nodes, customer_id)
        strange = instance_ids - set(nodes)
        if strange:
            # Nobody's, or another tenant's: that one must be seen to be refused, and only its owner is read.
            await widen(conn)
            nodes |= await repository.nodes_of_instances(conn, customer_id, sorted(strange))
            await narrow(conn, customer_id)
        return context, nodes

    def _judge(self, message: Received, outcome: Outcome, nodes: Nodes) -> tuple[Outcome, Decisions]:
        return judge(message, outcome, nodes, self.facts, self.policies, self.now)

    async def _persist(self, conn: AsyncConnection) -> None:
        await self.drafts.persist(conn, inbox=self.inbox, events=self.events, gone=self.gone, hooks=self.hooks)

    # --- acting

    def _act(self, message: Received, event: ParsedEvent, decisions: Decisions, nodes: Nodes, earlier: Earlier) -> None:
        if not decisions:
            self._score(event, None, None)
            self.events.append(self._event_row(message, event, None, None, None, None, event.detail))
        details = details_of(event)
        for instance_id, decision in decisions:
            node = nodes.get(instance_id)
            draft = self._apply(message, event, instance_id, decision, node, earlier.get(instance_id))
            if event.state == "terminated" and node is not None:
                self.gone.append({"instance_id": instance_id, "at": event.occurred_at})
            self._score(event, decision, node)
            if decision.answers_hook:
                self.hooks.append(self._hook(event, instance_id, draft, node))
            detail = details.get(instance_id, event.detail)
            self.events.append(self._event_row(message, event, instance_id, decision, node, draft, detail))

    def _apply(
        self,
        message: Received,
        event: ParsedEvent,
        instance_id: str,
        decision: Decision,
        node: NodeFacts | None,
        earlier: repository.Earlier | None,
    ) -> Draft | None:
        """What a signal means for the interruptions of one instance; the one it belongs to, if any."""
        label = label_of(message.source, event.kind)
        draft = self.drafts.find(instance_id, event, decision)
        if decision.act is Act.CALL_OFF:
            if draft is not None:
                self.drafts.call_off(draft, event, label)
        elif decision.act not in (Act.INTERRUPT, Act.UNMATCHED):
            if draft is not None:
                self.drafts.hear(draft, label)
        elif draft is not None:
            self.drafts.merge(draft, event, decision, node, label)
        else:
            draft = self.drafts.begin(instance_id, event, decision, node, label)
            if earlier is not None:
                self.drafts.link(draft, earlier.kinds, earlier.event_ids)
        return draft

    def _event_row(
        self,
        message: Received,
        event: ParsedEvent,
        instance_id: str | None,
        decision: Decision | None,
        node: NodeFacts | None,
        draft: Draft | None,
        detail: Mapping[str, Any],
    ) -> dict[str, Any]:
        single = len(event.instance_ids) <= 1
        return {
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
            "payload": detail,
        }

    def _score(self, event: ParsedEvent, decision: Decision | None, node: NodeFacts | None) -> None:
        policy = self.policies[event.kind]
        signals = self.drafts.pool_signals
        if policy is Policy.IGNORE:
            return
        if event.kind is EventKind.REBALANCE_RECOMMENDATION and node is not None:
            signals.append((node.region, node.availability_zone, node.instance_type, "rebalance"))
        if event.kind is EventKind.SPOT_INTERRUPTION and policy is Policy.SCORE and node is not None:
            # Nothing is done about it, and the pool is what it is.
            signals.append((node.region, node.availability_zone, node.instance_type, "interruption"))
        if event.kind is EventKind.LAUNCH_UNSUCCESSFUL:
            details = event.detail.get("Details")
            zone = details.get("Availability Zone") if isinstance(details, dict) else None
            lacking = _CAPACITY_OF_TYPE.search(str(event.detail.get("StatusMessage", "")))
            if isinstance(zone, str) and lacking:
                signals.append((event.region, zone, lacking.group(1), "refusal"))

    def _hook(
        self, event: ParsedEvent, instance_id: str, draft: Draft | None, node: NodeFacts | None
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


def details_of(event: ParsedEvent) -> dict[str, dict[str, Any]]:
    """What an event about many instances says of each: the common head with the instance's own entities. A page of
    thousands must not be kept thousands of times."""
    entities = event.detail.get("affectedEntities")
    if not isinstance(entities, list):
        return {}
    own: dict[str, list[Any]] = {}
    for entity in entities:
        value = entity.get("entityValue") if isinstance(entity, dict) else None
        if isinstance(value, str):
            own.setdefault(value, []).append(entity)
    return {instance: event.detail | {"affectedEntities": own.get(instance, [])} for instance in event.instance_ids}
