"""Interruption notices seen on nodes: the second detector beside SQS (RELIABILITY.md R-07 asks for it within 10 s).

EC2 tells an instance itself through instance metadata (IMDS): `/latest/meta-data/spot/instance-action` and
`/latest/meta-data/events/recommendations/rebalance`. Whatever reads them on a node publishes the answer, unchanged, in
annotations of its Node object; this agent watches nodes and reports what appears:

    cloudoptim.io/imds-spot-instance-action   {"action": "terminate", "time": "2026-01-02T03:06:05Z"}
    cloudoptim.io/imds-rebalance              {"noticeTime": "2026-01-02T03:04:05Z"}
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from control.agent.cluster import Object, instance_id_of
from warehouse.contracts import EventKind, InterruptionAction, SpotEvent

log = logging.getLogger(__name__)

INSTANCE_ACTION_ANNOTATION = "cloudoptim.io/imds-spot-instance-action"
REBALANCE_ANNOTATION = "cloudoptim.io/imds-rebalance"
NOTICE = timedelta(seconds=120)
REMEMBERED = 10_000


def notices_of(node: Object, now: datetime) -> list[SpotEvent]:
    """The notices on one node; what cannot be read is logged and left out."""
    annotations = node["metadata"].get("annotations") or {}
    instance_id = instance_id_of(node)
    if not instance_id.startswith("i-"):
        return []
    events = []
    for annotation, make in ((INSTANCE_ACTION_ANNOTATION, _spot_action), (REBALANCE_ANNOTATION, _rebalance)):
        text = annotations.get(annotation)
        if not text:
            continue
        try:
            events.append(make(json.loads(text), instance_id, node["metadata"]["name"], now))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("annotation %s of node %s is unreadable: %s", annotation, node["metadata"]["name"], error)
    return events


def _spot_action(notice: dict[str, Any], instance_id: str, node_name: str, now: datetime) -> SpotEvent:
    acts_at = _time(notice["time"])
    action = InterruptionAction(notice["action"])
    # terminate and stop are announced two minutes ahead; hibernation begins at once
    occurred = acts_at if action is InterruptionAction.HIBERNATE else acts_at - NOTICE
    return SpotEvent(
        event_type=EventKind.SPOT_INTERRUPTION,
        instance_id=instance_id,
        occurred_at=min(occurred, now),
        instance_action=action,
        node_name=node_name,
        detail=notice,
    )


def _rebalance(notice: dict[str, Any], instance_id: str, node_name: str, now: datetime) -> SpotEvent:
    return SpotEvent(
        event_type=EventKind.REBALANCE_RECOMMENDATION,
        instance_id=instance_id,
        occurred_at=min(_time(notice["noticeTime"]), now),
        node_name=node_name,
        detail=notice,
    )


def _time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Noticed:
    """What was reported already, so that every notice is sent once per life of the agent (the server deduplicates)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], None] = {}

    def fresh(self, events: list[SpotEvent]) -> list[SpotEvent]:
        """Those not seen before; they stay fresh until `remember`."""
        return [event for event in events if _key(event) not in self._seen]

    def remember(self, events: list[SpotEvent]) -> None:
        """These are safely on their way."""
        self._seen.update((_key(event), None) for event in events)
        while len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]


def _key(event: SpotEvent) -> tuple[str, str, str]:
    return event.instance_id, event.event_type, json.dumps(event.detail, sort_keys=True)


def events_body(cluster_id: UUID, events: list[SpotEvent]) -> bytes:
    """An AgentEvents body."""
    body = {"cluster_id": str(cluster_id), "events": [event.model_dump(mode="json") for event in events]}
    return json.dumps(body).encode()
