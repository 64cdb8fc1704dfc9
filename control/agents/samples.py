"""Metrics bodies: decoded in columns, judged sample by sample, packed for COPY. No I/O.

One bad sample never takes its good neighbours with it. The fast path makes no Python object per sample beyond what
the decoder makes; a body that is not strictly typed JSON (NaN, `true` as a value, rows for people) goes through a
slower path with the same rules.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import chain, repeat
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
from pydantic import ValidationError

from control.errors import Invalid, TooLarge, UpgradeRequired
from warehouse.contracts import METRICS, SCHEMA_VERSION, ClusterState

MAX_SAMPLES = 5_000
MAX_FUTURE = timedelta(minutes=10)
MAX_AGE = timedelta(hours=24)
# The running day's summaries read again what came in during the last 15 minutes (cloudoptim_pipelines); what is
# older has to mark its day.
LATE_AFTER = timedelta(minutes=10)
MAX_SUBJECT_BYTES = 1024
MAX_LISTED_REJECTIONS = 1000
MAX_CLOCK_OFFSET = timedelta(seconds=30)
SUPPORTED_SCHEMA_VERSIONS = (SCHEMA_VERSION - 1, SCHEMA_VERSION)

# Above these a value is a unit mistake, whatever the node: no machine has 10,000 cores or 100 TB, no cluster a
# million pods.
CEILINGS = {"cores": 1e4, "bytes": 1e14, "count": 1e6}
# How much of a node's own capacity a usage may claim before it is a unit mistake.
CAPACITY_FACTOR = {"node_cpu_usage_cores": 2.0, "node_memory_usage_bytes": 1.05}

_POSTGRES_EPOCH_US = 946_684_800_000_000
_DAY_US = 86_400_000_000
_ROW_TAIL = np.dtype([("ts_length", ">i4"), ("ts", ">i8"), ("value_length", ">i4"), ("value", ">f8")])
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
COPY_COLUMNS = "customer_id, cluster_id, metric, subject, ts, value"


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    batch_id: UUID
    seq: int
    cluster_id: UUID
    sent_at: datetime
    schema_version: int = SCHEMA_VERSION
    agent_version: str | None = None
    state: msgspec.Raw = msgspec.Raw(b"null")
    samples: msgspec.Raw = msgspec.Raw(b'{"metric":[],"subject":[],"ts":[],"value":[]}')


class _Columns(msgspec.Struct, forbid_unknown_fields=True):
    metric: list[str]
    subject: list[str]
    ts: list[str | float]
    value: list[float]


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_columns = msgspec.json.Decoder(_Columns).decode


@dataclass(slots=True)
class Batch:
    """A judged batch, ready to be committed. ``rows`` holds COPY rows by day, ``late_days`` the days to mark."""

    customer_id: UUID
    cluster_id: UUID
    batch_id: UUID
    seq: int
    sent_at: datetime
    body_sha256: str
    agent_version: str | None
    state: ClusterState | None
    accepted: int
    duplicate: int
    late: int
    rejected: list[tuple[int, str]]
    warnings: list[str]
    rows: dict[date, bytes] = field(repr=False)
    late_days: set[date]
    series: list[tuple[str, str]] = field(repr=False)

    def answer(self) -> bytes:
        """The answer to this batch, the same whenever it is sent again."""
        return msgspec.json.encode(
            {
                "accepted": self.accepted,
                "duplicate": self.duplicate,
                "late": self.late,
                "rejected": [
                    {"index": index, "reason": reason} for index, reason in self.rejected[:MAX_LISTED_REJECTIONS]
                ],
                "rejected_count": len(self.rejected),
                "warnings": self.warnings,
            }
        )


def cluster_of(body: bytes) -> UUID:
    """The cluster a body names, without reading its samples.

    Raises:
        Invalid: no readable envelope.
    """
    return _envelope(body)[0].cluster_id


def parse(
    body: bytes, *, customer_id: UUID, now: datetime, capacities: Mapping[str, tuple[float, float]] | None = None
) -> Batch:
    """Decode and judge a body.

    Args:
        capacities: (cores, bytes) of the cluster's nodes by name, where known; the body's own state goes first.

    Raises:
        Invalid: the envelope or the shape of the samples contradicts the contract.
        TooLarge: more than 5,000 samples.
        UpgradeRequired: a schema version this server does not speak.
    """
    envelope, samples = _envelope(body)
    if envelope.schema_version not in SUPPORTED_SCHEMA_VERSIONS:
        oldest, newest = SUPPORTED_SCHEMA_VERSIONS[0], SUPPORTED_SCHEMA_VERSIONS[-1]
        raise UpgradeRequired(
            f"schema_version: {envelope.schema_version} is not spoken here; this server speaks {oldest} to {newest}. "
            "Install the agent that belongs to this server.",
            supported=[oldest, newest],
        )
    if envelope.sent_at.tzinfo is None:
        raise Invalid("sent_at: has no time zone; send RFC 3339 with an offset or Z.")
    if not 0 <= envelope.seq < 2**31:
        raise Invalid("seq: must be between 0 and 2147483647.")
    if envelope.agent_version is not None and (len(envelope.agent_version) > 64 or "\0" in envelope.agent_version):
        raise Invalid("agent_version: at most 64 printable characters.")
    state = _state(envelope, now)
    known = dict(capacities or {})
    if state is not None:
        known |= {node.node_name: (node.cpu_cores, float(node.memory_bytes)) for node in state.nodes}
    columns, rejected = samples
    judged = _judge(columns, rejected, customer_id, envelope.cluster_id, now, known)
    offset = envelope.sent_at - now
    warnings = []
    if abs(offset) > MAX_CLOCK_OFFSET:
        warnings.append(
            f"the agent's clock is {offset.total_seconds():+.0f} s off the server's; check time synchronisation"
        )
    return Batch(
        customer_id=customer_id,
        cluster_id=envelope.cluster_id,
        batch_id=envelope.batch_id,
        seq=envelope.seq,
        sent_at=envelope.sent_at,
        body_sha256=hashlib.sha256(body).hexdigest(),
        agent_version=envelope.agent_version,
        state=state,
        warnings=warnings,
        **judged,
    )


@dataclass(slots=True)
class _Samples:
    """Well-typed samples: four columns and each sample's place in the body."""

    metric: Sequence[str]
    subject: Sequence[str]
    ts: Sequence[str | float]
    value: np.ndarray
    index: np.ndarray


def _envelope(body: bytes) -> tuple[_Envelope, tuple[_Samples, list[tuple[int, str]]]]:
    try:
        envelope = _decode_envelope(body)
    except msgspec.ValidationError as error:
        raise Invalid(_field(error)) from None
    except (msgspec.DecodeError, RecursionError):
        return _loose_envelope(body)
    return envelope, _samples(bytes(envelope.samples))


def _field(error: msgspec.ValidationError) -> str:
    """msgspec's message with the field first."""
    message, _, path = str(error).partition(" - at ")
    name = path.strip("`$.") or "body"
    return f"{name}: {message}. See MetricsData in /docs."


def _loose_envelope(body: bytes) -> tuple[_Envelope, tuple[_Samples, list[tuple[int, str]]]]:
    """JSON as Python writes it (NaN, Infinity): the bad samples are named instead of the whole body refused."""
    try:
        document = json.loads(body)
        if not isinstance(document, dict):
            raise Invalid("body: must be a JSON object. See MetricsData in /docs.")
        samples, state = document.pop("samples", None), document.pop("state", None)
        envelope = msgspec.convert(document, _Envelope)
        envelope.state = msgspec.Raw(json.dumps(state).encode())
    except msgspec.ValidationError as error:
        raise Invalid(_field(error)) from None
    except (ValueError, RecursionError):
        raise Invalid("body: not valid JSON.") from None
    return envelope, _loose_samples(samples)


def _samples(raw: bytes) -> tuple[_Samples, list[tuple[int, str]]]:
    try:
        columns = _decode_columns(raw)
    except (msgspec.DecodeError, RecursionError):
        try:
            return _loose_samples(json.loads(raw))
        except (ValueError, RecursionError):
            raise Invalid("samples: not valid JSON.") from None
    lengths = {len(columns.metric), len(columns.subject), len(columns.ts), len(columns.value)}
    _check_lengths(lengths)
    count = len(columns.metric)
    return (
        _Samples(columns.metric, columns.subject, columns.ts, np.array(columns.value, np.float64), np.arange(count)),
        [],
    )


def _check_lengths(lengths: set[int]) -> None:
    if len(lengths) > 1:
        raise Invalid("samples: the columns metric, subject, ts and value differ in length.")
    if max(lengths) > MAX_SAMPLES:
        raise TooLarge(f"samples: {max(lengths)} in one batch, at most {MAX_SAMPLES}; send several batches.")


def _loose_samples(samples: Any) -> tuple[_Samples, list[tuple[int, str]]]:
    names = ("metric", "subject", "ts", "value")
    if samples is None:
        columns: list[list[Any]] = [[], [], [], []]
    elif isinstance(samples, dict):
        if set(samples) != set(names) or not all(isinstance(samples[name], list) for name in names):
            raise Invalid("samples: must hold exactly the lists metric, subject, ts and value.")
        columns = [samples[name] for name in names]
    elif isinstance(samples, list):
        if not all(isinstance(row, dict) and set(row) == set(names) for row in samples):
            raise Invalid("samples: every row must hold exactly metric, subject, ts and value.")
        columns = [[row[name] for row in samples] for name in names]
    else:
        raise Invalid("samples: must be an object of columns or a list of rows.")
    _check_lengths({len(column) for column in columns})
    good: list[tuple[int, str, str, str | float, float]] = []
    rejected: list[tuple[int, str]] = []
    for index, (metric, subject, ts, value) in enumerate(zip(*columns, strict=True)):
        if not isinstance(metric, str) or not isinstance(subject, str):
            rejected.append((index, "metric and subject must be text"))
        elif isinstance(ts, bool) or not isinstance(ts, str | int | float):
            rejected.append((index, "ts must be RFC 3339 text with a zone, or seconds since 1970"))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            rejected.append((index, f"value must be a number, not {_kind(value)}"))
        else:
            try:
                good.append((index, metric, subject, ts if isinstance(ts, str) else float(ts), float(value)))
            except OverflowError:
                rejected.append((index, "value is out of the range of a double"))
    return (
        _Samples(
            [row[1] for row in good],
            [row[2] for row in good],
            [row[3] for row in good],
            np.array([row[4] for row in good], np.float64),
            np.array([row[0] for row in good], np.int64),
        ),
        rejected,
    )


def _kind(value: Any) -> str:
    return {bool: "true or false", str: "text", type(None): "null", list: "a list", dict: "an object"}[type(value)]


def _state(envelope: _Envelope, now: datetime) -> ClusterState | None:
    raw = bytes(envelope.state)
    if raw == b"null":
        return None
    try:
        state = ClusterState.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Invalid(f"state.{place}: {first['msg']}. See ClusterState in /docs.") from None
    if state.cluster_id != envelope.cluster_id:
        raise Invalid("state.cluster_id: differs from cluster_id.")
    if state.captured_at > now + MAX_FUTURE:
        raise Invalid("state.captured_at: more than 10 minutes in the future; check the agent's clock.")
    return state


def _judge(
    samples: _Samples,
    rejected: list[tuple[int, str]],
    customer_id: UUID,
    cluster_id: UUID,
    now: datetime,
    capacities: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    count = len(samples.metric)
    # Codes instead of names from here on. An agent's batch is one moment of every series, so mostly each is there once.
    series = list(zip(samples.metric, samples.subject, strict=True))
    codes = np.arange(count)
    code_of = dict.fromkeys(series)
    if len(code_of) < count:
        code_of = {pair: code for code, pair in enumerate(code_of)}
        codes = np.fromiter(map(code_of.__getitem__, series), np.int64, count)
        series = list(code_of)
    facts = list(map(_facts_of, series))
    times, time_reasons = _times(samples.ts, now)
    verdict: dict[int, str] = {}

    def refuse(mask: np.ndarray, reason: str) -> None:
        for position in np.flatnonzero(mask):
            verdict.setdefault(int(position), reason)

    for code, fact in enumerate(facts):
        if fact.reason:
            refuse(codes == code, fact.reason)
    for stamp, reason in time_reasons.items():
        refuse(times == stamp, reason)
    values = samples.value
    if not np.isfinite(values).all():
        refuse(~np.isfinite(values), "value is not a finite number")
    with np.errstate(invalid="ignore"):
        negative = values < 0
    if negative.any():
        refuse(negative, "value is negative")
    ceilings = np.array([fact.ceiling for fact in facts] or [0.0])
    for code, (pair, fact) in enumerate(zip(series, facts, strict=True)) if capacities else ():
        if fact.capacity_factor and pair[1] in capacities:
            capacity = capacities[pair[1]][fact.capacity_column] * fact.capacity_factor
            ceilings[code] = capacity if 0 < capacity < fact.ceiling else fact.ceiling
    if count:
        with np.errstate(invalid="ignore"):
            suspect = values > ceilings[codes]
        if suspect.any():
            refuse(
                suspect,
                "suspect: more than the node has or any machine could; check the unit (cores, bytes, counts)",
            )
    keep = np.ones(count, bool)
    if verdict:
        keep[list(verdict)] = False
    duplicate = 0
    if len(series) < count:
        duplicate = _drop_repeated(codes, times, values, keep)
    rejected = rejected + [(int(samples.index[position]), reason) for position, reason in verdict.items()]
    rejected.sort()
    head = _row_head(customer_id, cluster_id)
    kept_codes, kept_times, kept_values = codes[keep], times[keep], values[keep]
    late = kept_times < _microseconds(now - LATE_AFTER)
    rows: dict[date, bytes] = {}
    late_days: set[date] = set()
    if len(kept_times):
        for number in range(int(kept_times.min()) // _DAY_US, int(kept_times.max()) // _DAY_US + 1):
            chosen = kept_times // _DAY_US == number
            if chosen.any():
                rows[_day(number)] = _pack(head, facts, kept_codes[chosen], kept_times[chosen], kept_values[chosen])
                if late[chosen].any():
                    late_days.add(_day(number))
    return {
        "accepted": int(keep.sum()),
        "duplicate": duplicate,
        "late": int(late.sum()),
        "rejected": rejected,
        "rows": rows,
        "late_days": late_days,
        "series": [pair for pair, fact in zip(series, facts, strict=True) if not fact.reason],
    }


def _times(stamps: Sequence[str | float], now: datetime) -> tuple[np.ndarray, dict[int, str]]:
    """Microseconds since 1970 of every sample, and a reason for each refused value. Refused ones that are no time at
    all get a negative code of their own."""
    reasons: dict[int, str] = {}
    newest, oldest = _microseconds(now + MAX_FUTURE), _microseconds(now - MAX_AGE)
    known: dict[str | float, int] = {}
    for stamp in set(stamps):
        parsed = _parse_time(stamp)
        if isinstance(parsed, str):
            code = -1 - len(reasons)
            known[stamp], reasons[code] = code, parsed
            continue
        known[stamp] = parsed
        if parsed > newest:
            reasons[parsed] = "ts is more than 10 minutes in the future; check the clock"
        elif parsed < 0:
            reasons[parsed] = "ts is before 1970"
        elif parsed < oldest:
            reasons[parsed] = "ts is more than 24 hours old: use backfill"
    return np.fromiter(map(known.__getitem__, stamps), np.int64, len(stamps)), reasons


def _parse_time(stamp: str | float) -> int | str:
    if isinstance(stamp, str):
        try:
            moment = datetime.fromisoformat(stamp)
        except ValueError:
            return "ts is not RFC 3339 (such as 2026-01-31T12:00:00Z)"
        if moment.tzinfo is None:
            return "ts has no time zone; add Z or an offset"
        return _microseconds(moment)
    if not -1e11 < stamp < 1e11:
        return "ts looks like milliseconds; send seconds since 1970 or RFC 3339 with a zone"
    return round(stamp * 1e6)


def _microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _day(number: int) -> date:
    return date(1970, 1, 1) + timedelta(days=number)


def _series_reason(metric: str, subject: str) -> str | None:
    if metric not in METRICS:
        return "unknown metric; see the list of metrics in /docs (a name carries its unit)"
    if not subject:
        return "subject is empty"
    if "\0" in subject:
        return "subject holds a NUL character"
    try:
        size = len(subject.encode())
    except UnicodeEncodeError:
        return "subject is not valid Unicode"
    return f"subject is longer than {MAX_SUBJECT_BYTES} bytes" if size > MAX_SUBJECT_BYTES else None


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is the same for all samples of a series: why it is refused, its part of a COPY row, its ceiling."""

    reason: str | None
    row_part: bytes
    ceiling: float
    capacity_factor: float
    capacity_column: int


@lru_cache(maxsize=1 << 16)
def _facts_of(pair: tuple[str, str]) -> _Facts:
    metric, subject = pair
    if reason := _series_reason(metric, subject):
        return _Facts(reason, b"", 0.0, 0.0, 0)
    unit = "cores" if metric.endswith("_cores") else "bytes" if metric.endswith("_bytes") else "count"
    metric_bytes, subject_bytes = metric.encode(), subject.encode()
    return _Facts(
        None,
        b"".join(
            (
                struct.pack(">i", len(metric_bytes)),
                metric_bytes,
                struct.pack(">i", len(subject_bytes)),
                subject_bytes,
            )
        ),
        CEILINGS[unit],
        CAPACITY_FACTOR.get(metric, 0.0),
        0 if unit == "cores" else 1,
    )


def _drop_repeated(codes: np.ndarray, times: np.ndarray, values: np.ndarray, keep: np.ndarray) -> int:
    """Keep the first of samples with one series and time; returns how many went."""
    positions = np.flatnonzero(keep)
    order = positions[np.lexsort((times[positions], codes[positions]))]
    if len(order) < 2:
        return 0
    same = (codes[order][1:] == codes[order][:-1]) & (times[order][1:] == times[order][:-1])
    keep[order[1:][same]] = False
    return int(same.sum())


def _row_head(customer_id: UUID, cluster_id: UUID) -> bytes:
    """The start of a COPY row that all samples of a batch share."""
    return b"".join((struct.pack(">hi", 6, 16), customer_id.bytes, struct.pack(">i", 16), cluster_id.bytes))


def _pack(head: bytes, facts: list[_Facts], codes: np.ndarray, times: np.ndarray, values: np.ndarray) -> bytes:
    tails = np.empty(len(codes), _ROW_TAIL)
    tails["ts_length"], tails["value_length"] = 8, 8
    tails["ts"], tails["value"] = times - _POSTGRES_EPOCH_US, values
    packed, size = tails.tobytes(), _ROW_TAIL.itemsize
    parts = [facts[code].row_part for code in codes.tolist()]
    pieces = [packed[start : start + size] for start in range(0, len(packed), size)]
    return b"".join(chain.from_iterable(zip(repeat(head), parts, pieces, strict=False)))
