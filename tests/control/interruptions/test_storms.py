"""Storms with their bars, on the stage of the benchmark: open-loop arrivals, the fast double of SQS, one worker.

    make storm ARGS="-s"

Figures of one run, also those within the bar: python -m tests.benchmarks.bench_storm --help
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.benchmarks import bench_interruptions, bench_storm
from tests.control.interruptions.harness import Stage

pytestmark = [pytest.mark.storm, pytest.mark.timeout(0)]

SINGLES = int(os.environ.get("SINGLES", "200"))


def _said(what: str, figures: dict[str, Any]) -> dict[str, Any]:
    print("\n" + json.dumps({"test": what, "load_average": round(os.getloadavg()[0], 2)} | figures), flush=True)  # noqa: T201
    return figures


async def test_200_singles_one_after_another_over_http(stage: Stage) -> None:
    """From the queue to an agent that polls `cloudoptim control`: issue 3's bar, and with it issue 2's."""
    figures = _said("singles over HTTP", await bench_interruptions.singles(stage, SINGLES))
    print("bars: p50 100 ms and p99 500 ms; of the main job: p50 500 ms and p99 2000 ms")  # noqa: T201
    assert (figures["warnings"], figures["outcomes"]) == (SINGLES, {"handled": SINGLES + 1})
    # Long polls, not a tight loop.
    assert figures["polls"] <= 2 * SINGLES + 20
    assert figures["p50_ms"] <= 100
    assert figures["p99_ms"] <= 500


async def test_200_notices_in_a_minute_for_one_cluster(stage: Stage) -> None:
    figures = _said("storm A", await bench_storm.storm(stage, notices=200, clusters=1, seconds=60, workers=1))
    assert (figures["offered"], figures["outcomes"]) == (200, {"handled": 200})
    assert figures["p99_s"] <= 3
    # One replacement each, and far fewer calls than notices.
    assert figures["replacements"] == 200
    assert figures["run_instances_calls"] <= 60


async def test_1000_notices_in_a_minute_over_50_clusters(stage: Stage) -> None:
    figures = _said("storm B", await bench_storm.storm(stage, notices=1000, clusters=50, seconds=60, workers=1))
    assert (figures["offered"], figures["outcomes"]) == (1000, {"handled": 1000})
    assert figures["p99_s"] <= 10
    assert figures["replacements"] == 1000


async def test_15000_mixed_messages_at_once(stage: Stage) -> None:
    figures = _said("flood", await bench_storm.flood(stage, 15_000, workers=1))
    assert (figures["committed"], figures["interruptions"]) == (15_000, 5_000)
    (before,), (after,) = figures["worker_rss_mib_before_after"]
    assert after - before <= 50
    assert figures["messages_per_second"] >= 1000


async def test_5000_old_messages_after_an_outage(stage: Stage) -> None:
    figures = _said("backlog", await bench_storm.backlog(stage, 5_000, workers=1))
    assert figures["offered"] == figures["still_valid"] == 2_500
    assert figures["offered_that_were_over"] == 0
    # First those that can still be helped: their drains are there before the bulk of the others is seen to.
    assert figures["over"] == 2_500
    assert figures["over_handled_before_the_last_valid_task"] < 0.5 * figures["over"]
    # Well within what is left of their notice (100 s), and at 200 messages a second or more.
    assert figures["last_valid_offered_s"] <= 25


async def test_100000_old_messages_after_an_outage(stage: Stage) -> None:
    """Q-21 at full size: warnings that are long over, and 200 among the last that can still be helped."""
    figures = _said("old backlog", await bench_storm.old_backlog(stage, 100_000, still_valid=200, workers=1))
    assert (figures["committed"], figures["interruptions"]) == (100_000, 200)
    # One that is read within seconds of its end, before an agent saw the node again, is replaced and not drained.
    assert figures["taken_in_within_their_two_minutes"] <= figures["offered"] <= 200
    assert figures["offered_that_were_over"] == 0
    assert figures["messages_per_second"] >= 200
    (before,), (after,) = figures["worker_rss_mib_before_after"]
    assert after - before <= 100
