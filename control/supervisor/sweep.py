"""Find and end processes of one home: what a killed `cloudoptim up` left behind, and grandchildren such as runs."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from control.supervisor.environment import HOME_MARK

SERVER_EXECUTABLES = {"postgres", "redis-server"}


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process marked with this home and every server standing in it, without this one and its ancestors.

    Postgres and Redis write their titles over their environment, so they are known by their executable and data folder.
    """
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in mine:
            continue
        try:
            if process.environ().get(HOME_MARK) == str(home) or _is_server_in(home, process):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _is_server_in(home: Path, process: psutil.Process) -> bool:
    # A person's shell or editor may stand there too.
    if Path(process.exe()).name not in SERVER_EXECUTABLES:
        return False
    folder = Path(process.cwd())
    return any(folder.is_relative_to(home / name) for name in ("postgres", "redis"))


def end_all(home: Path, *, grace_seconds: float) -> list[str]:
    """End every process of the home, politely, then by force; returns the names of those that were there."""
    processes = processes_of(home)
    names = []
    for process in processes:
        try:
            names.append(process.name())
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=grace_seconds)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=2)
    return names
