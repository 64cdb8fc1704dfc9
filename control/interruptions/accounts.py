"""A customer's account as the launch branch reads it: credentials, instances, and how its nodes are launched."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import structlog

from control.gateways.aws import AwsError, Credentials, Role
from control.interruptions import launch_repository
from control.interruptions.launch_repository import BatchRow, ClusterFacts, IntentRow
from control.interruptions.runtime import Runtime
from control.interruptions.templates import (
    TAG_BATCH,
    block_devices_of,
    fingerprint,
    is_ours,
    launched_by,
    launched_volumes,
    subnets_by_zone,
    template_of,
    user_data_group,
)
from warehouse.postgres.models import new_id

log = structlog.get_logger(__name__)


class Accounts:
    """Reads customers' accounts; changes nothing in them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    async def templates_of(
        self, cluster: ClusterFacts, intents: Sequence[IntentRow], credentials: Credentials
    ) -> tuple[dict[UUID, dict[str, Any]], set[UUID]]:
        """The template of each intent, and the intents whose instance its owner ended."""
        async with self.runtime.db.system() as conn:
            kept = await launch_repository.templates(conn, cluster.cluster_id)
        by_instance = {instance_id: template for template, seen in reversed(kept) for instance_id in seen}
        wanted = {intent.id: str(intent.requirements["instance_id"]) for intent in intents}
        asked = {
            wanted[intent.id]
            for intent in intents
            if wanted[intent.id] not in by_instance or intent.requirements.get("verify_ended_by_aws")
        }
        described = await self.describe(cluster.region, credentials, sorted(asked)) if asked else {}
        ended = {
            intent.id
            for intent in intents
            if intent.requirements.get("verify_ended_by_aws")
            and str(described.get(wanted[intent.id], {}).get("StateReason", {}).get("Code", "")).startswith("Client.")
        }
        fresh = {
            instance_id: instance
            for instance_id, instance in described.items()
            if instance_id not in by_instance and instance.get("SubnetId")
        }
        if fresh:
            by_instance |= await self.learn_templates(cluster, list(fresh.values()), credentials)
        if not by_instance:
            # The first of a cluster, and already gone: any of its living nodes shows how it is done.
            async with self.runtime.db.system() as conn:
                others = await launch_repository.living_instances(conn, cluster.cluster_id, limit=20)
            alive = await self.describe(cluster.region, credentials, others) if others else {}
            shown = [instance for instance in alive.values() if instance.get("SubnetId")]
            by_instance |= await self.learn_templates(cluster, shown, credentials) if shown else {}
        newest = kept[0][0] if kept else next(iter(by_instance.values()), None)
        found = {intent_id: by_instance.get(instance_id) for intent_id, instance_id in wanted.items()}
        # What nobody looked at while it lived is most like the nodes of its type: another group's image may not even be
        # of its architecture.
        types = {intent.id: str(intent.requirements["instance_type"]) for intent in intents if found[intent.id] is None}
        if types:
            async with self.runtime.db.system() as conn:
                alike = await launch_repository.templates_by_type(conn, cluster.cluster_id, set(types.values()))
            found |= {intent_id: alike.get(name, newest) for intent_id, name in types.items()}
        return {intent_id: template for intent_id, template in found.items() if template is not None}, ended

    async def learn_templates(
        self, cluster: ClusterFacts, instances: Sequence[Mapping[str, Any]], credentials: Credentials
    ) -> dict[str, dict[str, Any]]:
        """Derive and keep the templates of running instances; returns them by instance id."""
        vpcs = sorted({instance["VpcId"] for instance in instances if instance.get("VpcId")})
        subnets: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if vpcs:
            filters = [{"Name": "vpc-id", "Values": vpcs}, {"Name": "state", "Values": ["available"]}]
            async for subnet in self.runtime.aws.pages(
                "ec2",
                "DescribeSubnets",
                {"Filters": filters},
                "Subnets",
                region=cluster.region,
                credentials=credentials,
            ):
                subnets[subnet["VpcId"]].append(subnet)
        # One of each group: its user data and volumes are the others' too.
        groups = {user_data_group(instance): instance for instance in reversed(instances)}
        user_data = {
            group: await self._user_data(cluster.region, credentials, instance["InstanceId"])
            for group, instance in groups.items()
        }
        volumes = await self._volumes(cluster.region, credentials, groups.values())
        learned: dict[str, dict[str, Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for instance in instances:
            group = user_data_group(instance)
            by_zone = subnets_by_zone(subnets.get(instance.get("VpcId", ""), []))
            devices = block_devices_of(groups[group], volumes)
            zone_ids = {
                subnet["AvailabilityZone"]: subnet["AvailabilityZoneId"]
                for subnet in subnets.get(instance.get("VpcId", ""), [])
                if subnet.get("AvailabilityZoneId")
            }
            template = template_of(instance, by_zone, user_data[group], devices, zone_ids)
            learned[instance["InstanceId"]] = template
            mark = fingerprint(template)
            row = rows.setdefault(
                mark,
                {
                    "id": new_id(),
                    "customer_id": cluster.customer_id,
                    "cluster_id": cluster.cluster_id,
                    "fingerprint": mark,
                    "template": template,
                    "instance_ids": [],
                },
            )
            row["instance_ids"].append(instance["InstanceId"])
        async with self.runtime.db.system() as conn:
            await launch_repository.save_templates(conn, list(rows.values()))
        return learned

    async def _user_data(self, region: str, credentials: Credentials, instance_id: str) -> str | None:
        try:
            answer = await self.runtime.aws.call(
                "ec2",
                "DescribeInstanceAttribute",
                {"InstanceId": instance_id, "Attribute": "userData"},
                region=region,
                credentials=credentials,
            )
        except AwsError as error:
            # Nodes that need no user data launch without this right; those that do never become Ready and alarm.
            log.warning("launch.user_data_unreadable", code=error.code)
            return None
        return answer.get("UserData", {}).get("Value") or None

    async def _volumes(
        self, region: str, credentials: Credentials, instances: Iterable[Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        ids = sorted({volume_id for instance in instances for volume_id in launched_volumes(instance).values()})
        found: dict[str, dict[str, Any]] = {}
        try:
            for start in range(0, len(ids), 200):
                filters = [{"Name": "volume-id", "Values": ids[start : start + 200]}]
                async for volume in self.runtime.aws.pages(
                    "ec2", "DescribeVolumes", {"Filters": filters}, "Volumes", region=region, credentials=credentials
                ):
                    found[volume["VolumeId"]] = volume
        except AwsError as error:
            # Without this right nodes get the image's volumes.
            log.warning("launch.volumes_unreadable", code=error.code)
        return found

    async def describe(
        self, region: str, credentials: Credentials, instance_ids: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Instances by id; those EC2 does not know are left out."""
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(instance_ids), 200):
            filters = {"instance-id": instance_ids[start : start + 200]}
            found |= {item["InstanceId"]: item async for item in self.instances(region, credentials, filters)}
        return found

    async def instances(
        self, region: str, credentials: Credentials, filters: Mapping[str, Sequence[str]]
    ) -> AsyncIterator[dict[str, Any]]:
        """All that DescribeInstances shows under filters, to the last page."""
        wanted = [{"Name": name, "Values": list(values)} for name, values in filters.items()]
        async for reservation in self.runtime.aws.pages(
            "ec2", "DescribeInstances", {"Filters": wanted}, "Reservations", region=region, credentials=credentials
        ):
            for instance in reservation.get("Instances", []):
                yield instance

    async def launched_by(self, batch: BatchRow, credentials: Credentials) -> list[dict[str, Any]]:
        """The instances that EC2 shows of a call, dead ones too, in the order it launched them. Describe may not show
        all of them yet (C-10)."""
        instance_type = json.loads(batch.request_json)["InstanceType"]
        filters = {f"tag:{TAG_BATCH}": [str(batch.id)]}
        found = [
            instance
            async for instance in self.instances(batch.region, credentials, filters)
            if is_ours(instance, deployment_id=self.runtime.deployment_id, customer_id=batch.customer_id)
            # Whoever launches "more like this" gets the tags too; the token is the call's own.
            and launched_by(instance, batch.client_token, instance_type, batch.first_called_at)
        ]
        return sorted(found, key=lambda instance: (instance.get("AmiLaunchIndex", 0), instance["InstanceId"]))

    async def credentials(self, cluster: ClusterFacts) -> Credentials:
        """Credentials of the cluster's customer, assumed with its role and external id.

        Raises:
            AwsError: ``NoCredentials`` when the customer has no role yet, else as STS answered.
        """
        if not cluster.role_arn:
            raise AwsError("AssumeRole", "NoCredentials", "the customer has no aws_role_arn")
        return await self.runtime.aws.assume(Role(cluster.customer_id, cluster.role_arn, cluster.external_id))
