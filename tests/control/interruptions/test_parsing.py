"""The parser: total, quick, and right about every case of the corpus."""

from __future__ import annotations

import json
import time
import tracemalloc
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.interruptions.parsing import Drop, ParsedEvent, Quarantine, QueueOwner, kept_body, parse
from tests.control.interruptions.corpus import OWNER, RECEIVED_AT, SENT_AT, Case, cases

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_corpus(case: Case) -> None:
    outcome = parse(case.body, owner=OWNER, received_at=RECEIVED_AT, sent_at=SENT_AT)
    expect = case.expect
    match expect["outcome"]:
        case "quarantine":
            assert isinstance(outcome, Quarantine)
            assert (outcome.reason, outcome.security) == (expect["reason"], expect.get("security", False))
            assert outcome.detail
        case "drop":
            assert isinstance(outcome, Drop)
            assert outcome.reason == expect["reason"]
        case "event":
            assert isinstance(outcome, ParsedEvent)
            assert outcome.kind == expect["kind"]
            assert outcome.flags >= set(expect.get("flags", ()))
            assert "stale" not in outcome.flags or "stale" in expect.get("flags", ())
            assert len(outcome.instance_ids) == expect.get("instances", 1)
            for name in ("action", "state", "region", "dedupe_key"):
                if name in expect:
                    assert getattr(outcome, name) == expect[name]
            for name in ("occurred_at", "exact_deadline"):
                if name in expect:
                    assert getattr(outcome, name) == datetime.fromisoformat(expect[name])


@pytest.mark.parametrize("case", [case for case in CASES if "generate" in case.expect], ids=lambda case: case.name)
def test_monsters_are_read_and_kept_quickly_and_cheaply(case: Case) -> None:
    tracemalloc.start()
    # Of this process alone: others have the machine too.
    started = time.process_time()
    parse(case.body, owner=OWNER, received_at=RECEIVED_AT)
    kept_body(case.body)
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Tracing makes it several times slower than it is.
    assert seconds < 0.5
    assert peak < 50 << 20


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=15,
)
ENVELOPE_KEYS = ("version", "id", "detail-type", "source", "account", "time", "region", "detail", "Message", "Event")
DETAIL_TYPES = (
    "EC2 Spot Instance Interruption Warning",
    "EC2 Instance State-change Notification",
    "AWS Health Event",
    "EC2 Instance-terminate Lifecycle Action",
    "EC2 Instance Launch Unsuccessful",
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=400))
def test_any_bytes_have_an_outcome(body: bytes | str) -> None:
    outcome = parse(body, owner=OWNER, received_at=RECEIVED_AT)
    assert isinstance(outcome, ParsedEvent | Drop | Quarantine)
    assert outcome.dedupe_key


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(st.sampled_from(ENVELOPE_KEYS), JSON),
    st.sampled_from(DETAIL_TYPES),
    st.sampled_from(["aws.ec2", "aws.health", "aws.autoscaling"]),
    JSON,
)
def test_any_document_has_an_outcome(extra: dict[str, Any], detail_type: str, source: str, detail: Any) -> None:
    document = {
        "version": "0",
        "detail-type": detail_type,
        "source": source,
        "account": "123456789012",
        "region": "us-east-1",
        "time": "2026-01-02T03:04:05Z",
        "detail": detail,
    } | extra
    outcome = parse(json.dumps(document), owner=OWNER, received_at=RECEIVED_AT)
    if isinstance(outcome, ParsedEvent):
        assert outcome.occurred_at <= RECEIVED_AT + timedelta(minutes=5)
        assert outcome.account_id in (None, "123456789012")


def test_the_order_of_keys_and_the_wrapping_do_not_make_a_new_event() -> None:
    document = json.loads(CASES[[case.name for case in CASES].index("q04-without-id.json")].body)
    plain = parse(json.dumps(document), owner=OWNER, received_at=RECEIVED_AT)
    wrapped = parse(json.dumps({"Message": json.dumps(document)}), owner=OWNER, received_at=RECEIVED_AT)
    again = parse(
        json.dumps({"Message": json.dumps(dict(reversed(document.items())))}), owner=OWNER, received_at=RECEIVED_AT
    )
    assert wrapped.dedupe_key == again.dedupe_key
    assert isinstance(plain, ParsedEvent)


def test_without_a_configured_account_nothing_contradicts() -> None:
    document = json.loads(CASES[[case.name for case in CASES].index("q11-other-account.json")].body)
    outcome = parse(json.dumps(document), owner=QueueOwner(None), received_at=RECEIVED_AT)
    assert isinstance(outcome, ParsedEvent)


def test_what_looks_like_a_secret_is_hidden_in_a_kept_body() -> None:
    kept = kept_body(
        json.dumps({"key": "AKIA" + "A" * 16, "auth": "Bearer abc.def", "instance-id": "i-0123456789abcdef0"})
    )
    assert "AKIA" not in kept
    assert "abc.def" not in kept
    assert "i-0123456789abcdef0" in kept


LIFECYCLE = {"LifecycleActionToken": "t" * 36, "AutoScalingGroupName": "group", "LifecycleHookName": "hook"}


def _scaling(detail_type: str, detail: dict[str, Any]) -> Any:
    document = {
        "version": "0",
        "id": "one",
        "detail-type": detail_type,
        "source": "aws.autoscaling",
        "account": "123456789012",
        "region": "us-east-1",
        "time": RECEIVED_AT.isoformat(),
        "detail": {"EC2InstanceId": "i-0123456789abcdef0"} | detail,
    }
    return parse(json.dumps(document), owner=OWNER, received_at=RECEIVED_AT)


@pytest.mark.parametrize(
    ("name", "limit"), [("LifecycleActionToken", 512), ("AutoScalingGroupName", 255), ("LifecycleHookName", 255)]
)
def test_names_no_index_could_hold_are_refused(name: str, limit: int) -> None:
    kind = "EC2 Instance-terminate Lifecycle Action"
    assert isinstance(_scaling(kind, LIFECYCLE | {name: "x" * limit}), ParsedEvent)
    for outcome in (
        _scaling(kind, LIFECYCLE | {name: "x" * (limit + 1)}),
        parse(
            json.dumps(LIFECYCLE | {name: "x" * 16384, "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING"}),
            owner=OWNER,
            received_at=RECEIVED_AT,
        ),
    ):
        assert isinstance(outcome, Quarantine)
        assert outcome.reason == "too_large"
        assert name in outcome.detail


def test_a_zone_that_is_none_is_not_scored() -> None:
    kind = "EC2 Instance Launch Unsuccessful"
    named = _scaling(kind, {"Details": {"Availability Zone": "us-east-1a", "Subnet ID": "s"}})
    assert named.detail["Details"] == {"Availability Zone": "us-east-1a", "Subnet ID": "s"}
    endless = _scaling(kind, {"Details": {"Availability Zone": "z" * 16384, "Subnet ID": "s"}})
    assert endless.detail["Details"] == {"Subnet ID": "s"}
    assert "zone_ignored" in endless.flags
