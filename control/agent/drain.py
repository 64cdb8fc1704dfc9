"""Draining a node, level-triggered: every step re-reads the node and its pods, so a step can be the first one of a new
process as well as the next one of this one. Nothing here sleeps; a step says when it wants to be called again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from control.agent.cluster import Cluster, Eviction, Object, instance_id_of
from warehouse.contracts import TaskStatus

# The report has to reach the server before the deadline: stop this long before it.
REPORT_MARGIN = timedelta(seconds=3)
# Of a task that comes later than that, what pods do not get: the time to free their names and to report.
LAST_SECOND = 1.0
# With force_at_deadline, budgets are overruled this long before the deadline so that pods still get time to end.
FORCE_LEAD = timedelta(seconds=15)
# A drain without a deadline gives up after this long.
DEFAULT_LIMIT = timedelta(minutes=10)
POLL_SECONDS = 1.0
# kubectl retries a refused eviction every 5 s; with two minutes in all, begin faster.
RETRY_FIRST_SECONDS = 1.0
RETRY_MOST_SECONDS = 5.0
LISTED = 20  # pods named in a report


@dataclass(frozen=True, slots=True)
class Again:
    """Call the step again after `after_seconds`; `progress` is reported to the server at once."""

    after_seconds: float
    progress: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The task's end."""

    status: TaskStatus
    detail: dict[str, Any]


Step = Again | Finished


@dataclass(frozen=True, slots=True)
class Blocked:
    """A pod whose eviction was refused."""

    reason: str
    tries: int
    next_try: datetime


def refused(reason: str, **detail: Any) -> Finished:
    """The agent will not do this, and says why."""
    return Finished(TaskStatus.REFUSED, {"reason": reason, **detail})


def identify(cluster: Cluster, parameters: dict[str, Any]) -> Object | Finished:
    """The node a task means: its name and its instance id must both match the live node (R-13).

    A node that is gone is success (there is nothing left to do); another instance under the same name is a refusal.
    """
    name, instance_id = parameters.get("node_name"), parameters.get("instance_id")
    if not name or not instance_id:
        return refused("parameters must name node_name and instance_id")
    node = cluster.node(name)
    if node is None:
        return Finished(TaskStatus.DONE, {"reason": "node not found, skipping", "node_name": name})
    found = instance_id_of(node)
    if found != instance_id:
        return refused(
            f"node {name} is instance {found or '(unknown)'}, not {instance_id}", node_name=name, found=found
        )
    return node


def must_leave(pod: Object) -> bool:
    """Pods a drain moves: not those of DaemonSets, not static (mirror) pods, not finished ones."""
    metadata = pod["metadata"]
    if "kubernetes.io/config.mirror" in (metadata.get("annotations") or {}):
        return False
    if any(ref.get("controller") and ref["kind"] == "DaemonSet" for ref in metadata.get("ownerReferences") or ()):
        return False
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def grace_for(pod: Object, cap_seconds: int | None, seconds_left: float) -> int | None:
    """The grace period to ask for, or None to leave the pod its own: never more than the cap or the time left."""
    own = int((pod.get("spec") or {}).get("terminationGracePeriodSeconds", 30))
    allowed = min(own, cap_seconds if cap_seconds is not None else own, max(1, int(seconds_left)))
    return allowed if allowed < own else None


@dataclass
class Drain:
    """One drain. What it remembers only paces retries and fills the report."""

    parameters: dict[str, Any]
    started_at: datetime
    evicted: set[str] = field(default_factory=set)
    forced: set[str] = field(default_factory=set)
    blocked: dict[str, Blocked] = field(default_factory=dict)
    cordoned: bool = False

    def step(self, cluster: Cluster, now: datetime, deadline: datetime | None) -> Step:
        """Do what can be done now. ``deadline`` may be nearer than it was a step ago."""
        node = identify(cluster, self.parameters)
        if isinstance(node, Finished):
            if self.cordoned and node.status is TaskStatus.DONE:
                return self._done(now, reason="the node left the cluster during the drain")
            return node
        if not node["spec"].get("unschedulable"):
            cluster.patch_node(node, {"spec": {"unschedulable": True}})
        if not self.cordoned:
            self.cordoned = True
            return Again(0, {"progress": "cordoned"})
        pods = [pod for pod in cluster.pods_on(node["metadata"]["name"]) if must_leave(pod)]
        if not pods:
            return self._done(now)
        deadline = deadline or self.started_at + DEFAULT_LIMIT
        stop_at = deadline - REPORT_MARGIN
        force = bool(self.parameters.get("force_at_deadline"))
        if now >= stop_at:
            if force and not all(_uid(pod) in self.forced for pod in pods):
                grace = int((deadline - now).total_seconds() - LAST_SECOND)
                for pod in pods:  # the instance is about to vanish: free the names so that controllers start anew
                    asked = bool(pod["metadata"].get("deletionTimestamp"))
                    cluster.delete_pod(pod, 0 if asked else max(0, grace))
                    if asked or grace <= 0:
                        self.forced.add(_uid(pod))
                # Who was asked only now, because the task came so late, gets what is left.
                return Again(0.2 if all(_uid(pod) in self.forced for pod in pods) else float(grace))
            return self._out_of_time(pods, now)
        left = (stop_at - now).total_seconds()
        for pod in sorted(pods, key=_order):
            if pod["metadata"].get("deletionTimestamp"):
                continue
            if force and now >= deadline - FORCE_LEAD:
                cluster.delete_pod(pod, max(1, int(left)))
                self.forced.add(_uid(pod))
            else:
                self._evict(cluster, pod, left, now)
        moments = [stop_at] + ([deadline - FORCE_LEAD] if force and now < deadline - FORCE_LEAD else [])
        return Again(min(POLL_SECONDS, max(0.0, (min(moments) - now).total_seconds())))

    def _evict(self, cluster: Cluster, pod: Object, seconds_left: float, now: datetime) -> None:
        uid = _uid(pod)
        waiting = self.blocked.get(uid)
        if waiting is not None and now < waiting.next_try:
            return
        answer = cluster.evict(pod, grace_for(pod, _cap(self.parameters), seconds_left))
        if answer.outcome is Eviction.BLOCKED:
            tries = waiting.tries + 1 if waiting else 1
            pause = answer.retry_after_seconds or min(RETRY_MOST_SECONDS, RETRY_FIRST_SECONDS * 2 ** (tries - 1))
            pause *= random.uniform(0.8, 1.2)  # many drains against one budget must not march in step
            self.blocked[uid] = Blocked(answer.reason, tries, now + timedelta(seconds=pause))
            return
        self.blocked.pop(uid, None)
        if answer.outcome is Eviction.ACCEPTED:
            self.evicted.add(uid)

    def _summary(self, now: datetime) -> dict[str, Any]:
        return {
            "node_name": self.parameters["node_name"],
            "cordoned": self.cordoned,
            "evicted": len(self.evicted),
            "forced": len(self.forced),
            "seconds": round((now - self.started_at).total_seconds(), 3),
        }

    def _done(self, now: datetime, **more: Any) -> Finished:
        return Finished(TaskStatus.DONE, {**self._summary(now), **more})

    def _out_of_time(self, pods: list[Object], now: datetime) -> Finished:
        remaining = [
            {
                "pod": f"{pod['metadata']['namespace']}/{pod['metadata']['name']}",
                "reason": self._why(pod),
            }
            for pod in pods
        ]
        return Finished(
            TaskStatus.FAILED,
            {
                **self._summary(now),
                "reason": f"{len(pods)} pods were still on the node when the time was up",
                "remaining": remaining[:LISTED],
            },
        )

    def _why(self, pod: Object) -> str:
        if pod["metadata"].get("deletionTimestamp"):
            return "terminating"
        blocked = self.blocked.get(_uid(pod))
        return blocked.reason if blocked else "not evicted yet"


def _uid(pod: Object) -> str:
    return pod["metadata"]["uid"]


def _cap(parameters: dict[str, Any]) -> int | None:
    value = parameters.get("grace_seconds")
    return int(value) if value is not None else None


def _order(pod: Object) -> tuple[int, int]:
    """Ordinary pods first, and among them those that need longest to end."""
    spec = pod.get("spec") or {}
    return int(spec.get("priority") or 0), -int(spec.get("terminationGracePeriodSeconds", 30))
