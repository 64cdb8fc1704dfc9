"""How a replacement is launched: like the node it replaces, with its volumes and metadata options."""

from __future__ import annotations

import json
from typing import Any

from control.gateways.aws import AwsGateway, Credentials, client_token
from control.interruptions import launch_repository
from control.interruptions.launching import Launcher
from control.interruptions.reconcilers import missed
from control.interruptions.service import Received, ingest
from control.interruptions.templates import block_devices_of
from control.sandbox.aws import network
from control.sandbox.aws.faults import Fault
from tests.control.interruptions.harness import Stage
from warehouse.contracts import EventSource
from warehouse.postgres.models import new_id


async def _node(stage: Stage, instance_type: str = "m5.large", **request: Any) -> str:
    """A Ready Spot node of the customer's own, launched with this request."""
    keys = stage.aws.credentials(stage.tenant.account_id)
    gateway = AwsGateway(endpoint_url=stage.aws.url)
    values = {
        "ImageId": "ami-0c0ffee00000x8664",
        "InstanceType": instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": client_token(),
        "InstanceMarketOptions": {"MarketType": "spot"},
    }
    credentials = Credentials(keys.access_key_id, keys.secret_access_key)
    answer = await gateway.call("ec2", "RunInstances", values | request, region="us-east-1", credentials=credentials)
    await gateway.close()
    (instance,) = answer["Instances"]
    zone = instance["Placement"]["AvailabilityZone"]
    await stage.tenant.node(instance["InstanceId"], instance_type=instance_type, availability_zone=zone)
    return str(instance["InstanceId"])


async def _replaced(stage: Stage, launcher: Launcher, lost: str) -> Any:
    warning = Received(json.dumps(stage.tenant.warning(lost)), EventSource.SQS)
    await ingest(stage.db, await stage.tenant.facts(), [warning])

    async def launched() -> bool:
        await launcher.plan_round()
        await launcher.finish_calls(10)
        return bool(stage.ours())

    await stage.until(launched, 10)
    (instance,) = stage.ours()
    return instance


NODE = {
    "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    "BlockDeviceMappings": [
        {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 100, "VolumeType": "gp3", "Throughput": 250}},
        {"DeviceName": "/dev/xvdb", "Ebs": {"VolumeSize": 300, "VolumeType": "gp2", "Encrypted": True}},
        # What is not deleted with the instance is a pod's, or somebody's data.
        {"DeviceName": "/dev/xvdaa", "Ebs": {"VolumeSize": 7, "DeleteOnTermination": False}},
    ],
}


async def test_a_replacement_has_the_volumes_and_metadata_options_of_the_node(stage: Stage, launcher: Launcher) -> None:
    ours = await _replaced(stage, launcher, await _node(stage, **NODE))
    assert (ours.metadata_options["HttpTokens"], ours.metadata_options["HttpPutResponseHopLimit"]) == ("required", "2")
    volumes = [
        (one["device"], one["size"], one["kind"], one["throughput"], one["encrypted"]) for one in ours.block_devices
    ]
    assert volumes == [("/dev/xvda", 100, "gp3", 250, False), ("/dev/xvdb", 300, "gp2", None, True)]
    assert all(one["ends_with_instance"] for one in ours.block_devices)


async def test_volumes_that_cannot_be_read_keep_nobody_from_launching(stage: Stage, launcher: Launcher) -> None:
    stage.aws.inject(Fault("error", action="DescribeVolumes", code="UnauthorizedOperation", status=403, count=None))
    ours = await _replaced(stage, launcher, await _node(stage, **NODE))
    assert ours.metadata_options["HttpTokens"] == "required"
    assert [one["size"] for one in ours.block_devices] == [20], "the image's"


def test_figures_that_a_volume_type_cannot_be_given_are_left_out() -> None:
    instance = {
        "BlockDeviceMappings": [
            {"DeviceName": name, "Ebs": {"VolumeId": f"vol-{name}", "DeleteOnTermination": True}}
            for name in ("gp2", "gp3", "io2", "st1", "gone")
        ]
    }
    volumes = {
        f"vol-{kind}": {"Size": 50, "VolumeType": kind, "Iops": 3000, "Throughput": 125, "Encrypted": False}
        for kind in ("gp2", "gp3", "io2", "st1")
    }
    found = {one["DeviceName"]: set(one["Ebs"]) for one in block_devices_of(instance, volumes)}
    always = {"VolumeSize", "VolumeType", "DeleteOnTermination"}
    assert found == {
        "gp2": always,
        "gp3": always | {"Iops", "Throughput"},
        "io2": always | {"Iops"},
        "st1": always,
    }


async def test_an_instance_nobody_looked_at_is_launched_like_the_nodes_of_its_type(
    stage: Stage, launcher: Launcher
) -> None:
    lost = await _node(stage)
    await _node(stage)
    await _node(stage, "m5.xlarge", **NODE)
    await missed.run_once(launcher)
    await stage.tenant.rows(
        "UPDATE launch_templates SET instance_ids = array_remove(instance_ids, :i), "
        "seen_at = CASE WHEN template -> 'metadata_options' ->> 'HttpTokens' = 'required' THEN now() "
        "ELSE now() - interval '1 hour' END RETURNING 1",
        i=lost,
    )
    del stage.aws._instances.by_id[lost]
    ours = await _replaced(stage, launcher, lost)
    assert ours.metadata_options["HttpTokens"] == "optional"


async def test_of_many_instances_of_a_template_those_seen_last_are_kept(stage: Stage, launcher: Launcher) -> None:
    def row(*instance_ids: str) -> dict[str, Any]:
        return {
            "id": new_id(),
            "customer_id": stage.tenant.customer_id,
            "cluster_id": stage.tenant.cluster_id,
            "fingerprint": "f",
            "template": {},
            "instance_ids": list(instance_ids),
        }

    async with stage.db.system() as conn:
        most = launch_repository.KEPT_INSTANCES
        await launch_repository.save_templates(conn, [row(*(f"i-9{number:06d}" for number in range(most)))])
        await launch_repository.save_templates(conn, [row("i-0new", "i-9000000")])
        ((_, kept),) = await launch_repository.templates(conn, stage.tenant.cluster_id)
    assert len(kept) == most
    assert {"i-0new", "i-9000000"} <= set(kept)


async def test_the_cheapest_zone_is_found_under_the_name_the_account_has_for_it(
    stage: Stage, launcher: Launcher
) -> None:
    lost = await _node(stage)
    names = network.zone_names(stage.tenant.account_id, "us-east-1")
    offered = await stage.tenant.rows(
        "SELECT zone_id FROM spot_price_current WHERE instance_type = 'm5.large' AND availability_zone <> :lost "
        "ORDER BY zone_id",
        lost=stage.zone_of(lost),
    )
    cheapest = offered[0].zone_id
    # The account whose prices we read names its zones in another order.
    accounts = (network.zone_names(f"{number:012d}", "us-east-1") for number in range(1000))
    others = next(found for found in accounts if found[cheapest] != names[cheapest])
    for zone_id, name in others.items():
        await stage.tenant.rows(
            "UPDATE spot_price_current SET availability_zone = :name, price_usd_per_hour = "
            "CASE WHEN zone_id = :cheapest THEN 0.02 ELSE 0.05 END WHERE zone_id = :zone_id RETURNING 1",
            name=name,
            zone_id=zone_id,
            cheapest=cheapest,
        )
    ours = await _replaced(stage, launcher, lost)
    assert (ours.instance_type, ours.zone_id) == ("m5.large", cheapest)
