"""Interruptions, quarantine and pushed events over HTTP."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from control.interruptions.service import Received, ingest
from control.interruptions.views import message_id
from tests.control.api import Api
from tests.control.api import Tenant as Keys
from tests.control.interruptions.tenants import Tenant, refusing
from warehouse.contracts import EventSource


@pytest.fixture
async def keys(api: Api) -> Keys:
    return await api.tenant("Interrupted")


@pytest.fixture
async def customer(api: Api, keys: Keys) -> Tenant:
    found = Tenant(api.db, keys.customer_id, keys.cluster_id, "")
    row = await found.row("UPDATE customers SET status = 'active' WHERE id = :customer_id RETURNING aws_account_id")
    found.account_id = row.aws_account_id
    return found


async def _push(api: Api, keys: Keys, document: dict[str, Any] | str) -> str:
    content = document if isinstance(document, str) else json.dumps(document)
    answer = await api.ok(
        "POST", "/events/aws", keys.admin_key, content=content, headers={"Content-Type": "application/json"}
    )
    return answer["outcome"]


async def test_strangers_and_readers_push_nothing(api: Api, keys: Keys) -> None:
    for key, status in ((None, 401), (keys.analyst_key, 403), (keys.agent_key, 403)):
        assert (await api.call("POST", "/events/aws", key, content="{}")).status_code == status


async def test_a_key_that_only_pushes_pushes_for_its_customer(api: Api, keys: Keys, customer: Tenant) -> None:
    """As an EventBridge connection sends it: the key in a header of its own. What else it may not do, the matrix of
    roles and routes shows."""
    asked = {"name": "eventbridge", "role": "event_pusher"}
    key = (await api.ok("POST", "/api-keys", keys.admin_key, json=asked))["key"]
    node = await customer.node()
    answer = await api.call("POST", "/events/aws", None, json=customer.warning(node), headers={"X-API-Key": key})
    assert (answer.status_code, answer.json()["outcome"]) == (202, "handled")
    stranger = await api.tenant("Elsewhere too")
    foreign = await Tenant(api.db, stranger.customer_id, stranger.cluster_id, "").node()
    answer = await api.call("POST", "/events/aws", None, json=customer.warning(foreign), headers={"X-API-Key": key})
    assert answer.json()["outcome"] == "quarantined"
    # It belongs to a customer, and is nobody's who signs in.
    assert (await api.call("POST", "/api-keys", json=asked)).status_code == 422
    person = {"email": "p@example.com", "password": "long enough, really", "role": "event_pusher"}
    assert (await api.call("POST", "/users", keys.admin_key, json=person)).status_code == 422
    assert (await api.call("POST", "/api-keys", keys.analyst_key, json=asked)).status_code == 403


async def test_a_pushed_warning_is_handled_like_one_from_the_queue(api: Api, keys: Keys, customer: Tenant) -> None:
    instance = await customer.node()
    warning = customer.warning(instance)
    assert await _push(api, keys, warning) == "handled"
    assert await _push(api, keys, warning) == "duplicate"
    (found,) = (await api.ok("GET", "/interruptions", keys.analyst_key))["interruptions"]
    assert (found["instance_id"], found["state"], found["detected_by"]) == (instance, "open", ["push"])
    steps = {step["step"]: step for step in found["timeline"]}
    assert list(steps) == [
        "warning",
        "task_created",
        "task_in_agents_hands",
        "cordoned",
        "replacement_launched",
        "replacement_ready",
        "drained",
        "closed",
    ]
    assert 100 < steps["task_created"]["seconds_left"] <= 120
    assert steps["closed"]["at"] is None

    tasks = await api.ok("GET", "/client/tasks", keys.agent_key, params={"cluster_id": str(keys.cluster_id), "wait": 0})
    assert tasks["tasks"][0]["parameters"]["instance_id"] == instance
    detail = await api.ok("GET", f"/interruptions/{found['id']}", keys.analyst_key)
    assert {step["step"]: step for step in detail["timeline"]}["task_in_agents_hands"]["at"] is not None
    assert [entry["event"] for entry in detail["history"]] == ["detected"]
    assert [event["source"] for event in detail["events"]] == ["push"]


async def test_a_drain_that_was_tried_twice_is_shown_twice(api: Api, keys: Keys, customer: Tenant) -> None:
    await customer.config("event_policies", {"rebalance_recommendation": "drain"})
    instance = await customer.node()
    await _push(api, keys, customer.rebalance(instance))
    await customer.rows("UPDATE agent_tasks SET state = 'failed', cordoned_at = now(), finished_at = now() RETURNING 1")
    await _push(api, keys, customer.warning(instance))
    (found,) = (await api.ok("GET", "/interruptions", keys.analyst_key))["interruptions"]
    detail = await api.ok("GET", f"/interruptions/{found['id']}", keys.analyst_key)
    failed, again = detail["drains"]
    assert (failed["state"], again["state"], found["drain_state"]) == ("failed", "queued", "queued")
    assert failed["cordoned_at"] is not None
    assert again["cordoned_at"] is None
    created = {step["step"]: step["at"] for step in detail["timeline"]}["task_created"]
    assert created == again["created_at"]


async def test_an_agents_notice_is_the_same_interruption(api: Api, keys: Keys, customer: Tenant) -> None:
    instance = await customer.node()
    await _push(api, keys, customer.warning(instance))
    notice = {
        "event_type": "spot_interruption",
        "instance_id": instance,
        "occurred_at": datetime.now(UTC).isoformat(),
        "instance_action": "terminate",
    }
    await api.ok(
        "POST", "/client/events", keys.agent_key, json={"cluster_id": str(keys.cluster_id), "events": [notice]}
    )
    (found,) = (await api.ok("GET", "/interruptions", keys.analyst_key))["interruptions"]
    assert found["detected_by"] == ["push", "agent"]


@pytest.mark.parametrize("status", ["suspended", "offboarding"])
async def test_events_of_a_customer_that_is_not_served_are_not_taken(
    api: Api, keys: Keys, customer: Tenant, status: str
) -> None:
    """Q-18 end to end: its queue is not read, and its keys open nothing."""
    node = await customer.node()
    await customer.rows("UPDATE customers SET status = :s WHERE id = :customer_id RETURNING 1", s=status)
    assert (await api.call("POST", "/events/aws", keys.admin_key, json=customer.warning(node))).status_code == 401
    assert (await _notify(api, keys, _notice(node))).status_code == 401
    assert await customer.rows("SELECT 1 FROM inbox_messages WHERE customer_id = :customer_id") == []
    assert await _drained_nodes(customer) == set()


async def _quarantined(api: Api, keys: Keys) -> list[dict[str, Any]]:
    return (await api.ok("GET", "/quarantine", keys.analyst_key))["messages"]


@pytest.mark.parametrize(
    ("condition", "cause"),
    [("data_exception", "DataException"), ("program_limit_exceeded", "ProgramLimitExceeded")],
)
async def test_a_pushed_event_that_cannot_be_taken_in_is_set_aside_and_replayed(
    api: Api, keys: Keys, customer: Tenant, condition: str, cause: str
) -> None:
    """EventBridge would deliver it for a day and every time in vain: it is kept with the reason instead."""
    bad = await customer.node()
    warning = customer.warning(bad)
    async with refusing(api.db, bad, condition):
        assert await _push(api, keys, warning) == "quarantined"
        assert await _push(api, keys, warning) == "duplicate"
        (message,) = await _quarantined(api, keys)
        assert message["reason"].startswith(f"unprocessable: {cause}")
        assert json.loads(message["body"]) == warning
    replayed = await api.ok("POST", f"/quarantine/{message['id']}/replay", keys.admin_key)
    assert (replayed["outcome"], len(replayed["interruptions"])) == ("handled", 1)


async def test_a_pushed_event_that_the_database_fails_on_is_delivered_again(
    api: Api, keys: Keys, customer: Tenant
) -> None:
    """An error that says nothing of the content: it stays with its sender, who is told to come again."""
    bad = await customer.node()
    warning = customer.warning(bad)
    async with refusing(api.db, bad, "internal_error"):
        answer = await api.call("POST", "/events/aws", keys.admin_key, json=warning)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert await _quarantined(api, keys) == []
    assert await _push(api, keys, warning) == "handled"


def _notice(instance: str, **values: Any) -> dict[str, Any]:
    return {
        "event_type": "spot_interruption",
        "instance_id": instance,
        "occurred_at": datetime.now(UTC).isoformat(),
        "instance_action": "terminate",
    } | values


async def _notify(api: Api, keys: Keys, *notices: dict[str, Any]) -> Any:
    body = json.dumps({"cluster_id": str(keys.cluster_id), "events": list(notices)})
    headers = {"Content-Type": "application/json"}
    return await api.call("POST", "/client/events", keys.agent_key, content=body, headers=headers)


async def _drained_nodes(customer: Tenant) -> set[str]:
    rows = await customer.rows("SELECT parameters FROM agent_tasks WHERE customer_id = :customer_id")
    return {row.parameters["instance_id"] for row in rows}


@pytest.mark.parametrize("poison", [{"n": "\x00"}, {"n": "\ud800"}], ids=["nul", "surrogate"])
async def test_a_notice_that_cannot_be_stored_does_not_hold_up_what_came_with_it(
    api: Api, keys: Keys, customer: Tenant, poison: dict[str, Any]
) -> None:
    """Of one body: the good ones are taken in, the bad one is kept with the reason, and the agent need not repeat."""
    nodes = [await customer.node() for _ in range(4)]
    bad = nodes[1]
    notices = [_notice(node, detail=poison if node == bad else {}) for node in nodes]
    for known in (0, 4):
        answer = await _notify(api, keys, *notices)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["accepted"], answer.json()["duplicate"]) == (4 - known, known)
    assert await _drained_nodes(customer) == set(nodes) - {bad}
    (message,) = await _quarantined(api, keys)
    assert message["reason"].startswith("unprocessable: ")
    assert bad in message["body"]


async def test_a_notice_the_database_fails_on_does_not_hold_up_its_neighbours(
    api: Api, keys: Keys, customer: Tenant
) -> None:
    nodes = [await customer.node() for _ in range(3)]
    async with refusing(api.db, nodes[0], "internal_error"):
        answer = await _notify(api, keys, *(_notice(node) for node in nodes))
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert await _drained_nodes(customer) == set(nodes[1:])


async def test_agents_tell_what_they_can_know(api: Api, keys: Keys, customer: Tenant) -> None:
    node = await customer.node()
    # Known and valid, but no end of an instance.
    for state in ("running", "pending", "", None, 7):
        notice = _notice(node, event_type="instance_state_change", detail={"state": state})
        assert (await _notify(api, keys, notice)).json()["interruptions"] == []
    assert await _drained_nodes(customer) == set()
    for kind, detail in (("rebalance_recommendation", {}), ("instance_state_change", {"state": "shutting-down"})):
        assert (await _notify(api, keys, _notice(node, event_type=kind, detail=detail))).is_success, kind
    assert await _drained_nodes(customer) == {node}


async def test_a_notice_that_is_none_is_set_aside_and_its_neighbours_are_taken_in(
    api: Api, keys: Keys, customer: Tenant
) -> None:
    """An agent sends what it has together, and again until it is told 2xx: one of them must not cost the others."""
    nodes = [await customer.node() for _ in range(2)]
    bad = {
        "asg_terminate_lifecycle": "event_type: ",
        "asg_launch_lifecycle": "event_type: ",
        "launch_unsuccessful": "event_type: ",
        "scheduled_change": "event_type: ",
        "capacity_reservation_interruption": "event_type: ",
        "of_next_year": "event_type: ",
    }
    notices = [_notice(nodes[0], event_type=kind) for kind in bad]
    others = [_notice("../x"), _notice(nodes[0], secret="s3cr3t-value"), None, 7, [], {}]
    reasons = [*bad.values(), "instance_id: ", "secret: ", "event: ", "event: ", "event: ", "event_type: "]
    sent = [_notice(nodes[0]), *notices, *others, _notice(nodes[1])]
    for new in (len(sent), 0):
        answer = await _notify(api, keys, *sent)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["accepted"], told["duplicate"]) == (new, len(sent) - new)
        assert [one["index"] for one in told["rejected"]] == list(range(1, len(sent) - 1))
        assert all(one["reason"].startswith(reason) for one, reason in zip(told["rejected"], reasons, strict=True))
        assert "s3cr3t" not in answer.text
    assert await _drained_nodes(customer) == set(nodes)
    kept = await _quarantined(api, keys)
    assert sorted(message["reason"] for message in kept) == sorted(
        f"unreadable_notice: {one['reason']}" for one in told["rejected"]
    )
    assert {json.loads(message["body"])["events"][0] is None for message in kept} == {True, False}
    replayed = await api.ok("POST", f"/quarantine/{kept[0]['id']}/replay", keys.admin_key)
    assert (replayed["outcome"], replayed["interruptions"]) == ("quarantined", [])
    # What is no body of events at all is the sender's mistake.
    refused = await api.call("POST", "/client/events", keys.agent_key, json={"events": [_notice(nodes[0])]})
    assert refused.status_code == 422


async def test_a_timeline_counts_from_the_warning_and_keeps_the_recommendation_before_it(
    api: Api, keys: Keys, customer: Tenant
) -> None:
    await customer.config("event_policies", {"rebalance_recommendation": "drain"})
    instance = await customer.node()
    recommended = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=7)
    await _push(api, keys, customer.rebalance(instance, time=recommended.isoformat()))
    await customer.rows("UPDATE agent_tasks SET created_at = created_at - interval '6 minutes' RETURNING 1")
    (alone,) = (await api.ok("GET", "/interruptions", keys.analyst_key))["interruptions"]
    assert alone["first_notice_at"] == alone["notice_at"]
    await _push(api, keys, customer.warning(instance))
    (found,) = (await api.ok("GET", "/interruptions", keys.analyst_key))["interruptions"]
    assert datetime.fromisoformat(found["first_notice_at"]) == recommended
    steps = {step["step"]: step for step in found["timeline"]}
    assert datetime.fromisoformat(steps["warning"]["at"]) > recommended + timedelta(minutes=6)
    assert 100 < steps["warning"]["seconds_left"] <= 120
    assert steps["task_created"]["seconds_after_notice"] < -300, "begun before the warning came"


async def test_quarantine_is_listed_and_replayed_by_one_call(api: Api, keys: Keys, customer: Tenant) -> None:
    instance = "i-0aaaabbbbccccdddd"
    foreign = customer.warning(instance, account="999999999999")
    assert await _push(api, keys, foreign) == "quarantined"
    assert await _push(api, keys, "not json at all") == "quarantined"
    messages = (await api.ok("GET", "/quarantine", keys.analyst_key))["messages"]
    assert {message["reason"].split(":")[0] for message in messages} == {"not_json", "account_contradiction"}
    contradicting = next(message for message in messages if "account" in message["reason"])
    assert json.loads(contradicting["body"]) == foreign

    still = await api.ok("POST", f"/quarantine/{contradicting['id']}/replay", keys.admin_key)
    assert still["outcome"] == "quarantined"
    # The account turns out to be the customer's after all, and its node has registered.
    await customer.rows("UPDATE customers SET aws_account_id = '999999999999' WHERE id = :customer_id RETURNING 1")
    await customer.node(instance)
    replayed = await api.ok("POST", f"/quarantine/{contradicting['id']}/replay", keys.admin_key)
    assert (replayed["outcome"], len(replayed["interruptions"])) == ("handled", 1)
    task = await customer.row("SELECT * FROM agent_tasks WHERE customer_id = :customer_id")
    assert task.parameters["instance_id"] == instance
    # Twice is once, and says the same.
    assert await api.ok("POST", f"/quarantine/{contradicting['id']}/replay", keys.admin_key) == replayed
    assert len(await customer.rows("SELECT 1 FROM agent_tasks WHERE customer_id = :customer_id")) == 1
    audited = await customer.rows(
        "SELECT detail ->> 'was' AS was, detail ->> 'outcome' AS outcome FROM audit_log "
        "WHERE customer_id = :customer_id AND action = 'quarantine.replayed' ORDER BY id"
    )
    assert [entry.outcome for entry in audited] == ["quarantined", "handled"]
    assert audited[0].was == contradicting["reason"]
    # What was never in quarantine is not there to be replayed.
    handled = message_id(customer.customer_id, "push", json.loads(contradicting["body"])["id"])
    assert (await api.call("POST", f"/quarantine/{handled}/replay", keys.admin_key)).status_code == 404


def _an_account() -> str:
    return f"{secrets.randbelow(10**12):012d}"


async def _owns(customer: Tenant, account: str) -> None:
    """It turns out to be the customer's account."""
    await customer.rows("UPDATE customers SET aws_account_id = :a WHERE id = :customer_id RETURNING 1", a=account)


async def test_all_of_one_reason_is_replayed_by_one_call(api: Api, keys: Keys, customer: Tenant) -> None:
    nodes, account = [await customer.node() for _ in range(5)], _an_account()
    for node in nodes:
        assert await _push(api, keys, customer.warning(node, account=account)) == "quarantined"
    assert await _push(api, keys, "not json") == "quarantined"
    asked = {"reason": "account_contradiction", "limit": 3}
    await _owns(customer, account)
    async with refusing(api.db, nodes[0], "data_exception"):
        first = await api.ok("POST", "/quarantine/replay", keys.admin_key, json=asked)
        assert (first["outcomes"], first["left"]) == ({"quarantined": 1, "handled": 2}, 2)
        assert await _drained_nodes(customer) == set(nodes[1:3])
    second = await api.ok("POST", "/quarantine/replay", keys.admin_key, json=asked)
    assert (second["outcomes"], second["left"]) == ({"handled": 2}, 0)
    assert len(first["interruptions"] + second["interruptions"]) == 4
    # The one that could not be taken in has a reason of its own by now.
    last = await api.ok("POST", "/quarantine/replay", keys.admin_key, json={"reason": "unprocessable"})
    assert (last["outcomes"], last["left"]) == ({"handled": 1}, 0)
    assert await _drained_nodes(customer) == set(nodes)
    (message,) = await _quarantined(api, keys)
    assert message["reason"].startswith("not_json")
    nothing = await api.ok("POST", "/quarantine/replay", keys.admin_key, json={"reason": "unprocessable"})
    assert nothing == {"outcomes": {}, "interruptions": [], "left": 0}
    assert (await api.call("POST", "/quarantine/replay", json=asked)).status_code == 404, "a platform key says whose"
    asked |= {"customer_id": str(customer.customer_id)}
    assert (await api.ok("POST", "/quarantine/replay", json=asked))["outcomes"] == {}


@pytest.mark.parametrize("size", [200 << 10, 1 << 20], ids=["200KiB", "1MiB"])
async def test_a_large_body_is_kept_whole_and_replayed(api: Api, keys: Keys, customer: Tenant, size: int) -> None:
    node, account = await customer.node(), _an_account()
    warning = customer.warning(node, account=account, padding="")
    warning["padding"] = "p" * (size - len(json.dumps(warning)))
    assert len(json.dumps(warning)) == size
    assert await _push(api, keys, warning) == "quarantined"
    (message,) = await _quarantined(api, keys)
    assert (len(message["body"]), message["body_bytes"]) == (4096, size)
    whole = await api.ok("GET", f"/quarantine/{message['id']}", keys.analyst_key)
    assert json.loads(whole["body"]) == warning
    stranger = await api.tenant("Curious")
    assert (await api.call("GET", f"/quarantine/{message['id']}", stranger.admin_key)).status_code == 404
    await _owns(customer, account)
    replayed = await api.ok("POST", f"/quarantine/{message['id']}/replay", keys.admin_key)
    assert (replayed["outcome"], await _drained_nodes(customer)) == ("handled", {node})


async def test_what_is_larger_than_a_message_is_refused_or_kept_by_its_reason_only(
    api: Api, keys: Keys, customer: Tenant
) -> None:
    too_large = b" " * (1 << 20) + b"x"
    headers = {"Content-Type": "application/json"}
    answer = await api.call("POST", "/events/aws", keys.admin_key, content=too_large, headers=headers)
    assert answer.status_code == 413
    assert "1,048,576 bytes" in answer.json()["detail"]
    done = await ingest(api.db, await customer.facts(), [Received(too_large, EventSource.SQS)])
    assert done.quarantined == 1
    (message,) = await _quarantined(api, keys)
    assert message["reason"].startswith("too_large: the body has 1048577 bytes")
    assert (message["body"], message["body_bytes"]) == (None, None)
    replayed = await api.ok("POST", f"/quarantine/{message['id']}/replay", keys.admin_key)
    assert (replayed["outcome"], replayed["reason"]) == ("quarantined", message["reason"])


async def test_a_pushed_body_that_nests_too_deep_is_kept_not_refused(api: Api, keys: Keys, customer: Tenant) -> None:
    """EventBridge gives up on what is refused."""
    assert await _push(api, keys, "[" * 10_000 + "]" * 10_000) == "quarantined"
    (message,) = await _quarantined(api, keys)
    assert message["reason"].startswith("too_deep")


async def test_a_replayed_notice_speaks_for_its_agents_cluster_only(api: Api, keys: Keys, customer: Tenant) -> None:
    other = await api.ok(
        "POST",
        "/clusters",
        json={"customer_id": str(keys.customer_id), "cluster_name": "second", "region": "us-east-1"},
    )
    neighbour = Tenant(api.db, keys.customer_id, UUID(other["id"]), customer.account_id)
    node = await neighbour.node()
    assert (await _notify(api, keys, _notice(node))).json()["interruptions"] == []
    (message,) = await _quarantined(api, keys)
    assert message["reason"].startswith("foreign_instance")
    replayed = await api.ok("POST", f"/quarantine/{message['id']}/replay", keys.admin_key)
    assert (replayed["outcome"], replayed["reason"]) == ("quarantined", message["reason"])
    assert await _drained_nodes(customer) == set()


async def test_a_replayed_message_may_name_the_region_of_its_queue(api: Api, keys: Keys, customer: Tenant) -> None:
    """A queue in Frankfurt brings what is about Frankfurt, though no cluster is there yet; a push brings no region."""
    await customer.rows(
        "UPDATE customers SET sqs_queue_url = replace(sqs_queue_url, 'us-east-1', 'eu-central-1') "
        "WHERE id = :customer_id RETURNING 1"
    )
    for source, outcome in ((EventSource.SQS, "waiting"), (EventSource.PUSH, "quarantined")):
        account = _an_account()
        warning = customer.warning("i-0aaaabbbbccccffff", region="eu-central-1", account=account)
        said = Received(json.dumps(warning), source)
        await ingest(api.db, await customer.facts(), [said], queue_region="eu-central-1")
        (message,) = [m for m in await _quarantined(api, keys) if m["source"] == source]
        assert message["reason"].startswith("account_contradiction")
        await _owns(customer, account)
        replayed = await api.ok("POST", f"/quarantine/{message['id']}/replay", keys.admin_key)
        assert replayed["outcome"] == outcome, replayed


async def test_quarantine_of_another_customer_does_not_exist(api: Api, keys: Keys, customer: Tenant) -> None:
    await _push(api, keys, "not json")
    (message,) = (await api.ok("GET", "/quarantine", keys.analyst_key))["messages"]
    stranger = await api.tenant("Stranger")
    assert (await api.call("POST", f"/quarantine/{message['id']}/replay", stranger.admin_key)).status_code == 404
    assert (await api.ok("GET", "/quarantine", stranger.admin_key))["messages"] == []
    for broken in ("x", "%00", "aaaa"):
        assert (await api.call("POST", f"/quarantine/{broken}/replay", keys.admin_key)).status_code == 404


async def test_rebalances_are_scored_by_what_followed(api: Api, keys: Keys, customer: Tenant) -> None:
    right, wrong = await customer.node(), await customer.node()
    for instance in (right, wrong):
        assert await _push(api, keys, customer.rebalance(instance)) == "handled"
    await _push(api, keys, customer.warning(right))
    await customer.rows(
        "UPDATE spot_events SET received_at = received_at - interval '1 hour', "
        "occurred_at = occurred_at - interval '1 minute' WHERE customer_id = :customer_id RETURNING 1"
    )
    (pool,) = (await api.ok("GET", "/interruptions/rebalance-scores", keys.analyst_key))["pools"]
    assert (pool["recommendations"], pool["interrupted_within_30_minutes"], pool["precision"]) == (2, 1, 0.5)


async def test_a_notice_of_an_agent_that_found_no_node_is_replayed_too(api: Api, keys: Keys, customer: Tenant) -> None:
    notice = {
        "event_type": "spot_interruption",
        "instance_id": "i-0aaaabbbbcccceeee",
        "occurred_at": datetime.now(UTC).isoformat(),
        "instance_action": "terminate",
    }
    await api.ok(
        "POST", "/client/events", keys.agent_key, json={"cluster_id": str(keys.cluster_id), "events": [notice]}
    )
    # Ten minutes later nobody had claimed it.
    await customer.rows(
        "UPDATE inbox_messages SET outcome = 'quarantined' WHERE customer_id = :customer_id AND outcome = 'waiting' "
        "RETURNING 1"
    )
    await customer.rows(
        "UPDATE interruptions SET state = 'closed', outcome = 'unmatched', closed_at = now(), version = version + 1 "
        "WHERE customer_id = :customer_id RETURNING 1"
    )
    await customer.node("i-0aaaabbbbcccceeee")
    (message,) = (await api.ok("GET", "/quarantine", keys.analyst_key))["messages"]
    replayed = await api.ok("POST", f"/quarantine/{message['id']}/replay", keys.admin_key)
    assert replayed["outcome"] == "handled"
    assert len(await customer.rows("SELECT 1 FROM agent_tasks WHERE customer_id = :customer_id")) == 1


async def test_what_keeps_a_node_on_demand_is_told_condition_by_condition(
    api: Api, keys: Keys, customer: Tenant
) -> None:
    instance = await customer.node(node_type="on-demand", ready_at=datetime.now(UTC))
    launch = {"node_type": "spot", "instance_type": "m5.large", "availability_zone": "us-east-1a"}
    interruption = await customer.node()
    await _push(api, keys, customer.warning(interruption))
    await customer.rows(
        """
        WITH intent AS (
            UPDATE launch_intents SET requirements = CAST(:launch AS jsonb), state = 'ready'
            WHERE customer_id = :customer_id RETURNING id
        ), batch AS (
            INSERT INTO launch_batches (id, customer_id, cluster_id, region, client_token, request_json, size, state)
            SELECT gen_random_uuid(), :customer_id, :cluster_id, 'us-east-1', 'token-' || id, '{}', 1, 'answered'
            FROM intent RETURNING id
        )
        INSERT INTO launch_attempts (id, customer_id, intent_id, attempt_no, batch_id, slot, instance_type,
            availability_zone, node_type, price_usd_per_hour, state, instance_id, ready_at)
        SELECT gen_random_uuid(), :customer_id, intent.id, 1, batch.id, 0, 'm5.large', 'us-east-1a', 'on-demand',
            0.096, 'ready', :instance, now() FROM intent, batch RETURNING 1""",
        launch=json.dumps(launch),
        cluster_id=keys.cluster_id,
        instance=instance,
    )
    found = await api.ok("GET", "/interruptions/returns-to-spot", keys.analyst_key)
    (waiting,) = found["waiting"]
    assert (waiting["instance_id"], waiting["goes"], found["plans"]) == (instance, False, [])
    checks = {check["name"]: check for check in waiting["checks"]}
    assert checks["nothing_in_flight"]["found"] == "1 interruptions in flight"
    assert not checks["settled"]["ok"]
    stranger = await api.tenant("Elsewhere")
    other = await api.ok("GET", "/interruptions/returns-to-spot", stranger.analyst_key)
    assert other == {"waiting": [], "plans": []}
