"""What is to be done about a message as a whole, and its row in the inbox. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from control.interruptions.messages import Received, sha256
from control.interruptions.parsing import Drop, Outcome, ParsedEvent, Quarantine, kept_body
from control.interruptions.policies import Act, Decision, NodeFacts, Policy, decide
from control.interruptions.repository import CustomerFacts
from warehouse.contracts import EventKind

Decisions = list[tuple[str, Decision]]


def judge(
    message: Received,
    outcome: Outcome,
    nodes: Mapping[str, NodeFacts],
    facts: CustomerFacts,
    policies: Mapping[EventKind, Policy],
    now: datetime,
) -> tuple[Outcome, Decisions]:
    """A message's outcome as far as the customer and its nodes change it, with a decision for each of its instances
    that is not somebody else's."""
    if not isinstance(outcome, ParsedEvent):
        return outcome, []
    event_type = outcome.kind.value
    if facts.status in ("suspended", "offboarding", "offboarded"):
        return Drop(f"customer_{facts.status}", outcome.dedupe_key, event_type), []
    decisions: Decisions = []
    foreign = 0
    for instance_id in outcome.instance_ids:
        node = nodes.get(instance_id)
        if node is not None and (
            node.customer_id != facts.customer_id or message.cluster_id not in (None, node.cluster_id)
        ):
            foreign += 1
            continue
        decisions.append((instance_id, decide(outcome, instance_id, node, policies, now)))
    if foreign and not decisions:
        refused = Quarantine(
            "foreign_instance",
            "the instance is a node of another cluster than the agent's"
            if message.cluster_id
            else "the instance belongs to a node of another customer",
            "sha256:" + sha256(message.body),
            event_type,
            security=True,
        )
        return refused, []
    if decisions and all(decision.act is Act.DROP for _, decision in decisions):
        return Drop("cluster_deleted", outcome.dedupe_key, event_type), []
    return outcome, decisions


def inbox_row(
    message: Received, outcome: Outcome, decisions: Decisions, facts: CustomerFacts, now: datetime
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
        "customer_id": facts.customer_id,
        "source": message.source.value,
        "dedupe_key": outcome.dedupe_key,
        "sqs_message_id": message.sqs_message_id,
        "receive_count": message.receive_count,
        "body_sha256": sha256(message.body),
        "event_type": kind,
        "outcome": state,
        "reason": reason,
        "body": kept_body(message.body) if state in ("quarantined", "waiting") else None,
        "sent_at": message.sent_at,
        "received_at": now,
    }
    return row, label
