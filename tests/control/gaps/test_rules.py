"""How a fill is sent to Dagster and how it ends: pure rules."""

from __future__ import annotations

import pytest

from control.gaps.service import plan, verdict
from control.gateways.dagster import Work, WorkState


@pytest.mark.parametrize(
    ("partitions", "ends"),
    [
        (["2026-11-20|a"], ("2026-11-20|a", "2026-11-20|a")),
        (["2026-11-21|a", "2026-11-20|a"], ("2026-11-20|a", "2026-11-21|a")),
        (["2026-02-28", "2026-03-01"], ("2026-02-28", "2026-03-01")),
        (["2026-11-20|a", "2026-11-22|a"], None),
        (["2026-11-20|a", "2026-11-20|b"], None),
        (["2026-11-20|a", "2026-11-21|b"], None),
    ],
)
def test_consecutive_days_of_one_region_are_one_run(partitions: list[str], ends: tuple[str, str] | None) -> None:
    found = plan(partitions)
    assert found.one_run == (ends is not None)
    assert (found.first, found.last) == (ends or (None, None))


def work(state: WorkState, error: str | None = None) -> Work:
    """What Dagster says."""
    return Work(state, {}, error)


@pytest.mark.parametrize(
    ("remaining", "said", "end"),
    [
        (3, None, None),
        (3, work(WorkState.ACTIVE), None),
        (0, work(WorkState.ACTIVE), None),
        (0, work(WorkState.SUCCEEDED), "succeeded"),
        (0, work(WorkState.FAILED, "check failed"), "succeeded"),
        (0, work(WorkState.UNKNOWN), "succeeded"),
        (1, work(WorkState.SUCCEEDED), "failed"),
        (1, work(WorkState.FAILED, "boom"), "failed"),
        (1, work(WorkState.UNKNOWN), "failed"),
        (1, work(WorkState.CANCELLED), "cancelled"),
    ],
)
def test_a_fill_ends_when_dagster_is_done_and_well_when_nothing_is_missing(
    remaining: int, said: Work | None, end: str | None
) -> None:
    found = verdict(remaining, said)
    assert (found[0] if found else None) == end


def test_the_error_of_a_failed_check_is_kept_even_when_all_is_written() -> None:
    assert verdict(0, work(WorkState.FAILED, "check failed")) == ("succeeded", "check failed")
    assert verdict(2, work(WorkState.FAILED, "boom")) == ("failed", "boom")
