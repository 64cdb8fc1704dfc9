"""What a running `cloudoptim up` costs: ``python -m control.supervisor.footprint [--seconds 60]``.

Memory is PSS (shared pages divided among those who share them), CPU is user plus system time over the interval as a
share of one core; both over every process of the home, grandchildren and `up` itself included.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from control.commands.running import read_addresses
from control.settings import Settings
from control.supervisor.sweep import processes_of


@dataclass(frozen=True)
class Cost:
    """Of one named process and its children."""

    pss_bytes: int
    cpu_seconds: float


def measure(home: Path) -> dict[int, tuple[str, Cost]]:
    """Cost of each process of the home by process id."""
    names = {entry["pid"]: name for name, entry in (read_addresses(home) or {"processes": {}})["processes"].items()}
    costs = {}
    for process in [*processes_of(home), *_commands(home)]:
        try:
            with process.oneshot():
                times = process.cpu_times()
                name = names.get(process.pid) or _named_parent(process, names) or process.name()
                memory = process.memory_full_info()
            # Children that have ended count too: a pipeline's run lives for some seconds.
            cpu_seconds = times.user + times.system + times.children_user + times.children_system
            costs[process.pid] = (name, Cost(memory.pss, cpu_seconds))
        except psutil.Error:
            continue
    return costs


def _commands(home: Path) -> list[psutil.Process]:
    """`cloudoptim up` itself, which the lock file names."""
    lock = home / "run" / "up.lock"
    try:
        return [psutil.Process(int(lock.read_text()))]
    except (OSError, ValueError, psutil.Error):
        return []


def _named_parent(process: psutil.Process, names: dict[int, str]) -> str | None:
    return next((names[parent.pid] for parent in process.parents() if parent.pid in names), None)


def main(argv: list[str]) -> int:
    """Print one line per process and the sum."""
    parser = argparse.ArgumentParser(prog="python -m control.supervisor.footprint", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to watch the CPU")
    seconds = parser.parse_args(argv).seconds
    home = Settings().home  # type: ignore[call-arg]
    before = measure(home)
    if not before:
        print(f"nothing runs in {home}; start `cloudoptim up` or set CLOUDOPTIM_HOME", file=sys.stderr)  # noqa: T201
        return 1
    time.sleep(seconds)
    total: dict[str, list[float]] = {}
    for pid, (name, cost) in measure(home).items():
        row = total.setdefault(name, [0.0, 0.0])
        row[0] += cost.pss_bytes
        row[1] += cost.cpu_seconds - (before[pid][1].cpu_seconds if pid in before else 0.0)
    print(f"{'process':<28}{'memory MB':>10}{'CPU %':>8}")  # noqa: T201
    for name, (pss, cpu) in sorted(total.items(), key=lambda item: -item[1][0]):
        print(f"{name:<28}{pss / 1e6:>10.0f}{100 * cpu / seconds:>8.1f}")  # noqa: T201
    memory, cpu = (sum(row[column] for row in total.values()) for column in (0, 1))
    print(f"{'in all':<28}{memory / 1e6:>10.0f}{100 * cpu / seconds:>8.1f}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
