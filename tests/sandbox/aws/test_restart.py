"""What a restart of the sandbox keeps: accounts, credentials, instances, tokens, undelivered messages."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from control.sandbox.aws import SandboxAWSThread, SandboxConfig
from control.sandbox.market import GeneratedMarket
from tests.sandbox.aws.conftest import ACCOUNT, account, assume, spot_request


def test_everything_is_there_after_a_restart(
    tmp_path: Path, market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    config = SandboxConfig(home=tmp_path, market=market)
    request = spot_request(Placement={})
    with SandboxAWSThread(config) as aws:
        aws.add_account(ACCOUNT, external_id="external-1")
        session = assume(clients, aws, account(aws))
        ec2, sqs = clients(aws, "ec2", session), clients(aws, "sqs", session)
        subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
        alive, ended = (
            ec2.run_instances(**{**request, "ClientToken": t})["Instances"][0]["InstanceId"] for t in ("alive", "ended")
        )
        ec2.terminate_instances(InstanceIds=[ended])
        first, second, third = aws.send_events(ACCOUNT, ["deleted", "in flight", "never received"])
        messages = sqs.receive_message(QueueUrl=account(aws).queue_url, MaxNumberOfMessages=2)["Messages"]
        assert [m["MessageId"] for m in messages] == [first, second]
        sqs.delete_message(QueueUrl=account(aws).queue_url, ReceiptHandle=messages[0]["ReceiptHandle"])
    with SandboxAWSThread(config) as aws:
        again = account(aws)
        assert again.external_id == "external-1"
        assert again.queue_url.startswith(aws.url)
        # credentials of before the restart are still good
        ec2, sqs = clients(aws, "ec2", session), clients(aws, "sqs", session)
        assert ec2.run_instances(**{**request, "ClientToken": "alive"})["Instances"][0]["InstanceId"] == alive
        with pytest.raises(ClientError, match="IdempotentInstanceTerminated"):
            ec2.run_instances(**{**request, "ClientToken": "ended"})
        found = {i["InstanceId"]: i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]}
        assert set(found) == {alive, ended}
        assert found[alive]["Tags"] == [{"Key": "cloudoptim:attempt", "Value": "attempt-1"}]
        assert ec2.describe_subnets()["Subnets"][0]["SubnetId"] == subnet
        left = sqs.receive_message(QueueUrl=again.queue_url, MaxNumberOfMessages=10)["Messages"]
        assert [m["MessageId"] for m in left] == [second, third]
        history = (tmp_path / "aws_history.jsonl").read_text()
        assert history.count('"RunInstances"') == 4
    assert (tmp_path / "aws.sqlite").stat().st_mode & 0o077 == 0


def test_killed_sandbox_has_lost_nothing_it_acknowledged(tmp_path: Path, market: GeneratedMarket) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from control.sandbox.aws import SandboxAWSThread, SandboxConfig\n"
        f"aws = SandboxAWSThread(SandboxConfig(home=pathlib.Path({str(tmp_path)!r})))\n"
        "aws.start()\n"
        f"aws.add_account({ACCOUNT!r}, external_id='x')\n"
        "for n in range(1, 200):\n"
        f"    aws.send_event({ACCOUNT!r}, str(n))\n"
        "    print(n, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        acknowledged = 0
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged >= 100:
                break
        process.kill()
        acknowledged = max([acknowledged, *(int(line) for line in process.stdout)])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with SandboxAWSThread(SandboxConfig(home=tmp_path, market=market)) as aws:
        assert aws.queue_depth(ACCOUNT)[0] >= acknowledged >= 100


@pytest.mark.crash
def test_killed_sandbox_has_every_object_of_its_buckets(
    tmp_path: Path, market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    program = (
        "import pathlib, time\n"
        "from control.sandbox.aws import SandboxAWSThread, SandboxConfig\n"
        f"aws = SandboxAWSThread(SandboxConfig(home=pathlib.Path({str(tmp_path)!r})))\n"
        "aws.start()\n"
        "import boto3\n"
        "s3 = boto3.client('s3', endpoint_url=aws.url, region_name='us-east-1', **aws.credentials().boto3())\n"
        "s3.create_bucket(Bucket='kept-by-a-kill')\n"
        "s3.put_object(Bucket='kept-by-a-kill', Key='a folder/b', Body=b'12', Metadata={'of': 'mine'})\n"
        "s3.put_object(Bucket='kept-by-a-kill', Key='deleted', Body=b'1')\n"
        "s3.delete_objects(Bucket='kept-by-a-kill', Delete={'Objects': [{'Key': 'deleted'}]})\n"
        "up = s3.create_multipart_upload(Bucket='kept-by-a-kill', Key='parts')['UploadId']\n"
        "of = {'Bucket': 'kept-by-a-kill', 'Key': 'parts', 'UploadId': up}\n"
        "tag = s3.upload_part(**of, PartNumber=1, Body=b'123')['ETag']\n"
        "s3.complete_multipart_upload(**of, MultipartUpload={'Parts': [{'PartNumber': 1, 'ETag': tag}]})\n"
        "print('done', flush=True)\n"
        "time.sleep(60)\n"
    )
    # moto's buckets belong to a process, so what the second sandbox shows comes from the file
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "done\n"
        finally:
            process.kill()
    with SandboxAWSThread(SandboxConfig(home=tmp_path, market=market)) as aws:
        s3 = clients(aws, "s3", aws.credentials())
        listed = s3.list_objects_v2(Bucket="kept-by-a-kill")["Contents"]
        assert [(row["Key"], row["Size"]) for row in listed] == [("a folder/b", 2), ("parts", 3)]
        kept = s3.get_object(Bucket="kept-by-a-kill", Key="a folder/b")
        assert (kept["Body"].read(), kept["Metadata"]) == (b"12", {"of": "mine"})
    assert (tmp_path / "s3.sqlite").stat().st_mode & 0o077 == 0


def test_what_ended_while_the_sandbox_was_down_is_told_after_it(
    tmp_path: Path, market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    config = SandboxConfig(home=tmp_path, market=market)
    with SandboxAWSThread(config) as aws:
        aws.add_account(ACCOUNT, external_id="x")
        ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
        (instance,) = ec2.run_instances(**spot_request(Placement={}))["Instances"]
        aws.interrupt(instance["InstanceId"], notice_seconds=0.05)
    with SandboxAWSThread(config) as aws:
        changes = [(c["params"]["state"], c["result"]["instance_ids"]) for c in aws.history(action="StateChange")]
        assert changes == [("shutting-down", [instance["InstanceId"]])]


def test_a_taken_port_is_named(market: GeneratedMarket) -> None:
    with SandboxAWSThread(SandboxConfig(market=market)) as aws:
        port = int(aws.url.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            SandboxAWSThread(SandboxConfig(port=port, market=market)).start()


def test_instance_and_token_are_written_together_and_addresses_are_not_given_twice(
    tmp_path: Path, market: GeneratedMarket, clients: Callable[..., Any]
) -> None:
    config = SandboxConfig(home=tmp_path, market=market)
    addresses: list[str] = []
    for _ in range(3):
        with SandboxAWSThread(config) as aws:
            aws.add_account(ACCOUNT, external_id="x")
            ec2 = clients(aws, "ec2", aws.credentials(ACCOUNT))
            request = spot_request(Placement={}, ClientToken=f"token-{len(addresses)}")
            (made,) = ec2.run_instances(**request)["Instances"]
            assert ec2.run_instances(**request)["Instances"][0]["InstanceId"] == made["InstanceId"]
            addresses.append(made["PrivateIpAddress"])
    assert len(set(addresses)) == 3
