"""The corpus of messages a queue may bring: one file a case under tests/corpus/sqs, with what must become of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from control.interruptions.parsing import QueueOwner

FOLDER = Path(__file__).resolve().parents[2] / "corpus" / "sqs"
OWNER = QueueOwner("123456789012", frozenset({"us-east-1"}))
INSTANCE = "i-0b662ef9931388ba0"
RECEIVED_AT = datetime(2026, 1, 2, 3, 4, 10, tzinfo=UTC)
SENT_AT = datetime(2026, 1, 2, 3, 4, 9, tzinfo=UTC)


@dataclass(frozen=True)
class Case:
    """One message and what is expected of it."""

    name: str
    body: bytes
    expect: dict[str, Any]


def cases() -> list[Case]:
    """All cases; very large bodies are made here instead of being kept in files."""
    expected = json.loads((FOLDER / "expect.json").read_text())
    files = {path.name for path in FOLDER.iterdir()} - {"expect.json"}
    made = {name for name, expect in expected.items() if "generate" in expect}
    assert files == set(expected) - made, "every file has an expectation, and every expectation a file"
    return [Case(name, _body(name, expect), expect) for name, expect in expected.items()]


def _body(name: str, expect: dict[str, Any]) -> bytes:
    if recipe := expect.get("generate"):
        return (recipe["before"] + recipe["repeat"] * recipe["times"] + recipe["after"]).encode()
    return (FOLDER / name).read_bytes()
