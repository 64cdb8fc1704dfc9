"""The AWS gateway against the AWS double over real sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from control.gateways.aws import EFFECTS, AwsError, AwsGateway, Role, client_token
from control.sandbox.aws import SandboxAWS
from control.sandbox.aws.faults import Fault
from warehouse.postgres.models import Base, new_id

ACCOUNT = "123456789012"
EXTERNAL_ID = "b1f7d0f2-8a0e-4d1e-9c55-3b7a7f0f6a11"


@pytest.fixture
async def aws() -> AsyncIterator[SandboxAWS]:
    async with SandboxAWS() as running:
        running.add_account(ACCOUNT, external_id=EXTERNAL_ID)
        yield running


@pytest.fixture
async def gateway(aws: SandboxAWS, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AwsGateway]:
    keys = aws.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    found = AwsGateway(endpoint_url=aws.url)
    yield found
    await found.close()


def _role(aws: SandboxAWS, external_id: str = EXTERNAL_ID) -> Role:
    (account,) = aws.accounts()
    return Role(new_id(), account.role_arn, external_id)


async def test_a_role_is_assumed_once_with_its_external_id(aws: SandboxAWS, gateway: AwsGateway) -> None:
    role = _role(aws)
    first, second = await gateway.assume(role), await gateway.assume(role)
    assert first is second
    (call,) = aws.history(action="AssumeRole")
    assert call["params"]["RoleSessionName"] == f"cloudoptim-{role.customer_id.hex}"
    with pytest.raises(AwsError) as refused:
        await gateway.assume(_role(aws, "not-the-external-id"))
    assert (refused.value.code, refused.value.definite) == ("AccessDenied", True)
    with pytest.raises(AwsError):
        await gateway.assume_role(role.role_arn, external_id=None, session_name="probe")
    assert EXTERNAL_ID not in repr(role)


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


async def test_credentials_are_renewed_early_and_outlive_an_sts_that_is_away(
    aws: SandboxAWS, gateway: AwsGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("control.gateways.aws.time", clock)
    role = _role(aws)
    first = await gateway.assume(role)
    # At the latest five minutes before their end.
    clock.ahead = 3600 - 300
    for mode in ("drop_before", "throttle"):
        fault = aws.inject(Fault(mode, action="AssumeRole", count=None))
        assert await gateway.assume(role) is first
        calls = len(aws.history(action="AssumeRole"))
        assert await gateway.assume(role) is first
        assert len(aws.history(action="AssumeRole")) == calls, "a renewal that failed is not tried on every call"
        aws.clear_faults(fault)
        clock.ahead += 20
    second = await gateway.assume(role)
    assert second is not first
    # What is over is over: then the caller is told.
    clock.ahead += 3600
    aws.inject(Fault("drop_before", action="AssumeRole", count=None))
    with pytest.raises(AwsError):
        await gateway.assume(role)


async def test_a_revoked_role_is_not_used_on(
    aws: SandboxAWS, gateway: AwsGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("control.gateways.aws.time", clock)
    role = _role(aws)
    await gateway.assume(role)
    aws.revoke_role(ACCOUNT)
    clock.ahead = 3600 - 300
    with pytest.raises(AwsError) as refused:
        await gateway.assume(role)
    assert refused.value.code == "AccessDenied"


async def test_receive_and_delete(aws: SandboxAWS, gateway: AwsGateway) -> None:
    credentials = await gateway.assume(_role(aws))
    queue = gateway.queue(aws.accounts()[0].queue_url)
    assert (queue.account_id, queue.region) == (ACCOUNT, "us-east-1")
    aws.send_events(ACCOUNT, ["one", "two"])
    messages = await gateway.receive(queue, credentials=credentials, wait_seconds=1)
    assert {message.body for message in messages} == {"one", "two"}
    assert all(message.sent_at is not None and message.receive_count == 1 for message in messages)
    assert await gateway.delete(queue, [m.receipt_handle for m in messages], credentials=credentials) == []
    assert aws.queue_depth(ACCOUNT) == (0, 0)


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        ("RunInstances", {"ImageId": "ami-1", "MinCount": 1, "MaxCount": 1}),
        ("RunInstances", {"ImageId": "ami-1", "MinCount": 1, "MaxCount": 1, "ClientToken": ""}),
        ("TerminateInstances", {"InstanceIds": []}),
        ("StopInstances", {"InstanceIds": ["i-0123456789abcdef0"]}),
    ],
)
async def test_what_changes_something_is_sent_with_its_key_only(
    aws: SandboxAWS, gateway: AwsGateway, operation: str, parameters: dict[str, Any]
) -> None:
    """R-15"""
    credentials = await gateway.own_credentials()
    with pytest.raises(ValueError, match=operation):
        await gateway.call("ec2", operation, parameters, region="us-east-1", credentials=credentials)
    assert not list(aws.history(action=operation))


def test_every_key_has_a_column_of_its_own() -> None:
    """R-15; tasks, events and notifications have theirs too."""
    internal = ("agent_tasks.dedupe_key", "outbox.id", "notifications.dedupe_key")
    for name in (*(column for _, column in EFFECTS.values()), *internal):
        table, _, column = name.partition(".")
        assert column in Base.metadata.tables[table].columns, name


async def test_a_body_that_is_no_unicode_spoils_no_answer(aws: SandboxAWS, gateway: AwsGateway) -> None:
    """Half a surrogate pair: the message is to be judged, and the nine beside it to be read."""
    messages = [{"MessageId": name, "ReceiptHandle": name, "Body": name} for name in ("good", "bad")]
    answer = json.dumps({"Messages": messages}).replace('"Body": "bad"', r'"Body": "\ud800"').encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    peer = AwsGateway(endpoint_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    queue = peer.queue(aws.accounts()[0].queue_url)
    received = await peer.receive(queue, credentials=await gateway.own_credentials(), wait_seconds=0)
    assert [message.body for message in received] == ["good", "\ud800"]
    await peer.close()
    server.close()


async def test_pages_are_followed_to_the_end(aws: SandboxAWS, gateway: AwsGateway) -> None:
    credentials = await gateway.assume(_role(aws))
    aws._ec2.describe_page_size = 5
    request = {"ImageId": "ami-0c0ffee00000x8664", "InstanceType": "m5.large", "MinCount": 12, "MaxCount": 12}
    await gateway.call(
        "ec2", "RunInstances", request | {"ClientToken": client_token()}, region="us-east-1", credentials=credentials
    )
    found = [
        instance["InstanceId"]
        async for reservation in gateway.pages(
            "ec2", "DescribeInstances", {}, "Reservations", region="us-east-1", credentials=credentials
        )
        for instance in reservation["Instances"]
    ]
    assert len(set(found)) == len(found) == 12
    assert len(aws.history(action="DescribeInstances")) == 3


async def test_a_page_whose_answer_is_lost_is_asked_for_again(aws: SandboxAWS, gateway: AwsGateway) -> None:
    """Else a large account is never read to its end while one answer in ten is lost."""
    credentials = await gateway.assume(_role(aws))
    aws._ec2.describe_page_size = 1
    request = {"ImageId": "ami-0c0ffee00000x8664", "InstanceType": "m5.large", "MinCount": 40, "MaxCount": 40}
    await gateway.call(
        "ec2", "RunInstances", request | {"ClientToken": client_token()}, region="us-east-1", credentials=credentials
    )
    aws.inject(Fault("drop_after", action="DescribeInstances", probability=0.1, seed=3, count=None))
    pages = gateway.pages("ec2", "DescribeInstances", {}, "Reservations", region="us-east-1", credentials=credentials)
    found = [instance["InstanceId"] async for reservation in pages for instance in reservation["Instances"]]
    assert len(set(found)) == len(found) == 40
    # A refusal is no lost answer.
    aws.clear_faults()
    refusal = Fault("error", action="DescribeInstances", code="UnauthorizedOperation", status=403, count=None)
    aws.inject(refusal)
    with pytest.raises(AwsError):
        _ = [
            page
            async for page in gateway.pages(
                "ec2", "DescribeInstances", {}, "Reservations", region="us-east-1", credentials=credentials
            )
        ]
    assert refusal.seen == 1


@pytest.mark.parametrize(
    ("fault", "code", "definite"),
    [
        (Fault("drop_before", action="DescribeInstances"), "Unanswered", False),
        (Fault("drop_after", action="DescribeInstances"), "Unanswered", False),
        (Fault("hang", action="DescribeInstances"), "Unanswered", False),
        (Fault("garbage", action="DescribeInstances"), "BadAnswer", False),
        (Fault("truncate", action="DescribeInstances"), "Unanswered", False),
        (Fault("http_error", action="DescribeInstances", status=502), "502", False),
        (Fault("throttle", action="DescribeInstances"), "RequestLimitExceeded", False),
        (Fault("error", action="DescribeInstances", code="InternalError"), "InternalError", False),
        (Fault("error", action="DescribeInstances", code="UnauthorizedOperation", status=403),
         "UnauthorizedOperation", True),
    ],
    ids=lambda value: value.mode if isinstance(value, Fault) else str(value),
)  # fmt: skip
async def test_every_way_to_fail_has_a_code_and_nothing_is_repeated(
    aws: SandboxAWS, gateway: AwsGateway, fault: Fault, code: str, definite: bool
) -> None:
    credentials = await gateway.assume(_role(aws))
    aws.inject(fault)
    with pytest.raises(AwsError) as failed:
        await gateway.call(
            "ec2", "DescribeInstances", {}, region="us-east-1", credentials=credentials, timeout_seconds=0.5
        )
    assert (failed.value.code, failed.value.definite) == (code, definite)
    assert fault.seen == 1


async def test_an_address_nobody_listens_on_is_told_apart(gateway: AwsGateway) -> None:
    nowhere = AwsGateway(endpoint_url="http://127.0.0.1:1")
    with pytest.raises(AwsError) as failed:
        await nowhere.call(
            "ec2", "DescribeInstances", {}, region="us-east-1", credentials=await gateway.own_credentials()
        )
    assert failed.value.code == "Unreachable"
    await nowhere.close()


@pytest.mark.parametrize(
    "url",
    [
        "https://sqs.us-east-1.amazonaws.com/123456789012/cloudoptim-events?x=1",
        "https://sqs.us-east-1.amazonaws.com/12345/cloudoptim-events",
        "https://user@sqs.us-east-1.amazonaws.com/123456789012/../x",
        "https://sqs.xx-fake-9.amazonaws.com/123456789012/events",
        "http://169.254.169.254/123456789012/events",
        "https://evil.example.com/123456789012/events",
        "ftp://x",
        "",
    ],
)
def test_a_queue_is_only_ever_one_of_amazons(url: str) -> None:
    with pytest.raises(ValueError, match="sqs_queue_url"):
        AwsGateway().queue(url)


def test_amazons_own_addresses() -> None:
    gateway = AwsGateway()
    queue = gateway.queue("https://sqs.eu-west-1.amazonaws.com/123456789012/cloudoptim-events")
    assert (queue.region, queue.name) == ("eu-west-1", "cloudoptim-events")
    assert gateway._endpoint("sqs", "eu-west-1") == "https://sqs.eu-west-1.amazonaws.com"
    assert gateway._endpoint("ec2", "cn-north-1") == "https://ec2.cn-north-1.amazonaws.com.cn"
    china = gateway.queue("https://sqs.cn-north-1.amazonaws.com.cn/123456789012/events")
    assert china.region == "cn-north-1"
