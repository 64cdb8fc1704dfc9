"""Events as AWS shapes them, the in-loop variant, and moto behind everything else."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest

from control.sandbox.aws import Credentials, Instance, SandboxAWS, SandboxAWSThread, SandboxConfig, instances
from control.sandbox.market import GeneratedMarket
from tests.sandbox.aws.conftest import ACCOUNT, OTHER_ACCOUNT, account, spot_request
from tests.sandbox.fleet.harness import eventually


def bodies(sqs: Any, queue: str) -> list[dict[str, Any]]:
    messages = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", [])
    return [json.loads(m["Body"]) for m in messages]


def test_events_have_the_fields_eventbridge_sends(
    aws: SandboxAWSThread, ec2: Any, clients: Callable[..., Any], customer: Credentials
) -> None:
    (made,) = ec2.run_instances(**spot_request(Placement={}))["Instances"]
    instance_id = made["InstanceId"]
    aws.recommend_rebalance(instance_id)
    aws.schedule_retirement(instance_id)
    aws.interrupt(instance_id)
    events = {e["detail-type"]: e for e in bodies(clients(aws, "sqs", customer), account(aws).queue_url)}
    assert set(events) == {
        "EC2 Instance Rebalance Recommendation",
        "AWS Health Event",
        "EC2 Spot Instance Interruption Warning",
    }
    warning = events["EC2 Spot Instance Interruption Warning"]
    assert warning["detail"] == {"instance-id": instance_id, "instance-action": "terminate"}
    assert (warning["version"], warning["source"], warning["account"]) == ("0", "aws.ec2", ACCOUNT)
    # the zone stands in the region's place and the account is missing, as in real Spot events
    assert warning["resources"] == [f"arn:aws:ec2:{made['Placement']['AvailabilityZone']}:instance/{instance_id}"]
    health = events["AWS Health Event"]["detail"]
    assert health["eventTypeCategory"] == "scheduledChange"
    assert health["affectedEntities"] == [{"entityValue": instance_id}]
    assert health["startTime"].endswith(" GMT")
    (status,) = ec2.describe_instance_status()["InstanceStatuses"]
    assert status["Events"][0]["Code"] == "instance-retirement"


def test_on_demand_instances_are_not_interrupted(aws: SandboxAWSThread, ec2: Any) -> None:
    request = spot_request(Placement={})
    del request["InstanceMarketOptions"]
    (made,) = ec2.run_instances(**request)["Instances"]
    with pytest.raises(ValueError, match="only Spot instances"):
        aws.interrupt(made["InstanceId"])


def test_an_interruption_can_stop_or_hibernate_and_outlives_the_customers_queue(
    market: GeneratedMarket, clients: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "STOP_SECONDS", 0.2)
    with SandboxAWSThread(SandboxConfig(market=market, state_change_events=True)) as aws:
        account = aws.add_account(ACCOUNT, external_id="x")
        ec2, sqs = (clients(aws, service, aws.credentials(ACCOUNT)) for service in ("ec2", "sqs"))
        request = spot_request(Placement={}, MinCount=3, MaxCount=3)
        stopping, hibernating, orphan = (i["InstanceId"] for i in ec2.run_instances(**request)["Instances"])
        sqs.purge_queue(QueueUrl=account.queue_url)
        with pytest.raises(ValueError, match="none of terminate, stop, hibernate"):
            aws.interrupt(stopping, behaviour="sleep")

        def ends(behaviour: str) -> list[str]:
            return [r["State"] + "/" + r["Status"]["Code"] for r in ec2.describe_spot_instance_requests(
                Filters=[{"Name": "instance-id", "Values": [stopping if behaviour == "stop" else hibernating]}]
            )["SpotInstanceRequests"]]  # fmt: skip

        aws.interrupt(stopping, notice_seconds=0.5, behaviour="stop")
        assert ends("stop") == ["active/marked-for-stop"]
        assert [i.state(time.time()) for i in aws.instances() if i.instance_id == stopping] == ["running"]
        aws.interrupt(hibernating, notice_seconds=60, behaviour="hibernate")
        eventually(lambda: len([i for i in aws.instances() if i.announced == "stopped"]) == 2, 10)
        assert ends("stop") == ends("hibernate") == ["disabled/instance-stopped-no-capacity"]
        bodies = [
            json.loads(m["Body"])["detail"]
            for _ in range(3)
            for m in sqs.receive_message(QueueUrl=account.queue_url, MaxNumberOfMessages=10).get("Messages", [])
        ]
        for instance_id, action in ((stopping, "stop"), (hibernating, "hibernate")):
            assert [b.get("instance-action", b.get("state")) for b in bodies if b["instance-id"] == instance_id] == [
                action, "stopping", "stopped",
            ]  # fmt: skip
        (stopped,) = ec2.describe_instances(InstanceIds=[stopping])["Reservations"][0]["Instances"]
        assert stopped["State"] == {"Code": 80, "Name": "stopped"}
        assert stopped["StateReason"]["Code"] == "Server.SpotInstanceShutdown"
        assert stopped["PrivateIpAddress"]
        with pytest.raises(ValueError, match="is running"):
            aws.resume(orphan)
        aws.resume(hibernating)
        eventually(lambda: [i.announced for i in aws.instances() if i.instance_id == hibernating] == ["running"], 10)
        assert ends("hibernate") == ["active/fulfilled"]
        (resumed,) = ec2.describe_instances(InstanceIds=[hibernating])["Reservations"][0]["Instances"]
        assert resumed["LaunchTime"] > stopped["LaunchTime"]
        assert "StateReason" not in resumed
        # It can be warned of again, and end.
        aws.interrupt(hibernating, notice_seconds=60)
        assert ends("hibernate") == ["active/marked-for-termination"]
        sqs.delete_queue(QueueUrl=account.queue_url)
        # EventBridge has nobody to tell it to, and what happens happens
        assert aws.interrupt(orphan, notice_seconds=0.1) is None
        assert aws.recommend_rebalance(orphan) is None
        ec2.terminate_instances(InstanceIds=[stopping])
        eventually(
            lambda: {i.instance_id for i in aws.instances() if i.announced == "shutting-down"} == {orphan, stopping}
        )


async def test_in_the_tests_own_loop_with_state_changes_on_the_queue_and_to_listeners(market: GeneratedMarket) -> None:
    config = SandboxConfig(market=market, boot_seconds=(0.1, 0.2), state_change_events=True)
    async with SandboxAWS(config) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        seen: list[tuple[str, str]] = []
        ended = asyncio.Event()

        def listen(instance: Instance, state: str) -> None:
            seen.append((instance.instance_id, state))
            if state == "shutting-down":
                ended.set()

        aws.on_change(listen)
        ec2 = boto3.client("ec2", endpoint_url=aws.url, region_name="us-east-1", **aws.credentials(ACCOUNT).boto3())
        answer = await asyncio.to_thread(ec2.run_instances, **spot_request(Placement={}))
        instance_id = answer["Instances"][0]["InstanceId"]
        assert answer["Instances"][0]["State"]["Name"] == "pending"
        aws.interrupt(instance_id, notice_seconds=0.6)
        await asyncio.wait_for(ended.wait(), 10)
        assert seen == [(instance_id, s) for s in ("pending", "running", "shutting-down")]
        assert aws.queue_depth(ACCOUNT)[0] == 4  # three states and the warning
        await asyncio.to_thread(ec2.close)


def test_s3_iam_and_other_services_work_and_belong_to_the_callers_account(
    aws: SandboxAWSThread, clients: Callable[..., Any]
) -> None:
    mine, other = aws.credentials(ACCOUNT), aws.credentials(OTHER_ACCOUNT)
    s3 = clients(aws, "s3", mine)
    s3.create_bucket(Bucket="lake-of-a-test")
    s3.put_object(Bucket="lake-of-a-test", Key="a folder/ä+b.parquet", Body=b"\x00\x01" * 1000)
    assert s3.get_object(Bucket="lake-of-a-test", Key="a folder/ä+b.parquet")["Body"].read() == b"\x00\x01" * 1000
    assert s3.head_object(Bucket="lake-of-a-test", Key="a folder/ä+b.parquet")["ContentLength"] == 2000
    with pytest.raises(s3.exceptions.ClientError, match="PreconditionFailed"):
        # what the lake's commits rely on
        s3.put_object(Bucket="lake-of-a-test", Key="a folder/ä+b.parquet", Body=b"x", IfNoneMatch="*")
    s3.delete_object(Bucket="lake-of-a-test", Key="a folder/ä+b.parquet")
    s3.delete_bucket(Bucket="lake-of-a-test")
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    clients(aws, "iam", mine).create_role(RoleName="CloudOptim", AssumeRolePolicyDocument=trust)
    assert [r["RoleName"] for r in clients(aws, "iam", mine).list_roles()["Roles"]] == ["CloudOptim"]
    assert clients(aws, "iam", other).list_roles()["Roles"] == []
    clients(aws, "events", mine).put_rule(Name="spot", EventPattern=json.dumps({"source": ["aws.ec2"]}))
    group = clients(aws, "ec2", mine).create_security_group(GroupName="nodes", Description="nodes")
    assert group["GroupId"].startswith("sg-")
    actions = {(c["service"], c["action"]) for c in aws.history()}
    assert ("iam", "CreateRole") in actions
