"""Two hundred interruptions in one cluster at once (RELIABILITY.md L-05). `pytest -m storm tests/control/agent`."""

from __future__ import annotations

import time

import pytest

from tests.control.agent.harness import World, eventually


@pytest.mark.storm
@pytest.mark.timeout(600)
def test_two_hundred_drains_in_one_minute_all_end_before_their_deadlines(world: World) -> None:
    instances = {f"n{index}": world.add_node(f"n{index}") for index in range(200)}
    world.deploy("web", 400)
    for index in range(40):
        world.add_node(f"spare-{index}")
    world.start_agent()
    eventually(lambda: world.server.polls)
    tasks, offered = {}, time.monotonic()
    for count, (name, instance) in enumerate(instances.items()):
        # an open-loop load: 200 in 60 s
        time.sleep(max(0.0, offered + count * 0.3 - time.monotonic()))
        tasks[world.server.add("drain_node", 120, node_name=name, instance_id=instance)] = time.monotonic()
    eventually(lambda: all(world.server.final(task) for task in tasks), 130)
    cordoned = {r.task_id: r.at for r in reversed(world.server.reports) if r.result.detail.get("progress")}
    until_cordoned = sorted(cordoned[task] - at for task, at in tasks.items())
    until_done = sorted(world.server.final(task).at - at for task, at in tasks.items())
    print(  # noqa: T201
        f"offered to cordoned p50 {until_cordoned[100]:.2f} s, p99 {until_cordoned[197]:.2f} s; "
        f"to done p50 {until_done[100]:.1f} s, p99 {until_done[197]:.1f} s"
    )
    assert {world.server.final(task).result.status for task in tasks} == {"done"}
    assert until_cordoned[197] < 5
    assert until_done[-1] < 117
