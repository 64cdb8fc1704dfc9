"""Faults on request, seen by boto3 as real ones are."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError

from control.sandbox.aws import Credentials, Fault, SandboxAWSThread
from tests.sandbox.aws.conftest import ACCOUNT, OTHER_ACCOUNT, spot_request


def test_dropped_before_applies_nothing(aws: SandboxAWSThread, ec2: Any) -> None:
    aws.inject(Fault(mode="drop_before", action="RunInstances"))
    with pytest.raises((ConnectionClosedError, EndpointConnectionError, HTTPClientError)):
        ec2.run_instances(**spot_request(Placement={}))
    assert aws.instances() == []


def test_dropped_after_applies_and_says_nothing(aws: SandboxAWSThread, ec2: Any) -> None:
    aws.inject(Fault(mode="drop_after", action="RunInstances"))
    with pytest.raises((ConnectionClosedError, EndpointConnectionError, HTTPClientError)):
        ec2.run_instances(**spot_request(Placement={}))
    assert len(aws.instances()) == 1


def test_only_the_nth_matching_call_is_hit(aws: SandboxAWSThread, ec2: Any) -> None:
    aws.inject(Fault(mode="error", action="DescribeInstances", nth=2, count=2, code="Unavailable", status=503))
    outcomes = []
    for _ in range(4):
        try:
            ec2.describe_instances()
            outcomes.append("ok")
        except ClientError as error:
            outcomes.append(error.response["Error"]["Code"])
    assert outcomes == ["ok", "Unavailable", "Unavailable", "ok"]


def test_a_fault_hits_only_the_parameters_and_account_it_names(
    aws: SandboxAWSThread, ec2: Any, clients: Callable[..., Any]
) -> None:
    aws.inject(
        Fault(mode="ice", action="RunInstances", account_id=ACCOUNT, match={"InstanceType": r"^m5\.large$"}, count=None)
    )
    assert ec2.run_instances(**spot_request(ClientToken="a", InstanceType="m5.xlarge", Placement={}))
    other = clients(aws, "ec2", aws.credentials(OTHER_ACCOUNT))
    assert other.run_instances(**spot_request(ClientToken="b", Placement={}))
    for token in ("c", "d"):
        with pytest.raises(ClientError, match="InsufficientInstanceCapacity"):
            ec2.run_instances(**spot_request(ClientToken=token, Placement={}))


def test_throttling_speaks_each_services_language(
    aws: SandboxAWSThread, ec2: Any, clients: Callable[..., Any], customer: Credentials
) -> None:
    aws.inject(Fault(mode="throttle", count=2))
    with pytest.raises(ClientError, match="RequestLimitExceeded"):
        ec2.describe_instances()
    with pytest.raises(ClientError, match="ThrottlingException"):
        clients(aws, "sqs", customer).list_queues()


def test_a_hang_lasts_until_the_client_gives_up_and_the_server_goes_on(
    aws: SandboxAWSThread, customer: Credentials
) -> None:
    import boto3
    from botocore.config import Config

    aws.inject(Fault(mode="hang", action="DescribeInstances"))
    config = Config(read_timeout=0.3, retries={"total_max_attempts": 1})
    impatient = boto3.client("ec2", endpoint_url=aws.url, region_name="us-east-1", config=config, **customer.boto3())
    try:
        with pytest.raises(ReadTimeoutError):
            impatient.describe_instances()
        assert impatient.describe_instances()["Reservations"] == []
    finally:
        impatient.close()


def test_delay_only_delays(aws: SandboxAWSThread, ec2: Any) -> None:
    aws.inject(Fault(mode="delay", action="DescribeInstances", seconds=0.3))
    started = time.monotonic()
    assert ec2.describe_instances()["Reservations"] == []
    assert time.monotonic() - started >= 0.3


def test_broken_answers(aws: SandboxAWSThread, ec2: Any) -> None:
    aws.inject(Fault(mode="garbage", action="DescribeInstances"))
    with pytest.raises(ResponseParserError):
        ec2.describe_instances()
    aws.inject(Fault(mode="truncate", action="DescribeInstanceTypes"))
    with pytest.raises(Exception, match=r"(?i)incomplete|closed|broken"):
        ec2.describe_instance_types()
    aws.inject(Fault(mode="http_error", action="DescribeInstances", status=502))
    with pytest.raises((ClientError, ResponseParserError)):
        ec2.describe_instances()
    assert ec2.describe_instances()["Reservations"] == []


def test_signal_kills_the_process_it_names_after_the_call_was_applied(
    aws: SandboxAWSThread, customer: Credentials
) -> None:
    program = (
        "import boto3, sys\n"
        f"ec2 = boto3.client('ec2', endpoint_url={aws.url!r}, region_name='us-east-1', **{customer.boto3()!r})\n"
        "sys.stdin.readline()\n"
        f"ec2.run_instances(**{spot_request(Placement={})!r})\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        aws.inject(Fault(mode="signal", action="RunInstances", pid=victim.pid, moment="applied"))
        assert victim.stdin is not None
        victim.stdin.write(b"go\n")
        victim.stdin.close()
        assert victim.wait(30) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()
    assert len(aws.instances()) == 1


def test_control_api_injects_lists_and_clears(aws: SandboxAWSThread, ec2: Any) -> None:
    with httpx.Client(base_url=aws.url + "/_sandbox") as http:
        assert http.get("/health").json()["status"] == "ok"
        made = http.post("/faults", json={"mode": "error", "action": "DescribeInstances", "code": "Unavailable"}).json()
        assert http.get("/faults").json()[0]["id"] == made["id"]
        with pytest.raises(ClientError, match="Unavailable"):
            ec2.describe_instances()
        assert http.get("/faults").json() == []
        http.post("/faults", json={"mode": "ice", "action": "RunInstances", "count": None})
        http.delete("/faults")
        (instance,) = ec2.run_instances(**spot_request(Placement={}))["Instances"]
        assert [i["instance_id"] for i in http.get("/instances").json()] == [instance["InstanceId"]]
        sent = http.post("/interrupt", json={"instance_id": instance["InstanceId"], "notice_seconds": 60})
        assert sent.json()["message_id"]
        assert [c["action"] for c in http.get("/history", params={"action": "RunInstances"}).json()] == ["RunInstances"]
        refused = http.post("/faults", json={"mode": "signal", "pid": 1})
        assert refused.status_code == 400
        assert "only available from Python" in refused.json()["error"]
        assert "unknown fault fields ['nht']" in http.post("/faults", json={"mode": "ice", "nht": 2}).json()["error"]
        assert http.get("/nope").status_code == 404
