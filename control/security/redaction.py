"""JSON logs, one object a line, with secrets taken out by name and by shape."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

HIDDEN = "***"
_SECRET_NAMES = re.compile(
    r"(password|passwd|secret|token|authorization|api[_-]?key|agent[_-]?key|cookie|credential|pepper|master[_-]?key|dsn|"
    r"session_token|webhook)",
    re.IGNORECASE,
)
_NOT_SECRET = frozenset({"client_token", "token_type"})
# Each with what any text of its shape has in it, in small letters: looking for that is a hundred times faster, and a
# body of 1 MiB must not hold up others for the tenth of a second that all expressions take together.
_SHAPES = (
    ("co_", re.compile(r"\bco_[0-9a-f]{16}\.[A-Za-z0-9_-]{43}")),
    # From the beginning of its word, which is gone over once: time grows with the text's length alone.
    ("eyj", re.compile(r"(?<![\w-])(?>[\w-]*?\beyJ)[\w-]++\.[\w-]++\.[\w-]*+", re.ASCII)),
    ("://", re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")),
    ("bearer ", re.compile(r"(?i)(?<=bearer )\S+")),
    ("https://hooks.slack.com/", re.compile(r"https://hooks\.slack\.com/\S+")),
    ("akia", re.compile(r"\bAKIA[A-Z0-9]{16}\b")),
    ("asia", re.compile(r"\bASIA[A-Z0-9]{16}\b")),
)


def redact_text(text: str) -> str:
    """The text with everything shaped like a secret hidden."""
    small = text.lower()
    for part, shape in _SHAPES:
        if part in small:
            text = shape.sub(HIDDEN, text)
    return text


def redact(value: Any, name: str = "") -> Any:
    """The value with secrets hidden, at any depth."""
    if name and name not in _NOT_SECRET and _SECRET_NAMES.search(name) and value not in (None, "", True, False):
        return HIDDEN
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return redact_text(str(value))


def redact_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor that hides secrets of one log entry."""
    return {key: redact(value, key) for key, value in event.items()}


def configure_logging(level: str = "INFO") -> None:
    """JSON lines on standard error for our own and for libraries' logs; boto3 never logs requests."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact_event,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("botocore", "boto3", "urllib3", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for server in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(server)
        logger.handlers[:] = []
        logger.propagate = True
    # Our own middleware logs requests, with the route instead of the path and without query strings.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
