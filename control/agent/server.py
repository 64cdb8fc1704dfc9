"""The central server as the agent uses it."""

from __future__ import annotations

import email.utils
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import httpx

from control.agent.config import AGENT_VERSION, AgentConfig

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# A missing server is asked again this often at most: an interruption has 120 s, so waiting longer would waste it.
BACKOFF_FIRST_SECONDS = 0.5
BACKOFF_MOST_SECONDS = 5.0
RETRY_AFTER_MOST_SECONDS = 60.0
# The server's clock decides deadlines; smaller differences are noise of whole-second Date headers.
CLOCK_TOLERANCE = timedelta(seconds=2)
# These say something about the server or the sender; any other failure may be the fault of the one thing sent.
NOTHING_GETS_THROUGH = (401, 429, 503)


class Unavailable(Exception):
    """No usable answer: try again after `retry_after_seconds` (None: the usual back-off).

    `status` is 0 when nobody answered; `nothing_gets_through` tells whether to try other items before that.
    """

    def __init__(self, reason: str, retry_after_seconds: float | None = None, *, status: int = 0) -> None:
        super().__init__(reason)
        self.retry_after_seconds, self.status = retry_after_seconds, status

    @property
    def nothing_gets_through(self) -> bool:
        """Whether the next item would fare the same."""
        return self.status == 0 or self.status in NOTHING_GETS_THROUGH


class Rejected(Exception):
    """The server will never take this: do not send it again."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status


@dataclass
class Backoff:
    """Jittered exponential pauses; `reset` after a success."""

    failures: int = 0

    def reset(self) -> None:
        """The next failure waits briefly again."""
        self.failures = 0

    def pause(self, asked_seconds: float | None = None) -> float:
        """Seconds to wait after one more failure; a wish of the server is followed up to a minute."""
        self.failures += 1
        if asked_seconds is not None:
            return min(asked_seconds, RETRY_AFTER_MOST_SECONDS) * random.uniform(1.0, 1.2)
        most = min(BACKOFF_MOST_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(self.failures - 1, 10))
        return random.uniform(most / 2, most)


@dataclass(frozen=True, slots=True)
class Pause:
    """How long to wait after a round of `send_each`; `for_all`: new items have to wait as well."""

    seconds: float
    for_all: bool


def send_each(items: Iterable[Item], send: Callable[[Item], None], backoff: Backoff, what: str) -> Pause | None:
    """Send every item once; None when all went.

    An item that fails by itself does not keep the next ones. `send` raises Unavailable for what is to be tried again.
    """
    failed, asked_seconds = False, None
    for item in items:
        try:
            send(item)
        except Unavailable as error:
            failed, asked_seconds = True, error.retry_after_seconds
            log.warning("%s waits: %s", what, error)
            if error.nothing_gets_through:
                return Pause(backoff.pause(asked_seconds), for_all=True)
        except Exception:  # one broken item must not end the thread that sends the others
            failed = True
            log.exception("%s waits: the agent failed", what)
    if failed:
        return Pause(backoff.pause(asked_seconds), for_all=False)
    backoff.reset()
    return None


class Server:
    """Requests of one agent; safe to use from several threads."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._http = httpx.Client(
            base_url=f"{config.server_url}/api/v1",
            headers={
                "Authorization": f"Bearer {config.api_key}",
                "User-Agent": f"cloudoptim-agent/{AGENT_VERSION}",
            },
            timeout=httpx.Timeout(30.0, connect=5.0),
            limits=httpx.Limits(max_connections=10, max_keepalive_connections=6),
        )
        self._clock_offset = timedelta(0)

    def now(self) -> datetime:
        """The server's time as far as its answers told it."""
        return datetime.now(UTC) + self._clock_offset

    def poll(self, understands: Sequence[str], limit: int) -> list[dict[str, Any]]:
        """Tasks for this cluster, waiting at the server until there is one or the wait is over."""
        wait = self._config.poll_wait_seconds
        response = self._send(
            "GET",
            "/client/tasks",
            params={
                "cluster_id": str(self._config.cluster_id),
                "wait": wait,
                "limit": limit,
                "understands": ",".join(understands),
            },
            timeout=httpx.Timeout(wait + 15.0, connect=5.0),
        )
        tasks = _object(response).get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise Unavailable("the server's answer holds no list of tasks", status=response.status_code)
        return tasks

    def report(self, task_id: UUID | str, body: bytes) -> dict[str, Any] | None:
        """Send a task report; returns the answer, None when the server says that the lease is no longer ours (409)."""
        try:
            return _object(self._send("POST", f"/client/tasks/{task_id}/result", content=body, headers=_JSON))
        except Rejected as error:
            if error.status == 409:
                return None
            raise

    def send_metrics(self, compressed: bytes) -> dict[str, Any]:
        """Send a zstd-compressed batch; returns the server's answer."""
        headers = {**_JSON, "Content-Encoding": "zstd"}
        return _object(self._send("POST", "/client/metrics", content=compressed, headers=headers))

    def send_events(self, body: bytes) -> dict[str, Any]:
        """Send events; returns the server's answer."""
        return _object(self._send("POST", "/client/events", content=body, headers=_JSON))

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        sent_at = time.time()
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        self._learn_time(response, sent_at, time.time())
        if response.is_success:
            return response
        status = response.status_code
        # Credentials and rate limits are about the sender, not about what it sends: keep it and try later. A redirect
        # comes from something in between.
        if status < 400 or status >= 500 or status in (401, 403, 408, 425, 429):
            reason = f"the server answered {status}: {response.text[:200]}"
            raise Unavailable(reason, _retry_after(response), status=status)
        raise Rejected(status, response.text[:500])

    def _learn_time(self, response: httpx.Response, sent_at: float, received_at: float) -> None:
        text = response.headers.get("date")
        if not text or received_at - sent_at > 5:  # after a long poll the middle says little
            return
        try:
            said = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return
        if said.tzinfo is None:  # "-0000"
            said = said.replace(tzinfo=UTC)
        middle = datetime.fromtimestamp((sent_at + received_at) / 2, UTC)
        offset = said + timedelta(seconds=0.5) - middle
        self._clock_offset = offset if abs(offset) > CLOCK_TOLERANCE else timedelta(0)

    def close(self) -> None:
        """Close connections."""
        self._http.close()


_JSON = {"Content-Type": "application/json"}


def _object(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object. A 200 with anything else comes from something in between, not from the server."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unavailable(f"the answer is not the server's: {response.text[:200]}", status=response.status_code)
    return answer


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
