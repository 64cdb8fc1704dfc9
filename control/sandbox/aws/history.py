"""A line for every call: when, who, what, with which outcome. Checkers read it; no secret is in it."""

import io
import itertools
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

_REDACTED = frozenset({"UserData", "SecretAccessKey", "SessionToken", "ExternalId", "Password", "PrivateKey"})
_LONGEST_TEXT = 2_000
_LARGEST_FILE_BYTES = 64 * 1024 * 1024


def redacted(value: Any) -> Any:
    """Parameters as the history may keep them: secrets replaced, long texts cut."""
    if isinstance(value, dict):
        return {k: "(redacted)" if k in _REDACTED else redacted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [redacted(v) for v in value]
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return value[:_LONGEST_TEXT] + "…"
    return value


class History:
    """The newest `limit` entries in memory, all of them in a JSONL file (the one before it is kept at 64 MiB)."""

    def __init__(self, path: Path | None, limit: int) -> None:
        self._lines: deque[bytes] = deque(maxlen=limit)
        self._path = path
        self._file: io.BufferedWriter | None = None
        self._seq = itertools.count(1)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = path.open("ab")

    def add(self, **entry: Any) -> None:
        entry = {"seq": next(self._seq), "at": datetime.now(UTC).isoformat(), **entry}
        line = msgspec.json.encode(entry)
        self._lines.append(line)
        if self._file is not None and self._path is not None:
            self._file.write(line + b"\n")
            self._file.flush()
            if self._file.tell() > _LARGEST_FILE_BYTES:
                self._file.close()
                self._path.replace(self._path.with_suffix(".1.jsonl"))
                self._file = self._path.open("ab")

    def entries(self, *, action: str | None = None, since_seq: int = 0) -> Iterator[dict[str, Any]]:
        """Oldest first."""
        for line in list(self._lines):
            entry = msgspec.json.decode(line)
            if entry["seq"] > since_seq and (action is None or entry["action"] == action):
                yield entry

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
