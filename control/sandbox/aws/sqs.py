"""A fast SQS: standard queues in memory, every undelivered message on disk, long polls that cost nothing while idle.

moto manages 11 to 150 messages a second once some hundred are waiting; storm tests need thousands. Both protocols are
spoken: JSON (botocore >= 1.31.81) and query (older ones). Semantics kept: visibility timeout, receipt handles of the
newest receive, ApproximateReceiveCount, delay, retention, redrive to a dead-letter queue, per-account ownership,
at-least-once (duplicates on request).
"""

import asyncio
import hashlib
import heapq
import itertools
import re
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import msgspec

from control.sandbox.aws.protocol import SQS_NAMESPACE, Answer, AwsError, Call, json_answer, query_answer
from control.sandbox.aws.storage import Storage

# A body above this takes milliseconds to put into an answer.
LARGE_BODY = 32_768
LARGEST_MESSAGE_BYTES = 1_048_576
"""SQS raised its limit from 256 KiB to 1 MiB in August 2025."""
LARGEST_INFLIGHT = 120_000

_REGION = re.compile(r"https?://sqs\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?(?::\d+)?/")
_DEFAULTS = {
    "VisibilityTimeout": "30",
    "MaximumMessageSize": str(LARGEST_MESSAGE_BYTES),
    "MessageRetentionPeriod": "345600",
    "DelaySeconds": "0",
    "ReceiveMessageWaitTimeSeconds": "0",
}
_SETTABLE = {*_DEFAULTS, "RedrivePolicy", "Policy", "RedriveAllowPolicy", "KmsMasterKeyId", "SqsManagedSseEnabled"}
_RANGES = {
    "VisibilityTimeout": (0, 43_200),
    "DelaySeconds": (0, 900),
    "ReceiveMessageWaitTimeSeconds": (0, 20),
    "MessageRetentionPeriod": (60, 1_209_600),
}


@dataclass(slots=True)
class Message:
    """One message; `visible_at` is in seconds since the epoch, `receipt` the handle of the newest receive."""

    id: str
    seq: int
    body: str
    md5: str
    sent_at: float
    sender: str
    attributes: dict[str, Any] | None = None
    receives: int = 0
    first_received_at: float = 0.0
    visible_at: float = 0.0
    receipt: int = 0
    deleted: bool = False
    json: msgspec.Raw | None = None

    @property
    def body_as_json(self) -> msgspec.Raw:
        """The body as a JSON answer holds it."""
        if self.json is None:
            self.json = msgspec.Raw(msgspec.json.encode(self.body))
        return self.json


@dataclass(slots=True, eq=False)
class Queue:
    """A standard queue. `ready` holds visible messages; `hidden` is a heap of (visible_at, seq, message)."""

    account_id: str
    region: str
    name: str
    attributes: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    created_at: float = 0.0
    ready: deque[Message] = field(default_factory=deque)
    hidden: list[tuple[float, int, Message]] = field(default_factory=list)
    by_id: dict[str, Message] = field(default_factory=dict)
    waiters: deque["asyncio.Future[None]"] = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> str:
        return f"{self.region}/{self.account_id}/{self.name}"

    @property
    def arn(self) -> str:
        return f"arn:aws:sqs:{self.region}:{self.account_id}:{self.name}"

    def seconds(self, attribute: str) -> int:
        return int(self.attributes[attribute])

    def redrive(self) -> tuple[str, int] | None:
        """(dead-letter ARN, maxReceiveCount)."""
        policy = self.attributes.get("RedrivePolicy")
        if not policy:
            return None
        document = msgspec.json.decode(policy)
        return document["deadLetterTargetArn"], int(document["maxReceiveCount"])


class Sqs:
    """All queues of the sandbox. Belongs to one event loop."""

    def __init__(self, storage: Storage, endpoint: Callable[[], str]) -> None:
        self._storage = storage
        self._endpoint = endpoint
        self._queues: dict[tuple[str, str], Queue] = {}
        self._seq = itertools.count(1)
        self._closing = False
        self._restore()

    def close(self) -> None:
        """End every long poll now, with an empty answer."""
        self._closing = True
        for queue in self._queues.values():
            if queue.timer is not None:
                queue.timer.cancel()
            for waiter in queue.waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # the in-process surface -----------------------------------------------------------------------------------------

    def create(self, account_id: str, region: str, name: str, attributes: dict[str, str] | None = None) -> Queue:
        """Make a queue, or return the one there is; raises QueueAlreadyExists when attributes differ."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
            raise AwsError(
                "InvalidParameterValue",
                "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length",
            )
        existing = self._queues.get((account_id, name))
        _check_attributes(attributes or {})
        if existing is not None:
            if any(existing.attributes.get(k) != v for k, v in (attributes or {}).items()):
                raise AwsError(
                    "QueueAlreadyExists", f"A queue named {name} already exists with a different value for an attribute"
                )
            return existing
        queue = Queue(account_id, region, name, {**_DEFAULTS, **(attributes or {})}, created_at=time.time())
        self._queues[account_id, name] = queue
        self._save(queue)
        return queue

    def url(self, queue: Queue) -> str:
        return f"{self._endpoint()}/{queue.account_id}/{queue.name}"

    def find(self, url_or_name: str, account_id: str | None = None) -> Queue:
        """By URL (its last two parts; host and port may be those of an earlier start) or by name in an account."""
        parts = url_or_name.rstrip("/").split("/")
        key = (parts[-2], parts[-1]) if len(parts) > 1 else (account_id or "", parts[-1])
        queue = self._queues.get(key)
        if queue is None:
            raise AwsError("AWS.SimpleQueueService.NonExistentQueue", "The specified queue does not exist.")
        return queue

    def send(
        self,
        queue: Queue,
        bodies: list[str],
        *,
        delay_seconds: int | None = None,
        sender: str = "events.amazonaws.com",
        attributes: list[dict[str, Any] | None] | None = None,
    ) -> list[Message]:
        """Put messages on the queue and wake as many long polls."""
        now = time.time()
        delay = queue.seconds("DelaySeconds") if delay_seconds is None else delay_seconds
        sent = []
        for i, body in enumerate(bodies):
            message = Message(
                id=str(uuid.uuid4()),
                seq=next(self._seq),
                body=body,
                md5=hashlib.md5(body.encode(), usedforsecurity=False).hexdigest(),
                sent_at=now,
                sender=sender,
                attributes=attributes[i] if attributes else None,
                visible_at=now + delay,
            )
            if len(body) > LARGE_BODY:
                # Whoever receives it must not wait for that.
                _ = message.body_as_json
            queue.by_id[message.id] = message
            if delay:
                heapq.heappush(queue.hidden, (message.visible_at, next(self._seq), message))
            else:
                queue.ready.append(message)
            sent.append(message)
        self._storage.put_messages(queue.key, [(m.id, m.seq, _document(m)) for m in sent])
        self._wake(queue)
        return sent

    def depth(self, queue: Queue) -> tuple[int, int]:
        """(visible, in flight or delayed)."""
        self._promote(queue, time.time())
        visible = sum(1 for m in queue.ready if not m.deleted)
        return visible, len(queue.by_id) - visible

    # receiving ------------------------------------------------------------------------------------------------------

    async def receive(
        self, queue: Queue, limit: int, wait_seconds: float, visibility: int, *, duplicate: bool = False
    ) -> list[Message]:
        """Up to `limit` messages, waiting up to `wait_seconds` for the first; a long poll sleeps on a future."""
        deadline = time.monotonic() + wait_seconds
        while True:
            taken = self._take(queue, limit, visibility, duplicate)
            remaining = deadline - time.monotonic()
            if taken or remaining <= 0 or self._closing:
                return taken
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue.waiters.append(waiter)
            self._arm(queue)
            try:
                async with asyncio.timeout(remaining):
                    await waiter
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                # the client left while its waiter had just been woken: the next waiter gets the message
                if waiter.done() and not waiter.cancelled():
                    self._wake(queue)
                raise
            finally:
                if not waiter.done():
                    waiter.cancel()

    def _take(self, queue: Queue, limit: int, visibility: int, duplicate: bool) -> list[Message]:
        now = time.time()
        self._promote(queue, now)
        redrive = queue.redrive()
        oldest = now - queue.seconds("MessageRetentionPeriod")
        taken: list[Message] = []
        gone: list[str] = []
        while queue.ready and len(taken) < limit:
            message = queue.ready.popleft()
            if message.deleted:
                continue
            if message.sent_at < oldest:
                message.deleted = True
                queue.by_id.pop(message.id, None)
                gone.append(message.id)
                continue
            if redrive is not None and message.receives >= redrive[1]:
                self._to_dead_letters(queue, message, redrive[0])
                continue
            message.receives += 1
            message.receipt += 1
            message.first_received_at = message.first_received_at or now
            if not duplicate:
                message.visible_at = now + visibility
                heapq.heappush(queue.hidden, (message.visible_at, next(self._seq), message))
            taken.append(message)
        if duplicate:
            queue.ready.extendleft(reversed(taken))
        if gone:
            self._storage.delete_messages(gone)
        return taken

    def delete(self, queue: Queue, handles: list[str]) -> list[str | None]:
        """Delete by receipt handle; answers the message id, or None where the handle names nothing any more.

        Like real SQS, a stale handle of a message that is visible again does not delete it, and is no error.
        """
        deleted: list[str | None] = []
        for handle in handles:
            message, receipt = _parse(queue, handle)
            if message is None or receipt != message.receipt:
                deleted.append(None)
                continue
            message.deleted = True
            queue.by_id.pop(message.id, None)
            deleted.append(message.id)
        self._storage.delete_messages([i for i in deleted if i is not None])
        return deleted

    def change_visibility(self, queue: Queue, handle: str, seconds: int) -> None:
        message, receipt = _parse(queue, handle)
        now = time.time()
        if message is None or receipt != message.receipt or message.visible_at <= now:
            raise AwsError("AWS.SimpleQueueService.MessageNotInflight", "The message referred to isn't in flight.", 400)
        message.visible_at = now + seconds
        heapq.heappush(queue.hidden, (message.visible_at, next(self._seq), message))
        if seconds == 0:
            self._promote(queue, now)
            self._wake(queue)
        else:
            self._arm(queue)

    def purge(self, queue: Queue) -> None:
        for message in queue.by_id.values():
            message.deleted = True
        queue.by_id.clear()
        queue.ready.clear()
        queue.hidden.clear()
        self._storage.delete_queue(queue.key)

    def _promote(self, queue: Queue, now: float) -> None:
        while queue.hidden and queue.hidden[0][0] <= now:
            visible_at, _, message = heapq.heappop(queue.hidden)
            # an entry whose time was changed since is a ghost of an earlier visibility
            if not message.deleted and message.visible_at == visible_at:
                message.visible_at = 0.0
                queue.ready.append(message)

    def _wake(self, queue: Queue) -> None:
        wanted = len(queue.ready)
        while queue.waiters and wanted > 0:
            waiter = queue.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                wanted -= 10  # one receive takes up to ten
        self._arm(queue)

    def _arm(self, queue: Queue) -> None:
        """One timer per queue, only while somebody waits and something will become visible."""
        if queue.timer is not None:
            queue.timer.cancel()
            queue.timer = None
        while queue.waiters and queue.waiters[0].done():
            queue.waiters.popleft()
        if queue.waiters and queue.hidden:
            delay = max(0.0, queue.hidden[0][0] - time.time()) + 0.001
            queue.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, queue)

    def _on_timer(self, queue: Queue) -> None:
        queue.timer = None
        self._promote(queue, time.time())
        self._wake(queue)

    def _to_dead_letters(self, queue: Queue, message: Message, arn: str) -> None:
        *_, account_id, name = arn.split(":")
        target = self._queues.get((account_id, name))
        message.deleted = True
        queue.by_id.pop(message.id, None)
        self._storage.delete_messages([message.id])
        if target is not None:
            self.send(target, [message.body], sender=message.sender, attributes=[message.attributes])

    def _restore(self) -> None:
        for _, row in self._storage.all("queue"):
            queue = Queue(**row)
            self._queues[queue.account_id, queue.name] = queue
        by_key = {q.key: q for q in self._queues.values()}
        newest = 0
        for key, _, seq, document in self._storage.messages():
            if (queue_ := by_key.get(key)) is not None:
                message = Message(**document)
                queue_.by_id[message.id] = message
                queue_.ready.append(message)
            newest = max(newest, seq)
        self._seq = itertools.count(newest + 1)

    def _save(self, queue: Queue) -> None:
        row = {f: getattr(queue, f) for f in ("account_id", "region", "name", "attributes", "tags", "created_at")}
        self._storage.put("queue", queue.key, row)

    # the API --------------------------------------------------------------------------------------------------------

    async def handle(self, call: Call, *, duplicate: bool = False) -> Answer:
        """Answer one call in the protocol it came in."""
        params = call.params if call.json else _from_query(call.action, call.params)
        action = getattr(self, f"_api_{_snake(call.action)}", None)
        if action is None:
            raise AwsError("InvalidAction", f"The sandbox's SQS has no action {call.action}")
        if call.action == "ReceiveMessage":
            value = await self._api_receive_message(call, params, duplicate=duplicate)
        else:
            value = action(call, params)
        return json_answer(value) if call.json else query_answer(call, SQS_NAMESPACE, _to_query_xml(call.action, value))

    def _own(self, call: Call, params: dict[str, Any]) -> Queue:
        url = params.get("QueueUrl")
        if not url:
            raise AwsError("MissingParameter", "The request must contain the parameter QueueUrl.")
        queue = self.find(str(url), call.caller.account_id)
        # The sandbox's own addresses name no region and answer in any. One as on AWS does, and a client in another
        # region, or the queue in another than the address says, meets what AWS would answer.
        named = _REGION.match(str(url))
        if named is not None and not named[1] == call.region == queue.region:
            raise AwsError("AWS.SimpleQueueService.NonExistentQueue", "The specified queue does not exist.")
        if queue.account_id != call.caller.account_id:
            raise AwsError(
                "AccessDenied",
                f"User: {call.caller.arn} is not authorized to perform: sqs:{call.action.lower()} "
                f"on resource: {queue.arn}",
                403,
            )
        call.result["queue"] = queue.name
        return queue

    def _api_create_queue(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self.create(call.caller.account_id, call.region, params.get("QueueName", ""), params.get("Attributes"))
        queue.tags.update(params.get("tags") or {})
        self._save(queue)
        return {"QueueUrl": self.url(queue)}

    def _api_delete_queue(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        self.purge(queue)
        del self._queues[queue.account_id, queue.name]
        self._storage.delete("queue", queue.key)
        return {}

    def _api_get_queue_url(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        owner = params.get("QueueOwnerAWSAccountId") or call.caller.account_id
        queue = self.find(params.get("QueueName", ""), owner)
        return {"QueueUrl": self.url(self._own(call, {"QueueUrl": self.url(queue)}))}

    def _api_list_queues(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        prefix = params.get("QueueNamePrefix") or ""
        mine = [
            self.url(q)
            for (account_id, name), q in sorted(self._queues.items())
            if account_id == call.caller.account_id and q.region == call.region and name.startswith(prefix)
        ]
        return {"QueueUrls": mine}

    def _api_get_queue_attributes(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        names = set(params.get("AttributeNames") or [])
        visible, hidden = self.depth(queue)
        delayed = sum(1 for m in queue.by_id.values() if m.receives == 0 and m.visible_at > time.time())
        every = {
            **queue.attributes,
            "QueueArn": queue.arn,
            "ApproximateNumberOfMessages": str(visible),
            "ApproximateNumberOfMessagesNotVisible": str(hidden - delayed),
            "ApproximateNumberOfMessagesDelayed": str(delayed),
            "CreatedTimestamp": str(int(queue.created_at)),
            "LastModifiedTimestamp": str(int(queue.created_at)),
        }
        return {"Attributes": every if "All" in names else {k: v for k, v in every.items() if k in names}}

    def _api_set_queue_attributes(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        _check_attributes(params.get("Attributes") or {})
        queue.attributes.update(params.get("Attributes") or {})
        self._save(queue)
        return {}

    def _api_list_queue_tags(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        return {"Tags": self._own(call, params).tags}

    def _api_tag_queue(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        queue.tags.update(params.get("Tags") or {})
        self._save(queue)
        return {}

    def _api_send_message(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        body = _body(params)
        attributes = params.get("MessageAttributes")
        delay = params.get("DelaySeconds")
        (message,) = self.send(
            queue, [body], delay_seconds=delay, sender=call.caller.access_key_id, attributes=[attributes]
        )
        call.result["message_ids"] = [message.id]
        answer = {"MessageId": message.id, "MD5OfMessageBody": message.md5}
        return {**answer, "MD5OfMessageAttributes": md5_of_attributes(attributes)} if attributes else answer

    def _api_send_message_batch(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        entries = _entries(params)
        by_delay: dict[int | None, list[dict[str, Any]]] = {}
        for entry in entries:
            by_delay.setdefault(entry.get("DelaySeconds"), []).append(entry)
        answers = []
        for delay, group in by_delay.items():
            sent = self.send(
                queue,
                [_body(e) for e in group],
                delay_seconds=delay,
                sender=call.caller.access_key_id,
                attributes=[e.get("MessageAttributes") for e in group],
            )
            answers += [
                {"Id": e["Id"], "MessageId": m.id, "MD5OfMessageBody": m.md5} for e, m in zip(group, sent, strict=True)
            ]
        call.result["message_ids"] = [a["MessageId"] for a in answers]
        return {"Successful": answers, "Failed": []}

    async def _api_receive_message(self, call: Call, params: dict[str, Any], *, duplicate: bool) -> dict[str, Any]:
        queue = self._own(call, params)
        limit = int(params.get("MaxNumberOfMessages") or 1)
        wait = params.get("WaitTimeSeconds")
        wait = queue.seconds("ReceiveMessageWaitTimeSeconds") if wait is None else int(wait)
        visibility = params.get("VisibilityTimeout")
        visibility = queue.seconds("VisibilityTimeout") if visibility is None else int(visibility)
        if not 1 <= limit <= 10:
            raise AwsError(
                "InvalidParameterValue", f"Value {limit} for parameter MaxNumberOfMessages is invalid. 1 to 10."
            )
        if not 0 <= wait <= 20:
            raise AwsError("InvalidParameterValue", f"Value {wait} for parameter WaitTimeSeconds is invalid. 0 to 20.")
        if len(queue.by_id) - len(queue.ready) >= LARGEST_INFLIGHT:
            raise AwsError("OverLimit", "Too many messages in flight", 403)
        taken = await self.receive(queue, limit, wait, visibility, duplicate=duplicate)
        call.result["message_ids"] = [m.id for m in taken]
        names = {*(params.get("AttributeNames") or []), *(params.get("MessageSystemAttributeNames") or [])}
        user_names = set(params.get("MessageAttributeNames") or [])
        return {"Messages": [_rendered(m, names, user_names, json=call.json) for m in taken]} if taken else {}

    def _api_delete_message(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        (deleted,) = self.delete(self._own(call, params), [params.get("ReceiptHandle", "")])
        call.result["message_ids"] = [deleted] if deleted else []
        return {}

    def _api_delete_message_batch(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        entries = _entries(params)
        deleted = self.delete(queue, [e.get("ReceiptHandle", "") for e in entries])
        call.result["message_ids"] = [i for i in deleted if i is not None]
        return {"Successful": [{"Id": e["Id"]} for e in entries], "Failed": []}

    def _api_change_message_visibility(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        seconds = int(params.get("VisibilityTimeout") or 0)
        _check_attributes({"VisibilityTimeout": str(seconds)})
        self.change_visibility(self._own(call, params), params.get("ReceiptHandle", ""), seconds)
        return {}

    def _api_change_message_visibility_batch(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        queue = self._own(call, params)
        successful, failed = [], []
        for entry in _entries(params):
            try:
                self.change_visibility(queue, entry.get("ReceiptHandle", ""), int(entry.get("VisibilityTimeout") or 0))
                successful.append({"Id": entry["Id"]})
            except AwsError as error:
                failed.append({"Id": entry["Id"], "SenderFault": True, "Code": error.code, "Message": error.message})
        return {"Successful": successful, "Failed": failed}

    def _api_purge_queue(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        self.purge(self._own(call, params))
        return {}


def _document(message: Message) -> dict[str, Any]:
    return {
        "id": message.id,
        "seq": message.seq,
        "body": message.body,
        "md5": message.md5,
        "sent_at": message.sent_at,
        "sender": message.sender,
        "attributes": message.attributes,
    }


def _parse(queue: Queue, handle: str) -> tuple[Message | None, int]:
    message_id, _, receipt = handle.partition(":")
    if not receipt.isdigit():
        raise AwsError("ReceiptHandleIsInvalid", "The input receipt handle is invalid.", 404)
    return queue.by_id.get(message_id), int(receipt)


def _rendered(message: Message, names: set[str], user_names: set[str], *, json: bool) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "MessageId": message.id,
        "ReceiptHandle": f"{message.id}:{message.receipt}",
        "MD5OfBody": message.md5,
        "Body": message.body_as_json if json else message.body,
    }
    if names:
        every = {
            "SenderId": message.sender,
            "SentTimestamp": str(int(message.sent_at * 1000)),
            "ApproximateReceiveCount": str(message.receives),
            "ApproximateFirstReceiveTimestamp": str(int(message.first_received_at * 1000)),
        }
        rendered["Attributes"] = every if "All" in names else {k: v for k, v in every.items() if k in names}
    if message.attributes and user_names:
        chosen = {
            k: v
            for k, v in message.attributes.items()
            if user_names & {"All", ".*"}
            or k in user_names
            or any(n.endswith(".*") and k.startswith(n[:-2]) for n in user_names)
        }
        if chosen:
            rendered["MessageAttributes"] = chosen
            rendered["MD5OfMessageAttributes"] = md5_of_attributes(chosen)
    return rendered


def md5_of_attributes(attributes: dict[str, Any]) -> str:
    """The digest SDKs compare: length-prefixed name, type and value, names in order (SQS developer guide)."""
    digest = hashlib.md5(usedforsecurity=False)
    for name in sorted(attributes):
        value = attributes[name]
        kind = value["DataType"]
        binary = kind.startswith("Binary")
        content = value["BinaryValue"] if binary else value["StringValue"]
        for part in (name.encode(), kind.encode()):
            digest.update(struct.pack(">I", len(part)) + part)
        raw = _decoded(content) if binary else str(content).encode()
        digest.update((b"\x02" if binary else b"\x01") + struct.pack(">I", len(raw)) + raw)
    return digest.hexdigest()


def _decoded(content: Any) -> bytes:
    import base64

    return content if isinstance(content, bytes) else base64.b64decode(content)


def _body(params: dict[str, Any]) -> str:
    body = params.get("MessageBody")
    if not body:
        raise AwsError("MissingParameter", "The request must contain the parameter MessageBody.")
    if len(body.encode()) > LARGEST_MESSAGE_BYTES:
        raise AwsError(
            "InvalidParameterValue",
            f"One or more parameters are invalid. Reason: Message must be shorter than {LARGEST_MESSAGE_BYTES} bytes.",
        )
    return str(body)


def _entries(params: dict[str, Any]) -> list[dict[str, Any]]:
    entries = params.get("Entries") or []
    if not entries:
        raise AwsError("AWS.SimpleQueueService.EmptyBatchRequest", "There should be at least one entry in the request.")
    if len(entries) > 10:
        raise AwsError(
            "AWS.SimpleQueueService.TooManyEntriesInBatchRequest", "Maximum number of entries per request are 10."
        )
    if len({e.get("Id") for e in entries}) != len(entries):
        raise AwsError("AWS.SimpleQueueService.BatchEntryIdsNotDistinct", "Ids of the entries must be distinct.")
    return list(entries)


def _check_attributes(attributes: dict[str, str]) -> None:
    for name, value in attributes.items():
        if name not in _SETTABLE:
            raise AwsError("InvalidAttributeName", f"Unknown Attribute {name}.")
        if name in _RANGES:
            low, high = _RANGES[name]
            if not str(value).isdigit() or not low <= int(value) <= high:
                raise AwsError("InvalidAttributeValue", f"Invalid value for the parameter {name}: {low} to {high}.")


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


# the query protocol of botocore < 1.31.81 ---------------------------------------------------------------------------

_INTEGERS = ("DelaySeconds", "VisibilityTimeout", "MaxNumberOfMessages", "WaitTimeSeconds")


def _from_query(action: str, nested: dict[str, Any]) -> dict[str, Any]:
    """Query parameters (nested) to what the JSON protocol would have sent."""
    params = dict(nested)
    for name, plain in (("AttributeName", "AttributeNames"), ("MessageAttributeName", "MessageAttributeNames")):
        if name in params:
            params[plain] = params.pop(name)
    if "Attribute" in params:
        params["Attributes"] = {a["Name"]: a["Value"] for a in params.pop("Attribute")}
    if "MessageAttribute" in params:
        params["MessageAttributes"] = {a["Name"]: a["Value"] for a in params.pop("MessageAttribute")}
    if action.endswith("Batch"):
        entries = params.pop(f"{action}RequestEntry", [])
        params["Entries"] = [_from_query("", entry) for entry in entries]
    for name in _INTEGERS:
        if name in params:
            params[name] = int(params[name])
    return params


def _element(name: str, value: Any) -> str:
    return f"<{name}>{escape(str(value))}</{name}>"


def _to_query_xml(action: str, value: dict[str, Any]) -> str:
    if action == "ReceiveMessage":
        return "".join(
            "<Message>"
            + "".join(_element(k, m[k]) for k in ("MessageId", "ReceiptHandle", "MD5OfBody", "Body"))
            + "".join(
                f"<Attribute>{_element('Name', k)}{_element('Value', v)}</Attribute>"
                for k, v in m.get("Attributes", {}).items()
            )
            + "</Message>"
            for m in value.get("Messages", [])
        )
    if action == "GetQueueAttributes":
        return "".join(
            f"<Attribute>{_element('Name', k)}{_element('Value', v)}</Attribute>"
            for k, v in value["Attributes"].items()
        )
    if action == "ListQueues":
        return "".join(_element("QueueUrl", u) for u in value["QueueUrls"])
    if action.endswith("Batch"):
        entry = f"{action}ResultEntry"
        return "".join(
            f"<{entry}>" + "".join(_element(k, v) for k, v in row.items()) + f"</{entry}>"
            for row in value["Successful"]
        ) + "".join(
            "<BatchResultErrorEntry>"
            + "".join(_element(k, str(v).lower() if isinstance(v, bool) else v) for k, v in row.items())
            + "</BatchResultErrorEntry>"
            for row in value["Failed"]
        )
    return "".join(_element(k, v) for k, v in value.items() if not isinstance(v, (dict, list)))
