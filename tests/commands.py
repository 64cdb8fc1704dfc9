"""Our processes, started in milliseconds.

Importing what one needs takes more than a second of CPU, and tests start hundreds: a server that has imported
everything forks each of them (`multiprocessing`'s fork server). What is forked runs what the command line runs, with an
environment and outputs of its own, and is killed like any process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

COMMAND_SECONDS = 120
PR_SET_PDEATHSIG = 1

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "control.agent.main",
        "control.cli",
        "control.commands.doctor",
        "control.supervisor.up",
        "control.worker",
        "warehouse.postgres.migrate",
        # Of the lake only what it stands on: its own modules refuse to be used in a fork of their importer.
        "deltalake",
        "duckdb",
        "polars",
        "pyarrow.dataset",
        "pyarrow.parquet",
        "rich.table",
    ]
)


class Forked:
    """A process of ours, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        main: what runs in it; picklable.
        environment: all of its variables.
        stdout: file its output is appended to.
        stderr: the same for errors.
    """

    def __init__(self, main: Callable[[], None], environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
        for file in (stdout, stderr):
            file.touch(mode=0o600)
        arguments = (main, dict(environment), str(stdout), str(stderr))
        # A daemon, so that the end of the test session ends it too.
        self._process = _SERVER.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def cloudoptim(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with no other variables than PATH and the given ones."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        process = Forked(_Command(arguments), {"PATH": os.environ["PATH"], **environment}, output, errors)
        try:
            code = process.wait(COMMAND_SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(arguments), code, output.read_text(), errors.read_text())


class _Command:
    def __init__(self, arguments: tuple[str, ...]) -> None:
        self.arguments = arguments

    def __call__(self) -> None:
        from control.cli import app

        sys.argv = ["cloudoptim", *self.arguments]
        app()


def _run(main: Callable[[], None], environment: dict[str, str], stdout: str, stderr: str) -> None:
    # Killed sessions leave nothing: the server ends with the session, and its children with the server.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    # The fork server ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
