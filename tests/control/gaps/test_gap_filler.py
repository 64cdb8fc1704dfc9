"""Gaps through the API with the product's own Dagster behind it."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest

from control.errors import Unavailable
from control.gaps import service
from control.gateways.dagster import DagsterError, DagsterGateway, DagsterUnreachable, WorkState
from control.security.principal import Principal, Role
from tests.control.api import ADMIN_KEY, Api, serving, settings_for
from tests.control.gaps.conftest import Stack, day, key, until

# Dagster's processes start within the first test, and each run is a Python start of several seconds.
pytestmark = pytest.mark.timeout(600)

ADMIN = Principal(uuid4(), "user:test", Role.PLATFORM_ADMIN, None)


async def ended(api: Api, fill_id: str, seconds: float = 150) -> dict[str, Any]:
    """The fill's summary, once it has ended."""
    deadline = time.monotonic() + seconds
    while True:
        fill = await api.ok("GET", f"/admin/gap-filler/{fill_id}")
        if fill["state"] not in ("requested", "running"):
            return fill
        assert time.monotonic() < deadline, fill
        await asyncio.sleep(0.5)


def launch(stack: Stack, first: str, last: str) -> str:
    """Materialise partitions from Dagster's own page, without any mark of ours."""
    found = stack.graphql(
        "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) "
        "{ __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
        p={
            "selector": {
                "repositoryName": "__repository__",
                "repositoryLocationName": "cloudoptim",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": ["spot_prices"]}],
            },
            "mode": "default",
            "runConfigData": {},
            "executionMetadata": {
                "tags": [
                    {"key": "dagster/asset_partition_range_start", "value": first},
                    {"key": "dagster/asset_partition_range_end", "value": last},
                ]
            },
        },
    )
    return found["launchRun"]["run"]["runId"]


def finished(stack: Stack, run_id: str) -> bool:
    """Whether a run has succeeded."""
    status = stack.graphql("query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run_id)
    assert status["runOrError"]["status"] not in ("FAILURE", "CANCELED")
    return status["runOrError"]["status"] == "SUCCESS"


@pytest.fixture(scope="module")
def with_gaps(stack: Stack) -> Stack:
    """Prices of two single days, so that the days between them are missing."""
    for offset in (-9, -1):
        stack.materialize(key(offset))
    return stack


async def open_gaps(api: Api, **query: Any) -> list[dict[str, Any]]:
    """Open gaps, oldest first."""
    answer = await api.ok(
        "GET", "/admin/gap-filler/gaps", params={"state": "open", "table_name": "spot_prices", **query}
    )
    assert answer["total"] == len(answer["gaps"])
    return sorted(answer["gaps"], key=lambda gap: gap["gap_start"])


async def test_strangers_and_other_roles_are_refused(filler: Api) -> None:
    assert (await filler.call("GET", "/admin/gap-filler/gaps", key=None)).status_code == 401
    tenant = await filler.tenant()
    for method, path in (("GET", "gaps"), ("POST", "fill"), ("GET", str(uuid4())), ("POST", f"{uuid4()}/cancel")):
        answer = await filler.call(method, f"/admin/gap-filler/{path}", key=tenant.admin_key, json={})
        assert answer.status_code == 403, path


async def test_one_gap_is_filled_from_the_api_and_one_from_dagsters_page(filler: Api, with_gaps: Stack) -> None:
    gaps = await open_gaps(filler)
    assert [gap["partition_key"] for gap in gaps][:7] == [key(offset) for offset in range(-8, -1)]
    assert {(gap["reason"], gap["remedy"][:12], gap["source_error"]) for gap in gaps} == {
        ("api_error", "Fill the gap", None)
    }
    started = time.monotonic()
    fill = await filler.ok("POST", "/admin/gap-filler/fill", json={"gap_ids": [gaps[0]["id"], gaps[1]["id"]]})
    assert fill["state"] == "running"
    assert fill["dagster_run_id"], "two days in a row are one run, not a backfill"
    assert (await open_gaps(filler))[0]["partition_key"] == key(-6), "gaps that are being filled are not open"
    run_id = launch(with_gaps, key(-6), key(-6))
    done = await ended(filler, fill["fill_id"])
    print(f"one range from the API: {time.monotonic() - started:.1f} s from request to summary")  # noqa: T201
    assert (done["state"], done["partitions"], done["partitions_done"]) == ("succeeded", 2, 2)
    assert done["records_filled"] == 48
    assert done["sources_used"] == ["aws_history"]
    assert done["gaps_left"] == []
    assert done["error"] is None
    assert done["finished_at"] is not None
    assert 0 < done["seconds"] < 150
    assert with_gaps.sql("SELECT count(*) FROM outbox WHERE topic = 'gap.filled'") == [(1,)]
    until(lambda: finished(with_gaps, run_id), "the run from Dagster's page")
    assert (await open_gaps(filler))[0]["partition_key"] == key(-5)


@pytest.mark.soak
async def test_scattered_partitions_are_one_backfill_and_a_cancelled_one_is_resumed_with_the_rest(
    filler: Api, with_gaps: Stack
) -> None:
    stopped = await filler.ok(
        "POST", "/admin/gap-filler/fill", json={"table_name": "spot_prices", "partitions": [key(-4), key(-2)]}
    )
    assert stopped["dagster_backfill_id"]
    started = time.monotonic()
    cancelled = await filler.ok("POST", f"/admin/gap-filler/{stopped['fill_id']}/cancel")
    assert cancelled["state"] == "cancelled"
    assert time.monotonic() - started < 10
    assert {gap["partition_key"] for gap in await open_gaps(filler)} >= {key(-4), key(-2)}

    wanted = [key(-5), key(-3)]
    fill = await filler.ok("POST", "/admin/gap-filler/fill", json={"table_name": "spot_prices", "partitions": wanted})
    assert fill["dagster_backfill_id"]
    again = await filler.call(
        "POST", "/admin/gap-filler/fill", json={"table_name": "spot_prices", "partitions": [key(-3)]}
    )
    assert again.status_code == 409
    assert again.json()["fill_id"] == fill["fill_id"]

    # One of the cancelled two comes by other means; it must not be read again.
    await asyncio.to_thread(with_gaps.materialize, key(-4))
    written = with_gaps.sql("SELECT written_at FROM partition_coverage WHERE partition_key = %s", key(-4))
    resumed = await filler.ok("POST", f"/admin/gap-filler/{stopped['fill_id']}/resume")
    assert resumed["dagster_run_id"], "one partition is left: one run"
    done = await ended(filler, stopped["fill_id"])
    assert (done["state"], done["partitions_done"]) == ("succeeded", 2)
    assert with_gaps.sql("SELECT written_at FROM partition_coverage WHERE partition_key = %s", key(-4)) == written
    refused = await filler.call("POST", f"/admin/gap-filler/{stopped['fill_id']}/resume")
    assert refused.status_code == 409

    done = await ended(filler, fill["fill_id"])
    assert (done["state"], done["partitions_done"]) == ("succeeded", 2), done
    assert {gap["partition_key"] for gap in await open_gaps(filler)} <= {key(0)}, "only the running day may lack hours"
    listed = (await filler.ok("GET", "/admin/gap-filler/fills"))["fills"]
    assert {fill["fill_id"], stopped["fill_id"]} <= {row["fill_id"] for row in listed}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"table_name": "spot_prices", "partitions": ["2026-11-20"]}, "they look like 2026-11-20|us-east-1"),
        ({"table_name": "metric_5m", "partitions": ["2026-11-20|us-east-1"]}, "they look like 2026-11-20"),
        ({"table_name": "spot_prices", "partitions": ["2026-02-31|us-east-1"]}, "does not begin with a date"),
        ({"partitions": ["2026-11-20|us-east-1"]}, "table_name"),
        ({}, "gap_ids or partitions"),
        ({"table_name": "node_hours", "partitions": ["2026-11-20"]}, "spot_prices"),
        ({"table_name": "spot_prices", "partitions": ["../etc"]}, "partitions"),
    ],
)
async def test_what_cannot_be_filled_is_refused_with_the_reason(filler: Api, body: dict[str, Any], words: str) -> None:
    answer = await filler.call("POST", "/admin/gap-filler/fill", json=body)
    assert answer.status_code == 422
    assert words in answer.text


async def test_a_partition_dagster_does_not_know_fails_the_fill_with_its_words(filler: Api, stack: Stack) -> None:
    body = {"table_name": "spot_prices", "partitions": ["1999-01-01|us-east-1"]}
    answer = await filler.call("POST", "/admin/gap-filler/fill", json=body)
    if answer.status_code == 202:
        fill = await ended(filler, answer.json()["fill_id"])
    else:
        assert answer.status_code == 422
        found = stack.sql("SELECT id FROM gap_fills WHERE partitions @> '[\"1999-01-01|us-east-1\"]'")
        fill = await filler.ok("GET", f"/admin/gap-filler/{found[0][0]}")
    assert fill["state"] == "failed"
    assert fill["error"]


async def test_unknown_fills_and_gaps_are_not_found(filler: Api) -> None:
    assert (await filler.call("GET", f"/admin/gap-filler/{uuid4()}")).status_code == 404
    assert (await filler.call("POST", f"/admin/gap-filler/{uuid4()}/cancel")).status_code == 404
    answer = await filler.call("POST", "/admin/gap-filler/fill", json={"gap_ids": [str(uuid4())]})
    assert answer.status_code == 404
    assert (await filler.call("GET", "/admin/gap-filler/gaps", params={"model_id": str(uuid4())})).status_code == 404


async def test_a_models_window_replaces_the_lookback(filler: Api, stack: Stack) -> None:
    model = uuid4()
    stack.sql(
        "INSERT INTO ml_models (id, name, version, kind, format, sha256, size, trained_from, trained_until, metadata, "
        "uploaded_by) VALUES (%s, 'm', %s, 'k', 'onnx', 'x', 1, '2026-01-01Z', '2026-01-31Z', '{}', 't')",
        model,
        str(model),
    )
    answer = await filler.ok("GET", "/admin/gap-filler/gaps", params={"model_id": str(model)})
    assert (answer["window_start"][:10], answer["window_end"][:10]) == ("2026-01-01", "2026-01-31")
    assert answer["gaps"] == []


class LosesAnswers(httpx.AsyncHTTPTransport):
    """The network, which loses the answer of the first launch after Dagster has carried it out."""

    lost = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = request.content
        response = await super().handle_async_request(request)
        if b"launchRun" in body and not self.lost:
            self.lost += 1
            await response.aread()
            raise httpx.ReadTimeout("lost")
        return response


async def test_a_launch_whose_answer_was_lost_is_found_again_not_repeated(filler: Api, with_gaps: Stack) -> None:
    dagster = DagsterGateway(with_gaps.dagster_url, transport=LosesAnswers())
    wanted = [key(-7, "eu-west-1")]
    with pytest.raises(Unavailable, match="written down"):
        await service.start_fill(filler.db, dagster, ADMIN, table_name="spot_prices", partitions=wanted, gap_ids=[])
    await dagster.close()
    (fill_id,) = with_gaps.sql("SELECT id FROM gap_fills WHERE state = 'requested'")[0]
    found = await filler.ok("GET", f"/admin/gap-filler/{fill_id}")
    assert found["state"] == "running"
    assert found["dagster_run_id"]
    tagged = with_gaps.graphql(
        "query($f: RunsFilter!) { runsOrError(filter: $f) { ... on Runs { results { runId } } } }",
        f={"tags": [{"key": "cloudoptim/fill_id", "value": str(fill_id)}]},
    )
    assert [run["runId"] for run in tagged["runsOrError"]["results"]] == [found["dagster_run_id"]]
    await filler.ok("POST", f"/admin/gap-filler/{fill_id}/cancel")


async def test_without_dagster_the_request_is_written_down_and_said_so(stack: Stack, redis_url: str) -> None:
    settings = settings_for(stack.database_url, redis_url, CLOUDOPTIM_DAGSTER_URL="http://127.0.0.1:9")
    async with serving(settings) as api:
        body = {"table_name": "spot_prices", "partitions": [key(-8, "eu-west-1")]}
        answer = await api.call("POST", "/admin/gap-filler/fill", json=body)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        (fill_id,) = stack.sql("SELECT id FROM gap_fills WHERE state = 'requested'")[0]
        shown = await api.ok("GET", f"/admin/gap-filler/{fill_id}")
        assert (shown["state"], shown["partitions_done"]) == ("requested", 0)
        assert (await api.ok("POST", f"/admin/gap-filler/{fill_id}/cancel"))["state"] == "cancelled"


async def test_the_gateway_says_what_dagster_says(stack: Stack) -> None:
    dagster = DagsterGateway(stack.dagster_url)
    assert (await dagster.run(str(uuid4()))).state is WorkState.UNKNOWN
    assert (await dagster.backfill("nosuchid")).state is WorkState.UNKNOWN
    with pytest.raises(DagsterError, match="no_such_job"):
        await dagster.launch_range("no_such_job", "a", "b", {})
    with pytest.raises(DagsterError):
        await dagster.launch_backfill("no_such_asset", ["a"], "t", {})
    with pytest.raises(DagsterError):
        await dagster.launch_backfill("spot_prices", ["1999-01-01|mars-1"], "t", {})
    found = await dagster.find("cloudoptim/fill_id", "none")
    assert (found.run_id, found.backfill_id) == (None, None)
    await dagster.close()
    nobody = DagsterGateway("http://127.0.0.1:9")
    with pytest.raises(DagsterUnreachable, match="CLOUDOPTIM_DAGSTER_URL"):
        await nobody.run("x")
    await nobody.close()


async def test_coverage_by_day_counts_what_is_there(filler: Api, with_gaps: Stack) -> None:
    answer = await filler.ok("GET", "/admin/gap-filler/gaps", params={"table_name": "spot_prices", "lookback_days": 30})
    by_day = {row["day"]: row for row in answer["coverage"]}
    assert by_day[day(-9).isoformat()]["present_points"] == 1440
    assert datetime.fromisoformat(answer["window_end"]) > datetime.fromisoformat(answer["window_start"])


async def test_the_admin_key_is_the_only_way_in(filler: Api) -> None:
    assert (await filler.call("GET", "/admin/gap-filler/gaps", key=ADMIN_KEY)).status_code == 200
