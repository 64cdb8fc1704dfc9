"""/client/metrics over HTTP against the real database: the bad-input corpus M-01 to M-19 and what is stored."""

from __future__ import annotations

import asyncio
import gzip
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import zstandard
from sqlalchemy import text

from tests.control.api import Api, Tenant, batch, cluster_state, columns, node_state

JSON = {"Content-Type": "application/json"}


def now(**offset: float) -> str:
    return (datetime.now(UTC) + timedelta(**offset)).isoformat()


async def send(api: Api, tenant: Tenant, body: Any, **options: Any):
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    headers = JSON | options.pop("headers", {})
    return await api.call("POST", "/client/metrics", tenant.agent_key, content=body, headers=headers, **options)


async def accepted(api: Api, tenant: Tenant, body: Any, **options: Any) -> dict[str, Any]:
    answer = await send(api, tenant, body, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stored(api: Api, tenant: Tenant) -> list[tuple[str, str, float]]:
    async with api.db.tenant(tenant.customer_id) as conn:
        rows = await conn.execute(
            text(
                "SELECT metric, subject, value FROM metric_samples WHERE cluster_id = :c ORDER BY ts, metric, subject"
            ),
            {"c": tenant.cluster_id},
        )
        return [tuple(row) for row in rows]


def one(value: Any, *, ts: Any = None, metric: str = "node_cpu_usage_cores", subject: str = "node-1") -> dict:
    return columns((metric, subject, ts if ts is not None else now(), value))


async def test_metrics_need_an_agents_key(api, tenant):
    body = json.dumps(batch(tenant.cluster_id))
    assert (await api.call("POST", "/client/metrics", None, content=body, headers=JSON)).status_code == 401
    assert (await api.call("POST", "/client/metrics", tenant.admin_key, content=body, headers=JSON)).status_code == 403


async def test_columns_and_rows_are_stored_exactly(api, tenant):
    at = datetime.now(UTC)
    first = await accepted(
        api,
        tenant,
        batch(
            tenant.cluster_id,
            columns(
                ("node_cpu_usage_cores", "node-1", at.isoformat(), 0.1),
                ("node_memory_usage_bytes", "node-1", at.timestamp(), 1e9),
            ),
        ),
    )
    assert (first["accepted"], first["duplicate"], first["rejected"]) == (2, 0, [])
    rows = [{"metric": "node_pod_count", "subject": "node-1", "ts": at.isoformat(), "value": 7}]
    assert (await accepted(api, tenant, batch(tenant.cluster_id, rows)))["accepted"] == 1
    async with api.db.tenant(tenant.customer_id) as conn:
        found = await conn.execute(
            text("SELECT metric, value, ts FROM metric_samples WHERE cluster_id = :c ORDER BY metric"),
            {"c": tenant.cluster_id},
        )
        found = found.all()
    assert [(row.metric, row.value) for row in found] == [
        ("node_cpu_usage_cores", 0.1),
        ("node_memory_usage_bytes", 1e9),
        ("node_pod_count", 7.0),
    ]
    assert all(abs((row.ts - at).total_seconds()) < 1e-5 for row in found)


BAD_SAMPLES = {
    "M-01 NaN": ("NaN", "finite"),
    "M-01 Infinity": ("Infinity", "finite"),
    "M-01 -Infinity": ("-Infinity", "finite"),
    "M-01 1e400": ("1e400", "finite"),
    "M-02 true": ("true", "number"),
    "M-02 text": ('"12"', "number"),
    "M-02 null": ("null", "number"),
    "M-02 list": ("[]", "number"),
    "M-03 negative": ("-0.5", "negative"),
    "M-04 impossible": ("1e9", "suspect"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
async def test_a_bad_value_is_named_and_its_neighbours_are_kept(api, tenant, name):
    value, reason = BAD_SAMPLES[name]
    at = now()
    samples = columns(
        ("node_cpu_usage_cores", "node-1", at, 1.5),
        ("node_cpu_usage_cores", "node-2", at, "@"),
        ("node_cpu_usage_cores", "node-3", at, 2.5),
    )
    body = json.dumps(batch(tenant.cluster_id, samples)).replace('"@"', value).encode()
    answer = await accepted(api, tenant, body)
    assert answer["accepted"] == 2
    (refused,) = answer["rejected"]
    assert refused["index"] == 1
    assert reason in refused["reason"]
    assert [row[2] for row in await stored(api, tenant)] == [1.5, 2.5]


@pytest.mark.parametrize("value", ["-0.0", "1e-320", "0"])
async def test_odd_but_good_values_are_stored(api, tenant, value):
    body = json.dumps(batch(tenant.cluster_id, one("@"))).replace('"@"', value).encode()
    assert (await accepted(api, tenant, body))["accepted"] == 1


BAD_TIMES = {
    "M-05 milliseconds": (1_700_000_000_000, "milliseconds"),
    "M-06 ten minutes and a second ahead": ({"minutes": 10, "seconds": 1}, "future"),
    "M-06 a year ahead": ({"days": 365}, "future"),
    "M-06 1970": ("1970-01-01T00:00:00Z", "backfill"),
    "M-06 before 1970": (-5.0, "before 1970"),
    "M-06 year 2038": (2**31, "future"),
    "M-06 no zone": ("2026-11-23T03:00:00", "time zone"),
    "M-06 leap second": ("2016-12-31T23:59:60Z", "RFC 3339"),
    "M-06 not a time": ("yesterday", "RFC 3339"),
    "M-06 older than a day": ({"hours": -24, "seconds": -5}, "backfill"),
    "M-06 true": (True, "RFC 3339"),
}


@pytest.mark.parametrize("name", BAD_TIMES)
async def test_a_bad_time_is_refused_with_its_reason(api, tenant, name):
    stamp, reason = BAD_TIMES[name]
    stamp = now(**stamp) if isinstance(stamp, dict) else stamp
    good = now()
    samples = columns(("node_pod_count", "a", stamp, 1), ("node_pod_count", "b", good, 1))
    answer = await accepted(api, tenant, batch(tenant.cluster_id, samples))
    assert (answer["accepted"], len(answer["rejected"])) == (1, 1), answer
    assert reason in answer["rejected"][0]["reason"]


async def test_usage_above_the_nodes_own_capacity_is_suspect(api, tenant):
    state = cluster_state(tenant.cluster_id, [node_state(1)])
    samples = columns(
        ("node_cpu_usage_cores", "node-1", now(), 3.9),
        ("node_cpu_usage_cores", "node-1", now(seconds=-1), 250.0),
        ("node_memory_usage_bytes", "node-1", now(), float(9 << 30)),
    )
    answer = await accepted(api, tenant, batch(tenant.cluster_id, samples, state=state))
    assert [item["index"] for item in answer["rejected"]] == [1, 2]
    later = await accepted(api, tenant, batch(tenant.cluster_id, one(250.0)))
    assert later["rejected_count"] == 1, "the capacity is remembered"


@pytest.mark.parametrize(
    ("metric", "subject", "reason"),
    [
        ("cpu", "n", "unknown metric"),
        ("node_pod_count", "", "empty"),
        ("node_pod_count", "a\x00b", "NUL"),
        ("node_pod_count", "x" * 1025, "1024"),
        ("node_pod_count", "\ud800", "Unicode"),
    ],
)
async def test_bad_names_are_refused(api, tenant, metric, subject, reason):
    answer = await accepted(api, tenant, batch(tenant.cluster_id, one(1, metric=metric, subject=subject)))
    assert reason in answer["rejected"][0]["reason"]


@pytest.mark.parametrize("subject", ["ns/Deployment/‮rtl", "🦀", "'; DROP TABLE nodes; --", "<img onerror=1>", "a\tb"])
async def test_odd_names_are_stored_verbatim(api, tenant, subject):
    assert (await accepted(api, tenant, batch(tenant.cluster_id, one(1, subject=subject))))["accepted"] == 1
    assert (await stored(api, tenant))[0][1] == subject


async def test_the_first_of_repeated_samples_is_kept(api, tenant):
    at = now()
    samples = columns(*(("node_cpu_usage_cores", "node-1", at, value) for value in (1.0, 1.0, 2.0)))
    answer = await accepted(api, tenant, batch(tenant.cluster_id, samples))
    assert (answer["accepted"], answer["duplicate"]) == (1, 2)
    assert [row[2] for row in await stored(api, tenant)] == [1.0]


async def test_the_same_batch_twice_is_counted_once(api, tenant):
    body = json.dumps(batch(tenant.cluster_id, one(1.0))).encode()
    first = await accepted(api, tenant, body)
    again = await asyncio.gather(*(accepted(api, tenant, body) for _ in range(10)))
    assert all(answer == first for answer in again)
    assert len(await stored(api, tenant)) == 1


async def test_fifty_repetitions_at_once_are_one_batch(api, tenant):
    body = json.dumps(batch(tenant.cluster_id, one(1.0))).encode()
    answers = await asyncio.gather(*(accepted(api, tenant, body) for _ in range(50)))
    assert all(answer == answers[0] for answer in answers)
    assert len(await stored(api, tenant)) == 1


async def test_the_same_id_with_another_body_is_refused(api, tenant):
    body = batch(tenant.cluster_id, one(1.0))
    await accepted(api, tenant, body)
    answer = await send(api, tenant, body | {"samples": one(2.0)})
    assert answer.status_code == 422
    assert answer.json()["type"].endswith("batch_id_reused")


async def test_two_clusters_may_use_one_batch_id(api, tenant, other):
    body = batch(tenant.cluster_id, one(1.0))
    await accepted(api, tenant, body)
    assert (await accepted(api, other, body | {"cluster_id": str(other.cluster_id)}))["accepted"] == 1


async def test_order_of_batches_does_not_matter(api, tenant, other):
    bodies = [columns(*(("node_pod_count", f"n{n}", now(seconds=-n), n) for n in range(k, 40, 4))) for k in range(4)]
    for one_tenant, order in ((tenant, (0, 1, 2, 3)), (other, (3, 1, 0, 2))):
        for number in order:
            await accepted(api, one_tenant, batch(one_tenant.cluster_id, bodies[number], seq=number))
    assert sorted(await stored(api, tenant)) == sorted(await stored(api, other))


async def test_late_samples_mark_their_day(api, tenant):
    async def marks() -> set[str]:
        async with api.db.system() as conn:
            rows = await conn.execute(text("SELECT partition_key FROM dirty_partitions WHERE table_name = 'metric_5m'"))
            return set(rows.scalars())

    async with api.db.system() as conn:
        await conn.execute(text("DELETE FROM dirty_partitions"))
    await accepted(api, tenant, batch(tenant.cluster_id, one(1.0)))
    assert await marks() == set()
    late = datetime.now(UTC) - timedelta(hours=20)
    answer = await accepted(api, tenant, batch(tenant.cluster_id, one(1.0, ts=late.isoformat())))
    assert answer["late"] == 1
    assert await marks() == {late.date().isoformat()}


async def test_limits_of_size(api, tenant):
    assert (await accepted(api, tenant, batch(tenant.cluster_id)))["accepted"] == 0
    full = columns(*(("node_pod_count", f"n{number}", now(), 1) for number in range(5000)))
    assert (await accepted(api, tenant, batch(tenant.cluster_id, full)))["accepted"] == 5000
    over = columns(*(("node_pod_count", f"n{number}", now(), 1) for number in range(5001)))
    assert (await send(api, tenant, batch(tenant.cluster_id, over))).status_code == 413
    assert (await send(api, tenant, b" " * (1024 * 1024 + 1))).status_code == 413


async def test_a_body_without_a_length_is_cut_off_at_the_limit(api, tenant):
    async def endless():
        for _ in range(64):
            yield b" " * 65_536

    answer = await api.call("POST", "/client/metrics", tenant.agent_key, content=endless(), headers=JSON)
    assert answer.status_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
async def test_compressed_bodies_are_read_within_limits(api, tenant, encoding):
    squeeze = gzip.compress if encoding == "gzip" else zstandard.ZstdCompressor().compress
    headers = {"Content-Encoding": encoding}
    body = json.dumps(batch(tenant.cluster_id, one(1.0))).encode()
    assert (await accepted(api, tenant, squeeze(body), headers=headers))["accepted"] == 1
    bomb = squeeze(b" " * (30 << 20))
    assert len(bomb) < 1 << 20
    assert (await send(api, tenant, bomb, headers=headers)).status_code == 413
    assert (await send(api, tenant, squeeze(body)[:-8], headers=headers)).status_code == 400
    assert (await send(api, tenant, b"no such thing", headers=headers)).status_code == 400
    assert (await send(api, tenant, body, headers={"Content-Encoding": "br"})).status_code == 415


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"null", 422),
        (b"[]", 422),
        (b"{", 422),
        (b"\xff\xfe{}", 422),
        (b"[" * 200_000, 422),
        (b'{"batch_id": "x"}', 422),
        (b'{"batch_id": 1' + b"0" * 100_000 + b"}", 422),
    ],
)
async def test_bodies_that_are_no_batch(api, tenant, body, status):
    answer = await send(api, tenant, body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"cluster_id": "x"}, 422, "cluster_id"),
        ({"cluster_id": str(uuid4())}, 404, ""),
        ({"surprise": 1}, 422, "surprise"),
        ({"seq": -1}, 422, "seq"),
        ({"sent_at": "2026-01-01T00:00:00"}, 422, "sent_at"),
        ({"schema_version": 2}, 426, "schema_version"),
        ({"schema_version": 0}, 200, ""),
        ({"samples": 5}, 422, "samples"),
        ({"samples": {"metric": []}}, 422, "samples"),
        ({"samples": {"metric": ["a"], "subject": [], "ts": [], "value": []}}, 422, "length"),
        ({"state": {"cluster_id": "x"}}, 422, "state"),
    ],
)
async def test_the_envelope_is_checked(api, tenant, changes, status, word):
    answer = await send(api, tenant, batch(tenant.cluster_id) | changes)
    assert answer.status_code == status, answer.text
    assert word in answer.text


async def test_other_content_types_are_refused(api, tenant):
    body = json.dumps(batch(tenant.cluster_id)).encode()
    assert (await send(api, tenant, body, headers={"Content-Type": "text/plain"})).status_code == 415


async def test_a_wrong_clock_is_told(api, tenant):
    answer = await accepted(api, tenant, batch(tenant.cluster_id, sent_at=now(hours=-1)))
    assert "clock" in answer["warnings"][0]
    assert (await accepted(api, tenant, batch(tenant.cluster_id)))["warnings"] == []


async def test_too_many_series_are_refused_and_known_ones_are_not(api, tenant, monkeypatch):
    monkeypatch.setattr(api.app.state.context.ingest.series, "_limit", 100)
    many = columns(*(("node_pod_count", f"n{number}", now(), 1) for number in range(90)))
    await accepted(api, tenant, batch(tenant.cluster_id, many))
    more = columns(*(("node_pod_count", f"m{number}", now(), 1) for number in range(50)))
    answer = await send(api, tenant, batch(tenant.cluster_id, more))
    assert answer.status_code == 429
    assert answer.json()["type"].endswith("series_limit")
    assert answer.headers["retry-after"] == "3600"
    assert (await send(api, tenant, batch(tenant.cluster_id, many))).status_code == 200


async def nodes(api: Api, tenant: Tenant) -> dict[str, dict[str, Any]]:
    answer = await api.ok("GET", f"/clusters/{tenant.cluster_id}/nodes", params={"ended": True})
    return {node["node_name"]: node for node in answer["nodes"]}


async def push_state(api: Api, tenant: Tenant, at: datetime, *numbers: dict[str, Any]) -> None:
    state = cluster_state(tenant.cluster_id, list(numbers), at)
    await accepted(api, tenant, batch(tenant.cluster_id, state=state))


async def test_the_state_becomes_nodes(api, tenant):
    start = datetime.now(UTC) - timedelta(minutes=5)
    await push_state(api, tenant, start, node_state(1), node_state(2, ready=False), node_state(3, schedulable=False))
    found = await nodes(api, tenant)
    assert {name: node["status"] for name, node in found.items()} == {
        "node-1": "ready",
        "node-2": "pending",
        "node-3": "cordoned",
    }
    assert found["node-1"]["zone_id"] == "use1-az1"
    assert found["node-1"]["ready_at"] is not None
    assert found["node-2"]["ready_at"] is None
    cluster = await api.ok("GET", f"/clusters/{tenant.cluster_id}")
    assert (cluster["node_count"], cluster["status"]) == (3, "active")
    state = await api.ok("GET", f"/clusters/{tenant.cluster_id}/state")
    assert state["state"]["node_count"] == 3
    assert 290 < state["age_seconds"] < 330


async def test_a_node_missing_from_two_states_is_gone_since_it_was_last_seen(api, tenant):
    start = datetime.now(UTC) - timedelta(minutes=5)
    step = timedelta(seconds=30)
    await push_state(api, tenant, start, node_state(1), node_state(2))
    await push_state(api, tenant, start + step, node_state(1))
    assert (await nodes(api, tenant))["node-2"]["terminated_at"] is None, "missing once is no proof"
    await push_state(api, tenant, start + 2 * step, node_state(1))
    gone = (await nodes(api, tenant))["node-2"]
    assert gone["status"] == "terminated"
    assert datetime.fromisoformat(gone["terminated_at"]) == start
    await push_state(api, tenant, start + 3 * step, node_state(1), node_state(2))
    assert (await nodes(api, tenant))["node-2"]["terminated_at"] is None, "seen Ready again: it was not gone"


async def test_an_older_state_changes_nothing(api, tenant):
    start = datetime.now(UTC) - timedelta(minutes=5)
    await push_state(api, tenant, start, node_state(1))
    await push_state(api, tenant, start - timedelta(seconds=30), node_state(1, ready=False), node_state(9))
    assert list(await nodes(api, tenant)) == ["node-1"]


async def test_a_change_of_nodes_is_told_once(api, tenant):
    async def told() -> int:
        async with api.db.tenant(tenant.customer_id) as conn:
            rows = await conn.execute(text("SELECT count(*) FROM outbox WHERE topic = 'cluster.state.changed'"))
            return rows.scalar_one()

    start = datetime.now(UTC) - timedelta(minutes=5)
    for number in range(3):
        await push_state(api, tenant, start + timedelta(seconds=number), node_state(1))
    assert await told() == 1
    await push_state(api, tenant, start + timedelta(seconds=9), node_state(1, schedulable=False))
    assert await told() == 2


async def test_everything_sent_is_stored_exactly_once_over_retries(api, tenant):
    """R-19 in small: 60 batches, each sent one to three times, in any order, at once."""
    bodies = []
    for number in range(60):
        rows = (("node_pod_count", f"n{n}", now(seconds=-number), float(number * 100 + n)) for n in range(20))
        bodies.append(json.dumps(batch(tenant.cluster_id, columns(*rows), seq=number)).encode())
    sends = [body for number, body in enumerate(bodies) for _ in range(1 + number % 3)]
    await asyncio.gather(*(accepted(api, tenant, body) for body in sends[::-1]))
    values = [row[2] for row in await stored(api, tenant)]
    assert len(values) == 1200
    assert sum(values) == sum(number * 100 + n for number in range(60) for n in range(20))
