"""AWS over asyncio: botocore knows the services' shapes, signatures and answers, aiohttp carries the bytes.

boto3 has one blocking client per account and service; 200 customers' queues polled by one process would be 200
threads. Here all accounts share the models and one connection pool, every call names its credentials, and nothing is
retried behind the caller's back: a launch whose answer was lost must be repeated with its own stored token, not with
one a client library makes up.

    aws = AwsGateway(endpoint_url="", region="us-east-1")
    credentials = await aws.assume(role)
    answer = await aws.call("ec2", "DescribeInstances", {"InstanceIds": [...]}, region=region, credentials=credentials)
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass
from uuid import UUID

import aiohttp
import botocore.session
import msgspec
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.model import OperationModel, ServiceModel
from botocore.parsers import ResponseParser, ResponseParserError, create_parser
from botocore.regions import EndpointResolver
from botocore.serialize import create_serializer
from httpx import create_ssl_context
from yarl import URL

CONNECT_TIMEOUT_SECONDS = 3.0
CALL_TIMEOUT_SECONDS = 15.0
# Credentials live an hour and are renewed while they still work (C-15), at a moment of each customer's own: what was
# assumed together at the start must not come back to STS together for ever after.
ROLE_SESSION_SECONDS = 3600
RENEW_BEFORE_SECONDS = 300
RENEW_SPREAD_SECONDS = 600
# A renewal that failed is tried again this often while the old credentials live.
RENEW_AGAIN_SECONDS = 15.0
# AssumeRole calls under way at once: a start with a thousand customers is no reason for STS to throttle us.
ASSUMING_AT_ONCE = 32
# The request was turned away before anything was done with it: the same again, a little later.
THROTTLE_CODES = frozenset({"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled"})
# Reading changes nothing, and a session is not kept.
READS = ("Describe", "Get", "AssumeRole")
# What else may be called: the parameter by which AWS, or we, know a repetition, and the column it is kept in.
# What AWS made an id for has that as its key: an instance that is ended twice is ended once, also one that we know by
# its tags only. Anything that is not here is not sent.
EFFECTS = {
    "RunInstances": ("ClientToken", "launch_batches.client_token"),
    "TerminateInstances": ("InstanceIds", "launch_attempts.instance_id"),
    "RecordLifecycleActionHeartbeat": ("LifecycleActionToken", "lifecycle_actions.token"),
    "CompleteLifecycleAction": ("LifecycleActionToken", "lifecycle_actions.token"),
}
# SQS's longest wait; the read may take that long plus the network.
LONG_POLL_SECONDS = 20
LONG_POLL_GRACE_SECONDS = 10.0
# NTH's and Karpenter's value: a message whose handler died comes back with 95 s of its notice left (C-01).
VISIBILITY_TIMEOUT_SECONDS = 20
RECEIVE_BATCH = 10
# The operation named when the server's own credentials are the trouble, before anything was sent to AWS.
OWN_CREDENTIALS = "OwnCredentials"
# With one answer in ten lost, sixty pages are read to their end nine times of ten.
PAGE_TRIES = 3

_QUEUE_HOST = re.compile(r"^(?:sqs\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?|([a-z0-9-]+)\.queue\.amazonaws\.com)$")
_QUEUE_PATH = re.compile(r"^/(\d{12})/([A-Za-z0-9_-]{1,80}(?:\.fifo)?)$")


class AwsError(Exception):
    """AWS refused, failed or did not answer.

    ``code`` is AWS's own error code, or ``Unreachable`` (nothing was sent), ``Unanswered`` (the call may have had its
    effect) or ``BadAnswer``. ``definite`` is true only when AWS itself said no.
    """

    def __init__(self, operation: str, code: str, message: str, *, status: int = 0) -> None:
        super().__init__(f"{operation}: {code}: {message}")
        self.operation, self.code, self.message, self.status = operation, code, message, status

    @property
    def definite(self) -> bool:
        """Whether AWS answered with a refusal, so that nothing happened."""
        return 400 <= self.status < 500


@dataclass(frozen=True, slots=True)
class Role:
    """A customer's role as we may assume it. The external id is ours and never shown to anyone else."""

    customer_id: UUID
    role_arn: str
    external_id: str

    def __repr__(self) -> str:
        return f"Role({self.customer_id}, {self.role_arn})"


@dataclass(frozen=True, slots=True)
class QueueAddress:
    """A queue URL taken apart: nothing is ever sent to the host a customer typed, only to AWS's own endpoint."""

    url: str
    region: str
    account_id: str
    name: str


@dataclass(frozen=True, slots=True)
class SqsMessage:
    """One received message."""

    message_id: str
    receipt_handle: str
    body: str
    sent_at: datetime | None
    receive_count: int


@dataclass(frozen=True, slots=True)
class _Response:
    """What came back; header names in lower case."""

    status: int
    headers: dict[str, str]
    content: bytes


@dataclass(slots=True)
class _Session:
    credentials: Credentials
    renew_at: float
    ends_at: float


class AwsGateway:
    """Calls to AWS with explicit credentials; one per process.

    Args:
        endpoint_url: replaces every service's address (the sandbox); empty for AWS itself.
        region: used where a queue URL or a call names none.
    """

    def __init__(self, *, endpoint_url: str = "", region: str = "us-east-1") -> None:
        self.endpoint_url, self.region = endpoint_url.rstrip("/"), region
        self._botocore = botocore.session.get_session()
        self._http: aiohttp.ClientSession | None = None
        self._closed = False
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._assuming = asyncio.Semaphore(ASSUMING_AT_ONCE)

    async def close(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        if self._http is not None:
            await self._http.close()
            self._http = None

    def _client(self) -> aiohttp.ClientSession:
        # Made by the first call: a session belongs to the loop it was made in.
        if self._http is None:
            if self._closed:
                raise aiohttp.ClientConnectionError("the gateway is closed")
            # A thousand idle long polls and a storm beside them: the number of connections is the callers' business.
            # Idle ones go before AWS closes them, or a launch could be sent into the void.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=20, ssl=create_ssl_context())
            self._http = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._http

    # --- identity

    async def own_credentials(self) -> Credentials:
        """The server's own credentials, from the environment, a profile or the machine's role.

        Raises:
            AwsError: ``NoCredentials`` when there are none; ``Unreachable`` of ``OwnCredentials`` when what gives them
                (a profile, a process, the machine's role) failed. Nothing was sent then, and it may be over by itself.
        """
        try:
            found = await asyncio.to_thread(self._botocore.get_credentials)
            frozen = await asyncio.to_thread(found.get_frozen_credentials) if found is not None else None
        except Exception as error:
            # Providers run programs and read files and answers, and let through whatever these raise. Customers see
            # the message, so what such a program printed stays out of it.
            raise AwsError(
                OWN_CREDENTIALS,
                "Unreachable",
                f"the server's own AWS credentials could not be read or renewed ({type(error).__name__})",
            ) from error
        if frozen is None:
            raise AwsError(
                "AssumeRole",
                "NoCredentials",
                "the server has no AWS credentials of its own; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or run it with an instance profile or task role",
            )
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    async def assume(self, role: Role) -> Credentials:
        """Credentials of a customer's role, cached and renewed early; concurrent callers share one call. While STS is
        away, those that still live are used on.

        Raises:
            AwsError: as STS answered, or as of ``own_credentials``.
        """
        key = (role.role_arn, role.external_id)
        session = self._sessions.get(key)
        if session and time.monotonic() < session.renew_at:
            return session.credentials
        async with self._locks.setdefault(key, asyncio.Lock()):
            session = self._sessions.get(key)
            if session and time.monotonic() < session.renew_at:
                return session.credentials
            try:
                async with self._assuming:
                    credentials, seconds = await self.assume_role(
                        role.role_arn, external_id=role.external_id, session_name=f"cloudoptim-{role.customer_id.hex}"
                    )
            except AwsError as error:
                now = time.monotonic()
                refused = error.definite and error.code not in THROTTLE_CODES
                if refused or session is None or now >= session.ends_at:
                    raise
                session.renew_at = now + RENEW_AGAIN_SECONDS
                return session.credentials
            early = min(RENEW_BEFORE_SECONDS + random.uniform(0, RENEW_SPREAD_SECONDS), seconds / 2)
            now = time.monotonic()
            self._sessions[key] = _Session(credentials, now + max(seconds - early, 5), now + seconds - 5)
            return credentials

    def forget(self, role: Role) -> None:
        """Drop cached credentials, after AWS called them expired or the customer left."""
        self._sessions.pop((role.role_arn, role.external_id), None)

    async def assume_role(
        self, role_arn: str, *, external_id: str | None, session_name: str, seconds: int = ROLE_SESSION_SECONDS
    ) -> tuple[Credentials, float]:
        """One AssumeRole call, without a cache: the credentials and how many seconds they live.

        ``external_id=None`` probes whether a role can be assumed without one, which must fail.
        """
        parameters: dict[str, Any] = {
            "RoleArn": role_arn,
            "RoleSessionName": session_name,
            "DurationSeconds": seconds,
        }
        if external_id is not None:
            parameters["ExternalId"] = external_id
        answer = await self.call(
            "sts", "AssumeRole", parameters, region=self.region, credentials=await self.own_credentials()
        )
        given = answer["Credentials"]
        lives = (given["Expiration"] - datetime.now(UTC)).total_seconds()
        # A wrong clock on either side must not make fresh credentials look old.
        lives = min(max(lives, 60.0), float(seconds))
        return Credentials(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"]), lives

    # --- any call

    async def call(
        self,
        service: str,
        operation: str,
        parameters: dict[str, Any],
        *,
        region: str,
        credentials: Credentials,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> dict[str, Any]:
        """One signed request and its parsed answer. No retries.

        Raises:
            AwsError: with AWS's code, or the reason there was no answer.
            ValueError: it would change something and has no key to know a repetition by (``EFFECTS``); not sent.
        """
        if not operation.startswith(READS):
            key, _ = EFFECTS.get(operation, ("", ""))
            if not parameters.get(key):
                raise ValueError(
                    f"{operation} changes something and is sent with its key only: {key or 'none is known'}"
                )
        model, serializer, parser = _service(service)
        shape = model.operation_model(operation)
        request = serializer.serialize_to_request(parameters, shape)
        body = request["body"]
        content = urlencode(body).encode() if isinstance(body, dict) else body
        url = self._endpoint(service, region) + request["url_path"]
        response = await self._send(
            operation, url, content, dict(request["headers"]), model, region, credentials, timeout_seconds
        )
        return _parse(operation, shape, parser, response)

    async def pages(
        self,
        service: str,
        operation: str,
        parameters: dict[str, Any],
        result: str,
        *,
        region: str,
        credentials: Credentials,
    ) -> AsyncIterator[dict[str, Any]]:
        """Every item of a paged answer. Stops when the token is missing or empty, or repeats.

        A page whose answer was lost is asked for again: reading changes nothing, and one lost answer must not cost a
        large account its whole round.
        """
        token, seen = None, set()
        while True:
            page = await self._page(
                service, operation, parameters | ({"NextToken": token} if token else {}), region, credentials
            )
            for item in page.get(result, []):
                yield item
            token = page.get("NextToken")
            if not token or token in seen:
                return
            seen.add(token)

    async def _page(
        self, service: str, operation: str, parameters: dict[str, Any], region: str, credentials: Credentials
    ) -> dict[str, Any]:
        ends = time.monotonic() + CALL_TIMEOUT_SECONDS
        for left in reversed(range(PAGE_TRIES)):
            try:
                return await self.call(service, operation, parameters, region=region, credentials=credentials)
            except AwsError as error:
                # Silence that took the whole time-out is not asked a second time.
                if left == 0 or error.code != "Unanswered" or time.monotonic() > ends:
                    raise
        raise AssertionError("unreachable")

    async def _send(
        self,
        operation: str,
        url: str,
        content: bytes,
        headers: dict[str, str],
        model: ServiceModel,
        region: str,
        credentials: Credentials,
        timeout_seconds: float,
    ) -> _Response:
        request = AWSRequest("POST", url, headers=headers, data=content)
        SigV4Auth(credentials, model.signing_name, region).add_auth(request)
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_TIMEOUT_SECONDS)
        try:
            # The bytes that were signed: neither the address nor the body may be encoded again.
            async with self._client().post(
                URL(url, encoded=True),
                data=content,
                headers=dict(request.headers.items()),
                timeout=timeout,
                proxy=_proxy(url),
                allow_redirects=False,
            ) as response:
                return _Response(
                    response.status,
                    {name.lower(): value for name, value in response.headers.items()},
                    await response.read(),
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise AwsError(operation, "Unreachable", f"{urlsplit(url).netloc}: {type(error).__name__}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise AwsError(operation, "Unanswered", type(error).__name__) from error

    def _endpoint(self, service: str, region: str) -> str:
        return self.endpoint_url or _endpoint(service, region)

    # --- SQS, without the generic path: it is the hot one and its protocol is plain JSON

    def queue(self, url: str) -> QueueAddress:
        """A queue URL's parts.

        Raises:
            ValueError: the URL is not one of an SQS queue, with what it should look like.
        """
        parts = urlsplit(url)
        path = _QUEUE_PATH.match(parts.path)
        host = _QUEUE_HOST.match(parts.hostname or "")
        if path is None or parts.query or parts.username or (host is None and not self.endpoint_url):
            raise ValueError(
                f"sqs_queue_url {url[:120]!r} is not a queue's address; "
                "it looks like https://sqs.<region>.amazonaws.com/<account id>/<queue name>"
            )
        region = next((group for group in host.groups() if group), self.region) if host else self.region
        if not self.endpoint_url and region not in _regions("sqs"):
            raise ValueError(f"sqs_queue_url names region {region!r}, which AWS does not have")
        return QueueAddress(url, region, path.group(1), path.group(2))

    async def receive(
        self, queue: QueueAddress, *, credentials: Credentials, wait_seconds: int = LONG_POLL_SECONDS
    ) -> list[SqsMessage]:
        """Up to ten messages, waiting up to ``wait_seconds`` for the first one."""
        answer = await self._sqs(
            "ReceiveMessage",
            {
                "QueueUrl": queue.url,
                "MaxNumberOfMessages": RECEIVE_BATCH,
                "WaitTimeSeconds": wait_seconds,
                "VisibilityTimeout": VISIBILITY_TIMEOUT_SECONDS,
                "AttributeNames": ["SentTimestamp", "ApproximateReceiveCount"],
                "MessageSystemAttributeNames": ["SentTimestamp", "ApproximateReceiveCount"],
            },
            queue,
            credentials,
            wait_seconds + LONG_POLL_GRACE_SECONDS,
        )
        return [_message(message) for message in answer.get("Messages") or []]

    async def delete(self, queue: QueueAddress, receipt_handles: list[str], *, credentials: Credentials) -> list[str]:
        """Delete up to ten messages; returns the error codes of those SQS did not delete (they will come again)."""
        entries = [{"Id": str(index), "ReceiptHandle": handle} for index, handle in enumerate(receipt_handles)]
        answer = await self._sqs(
            "DeleteMessageBatch",
            {"QueueUrl": queue.url, "Entries": entries},
            queue,
            credentials,
            CALL_TIMEOUT_SECONDS,
        )
        return [str(failed.get("Code")) for failed in answer.get("Failed") or []]

    async def give_back(self, queue: QueueAddress, receipt_handles: list[str], *, credentials: Credentials) -> None:
        """Make up to ten received messages visible to other consumers at once."""
        entries = [
            {"Id": str(index), "ReceiptHandle": handle, "VisibilityTimeout": 0}
            for index, handle in enumerate(receipt_handles)
        ]
        await self._sqs(
            "ChangeMessageVisibilityBatch",
            {"QueueUrl": queue.url, "Entries": entries},
            queue,
            credentials,
            CALL_TIMEOUT_SECONDS,
        )

    async def _sqs(
        self,
        operation: str,
        body: dict[str, Any],
        queue: QueueAddress,
        credentials: Credentials,
        timeout_seconds: float,
    ) -> dict[str, Any]:
        headers = {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": f"AmazonSQS.{operation}"}
        response = await self._send(
            operation,
            self._endpoint("sqs", queue.region) + "/",
            json.dumps(body).encode(),
            headers,
            _service("sqs")[0],
            queue.region,
            credentials,
            timeout_seconds,
        )
        answer = _json(response.content) if response.content else {}
        if not isinstance(answer, dict):
            raise AwsError(operation, "BadAnswer", f"HTTP {response.status}", status=response.status)
        if response.status >= 300:
            # The older, better known code travels in a header: "AWS.SimpleQueueService.NonExistentQueue;Sender".
            code = response.headers.get("x-amzn-query-error", "").split(";")[0] or str(answer.get("__type", ""))
            message = str(answer.get("message") or answer.get("Message") or "")
            raise AwsError(operation, code.rsplit("#", 1)[-1] or "Unknown", message[:300], status=response.status)
        return answer


def _json(content: bytes) -> Any:
    """A JSON document, or None. Ten bodies of 1 MiB must not hold up the process for longer than they have to."""
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError:
        # Stricter than the standard library about text that is no Unicode; such a body is to be judged, not the answer.
        try:
            return json.loads(content)
        except ValueError:
            return None


def client_token() -> str:
    """A token for one launch: 32 of EC2's 64 characters, stored before it is sent."""
    return secrets.token_hex(16)


def _message(message: dict[str, Any]) -> SqsMessage:
    attributes = message.get("Attributes") or {}
    sent = str(attributes.get("SentTimestamp", ""))
    count = str(attributes.get("ApproximateReceiveCount", "1"))
    return SqsMessage(
        message_id=str(message.get("MessageId", "")),
        receipt_handle=str(message.get("ReceiptHandle", "")),
        body=message.get("Body") or "",
        sent_at=datetime.fromtimestamp(int(sent) / 1000, UTC) if sent.isdigit() and len(sent) < 15 else None,
        receive_count=int(count) if count.isdigit() else 1,
    )


def _parse(operation: str, shape: OperationModel, parser: ResponseParser, response: _Response) -> dict[str, Any]:
    raw = {"status_code": response.status, "headers": response.headers, "body": response.content}
    try:
        answer = parser.parse(raw, shape.output_shape)
    except ResponseParserError as unreadable:
        raise AwsError(operation, "BadAnswer", str(unreadable)[:200], status=response.status) from unreadable
    if response.status >= 300:
        refusal = answer.get("Error", {})
        raise AwsError(
            operation,
            str(refusal.get("Code") or "Unknown"),
            str(refusal.get("Message") or "")[:500],
            status=response.status,
        )
    return answer


@lru_cache(maxsize=512)
def _proxy(url: str) -> str | None:
    """The proxy the operator's environment names for an address, like boto3 takes it."""
    parts = urlsplit(url)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


@lru_cache(maxsize=16)
def _service(name: str) -> tuple[ServiceModel, Any, ResponseParser]:
    model = botocore.session.get_session().get_service_model(name)
    protocol = model.resolved_protocol
    return model, create_serializer(protocol), create_parser(protocol)


@lru_cache(maxsize=256)
def _endpoint(service: str, region: str) -> str:
    endpoints = botocore.session.get_session().get_component("data_loader").load_data("endpoints")
    endpoint = EndpointResolver(endpoints).construct_endpoint(service, region)
    if endpoint is None:
        raise AwsError("endpoint", "UnknownRegion", f"AWS has no {service} in {region!r}")
    return f"https://{endpoint['hostname']}"


@lru_cache(maxsize=8)
def _regions(service: str) -> frozenset[str]:
    session = botocore.session.get_session()
    return frozenset(
        region
        for partition in session.get_available_partitions()
        for region in session.get_available_regions(service, partition_name=partition)
    )
