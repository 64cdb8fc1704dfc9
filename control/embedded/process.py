"""What the embedded servers share: private files, free ports, and a child process that cannot outlive its parent."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

READY_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.02


class EmbeddedServerError(RuntimeError):
    """An embedded server could not be prepared or started; the message is one line with the cause and what to do."""


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def private_text(path: Path, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
    """The text of a file only its owner can read; created from ``make()`` the first time, never changed after."""
    if not path.exists():
        write_private(path, make())
    return path.read_text().strip()


def write_private(path: Path, text: str) -> None:
    """Write a file with mode 0600 in one step: a reader sees the old content or the new, and no wider mode ever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def dies_with_parent(argv: list[str], stop_signal: signal.Signals) -> list[str]:
    """``argv`` wrapped so that the kernel signals it when its parent is gone, killed included (Linux with setpriv)."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or argv[0] == setpriv:
        return argv
    return [setpriv, "--pdeathsig", stop_signal.name.removeprefix("SIG"), *argv]


class ServerProcess:
    """One server run as a child of this process, its output in a log file.

    Args:
        name: how messages call it.
        argv: the command.
        log: file that receives stdout and stderr (appended).
        stop_signal: asks the server to finish what it has and leave.
    """

    def __init__(self, name: str, argv: list[str], *, log: Path, stop_signal: signal.Signals) -> None:
        self.name, self.log, self.stop_signal = name, log, stop_signal
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            # A session of its own: a Ctrl-C in the terminal reaches only the parent, which stops servers in order.
            self._process = subprocess.Popen(
                dies_with_parent(argv, stop_signal),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Not the caller's folder: an unprivileged server may not be allowed to stand in it.
                cwd="/",
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """What the server has written since this start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def wait_ready(self, probe: Callable[[], bool], explain: Callable[[str], str]) -> None:
        """Return as soon as ``probe()`` is true.

        Raises:
            EmbeddedServerError: the process ended or did not answer in time; ``explain`` turns its log into the cause.
        """
        try:
            self._wait_ready(probe, explain)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, probe: Callable[[], bool], explain: Callable[[str], str]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while not probe():
            if not self.running:
                raise EmbeddedServerError(explain(self.output()))
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"{self.name} did not answer within {READY_TIMEOUT_SECONDS:.0f} s; its log is {self.log}"
                )
            time.sleep(POLL_SECONDS)

    def stop(self, timeout_seconds: float = 8.0) -> None:
        """Stop the server, politely first; returns when the process is gone."""
        if self._process.poll() is None:
            self._process.send_signal(self.stop_signal)
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def kill(self) -> None:
        """Kill -9, for tests of what survives it."""
        self._process.kill()
        self._process.wait()
