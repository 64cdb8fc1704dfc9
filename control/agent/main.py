"""The agent's process: one long poll, one metrics loop, one node watch, and the threads of the task board."""

from __future__ import annotations

import http.server
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from control.agent.board import Board
from control.agent.cluster import Cluster, ClusterError, Object
from control.agent.collector import batch, collect, split
from control.agent.config import AGENT_VERSION, AgentConfig, ConfigError, read_config
from control.agent.notices import Noticed, events_body, notices_of
from control.agent.rejections import names_of_events, names_of_samples, say_rejected
from control.agent.server import Backoff, Pause, Rejected, Server, Unavailable, send_each
from control.agent.spool import Sequence, Spool
from control.agent.tasks import UNDERSTOOD

log = logging.getLogger("cloudoptim.agent")

POLL_LIMIT = 50
METRICS_KEPT_SECONDS = 6 * 3600
EVENTS_KEPT_SECONDS = 3600  # a notice says nothing after its two minutes; what happened is in the state by then
STOP_SECONDS = 4.0
# Four long polls without an answer: the server is away, or this process hangs.
HEALTHY_SECONDS = 120.0


class Agent:
    """All parts of one agent."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        state = config.state_dir
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cluster = Cluster(config)
        self._server = Server(config)
        self._metrics = Spool(state / "metrics", max_age_seconds=METRICS_KEPT_SECONDS)
        self._events = Spool(state / "events", max_age_seconds=EVENTS_KEPT_SECONDS)
        self._sequence = Sequence(state / "sequence")
        self._collecting = threading.Lock()
        self._noticed = Noticed()
        self.board = Board(
            self._cluster,
            self._server,
            Spool(state / "reports", max_age_seconds=24 * 3600),
            collect=self._collect_now,
        )
        self._stop = threading.Event()
        self._metrics_due = threading.Event()
        self._events_due = threading.Event()
        self._last_poll = time.monotonic()

    def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self.board.start()
        for name, target in (
            ("poll", self._poll),
            ("collect", self._collect_loop),
            ("send-metrics", self._send_metrics),
            ("watch", self._watch),
            ("send-events", self._send_events),
        ):
            threading.Thread(target=target, name=name, daemon=True).start()
        if self.config.health_port:
            threading.Thread(target=self._serve_health, name="health", daemon=True).start()
        log.info("agent %s serves cluster %s at %s", AGENT_VERSION, self.config.cluster_name, self.config.server_url)
        self._stop.wait()
        log.info("stopping: %d tasks in hand go back to the server", self.board.in_flight)
        self.board.stop(STOP_SECONDS)

    # -- tasks

    def _poll(self) -> None:
        backoff = Backoff()
        connected = False
        while not self._stop.is_set():
            limit = min(POLL_LIMIT, self.board.room)
            if not limit:
                self._stop.wait(0.2)
                continue
            started = time.monotonic()
            try:
                offered = self._server.poll(UNDERSTOOD, limit)
            except Exception as error:  # whatever it is, this thread is the only one that brings tasks
                pause = backoff.pause(getattr(error, "retry_after_seconds", None))
                unexpected = None if isinstance(error, Unavailable | Rejected) else error
                log.warning("no tasks from the server: %s; again in %.1f s", error, pause, exc_info=unexpected)
                connected = False
                self._stop.wait(pause)
                continue
            backoff.reset()
            self._last_poll = time.monotonic()
            if not connected:
                connected = True
                log.info("connected to the server; waiting for tasks")
            for task in offered:
                try:
                    self.board.take(task)
                except Exception:  # its lease ends, and it is offered again
                    log.exception("task %s is not taken: the agent failed", task.get("task_id"))
            if time.monotonic() - started < 0.05 and offered:
                # A task may be offered again before its first report has arrived: do not ask in a tight loop.
                self._stop.wait(0.05)

    # -- metrics

    def _collect_now(self) -> dict[str, Any]:
        """Collect, keep on disk, wake the sender; returns a summary of the state."""
        with self._collecting:
            now = self._server.now()
            state, samples = collect(self._cluster, self.config.cluster_id, self.config.cluster_name, now)
            for index, part in enumerate(split(samples)):
                body = batch(
                    state if index == 0 else None,
                    part,
                    cluster_id=self.config.cluster_id,
                    seq=self._sequence.next(),
                    now=now,
                )
                self._metrics.put("batch.zst", body)
        self._metrics_due.set()
        return {
            name: state[name]
            for name in ("node_count", "pod_count", "spot_node_count", "on_demand_node_count", "state_hash")
        } | {"samples": len(samples["metric"])}

    def _collect_loop(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                self._collect_now()
            except ClusterError as error:
                log.warning("no metrics this time: %s", error)
            except OSError as error:
                log.error("metrics cannot be kept below %s: %s", self.config.state_dir, error)
            except Exception:
                log.exception("no metrics this time: the agent failed")
            due = max(due + self.config.metrics_seconds, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def _send_metrics(self) -> None:
        self._send_loop(self._metrics, self._metrics_due, self._send_batch, "a metric batch")

    def _send_batch(self, content: bytes) -> None:
        answer = self._server.send_metrics(content)
        say_rejected(answer, lambda: names_of_samples(content))
        warnings = answer.get("warnings")
        for warning in warnings if isinstance(warnings, list) else ():
            log.warning("the server warns: %s", warning)

    def _send_loop(self, spool: Spool, due: threading.Event, send: Callable[[bytes], None], what: str) -> None:
        """Send what is on disk whenever `due` is set, and again until it is gone."""
        backoff = Backoff()

        def send_file(path: Path) -> None:
            content = spool.read(path)
            if content is None or self._stop.is_set():
                return
            try:
                send(content)
            except Rejected as error:
                log.error("%s was rejected and is dropped: %s", what, error)
            spool.done(path)

        pause: Pause | None = Pause(0, for_all=False)  # what an earlier life left goes at once
        while not self._stop.is_set():
            if pause is not None and pause.for_all:
                self._stop.wait(pause.seconds)
            else:
                due.wait(pause.seconds if pause is not None else 60)
            due.clear()
            try:
                dropped = spool.trim()
                if dropped:
                    log.error("%d times %s was dropped: the server has not taken it for too long", dropped, what)
                pause = send_each(spool.items(), send_file, backoff, what)
            except Exception:  # the disk, most likely
                log.exception("%s waits: the agent failed", what)
                pause = Pause(backoff.pause(), for_all=True)

    # -- notices

    def _watch(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            quiet = True
            try:
                for node in self._cluster.watch_nodes():
                    self._notice(node)
                    quiet = False
                    backoff.reset()
                    if self._stop.is_set():
                        return
                if quiet:  # an endpoint that ends every watch at once must not be asked in a tight loop
                    self._stop.wait(backoff.pause())
            except Exception as error:
                pause = backoff.pause()
                unexpected = None if isinstance(error, ClusterError | OSError) else error
                log.warning("the node watch ended: %s; again in %.1f s", error, pause, exc_info=unexpected)
                self._stop.wait(pause)

    def _notice(self, node: Object) -> None:
        """Put what is new on a node on its way; raises OSError when the disk is full: the next watch shows it again."""
        try:
            fresh = self._noticed.fresh(notices_of(node, self._server.now()))
        except Exception:  # one strange node must not hide the notices of the others
            log.exception("a node is not understood")
            return
        if not fresh:
            return
        for event in fresh:
            log.warning("%s announced for %s (%s)", event.event_type, event.node_name, event.instance_id)
        self._events.put("events.json", events_body(self.config.cluster_id, fresh))
        self._noticed.remember(fresh)
        self._events_due.set()

    def _send_events(self) -> None:
        self._send_loop(self._events, self._events_due, self._send_noticed, "an event")

    def _send_noticed(self, content: bytes) -> None:
        say_rejected(self._server.send_events(content), lambda: names_of_events(content))

    # -- health

    def _serve_health(self) -> None:
        agent = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/healthz":
                    self.send_error(404)
                    return
                silent = time.monotonic() - agent._last_poll
                healthy = silent < HEALTHY_SECONDS
                self.send_response(200 if healthy else 503)
                self.end_headers()
                self.wfile.write(b"ok\n" if healthy else f"no poll was answered for {silent:.0f} s\n".encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Probes are not worth a log line."""

        http.server.ThreadingHTTPServer(("127.0.0.1", self.config.health_port), Handler).serve_forever()


def main(arguments: list[str] | None = None) -> None:
    """Run the agent of one cluster until SIGTERM; settings from flags and environment."""
    try:
        config = read_config(arguments or [])
    except ConfigError as error:
        raise SystemExit(f"cloudoptim agent: {error}") from None
    logging.basicConfig(
        level=config.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(threadName)s %(message)s"
    )
    for noisy in ("httpx", "httpcore", "urllib3", "kubernetes"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    Agent(config).run()
    logging.shutdown()
    os._exit(0)  # threads that still wait for a long poll or a watch have nothing to lose
