"""Pure parts of the collector and the disk spool."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.agent.collector import node_type_of, quantity, requests_of, split, workload_of
from control.agent.spool import Sequence, Spool
from control.sandbox.kubernetes.quantities import parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("250m", 0.25),
        ("1536Mi", 1536 * 2**20),
        ("156340384n", 0.156340384),
        ("16356452Ki", 16356452 * 1024),
        ("2", 2.0),
        ("1e3", 1000.0),
        ("0.5", 0.5),
        ("1G", 1e9),
        (None, 0.0),
        ("", 0.0),
        ("many", 0.0),
    ],
)
def test_quantities_become_base_units(text: str | None, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


@given(st.integers(0, 10**9), st.sampled_from(["", "m", "k", "Ki", "Mi", "Gi", "n", "u", "M", "G"]))
def test_the_agent_and_the_double_read_quantities_alike(number: int, suffix: str) -> None:
    assert quantity(f"{number}{suffix}") == pytest.approx(parse_quantity(f"{number}{suffix}"))


def test_init_containers_count_by_their_maximum_and_sidecars_like_containers() -> None:
    def container(cpu: str, **more: str) -> dict:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {"containers": [container("100m"), container("200m")], "initContainers": [container("250m")]}
    assert requests_of(spec)[0] == pytest.approx(0.3)
    spec["initContainers"] = [container("2"), container("100m", restartPolicy="Always")]
    assert requests_of(spec)[0] == pytest.approx(2.0)


def test_a_pod_belongs_to_its_deployment_through_its_replica_set() -> None:
    def pod(kind: str, name: str, **labels: str) -> dict:
        owner = {"controller": True, "kind": kind, "name": name}
        return {"metadata": {"namespace": "n", "name": "p", "labels": labels, "ownerReferences": [owner]}}

    assert workload_of(pod("ReplicaSet", "web-5d4f", **{"pod-template-hash": "5d4f"})) == "n/Deployment/web"
    assert workload_of(pod("ReplicaSet", "plain")) == "n/ReplicaSet/plain"
    assert workload_of(pod("StatefulSet", "db")) == "n/StatefulSet/db"
    assert workload_of({"metadata": {"namespace": "n", "name": "bare"}}) == "n/Pod/bare"


def test_the_purchase_option_is_read_from_eks_and_karpenter_labels() -> None:
    assert node_type_of({"eks.amazonaws.com/capacityType": "SPOT"}) == "spot"
    assert node_type_of({"karpenter.sh/capacity-type": "spot"}) == "spot"
    assert node_type_of({"eks.amazonaws.com/capacityType": "ON_DEMAND"}) == "on-demand"
    assert node_type_of({}) == "on-demand"


@given(st.integers(0, 40), st.integers(1, 7))
def test_splitting_keeps_every_sample_in_order_within_the_limit(count: int, most: int) -> None:
    samples = {name: [f"{name}{i}" for i in range(count)] for name in ("metric", "subject", "ts", "value")}
    parts = split(samples, most)
    assert parts
    assert all(len(part["metric"]) <= most for part in parts)
    assert {name: [x for part in parts for x in part[name]] for name in samples} == samples


def test_the_spool_keeps_order_and_forgets_what_is_too_old_or_too_much(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", max_age_seconds=3600, max_bytes=250)
    for index in range(4):
        spool.put(f"item-{index}", bytes(100))
    assert [path.name.split("-", 1)[1] for path in spool.items()] == [f"item-{index}" for index in range(4)]
    assert spool.trim() == 2
    assert [path.name.split("-", 1)[1] for path in spool.items()] == ["item-2", "item-3"]
    old = tmp_path / "s" / f"{int((time.time() - 7200) * 1e6):020d}-ancient"
    old.write_bytes(b"x")
    assert spool.trim() == 1
    assert not old.exists()


def test_half_written_items_of_a_killed_process_are_not_items(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    Spool(folder, max_age_seconds=10).put("whole", b"1")
    (folder / "00000000000000000001-torn.part").write_bytes(b"{")
    again = Spool(folder, max_age_seconds=10)
    assert [again.read(path) for path in again.items()] == [b"1"]
    assert not list(folder.glob("*.part"))


def test_the_sequence_grows_over_restarts(tmp_path: Path) -> None:
    file = tmp_path / "sequence"
    assert [Sequence(file).next() for _ in range(3)] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [file]
