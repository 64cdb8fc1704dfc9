"""From the body of a message to what it means: a pure function that never raises.

``parse`` takes any bytes and answers with one of three things: a ``ParsedEvent`` to act on, a ``Drop`` (valid, but not
for us: deleted and counted) or a ``Quarantine`` (kept with the reason, listed, can be replayed). The tenant is the
queue's; what the body says about account and region is only ever checked against it.

Formats: EventBridge envelopes of every kind the path acts on, the same wrapped by SNS, lifecycle messages an Auto
Scaling group sends straight to SQS, and test notifications.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from control.security.redaction import redact_text
from warehouse.contracts import EventKind, InterruptionAction, SpotEvent

# The largest body SQS carries; the push endpoint takes no longer one either. All of it is kept where it is kept.
MAX_BODY_BYTES = 1 << 20
# EventBridge documents are five deep; a body that goes further is an attack on parsers, not an event.
MAX_DEPTH = 32
# A sender's clock may be this far ahead before its time is replaced by ours.
MAX_FUTURE = timedelta(minutes=5)
# Older notices are recorded and judged by the cluster's state of now (C-24).
STALE_AFTER = timedelta(minutes=15)
# What Auto Scaling names: groups and hooks have at most 255 characters, a token is a UUID of 36. A longer one is not
# AWS's, and Postgres could not index it.
MAX_NAME_CHARACTERS = 255
MAX_TOKEN_CHARACTERS = 512
# The longest zones (Wavelength) have some 30.
MAX_ZONE_CHARACTERS = 64
# Pages of one AWS Health event are numbered; more than this is nonsense.
MAX_INSTANCES_PER_EVENT = 10_000

ACCOUNT_ID = re.compile(r"^\d{12}$")
REGION = re.compile(r"^[a-z]{2}(-[a-z]+)+-\d{1,2}$")
INSTANCE_ID = re.compile(r"^i-[0-9A-Za-z]{4,32}$")
_DEDUPE_SAFE = re.compile(r"^[\x21-\x7e]{1,200}$")
_RFC3339 = re.compile(r"^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:?\d\d)?$")
# A string that does not end is taken to the end and never gone over again: time grows with the body's length alone.
_OPENERS = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|[\[\]{}]', re.DOTALL)

TERMINAL_OR_ENDING_STATES = frozenset({"stopping", "stopped", "shutting-down", "terminated"})
GONE_STATES = frozenset({"stopped", "terminated"})


@dataclass(frozen=True, slots=True)
class QueueOwner:
    """What is known of the sender before the body is read: the customer of the queue a message came from.

    ``account_id`` and ``regions`` may be empty when they are not configured yet; then nothing can contradict them.
    ``queue_region`` is where the queue itself is: what a message that names no region is about.
    """

    account_id: str | None
    regions: frozenset[str] = frozenset()
    queue_region: str = ""


@dataclass(frozen=True, slots=True)
class ParsedEvent:
    """One event, about one or more instances (AWS Health pages name many, launch failures may name none).

    ``flags`` says what was odd and was mended: ``unknown_action``, ``time_in_future``, ``time_unreadable``,
    ``time_without_zone``, ``stale``, ``id_missing``, ``detail_was_text``, ``zone_ignored``.
    """

    kind: EventKind
    dedupe_key: str
    region: str
    account_id: str | None
    occurred_at: datetime
    instance_ids: tuple[str, ...]
    action: InterruptionAction | None = None
    state: str | None = None
    starts_at: datetime | None = None
    exact_deadline: datetime | None = None
    node_name: str | None = None
    flags: frozenset[str] = frozenset()
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def stale(self) -> bool:
        """Whether the notice was older than 15 minutes when it arrived."""
        return "stale" in self.flags

    @property
    def called_off(self) -> bool:
        """Whether AWS closes a maintenance by it: it took place, or will not."""
        return self.kind is EventKind.SCHEDULED_CHANGE and self.detail.get("statusCode") == "closed"


@dataclass(frozen=True, slots=True)
class Drop:
    """Valid but not for us. ``reason`` is one of a small set, fit for a metric's label."""

    reason: str
    dedupe_key: str
    event_type: str | None = None


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Not acted on, kept. ``security`` marks a body that contradicts the queue it came from."""

    reason: str
    detail: str
    dedupe_key: str
    event_type: str | None = None
    security: bool = False


Outcome = ParsedEvent | Drop | Quarantine


class _Refused(Exception):
    def __init__(self, reason: str, detail: str, *, security: bool = False) -> None:
        self.reason, self.detail, self.security = reason, detail, security


class _Dropped(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason


def body_digest(body: str | bytes) -> str:
    """The dedupe key of a message that has no key of its own."""
    return "sha256:" + hashlib.sha256(_raw(body)).hexdigest()


def _raw(body: str | bytes) -> bytes:
    return body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")


def parse(body: str | bytes, *, owner: QueueOwner, received_at: datetime, sent_at: datetime | None = None) -> Outcome:
    """Read one message.

    Args:
        body: the message as it came, in any encoding and of any size.
        owner: the customer whose queue it came from.
        received_at: when we got it (UTC).
        sent_at: when the queue got it (SQS SentTimestamp), used where the body has no readable time.
    """
    digest = body_digest(body)
    try:
        document = _decode(_raw(body))
        document, wrapped = _unwrap(document)
    except _Refused as refused:
        return Quarantine(refused.reason, refused.detail, digest)
    event_type = _short(document.get("detail-type"))
    key = _dedupe_key(document) or (digest if not wrapped else _content_key(document))
    try:
        if "detail-type" not in document and ("LifecycleTransition" in document or "Event" in document):
            event_type = "direct lifecycle message"
            return _direct_lifecycle(document, key, owner, received_at, sent_at)
        return _envelope(document, key, owner, received_at, sent_at)
    except _Dropped as dropped:
        return Drop(dropped.reason, key, event_type)
    except _Refused as refused:
        # By its content: a body that cannot be trusted must not take the place of the real event with the same id.
        return Quarantine(refused.reason, refused.detail, digest, event_type, refused.security)


def from_agent(event: SpotEvent, *, region: str, account_id: str | None, received_at: datetime) -> ParsedEvent | Drop:
    """An event an agent saw on its node (instance metadata) or in its cluster, already validated by its contract.

    ``detail['time']`` of a metadata notice is the exact moment EC2 will act; ``detail['state']`` of a state change is
    the instance's new one, and only one that ends it is acted on, as from anybody else.
    """
    content = json.dumps(
        [event.event_type, event.instance_id, event.occurred_at.isoformat(), event.detail], default=str
    )
    key = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
    said = event.detail.get("state")
    state = said if isinstance(said, str) else None
    if event.event_type is EventKind.INSTANCE_STATE_CHANGE and state not in TERMINAL_OR_ENDING_STATES:
        starting = state in ("pending", "running")
        return Drop("instance_starting" if starting else "unknown_state", key, event.event_type.value)
    flags: set[str] = set()
    occurred_at = _place_in_time(event.occurred_at, received_at, flags)
    exact = event.detail.get("time")
    deadline = _read_time(exact, set()) if isinstance(exact, str) else None
    return ParsedEvent(
        kind=event.event_type,
        dedupe_key=key,
        region=region,
        account_id=account_id,
        occurred_at=occurred_at,
        instance_ids=(event.instance_id,),
        action=event.instance_action or _default_action(event.event_type),
        state=state,
        exact_deadline=deadline,
        node_name=event.node_name,
        flags=frozenset(flags),
        detail=event.detail,
    )


# Where a warning's detail says the exact end: of Spot, instance metadata as an agent read it.
_END_SAID_IN = {
    EventKind.SPOT_INTERRUPTION: "time",
    EventKind.CAPACITY_RESERVATION_INTERRUPTION: "instance-termination-time",
}


def remembered(
    kind: EventKind,
    instance_id: str,
    *,
    action: InterruptionAction,
    region: str,
    account_id: str | None,
    occurred_at: datetime,
    received_at: datetime,
    detail: dict[str, Any],
) -> ParsedEvent:
    """An event that was kept, as it concerns one instance: the moments in its detail count again."""
    exact = _read_time(detail.get(_END_SAID_IN[kind]), set()) if kind in _END_SAID_IN else None
    return ParsedEvent(
        kind=kind,
        dedupe_key="",
        region=region,
        account_id=account_id,
        occurred_at=occurred_at,
        instance_ids=(instance_id,),
        action=action,
        starts_at=_read_time(detail.get("startTime"), set()),
        exact_deadline=exact,
        flags=frozenset({"stale"} if occurred_at < received_at - STALE_AFTER else ()),
        detail=detail,
    )


def kept_body(body: str | bytes) -> str | None:
    """A body as it may be stored in quarantine: text Postgres takes, whole, so that it can be read again, with secrets
    hidden by their shape. None for one that no sender could have sent: nothing over 1 MiB is kept."""
    raw = _raw(body)
    if len(raw) > MAX_BODY_BYTES:
        return None
    return redact_text(raw.decode("utf-8", "backslashreplace").replace("\x00", "\\x00"))


# --- decoding ---------------------------------------------------------------------------------------------------


def _decode(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_BODY_BYTES:
        raise _Refused(
            "too_large", f"the body has {len(raw)} bytes; a message carries at most {MAX_BODY_BYTES}, so it is not kept"
        )
    if not raw.strip():
        raise _Refused("empty", "the body is empty")
    if b"\x00" in raw or raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        raise _Refused("not_json", "the body has NUL bytes or a byte order mark; JSON is sent as plain UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused("not_utf8", f"the body is not UTF-8 at byte {error.start}") from None
    document = _load(text)
    if not isinstance(document, dict):
        raise _Refused("not_an_object", f"the body is a JSON {type(document).__name__}, not an object")
    return document


def _load(text: str) -> Any:
    # Read first, which stops where the text is no JSON, and at the interpreter's own limit of depth: going over a large
    # body takes several times as long.
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except _Refused:
        raise
    except RecursionError:
        raise _Refused("too_deep", f"the body nests deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        # Also numbers beyond the interpreter's digit limit.
        raise _Refused("not_json", f"the body is not JSON: {str(error)[:120]}") from None
    _check_depth(text)
    if "\\u" in text and not _storable(document):
        raise _Refused("bad_text", "the body has NUL characters or lone surrogates in its text")
    return document


def _check_depth(text: str) -> None:
    # Cheap bound first: a short document cannot be deep.
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _OPENERS.finditer(text):
        character = match.group()
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _Refused("too_deep", f"the body nests deeper than {MAX_DEPTH} levels")
        elif character in "]}":
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused("duplicate_key", f"the key {key[:60]!r} is there twice; which one counts is unknowable")
            seen.add(key)
    return document


def _no_constant(name: str) -> Any:
    raise _Refused("not_json", f"{name} is not a JSON value")


def _storable(document: Any) -> bool:
    try:
        return "\\u0000" not in json.dumps(document) and bool(json.dumps(document, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _unwrap(document: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The event inside an SNS envelope, else the document itself."""
    wrapped = False
    for _ in range(2):
        message = document.get("Message")
        if "detail-type" in document or not isinstance(message, str):
            return document, wrapped
        inner = _load(message) if message.strip() else None
        if not isinstance(inner, dict):
            raise _Refused("not_an_object", "the SNS message inside the body is not a JSON object")
        document, wrapped = inner, True
    return document, wrapped


def _dedupe_key(document: dict[str, Any]) -> str | None:
    identity = document.get("id")
    return identity if isinstance(identity, str) and _DEDUPE_SAFE.match(identity) else None


def _content_key(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _short(value: Any) -> str | None:
    return value[:100] if isinstance(value, str) else None


# --- EventBridge ------------------------------------------------------------------------------------------------


def _envelope(
    document: dict[str, Any], key: str, owner: QueueOwner, received_at: datetime, sent_at: datetime | None
) -> ParsedEvent:
    source, detail_type = document.get("source"), document.get("detail-type")
    if not isinstance(detail_type, str) or not isinstance(source, str) or not detail_type or not source:
        missing = "detail-type" if not isinstance(detail_type, str) or not detail_type else "source"
        raise _Refused("missing_field", f"{missing} is missing or not text")
    # AWS's own older samples lack the version, so only another one is foreign.
    if document.get("version", "0") != "0":
        raise _Dropped("unknown_version")
    reader = _READERS.get((source, detail_type))
    if reader is None:
        raise _Dropped("unknown_event")

    flags: set[str] = set()
    if not isinstance(document.get("id"), str):
        flags.add("id_missing")
    detail = _detail(document, flags)
    event = reader(detail)
    account, region = _origin(document, detail, event.kind, owner)
    if "time" not in document:
        raise _Refused("missing_field", "time is missing")
    occurred_at = _read_time(document["time"], flags)
    if occurred_at is None:
        flags.add("time_unreadable")
        occurred_at = sent_at or received_at
    occurred_at = _place_in_time(occurred_at, received_at, flags)
    return ParsedEvent(
        kind=event.kind,
        dedupe_key=event.dedupe_key(account) if event.dedupe_key else key,
        region=region,
        account_id=account,
        occurred_at=occurred_at,
        instance_ids=event.instance_ids,
        action=event.action,
        state=event.state,
        starts_at=event.starts_at,
        exact_deadline=event.exact_deadline,
        flags=frozenset(flags) | event.flags,
        detail=detail if event.detail is None else event.detail,
    )


def _detail(document: dict[str, Any], flags: set[str]) -> dict[str, Any]:
    detail = document.get("detail")
    if isinstance(detail, str) and detail.strip():
        flags.add("detail_was_text")
        detail = _load(detail)
    if detail is None:
        raise _Refused("missing_field", "detail is missing")
    if not isinstance(detail, dict):
        raise _Refused("wrong_type", f"detail is a {type(detail).__name__}, not an object")
    return detail


def _origin(document: dict[str, Any], detail: dict[str, Any], kind: EventKind, owner: QueueOwner) -> tuple[str, str]:
    account, region = document.get("account"), document.get("region")
    if kind is EventKind.SCHEDULED_CHANGE:
        # Health events may be delivered to an organisation's management account and from another region.
        account = detail.get("affectedAccount") or account
        region = detail.get("eventRegion") or region
    if account is None or region is None:
        raise _Refused("missing_field", f"{'account' if account is None else 'region'} is missing")
    if not isinstance(account, str) or not ACCOUNT_ID.match(account):
        raise _Refused("account_malformed", f"account {str(account)[:40]!r} is not twelve digits")
    if not isinstance(region, str) or not REGION.match(region):
        raise _Refused("region_malformed", f"region {str(region)[:40]!r} is not a region's name")
    if owner.account_id and account != owner.account_id:
        raise _Refused(
            "account_contradiction",
            f"the body says account {account}, the queue belongs to account {owner.account_id}",
            security=True,
        )
    if owner.regions and region not in owner.regions:
        raise _Refused(
            "region_contradiction",
            f"the body says region {region}, the queue's customer runs in {', '.join(sorted(owner.regions))}",
            security=True,
        )
    return account, region


@dataclass(frozen=True, slots=True)
class _Read:
    kind: EventKind
    instance_ids: tuple[str, ...]
    action: InterruptionAction | None = None
    state: str | None = None
    starts_at: datetime | None = None
    exact_deadline: datetime | None = None
    flags: frozenset[str] = frozenset()
    dedupe_key: Callable[[str], str] | None = None
    # In place of what came.
    detail: dict[str, Any] | None = None


def _instance_id(detail: dict[str, Any], name: str) -> str:
    value = detail.get(name)
    if value is None:
        raise _Refused("missing_field", f"detail.{name} is missing")
    if not isinstance(value, str):
        raise _Refused("wrong_type", f"detail.{name} is a {type(value).__name__}, not text")
    if not INSTANCE_ID.match(value) or "\n" in value:
        raise _Refused("instance_id_malformed", f"detail.{name} {value[:60]!r} is not an instance id")
    return value


def _default_action(kind: EventKind) -> InterruptionAction | None:
    if kind in (EventKind.SPOT_INTERRUPTION, EventKind.CAPACITY_RESERVATION_INTERRUPTION):
        return InterruptionAction.TERMINATE
    return None


def _action(detail: dict[str, Any]) -> tuple[InterruptionAction, frozenset[str]]:
    """Unknown actions are treated as the most harmful one and flagged (Q-08)."""
    value = detail.get("instance-action")
    if isinstance(value, str) and value in InterruptionAction.__members__.values():
        return InterruptionAction(value), frozenset()
    return InterruptionAction.TERMINATE, frozenset({"unknown_action"})


def _interruption(kind: EventKind) -> Callable[[dict[str, Any]], _Read]:
    def read(detail: dict[str, Any]) -> _Read:
        action, flags = _action(detail)
        ends_at = None
        if kind is EventKind.CAPACITY_RESERVATION_INTERRUPTION:
            ends_at = _read_time(detail.get(_END_SAID_IN[kind]), set())
        return _Read(kind, (_instance_id(detail, "instance-id"),), action, exact_deadline=ends_at, flags=flags)

    return read


def _rebalance(detail: dict[str, Any]) -> _Read:
    return _Read(EventKind.REBALANCE_RECOMMENDATION, (_instance_id(detail, "instance-id"),))


def _state_change(detail: dict[str, Any]) -> _Read:
    state = detail.get("state")
    if not isinstance(state, str) or not state:
        raise _Refused("missing_field", "detail.state is missing or not text")
    instance = _instance_id(detail, "instance-id")
    # Set membership: a substring test would take an empty or partial state for one that ends the instance.
    if state in ("pending", "running"):
        raise _Dropped("instance_starting")
    if state not in TERMINAL_OR_ENDING_STATES:
        raise _Dropped("unknown_state")
    return _Read(EventKind.INSTANCE_STATE_CHANGE, (instance,), state=state)


def _health(detail: dict[str, Any]) -> _Read:
    if detail.get("service") != "EC2" or detail.get("eventTypeCategory") != "scheduledChange":
        raise _Dropped("health_other")
    entities = detail.get("affectedEntities")
    if not isinstance(entities, list) or not entities:
        raise _Refused("missing_field", "detail.affectedEntities is missing or empty")
    if len(entities) > MAX_INSTANCES_PER_EVENT:
        raise _Refused("too_large", f"detail.affectedEntities has {len(entities)} entries")
    instances = []
    for entity in entities:
        value = entity.get("entityValue") if isinstance(entity, dict) else None
        # Volumes and hosts are affected entities too; only instances are nodes.
        if isinstance(value, str) and INSTANCE_ID.match(value) and value not in instances:
            instances.append(value)
    if not instances:
        raise _Dropped("health_no_instance")
    flags: set[str] = set()
    starts_at = _read_time(detail.get("startTime"), flags)
    communication = detail.get("communicationId")
    page = str(detail.get("page") or "1")
    dedupe = None
    if isinstance(communication, str) and _DEDUPE_SAFE.match(communication) and _DEDUPE_SAFE.match(page):

        def dedupe(account: str) -> str:
            return f"health:{account}:{communication}:{page}"

    return _Read(EventKind.SCHEDULED_CHANGE, tuple(instances), starts_at=starts_at, dedupe_key=dedupe)


def _lifecycle(kind: EventKind) -> Callable[[dict[str, Any]], _Read]:
    def read(detail: dict[str, Any]) -> _Read:
        _lifecycle_fields(detail)
        return _Read(kind, (_instance_id(detail, "EC2InstanceId"),))

    return read


def _lifecycle_fields(detail: dict[str, Any]) -> None:
    for name, limit in (
        ("LifecycleActionToken", MAX_TOKEN_CHARACTERS),
        ("AutoScalingGroupName", MAX_NAME_CHARACTERS),
        ("LifecycleHookName", MAX_NAME_CHARACTERS),
    ):
        value = detail.get(name)
        if not isinstance(value, str) or not value:
            raise _Refused("missing_field", f"{name} is missing or not text")
        if len(value) > limit:
            raise _Refused("too_large", f"{name} has {len(value)} characters; it has at most {limit}")


def _launch_unsuccessful(detail: dict[str, Any]) -> _Read:
    instance = detail.get("EC2InstanceId")
    # An empty instance id is normal here: nothing was launched.
    instances = (_instance_id(detail, "EC2InstanceId"),) if instance else ()
    details = detail.get("Details")
    if isinstance(details, dict) and len(str(details.get("Availability Zone", ""))) > MAX_ZONE_CHARACTERS:
        # No pool's name: nothing is scored by it.
        kept = {name: value for name, value in details.items() if name != "Availability Zone"}
        return _Read(
            EventKind.LAUNCH_UNSUCCESSFUL,
            instances,
            flags=frozenset({"zone_ignored"}),
            detail=detail | {"Details": kept},
        )
    return _Read(EventKind.LAUNCH_UNSUCCESSFUL, instances)


_READERS: dict[tuple[str, str], Callable[[dict[str, Any]], _Read]] = {
    ("aws.ec2", "EC2 Spot Instance Interruption Warning"): _interruption(EventKind.SPOT_INTERRUPTION),
    ("aws.ec2", "EC2 Capacity Reservation Instance Interruption Warning"): _interruption(
        EventKind.CAPACITY_RESERVATION_INTERRUPTION
    ),
    # AWS has written the same event's name both ways.
    ("aws.ec2", "EC2 Interruptible Capacity Reservation Instance Interruption Warning"): _interruption(
        EventKind.CAPACITY_RESERVATION_INTERRUPTION
    ),
    ("aws.ec2", "EC2 Instance Rebalance Recommendation"): _rebalance,
    ("aws.ec2", "EC2 Instance State-change Notification"): _state_change,
    ("aws.health", "AWS Health Event"): _health,
    ("aws.autoscaling", "EC2 Instance-terminate Lifecycle Action"): _lifecycle(EventKind.ASG_TERMINATE),
    ("aws.autoscaling", "EC2 Instance-launch Lifecycle Action"): _lifecycle(EventKind.ASG_LAUNCH),
    ("aws.autoscaling", "EC2 Instance Launch Unsuccessful"): _launch_unsuccessful,
}


def _direct_lifecycle(
    document: dict[str, Any], key: str, owner: QueueOwner, received_at: datetime, sent_at: datetime | None
) -> ParsedEvent:
    """A lifecycle message an Auto Scaling group sent straight to SQS: no envelope, times under ``Time``."""
    transition = document.get("LifecycleTransition")
    if "autoscaling:TEST_NOTIFICATION" in (document.get("Event"), transition):
        raise _Dropped("test_notification")
    kinds = {
        "autoscaling:EC2_INSTANCE_TERMINATING": EventKind.ASG_TERMINATE,
        "autoscaling:EC2_INSTANCE_LAUNCHING": EventKind.ASG_LAUNCH,
    }
    if not isinstance(transition, str) or transition not in kinds:
        raise _Dropped("unknown_event")
    _lifecycle_fields(document)
    account = document.get("AccountId")
    if isinstance(account, str) and owner.account_id and account != owner.account_id:
        raise _Refused(
            "account_contradiction",
            f"the body says account {account[:40]}, the queue belongs to account {owner.account_id}",
            security=True,
        )
    flags: set[str] = {"direct"}
    occurred_at = _read_time(document.get("Time"), flags)
    if occurred_at is None:
        flags.add("time_unreadable")
        occurred_at = sent_at or received_at
    request = document.get("RequestId")
    return ParsedEvent(
        kind=kinds[transition],
        dedupe_key=request if isinstance(request, str) and _DEDUPE_SAFE.match(request) else key,
        # The message names no region: a hook's queue is in its group's own.
        region=owner.queue_region or (next(iter(owner.regions)) if len(owner.regions) == 1 else ""),
        account_id=owner.account_id,
        occurred_at=_place_in_time(occurred_at, received_at, flags),
        instance_ids=(_instance_id(document, "EC2InstanceId"),),
        flags=frozenset(flags),
        detail=document,
    )


# --- time -------------------------------------------------------------------------------------------------------


def _read_time(value: Any, flags: set[str]) -> datetime | None:
    """RFC 3339, or the RFC 1123 form of AWS Health; UTC. None when it is not a date."""
    if not isinstance(value, str):
        return None
    if _RFC3339.match(value):
        try:
            moment = datetime.fromisoformat(value.upper().replace(" ", "T"))
        except ValueError:
            return None
    else:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    try:
        if moment.tzinfo is None:
            flags.add("time_without_zone")
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (OverflowError, ValueError):
        return None


def _place_in_time(occurred_at: datetime, received_at: datetime, flags: set[str]) -> datetime:
    if occurred_at > received_at + MAX_FUTURE:
        flags.add("time_in_future")
        return received_at
    if occurred_at < received_at - STALE_AFTER:
        flags.add("stale")
    return occurred_at
