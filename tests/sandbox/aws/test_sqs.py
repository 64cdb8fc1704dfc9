"""SQS of the sandbox through boto3, and through the query protocol of older SDKs."""

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import ClientError

from control.sandbox.aws import Credentials, Fault, SandboxAWSThread
from tests.sandbox.aws.conftest import ACCOUNT, OTHER_ACCOUNT, account


@pytest.fixture
def sqs(aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials) -> Any:
    return clients(aws, "sqs", customer)


@pytest.fixture
def queue(aws: SandboxAWSThread) -> str:
    return account(aws).queue_url


def received(sqs: Any, queue: str, **options: Any) -> list[dict[str, Any]]:
    answer = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, AttributeNames=["All"], **options)
    messages: list[dict[str, Any]] = answer.get("Messages", [])
    return messages


def test_message_comes_once_and_is_gone_after_delete(aws: SandboxAWSThread, sqs: Any, queue: str) -> None:
    sent = aws.send_event(queue, {"detail-type": "anything"})
    (message,) = received(sqs, queue)
    assert message["MessageId"] == sent
    assert json.loads(message["Body"]) == {"detail-type": "anything"}
    assert message["Attributes"]["ApproximateReceiveCount"] == "1"
    assert abs(int(message["Attributes"]["SentTimestamp"]) / 1000 - time.time()) < 10
    assert received(sqs, queue) == []
    sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
    assert aws.queue_depth(queue) == (0, 0)


def test_message_comes_again_after_its_visibility_timeout_and_the_old_handle_is_stale(
    aws: SandboxAWSThread, sqs: Any, queue: str
) -> None:
    aws.send_event(queue, "body")
    (first,) = received(sqs, queue, VisibilityTimeout=1)
    started = time.monotonic()
    (second,) = received(sqs, queue, WaitTimeSeconds=5, VisibilityTimeout=30)
    assert 0.5 < time.monotonic() - started < 2
    assert second["Attributes"]["ApproximateReceiveCount"] == "2"
    sqs.delete_message(QueueUrl=queue, ReceiptHandle=first["ReceiptHandle"])
    assert aws.queue_depth(queue) == (0, 1), "a stale handle deletes nothing and is no error"
    sqs.delete_message(QueueUrl=queue, ReceiptHandle=second["ReceiptHandle"])
    assert aws.queue_depth(queue) == (0, 0)


def test_long_poll_answers_the_moment_a_message_arrives(aws: SandboxAWSThread, sqs: Any, queue: str) -> None:
    sent_at: list[float] = []

    def send() -> None:
        aws.send_event(queue, "late")
        sent_at.append(time.monotonic())

    timer = threading.Timer(0.3, send)
    timer.start()
    (message,) = received(sqs, queue, WaitTimeSeconds=20)
    assert message["Body"] == "late"
    timer.join()
    assert time.monotonic() - sent_at[0] < 0.5


def test_message_sent_while_a_dead_client_was_polling_goes_to_the_living_one(
    aws: SandboxAWSThread, sqs: Any, queue: str, customer: Credentials
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        _signed(aws, customer, {"QueueUrl": queue, "WaitTimeSeconds": 20}, timeout=0.3)
    deadline = time.monotonic() + 5
    while not aws.history(action="ReceiveMessage") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [c["outcome"] for c in aws.history(action="ReceiveMessage")] == ["client left"]
    aws.send_event(queue, "for the living")
    assert [m["Body"] for m in received(sqs, queue, WaitTimeSeconds=5)] == ["for the living"]


def _signed(aws: SandboxAWSThread, given: Credentials, body: dict[str, Any], timeout: float) -> httpx.Response:
    headers = {"X-Amz-Target": "AmazonSQS.ReceiveMessage", "Content-Type": "application/x-amz-json-1.0"}
    request = AWSRequest("POST", aws.url + "/", headers=headers, data=json.dumps(body))
    keys = BotoCredentials(given.access_key_id, given.secret_access_key, given.session_token)
    SigV4Auth(keys, "sqs", "us-east-1").add_auth(request)
    with httpx.Client() as client:
        return client.post(
            aws.url + "/", content=json.dumps(body), headers=dict(request.headers.items()), timeout=timeout
        )


def test_changing_visibility_to_zero_gives_the_message_back_at_once(
    aws: SandboxAWSThread, sqs: Any, queue: str
) -> None:
    aws.send_event(queue, "again")
    (message,) = received(sqs, queue)
    sqs.change_message_visibility(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0)
    assert len(received(sqs, queue)) == 1


def test_message_moves_to_the_dead_letter_queue_after_max_receive_count(
    aws: SandboxAWSThread, sqs: Any, queue: str
) -> None:
    dead = aws.create_queue(ACCOUNT, "dead")
    arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2})
    sqs.set_queue_attributes(QueueUrl=queue, Attributes={"RedrivePolicy": policy, "VisibilityTimeout": "0"})
    aws.send_event(queue, "poison")
    assert [len(received(sqs, queue)) for _ in range(3)] == [1, 1, 0]
    assert [m["Body"] for m in received(sqs, dead)] == ["poison"]


def test_duplicates_on_request_come_twice(aws: SandboxAWSThread, sqs: Any, queue: str) -> None:
    aws.send_event(queue, "twice")
    aws.inject(Fault(mode="duplicate", action="ReceiveMessage"))
    first, second = received(sqs, queue), received(sqs, queue)
    assert [m["MessageId"] for m in first] == [m["MessageId"] for m in second]


def test_batches_send_receive_and_delete_ten_at_a_time(aws: SandboxAWSThread, sqs: Any, queue: str) -> None:
    entries = [{"Id": str(i), "MessageBody": f"m{i}", "DelaySeconds": 0} for i in range(10)]
    assert len(sqs.send_message_batch(QueueUrl=queue, Entries=entries)["Successful"]) == 10
    messages = received(sqs, queue)
    assert sorted(m["Body"] for m in messages) == [f"m{i}" for i in range(10)]
    handles = [{"Id": m["MessageId"], "ReceiptHandle": m["ReceiptHandle"]} for m in messages]
    assert len(sqs.delete_message_batch(QueueUrl=queue, Entries=handles)["Successful"]) == 10
    assert aws.queue_depth(queue) == (0, 0)


def test_message_attributes_keep_their_digest(sqs: Any, queue: str) -> None:
    attributes = {
        "kind": {"DataType": "String", "StringValue": "spot"},
        "n": {"DataType": "Number", "StringValue": "7"},
    }
    sent = sqs.send_message(QueueUrl=queue, MessageBody="x", MessageAttributes=attributes)
    (message,) = received(sqs, queue, MessageAttributeNames=["All"])
    assert message["MessageAttributes"] == attributes
    # length-prefixed name, type and value, in order of the names, by the SQS developer guide
    encoded = (
        b"\x00\x00\x00\x04kind\x00\x00\x00\x06String\x01\x00\x00\x00\x04spot"
        b"\x00\x00\x00\x01n\x00\x00\x00\x06Number\x01\x00\x00\x00\x017"
    )
    expected = hashlib.md5(encoded, usedforsecurity=False).hexdigest()
    assert sent["MD5OfMessageAttributes"] == message["MD5OfMessageAttributes"] == expected


def test_another_accounts_queue_is_denied(aws: SandboxAWSThread, sqs: Any) -> None:
    foreign = account(aws, OTHER_ACCOUNT).queue_url
    for call in (
        lambda: sqs.receive_message(QueueUrl=foreign),
        lambda: sqs.send_message(QueueUrl=foreign, MessageBody="x"),
        lambda: sqs.purge_queue(QueueUrl=foreign),
    ):
        with pytest.raises(ClientError) as error:
            call()
        assert error.value.response["Error"]["Code"] == "AccessDenied"


def test_missing_queue_has_the_exception_boto3_knows(sqs: Any, queue: str) -> None:
    with pytest.raises(sqs.exceptions.QueueDoesNotExist):
        sqs.receive_message(QueueUrl=queue + "-no")
    with pytest.raises(sqs.exceptions.QueueDoesNotExist):
        sqs.get_queue_url(QueueName="nope")


def test_an_address_on_aws_names_a_region_and_only_the_right_one_has_the_queue(
    aws: SandboxAWSThread, clients: Callable[..., Any], queue: str
) -> None:
    """The sandbox's own addresses name none and answer in any; an address as on AWS plays a queue elsewhere."""
    path = queue.split("/", 3)[3]
    wrong, right = (f"https://sqs.{region}.amazonaws.com/{path}" for region in ("eu-west-1", "us-east-1"))
    there, here = (
        clients(aws, "sqs", aws.credentials(ACCOUNT), region=region) for region in ("eu-west-1", "us-east-1")
    )
    for client, address in ((there, wrong), (there, right), (here, wrong)):
        with pytest.raises(client.exceptions.QueueDoesNotExist):
            client.receive_message(QueueUrl=address)
    sent = aws.send_event(queue, "{}")
    assert received(there, queue)[0]["MessageId"] == sent
    sent = aws.send_event(queue, "{}")
    assert received(here, right)[0]["MessageId"] == sent


def test_purge_and_delayed_messages(aws: SandboxAWSThread, sqs: Any, queue: str) -> None:
    aws.send_event(queue, "later", delay_seconds=60)
    attributes = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    assert attributes["ApproximateNumberOfMessagesDelayed"] == "1"
    assert received(sqs, queue) == []
    sqs.purge_queue(QueueUrl=queue)
    assert aws.queue_depth(queue) == (0, 0)


def test_query_protocol_of_older_sdks(aws: SandboxAWSThread, queue: str, customer: Credentials) -> None:
    aws.send_event(queue, "<old & wise>")

    def call(**parameters: str) -> httpx.Response:
        body = urllib.parse.urlencode({"Version": "2012-11-05", "QueueUrl": queue, **parameters})
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        request = AWSRequest("POST", aws.url + "/", headers=headers, data=body)
        keys = BotoCredentials(customer.access_key_id, customer.secret_access_key, customer.session_token)
        SigV4Auth(keys, "sqs", "us-east-1").add_auth(request)
        with httpx.Client() as client:
            return client.post(aws.url + "/", content=body, headers=dict(request.headers.items()))

    answer = call(Action="ReceiveMessage", MaxNumberOfMessages="10", **{"AttributeName.1": "All"}).text
    assert "<Body>&lt;old &amp; wise&gt;</Body>" in answer
    assert "<Name>ApproximateReceiveCount</Name><Value>1</Value>" in answer
    handle = answer.partition("<ReceiptHandle>")[2].partition("<")[0]
    batch = {"DeleteMessageBatchRequestEntry.1.Id": "a", "DeleteMessageBatchRequestEntry.1.ReceiptHandle": handle}
    assert "<Id>a</Id>" in call(Action="DeleteMessageBatch", **batch).text
    assert aws.queue_depth(queue) == (0, 0)
    refused = call(Action="SendMessageBatch")
    assert refused.status_code == 400
    assert "AWS.SimpleQueueService.EmptyBatchRequest" in refused.text


def test_twenty_receivers_share_a_thousand_messages_without_loss(
    aws: SandboxAWSThread, clients: Callable[..., Any], customer: Credentials, queue: str
) -> None:
    sent = set(aws.send_events(queue, [str(i) for i in range(1000)]))
    taken: list[str] = []

    def drain(sqs: Any) -> None:
        while messages := received(sqs, queue):
            taken.extend(m["MessageId"] for m in messages)
            handles = [{"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]} for i, m in enumerate(messages)]
            sqs.delete_message_batch(QueueUrl=queue, Entries=handles)

    threads = [threading.Thread(target=drain, args=(clients(aws, "sqs", customer),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1000
    assert set(taken) == sent
    assert aws.queue_depth(queue) == (0, 0)
