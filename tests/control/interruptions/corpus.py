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


SCENARIOS = Path(__file__).resolve().parents[2] / "corpus" / "scenarios"


@dataclass(frozen=True)
class Scenario:
    """Several messages, what the world does between them, and what must have become of it."""

    name: str
    title: str
    nodes: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    expect: dict[str, Any]
    unit: bool = True
    end_to_end: bool = True
    slow: bool = False
    neighbours: bool = True
    why_not_unit: str = ""
    why_not_end_to_end: str = ""


def scenarios() -> list[Scenario]:
    """All scenarios, one file each."""
    return [Scenario(path.stem, **json.loads(path.read_text())) for path in sorted(SCENARIOS.glob("*.json"))]
