"""Dagster's GraphQL: launch a range run or a backfill, ask how it stands, stop it.

The schema is not formally versioned, so everything of it that we use is in this file, and a contract test runs it
against a real webserver. Two ways in, both measured: one run over a range of partitions is visible in about ten
seconds; a backfill takes any set of partitions but waits for the daemon's poll of thirty seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx

TIMEOUT_SECONDS = 10.0
REPOSITORY = "__repository__"
LOCATION = "cloudoptim"
RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
# More runs of one backfill than this are not looked at one by one; their partitions are counted by Dagster.
RUNS_SHOWN = 100


class DagsterError(Exception):
    """Dagster refused; the message is its own."""


class DagsterUnreachable(DagsterError):
    """Dagster did not answer, or not with GraphQL. Whether a launch happened is not known: look for its tag."""


class WorkState(StrEnum):
    """How a run or a backfill stands, in our words."""

    ACTIVE = "active"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Work:
    """A run or a backfill. ``runs`` maps run ids to Dagster's own status; ``error`` is what it says went wrong."""

    state: WorkState
    runs: Mapping[str, str]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Launched:
    """What Dagster already has for a tag: a run, a backfill, or neither."""

    run_id: str | None
    backfill_id: str | None


_RUN_STATES = {
    "SUCCESS": WorkState.SUCCEEDED,
    "FAILURE": WorkState.FAILED,
    "CANCELED": WorkState.CANCELLED,
}
_BACKFILL_STATES = {
    "COMPLETED_SUCCESS": WorkState.SUCCEEDED,
    "COMPLETED": WorkState.SUCCEEDED,
    "COMPLETED_FAILED": WorkState.FAILED,
    "FAILED": WorkState.FAILED,
    "CANCELED": WorkState.CANCELLED,
}

_LAUNCH_RUN = """
mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on PythonError { message }
  ... on PipelineNotFoundError { message }
  ... on InvalidSubsetError { message }
  ... on UnauthorizedError { message }
  ... on RunConfigValidationInvalid { errors { message } }
} }
"""
_LAUNCH_BACKFILL = """
mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename
  ... on LaunchBackfillSuccess { backfillId }
  ... on PythonError { message }
  ... on PartitionKeysNotFoundError { message }
  ... on PartitionSetNotFoundError { message }
  ... on InvalidSubsetError { message }
  ... on UnauthorizedError { message }
} }
"""
_RUN = """
query($id: ID!) { runOrError(runId: $id) {
  __typename ... on Run { status } ... on RunNotFoundError { message } ... on PythonError { message }
} }
"""
_RUN_ERROR = """
query($id: ID!) { logsForRun(runId: $id, limit: 1000) { ... on EventConnection { events {
  __typename
  ... on ExecutionStepFailureEvent { stepKey error { message } }
  ... on RunFailureEvent { error { message } message }
} } } }
"""
_BACKFILL = """
query($id: String!, $runs: Int!) { partitionBackfillOrError(backfillId: $id) {
  __typename
  ... on PartitionBackfill { status error { message } runs(limit: $runs) { runId status } }
  ... on BackfillNotFoundError { message }
  ... on PythonError { message }
} }
"""
_TAGGED = """
query($filter: RunsFilter!) { runsOrError(filter: $filter, limit: 1) {
  __typename ... on Runs { results { runId tags { key value } } }
} }
"""
_TAGGED_BACKFILLS = """
query { partitionBackfillsOrError(limit: 50) {
  __typename ... on PartitionBackfills { results { id tags { key value } } }
} }
"""
_CANCEL_RUN = """
mutation($id: String!) { terminateRun(runId: $id) {
  __typename ... on TerminateRunFailure { message } ... on PythonError { message } ... on RunNotFoundError { message }
} }
"""
_CANCEL_BACKFILL = """
mutation($id: String!) { cancelPartitionBackfill(backfillId: $id) {
  __typename ... on PythonError { message } ... on UnauthorizedError { message }
} }
"""


class DagsterGateway:
    """Calls to one Dagster webserver.

    Args:
        url: its address, e.g. ``http://127.0.0.1:3000``.
        location: name of the code location in ``workspace.yaml``.
        transport: replaces the network, e.g. an in-process webserver.
    """

    def __init__(
        self, url: str, *, location: str = LOCATION, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.url, self.location = url.rstrip("/"), location
        self._http = httpx.AsyncClient(timeout=TIMEOUT_SECONDS, transport=transport, follow_redirects=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def launch_range(self, job: str, first: str, last: str, tags: Mapping[str, str]) -> str:
        """One run of a job over the partitions from ``first`` to ``last``; returns its id.

        Raises:
            DagsterError: refused, e.g. an unknown partition; ``DagsterUnreachable``: no answer.
        """
        answer = await self._ask(
            _LAUNCH_RUN,
            {
                "params": {
                    "selector": {
                        "repositoryName": REPOSITORY,
                        "repositoryLocationName": self.location,
                        "pipelineName": job,
                    },
                    "mode": "default",
                    "runConfigData": {},
                    "executionMetadata": {"tags": _tags({RANGE_START: first, RANGE_END: last, **tags})},
                }
            },
        )
        return self._expect(answer["launchRun"], "LaunchRunSuccess")["run"]["runId"]

    async def launch_backfill(self, asset: str, partitions: Sequence[str], title: str, tags: Mapping[str, str]) -> str:
        """A backfill of one asset over any partitions; returns its id.

        Raises:
            DagsterError: refused, e.g. an unknown partition; ``DagsterUnreachable``: no answer.
        """
        answer = await self._ask(
            _LAUNCH_BACKFILL,
            {
                "params": {
                    "assetSelection": [{"path": [asset]}],
                    "partitionNames": list(partitions),
                    "title": title,
                    "tags": _tags(tags),
                }
            },
        )
        return self._expect(answer["launchPartitionBackfill"], "LaunchBackfillSuccess")["backfillId"]

    async def run(self, run_id: str) -> Work:
        """How a run stands; UNKNOWN when Dagster does not know it (its storage was reset)."""
        found = (await self._ask(_RUN, {"id": run_id}))["runOrError"]
        if found["__typename"] == "RunNotFoundError":
            return Work(WorkState.UNKNOWN, {}, found["message"])
        status = self._expect(found, "Run")["status"]
        state = _RUN_STATES.get(status, WorkState.ACTIVE)
        error = await self._run_error(run_id) if state is WorkState.FAILED else None
        return Work(state, {run_id: status}, error)

    async def backfill(self, backfill_id: str) -> Work:
        """How a backfill stands. One whose runs failed is failed, whatever Dagster calls it.

        A backfill whose only run failed on a blocking check still ends COMPLETED_SUCCESS, since its partitions did
        materialise: the runs are looked at too.
        """
        found = (await self._ask(_BACKFILL, {"id": backfill_id, "runs": RUNS_SHOWN}))["partitionBackfillOrError"]
        if found["__typename"] == "BackfillNotFoundError":
            return Work(WorkState.UNKNOWN, {}, found["message"])
        backfill = self._expect(found, "PartitionBackfill")
        runs = {run["runId"]: run["status"] for run in backfill["runs"]}
        state = _BACKFILL_STATES.get(backfill["status"], WorkState.ACTIVE)
        failed = [run_id for run_id, status in runs.items() if status == "FAILURE"]
        if state is WorkState.SUCCEEDED and failed:
            state = WorkState.FAILED
        error = (backfill.get("error") or {}).get("message")
        if state is WorkState.FAILED and not error and failed:
            error = await self._run_error(failed[0])
        return Work(state, runs, error)

    async def find(self, key: str, value: str) -> Launched:
        """The newest run and backfill with a tag: whether a launch whose answer was lost happened."""
        backfills = (await self._ask(_TAGGED_BACKFILLS, {}))["partitionBackfillsOrError"].get("results", [])
        for backfill in backfills:
            if {"key": key, "value": value} in backfill["tags"]:
                return Launched(None, backfill["id"])
        runs = (await self._ask(_TAGGED, {"filter": {"tags": [{"key": key, "value": value}]}}))["runsOrError"]
        results = runs.get("results", [])
        return Launched(results[0]["runId"] if results else None, None)

    async def cancel_run(self, run_id: str) -> None:
        """Ask Dagster to end a run; one that ended already is fine."""
        found = (await self._ask(_CANCEL_RUN, {"id": run_id}))["terminateRun"]
        if found["__typename"] in ("PythonError", "UnauthorizedError"):
            raise DagsterError(found.get("message", found["__typename"]))

    async def cancel_backfill(self, backfill_id: str) -> None:
        """Ask Dagster to end a backfill and its runs; one that ended already is fine."""
        found = (await self._ask(_CANCEL_BACKFILL, {"id": backfill_id}))["cancelPartitionBackfill"]
        if found["__typename"] == "UnauthorizedError":
            raise DagsterError(found.get("message", found["__typename"]))

    async def _run_error(self, run_id: str) -> str | None:
        events = (await self._ask(_RUN_ERROR, {"id": run_id}))["logsForRun"].get("events", [])
        errors = [event["error"]["message"] for event in events if event.get("error")]
        return errors[-1].strip()[:2000] if errors else None

    async def _ask(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = await self._http.post(f"{self.url}/graphql", json={"query": query, "variables": variables})
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise DagsterUnreachable(
                f"Dagster at {self.url} does not answer ({type(error).__name__}); is it running? It is looked for at "
                "CLOUDOPTIM_DAGSTER_URL"
            ) from error
        if answer.get("errors"):
            raise DagsterError("; ".join(str(error.get("message")) for error in answer["errors"]))
        return answer["data"]

    def _expect(self, found: dict[str, Any], typename: str) -> dict[str, Any]:
        if found["__typename"] == typename:
            return found
        message = found.get("message") or "; ".join(item["message"] for item in found.get("errors", []))
        raise DagsterError(f"{found['__typename']}: {message}" if message else found["__typename"])


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]
