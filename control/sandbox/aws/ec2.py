"""The EC2 actions a controller of Spot nodes uses; what is not here goes to moto."""

import gzip
import hashlib
import importlib.util
import json
import random
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from control.sandbox.aws import network, volumes
from control.sandbox.aws.describing import filters, matches_any, opened, paged, sealed
from control.sandbox.aws.instances import STATE_CODES, Instance, Instances, private_ip
from control.sandbox.aws.protocol import Answer, AwsError, Call, ec2_answer, timestamp
from control.sandbox.market.catalogue import REGIONS, ZONE_IDS, Catalogue, Pool, load_catalogue
from control.sandbox.market.interface import Market

# What an account and an image that say nothing give an instance.
METADATA_OPTIONS = {
    "HttpTokens": "optional",
    "HttpPutResponseHopLimit": "1",
    "HttpEndpoint": "enabled",
    "HttpProtocolIpv6": "disabled",
    "InstanceMetadataTags": "disabled",
}
DEFAULT_IMAGES = {"x86_64": "ami-0c0ffee00000x8664", "arm64": "ami-0c0ffee0000arm640"}


class TokenBucket:
    """AWS's API throttling: `burst` calls at once, refilled at `per_second`."""

    def __init__(self, burst: float, per_second: float) -> None:
        self.burst, self.per_second = burst, per_second
        self._level, self._at = burst, time.monotonic()

    def take(self, amount: float = 1.0) -> bool:
        now = time.monotonic()
        self._level = min(self.burst, self._level + (now - self._at) * self.per_second)
        self._at = now
        if self._level < amount:
            return False
        self._level -= amount
        return True


class Ec2:
    """Handlers by action name. `changed` is called with instances whose state may have moved."""

    def __init__(
        self,
        instances: Instances,
        market: Market,
        *,
        boot_seconds: tuple[float, float],
        visibility_delay_seconds: tuple[float, float],
        describe_page_size: int,
        buckets: dict[str, tuple[float, float]],
        capacity_errors: bool,
        changed: Callable[[list[Instance]], None],
    ) -> None:
        self.instances = instances
        self.market = market
        self.catalogue: Catalogue = load_catalogue()
        self.boot_seconds = boot_seconds
        self.visibility_delay_seconds = visibility_delay_seconds
        self.describe_page_size = describe_page_size
        self.capacity_errors = capacity_errors
        self._bucket_sizes = buckets
        self._buckets: dict[tuple[str, str, str], TokenBucket] = {}
        self._changed = changed
        self._random = random.Random()
        self._actions: dict[str, Callable[[Call], dict[str, Any]]] = {
            "RunInstances": self._run_instances,
            "CreateFleet": self._create_fleet,
            "TerminateInstances": self._terminate_instances,
            "DescribeInstances": self._describe_instances,
            "DescribeInstanceStatus": self._describe_instance_status,
            "DescribeInstanceAttribute": self._describe_instance_attribute,
            "DescribeSpotInstanceRequests": self._describe_spot_requests,
            "CancelSpotInstanceRequests": self._cancel_spot_requests,
            "CreateTags": self._create_tags,
            "DeleteTags": self._delete_tags,
            "DescribeTags": self._describe_tags,
            "DescribeAvailabilityZones": self._describe_zones,
            "DescribeRegions": self._describe_regions,
            "DescribeSubnets": self._describe_subnets,
            "DescribeVpcs": self._describe_vpcs,
            "DescribeSecurityGroups": self._describe_security_groups,
            "DescribeVolumes": self._describe_volumes,
            "DescribeImages": self._describe_images,
            "DescribeInstanceTypes": self._describe_types,
            "DescribeInstanceTypeOfferings": self._describe_offerings,
        }

    def knows(self, action: str) -> bool:
        return action in self._actions

    def handle(self, call: Call) -> Answer:
        self.throttle(call)
        if str(call.params.get("DryRun", "")).lower() == "true":
            raise AwsError("DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)
        return ec2_answer(call, self._actions[call.action](call))

    def throttle(self, call: Call) -> None:
        """Raise RequestLimitExceeded when the account's bucket for this action is empty."""
        if call.action not in self._bucket_sizes:
            return
        key = (call.caller.account_id, call.region, call.action)
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(*self._bucket_sizes[call.action])
        if not self._buckets[key].take():
            raise AwsError("RequestLimitExceeded", "Request limit exceeded.", 503)

    # launching ------------------------------------------------------------------------------------------------------

    def _run_instances(self, call: Call) -> dict[str, Any]:
        p = call.params
        instances = self._launch(call, p, _whole(p, "MinCount"), _whole(p, "MaxCount"))
        call.result["instance_ids"] = [i.instance_id for i in instances]
        return self._reservation(instances)

    def _launch(self, call: Call, p: dict[str, Any], minimum: int, maximum: int) -> list[Instance]:
        account_id, region = call.caller.account_id, call.region
        if not 1 <= minimum <= maximum:
            raise AwsError(
                "InvalidParameterValue", f"MinCount {minimum} and MaxCount {maximum}: 1 <= MinCount <= MaxCount"
            )
        kind = p.get("InstanceType", "m5.large")
        if kind not in self.catalogue.types:
            raise AwsError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
        if not p.get("ImageId") and not p.get("LaunchTemplate"):
            raise AwsError("MissingParameter", "The request must contain the parameter ImageId")
        token = p.get("ClientToken") or ""
        if len(token) > 64:
            raise AwsError("InvalidParameterValue", "ClientToken must be at most 64 ASCII characters")
        named_zone = self._zone(account_id, region, p)
        zone_key = named_zone or ""
        if token:
            earlier = self.instances.earlier_launch(account_id, region, zone_key, token, p)
            if earlier is not None:
                call.result["idempotent"] = True
                return earlier
        spot = p.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        zone_id, available = self._place(region, kind, named_zone, minimum, spot, call)
        pool = Pool(region, zone_id, kind)
        max_price = p.get("InstanceMarketOptions", {}).get("SpotOptions", {}).get("MaxPrice")
        now_market = self.market.now()
        if spot and max_price is not None and float(max_price) < self.market.price_usd_per_hour(pool, now_market):
            raise AwsError(
                "SpotMaxPriceTooLow",
                f"Your Spot request price of {max_price} is lower than the minimum required Spot request fulfillment "
                f"price of {self.market.price_usd_per_hour(pool, now_market)}.",
            )
        count = min(maximum, available)
        subnet = next(s for s in network.subnets(account_id, region) if s.zone_id == zone_id)
        now = self.instances.clock()
        reservation = "r-" + secrets.token_hex(9)[:17]
        tags = _tag_specifications(p, "instance")
        made = []
        for index in range(count):
            boot = self._random.uniform(*self.boot_seconds)
            made.append(
                Instance(
                    instance_id="i-" + secrets.token_hex(9)[:17],
                    account_id=account_id,
                    region=region,
                    zone_id=zone_id,
                    zone_name=subnet.zone_name,
                    instance_type=kind,
                    lifecycle="spot" if spot else "on-demand",
                    reservation_id=reservation,
                    launch_index=index,
                    client_token=token,
                    image_id=p.get("ImageId") or DEFAULT_IMAGES[self.catalogue.types[kind].architecture],
                    subnet_id=subnet.subnet_id,
                    vpc_id=subnet.vpc_id,
                    security_group_ids=p.get("SecurityGroupId") or [network.security_group_id(account_id, region)],
                    private_ip=private_ip(account_id, region, zone_id, self.instances.launch_count + index),
                    launched_at=now,
                    visible_at=now + self._random.uniform(*self.visibility_delay_seconds),
                    running_at=now + boot,
                    tags=dict(tags),
                    spot_request_id="sir-" + secrets.token_hex(4) if spot else None,
                    spot_max_price=max_price,
                    iam_profile_arn=p.get("IamInstanceProfile", {}).get("Arn"),
                    key_name=p.get("KeyName"),
                    metadata_options=METADATA_OPTIONS | p.get("MetadataOptions", {}),
                    block_devices=volumes.devices_of(p),
                )
            )
        self.instances.add(made, zone_key, token, p)
        self._changed(made)
        return made

    def _zone(self, account_id: str, region: str, p: dict[str, Any]) -> str | None:
        """The zone id the request names (by subnet, zone name or zone id), or None."""
        subnet_id = p.get("SubnetId") or next(
            (n["SubnetId"] for n in p.get("NetworkInterface", []) if "SubnetId" in n), None
        )
        if subnet_id:
            subnet = next((s for s in network.subnets(account_id, region) if s.subnet_id == subnet_id), None)
            if subnet is None:
                raise AwsError("InvalidSubnetID.NotFound", f"The subnet ID '{subnet_id}' does not exist")
            return subnet.zone_id
        placement = p.get("Placement", {})
        if placement.get("AvailabilityZoneId"):
            if placement["AvailabilityZoneId"] not in ZONE_IDS.get(region, ()):
                raise AwsError(
                    "InvalidParameterValue", f"Invalid availability zone ID: [{placement['AvailabilityZoneId']}]"
                )
            return str(placement["AvailabilityZoneId"])
        name = placement.get("AvailabilityZone")
        if name:
            zone_id = network.zone_ids(account_id, region).get(name)
            if zone_id is None:
                raise AwsError("InvalidParameterValue", f"Invalid availability zone: [{name}]")
            return zone_id
        return None

    def _place(
        self, region: str, kind: str, zone_id: str | None, minimum: int, spot: bool, call: Call
    ) -> tuple[str, int]:
        """Zone and how many fit; raises Unsupported or InsufficientInstanceCapacity like AWS."""
        offered = [z for z in self.catalogue.types[kind].zone_ids if z in ZONE_IDS.get(region, ())]
        names = network.zone_names(call.caller.account_id, region)
        if zone_id is not None and zone_id not in offered:
            raise AwsError(
                "Unsupported",
                f"Your requested instance type ({kind}) is not supported in your requested Availability Zone "
                f"({names[zone_id]}). Please retry your request by not specifying an Availability Zone or choosing "
                f"{', '.join(sorted(names[z] for z in offered))}.",
            )
        known = set(self.market.pools(region))
        now = self.market.now()

        def room(zone: str) -> int:
            pool = Pool(region, zone, kind)
            if not self.capacity_errors or pool not in known:
                return 1_000
            return self.market.capacity(pool, now, spot=spot)

        candidates = [zone_id] if zone_id is not None else sorted(offered, key=lambda z: (-room(z), z))
        best = candidates[0] if candidates else None
        if best is None or room(best) < minimum:
            if spot:
                message = "There is no Spot capacity available that matches your request."
            else:
                message = (
                    f"We currently do not have sufficient {kind} capacity in the Availability Zone you requested "
                    f"({names.get(best or '', region)}). Our system will be working on provisioning more."
                )
            raise AwsError("InsufficientInstanceCapacity", message, 500)
        return best, room(best)

    def _create_fleet(self, call: Call) -> dict[str, Any]:
        """Type `instant` only: tries the overrides in order until the target is met."""
        p = call.params
        if p.get("Type") != "instant":
            raise AwsError("InvalidParameterValue", "The sandbox's CreateFleet knows Type=instant only")
        target = p.get("TargetCapacitySpecification", {})
        missing = int(target.get("TotalTargetCapacity", 1))
        spot = target.get("DefaultTargetCapacityType", "on-demand") == "spot"
        tags = _tag_specifications(p, "instance")
        fleet_id = f"fleet-{secrets.token_hex(16)}"
        made: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        overrides_tried = 0
        for configuration in p.get("LaunchTemplateConfigs", []):
            template = configuration.get("LaunchTemplateSpecification", {})
            for override in configuration.get("Overrides", [{}]):
                if missing <= 0:
                    break
                one: dict[str, Any] = {
                    "InstanceType": override.get("InstanceType", "m5.large"),
                    "LaunchTemplate": template,
                    "Placement": {"AvailabilityZone": override["AvailabilityZone"]}
                    if "AvailabilityZone" in override
                    else {},
                    "TagSpecification": [
                        {"ResourceType": "instance", "Tag": [{"Key": k, "Value": v} for k, v in tags.items()]}
                    ],
                }
                if "SubnetId" in override:
                    one["SubnetId"] = override["SubnetId"]
                if p.get("ClientToken"):
                    # one launch per override: each needs a token of its own, the same ones when the call is repeated
                    overrides_tried += 1
                    one["ClientToken"] = hashlib.sha256(f"{p['ClientToken']}/{overrides_tried}".encode()).hexdigest()
                if spot:
                    one["InstanceMarketOptions"] = {"MarketType": "spot"}
                described = {"launchTemplateSpecification": {k[0].lower() + k[1:]: v for k, v in template.items()}}
                try:
                    launched = self._launch(call, one, 1, missing)
                except AwsError as error:
                    errors.append(
                        {
                            "launchTemplateAndOverrides": described,
                            "lifecycle": "spot" if spot else "on-demand",
                            "errorCode": error.code,
                            "errorMessage": error.message,
                        }
                    )
                    continue
                missing -= len(launched)
                made.append(
                    {
                        "launchTemplateAndOverrides": described,
                        "lifecycle": "spot" if spot else "on-demand",
                        "instanceIds": [i.instance_id for i in launched],
                        "instanceType": one["InstanceType"],
                    }
                )
        call.result["instance_ids"] = [i for m in made for i in m["instanceIds"]]
        return {"fleetId": fleet_id, "errorSet": errors, "fleetInstanceSet": made}

    # ending ---------------------------------------------------------------------------------------------------------

    def _mine(self, call: Call, ids: list[str]) -> list[Instance]:
        """Instances by id; an id of another account does not exist for this one, exactly as in AWS."""
        now = self.instances.clock()
        found, unknown = [], []
        for instance_id in ids:
            instance = self.instances.by_id.get(instance_id)
            mine = (
                instance is not None
                and instance.account_id == call.caller.account_id
                and instance.region == call.region
                and instance.visible(now)
            )
            if instance is not None and mine:
                found.append(instance)
            else:
                unknown.append(instance_id)
        if any(not re.fullmatch(r"i-[0-9a-f]{8,17}", i) for i in unknown):
            raise AwsError("InvalidInstanceID.Malformed", f'Invalid id: "{unknown[0]}"')
        if unknown:
            plural = len(unknown) > 1
            listed = ", ".join(unknown)
            raise AwsError(
                "InvalidInstanceID.NotFound",
                f"The instance ID{'s' if plural else ''} '{listed}' do{'' if plural else 'es'} not exist",
            )
        return found

    def _terminate_instances(self, call: Call) -> dict[str, Any]:
        ids = call.params.get("InstanceId") or []
        if not ids:
            raise AwsError("MissingParameter", "The request must contain the parameter InstanceId")
        instances = self._mine(call, ids)
        now = self.instances.clock()
        rows = []
        for instance in instances:
            before = instance.state(now)
            self.instances.terminate(instance)
            rows.append(
                {
                    "instanceId": instance.instance_id,
                    "currentState": _state(instance.state(self.instances.clock())),
                    "previousState": _state(before),
                }
            )
        call.result["instance_ids"] = ids
        self._changed(instances)
        return {"instancesSet": rows}

    # describing -----------------------------------------------------------------------------------------------------

    def _selected(self, call: Call) -> tuple[list[Instance], str | None]:
        """Instances after ids, filters and paging, and the token of the next page."""
        p = call.params
        now = self.instances.clock()
        ids = p.get("InstanceId") or []
        if ids and p.get("MaxResults"):
            raise AwsError(
                "InvalidParameterCombination", "The parameter instancesSet cannot be used with the parameter maxResults"
            )
        every = self.instances.of(call.caller.account_id, call.region)
        chosen = self._mine(call, ids) if ids else [i for i in every if i.visible(now)]
        for name, values in filters(p):
            chosen = [i for i in chosen if _matches(i, name, values, now)]
        size = min(int(p.get("MaxResults") or self.describe_page_size), self.describe_page_size)
        if p.get("NextToken"):
            after = opened(p["NextToken"])
            chosen = [i for i in chosen if [i.launched_at, i.instance_id] > after]
        if len(chosen) <= size:
            return chosen, None
        last = chosen[size - 1]
        return chosen[:size], sealed([last.launched_at, last.instance_id])

    def _describe_instances(self, call: Call) -> dict[str, Any]:
        chosen, token = self._selected(call)
        by_reservation: dict[str, list[Instance]] = {}
        for instance in chosen:
            by_reservation.setdefault(instance.reservation_id, []).append(instance)
        call.result["count"] = len(chosen)
        return {"reservationSet": [self._reservation(group) for group in by_reservation.values()], "nextToken": token}

    def _describe_instance_attribute(self, call: Call) -> dict[str, Any]:
        """User data is never kept here, so it is empty; nothing is protected."""
        (instance,) = self._mine(call, [call.params.get("InstanceId", "")])
        return {
            "instanceId": instance.instance_id,
            "userData": {},
            "disableApiTermination": {"value": "false"},
        }

    def _describe_instance_status(self, call: Call) -> dict[str, Any]:
        call.params["InstanceId"] = call.params.get("InstanceId") or []
        chosen, token = self._selected(call)
        now = self.instances.clock()
        every = (
            str(call.params.get("IncludeAllInstances", call.params.get("includeAllInstances", "false"))).lower()
            == "true"
        )
        rows = []
        for i in chosen:
            state = i.state(now)
            if state != "running" and not every:
                continue
            fine = (
                "ok"
                if state == "running" and now - i.running_at > 5
                else "initializing"
                if state == "running"
                else "not-applicable"
            )
            rows.append(
                {
                    "instanceId": i.instance_id,
                    "availabilityZone": i.zone_name,
                    "instanceState": _state(state),
                    "instanceStatus": {"status": fine},
                    "systemStatus": {"status": fine},
                    "eventsSet": [i.scheduled_event] if i.scheduled_event else None,
                }
            )
        return {"instanceStatusSet": rows, "nextToken": token}

    def _describe_spot_requests(self, call: Call) -> dict[str, Any]:
        now = self.instances.clock()
        wanted = set(call.params.get("SpotInstanceRequestId") or [])
        chosen = [
            i
            for i in self.instances.of(call.caller.account_id, call.region)
            if i.spot_request_id and i.visible(now) and (not wanted or i.spot_request_id in wanted)
        ]
        for name, values in filters(call.params):
            chosen = [i for i in chosen if _request_matches(i, name, values, now)]
        rows = []
        for i in chosen:
            state, code, message = i.spot_status(now)
            rows.append(
                {
                    "spotInstanceRequestId": i.spot_request_id,
                    "state": state,
                    "type": "one-time" if i.interruption_behaviour == "terminate" else "persistent",
                    "instanceId": i.instance_id,
                    "launchedAvailabilityZone": i.zone_name,
                    "instanceInterruptionBehavior": i.interruption_behaviour,
                    "createTime": _at(i.launched_at),
                    "productDescription": "Linux/UNIX",
                    "spotPrice": i.spot_max_price,
                    "launchSpecification": {"instanceType": i.instance_type, "imageId": i.image_id},
                    "status": {
                        "code": code,
                        "message": message,
                        "updateTime": _at(i.interruption_notice_at or i.ended_at(now) or i.launched_at),
                    },
                    "tagSet": _tag_set(i.tags),
                }
            )
        return {"spotInstanceRequestSet": rows}

    def _cancel_spot_requests(self, call: Call) -> dict[str, Any]:
        wanted = call.params.get("SpotInstanceRequestId") or []
        return {"spotInstanceRequestSet": [{"spotInstanceRequestId": i, "state": "cancelled"} for i in wanted]}

    def _reservation(self, instances: list[Instance]) -> dict[str, Any]:
        first = instances[0]
        now = self.instances.clock()
        return {
            "reservationId": first.reservation_id,
            "ownerId": first.account_id,
            "groupSet": [],
            "instancesSet": [self._instance(i, now) for i in instances],
        }

    def _instance(self, i: Instance, now: float) -> dict[str, Any]:
        kind = self.catalogue.types[i.instance_type]
        state = i.state(now)
        ended_at = i.ended_at(now)
        ended = ended_at is not None
        # a stopped instance keeps its addresses
        alive = state not in ("shutting-down", "terminated")
        return {
            "instanceId": i.instance_id,
            "imageId": i.image_id,
            "instanceState": _state(state),
            "privateDnsName": i.private_dns_name if alive else "",
            "dnsName": "",
            "reason": f"User initiated ({timestamp(_at(ended_at))})" if ended_at is not None else "",
            "keyName": i.key_name,
            "amiLaunchIndex": i.launch_index,
            "instanceType": i.instance_type,
            "launchTime": _at(i.launched_at),
            "placement": {
                "availabilityZone": i.zone_name,
                "availabilityZoneId": i.zone_id,
                "groupName": "",
                "tenancy": "default",
            },
            "monitoring": {"state": "disabled"},
            "subnetId": i.subnet_id if alive else None,
            "vpcId": i.vpc_id if alive else None,
            "privateIpAddress": i.private_ip if alive else None,
            "stateReason": {"code": i.reason_code, "message": f"{i.reason_code}: instance ended"} if ended else None,
            "architecture": kind.architecture,
            "rootDeviceType": "ebs",
            "rootDeviceName": volumes.ROOT_DEVICE,
            "blockDeviceMapping": volumes.mappings(i) if alive else [],
            "metadataOptions": {"state": "applied"}
            | {name[0].lower() + name[1:]: value for name, value in i.metadata_options.items()},
            "virtualizationType": "hvm",
            "hypervisor": "xen",
            "clientToken": i.client_token,
            "instanceLifecycle": "spot" if i.lifecycle == "spot" else None,
            "spotInstanceRequestId": i.spot_request_id,
            "iamInstanceProfile": {"arn": i.iam_profile_arn} if i.iam_profile_arn else None,
            "groupSet": [{"groupId": g, "groupName": "default"} for g in i.security_group_ids],
            "cpuOptions": {"coreCount": max(1, kind.vcpus // 2), "threadsPerCore": 2 if kind.vcpus > 1 else 1},
            "platformDetails": "Linux/UNIX",
            "tagSet": _tag_set(i.tags),
        }

    # tags -----------------------------------------------------------------------------------------------------------

    def _create_tags(self, call: Call) -> dict[str, Any]:
        instances = self._mine(call, call.params.get("ResourceId") or [])
        for instance in instances:
            instance.tags.update({t["Key"]: t.get("Value", "") for t in call.params.get("Tag", [])})
        self.instances.save(instances)
        return {"return": True}

    def _delete_tags(self, call: Call) -> dict[str, Any]:
        instances = self._mine(call, call.params.get("ResourceId") or [])
        for instance in instances:
            for tag in call.params.get("Tag", []):
                instance.tags.pop(tag["Key"], None)
        self.instances.save(instances)
        return {"return": True}

    def _describe_tags(self, call: Call) -> dict[str, Any]:
        now = self.instances.clock()
        rows = [
            {"resourceId": i.instance_id, "resourceType": "instance", "key": k, "value": v}
            for i in self.instances.of(call.caller.account_id, call.region)
            if i.visible(now)
            for k, v in i.tags.items()
        ]
        known = {"resource-id": "resourceId", "resource-type": "resourceType", "key": "key", "value": "value"}
        for name, values in filters(call.params):
            if name not in known:
                raise AwsError("InvalidParameterValue", f"The filter '{name}' is invalid")
            rows = [r for r in rows if matches_any(r[known[name]], values)]
        return {"tagSet": rows}

    # the account's surroundings -------------------------------------------------------------------------------------

    def _describe_zones(self, call: Call) -> dict[str, Any]:
        names = network.zone_names(call.caller.account_id, call.region)
        rows = [
            {
                "zoneName": name,
                "zoneId": zone_id,
                "zoneState": "available",
                "regionName": call.region,
                "zoneType": "availability-zone",
                "groupName": call.region,
                "networkBorderGroup": call.region,
                "optInStatus": "opt-in-not-required",
                "messageSet": [],
            }
            for zone_id, name in sorted(names.items(), key=lambda item: item[1])
        ]
        wanted_names, wanted_ids = call.params.get("ZoneName"), call.params.get("ZoneId")
        known = {
            "zone-name": "zoneName",
            "zone-id": "zoneId",
            "state": "zoneState",
            "region-name": "regionName",
            "zone-type": "zoneType",
        }
        if wanted_names:
            rows = [r for r in rows if r["zoneName"] in wanted_names]
        if wanted_ids:
            rows = [r for r in rows if r["zoneId"] in wanted_ids]
        for name, values in filters(call.params):
            if name in known:
                rows = [r for r in rows if matches_any(str(r[known[name]]), values)]
        return {"availabilityZoneInfo": rows}

    def _describe_regions(self, call: Call) -> dict[str, Any]:
        return {
            "regionInfo": [
                {"regionName": r, "regionEndpoint": f"ec2.{r}.amazonaws.com", "optInStatus": "opt-in-not-required"}
                for r in REGIONS
            ]
        }

    def _describe_subnets(self, call: Call) -> dict[str, Any]:
        account_id = call.caller.account_id
        rows = [
            {
                "subnetId": s.subnet_id,
                "subnetArn": f"arn:aws:ec2:{call.region}:{account_id}:subnet/{s.subnet_id}",
                "state": "available",
                "vpcId": s.vpc_id,
                "cidrBlock": s.cidr,
                "availableIpAddressCount": 60_000,
                "availabilityZone": s.zone_name,
                "availabilityZoneId": s.zone_id,
                "defaultForAz": True,
                "mapPublicIpOnLaunch": False,
                "ownerId": account_id,
                "tagSet": [],
            }
            for s in network.subnets(account_id, call.region)
        ]
        wanted = call.params.get("SubnetId")
        if wanted:
            missing = set(wanted) - {str(r["subnetId"]) for r in rows}
            if missing:
                raise AwsError("InvalidSubnetID.NotFound", f"The subnet ID '{sorted(missing)[0]}' does not exist")
            rows = [r for r in rows if r["subnetId"] in wanted]
        known = {
            "vpc-id": "vpcId", "subnet-id": "subnetId", "availability-zone": "availabilityZone", "state": "state",
            "availability-zone-id": "availabilityZoneId", "availabilityZone": "availabilityZone",
        }  # fmt: skip
        for name, values in filters(call.params):
            rows = [r for r in rows if name in known and matches_any(str(r[known[name]]), values)]
        return {"subnetSet": rows}

    def _describe_volumes(self, call: Call) -> dict[str, Any]:
        now = self.instances.clock()
        living = [
            instance
            for instance in self.instances.of(call.caller.account_id, call.region)
            if instance.state(now) not in ("shutting-down", "terminated")
        ]
        return volumes.describe(living, call.params)

    def _describe_vpcs(self, call: Call) -> dict[str, Any]:
        row = {
            "vpcId": network.vpc_id(call.caller.account_id, call.region),
            "ownerId": call.caller.account_id,
            "state": "available",
            "cidrBlock": "10.0.0.0/8",
            "isDefault": True,
            "tagSet": [],
        }
        wanted = call.params.get("VpcId")
        return {"vpcSet": [row] if not wanted or row["vpcId"] in wanted else []}

    def _describe_security_groups(self, call: Call) -> dict[str, Any]:
        account_id = call.caller.account_id
        row = {
            "ownerId": account_id,
            "groupId": network.security_group_id(account_id, call.region),
            "groupName": "default",
            "groupDescription": "default VPC security group",
            "vpcId": network.vpc_id(account_id, call.region),
            "ipPermissions": [],
            "ipPermissionsEgress": [],
            "tagSet": [],
        }
        return {"securityGroupInfo": [row]}

    def _describe_images(self, call: Call) -> dict[str, Any]:
        rows = [
            {
                "imageId": image_id,
                "imageState": "available",
                "imageOwnerId": "amazon",
                "isPublic": True,
                "architecture": architecture,
                "imageType": "machine",
                "name": f"amazon-eks-node-al2023-{architecture}-standard-1.33",
                "rootDeviceType": "ebs",
                "virtualizationType": "hvm",
                "creationDate": "2025-06-01T00:00:00.000Z",
            }
            for architecture, image_id in DEFAULT_IMAGES.items()
        ]
        wanted = call.params.get("ImageId")
        return {"imagesSet": [r for r in rows if not wanted or r["imageId"] in wanted]}

    def _describe_types(self, call: Call) -> dict[str, Any]:
        p = call.params
        names = sorted(n for n, t in self.catalogue.types.items() if call.region in t.on_demand_usd_per_hour)
        wanted = p.get("InstanceType")
        if wanted:
            unknown = [t for t in wanted if t not in names]
            if unknown:
                raise AwsError(
                    "InvalidInstanceType", f"The following supplied instance types do not exist: [{', '.join(unknown)}]"
                )
            names = [n for n in names if n in wanted]
        rows = [_type_row(self.catalogue, n) for n in names]
        known: dict[str, Callable[[dict[str, Any]], list[str]]] = {
            "instance-type": lambda r: [r["instanceType"]],
            "current-generation": lambda r: [str(r["currentGeneration"]).lower()],
            "bare-metal": lambda r: [str(r["bareMetal"]).lower()],
            "burstable-performance-supported": lambda r: [str(r["burstablePerformanceSupported"]).lower()],
            "processor-info.supported-architecture": lambda r: r["processorInfo"]["supportedArchitectures"],
            "supported-usage-class": lambda r: r["supportedUsageClasses"],
            "vcpu-info.default-vcpus": lambda r: [str(r["vCpuInfo"]["defaultVCpus"])],
            "memory-info.size-in-mib": lambda r: [str(r["memoryInfo"]["sizeInMiB"])],
        }
        for name, values in filters(p):
            if name not in known:
                raise AwsError("InvalidParameterValue", f"The filter '{name}' is invalid")
            rows = [r for r in rows if any(matches_any(v, values) for v in known[name](r))]
        page, token = paged(rows, p, 100)
        return {"instanceTypeSet": page, "nextToken": token}

    def _describe_offerings(self, call: Call) -> dict[str, Any]:
        p = call.params
        kind = p.get("LocationType", "region")
        names = network.zone_names(call.caller.account_id, call.region)
        rows = []
        for t in self.catalogue.types.values():
            zones = [z for z in t.zone_ids if z in names]
            if kind == "region" and call.region in t.on_demand_usd_per_hour:
                rows.append({"instanceType": t.name, "locationType": kind, "location": call.region})
            elif kind in ("availability-zone", "availability-zone-id"):
                rows += [
                    {
                        "instanceType": t.name,
                        "locationType": kind,
                        "location": names[z] if kind == "availability-zone" else z,
                    }
                    for z in zones
                ]
        for name, values in filters(p):
            key = {"instance-type": "instanceType", "location": "location"}.get(name)
            if key is None:
                raise AwsError("InvalidParameterValue", f"The filter '{name}' is invalid")
            rows = [r for r in rows if matches_any(r[key], values)]
        page, token = paged(rows, p, 1000)
        return {"instanceTypeOfferingSet": page, "nextToken": token}


def _whole(p: dict[str, Any], name: str) -> int:
    if name not in p:
        raise AwsError("MissingParameter", f"The request must contain the parameter {name}")
    return int(p[name])


def _state(state: str) -> dict[str, Any]:
    return {"code": STATE_CODES[state], "name": state}


def _at(epoch_seconds: float) -> datetime:
    return datetime.fromtimestamp(epoch_seconds, UTC)


def _tag_set(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": k, "value": v} for k, v in tags.items()]


def _tag_specifications(p: dict[str, Any], resource: str) -> dict[str, str]:
    return {
        tag["Key"]: tag.get("Value", "")
        for specification in p.get("TagSpecification", [])
        if specification.get("ResourceType") == resource
        for tag in specification.get("Tag", [])
    }


def _matches(i: Instance, name: str, values: list[str], now: float) -> bool:
    if name.startswith("tag:"):
        return name[4:] in i.tags and matches_any(i.tags[name[4:]], values)
    if name == "tag-key":
        return any(matches_any(k, values) for k in i.tags)
    attributes: dict[str, str] = {
        "instance-id": i.instance_id,
        "instance-state-name": i.state(now),
        "instance-state-code": str(STATE_CODES[i.state(now)]),
        "instance-type": i.instance_type,
        "instance-lifecycle": "spot" if i.lifecycle == "spot" else "",
        "availability-zone": i.zone_name,
        "availability-zone-id": i.zone_id,
        "client-token": i.client_token,
        "subnet-id": i.subnet_id,
        "vpc-id": i.vpc_id,
        "spot-instance-request-id": i.spot_request_id or "",
        "reservation-id": i.reservation_id,
        "private-dns-name": i.private_dns_name,
        "private-ip-address": i.private_ip,
        "image-id": i.image_id,
        "reason": i.reason_code or "",
        "state-reason-code": i.reason_code or "",
    }
    if name not in attributes:
        raise AwsError("InvalidParameterValue", f"The filter '{name}' is invalid")
    return matches_any(attributes[name], values)


def _request_matches(i: Instance, name: str, values: list[str], now: float) -> bool:
    state, code, _ = i.spot_status(now)
    if name in ("state", "status-code"):
        return matches_any({"state": state, "status-code": code}[name], values)
    return _matches(i, name, values, now)


@cache
def _moto_types() -> dict[str, Any]:
    """moto's recorded DescribeInstanceTypes answers for the catalogue's types, read without importing moto."""
    specification = importlib.util.find_spec("moto")
    if specification is None or not specification.submodule_search_locations:
        return {}
    path = Path(specification.submodule_search_locations[0], "ec2", "resources", "instance_types.json.gz")
    if not path.exists():
        return {}
    wanted = set(load_catalogue().types)
    return {k: v for k, v in json.loads(gzip.decompress(path.read_bytes())).items() if k in wanted}


def _type_row(catalogue: Catalogue, name: str) -> dict[str, Any]:
    kind = catalogue.types[name]
    recorded = _moto_types().get(name, {})
    network_info = recorded.get("NetworkInfo", {})
    gpus = recorded.get("GpuInfo", {}).get("Gpus", [])
    threads = 1 if kind.architecture == "arm64" else 2
    return {
        "instanceType": name,
        "currentGeneration": bool(recorded.get("CurrentGeneration", True)),
        "freeTierEligible": False,
        "supportedUsageClasses": ["on-demand", "spot"],
        "supportedRootDeviceTypes": ["ebs"],
        "supportedVirtualizationTypes": ["hvm"],
        "bareMetal": name.endswith(".metal"),
        "hypervisor": recorded.get("Hypervisor", "nitro"),
        "burstablePerformanceSupported": kind.family.startswith("t"),
        "processorInfo": {"supportedArchitectures": [kind.architecture]},
        "vCpuInfo": {
            "defaultVCpus": kind.vcpus,
            "defaultCores": max(1, kind.vcpus // threads),
            "defaultThreadsPerCore": threads,
        },
        "memoryInfo": {"sizeInMiB": int(kind.memory_gib * 1024)},
        "instanceStorageSupported": bool(recorded.get("InstanceStorageSupported", False)),
        "networkInfo": {
            "networkPerformance": network_info.get("NetworkPerformance", "Up to 10 Gigabit"),
            "maximumNetworkInterfaces": network_info.get("MaximumNetworkInterfaces", 4),
            "ipv4AddressesPerInterface": network_info.get("Ipv4AddressesPerInterface", 15),
            "ipv6Supported": True,
        },
        "gpuInfo": {
            "gpus": [
                {
                    "name": g.get("Name"),
                    "manufacturer": g.get("Manufacturer"),
                    "count": g.get("Count"),
                    "memoryInfo": {"sizeInMiB": g.get("MemoryInfo", {}).get("SizeInMiB")},
                }
                for g in gpus
            ]
        }
        if gpus
        else None,
    }
