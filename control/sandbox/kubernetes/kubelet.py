"""The kubelets of nodes that are alive: bound pods start after a while, terminating pods end and are removed.

Driven by changes of the store and one timer; nothing runs while nothing changes.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from control.sandbox.kubernetes.resources import NODES, PODS, Object
from control.sandbox.kubernetes.store import Change, Store, parse_timestamp, timestamp


@dataclass(frozen=True, slots=True)
class PodTiming:
    """How long pods take, in seconds; a pod never takes longer to end than its grace period."""

    start_seconds: tuple[float, float] = (2.0, 6.0)
    stop_seconds: tuple[float, float] = (0.5, 8.0)


class Kubelets:
    """Plays the kubelet of every node for which `alive(node)` is true."""

    def __init__(
        self,
        store: Store,
        *,
        alive: Callable[[Object], bool] = lambda node: True,
        timing: PodTiming | None = None,
    ) -> None:
        self._store, self._alive, self._timing = store, alive, timing or PodTiming()
        self._due: list[tuple[datetime, int, tuple[str, str, str]]] = []
        self._planned: set[tuple[str, bool]] = set()  # (pod uid, whether it is about the end)
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._running = False
        store.listen(self._changed)

    def start(self) -> None:
        """Begin with whatever the store holds; to be called on the store's loop."""
        self._running = True
        for pod in self._store.objects(PODS):
            self._plan(pod)

    def stop(self) -> None:
        """Stop; a later `start` picks everything up again."""
        self._running = False
        self._due.clear()
        self._planned.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _changed(self, change: Change) -> None:
        if not self._running:
            return
        if change.resource is PODS and change.kind != "DELETED":
            self._plan(change.obj)
        elif change.resource is PODS:
            uid = change.obj["metadata"]["uid"]
            self._planned -= {(uid, True), (uid, False)}
        elif change.resource is NODES and change.kind != "DELETED":
            for pod in self._store.objects(PODS):
                if pod["spec"].get("nodeName") == change.obj["metadata"]["name"]:
                    self._plan(pod)

    def _plan(self, pod: Object) -> None:
        metadata, spec = pod["metadata"], pod["spec"]
        node = self._store.find(NODES, "", spec.get("nodeName", ""))
        if node is None or not self._alive(node):
            return
        ending = bool(metadata.get("deletionTimestamp"))
        if not ending and pod["status"].get("phase") != "Pending":
            return
        key = (metadata["uid"], ending)
        if key in self._planned:
            return
        self._planned.add(key)
        now = self._store.clock()
        if ending:
            due = now + timedelta(seconds=random.uniform(*self._timing.stop_seconds))
            due = min(due, parse_timestamp(metadata["deletionTimestamp"]))
        else:
            due = now + timedelta(seconds=random.uniform(*self._timing.start_seconds))
        self._count += 1
        heapq.heappush(self._due, (due, self._count, (metadata["namespace"], metadata["name"], metadata["uid"])))
        self._arm()

    def _arm(self) -> None:
        if not self._due:
            return
        seconds = max(0.0, (self._due[0][0] - self._store.clock()).total_seconds())
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._run)

    def _run(self) -> None:
        self._timer = None
        now = self._store.clock()
        while self._due and self._due[0][0] <= now:
            _, _, (namespace, name, uid) = heapq.heappop(self._due)
            pod = self._store.find(PODS, namespace, name)
            if pod is None or pod["metadata"]["uid"] != uid:
                continue
            node = self._store.find(NODES, "", pod["spec"].get("nodeName", ""))
            ending = bool(pod["metadata"].get("deletionTimestamp"))
            self._planned.discard((uid, ending))
            if node is None or not self._alive(node):
                continue
            if ending:
                self._store.delete(PODS, namespace, name, {"gracePeriodSeconds": 0})
            elif pod["status"].get("phase") == "Pending":
                status = partial(_set_status, _running(pod, node, now))
                self._store.edit(PODS, pod, status, subresource="status")
        self._arm()


def _set_status(status: Object, draft: Object) -> None:
    draft["status"] = status


def _running(pod: Object, node: Object, now: datetime) -> Object:
    """The status a kubelet writes once every container runs and is ready."""
    at = timestamp(now)
    host = next((a["address"] for a in node["status"].get("addresses") or () if a["type"] == "InternalIP"), "10.0.0.1")
    number = int(pod["metadata"]["uid"][:8], 16)
    address = f"10.244.{number // 254 % 256}.{number % 254 + 1}"
    kept = [c for c in pod["status"].get("conditions") or () if c["type"] == "PodScheduled"]
    conditions = [
        {"type": kind, "status": "True", "lastProbeTime": None, "lastTransitionTime": at}
        for kind in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady")
    ]
    return {
        "phase": "Running",
        "conditions": [*conditions, *kept],
        "hostIP": host,
        "hostIPs": [{"ip": host}],
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": at,
        "qosClass": pod["status"].get("qosClass", "BestEffort"),
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "containerID": f"containerd://{pod['metadata']['uid']}",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": at}},
                "lastState": {},
            }
            for container in pod["spec"]["containers"]
        ],
    }
