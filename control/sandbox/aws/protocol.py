"""The two wire dialects of AWS that the sandbox speaks: query parameters with XML, and JSON with a target header."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from xml.sax.saxutils import escape

import msgspec

EC2_NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"
STS_NAMESPACE = "https://sts.amazonaws.com/doc/2011-06-15/"
SQS_NAMESPACE = "http://queue.amazonaws.com/doc/2012-11-05/"


class AwsError(Exception):
    """A refusal in AWS's own words: `code` and `message` as the service would send them, with its HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


@dataclass(frozen=True, slots=True)
class Caller:
    """Who signed the call. `session_name` is the role session, None for long-lived keys."""

    account_id: str
    arn: str
    access_key_id: str
    session_name: str | None = None


@dataclass(slots=True)
class Call:
    """One API call, decoded: `params` nested as in boto3 for EC2 and JSON services, flat for other query services."""

    service: str
    region: str
    action: str
    params: dict[str, Any]
    caller: Caller
    json: bool
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    result: dict[str, Any] = field(default_factory=dict)
    """What the history should say about the outcome: ids, not bodies."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = "text/xml;charset=UTF-8"
    headers: tuple[tuple[bytes, bytes], ...] = ()


def nest(flat: Mapping[str, str]) -> dict[str, Any]:
    """Turn `A.1.B=x` of the EC2 query protocol into {"A": [{"B": "x"}]}; list positions are only used for order."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        node = tree
        *path, last = name.split(".")
        for part in path:
            following = node.setdefault(part, {})
            if not isinstance(following, dict):
                raise AwsError("MalformedQueryString", f"{name} is both a value and a structure")
            node = following
        node[last] = value
    listed = _lists(tree)
    assert isinstance(listed, dict)
    return listed


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(key.isdigit() for key in node):
        return [_lists(node[key]) for key in sorted(node, key=int)]
    return {key: _lists(value) for key, value in node.items()}


def timestamp(at: datetime) -> str:
    """Milliseconds and Z, as EC2 writes times."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def xml(value: Any) -> str:
    """Render dicts as elements, lists as <item>s, None as nothing."""
    if isinstance(value, dict):
        return "".join(f"<{k}>{xml(v)}</{k}>" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return "".join(f"<item>{xml(v)}</item>" for v in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return timestamp(value)
    return escape(str(value))


def ec2_answer(call: Call, value: dict[str, Any]) -> Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{call.action}Response xmlns="{EC2_NAMESPACE}">'
        f"<requestId>{call.request_id}</requestId>{xml(value)}</{call.action}Response>"
    )
    return Answer(200, body.encode())


def query_answer(call: Call, namespace: str, value: str) -> Answer:
    """A query-protocol answer; `value` is rendered XML (list elements have names of their own here)."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{call.action}Response xmlns="{namespace}">'
        f"<{call.action}Result>{value}</{call.action}Result><ResponseMetadata><RequestId>{call.request_id}</RequestId></ResponseMetadata>"
        f"</{call.action}Response>"
    )
    return Answer(200, body.encode())


def json_answer(value: Any, *, version: str = "1.0", status: int = 200) -> Answer:
    return Answer(status, msgspec.json.encode(value), f"application/x-amz-json-{version}")


def error_answer(service: str, json: bool, request_id: str, error: AwsError) -> Answer:
    """Shape a refusal the way the service's SDK expects it."""
    if json:
        version = "1.0" if service == "sqs" else "1.1"
        shape = _SQS_SHAPES.get(error.code, error.code) if service == "sqs" else error.code
        # SQS moved to JSON with query-compatible error codes: botocore takes the old code from this header
        header = (b"x-amzn-query-error", f"{error.code};Sender".encode())
        return Answer(
            error.status,
            msgspec.json.encode({"__type": f"com.amazonaws.{service}#{shape}", "message": error.message}),
            f"application/x-amz-json-{version}",
            ((b"x-amzn-requestid", request_id.encode()), *((header,) if service == "sqs" else ())),
        )
    code, message = escape(error.code), escape(error.message)
    if service == "ec2":
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error>'
            f"<Code>{code}</Code><Message>{message}</Message></Error></Errors>"
            f"<RequestID>{request_id}</RequestID></Response>"
        )
    else:
        kind = "Sender" if error.status < 500 else "Receiver"
        body = (
            '<?xml version="1.0"?>\n<ErrorResponse><Error>'
            f"<Type>{kind}</Type><Code>{code}</Code><Message>{message}</Message></Error>"
            f"<RequestId>{request_id}</RequestId></ErrorResponse>"
        )
    return Answer(error.status, body.encode())


_SQS_SHAPES = {
    "AWS.SimpleQueueService.NonExistentQueue": "QueueDoesNotExist",
    "QueueAlreadyExists": "QueueNameExists",
    "AWS.SimpleQueueService.EmptyBatchRequest": "EmptyBatchRequest",
    "AWS.SimpleQueueService.TooManyEntriesInBatchRequest": "TooManyEntriesInBatchRequest",
    "AWS.SimpleQueueService.BatchEntryIdsNotDistinct": "BatchEntryIdsNotDistinct",
    "AWS.SimpleQueueService.MessageNotInflight": "MessageNotInflight",
}
