"""A world per test: Kubernetes double with kubelets, task server, agent process on demand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from control.sandbox.kubernetes.kubelet import PodTiming
from tests.control.agent.harness import World


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    running = World(tmp_path / "state", PodTiming(start_seconds=(0.05, 0.2), stop_seconds=(0.05, 0.3)))
    running.start()
    try:
        yield running
    finally:
        running.stop()
    if running.log.exists():
        request.node.add_report_section("call", "agent log", running.log.read_text()[-6000:])
