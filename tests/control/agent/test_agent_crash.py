"""kill -9 of the agent at random moments: every task ends once, nothing stays half done, no batch is lost.

`pytest -m crash tests/control/agent/test_agent_crash.py`; CLOUDOPTIM_TEST_KILLS sets the number of kills (default 40).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest

from tests.control.agent.harness import World, eventually

KILLS = int(os.environ.get("CLOUDOPTIM_TEST_KILLS", "40"))


@pytest.mark.crash
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_every_task_ends_exactly_once(world: World, seed: int) -> None:
    chance = random.Random(seed)
    instances = {f"n{index}": world.add_node(f"n{index}") for index in range(20)}
    for index in range(4):
        world.add_node(f"spare-{index}")
    world.deploy("web", 40)
    tasks = {}
    for name, instance in instances.items():
        tasks[world.server.add("drain_node", None, node_name=name, instance_id=instance)] = name
    for kill in range(KILLS):
        if kill % 8 == 7:
            world.server.lose_reports = chance.randint(1, 3)
        world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.3")
        time.sleep(chance.uniform(0.9, 2.2))  # the agent needs about 0.8 s to its first poll
        world.kill_agent()
    world.start_agent(CLOUDOPTIM_AGENT_METRICS_SECONDS="0.3")
    eventually(lambda: all(world.server.final(task) for task in tasks), 120, "an end of every task")
    applied = Counter(r.task_id for r in world.server.reports if r.applied and r.result.status != "running")
    assert set(applied) == set(tasks)
    assert set(applied.values()) == {1}
    assert {world.server.tasks[task].state for task in tasks} == {"done"}
    for name in instances:
        assert world.core.read_node(name).spec.unschedulable
        assert world.pods("web", node=name) == []
    eventually(lambda: len(world.pods("web", running=True)) == 40)
    sequence = [batch.seq for batch in world.server.batches]
    assert len(sequence) == len(set(sequence))
    missing = set(range(max(sequence) + 1)) - set(sequence)
    # A kill between taking a number and writing its batch leaves a hole: at most one a kill, and never a repetition.
    assert len(missing) <= KILLS
