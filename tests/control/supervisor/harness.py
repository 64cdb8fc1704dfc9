"""`cloudoptim up` in the background of a test, in a home of its own, on free ports."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from control.embedded.process import dies_with_parent
from control.supervisor.environment import PORTS

START_SECONDS = 180
STOP_SECONDS = 10


def environment(home: Path, **extra: str) -> dict[str, str]:
    """A clean environment with every port free to choose."""
    free = {rule.variables[0]: "0" for rule in PORTS.values()}
    if "CLOUDOPTIM_CONTROL_PORT" in extra:
        del free["CENTRAL_SERVER_PORT"]
    return {"PATH": os.environ["PATH"], "CLOUDOPTIM_HOME": str(home), **free, **extra}


class Run:
    """One `cloudoptim up` in the background, its output in a file."""

    def __init__(self, home: Path, *options: str, **extra: str) -> None:
        self.home = home
        self.output = home.with_name(f"{home.name}-{time.monotonic_ns()}.out")
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                # A killed test session takes its runs along.
                dies_with_parent([sys.executable, "-m", "control.cli", "up", *options], signal.SIGTERM),
                env=environment(home, **extra),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def addresses(self) -> dict:
        return json.loads((self.home / "run" / "addresses.json").read_text())

    def until(self, true: Callable[[], object], seconds: float = START_SECONDS) -> None:
        """Wait for something to become true, with what `up` said as the failure's reason."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def until_ready(self) -> "Run":
        self.until(lambda: "CloudOptim is ready" in self.text or self.process.poll() is not None)
        assert self.process.poll() is None, self.text
        return self

    def stop(self) -> float:
        """SIGTERM; returns the seconds until the command had ended."""
        began = time.monotonic()
        self.process.terminate()
        self.process.wait(30)
        return time.monotonic() - began


@contextmanager
def runs_in(folder: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs in a home below the folder and ends what is left of them."""
    runs: list[Run] = []

    def start(*options: str, home: Path = folder / "home", **extra: str) -> Run:
        runs.append(Run(home, *options, **extra))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.stop()
