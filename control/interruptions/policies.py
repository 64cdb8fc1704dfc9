"""What to do about one event on one instance: the customer's policy, the node's state and the clock decide.

``decide`` is pure. Policies per kind (customer_config key ``event_policies``): ``ignore`` writes the event down,
``score`` also counts it for the pool's standing, ``pre_spin`` launches a replacement and drains when it is Ready,
``drain`` does both at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from control.interruptions.parsing import GONE_STATES, ParsedEvent
from warehouse.contracts import EventKind, InterruptionAction

# EC2 gives two minutes for terminate and stop; the agent may know the exact moment from instance metadata.
NOTICE = timedelta(seconds=120)
# Hibernation begins at once: what can still be evicted is evicted without waiting.
HIBERNATION_LEAD = timedelta(seconds=20)
# The guest has about this long between shutting-down and gone; longer promises would be lies.
SHUTDOWN_LEAD = timedelta(seconds=60)
# Signals without a deadline of their own: time for a replacement to become Ready and for a gentle drain.
REBALANCE_LEAD = timedelta(minutes=15)
LIFECYCLE_LEAD = timedelta(minutes=15)
# Scheduled maintenance is acted on this long before it begins; retirement of failing hardware at once.
MAINTENANCE_LEAD = timedelta(minutes=30)
URGENT_CODES = ("RETIREMENT", "DEGRADED", "IMPAIRED", "INSTANCE_STOP")
# An agent reports every 30 s; a node it saw this recently is alive whatever an old message says.
SEEN_RECENTLY = timedelta(seconds=90)

# The last part of an AWS Health event's ARN, as AWS makes them; another one is no key.
_EVENT_NAME = re.compile(r"^[A-Za-z0-9_.-]{1,128}\Z")

# A storm may take hundreds of nodes within a minute and each wants its replacement; beyond this somebody should look.
DEFAULT_LAUNCHES_PER_HOUR = 1000


class Policy(StrEnum):
    """What a customer wants done about a kind of event."""

    IGNORE = "ignore"
    SCORE = "score"
    PRE_SPIN = "pre_spin"
    DRAIN = "drain"


DEFAULT_POLICIES: Mapping[EventKind, Policy] = {
    EventKind.SPOT_INTERRUPTION: Policy.DRAIN,
    EventKind.CAPACITY_RESERVATION_INTERRUPTION: Policy.DRAIN,
    EventKind.INSTANCE_STATE_CHANGE: Policy.DRAIN,
    EventKind.ASG_TERMINATE: Policy.DRAIN,
    EventKind.SCHEDULED_CHANGE: Policy.PRE_SPIN,
    # Karpenter ignores them, others drain on each: until a pool's precision is known, they are counted.
    EventKind.REBALANCE_RECOMMENDATION: Policy.SCORE,
    EventKind.LAUNCH_UNSUCCESSFUL: Policy.SCORE,
    # The group's hook is answered when the node is Ready.
    EventKind.ASG_LAUNCH: Policy.PRE_SPIN,
}


def policies_from_config(value: Any) -> dict[EventKind, Policy]:
    """The customer's ``event_policies`` over the defaults; entries that are not valid are left at the default."""
    policies = dict(DEFAULT_POLICIES)
    if isinstance(value, Mapping):
        for kind, policy in value.items():
            if kind in EventKind.__members__.values() and policy in Policy.__members__.values():
                policies[EventKind(kind)] = Policy(policy)
    return policies


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is known of the instance an event is about.

    ``ours_ending``: we are terminating it ourselves, so the cascade of state changes is no news.
    """

    customer_id: UUID
    cluster_id: UUID
    node_id: UUID | None
    node_name: str | None
    instance_id: str
    instance_type: str
    availability_zone: str
    node_type: str
    region: str
    last_seen_at: datetime | None
    terminated_at: datetime | None
    cluster_status: str = "active"
    ours_ending: bool = False


class Act(StrEnum):
    """What becomes of an event."""

    RECORD = "record"
    SCORE = "score"
    DROP = "drop"
    UNMATCHED = "unmatched"
    INTERRUPT = "interrupt"
    CALL_OFF = "call_off"


# Signals after which the instance may live on, and be ended by another one.
SOFT_KINDS = frozenset({EventKind.REBALANCE_RECOMMENDATION, EventKind.SCHEDULED_CHANGE})


@dataclass(frozen=True, slots=True)
class Decision:
    """``reason`` is stored as the event's ``action_taken``. The rest is set when ``act`` is interrupt or unmatched."""

    act: Act
    reason: str
    key: str = ""
    action: InterruptionAction = InterruptionAction.TERMINATE
    deadline_at: datetime | None = None
    wants_drain: bool = False
    wants_launch: bool = False
    drain_after_launch: bool = False
    act_at: datetime | None = None
    gone: bool = False
    answers_hook: bool = False


def decide(
    event: ParsedEvent, instance_id: str, node: NodeFacts | None, policies: Mapping[EventKind, Policy], now: datetime
) -> Decision:
    """What to do about ``event`` as far as it concerns ``instance_id``."""
    policy = policies.get(event.kind, Policy.DRAIN)
    if policy is Policy.IGNORE:
        return Decision(Act.RECORD, "ignored by policy")
    if event.kind is EventKind.LAUNCH_UNSUCCESSFUL:
        return Decision(Act.SCORE, "counted for the pool")
    if policy is Policy.SCORE:
        return Decision(Act.SCORE, "scored")
    if event.kind is EventKind.ASG_LAUNCH:
        return Decision(Act.RECORD, "its hook is answered when the node is Ready", answers_hook=True)
    if event.called_off:
        # It took place, or will not: AWS tells of both in the same words, and neither is a reason to drain.
        key = interruption_key(event, instance_id, InterruptionAction.TERMINATE)
        return Decision(Act.CALL_OFF, "the maintenance is over or called off", key=key)
    if node is None:
        return _nobodys(event, instance_id, now)
    if node.cluster_status == "deleted":
        return Decision(Act.DROP, "the cluster was deleted")
    if node.ours_ending:
        return Decision(Act.RECORD, "our own termination")
    gone = node.terminated_at is not None or event.state in GONE_STATES
    if event.kind is EventKind.INSTANCE_STATE_CHANGE:
        return _state_change(event, instance_id, node, gone, now)
    action = event.action or InterruptionAction.TERMINATE
    deadline = _deadline(event, action, now)
    act_at = None
    if event.kind is EventKind.SCHEDULED_CHANGE:
        act_at = _maintenance_begins(event, now)
    alive = not gone and (deadline > now or _seen_since(node, max(deadline, now - SEEN_RECENTLY)))
    if alive and deadline <= now:
        # The message is old and the node still lives: its own deadline has passed, ours begins now.
        deadline = now + NOTICE
    launch = event.kind is not EventKind.ASG_TERMINATE and (alive or not event.stale)
    if not alive and not launch:
        reason = "an old notice about an instance that is gone"
    else:
        reason = "drain" if policy is Policy.DRAIN or not launch else "replacement first, then drain"
    return Decision(
        Act.INTERRUPT,
        reason,
        key=interruption_key(event, instance_id, action),
        action=action,
        deadline_at=deadline,
        # Where the group itself launches the replacement there is none of ours to wait for.
        wants_drain=alive and (policy is Policy.DRAIN or not launch) and act_at is None,
        wants_launch=launch,
        # A maintenance of another day is no reason to drain today: its drain waits, for its beginning at the latest.
        drain_after_launch=alive and launch and (policy is Policy.PRE_SPIN or act_at is not None),
        act_at=act_at,
        gone=not alive,
        answers_hook=event.kind is EventKind.ASG_TERMINATE,
    )


def interruption_key(event: ParsedEvent, instance_id: str, action: InterruptionAction) -> str:
    """An instance is terminated once, whoever tells us; it can be stopped or hibernated again. A recommendation, or a
    maintenance, is not its end: the end may be announced after it. A maintenance keeps its key when it is postponed, as
    far as AWS names it."""
    if event.kind in SOFT_KINDS:
        return f"{instance_id}@{event.kind.value}{maintenance(event)[0]}"
    if action is InterruptionAction.TERMINATE:
        return instance_id
    return f"{instance_id}@{event.occurred_at:%Y-%m-%dT%H:%MZ}"


def maintenance(event: ParsedEvent) -> tuple[str, bool]:
    """What tells a maintenance from others of its instance, and whether that is AWS's name for it: the AWS Health
    event, else its moment."""
    if event.starts_at is None:
        return "", False
    arn = event.detail.get("eventArn")
    name = arn.rpartition("/")[2] if isinstance(arn, str) else ""
    if _EVENT_NAME.match(name):
        return f"@{name}", True
    return f"@{event.starts_at:%Y-%m-%dT%H:%MZ}", False


def maintenance_deadline(starts_at: datetime | None, now: datetime) -> datetime:
    """When a drain for a maintenance must be over."""
    return max(starts_at or now, now) + REBALANCE_LEAD


def maintenance_launch_at(deadline_at: datetime) -> datetime:
    """When the replacement for a maintenance with this deadline is launched."""
    return deadline_at - REBALANCE_LEAD - MAINTENANCE_LEAD


def _nobodys(event: ParsedEvent, instance_id: str, now: datetime) -> Decision:
    # Every instance of the account sends these; only our nodes' matter, and a state change cannot wait for a node.
    if event.kind in (EventKind.INSTANCE_STATE_CHANGE, EventKind.REBALANCE_RECOMMENDATION):
        return Decision(Act.RECORD, "no cluster owns the instance")
    action = event.action or InterruptionAction.TERMINATE
    return Decision(
        Act.UNMATCHED,
        "waiting for its node to register",
        key=interruption_key(event, instance_id, action),
        action=action,
        deadline_at=_deadline(event, action, now),
        answers_hook=event.kind is EventKind.ASG_TERMINATE,
    )


def _state_change(event: ParsedEvent, instance_id: str, node: NodeFacts, gone: bool, now: datetime) -> Decision:
    if node.node_type != "spot":
        return Decision(Act.RECORD, "not a Spot node: whoever ended it meant to")
    if event.stale:
        # A node that lives came back since, and of one that does not its cluster has long known.
        return Decision(Act.RECORD, "an old state change")
    action = InterruptionAction.STOP if event.state in ("stopping", "stopped") else InterruptionAction.TERMINATE
    return Decision(
        Act.INTERRUPT,
        "ending without a warning",
        key=interruption_key(event, instance_id, action),
        action=action,
        deadline_at=now if gone else now + SHUTDOWN_LEAD,
        wants_drain=not gone,
        wants_launch=True,
        gone=gone,
    )


def _deadline(event: ParsedEvent, action: InterruptionAction, now: datetime) -> datetime:
    if event.exact_deadline is not None and now - NOTICE < event.exact_deadline < now + NOTICE * 2:
        return event.exact_deadline
    match event.kind:
        case EventKind.REBALANCE_RECOMMENDATION:
            return now + REBALANCE_LEAD
        case EventKind.ASG_TERMINATE:
            return max(event.occurred_at, now) + LIFECYCLE_LEAD
        case EventKind.SCHEDULED_CHANGE:
            return maintenance_deadline(event.starts_at, now)
        case _ if action is InterruptionAction.HIBERNATE:
            return event.occurred_at + HIBERNATION_LEAD
        case _:
            return event.occurred_at + NOTICE


def _maintenance_begins(event: ParsedEvent, now: datetime) -> datetime | None:
    code = str(event.detail.get("eventTypeCode", "")).upper()
    if event.starts_at is None or any(word in code for word in URGENT_CODES):
        return None
    at = event.starts_at - MAINTENANCE_LEAD
    return at if at > now else None


def _seen_since(node: NodeFacts, moment: datetime) -> bool:
    return node.terminated_at is None and node.last_seen_at is not None and node.last_seen_at > moment
