"""Things that must reach the server, kept as files until it has taken them: they survive kill -9 and a full restart.

One file per item, written beside and renamed, so that a file is whole or absent. Names sort in the order of creation.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

DIRECTORY_MODE = 0o700


class Spool:
    """A folder of items, oldest first.

    Args:
        folder: made when missing, readable by the owner only.
        max_age_seconds: older items are dropped, with a count.
        max_bytes: the oldest are dropped above this.
    """

    def __init__(self, folder: Path, *, max_age_seconds: float, max_bytes: int = 256 * 2**20) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=DIRECTORY_MODE)
        self._folder, self._max_age_seconds, self._max_bytes = folder, max_age_seconds, max_bytes
        self._lock = threading.Lock()
        self._last = 0
        for leftover in folder.glob("*.part"):
            leftover.unlink(missing_ok=True)

    def put(self, name: str, content: bytes) -> Path:
        """Keep an item durably; returns its file. Raises OSError, leaving nothing behind, when the disk is full."""
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1000)
            path = self._folder / f"{self._last:020d}-{name}"
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        return path

    def items(self) -> list[Path]:
        """All items, oldest first."""
        return sorted(path for path in self._folder.iterdir() if not path.name.endswith(".part"))

    def read(self, path: Path) -> bytes | None:
        """An item's content, or None when it has gone meanwhile."""
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def done(self, path: Path) -> None:
        """The server has it (or will never take it)."""
        path.unlink(missing_ok=True)

    def trim(self) -> int:
        """Drop what is too old or too much; returns how many."""
        items = self.items()
        sizes = {path: path.stat().st_size for path in items}
        total, dropped = sum(sizes.values()), 0
        oldest = time.time() - self._max_age_seconds
        for path in items:
            if total <= self._max_bytes and created_at(path) >= oldest:
                break
            total -= sizes[path]
            self.done(path)
            dropped += 1
        return dropped


def created_at(path: Path) -> float:
    """When an item was put, in seconds since the epoch."""
    return int(path.name.split("-", 1)[0]) / 1e6


class Sequence:
    """A number that only grows, over restarts as well."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._value = int(file.read_text()) if file.exists() else -1

    def next(self) -> int:
        """The next number; it is on disk before it is returned."""
        self._value += 1
        part = self._file.with_name(self._file.name + ".part")
        with part.open("w") as file:
            file.write(str(self._value))
            file.flush()
            os.fsync(file.fileno())
        part.rename(self._file)
        return self._value
