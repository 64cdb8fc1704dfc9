"""EBS volumes as far as launches make them: one root volume each, and what block device mappings ask for."""

import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from control.sandbox.aws.describing import filters, matches_any, paged
from control.sandbox.aws.instances import Instance
from control.sandbox.aws.protocol import AwsError

ROOT_DEVICE = "/dev/xvda"
ROOT_GIB = 20
LARGEST_PAGE = 1000


def devices_of(p: dict[str, Any]) -> list[dict[str, Any]]:
    """The volumes a launch makes, the root volume first; raises as AWS does for what a volume type cannot have."""
    wanted = {ROOT_DEVICE: {"VolumeSize": str(ROOT_GIB)}}
    for mapping in p.get("BlockDeviceMapping", []):
        ebs = mapping.get("Ebs") or {}
        kind = ebs.get("VolumeType", "gp3")
        for field, kinds in (("Iops", ("gp3", "io1", "io2")), ("Throughput", ("gp3",))):
            if field in ebs and kind not in kinds:
                raise AwsError("InvalidParameterCombination", f"The parameter {field} is not supported for {kind}.")
        device = mapping.get("DeviceName", "")
        wanted[device] = wanted.get(device, {}) | ebs
    return [
        {
            "device": device,
            "volume_id": "vol-" + secrets.token_hex(9)[:17],
            "size": int(ebs.get("VolumeSize", ROOT_GIB)),
            "kind": ebs.get("VolumeType", "gp3"),
            "iops": int(ebs["Iops"]) if "Iops" in ebs else None,
            "throughput": int(ebs["Throughput"]) if "Throughput" in ebs else None,
            "encrypted": str(ebs.get("Encrypted", "false")).lower() == "true",
            "ends_with_instance": str(ebs.get("DeleteOnTermination", "true")).lower() == "true",
        }
        for device, ebs in wanted.items()
    ]


def mappings(instance: Instance) -> list[dict[str, Any]]:
    """An instance's volumes as DescribeInstances shows them."""
    return [
        {
            "deviceName": device["device"],
            "ebs": {
                "volumeId": device["volume_id"],
                "status": "attached",
                "attachTime": datetime.fromtimestamp(instance.launched_at, UTC),
                "deleteOnTermination": device["ends_with_instance"],
            },
        }
        for device in instance.block_devices
    ]


def describe(instances: Iterable[Instance], p: dict[str, Any]) -> dict[str, Any]:
    """The answer of DescribeVolumes about these instances' volumes."""
    rows = [
        {
            "volumeId": device["volume_id"],
            "size": device["size"],
            "volumeType": device["kind"],
            "iops": device["iops"] or (3000 if device["kind"] == "gp3" else 100),
            "throughput": device["throughput"] or (125 if device["kind"] == "gp3" else None),
            "encrypted": device["encrypted"],
            "status": "in-use",
            "availabilityZone": instance.zone_name,
            "attachmentSet": [{"instanceId": instance.instance_id, "device": device["device"], "status": "attached"}],
        }
        for instance in instances
        for device in instance.block_devices
    ]
    if p.get("VolumeId"):
        rows = [row for row in rows if row["volumeId"] in p["VolumeId"]]
    for name, values in filters(p):
        if name != "volume-id":
            raise AwsError("InvalidParameterValue", f"The filter '{name}' is invalid")
        rows = [row for row in rows if matches_any(row["volumeId"], values)]
    rows, token = paged(rows, p, LARGEST_PAGE)
    return {"volumeSet": rows, "nextToken": token}
