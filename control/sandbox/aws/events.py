"""EventBridge-shaped bodies, field for field as AWS delivers them to a queue."""

import json
import uuid
from datetime import UTC, datetime
from typing import Any

from control.sandbox.aws.autoscaling import LifecycleAction


def envelope(
    detail_type: str,
    detail: dict[str, Any],
    *,
    source: str,
    account_id: str,
    region: str,
    at: datetime,
    resources: list[str],
) -> str:
    """One event as the JSON text of a message body."""
    return json.dumps(
        {
            "version": "0",
            "id": str(uuid.uuid4()),
            "detail-type": detail_type,
            "source": source,
            "account": account_id,
            "time": at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "region": region,
            "resources": resources,
            "detail": detail,
        }
    )


def interruption_warning(
    instance_id: str, *, account_id: str, region: str, zone_name: str, at: datetime, action: str = "terminate"
) -> str:
    # Spot events carry the zone where the region belongs and no account: consumers must read `detail`
    return envelope(
        "EC2 Spot Instance Interruption Warning",
        {"instance-id": instance_id, "instance-action": action},
        source="aws.ec2",
        account_id=account_id,
        region=region,
        at=at,
        resources=[f"arn:aws:ec2:{zone_name}:instance/{instance_id}"],
    )


def rebalance_recommendation(instance_id: str, *, account_id: str, region: str, zone_name: str, at: datetime) -> str:
    return envelope(
        "EC2 Instance Rebalance Recommendation",
        {"instance-id": instance_id},
        source="aws.ec2",
        account_id=account_id,
        region=region,
        at=at,
        resources=[f"arn:aws:ec2:{zone_name}:instance/{instance_id}"],
    )


def state_change(instance_id: str, state: str, *, account_id: str, region: str, at: datetime) -> str:
    return envelope(
        "EC2 Instance State-change Notification",
        {"instance-id": instance_id, "state": state},
        source="aws.ec2",
        account_id=account_id,
        region=region,
        at=at,
        resources=[f"arn:aws:ec2:{region}:{account_id}:instance/{instance_id}"],
    )


def scheduled_retirement(instance_id: str, *, account_id: str, region: str, at: datetime, starts_at: datetime) -> str:
    code = "AWS_EC2_PERSISTENT_INSTANCE_RETIREMENT_SCHEDULED"
    communication = uuid.uuid4().hex
    return envelope(
        "AWS Health Event",
        {
            "eventArn": f"arn:aws:health:{region}::event/EC2/{code}/{code}_{communication[:12]}",
            "service": "EC2",
            "eventScopeCode": "ACCOUNT_SPECIFIC",
            "eventTypeCode": code,
            "eventTypeCategory": "scheduledChange",
            "communicationId": f"{communication}-1",
            "startTime": f"{starts_at:%a}, {starts_at.day} {starts_at:%b %Y %H:%M:%S} GMT",
            "eventRegion": region,
            "eventDescription": [
                {"language": "en_US", "latestDescription": "EC2 has detected degradation of the hardware."}
            ],
            "affectedEntities": [{"entityValue": instance_id}],
            "affectedAccount": account_id,
            "page": "1",
            "totalPages": "1",
        },
        source="aws.health",
        account_id=account_id,
        region=region,
        at=at,
        resources=[instance_id],
    )


def lifecycle_action(action: LifecycleAction, *, at: datetime, direct: bool) -> str:
    """A group's hook, as EventBridge tells it or as the group itself writes it to a queue."""
    detail = {
        "LifecycleActionToken": action.token,
        "AutoScalingGroupName": action.group_name,
        "LifecycleHookName": action.hook_name,
        "EC2InstanceId": action.instance_id,
        "LifecycleTransition": f"autoscaling:EC2_INSTANCE_{action.transition.upper()}",
    }
    if direct:
        envelope_of_the_group = {
            "Origin": "AutoScalingGroup",
            "Destination": "EC2",
            "Service": "AWS Auto Scaling",
            "AccountId": action.account_id,
            "RequestId": str(uuid.uuid4()),
            "Time": at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        }
        return json.dumps(detail | envelope_of_the_group)
    return envelope(
        f"EC2 Instance-{'launch' if action.transition == 'launching' else 'terminate'} Lifecycle Action",
        detail,
        source="aws.autoscaling",
        account_id=action.account_id,
        region=action.region,
        at=at,
        resources=[
            f"arn:aws:autoscaling:{action.region}:{action.account_id}:autoScalingGroup:"
            f"{uuid.uuid4()}:autoScalingGroupName/{action.group_name}"
        ],
    )
