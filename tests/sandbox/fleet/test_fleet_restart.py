"""What survives: a stop, a kill -9 and a restart on the same home; and interruptions drawn from the market."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.sandbox.fleet.harness import RunningSandbox, eventually, instance_of
from tests.sandbox.market.test_replay import record


def picture(sandbox: RunningSandbox) -> dict[str, dict[str, tuple[str, str]]]:
    """Per cluster: node name to uid and instance, pod name to uid and node."""
    seen = {}
    for cluster in ("shop-prod", "shop-staging", "analytics-prod"):
        core = sandbox.core(cluster)
        nodes = {n.metadata.name: (n.metadata.uid, instance_of(n)) for n in core.list_node().items}
        pods = {
            f"{p.metadata.namespace}/{p.metadata.name}": (p.metadata.uid, p.spec.node_name)
            for p in core.list_pod_for_all_namespaces().items
        }
        seen[cluster] = nodes | pods
    return seen


def all_pods_run(sandbox: RunningSandbox) -> bool:
    return all(
        pod.status.phase == "Running"
        for cluster in ("shop-prod", "shop-staging", "analytics-prod")
        for pod in sandbox.core(cluster).list_pod_for_all_namespaces().items
    )


def prices_of(sandbox: RunningSandbox) -> list[tuple[datetime, str]]:
    """All Spot prices of an instance type, newest first."""
    answer = sandbox.aws("ec2", "shop-prod").describe_spot_price_history(InstanceTypes=["m5.large"])
    return [(row["Timestamp"], row["SpotPrice"]) for row in answer["SpotPriceHistory"]]


def test_a_restart_resumes_with_the_same_nodes_pods_and_ids_and_the_replay_where_it_was(
    make_sandbox: Callable[..., RunningSandbox], tmp_path: Path
) -> None:
    sandbox = make_sandbox(
        CLOUDOPTIM_SANDBOX_REPLAY_PRICES=str(record(tmp_path / "prices")),
        CLOUDOPTIM_SANDBOX_REPLAY_FROM="2023-04-01",
        CLOUDOPTIM_SANDBOX_REPLAY_SPEED="20000",
    ).start()
    began = datetime.now(UTC)
    eventually(lambda: all_pods_run(sandbox))
    before, addresses = picture(sandbox), sandbox.addresses
    seen = eventually(lambda: [row for row in prices_of(sandbox) if row[1] == "0.035300"])
    sandbox.stop()
    assert not (sandbox.home / "sandbox" / "addresses.json").exists()
    stopped = datetime.now(UTC)
    sandbox.start()
    assert picture(sandbox) == before
    # 2023-04-02 00:58 is 4.5 s after --from at this speed, the end of the recording at 04-03 20:58 is 12.4 s after it
    prices = eventually(lambda: [row for row in prices_of(sandbox) if "the recording ended" in sandbox.log.read_text()])
    assert [row for row in prices if row[1] == "0.035300" and row[0] < stopped][-len(seen) :] == seen, "the past stays"
    assert prices[0][1] == "0.035400"
    assert began - timedelta(seconds=30) < seen[-1][0] < prices[0][0] <= datetime.now(UTC)
    for old, new in zip(addresses["customers"], sandbox.addresses["customers"], strict=True):
        same = ("customer_id", "account_id", "external_id", "role_arn")
        assert {key: old[key] for key in same} == {key: new[key] for key in same}
        assert [c["agent_key"] for c in old["clusters"]] == [c["agent_key"] for c in new["clusters"]]
        assert [c["k8s_endpoint"] for c in old["clusters"]] == [c["k8s_endpoint"] for c in new["clusters"]]
    sandbox.stop()


@pytest.mark.crash
def test_kill_9_during_an_interruption_ends_where_it_would_have_ended(
    make_sandbox: Callable[..., RunningSandbox],
) -> None:
    sandbox = make_sandbox().start()
    eventually(lambda: all_pods_run(sandbox))
    told = sandbox.control("POST", "/_sandbox/fleet/interrupt", {"cluster": "shop-prod", "notice_seconds": 2}).json()
    victim = told["interrupted"][0]["instance_id"]
    sandbox.kill()
    sandbox.start()
    eventually(lambda: victim not in sandbox.running_instances("shop-prod"))
    nodes = lambda: {instance_of(n) for n in sandbox.core("shop-prod").list_node().items}  # noqa: E731
    eventually(lambda: victim not in nodes(), 40)
    assert nodes() == set(sandbox.running_instances("shop-prod"))
    eventually(lambda: all_pods_run(sandbox), 40)
    sandbox.stop()


@pytest.mark.soak
def test_interruptions_are_drawn_and_some_are_announced_by_a_recommendation(
    make_sandbox: Callable[..., RunningSandbox],
) -> None:
    sandbox = make_sandbox(CLOUDOPTIM_SANDBOX_INTERRUPTION_SCALE="3e6", CLOUDOPTIM_SANDBOX_SPEED="60")
    sandbox.start()
    kinds: list[str] = []

    def both() -> bool:
        for cluster in ("shop-prod", "analytics-prod"):
            kinds.extend(message["detail-type"] for message in sandbox.messages(cluster))
        return {"EC2 Spot Instance Interruption Warning", "EC2 Instance Rebalance Recommendation"} <= set(kinds)

    eventually(both, 60)
    sandbox.stop()


def test_what_keeps_it_from_starting_is_said_in_one_line(make_sandbox: Callable[..., RunningSandbox]) -> None:
    for environment, words in (
        ({"CLOUDOPTIM_SANDBOX_SPEED": "fast"}, "CLOUDOPTIM_SANDBOX_SPEED"),
        ({"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}, "check DATABASE_URL"),
    ):
        sandbox = make_sandbox(**environment)
        with pytest.raises(AssertionError, match="the sandbox ended"):
            sandbox.start()
        lines = sandbox.log.read_text().strip().splitlines()
        assert words in lines[-1]
        assert not any("Traceback" in line for line in lines)
        sandbox.log.unlink()
