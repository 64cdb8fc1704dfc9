"""EC2 instances with the launch semantics that matter for a controller, kept over restarts.

An own store rather than moto's: moto 5.2.5 ignores ClientToken, MaxCount, capacity and visibility, keeps nothing
over a restart, and its describe answers stop at 100; proxying around all of that would leave nothing of it. State is a
function of time: an instance has moments (running_at, shutting_down_at, …), what Describe says follows from the clock.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from control.sandbox.aws import network
from control.sandbox.aws.protocol import AwsError
from control.sandbox.aws.storage import Storage

TERMINATED_VISIBLE_SECONDS = 3_600.0
"""AWS shows terminated instances for about an hour."""
TOKEN_KEPT_SECONDS = 24 * 3_600.0
"""EC2 keeps a client token at least 24 hours after the instance is terminated."""
SHUTDOWN_SECONDS = 20.0

STOP_SECONDS = 20.0

State = Literal["pending", "running", "shutting-down", "terminated", "stopping", "stopped"]
STATE_CODES: dict[str, int] = {
    "pending": 0,
    "running": 16,
    "shutting-down": 32,
    "terminated": 48,
    "stopping": 64,
    "stopped": 80,
}
Behaviour = Literal["terminate", "stop", "hibernate"]
"""What an interruption does to an instance (InstanceInterruptionBehavior)."""


@dataclass(slots=True)
class Instance:
    """One instance. Moments are seconds since the epoch; None means not planned."""

    instance_id: str
    account_id: str
    region: str
    zone_id: str
    zone_name: str
    instance_type: str
    lifecycle: Literal["spot", "on-demand"]
    reservation_id: str
    launch_index: int
    client_token: str
    image_id: str
    subnet_id: str
    vpc_id: str
    security_group_ids: list[str]
    private_ip: str
    launched_at: float
    visible_at: float
    running_at: float
    tags: dict[str, str] = field(default_factory=dict)
    spot_request_id: str | None = None
    spot_max_price: str | None = None
    iam_profile_arn: str | None = None
    key_name: str | None = None
    metadata_options: dict[str, str] = field(default_factory=dict)
    block_devices: list[dict[str, Any]] = field(default_factory=list)
    """Volumes of the launch, as `volumes.devices_of` makes them."""
    shutting_down_at: float | None = None
    terminated_at: float | None = None
    stopping_at: float | None = None
    stopped_at: float | None = None
    reason_code: str | None = None
    interruption_notice_at: float | None = None
    interruption_due_at: float | None = None
    interruption_behaviour: Behaviour = "terminate"
    rebalance_at: float | None = None
    scheduled_event: dict[str, Any] | None = None
    announced: str = ""
    """The newest state that listeners were told."""

    def state(self, now: float) -> State:
        if self.terminated_at is not None and self.terminated_at <= now:
            return "terminated"
        if self.shutting_down_at is not None and self.shutting_down_at <= now:
            return "shutting-down"
        if self.stopped_at is not None and self.stopped_at <= now:
            return "stopped"
        if self.stopping_at is not None and self.stopping_at <= now:
            return "stopping"
        return "running" if self.running_at <= now else "pending"

    def visible(self, now: float) -> bool:
        gone = self.terminated_at is not None and now - self.terminated_at > TERMINATED_VISIBLE_SECONDS
        return self.visible_at <= now and not gone

    @property
    def private_dns_name(self) -> str:
        suffix = "ec2.internal" if self.region == "us-east-1" else f"{self.region}.compute.internal"
        return f"ip-{self.private_ip.replace('.', '-')}.{suffix}"

    def next_moment(self, now: float) -> float | None:
        """When the state changes next."""
        moments = (self.running_at, self.stopping_at, self.stopped_at, self.shutting_down_at, self.terminated_at)
        return min((m for m in moments if m is not None and m > now), default=None)

    def ended_at(self, now: float) -> float | None:
        """When it stopped running: it shut down, or stopped; None while it runs."""
        moments = (self.stopping_at, self.shutting_down_at)
        return min((m for m in moments if m is not None and m <= now), default=None)

    def spot_status(self, now: float) -> tuple[str, str, str]:
        """(request state, status code, status message) of its Spot request."""
        ended = self.shutting_down_at is not None and self.shutting_down_at <= now
        if ended and self.reason_code == "Server.SpotInstanceTermination":
            return (
                "closed",
                "instance-terminated-no-capacity",
                "Your Spot instance was terminated: no Spot capacity is available.",
            )
        if ended:
            return (
                "closed",
                "instance-terminated-by-user",
                "Spot Instance terminated due to user-initiated termination.",
            )
        if self.stopping_at is not None and self.stopping_at <= now:
            return (
                "disabled",
                "instance-stopped-no-capacity",
                "Your Spot instance was stopped: no capacity is available.",
            )
        if self.interruption_notice_at is not None and self.interruption_behaviour != "terminate":
            return "active", "marked-for-stop", "Your Spot instance is marked for stopping."
        if self.interruption_notice_at is not None:
            return "active", "marked-for-termination", "Your Spot instance is marked for termination."
        return "active", "fulfilled", "Your spot request is fulfilled."


@dataclass(slots=True)
class Launch:
    """The memory of one client token in one zone."""

    account_id: str
    region: str
    zone_key: str
    token: str
    fingerprint: str
    instance_ids: list[str]
    at: float


def fingerprint(params: dict[str, Any]) -> str:
    """What must be equal between two calls with one token: everything but the token, the zone and DryRun.

    Zone and subnet are left out: idempotency is zonal, a retry in another zone is another launch and no mismatch.
    """
    kept = {k: v for k, v in params.items() if k not in ("ClientToken", "SubnetId", "DryRun")}
    if "Placement" in kept:
        kept["Placement"] = {
            k: v for k, v in kept["Placement"].items() if k not in ("AvailabilityZone", "AvailabilityZoneId")
        }
        if not kept["Placement"]:
            del kept["Placement"]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class Instances:
    """All instances of all accounts, with client tokens. Belongs to one event loop."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self._storage = storage
        self.clock = clock
        self.by_id: dict[str, Instance] = {}
        self._launches: dict[tuple[str, str, str], dict[str, Launch]] = {}
        for _, row in storage.all("instance"):
            instance = Instance(**row)
            self.by_id[instance.instance_id] = instance
        for _, row in storage.all("launch"):
            self._remember(Launch(**row))
        self.launch_count: int = dict(storage.all("meta")).get("launch_count", 0)

    def of(self, account_id: str, region: str) -> list[Instance]:
        """An account's instances in one region, oldest first, whatever their state and visibility."""
        mine = [i for i in self.by_id.values() if i.account_id == account_id and i.region == region]
        return sorted(mine, key=lambda i: (i.launched_at, i.instance_id))

    def earlier_launch(
        self, account_id: str, region: str, zone_key: str, token: str, params: dict[str, Any]
    ) -> list[Instance] | None:
        """The instances an earlier call with this token made here, or None.

        Raises IdempotentParameterMismatch when the parameters differ, IdempotentInstanceTerminated when all are gone.
        """
        launch = self._launches.get((account_id, region, token), {}).get(zone_key)
        if launch is None:
            return None
        if launch.fingerprint != fingerprint(params):
            raise AwsError(
                "IdempotentParameterMismatch",
                "The client token you have provided is associated with a resource that has different parameters.",
            )
        instances = [self.by_id[i] for i in launch.instance_ids if i in self.by_id]
        now = self.clock()
        if all(i.state(now) in ("shutting-down", "terminated") for i in instances):
            raise AwsError(
                "IdempotentInstanceTerminated",
                "The client token you have provided is associated with an instance that has been terminated.",
            )
        return instances

    def add(self, instances: list[Instance], zone_key: str, token: str | None, params: dict[str, Any]) -> None:
        """Keep new instances, and the token with them, in one write: a killed sandbox has both or neither."""
        for instance in instances:
            self.by_id[instance.instance_id] = instance
        self.launch_count += len(instances)
        written: list[tuple[str, str, Any]] = [("instance", i.instance_id, asdict(i)) for i in instances]
        written.append(("meta", "launch_count", self.launch_count))
        if token:
            first = instances[0]
            launch = Launch(
                first.account_id, first.region, zone_key, token, fingerprint(params),
                [i.instance_id for i in instances], first.launched_at,
            )  # fmt: skip
            self._remember(launch)
            key = f"{launch.account_id}/{launch.region}/{launch.zone_key}/{launch.token}"
            written.append(("launch", key, asdict(launch)))
        self._storage.put_many(written)

    def save(self, instances: Iterable[Instance]) -> None:
        """Write what changed."""
        self._storage.put_many(("instance", i.instance_id, asdict(i)) for i in instances)

    def terminate(self, instance: Instance, reason: str = "Client.UserInitiatedShutdown") -> None:
        """Start shutting down now; a second call changes nothing."""
        now = self.clock()
        if instance.state(now) in ("shutting-down", "terminated"):
            return
        instance.shutting_down_at = now
        instance.terminated_at = now + SHUTDOWN_SECONDS
        instance.reason_code = reason
        self.save([instance])

    def interrupt(self, instance: Instance, notice_seconds: float, behaviour: Behaviour = "terminate") -> None:
        """Plan the end of a Spot instance: noticed now, ended after the notice; hibernation begins with the notice.

        A second warning repeats the first: AWS neither postpones nor changes what it has announced.
        """
        if instance.interruption_notice_at is not None:
            return
        now = self.clock()
        due = now if behaviour == "hibernate" else now + notice_seconds
        instance.interruption_notice_at = now
        instance.interruption_due_at = due
        instance.interruption_behaviour = behaviour
        if behaviour == "terminate":
            instance.shutting_down_at, instance.terminated_at = due, due + SHUTDOWN_SECONDS
            instance.reason_code = "Server.SpotInstanceTermination"
        else:
            instance.stopping_at, instance.stopped_at = due, due + STOP_SECONDS
            instance.reason_code = "Server.SpotInstanceShutdown"
        self.save([instance])

    def resume(self, instance: Instance, boot_seconds: float) -> None:
        """EC2 starts a stopped Spot instance again, as it does by itself when it has capacity: the same instance, its
        request fulfilled, launched now."""
        now = self.clock()
        instance.stopping_at = instance.stopped_at = instance.reason_code = None
        instance.interruption_notice_at = instance.interruption_due_at = instance.rebalance_at = None
        instance.interruption_behaviour = "terminate"
        instance.launched_at = now
        instance.running_at = now + boot_seconds
        self.save([instance])

    def forget_old(self) -> None:
        """Drop what AWS would have forgotten, so that a sandbox left running does not grow."""
        now = self.clock()
        for instance in list(self.by_id.values()):
            if instance.terminated_at is not None and now - instance.terminated_at > TOKEN_KEPT_SECONDS:
                del self.by_id[instance.instance_id]
                self._storage.delete("instance", instance.instance_id)
                by_zone = self._launches.get((instance.account_id, instance.region, instance.client_token), {})
                for zone_key, launch in list(by_zone.items()):
                    if not any(i in self.by_id for i in launch.instance_ids):
                        del by_zone[zone_key]
                        self._storage.delete("launch", f"{launch.account_id}/{launch.region}/{zone_key}/{launch.token}")

    def _remember(self, launch: Launch) -> None:
        self._launches.setdefault((launch.account_id, launch.region, launch.token), {})[launch.zone_key] = launch


def private_ip(account_id: str, region: str, zone_id: str, number: int) -> str:
    """An address in the zone's subnet, unique per launch number (65,000 before it repeats)."""
    order = [s.zone_id for s in network.subnets(account_id, region)].index(zone_id)
    low = 16 + number % 64_000
    return f"10.{order}.{low // 250}.{low % 250 + 4}"
