"""The main job on the running product: cost that moves, gaps filled two ways, a node saved although the worker dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Any

import boto3
import httpx
import psycopg
import pytest

from tests.control.supervisor.harness import Run, environment, runs_in

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

# A bound so that a broken product fails the test, not a figure anybody promises.
PATIENCE_SECONDS = 300


class Product:
    """A running product, used from outside: REST, Dagster's GraphQL (what its UI sends), AWS, the command line."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.api = httpx.Client(
            base_url=run.addresses["addresses"]["control"] + "/api/v1",
            headers={"Authorization": f"Bearer {run.addresses['admin_api_key']}"},
            timeout=30,
        )
        self.first_cost_usd: float | None = None

    def get(self, path: str, **params: Any) -> Any:
        answer = self.api.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def dagster(self, query: str, variables: dict[str, Any]) -> Any:
        url = self.run.addresses["addresses"]["dagster"] + "/graphql"
        answer = httpx.post(url, json={"query": query, "variables": variables}, timeout=60).json()
        assert "errors" not in answer, answer
        return answer["data"]

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "control.cli", *arguments],
            env=environment(self.run.home),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def lake(self, query: str) -> list[dict[str, Any]]:
        return json.loads(self.command("lake", "sql", query, "--format", "json"))

    def cluster(self, name: str) -> dict[str, Any]:
        return next(c for c in self.get("/clusters")["clusters"] if c["cluster_name"] == name)

    def until(self, what: str, found: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while not (answer := found()):
            assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
            time.sleep(0.2)
        return answer

    def instances_of_batches(self, cluster_name: str) -> list[dict[str, Any]]:
        """Every instance that the product launched for one cluster, whatever its state, as EC2 tells it."""
        customer, cluster = next(
            (customer, cluster)
            for customer in self.run.addresses["sandbox"]["customers"]
            for cluster in customer["clusters"]
            if cluster["cluster_name"] == cluster_name
        )
        where = {"endpoint_url": self.run.addresses["sandbox"]["aws_endpoint"], "region_name": cluster["region"]}
        anybody = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}  # the sandbox's own operator
        keys = boto3.client("sts", **where, **anybody).assume_role(
            RoleArn=customer["role_arn"], ExternalId=customer["external_id"], RoleSessionName="acceptance"
        )["Credentials"]
        ec2 = boto3.client(
            "ec2",
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            aws_session_token=keys["SessionToken"],
            **where,
        )
        pages = ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": "tag:cloudoptim:cluster", "Values": [cluster["cluster_id"]]}]
        )
        return [i for page in pages for reservation in page["Reservations"] for i in reservation["Instances"]]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with runs_in(tmp_path_factory.mktemp("main-job")) as start:
        product = Product(start().until_ready())
        with product.api:
            yield product


def test_agents_metrics_and_prices_reach_the_lake(product: Product) -> None:
    cluster = product.cluster("shop-prod")
    path = f"/clusters/{cluster['id']}/cost"
    product.until("a price for every node", lambda: _all_priced(product.get(path)["now"]))
    first = product.until("an hour of cost in the lake", lambda: product.get(path)["hours"])
    now = product.get(path)["now"]
    assert now["nodes"] > 20
    assert 0 < now["actual_usd_per_hour"] < now["on_demand_usd_per_hour"]

    database = product.run.addresses["addresses"]["postgres"]
    with psycopg.connect(database) as connection:
        posted = connection.execute("SELECT count(*), count(DISTINCT cluster_id) FROM metric_batches").fetchone()
    assert posted is not None
    assert posted[0] >= 3
    assert posted[1] == 3
    assert product.lake("SELECT count(*) AS rows FROM metric_5m")[0]["rows"] > 0
    product.first_cost_usd = _total(first)


def test_one_gap_is_filled_from_dagster_and_one_from_the_api(product: Product) -> None:
    region, today = "eu-west-1", datetime.now(UTC).date()
    product.until("the first prices", lambda: _days(product, region))
    long_ago = today - timedelta(days=9)
    _backfill(product, [long_ago], region)
    missing = product.until("gaps behind the old day", lambda: _gaps(product, region))
    assert today - timedelta(days=8) in missing

    from_dagster, from_api = min(missing), max(missing)
    assert from_dagster != from_api
    _backfill(product, [from_dagster], region)
    assert from_dagster not in _gaps(product, region)

    asked = product.api.post(
        "/admin/gap-filler/fill", json={"table_name": "spot_prices", "partitions": [f"{from_api}|{region}"]}
    )
    assert asked.status_code == 202, asked.text
    fill_id = asked.json()["fill_id"]

    def ended() -> dict[str, Any] | None:
        fill = product.get(f"/admin/gap-filler/{fill_id}")
        return fill if fill["state"] not in ("requested", "running") else None

    fill = product.until("the fill", ended)
    assert fill["state"] == "succeeded", fill
    assert fill["records_filled"] > 0
    assert fill["sources_used"]
    assert fill["gaps_left"] == []
    assert _gaps(product, region) == missing - {from_dagster, from_api}
    assert {long_ago, from_dagster, from_api} <= _days(product, region)


def test_an_interrupted_node_is_saved_although_the_worker_is_killed(product: Product) -> None:
    name = "analytics-prod"
    cluster = product.cluster(name)

    def of_the_cluster() -> list[dict[str, Any]]:
        return product.get("/interruptions", cluster_id=cluster["id"])["interruptions"]

    # The sandbox interrupts at random too.
    earlier = {i["id"] for i in of_the_cluster()}
    before = {i["InstanceId"] for i in product.instances_of_batches(name)}
    product.command("sandbox", "interrupt", "--cluster", name)
    interruption = product.until("the warning's row", lambda: [i for i in of_the_cluster() if i["id"] not in earlier])[
        0
    ]
    os.kill(product.run.addresses["processes"]["worker"]["pid"], signal.SIGKILL)

    def closed() -> dict[str, Any] | None:
        found = product.get(f"/interruptions/{interruption['id']}")
        return found if found["state"] == "closed" else None

    done = product.until("the interruption closing", closed)
    assert done["outcome"] == "handled", done
    steps = {step["step"]: step["at"] for step in done["timeline"]}
    wanted = ("warning", "task_created", "task_in_agents_hands", "cordoned", "replacement_launched")
    assert all(steps[step] for step in (*wanted, "replacement_ready", "drained", "closed")), steps
    assert steps["drained"] < done["deadline_at"]
    assert [entry["version"] for entry in done["history"]] == list(range(1, len(done["history"]) + 1))

    # Every instance launched answers one interruption, none answers two.
    launched = {i["InstanceId"] for i in product.instances_of_batches(name)} - before
    replacements = [i["replacement"]["instance_id"] for i in of_the_cluster() if i["replacement"]]
    assert done["replacement"]["instance_id"] in launched
    assert len(replacements) == len(set(replacements))
    assert launched <= set(replacements), "an instance nobody asked for"

    nodes = product.get(f"/clusters/{cluster['id']}/nodes")["nodes"]
    ready = [n for n in nodes if n["instance_id"] == done["replacement"]["instance_id"]]
    assert [n["status"] for n in ready] == ["ready"]


def test_tonights_schedule_makes_the_days_savings_report(product: Product) -> None:
    today = datetime.now(UTC).date()
    tick_at = datetime.combine(today + timedelta(days=1), time_of_day(0, 40), UTC)
    run_request = _tested_schedule(product, "savings_reports_daily", tick_at)
    assert _launched(product, "close_days", run_request["tags"]) == "SUCCESS"

    customer = product.run.addresses["sandbox"]["customers"][0]
    where = {"customer_id": customer["customer_id"], "day": today}
    statement = product.get("/reports/savings", **where)
    assert statement["baseline_name"]
    assert statement["lake_release_ids"]
    assert {cluster["cluster_name"] for cluster in statement["clusters"]} == {
        cluster["cluster_name"] for cluster in customer["clusters"]
    }
    assert product.get("/reports/savings", **where) == statement


def test_the_cost_moves_on_by_itself(product: Product) -> None:
    assert product.first_cost_usd is not None, "the first test did not get as far as a cost"
    path = f"/clusters/{product.cluster('shop-prod')['id']}/cost"
    first = product.first_cost_usd
    product.until("the lake's cost moving on", lambda: _total(product.get(path)["hours"]) > first, 2 * PATIENCE_SECONDS)


def _all_priced(now: dict[str, Any]) -> bool:
    return now["nodes"] > 0 and now["nodes"] == now["priced_nodes"]


def _total(hours: list[dict[str, Any]]) -> float:
    return sum(hour["actual_usd"] or 0 for hour in hours)


def _gaps(product: Product, region: str) -> set[date]:
    answer = product.get("/admin/gap-filler/gaps", table_name="spot_prices", series=region, state="open")
    return {date.fromisoformat(gap["partition_key"][:10]) for gap in answer["gaps"]}


def _days(product: Product, region: str) -> set[date]:
    rows = product.lake(f"SELECT DISTINCT day FROM spot_prices WHERE region = '{region}'")
    return {date.fromisoformat(str(row["day"])[:10]) for row in rows}


def _backfill(product: Product, days: list[date], region: str) -> None:
    """What Dagster's UI sends when a person picks partitions and presses "Launch backfill", and its end."""
    launched = product.dagster(
        "mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) {"
        " __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }",
        {"p": {"assetSelection": [{"path": ["spot_prices"]}], "partitionNames": [f"{day}|{region}" for day in days]}},
    )["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched

    def status() -> str | None:
        found = product.dagster(
            "query($id: String!) { partitionBackfillOrError(backfillId: $id) {"
            " ... on PartitionBackfill { status runs(limit: 20) { status } } } }",
            {"id": launched["backfillId"]},
        )["partitionBackfillOrError"]
        if found["status"] in ("REQUESTED", "COMPLETING"):
            return None
        return f"{found['status']} {[run['status'] for run in found['runs']]}"

    assert product.until("the backfill", status) == "COMPLETED_SUCCESS ['SUCCESS']"


_REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "cloudoptim"}


def _tested_schedule(product: Product, name: str, moment: datetime) -> dict[str, Any]:
    """The one run that a schedule asks for at a moment: what Dagster's UI calls "Preview tick result"."""
    tick = product.dagster(
        "mutation($s: ScheduleSelector!, $t: Float) { scheduleDryRun(selectorData: $s, timestamp: $t) {"
        " __typename ... on DryRunInstigationTick { evaluationResult {"
        " runRequests { tags { key value } } skipReason error { message } } } ... on PythonError { message } } }",
        {"s": _REPOSITORY | {"scheduleName": name}, "t": moment.timestamp()},
    )["scheduleDryRun"]
    assert tick["__typename"] == "DryRunInstigationTick", tick
    result = tick["evaluationResult"]
    assert result["runRequests"], result
    (run_request,) = result["runRequests"]
    return run_request


def _launched(product: Product, job_name: str, tags: list[dict[str, str]]) -> str:
    """Launch a job with the tags of a run request, as the UI does, and wait for its end; returns the run's status."""
    pairs = [{"key": tag["key"], "value": tag["value"]} for tag in tags]
    launched = product.dagster(
        "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
        " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
        {
            "p": {
                "selector": _REPOSITORY | {"jobName": job_name},
                "runConfigData": {},
                "executionMetadata": {"tags": pairs},
            }
        },
    )["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched

    def status() -> str | None:
        found = product.dagster(
            "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", {"id": launched["run"]["runId"]}
        )["runOrError"]["status"]
        return found if found in ("SUCCESS", "FAILURE", "CANCELED") else None

    return product.until("the run", status)
