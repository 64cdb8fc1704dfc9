"""What the server rejects of a batch or of events that it took: said with names and reasons, and never sent again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import zstandard

log = logging.getLogger("cloudoptim.agent")

# A batch of thousands that is wrong in the same way says so a few times.
MOST_SAID = 5


def say_rejected(answer: dict[str, Any], names: Callable[[], list[str]]) -> None:
    """Log what an answer lists as rejected; `names` tells what was sent, by place. Never raises: what was taken must
    not be sent again because its answer is strange."""
    rejected = answer.get("rejected")
    if not rejected:
        return
    try:
        sent = names()
        for entry in rejected[:MOST_SAID]:
            log.warning("the server rejected %s: %s", sent[entry["index"]], entry["reason"])
        count = int(answer.get("rejected_count", len(rejected)))
        if count > MOST_SAID:
            log.warning("the server rejected %d of %d that were sent", count, len(sent))
    except Exception:
        log.warning("the server rejected something in words not understood: %s", str(rejected)[:500])


def names_of_samples(compressed: bytes) -> list[str]:
    """Metric and subject of each sample of a MetricsData body."""
    samples = json.loads(zstandard.ZstdDecompressor().decompress(compressed))["samples"]
    return [f"{metric} of {subject}" for metric, subject in zip(samples["metric"], samples["subject"], strict=True)]


def names_of_events(body: bytes) -> list[str]:
    """Kind and instance of each event of an AgentEvents body."""
    return [f"{event['event_type']} of {event['instance_id']}" for event in json.loads(body)["events"]]
