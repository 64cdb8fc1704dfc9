"""How a replacement is launched: taken from the interrupted instance itself, kept per cluster.

EC2 forgets the subnet and security groups of a terminated instance, so templates are read while the instance lives
and kept. Pure functions build the template and the frozen RunInstances request from EC2's answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from control.interruptions.choosing import Pool

# A call is repeated with its token for this long (RELIABILITY §2.5); EC2's clock and ours may differ by so much.
REPEATED_FOR = timedelta(minutes=10)
CLOCKS = timedelta(minutes=1)

TAG_MANAGED = "cloudoptim:managed"
TAG_TENANT = "cloudoptim:tenant"
TAG_CLUSTER = "cloudoptim:cluster"
TAG_BATCH = "cloudoptim:batch"
_OUR_TAGS = (TAG_MANAGED, TAG_TENANT, TAG_CLUSTER, TAG_BATCH)
# Tags of groups that would adopt or end an instance they did not launch.
_FOREIGN_TAG_PREFIXES = ("aws:", "eks:", "karpenter.sh/", "karpenter.k8s.aws/", "cloudoptim:")
# The options of RunInstances; DescribeInstances adds whether they are applied.
_METADATA_OPTIONS = (
    "HttpTokens",
    "HttpPutResponseHopLimit",
    "HttpEndpoint",
    "HttpProtocolIpv6",
    "InstanceMetadataTags",
)
# Which volume types may be given which figure; DescribeVolumes shows one for others too, that EC2 then refuses.
_VOLUME_FIGURES = {"Iops": ("gp3", "io1", "io2"), "Throughput": ("gp3",)}
# What names the group an instance was launched by.
_GROUP_TAGS = (
    "aws:autoscaling:groupName",
    "eks:nodegroup-name",
    "karpenter.sh/nodepool",
    "karpenter.k8s.aws/ec2nodeclass",
    "aws:ec2launchtemplate:id",
    "aws:ec2launchtemplate:version",
)


def template_of(
    instance: Mapping[str, Any],
    subnets: Mapping[str, str],
    user_data: str | None,
    block_devices: Sequence[Mapping[str, Any]] = (),
    zone_ids: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A template from one DescribeInstances item.

    Args:
        subnets: subnet id per zone of the instance's VPC; the instance's own subnet wins in its zone.
        user_data: base64, as EC2 returns it.
        block_devices: as RunInstances takes them, from ``block_devices_of``.
        zone_ids: of the account's zones, by its own names.
    """
    zone = instance.get("Placement", {}).get("AvailabilityZone")
    own = {zone: instance["SubnetId"]} if zone and instance.get("SubnetId") else {}
    template: dict[str, Any] = {
        "image_id": instance["ImageId"],
        "subnets": dict(sorted((dict(subnets) | own).items())),
        "security_group_ids": sorted(group["GroupId"] for group in instance.get("SecurityGroups", [])),
        "tags": {
            tag["Key"]: tag["Value"]
            for tag in instance.get("Tags", [])
            if not tag["Key"].startswith(_FOREIGN_TAG_PREFIXES)
        },
    }
    if profile := instance.get("IamInstanceProfile", {}).get("Arn"):
        template["instance_profile_arn"] = profile
    for key, name in (("KeyName", "key_name"), ("EbsOptimized", "ebs_optimized")):
        if instance.get(key):
            template[name] = instance[key]
    if user_data:
        template["user_data"] = user_data
    if options := instance.get("MetadataOptions"):
        template["metadata_options"] = {name: options[name] for name in _METADATA_OPTIONS if name in options}
    if zone_ids:
        template["zone_ids"] = dict(sorted(zone_ids.items()))
    if block_devices:
        template["block_devices"] = list(block_devices)
    return template


def launched_volumes(instance: Mapping[str, Any]) -> dict[str, str]:
    """Device to volume id of the volumes that came, and go, with an instance. Those of pods are attached later and
    outlive it."""
    return {
        mapping["DeviceName"]: mapping["Ebs"]["VolumeId"]
        for mapping in instance.get("BlockDeviceMappings", [])
        if mapping.get("Ebs", {}).get("DeleteOnTermination") and mapping["Ebs"].get("VolumeId")
    }


def block_devices_of(instance: Mapping[str, Any], volumes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An instance's own volumes as RunInstances takes them, from DescribeVolumes items by id.

    Encrypted ones are encrypted again with the account's default key: another one needs a grant that our role lacks.
    Snapshots are the image's business.
    """
    devices = []
    for device, volume_id in sorted(launched_volumes(instance).items()):
        volume = volumes.get(volume_id)
        if volume is None:
            continue
        kind = volume["VolumeType"]
        ebs = {"VolumeSize": volume["Size"], "VolumeType": kind, "DeleteOnTermination": True}
        ebs |= {name: volume[name] for name, kinds in _VOLUME_FIGURES.items() if kind in kinds and volume.get(name)}
        if volume.get("Encrypted"):
            ebs["Encrypted"] = True
        devices.append({"DeviceName": device, "Ebs": ebs})
    return devices


def user_data_group(instance: Mapping[str, Any]) -> tuple[str, ...]:
    """Instances of one cluster that share their user data: same group, image, profile and security groups.

    Node groups of one image and profile may differ by nothing but their user data (labels, taints, the cluster they
    join), so whatever names a group or a cluster tells them apart.
    """
    tags = tags_of(instance)
    group = tuple(f"{name}={tags[name]}" for name in _GROUP_TAGS if tags.get(name))
    clusters = tuple(sorted(name for name in tags if name.startswith("kubernetes.io/cluster/")))
    profile = str(instance.get("IamInstanceProfile", {}).get("Arn"))
    security = tuple(sorted(item["GroupId"] for item in instance.get("SecurityGroups", [])))
    return (instance["ImageId"], profile, *security, *clusters, *group)


def fingerprint(template: Mapping[str, Any]) -> str:
    """SHA-256 of a template's content. The Name tag differs from node to node and does not count."""
    content = dict(template) | {"tags": {k: v for k, v in template["tags"].items() if k != "Name"}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def subnets_by_zone(subnets: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """One subnet per zone of a VPC: the one with the most free addresses, then the smallest id."""
    best: dict[str, tuple[int, str]] = {}
    for subnet in subnets:
        rank = (-int(subnet.get("AvailableIpAddressCount", 0)), subnet["SubnetId"])
        zone = subnet["AvailabilityZone"]
        if zone not in best or rank < best[zone]:
            best[zone] = rank
    return {zone: subnet_id for zone, (_, subnet_id) in sorted(best.items())}


def run_instances_request(
    template: Mapping[str, Any],
    pool: Pool,
    *,
    count: int,
    client_token: str,
    deployment_id: str,
    customer_id: UUID,
    cluster_id: UUID,
    cluster_name: str,
    batch_id: UUID,
) -> str:
    """The RunInstances parameters as JSON, frozen: this text is stored first and sent again byte for byte.

    The zone is pinned by its subnet: the same token in another zone would be a second launch, not the first again.
    """
    tags = dict(template["tags"]) | {
        f"kubernetes.io/cluster/{cluster_name}": "owned",
        TAG_MANAGED: deployment_id,
        TAG_TENANT: str(customer_id),
        TAG_CLUSTER: str(cluster_id),
        TAG_BATCH: str(batch_id),
    }
    tag_list = [{"Key": key, "Value": value} for key, value in sorted(tags.items())]
    ours = [tag for tag in tag_list if tag["Key"] in _OUR_TAGS]
    request: dict[str, Any] = {
        "ImageId": template["image_id"],
        "InstanceType": pool.instance_type,
        "MinCount": 1,
        "MaxCount": count,
        "ClientToken": client_token,
        "Placement": {"AvailabilityZone": pool.availability_zone},
        "TagSpecifications": [
            {"ResourceType": "instance", "Tags": tag_list},
            {"ResourceType": "volume", "Tags": ours},
        ],
    }
    if subnet := template["subnets"].get(pool.availability_zone):
        request["SubnetId"] = subnet
    if template.get("security_group_ids"):
        request["SecurityGroupIds"] = template["security_group_ids"]
    if profile := template.get("instance_profile_arn"):
        request["IamInstanceProfile"] = {"Arn": profile}
    if key_name := template.get("key_name"):
        request["KeyName"] = key_name
    if template.get("ebs_optimized"):
        request["EbsOptimized"] = True
    if user_data := template.get("user_data"):
        request["UserData"] = user_data
    if options := template.get("metadata_options"):
        request["MetadataOptions"] = options
    if devices := template.get("block_devices"):
        request["BlockDeviceMappings"] = devices
    if pool.node_type == "spot":
        request["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    return json.dumps(request, sort_keys=True, separators=(",", ":"))


def tags_of(instance: Mapping[str, Any]) -> dict[str, str]:
    """An instance's tags as a dict."""
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}


def launched_by(
    instance: Mapping[str, Any], client_token: str, instance_type: str, first_called_at: datetime | None
) -> bool:
    """Whether a call launched an instance that carries its tag: by its token.

    Spot has its own requests behind an instance, and no document says that the token shown is the call's: without one,
    and with another one on Spot, what the call asked for and when it was made must fit.
    """
    token = instance.get("ClientToken")
    if token == client_token:
        return True
    if token and instance.get("InstanceLifecycle") != "spot":
        return False
    if first_called_at is None or instance.get("InstanceType") != instance_type:
        return False
    launched_after = instance["LaunchTime"] - first_called_at
    return bool(-CLOCKS < launched_after < REPEATED_FOR + CLOCKS)


def is_alive(instance: Mapping[str, Any]) -> bool:
    """Whether an instance runs, or may run again."""
    return instance.get("State", {}).get("Name") in ("pending", "running", "stopping", "stopped")


def is_ours(instance: Mapping[str, Any], *, deployment_id: str, customer_id: UUID) -> bool:
    """Whether an instance carries this deployment's and this customer's tag, from birth."""
    tags = tags_of(instance)
    return tags.get(TAG_MANAGED) == deployment_id and tags.get(TAG_TENANT) == str(customer_id)
