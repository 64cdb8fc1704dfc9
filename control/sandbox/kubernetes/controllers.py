"""kube-controller-manager and kube-scheduler in small: what makes evicted pods come back somewhere else.

Level-triggered: any relevant change schedules one pass over everything; a pass reads the store and writes what is
missing, and the cluster rests when a pass writes nothing. No kubelet runs here: pods bound to nodes stay Pending (or
Terminating) until somebody plays the kubelet.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import datetime, timedelta
from functools import partial

import msgspec

from control.sandbox.kubernetes.eviction import budget_status, pod_is_ready, scaled
from control.sandbox.kubernetes.resources import (
    DAEMON_SETS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    EVENTS,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    REPLICA_SETS,
    RESOURCES,
    STATEFUL_SETS,
    Object,
)
from control.sandbox.kubernetes.scheduler import choose_node, repelled, rooms, selects_node, tolerates
from control.sandbox.kubernetes.status import ApiError
from control.sandbox.kubernetes.store import Change, Store, copied, owned_by, parse_timestamp, timestamp

log = logging.getLogger(__name__)

# Writes of one pass are seen by the next; passes closer together than this are merged.
DEBOUNCE_SECONDS = 0.02
# pod-gc deletes pods of nodes that are gone after this long (podgc quarantineTime 40 s in kube-controller-manager).
ORPHAN_POD_SECONDS = 40.0
_KINDS = frozenset(resource.kind for resource in RESOURCES)
UNSCHEDULABLE_TAINT = "node.kubernetes.io/unschedulable"

# What the DaemonSet controller adds to every pod it makes.
_DAEMON_TOLERATIONS = [
    {"key": key, "operator": "Exists", "effect": effect}
    for key, effect in (
        ("node.kubernetes.io/not-ready", "NoExecute"),
        ("node.kubernetes.io/unreachable", "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        (UNSCHEDULABLE_TAINT, "NoSchedule"),
    )
]


def record_event(store: Store, obj: Object, kind: str, reason: str, message: str, component: str) -> None:
    """A Kubernetes Event (kind "Normal" or "Warning") about an object, as `kubectl describe` shows it."""
    metadata = obj["metadata"]
    namespace = metadata.get("namespace") or "default"
    now = timestamp(store.clock())
    store.create(
        EVENTS,
        namespace,
        {
            "metadata": {"generateName": f"{metadata['name'][:200]}.", "namespace": namespace},
            "involvedObject": {
                "apiVersion": obj["apiVersion"],
                "kind": obj["kind"],
                "name": metadata["name"],
                "uid": metadata["uid"],
                **({"namespace": namespace} if metadata.get("namespace") else {}),
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": component},
            "reportingComponent": component,
            "reportingInstance": "",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        },
    )


class ControllerManager:
    """The controllers and the scheduler of one cluster, on the store's event loop."""

    def __init__(self, store: Store, *, orphan_pod_seconds: float = ORPHAN_POD_SECONDS) -> None:
        self._store = store
        self._orphan_pod_seconds = orphan_pod_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._orphaned_since: dict[str, datetime] = {}
        self._stopped = True
        store.listen(self._changed)

    def start(self) -> None:
        """Begin; must be called on the loop that owns the store."""
        self._stopped = False
        self._wake(0)

    def stop(self) -> None:
        """Stop for good or until `start`."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _changed(self, change: Change) -> None:
        if change.resource is not EVENTS and change.resource is not LEASES:
            self._wake(DEBOUNCE_SECONDS)

    def _wake(self, after_seconds: float) -> None:
        if self._stopped:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + after_seconds
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._run)

    def _run(self) -> None:
        self._timer = None
        for step in (
            self._taint_nodes,
            self._collect_garbage,
            self._deployments,
            self._replica_sets,
            self._stateful_sets,
            self._daemon_sets,
            self._collect_orphaned_pods,
            self._evict_by_taint,
            self._budgets,
            self._schedule,
        ):
            try:
                step()
            except ApiError as error:  # a name collision or the like: the next pass sees the new state
                log.warning("%s: %s: %s", self._store.name, step.__name__, error)
                self._wake(1.0)

    # -- nodes

    def _taint_nodes(self) -> None:
        """The node lifecycle controller's mirror of `spec.unschedulable` as a taint."""
        for node in self._store.objects(NODES):
            taints = node["spec"].get("taints") or []
            present = any(taint["key"] == UNSCHEDULABLE_TAINT for taint in taints)
            if bool(node["spec"].get("unschedulable")) == present:
                continue

            def mirror(draft: Object, present: bool = present) -> None:
                kept = [t for t in draft["spec"].get("taints") or [] if t["key"] != UNSCHEDULABLE_TAINT]
                if not present:
                    kept.append(
                        {
                            "key": UNSCHEDULABLE_TAINT,
                            "effect": "NoSchedule",
                            "timeAdded": timestamp(self._store.clock()),
                        }
                    )
                draft["spec"]["taints"] = kept
                if not kept:
                    del draft["spec"]["taints"]

            self._store.edit(NODES, node, mirror)

    def _evict_by_taint(self) -> None:
        """NoExecute taints delete pods that do not tolerate them (taint-eviction controller)."""
        now = self._store.clock()
        tainted = {
            node["metadata"]["name"]: [t for t in node["spec"]["taints"] if t["effect"] == "NoExecute"]
            for node in self._store.objects(NODES)
            if node["spec"].get("taints")
        }
        for pod in self._store.objects(PODS):
            taints = tainted.get(pod["spec"].get("nodeName", "")) or ()
            if not taints or pod["metadata"].get("deletionTimestamp"):
                continue
            leave_at: datetime | None = None
            for taint in taints:
                added = parse_timestamp(taint["timeAdded"]) if taint.get("timeAdded") else now
                covering = [t for t in pod["spec"].get("tolerations") or () if tolerates([t], taint)]
                seconds = [t["tolerationSeconds"] for t in covering if t.get("tolerationSeconds") is not None]
                if covering and not seconds:
                    continue
                until = added + timedelta(seconds=min(seconds)) if covering else now
                leave_at = until if leave_at is None else min(leave_at, until)
            if leave_at is None:
                continue
            if leave_at <= now:
                record_event(self._store, pod, "Normal", "TaintManagerEviction",
                             f"Marking for deletion Pod {pod['metadata']['namespace']}/{pod['metadata']['name']}",
                             "taint-eviction-controller")  # fmt: skip
                self._store.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
            else:
                self._wake((leave_at - now).total_seconds())

    # -- garbage

    def _collect_garbage(self) -> None:
        """Dependents of owners that are gone, foreground deletions and terminating namespaces."""
        uids = {obj["metadata"]["uid"] for resource in RESOURCES for obj in self._store.objects(resource)}
        dependents: dict[str, int] = {}
        for resource in RESOURCES:
            if resource is EVENTS:
                continue
            for obj in self._store.objects(resource):
                owners = obj["metadata"].get("ownerReferences")
                if not owners:
                    continue
                for ref in owners:
                    dependents[ref["uid"]] = dependents.get(ref["uid"], 0) + 1
                # An owner of a kind that is not served here may well exist: leave its dependents alone.
                gone = all(ref["uid"] not in uids and ref["kind"] in _KINDS for ref in owners)
                if gone and not obj["metadata"].get("deletionTimestamp"):
                    self._store.delete(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        for resource in RESOURCES:
            for obj in self._store.objects(resource):
                finalizers = obj["metadata"].get("finalizers") or ()
                if "foregroundDeletion" in finalizers:
                    self._finish_foreground(resource, obj, dependents)
                elif "orphan" in finalizers:
                    self._orphan_dependents(obj["metadata"]["uid"])
                    self._drop_finalizer(resource, obj, "orphan")
        for namespace in self._store.objects(NAMESPACES):
            if namespace["metadata"].get("deletionTimestamp"):
                self._store.finish_namespace(namespace)

    def _finish_foreground(self, resource, obj: Object, dependents: dict[str, int]) -> None:
        uid = obj["metadata"]["uid"]
        if not dependents.get(uid):
            self._drop_finalizer(resource, obj, "foregroundDeletion")
            return
        for kind in RESOURCES:
            for child in self._store.objects(kind):
                owned = any(ref["uid"] == uid for ref in child["metadata"].get("ownerReferences") or ())
                if owned and not child["metadata"].get("deletionTimestamp"):
                    self._store.delete(
                        kind,
                        child["metadata"].get("namespace", ""),
                        child["metadata"]["name"],
                        {"propagationPolicy": "Foreground"} if kind is not PODS else None,
                    )

    def _orphan_dependents(self, uid: str) -> None:
        for kind in RESOURCES:
            for child in self._store.objects(kind):
                refs = child["metadata"].get("ownerReferences") or []
                if any(ref["uid"] == uid for ref in refs):
                    kept = [ref for ref in refs if ref["uid"] != uid]
                    self._store.edit(kind, child, partial(_set, "metadata", "ownerReferences", kept))

    def _drop_finalizer(self, resource, obj: Object, name: str) -> None:
        kept = [finalizer for finalizer in obj["metadata"]["finalizers"] if finalizer != name]
        self._store.edit(resource, obj, partial(_set, "metadata", "finalizers", kept))

    def _collect_orphaned_pods(self) -> None:
        """pod-gc: pods bound to nodes that no longer exist are deleted for good after a quarantine."""
        names = {node["metadata"]["name"] for node in self._store.objects(NODES)}
        now = self._store.clock()
        seen = set()
        for pod in self._store.objects(PODS):
            where = pod["spec"].get("nodeName")
            if not where or where in names:
                continue
            uid = pod["metadata"]["uid"]
            seen.add(uid)
            since = self._orphaned_since.setdefault(uid, now)
            left = self._orphan_pod_seconds - (now - since).total_seconds()
            if left <= 0:
                self._store.delete(
                    PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], {"gracePeriodSeconds": 0}
                )
            else:
                self._wake(left)
        self._orphaned_since = {uid: at for uid, at in self._orphaned_since.items() if uid in seen}

    # -- workloads

    def _new_pod(self, owner: Object, template: Object, *, name: str = "", labels: dict | None = None) -> Object:
        metadata = copied(template.get("metadata") or {})
        metadata.pop("creationTimestamp", None)
        metadata["namespace"] = owner["metadata"]["namespace"]
        if name:
            metadata["name"] = name
        else:
            metadata["generateName"] = f"{owner['metadata']['name']}-"
        metadata["labels"] = {**(metadata.get("labels") or {}), **(labels or {})}
        metadata["ownerReferences"] = [_owner_reference(owner)]
        return {"metadata": metadata, "spec": copied(template["spec"])}

    def _deployments(self) -> None:
        sets = owned_by(self._store.objects(REPLICA_SETS))
        pods = owned_by(self._store.objects(PODS))
        for deployment in self._store.objects(DEPLOYMENTS):
            if not deployment["metadata"].get("deletionTimestamp"):
                self._deployment(deployment, sets.get(deployment["metadata"]["uid"], []), pods)

    def _deployment(self, deployment: Object, sets: list[Object], pods: dict[str, list[Object]]) -> None:
        spec = deployment["spec"]
        digest = _template_hash(spec["template"])
        newest = next((s for s in sets if s["metadata"]["labels"].get("pod-template-hash") == digest), None)
        desired = int(spec["replicas"])
        rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
        surge = scaled(rolling.get("maxSurge", 0), desired) if rolling else 0
        unavailable = scaled(rolling.get("maxUnavailable", 0), desired, round_up=False) if rolling else desired
        if not surge and not unavailable:
            unavailable = 1
        old = [s for s in sets if s is not newest]

        def ready(replica_set: Object) -> int:
            return sum(
                1 for pod in pods.get(replica_set["metadata"]["uid"], ()) if _is_active(pod) and pod_is_ready(pod)
            )

        old_total = sum(s["spec"]["replicas"] for s in old)
        if newest is None:
            template = copied(spec["template"])
            template.setdefault("metadata", {}).setdefault("labels", {})["pod-template-hash"] = digest
            selector = copied(spec["selector"])
            selector.setdefault("matchLabels", {})["pod-template-hash"] = digest
            newest = self._store.create(
                REPLICA_SETS,
                deployment["metadata"]["namespace"],
                {
                    "metadata": {
                        "name": f"{deployment['metadata']['name']}-{digest}",
                        "labels": template["metadata"]["labels"],
                        "ownerReferences": [_owner_reference(deployment)],
                    },
                    "spec": {"replicas": 0, "selector": selector, "template": template},
                },
            )
        current = newest["spec"]["replicas"]
        target = desired if not old_total else max(current, min(desired, desired + surge - old_total))
        if target != current:
            newest = self._scale(newest, target)
        # Old sets shrink while at least `desired - maxUnavailable` pods stay available; their unready pods go first.
        spare = sum(map(ready, old)) + ready(newest) - (desired - unavailable)
        for replica_set in old:
            size = replica_set["spec"]["replicas"]
            if not size:
                continue
            broken = size - ready(replica_set)
            shrink = min(size, broken + max(0, spare))
            if shrink:
                spare -= max(0, shrink - broken)
                self._scale(replica_set, size - shrink)
        for replica_set in sorted(old, key=lambda s: s["metadata"]["creationTimestamp"])[
            : max(0, len(old) - int(spec.get("revisionHistoryLimit", 10)))
        ]:
            if not replica_set["spec"]["replicas"]:
                self._store.delete(REPLICA_SETS, replica_set["metadata"]["namespace"], replica_set["metadata"]["name"])
        available = sum(map(ready, [*old, newest]))
        total = sum(len([p for p in pods.get(s["metadata"]["uid"], ()) if _is_active(p)]) for s in [*old, newest])
        status = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": total,
            "updatedReplicas": len([p for p in pods.get(newest["metadata"]["uid"], ()) if _is_active(p)]),
            "readyReplicas": available,
            "availableReplicas": available,
            "unavailableReplicas": max(0, desired - available),
        }
        self._write_status(DEPLOYMENTS, deployment, status)

    def _scale(self, replica_set: Object, replicas: int) -> Object:
        return self._store.edit(REPLICA_SETS, replica_set, partial(_set, "spec", "replicas", replicas))

    def _write_status(self, resource, obj: Object, status: dict) -> None:
        fresh = self._store.find(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if fresh is None:
            return
        clean = {name: value for name, value in status.items() if value != 0 or name == "replicas"}
        self._store.edit(resource, fresh, partial(_set_status, clean), subresource="status")

    def _replica_sets(self) -> None:
        pods = owned_by(self._store.objects(PODS))
        for replica_set in self._store.objects(REPLICA_SETS):
            metadata = replica_set["metadata"]
            if metadata.get("deletionTimestamp"):
                continue
            active = [pod for pod in pods.get(metadata["uid"], []) if _is_active(pod)]
            missing = int(replica_set["spec"]["replicas"]) - len(active)
            for _ in range(missing):
                self._store.create(
                    PODS, metadata["namespace"], self._new_pod(replica_set, replica_set["spec"]["template"])
                )
            for pod in sorted(active, key=_deletion_order)[: max(0, -missing)]:
                self._store.delete(PODS, metadata["namespace"], pod["metadata"]["name"])
            ready = sum(1 for pod in active if pod_is_ready(pod))
            self._write_status(
                REPLICA_SETS,
                replica_set,
                {
                    "observedGeneration": metadata["generation"],
                    "replicas": len(active),
                    "fullyLabeledReplicas": len(active),
                    "readyReplicas": ready,
                    "availableReplicas": ready,
                },
            )

    def _stateful_sets(self) -> None:
        """One pod at a time, in order; an ordinal is made again only when its old pod is really gone."""
        pods = owned_by(self._store.objects(PODS))
        for stateful_set in self._store.objects(STATEFUL_SETS):
            metadata, spec = stateful_set["metadata"], stateful_set["spec"]
            if metadata.get("deletionTimestamp"):
                continue
            own = {pod["metadata"]["name"]: pod for pod in pods.get(metadata["uid"], [])}
            digest = _template_hash(spec["template"])
            names = [f"{metadata['name']}-{ordinal}" for ordinal in range(int(spec["replicas"]))]
            for name in names:
                pod = own.get(name)
                if pod is None:
                    labels = {
                        "controller-revision-hash": f"{metadata['name']}-{digest}",
                        "statefulset.kubernetes.io/pod-name": name,
                        "apps.kubernetes.io/pod-index": name.rsplit("-", 1)[1],
                    }
                    pod = self._new_pod(stateful_set, spec["template"], name=name, labels=labels)
                    self._store.create(PODS, metadata["namespace"], pod)
                    break
                if not pod_is_ready(pod) or pod["metadata"].get("deletionTimestamp"):
                    break
            else:
                outdated = [
                    name
                    for name in reversed(names)
                    if own[name]["metadata"]["labels"].get("controller-revision-hash") != f"{metadata['name']}-{digest}"
                ]
                surplus = sorted(set(own) - set(names), reverse=True)
                for name in (surplus or outdated)[:1]:
                    if not own[name]["metadata"].get("deletionTimestamp"):
                        self._store.delete(PODS, metadata["namespace"], name)
            ready = sum(1 for pod in own.values() if pod_is_ready(pod))
            self._write_status(
                STATEFUL_SETS,
                stateful_set,
                {
                    "observedGeneration": metadata["generation"],
                    "replicas": len(own),
                    "readyReplicas": ready,
                    "availableReplicas": ready,
                    "currentReplicas": len(own),
                    "updatedReplicas": len(own),
                },
            )

    def _daemon_sets(self) -> None:
        nodes = {node["metadata"]["name"]: node for node in self._store.objects(NODES)}
        pods = owned_by(self._store.objects(PODS))
        for daemon_set in self._store.objects(DAEMON_SETS):
            metadata, spec = daemon_set["metadata"], daemon_set["spec"]
            if metadata.get("deletionTimestamp"):
                continue
            template_spec = copied(spec["template"]["spec"])
            template_spec["tolerations"] = [*(template_spec.get("tolerations") or []), *_DAEMON_TOLERATIONS]
            eligible = {
                name
                for name, node in nodes.items()
                if selects_node(template_spec, node) and repelled(template_spec, node) is None
            }
            present = {pod["spec"].get("nodeName"): pod for pod in pods.get(metadata["uid"], []) if _is_active(pod)}
            terminating = {pod["spec"].get("nodeName") for pod in pods.get(metadata["uid"], []) if not _is_active(pod)}
            for name in sorted(eligible - set(present) - terminating):
                pod = self._new_pod(daemon_set, {**spec["template"], "spec": template_spec})
                pod["spec"]["nodeName"] = name
                self._store.create(PODS, metadata["namespace"], pod)
            for name in set(present) - eligible:
                if name in nodes:
                    self._store.delete(PODS, metadata["namespace"], present[name]["metadata"]["name"])
            ready = sum(1 for pod in present.values() if pod_is_ready(pod))
            status = {
                "currentNumberScheduled": len(present),
                "desiredNumberScheduled": len(eligible),
                "numberMisscheduled": 0,
                "numberReady": ready,
                "observedGeneration": metadata["generation"],
                "updatedNumberScheduled": len(present),
            }
            fresh = self._store.find(DAEMON_SETS, metadata["namespace"], metadata["name"])
            if fresh is not None:
                self._store.edit(DAEMON_SETS, fresh, partial(_set_status, status), subresource="status")

    def _budgets(self) -> None:
        now = self._store.clock()
        for budget in self._store.objects(DISRUPTION_BUDGETS):
            status = budget_status(self._store, budget, now)
            self._store.edit(DISRUPTION_BUDGETS, budget, partial(_set_status, status), subresource="status")

    # -- scheduling

    def _schedule(self) -> None:
        pods = self._store.objects(PODS)
        waiting = [
            pod
            for pod in pods
            if not pod["spec"].get("nodeName")
            and not pod["metadata"].get("deletionTimestamp")
            and pod["spec"].get("schedulerName", "default-scheduler") == "default-scheduler"
        ]
        if not waiting:
            return
        all_rooms = rooms(self._store.objects(NODES), pods)
        waiting.sort(key=lambda pod: (-int(pod["spec"].get("priority") or 0), pod["metadata"]["creationTimestamp"]))
        for pod in waiting:
            name, message = choose_node(pod, all_rooms)
            if name is None:
                self._unschedulable(pod, message)
            else:
                bound = bind(self._store, pod, name)
                all_rooms[name].take(bound)

    def _unschedulable(self, pod: Object, message: str) -> None:
        known: dict = next((c for c in pod["status"].get("conditions") or () if c["type"] == "PodScheduled"), {})
        if known.get("message") == message:
            return
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastProbeTime": None,
            "lastTransitionTime": known.get("lastTransitionTime") or timestamp(self._store.clock()),
        }
        self._store.edit(PODS, pod, partial(_set, "status", "conditions", [condition]), subresource="status")
        record_event(self._store, pod, "Warning", "FailedScheduling", message, "default-scheduler")


def bind(store: Store, pod: Object, node_name: str) -> Object:
    """The binding subresource: set spec.nodeName and the PodScheduled condition."""
    now = timestamp(store.clock())

    def assign(draft: Object) -> None:
        draft["spec"]["nodeName"] = node_name

    def scheduled(draft: Object) -> None:
        kept = [c for c in draft["status"].get("conditions") or [] if c["type"] != "PodScheduled"]
        kept.append({"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": now})
        draft["status"]["conditions"] = kept

    bound = store.edit(PODS, pod, assign)
    return store.edit(PODS, bound, scheduled, subresource="status")


def _set(part: str, field: str, value: object, draft: Object) -> None:
    draft[part][field] = value


def _set_status(status: dict, draft: Object) -> None:
    draft["status"] = status


def _owner_reference(owner: Object) -> dict:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _template_hash(template: Object) -> str:
    # The alphabet of rand.SafeEncodeString, so that names look like the real ones.
    alphabet = "bcdfghjklmnpqrstvwxz2456789"
    digest = hashlib.sha256(msgspec.json.encode(template, order="deterministic")).digest()
    return "".join(alphabet[byte % len(alphabet)] for byte in digest[:10])


def _is_active(pod: Object) -> bool:
    return not pod["metadata"].get("deletionTimestamp") and pod["status"].get("phase") not in ("Succeeded", "Failed")


def _deletion_order(pod: Object) -> tuple:
    """Which pods a shrinking ReplicaSet gives up first: unbound, unready, newest."""
    return (
        bool(pod["spec"].get("nodeName")),
        pod_is_ready(pod),
        -parse_timestamp(pod["metadata"]["creationTimestamp"]).timestamp(),
    )
