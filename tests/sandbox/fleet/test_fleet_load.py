"""The load is a pure function with a daily curve; node objects are what EKS registers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.sandbox.fleet.load import noise, usage
from control.sandbox.fleet.manifests import max_pods, reserved_cpu_cores
from control.sandbox.fleet.plan import CUSTOMERS, Workload

WEDNESDAY = datetime(2026, 6, 10, tzinfo=UTC)
SHOP = Workload("shop", "web", 1, "1", "1Gi", cpu_use=0.5, daily=0.6, peak_hour=18)


def mean_cpu(moment: datetime) -> float:
    return sum(usage(SHOP, f"pod-{i}", 1.0, 2**30, moment)[0] for i in range(200)) / 200


def test_usage_follows_the_hour_of_the_day() -> None:
    peak, trough = mean_cpu(WEDNESDAY + timedelta(hours=18)), mean_cpu(WEDNESDAY + timedelta(hours=6))
    assert peak == pytest.approx(0.5 * 1.6, rel=0.05)
    assert trough == pytest.approx(0.5 * 0.4, rel=0.05)
    assert mean_cpu(WEDNESDAY + timedelta(days=3, hours=18)) == pytest.approx(0.75 * peak, rel=0.05)  # a Saturday


def test_the_same_pod_at_the_same_time_uses_the_same() -> None:
    first = usage(SHOP, "pod", 1.0, 2**30, WEDNESDAY)
    assert usage(SHOP, "pod", 1.0, 2**30, WEDNESDAY) == first
    assert usage(SHOP, "other", 1.0, 2**30, WEDNESDAY) != first


@given(st.text(max_size=40), st.floats(min_value=0, max_value=2e9))
def test_noise_stays_in_its_band(seed: str, moment: float) -> None:
    assert -1 <= noise(seed, moment) <= 1


def test_noise_is_smooth_within_seconds_and_different_after_minutes() -> None:
    levels = [noise("pod", second) for second in range(0, 3600)]
    assert max(abs(a - b) for a, b in pairwise(levels)) < 0.06
    assert max(levels) - min(levels) > 1


@given(st.floats(min_value=0, max_value=30 * 86_400))
def test_memory_never_exceeds_its_limit(seconds: float) -> None:
    greedy = Workload("n", "w", 1, "1", "1Gi", memory_use=0.95, daily=1.0)
    _, used = usage(greedy, "pod", 1.0, 1000.0, WEDNESDAY + timedelta(seconds=seconds))
    assert 0 < used <= 970


def test_reserved_resources_are_those_of_eks() -> None:
    assert reserved_cpu_cores(2) == pytest.approx(0.07)
    assert reserved_cpu_cores(4) == pytest.approx(0.08)
    assert reserved_cpu_cores(8) == pytest.approx(0.09)
    assert (max_pods("m5.large"), max_pods("c5.2xlarge")) == (29, 58)


def test_the_plan_has_two_customers_three_clusters_and_sixty_nodes_of_several_kinds() -> None:
    clusters = [cluster for customer in CUSTOMERS for cluster in customer.clusters]
    groups = [group for cluster in clusters for group in cluster.groups]
    assert (len(CUSTOMERS), len(clusters), sum(group.count for group in groups)) == (2, 3, 60)
    assert 25 <= sum(group.count for group in groups if group.capacity == "spot") <= 35
    assert len({group.instance_type for group in groups}) >= 8
