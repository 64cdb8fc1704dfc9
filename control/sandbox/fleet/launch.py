"""The first launch of a fleet: through EC2 like everybody else, with the customer's own credentials."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from control.sandbox.aws import Credentials
from control.sandbox.fleet.manifests import CLUSTER_TAG_PREFIX
from control.sandbox.fleet.plan import ClusterPlan, NodeGroup

log = logging.getLogger(__name__)

# A tag would not do as the mark of the first launch: whoever replaces an instance copies its tags.
INITIAL_TOKEN_PREFIX = "sandbox-"
# The zone has none of it, or none left: the next zone may.
_ELSEWHERE = ("InsufficientInstanceCapacity", "Unsupported", "SpotMaxPriceTooLow")


def launch_cluster(endpoint_url: str, credentials: Credentials, plan: ClusterPlan, image_ids: dict[str, str]) -> int:
    """Launch every node group of a cluster; returns how many instances there are now because of it.

    Repeating it changes nothing: every call carries a client token made from its group and zone. Raises
    botocore's ClientError when a group fits in no zone.
    """
    import boto3

    client = boto3.client("ec2", region_name=plan.region, endpoint_url=endpoint_url, **credentials.boto3())
    subnets = {
        subnet["AvailabilityZone"]: subnet["SubnetId"]
        for page in client.get_paginator("describe_subnets").paginate()
        for subnet in page["Subnets"]
    }
    security_groups = [group["GroupId"] for group in client.describe_security_groups()["SecurityGroups"]][:1]
    launched = 0
    for group in plan.groups:
        launched += _launch_group(client, plan, group, subnets, security_groups, image_ids)
    client.close()
    return launched


def _shares(group: NodeGroup, zones: list[str]) -> Iterator[tuple[str, int]]:
    """(zone, count) with the group spread evenly; zones beyond the wanted number are spares with count 0."""
    wanted = min(group.zones, len(zones))
    for index, zone in enumerate(zones):
        yield zone, group.count // wanted + (index < group.count % wanted) if index < wanted else 0


def _launch_group(
    client: Any,
    plan: ClusterPlan,
    group: NodeGroup,
    subnets: dict[str, str],
    security_groups: list[str],
    image_ids: dict[str, str],
) -> int:
    from botocore.exceptions import ClientError

    # Groups begin at different zones, so that a small cluster does not fill the first one only.
    order = sorted(subnets)
    start = sum(map(ord, group.name)) % len(order)
    owed, launched, last_error = 0, 0, None
    for zone, share in _shares(group, order[start:] + order[:start]):
        count = share + owed
        if not count:
            continue
        try:
            answer = client.run_instances(
                **_request(plan, group, zone, subnets[zone], security_groups, count, image_ids)
            )
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "IdempotentInstanceTerminated":
                owed = 0
                continue
            if code not in _ELSEWHERE:
                raise
            owed, last_error = count, error
            continue
        launched += len(answer["Instances"])
        owed = count - len(answer["Instances"])
    if owed and last_error is not None:
        raise last_error
    log.info("%s: %d x %s (%s) for group %s", plan.name, launched, group.instance_type, group.capacity, group.name)
    return launched


def _request(
    plan: ClusterPlan,
    group: NodeGroup,
    zone: str,
    subnet_id: str,
    security_groups: list[str],
    count: int,
    image_ids: dict[str, str],
) -> dict[str, Any]:
    tags = {
        "Name": f"{plan.name}-{group.name}",
        f"{CLUSTER_TAG_PREFIX}{plan.name}": "owned",
        "eks:cluster-name": plan.name,
        "eks:nodegroup-name": group.name,
        "k8s.io/cluster-autoscaler/enabled": "true",
    }
    request: dict[str, Any] = {
        "ImageId": image_ids[_architecture(group.instance_type)],
        "InstanceType": group.instance_type,
        "MinCount": 1,
        "MaxCount": count,
        "SubnetId": subnet_id,
        "SecurityGroupIds": security_groups,
        "ClientToken": f"{INITIAL_TOKEN_PREFIX}{plan.name}-{group.name}-{zone}",
        "TagSpecifications": [
            {"ResourceType": "instance", "Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}
        ],
    }
    if group.capacity == "spot":
        request["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
    return request


def _architecture(instance_type: str) -> str:
    from control.sandbox.market import load_catalogue

    return load_catalogue().types[instance_type].architecture
