"""Worker processes as the tests hold them: forked from a zygote, and killed like any other process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, TimeoutError
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


class ForkedWorker:
    """What a test does with ``subprocess.Popen``, for a process that is the zygote's child."""

    def __init__(self, pid: int, ended: Future[int]) -> None:
        self.pid, self._ended = pid, ended

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit status, or None while it lives."""
        return self._ended.result() if self._ended.done() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status (negative: the signal); raises subprocess.TimeoutExpired like Popen does."""
        try:
            return self._ended.result(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0) from None

    def send_signal(self, number: int) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


Worker = subprocess.Popen[bytes] | ForkedWorker


class Zygote:
    """Starts with its first fork. ``mutation`` names one of ``mutations.WORKERS``."""

    def __init__(self, mutation: str | None = None) -> None:
        self._mutation = mutation
        self._process: subprocess.Popen[bytes] | None = None
        self._born: queue.SimpleQueue[ForkedWorker] = queue.SimpleQueue()
        self._ended: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def fork(self, environment: dict[str, str], log: Path) -> ForkedWorker:
        """A worker with exactly this environment, writing to ``log``."""
        with self._lock:
            if self._process is None:
                arguments = [self._mutation] if self._mutation else []
                self._process = subprocess.Popen(
                    [sys.executable, "-u", "-m", "tests.control.interruptions.zygote", *arguments],
                    cwd=REPOSITORY,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                self._reader.start()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"environment": environment, "log": str(log)}).encode() + b"\n")
            self._process.stdin.flush()
            return self._born.get(timeout=60)

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "status" in told:
                self._ended.pop(told["pid"]).set_result(told["status"])
            else:
                ended = self._ended[told["pid"]] = Future()
                self._born.put(ForkedWorker(told["pid"], ended))

    def close(self) -> None:
        """End the zygote; what it forked goes with it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join(10)
        self._process.stdout.close()
