"""`cloudoptim …` in a process of its own that starts in milliseconds.

Importing what a command needs takes more than a second of CPU, and tests run it a hundred times: a server that has
imported everything forks one process for each command (`multiprocessing`'s fork server).
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

START_SECONDS = 120
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
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


def cloudoptim(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with no other variables than PATH and the given ones."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        environment = {"PATH": os.environ["PATH"], **environment}
        process = _SERVER.Process(target=_command, args=(arguments, environment, str(output), str(errors)))
        process.start()
        process.join(START_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        exit_code = process.exitcode
        process.close()
        assert exit_code is not None
        return subprocess.CompletedProcess(list(arguments), exit_code, output.read_text(), errors.read_text())


def _command(arguments: tuple[str, ...], environment: dict[str, str], output: str, errors: str) -> None:
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["cloudoptim", *arguments]
    from control.cli import app

    app()
