"""Nodes follow instances: what EC2 launches joins its cluster, what EC2 ends leaves it, and the market interrupts.

Level-triggered: once a second the fleet compares all instances with all Node objects and takes the next step for each.
It runs on the event loop of the AWS endpoint and of the clusters' stores, so every step is atomic.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from control.sandbox.aws import Instance, SandboxAWS
from control.sandbox.aws.instances import Behaviour
from control.sandbox.fleet.launch import INITIAL_TOKEN_PREFIX, launch_cluster
from control.sandbox.fleet.load import usage
from control.sandbox.fleet.manifests import (
    budget_object,
    cluster_of,
    node_conditions,
    node_object,
    workload_object,
)
from control.sandbox.fleet.plan import ClusterPlan, CustomerPlan, Workload
from control.sandbox.kubernetes.api import half_of_requests
from control.sandbox.kubernetes.controllers import record_event
from control.sandbox.kubernetes.kubelet import Kubelets, PodTiming
from control.sandbox.kubernetes.quantities import pod_requests
from control.sandbox.kubernetes.resources import (
    DAEMON_SETS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    NAMESPACES,
    NODES,
    PODS,
    STATEFUL_SETS,
    Object,
)
from control.sandbox.kubernetes.server import Cluster
from control.sandbox.kubernetes.store import timestamp
from control.sandbox.market import Pool, load_catalogue

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
DRAW_SECONDS = 10.0
PERSIST_SECONDS = 15.0
INSTANCE_ACTION_ANNOTATION = "cloudoptim.io/imds-spot-instance-action"
REBALANCE_ANNOTATION = "cloudoptim.io/imds-rebalance"
_WORKLOAD_RESOURCES = {"Deployment": DEPLOYMENTS, "StatefulSet": STATEFUL_SETS, "DaemonSet": DAEMON_SETS}


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """How fast the fleet lives; all times in seconds. Tests shorten them."""

    join_seconds: tuple[float, float] = (25.0, 60.0)
    """From RunInstances to a registered Node."""
    ready_seconds: tuple[float, float] = (3.0, 8.0)
    """From a registered Node to a Ready one."""
    unreachable_seconds: float = 8.0
    """From the instance's end to a NotReady node (40 s on real clusters)."""
    removed_seconds: float = 30.0
    """From the instance's end to the removal of the Node object."""
    orphan_pod_seconds: float = 20.0
    pods: PodTiming = field(default_factory=PodTiming)
    interruption_scale: float = 1000.0
    """The market's hazards times this, 0 for none. The plan's 30 Spot nodes add up to 0.013 interruptions an hour
    over the years (one in three days at 1, one in five minutes at 1000), from 0.002 in cheap months to 0.05 in dear
    ones."""
    rebalance_share: float = 0.4
    """Share of interruptions announced by a rebalance recommendation before."""
    rebalance_lead_seconds: tuple[float, float] = (30.0, 240.0)
    false_alarm_share: float = 0.3
    """Rebalance recommendations that lead to nothing, per interruption."""
    spared_seconds: float = 180.0
    """How long a young instance is left alone, as AWS rarely takes back what it has just given."""
    notice_seconds: float = 120.0


@dataclass(slots=True)
class Membership:
    """An instance's life as a node. Moments are seconds since the epoch."""

    cluster: str
    node_name: str
    joined_at: float
    ready_at: float
    ready: bool = False
    ended_at: float | None = None
    unreachable: bool = False
    left: bool = False


@dataclass(slots=True)
class Runtime:
    """A cluster that runs."""

    plan: ClusterPlan
    account_id: str
    cluster: Cluster
    kubelets: Kubelets
    workloads: dict[tuple[str, str], Workload]
    alive: set[str] = field(default_factory=set)
    saved_revision: int = 0


class Fleet:
    """All clusters of all customers."""

    def __init__(
        self,
        aws: SandboxAWS,
        customers: Iterable[CustomerPlan],
        *,
        tokens: dict[str, str],
        config: FleetConfig | None = None,
        home: Path | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._aws, self.config, self._home = aws, config or FleetConfig(), home
        self._customers = tuple(customers)
        self._chance = chance or random.Random()
        self._catalogue = load_catalogue()
        self._members: dict[str, Membership] = {}
        self._initialised: set[str] = set()
        self._planned: list[tuple[float, str]] = []  # (when, instance id): recommendations that come true
        self._drawn_at = 0.0
        self._persisted_at = 0.0
        self._saved = b""
        self._task: asyncio.Task[None] | None = None
        self.clusters: dict[str, Runtime] = {}
        for customer in self._customers:
            for plan in customer.clusters:
                self.clusters[plan.name] = self._runtime(plan, customer.account_id, tokens[plan.name])

    def _runtime(self, plan: ClusterPlan, account_id: str, token: str) -> Runtime:
        workloads = {(w.namespace, w.name): w for w in plan.workloads}
        alive: set[str] = set()
        cluster = Cluster(
            plan.name,
            tokens=[token],
            usage=lambda pod: self._usage(workloads, pod),
            orphan_pod_seconds=self.config.orphan_pod_seconds,
        )
        kubelets = Kubelets(
            cluster.store, alive=lambda node: node["metadata"]["name"] in alive, timing=self.config.pods
        )
        return Runtime(plan, account_id, cluster, kubelets, workloads, alive)

    def _usage(self, workloads: dict[tuple[str, str], Workload], pod: Object) -> tuple[float, float]:
        metadata = pod["metadata"]
        workload = workloads.get((metadata["namespace"], (metadata.get("labels") or {}).get("app", "")))
        if workload is None:
            return half_of_requests(pod)
        cpu, memory = pod_requests(pod["spec"])
        return usage(workload, metadata["uid"], cpu, memory, datetime.now(UTC))

    # -- life

    async def start(self) -> None:
        """Restore what was saved, launch what was never launched, and live."""
        self._restore()
        await self._initialise()
        self.save()
        self._sync()
        for runtime in self.clusters.values():
            runtime.cluster.controllers.start()
            runtime.kubelets.start()
        self._drawn_at = self._now()
        self._task = asyncio.create_task(self._live(), name="fleet")

    async def stop(self) -> None:
        """Stop living and save."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for runtime in self.clusters.values():
            runtime.kubelets.stop()
            runtime.cluster.controllers.stop()
            runtime.cluster.store.close()
        self.save()

    async def _initialise(self) -> None:
        """Workloads and first instances of the clusters that have never been; safe to be repeated after a crash."""
        from control.sandbox.aws.ec2 import DEFAULT_IMAGES

        new = [
            (customer, plan)
            for customer in self._customers
            for plan in customer.clusters
            if plan.name not in self._initialised
        ]
        if not new:
            return
        for _, plan in new:
            self._create_workloads(plan)
        # boto3 costs 30 MB and is needed once in the life of a sandbox: let it live and die in a process of its own.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            for customer, plan in new:
                credentials = self._aws.credentials(customer.account_id)
                count = await asyncio.get_running_loop().run_in_executor(
                    process, launch_cluster, self._aws.url, credentials, plan, DEFAULT_IMAGES
                )
                log.info("cluster %s begins with %d instances", plan.name, count)
                self._initialised.add(plan.name)

    def _create_workloads(self, plan: ClusterPlan) -> None:
        store = self.clusters[plan.name].cluster.store
        for workload in plan.workloads:
            if store.find(NAMESPACES, "", workload.namespace) is None:
                store.create(NAMESPACES, "", {"metadata": {"name": workload.namespace}})
            store.create(_WORKLOAD_RESOURCES[workload.kind], workload.namespace, workload_object(workload))
            if workload.budget:
                store.create(DISRUPTION_BUDGETS, workload.namespace, budget_object(workload))

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                self._sync()
                self._draw()
                if self._now() - self._persisted_at >= PERSIST_SECONDS:
                    self.save()
            except Exception:  # the sandbox goes on; the next tick looks at everything again
                log.exception("the fleet's tick failed")

    def _now(self) -> float:
        return datetime.now(UTC).timestamp()

    # -- nodes follow instances

    def _sync(self) -> None:
        now = self._now()
        for instance in self._aws.instances():
            name = cluster_of(instance)
            runtime = self.clusters.get(name) if name else None
            if runtime is None or runtime.account_id != instance.account_id:
                continue
            member = self._members.get(instance.instance_id)
            if instance.state(now) in ("pending", "running"):
                if member is None:
                    self._maybe_join(runtime, instance, now)
                else:
                    self._keep(runtime, member, instance, now)
            elif member is not None and not member.left:
                self._leave(runtime, member, instance, now)

    def _maybe_join(self, runtime: Runtime, instance: Instance, now: float) -> None:
        initial = instance.client_token.startswith(INITIAL_TOKEN_PREFIX)
        if initial:  # a fleet that has always been there
            joined_at = ready_at = now
        else:
            joined_at = instance.launched_at + _spread(instance.instance_id, "join", self.config.join_seconds)
            ready_at = joined_at + _spread(instance.instance_id, "ready", self.config.ready_seconds)
        if joined_at > now or (instance.state(now) == "pending" and not initial):
            return
        kind = self._catalogue.types[instance.instance_type]
        moment = datetime.fromtimestamp(now, UTC)
        ready = ready_at <= now
        store = runtime.cluster.store
        # A name can come back with another instance: the old Node object goes first, as its uid would lie.
        if store.find(NODES, "", instance.private_dns_name) is not None:
            store.delete(NODES, "", instance.private_dns_name)
        runtime.alive.add(instance.private_dns_name)
        node = store.load(NODES, node_object(instance, kind, ready=ready, now=moment))
        self._members[instance.instance_id] = Membership(
            runtime.plan.name, instance.private_dns_name, now, ready_at, ready
        )
        record_event(store, node, "Normal", "RegisteredNode", f"Node {node['metadata']['name']} event: Registered Node "
                     f"{node['metadata']['name']} in Controller", "node-controller")  # fmt: skip
        log.info("%s: node %s (%s) joined", runtime.plan.name, instance.private_dns_name, instance.instance_id)

    def _keep(self, runtime: Runtime, member: Membership, instance: Instance, now: float) -> None:
        store = runtime.cluster.store
        node = self._node_of(runtime, member, instance)
        if node is None:
            return  # somebody deleted the Node object; a kubelet does not register twice
        if member.ended_at is not None:
            if instance.state(now) != "running":
                return
            # EC2 started it again: the same node, Ready once its kubelet is up, and its metadata has no notice.
            member.ended_at, member.unreachable, member.ready = None, False, False
            member.ready_at = now + _spread(instance.instance_id, "ready", self.config.ready_seconds)
            node = store.edit(NODES, node, _without_notices)
        if member.node_name not in runtime.alive:
            runtime.alive.add(member.node_name)
        moment = datetime.fromtimestamp(now, UTC)
        if not member.ready and member.ready_at <= now:
            member.ready = True
            node = store.edit(NODES, node, _without_down_taints)
            node = store.edit(
                NODES, node, partial(_set_conditions, node_conditions(ready=True, now=moment)), subresource="status"
            )
            message = f"Node {member.node_name} status is now: NodeReady"
            record_event(store, node, "Normal", "NodeReady", message, "kubelet")
        hints = {}
        if instance.interruption_due_at is not None:
            due = timestamp(datetime.fromtimestamp(instance.interruption_due_at, UTC))
            hints[INSTANCE_ACTION_ANNOTATION] = json.dumps({"action": instance.interruption_behaviour, "time": due})
        if instance.rebalance_at is not None:
            noticed = timestamp(datetime.fromtimestamp(instance.rebalance_at, UTC))
            hints[REBALANCE_ANNOTATION] = json.dumps({"noticeTime": noticed})
        present = node["metadata"].get("annotations") or {}
        if any(present.get(name) != value for name, value in hints.items()):
            store.edit(NODES, node, partial(_annotate, hints))

    def _leave(self, runtime: Runtime, member: Membership, instance: Instance, now: float) -> None:
        store = runtime.cluster.store
        node = self._node_of(runtime, member, instance)
        if member.ended_at is None:
            member.ended_at = instance.ended_at(now) or now
            if node is not None:
                runtime.alive.discard(member.node_name)
        if node is None:
            member.left = True
            return
        gone_for = now - member.ended_at
        moment = datetime.fromtimestamp(now, UTC)
        # Of a stopped instance the cloud's controller keeps the node: the instance exists and may come back.
        stopped = instance.state(now) in ("stopping", "stopped")
        if gone_for >= self.config.removed_seconds and not stopped:
            member.left = True
            record_event(store, node, "Normal", "DeletingNode", f"Deleting node {member.node_name} because it does "
                         "not exist in the cloud provider", "cloud-node-lifecycle-controller")  # fmt: skip
            store.delete(NODES, "", member.node_name)
            log.info("%s: node %s (%s) left", runtime.plan.name, member.node_name, instance.instance_id)
        elif gone_for >= self.config.unreachable_seconds and not member.unreachable:
            member.unreachable = True
            node = store.edit(NODES, node, partial(_taint_unreachable, timestamp(moment), stopped))
            conditions = node_conditions(ready=False, now=moment, unknown=True)
            node = store.edit(NODES, node, partial(_set_conditions, conditions), subresource="status")
            message = f"Node {member.node_name} status is now: NodeNotReady"
            record_event(store, node, "Normal", "NodeNotReady", message, "node-controller")
            for pod in store.objects(PODS):
                if pod["spec"].get("nodeName") == member.node_name:
                    store.edit(PODS, pod, _pod_not_ready, subresource="status")

    def _node_of(self, runtime: Runtime, member: Membership, instance: Instance) -> Object | None:
        node = runtime.cluster.store.find(NODES, "", member.node_name)
        if node is None or not node["spec"]["providerID"].endswith(f"/{instance.instance_id}"):
            return None
        return node

    # -- interruptions

    def _draw(self) -> None:
        now = self._now()
        for when, instance_id in list(self._planned):
            if when <= now:
                self._planned.remove((when, instance_id))
                with contextlib.suppress(ValueError, KeyError):  # it has ended by itself meanwhile
                    self._aws.interrupt(instance_id, notice_seconds=self.config.notice_seconds)
        elapsed = now - self._drawn_at
        if elapsed < DRAW_SECONDS or not self.config.interruption_scale:
            return
        self._drawn_at = now
        moment = self._aws.market.now()
        planned = {instance_id for _, instance_id in self._planned}
        for instance in self._spot_nodes():
            if instance.instance_id in planned or now - instance.launched_at < self.config.spared_seconds:
                continue
            pool = Pool(instance.region, instance.zone_id, instance.instance_type)
            try:
                hazard = self._aws.market.hazard_per_hour(pool, moment)
            except KeyError:  # a pool the market does not sell
                continue
            expected = hazard * self.config.interruption_scale * elapsed / 3600
            if self._chance.random() < expected:
                self._strike(instance, now)
            elif instance.rebalance_at is None and self._chance.random() < expected * self.config.false_alarm_share:
                self._aws.recommend_rebalance(instance.instance_id)

    def _strike(self, instance: Instance, now: float) -> None:
        if self._chance.random() < self.config.rebalance_share:
            log.info("rebalance recommendation for %s", instance.instance_id)
            self._aws.recommend_rebalance(instance.instance_id)
            lead = self._chance.uniform(*self.config.rebalance_lead_seconds)
            self._planned.append((now + lead, instance.instance_id))
            return
        log.info("Spot interruption of %s", instance.instance_id)
        self._aws.interrupt(instance.instance_id, notice_seconds=self.config.notice_seconds)

    def _spot_nodes(self, cluster: str | None = None) -> list[Instance]:
        """Spot instances that are nodes now and have no notice yet."""
        now = self._now()
        return [
            instance
            for instance in self._aws.instances(states=("running",))
            if instance.lifecycle == "spot"
            and instance.interruption_notice_at is None
            and (member := self._members.get(instance.instance_id)) is not None
            and instance.state(now) == "running"
            and (cluster is None or member.cluster == cluster)
        ]

    def interrupt(
        self,
        *,
        node: str | None = None,
        cluster: str | None = None,
        count: int = 1,
        notice_seconds: float | None = None,
        behaviour: Behaviour = "terminate",
    ) -> list[dict[str, Any]]:
        """Interrupt a named node, or `count` random Spot nodes (of a cluster): what was interrupted.

        Raises ValueError with what to do when there is no such node, cluster or behaviour or nothing left to interrupt.
        """
        if cluster is not None and cluster not in self.clusters:
            raise ValueError(f"there is no cluster {cluster!r}; there are {', '.join(self.clusters)}")
        candidates = self._spot_nodes(cluster)
        if node is not None:
            candidates = [i for i in candidates if node in (self._members[i.instance_id].node_name, i.instance_id)]
            if not candidates:
                raise ValueError(
                    f"{node!r} is not a Spot node that can be interrupted; `cloudoptim sandbox nodes` lists them"
                )
        elif not candidates:
            raise ValueError("no Spot node is left to interrupt")
        chosen = self._chance.sample(candidates, min(max(1, count), len(candidates)))
        notice = self.config.notice_seconds if notice_seconds is None else notice_seconds
        interrupted = []
        for instance in chosen:
            message_id = self._aws.interrupt(instance.instance_id, notice_seconds=notice, behaviour=behaviour)
            member = self._members[instance.instance_id]
            interrupted.append(
                {
                    "cluster": member.cluster,
                    "node": member.node_name,
                    "instance_id": instance.instance_id,
                    "instance_type": instance.instance_type,
                    "zone": instance.zone_name,
                    "message_id": message_id,
                    "behaviour": behaviour,
                    "ends_in_seconds": 0.0 if behaviour == "hibernate" else notice,
                }
            )
        self._sync()
        return interrupted

    def resume(self, node: str) -> dict[str, str]:
        """EC2 starts a stopped or hibernated node again. Raises ValueError when there is none of that name, or when it
        is not stopped."""
        for instance_id, member in self._members.items():
            if node in (member.node_name, instance_id) and not member.left:
                self._aws.resume(instance_id)
                self._sync()
                return {"node": member.node_name, "instance_id": instance_id}
        raise ValueError(f"there is no node {node!r}; `cloudoptim sandbox nodes` lists them")

    def describe(self) -> list[dict[str, Any]]:
        """Every instance that is or becomes a node, for people and tests."""
        now = self._now()
        rows = []
        for instance in self._aws.instances():
            cluster, state = cluster_of(instance), instance.state(now)
            if cluster not in self.clusters or state == "terminated":
                continue
            member = self._members.get(instance.instance_id)
            rows.append(
                {
                    "cluster": cluster,
                    "node": member.node_name if member else None,
                    "ready": bool(member and member.ready and not member.unreachable),
                    "instance_id": instance.instance_id,
                    "instance_type": instance.instance_type,
                    "zone": instance.zone_name,
                    "capacity": instance.lifecycle,
                    "state": state,
                    "interrupted": instance.interruption_notice_at is not None,
                }
            )
        return rows

    # -- persistence

    def save(self) -> None:
        """Write what changed to the home, each file whole or not at all."""
        self._persisted_at = self._now()
        if self._home is None:
            return
        folder = self._home / "clusters"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, runtime in self.clusters.items():
            store = runtime.cluster.store
            if store.revision != runtime.saved_revision:
                _write(folder / f"{name}.json", store.dump())
                runtime.saved_revision = store.revision
        known = {instance.instance_id for instance in self._aws.instances()}
        self._members = {key: member for key, member in self._members.items() if key in known or not member.left}
        document = {
            "initialised": sorted(self._initialised),
            "members": {key: asdict(member) for key, member in self._members.items()},
        }
        content = json.dumps(document).encode()
        if content != self._saved:
            _write(self._home / "fleet.json", content)
            self._saved = content

    def _restore(self) -> None:
        if self._home is None or not (self._home / "fleet.json").exists():
            return
        document = json.loads((self._home / "fleet.json").read_text())
        known = {instance.instance_id for instance in self._aws.instances()}
        for name, runtime in self.clusters.items():
            file = self._home / "clusters" / f"{name}.json"
            if file.exists() and name in document["initialised"]:
                runtime.cluster.store.restore(file.read_bytes())
                self._initialised.add(name)
        for instance_id, row in document["members"].items():
            member = Membership(**row)
            if member.cluster not in self._initialised:
                continue
            runtime = self.clusters[member.cluster]
            if instance_id in known:
                self._members[instance_id] = member
                if member.ended_at is None:
                    runtime.alive.add(member.node_name)
            elif runtime.cluster.store.find(NODES, "", member.node_name) is not None:
                # Forgotten by EC2 while the sandbox was down: the node has been gone for long.
                runtime.cluster.store.delete(NODES, "", member.node_name)


def _spread(instance_id: str, purpose: str, between: tuple[float, float]) -> float:
    """A duration that is random between instances and always the same for one."""
    return random.Random(f"{purpose}/{instance_id}").uniform(*between)


_DOWN_TAINTS = (
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.cloudprovider.kubernetes.io/shutdown",
)


def _without_down_taints(draft: Object) -> None:
    kept = [t for t in draft["spec"].get("taints") or [] if t["key"] not in _DOWN_TAINTS]
    draft["spec"]["taints"] = kept
    if not kept:
        del draft["spec"]["taints"]


def _without_notices(draft: Object) -> None:
    for name in (INSTANCE_ACTION_ANNOTATION, REBALANCE_ANNOTATION):
        (draft["metadata"].get("annotations") or {}).pop(name, None)


def _taint_unreachable(at: str, stopped: bool, draft: Object) -> None:
    taints = [t for t in draft["spec"].get("taints") or [] if t["key"] != "node.kubernetes.io/unreachable"]
    if stopped:
        taints.append({"key": "node.cloudprovider.kubernetes.io/shutdown", "effect": "NoSchedule"})
    for effect in ("NoSchedule", "NoExecute"):
        taints.append({"key": "node.kubernetes.io/unreachable", "effect": effect, "timeAdded": at})
    draft["spec"]["taints"] = taints


def _set_conditions(conditions: list[Object], draft: Object) -> None:
    draft["status"]["conditions"] = conditions


def _annotate(annotations: dict[str, str], draft: Object) -> None:
    draft["metadata"].setdefault("annotations", {}).update(annotations)


def _pod_not_ready(draft: Object) -> None:
    for condition in draft["status"].get("conditions") or ():
        if condition["type"] in ("Ready", "ContainersReady"):
            condition["status"] = "False"


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_bytes(content)
    part.replace(path)


def control_routes(fleet: Callable[[], Fleet]) -> list[Any]:
    """`/_sandbox/fleet` (GET: all nodes), `/_sandbox/fleet/interrupt` (POST node | cluster, count) and
    `/_sandbox/fleet/resume` (POST node)."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def nodes(request: Request) -> Response:
        return JSONResponse(fleet().describe())

    async def interrupt(request: Request) -> Response:
        try:
            wish = await request.json()
            known = ("node", "cluster", "count", "notice_seconds", "behaviour")
            if unknown := set(wish).difference(known):
                raise ValueError(f"unknown field {', '.join(sorted(unknown))}; known: {', '.join(known)}")
            return JSONResponse({"interrupted": fleet().interrupt(**wish)})
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    async def resume(request: Request) -> Response:
        try:
            return JSONResponse(fleet().resume(**await request.json()))
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    return [
        Route("/_sandbox/fleet", nodes),
        Route("/_sandbox/fleet/resume", resume, methods=["POST"]),
        Route("/_sandbox/fleet/interrupt", interrupt, methods=["POST"]),
    ]
