"""The tasks in the agent's hands: steps on a small thread pool, heartbeats, and reports that are not lost.

A drain spends its time waiting for pods, so a task holds no thread between steps: two hundred drains at once need eight
threads. A task is run once at a time however often it is offered; an offer under a newer epoch only renews the lease.
"""

from __future__ import annotations

import heapq
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from pydantic import ValidationError

from control.agent.cluster import Cluster, ClusterError
from control.agent.drain import DEFAULT_LIMIT, Again, Finished
from control.agent.server import Backoff, Pause, Rejected, Server, Unavailable, send_each
from control.agent.spool import Spool, created_at
from control.agent.tasks import Stepper, make_stepper
from warehouse.contracts import TASK_TYPE_ALIASES, OptimizationTask, TaskStatus

log = logging.getLogger(__name__)

STEP_THREADS = 8
HEARTBEAT_SECONDS = 5.0  # a lease lasts 15 s
RETRY_SECONDS = 1.0  # after an error of the Kubernetes API
# A rotated token is read again within a minute (cluster.TOKEN_REREAD_SECONDS).
CREDENTIALS_LIMIT = timedelta(seconds=75)
MAX_IN_FLIGHT = 256
REPORTS_KEPT_SECONDS = 24 * 3600
FINISHED_REMEMBERED = 1000


@dataclass
class Run:
    """One task being done."""

    task: OptimizationTask
    stepper: Stepper
    started_at: datetime
    epoch: int
    last_report: float = field(default_factory=time.monotonic)
    cancelled: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """A report on its way; `path` is None while the disk does not take it."""

    task_id: UUID
    content: bytes
    created_at: float
    path: Path | None


class Reports:
    """Task reports on their way to the server, kept on disk until it answers 2xx or 409, at most 24 hours.

    On a full disk they are kept in memory: a report lost with the process costs one more run of the task, while waiting
    for the disk would keep the task under its lease for ever.
    """

    def __init__(
        self,
        server: Server,
        spool: Spool,
        *,
        answered: Callable[[UUID, dict[str, Any]], None],
        lost_lease: Callable[[UUID, dict[str, Any]], None],
    ) -> None:
        self._server, self._spool, self._answered, self._lost_lease = server, spool, answered, lost_lease
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._backoff = Backoff()
        self._memory: list[Held] = []
        self._memory_lock = threading.Lock()

    def put(self, task_id: UUID, epoch: int, status: TaskStatus, detail: dict[str, Any], **times: str) -> None:
        """Keep a report, durably if the disk allows, and send it as soon as possible."""
        body = {"lease_epoch": epoch, "report_id": str(uuid4()), "status": status, "detail": detail, **times}
        self._keep(task_id, json.dumps(body).encode())
        self._wake.set()

    def readdress(self, task_id: UUID, epoch: int) -> bool:
        """Send an unacknowledged final report under a newer epoch: its work is done and must not be done again."""
        found = False
        for held in self._held(task_id):
            body = json.loads(held.content)
            if body["status"] == TaskStatus.RUNNING:
                continue
            found = True
            if body["lease_epoch"] != epoch:
                self._keep(task_id, json.dumps({**body, "lease_epoch": epoch}).encode())
                self._done(held)
        if found:
            self._wake.set()
        return found

    def waiting(self) -> int:
        """Reports not yet acknowledged."""
        return len(self._spool.items()) + len(self._memory)

    def run(self) -> None:
        """Send until stopped."""
        while not self._stop.is_set():
            self._wake.clear()
            try:
                pause = self._send_all()
            except Exception:  # without this thread no task would ever end
                log.exception("reports wait: the agent failed")
                pause = Pause(self._backoff.pause(), for_all=True)
            if pause is not None and pause.for_all:
                self._stop.wait(pause.seconds)
            else:
                self._wake.wait(pause.seconds if pause else None)

    def stop(self) -> None:
        """Let `run` end after what it is sending now."""
        self._stop.set()
        self._wake.set()

    def flush(self, seconds: float) -> None:
        """Try once more to send what is left; used while stopping."""
        give_up = time.monotonic() + seconds
        while self.waiting() and time.monotonic() < give_up:
            if self._send_all() is not None:
                time.sleep(0.1)

    def _send_all(self) -> Pause | None:
        """Send everything once; how long to wait when the server does not take all of it, else None."""
        self._memory_to_disk()
        return send_each(self._held(), self._send, self._backoff, "a task report")

    def _send(self, held: Held) -> None:
        task_id = held.task_id
        if time.time() - held.created_at > REPORTS_KEPT_SECONDS:
            log.error("report on task %s is dropped: the server has not taken it for 24 hours", task_id)
            self._done(held)
            return
        try:
            answer = self._server.report(task_id, held.content)
        except Rejected as error:
            log.error("report on task %s was rejected and is dropped: %s", task_id, error)
            answer = {}
        if answer is not None:
            self._answered(task_id, answer)
        else:
            body = json.loads(held.content)
            log.warning("report on task %s: the lease (epoch %s) was no longer ours", task_id, body["lease_epoch"])
            self._lost_lease(task_id, body)
        self._done(held)

    def _held(self, only: UUID | None = None) -> list[Held]:
        """Everything (or everything on one task) not yet acknowledged, oldest first."""
        with self._memory_lock:
            found = [held for held in self._memory if only in (None, held.task_id)]
        for path in self._spool.items():
            if only is not None and not path.name.endswith(str(only)):
                continue
            try:
                content = self._spool.read(path)
                if content is not None:
                    json.loads(content)
                    found.append(Held(UUID(path.name.split("-", 1)[1]), content, created_at(path), path))
            except OSError as error:
                log.error("%s cannot be read: %s", path, error)
            except (ValueError, IndexError) as error:
                log.error("%s is no report and is dropped: %r", path, error)
                self._spool.done(path)
        return sorted(found, key=lambda held: held.created_at)

    def _keep(self, task_id: UUID, content: bytes) -> None:
        try:
            self._spool.put(str(task_id), content)
        except OSError as error:
            log.error("report on task %s is kept in memory only: %s", task_id, error)
            with self._memory_lock:
                self._memory.append(Held(task_id, content, time.time(), None))

    def _memory_to_disk(self) -> None:
        for held in list(self._memory):
            try:
                self._spool.put(str(held.task_id), held.content)
            except OSError:
                return
            self._done(held)

    def _done(self, held: Held) -> None:
        if held.path is not None:
            self._spool.done(held.path)
            return
        with self._memory_lock:
            if held in self._memory:
                self._memory.remove(held)


class Board:
    """Runs tasks."""

    def __init__(
        self,
        cluster: Cluster,
        server: Server,
        spool: Spool,
        *,
        collect: Callable[[], dict[str, Any]],
    ) -> None:
        self._cluster, self._server, self._collect = cluster, server, collect
        self.reports = Reports(server, spool, answered=self._answered, lost_lease=self._lost_lease)
        self._runs: dict[UUID, Run] = {}
        self._finished: OrderedDict[UUID, Finished] = OrderedDict()
        self._due: list[tuple[float, int, UUID]] = []
        self._count = 0
        self._condition = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        work = [(f"step-{index}", self._work) for index in range(STEP_THREADS)]
        for name, target in [*work, ("reports", self.reports.run), ("heartbeat", self._heartbeat)]:
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    @property
    def room(self) -> int:
        """How many more tasks may be taken."""
        return max(0, MAX_IN_FLIGHT - len(self._runs))

    @property
    def in_flight(self) -> int:
        """Tasks being done."""
        return len(self._runs)

    def take(self, offered: dict[str, Any]) -> None:
        """Begin a task, or renew the lease of one that is running or done."""
        try:
            task = _understood(offered)
        except ValidationError as error:
            log.error("a task is not understood and is refused: %s", error)
            reason = f"this agent does not understand the task: {error.errors()[0]['msg']}"
            try:
                task_id, epoch = UUID(offered["task_id"]), int(offered["lease_epoch"])
            except (KeyError, TypeError, ValueError, AttributeError):
                return  # there is nothing to report on
            self.reports.put(task_id, epoch, TaskStatus.REFUSED, {"reason": reason})
            return
        now = self._server.now()
        with self._condition:
            running = self._runs.get(task.task_id)
            if running is not None:
                if task.lease_epoch > running.epoch:
                    running.epoch = task.lease_epoch
                    running.cancelled = False  # what was lost was the older lease
                running.last_report = 0.0  # the next heartbeat confirms the new epoch
                self._hurry(running, task.deadline, task.parameters.get("grace_seconds"))
                return
            known = self._finished.get(task.task_id)
        if self.reports.readdress(task.task_id, task.lease_epoch):
            log.info("task %s was done already; its report is sent again", task.task_id)
            return
        if known is not None:
            self._report(task.task_id, task.lease_epoch, known, now)
            return
        if task.deadline is not None and task.deadline <= now:
            log.warning("task %s (%s) came after its deadline and is not executed", task.task_id, task.task_type)
            late = Finished(TaskStatus.REFUSED, {"reason": "the deadline had passed when the task arrived"})
            self._report(task.task_id, task.lease_epoch, late, now)
            return
        log.info("task %s: %s %s", task.task_id, task.task_type, task.parameters.get("node_name", ""))
        run = Run(task, make_stepper(task, now, self._collect), now, task.lease_epoch)
        with self._condition:
            self._runs[task.task_id] = run
        self._schedule(run, 0)

    def stop(self, seconds: float) -> None:
        """Stop taking steps; finished work is reported, unfinished work is left to the next lease."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        give_up = time.monotonic() + seconds
        self.reports.stop()
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        self.reports.flush(max(0.0, give_up - time.monotonic()))

    # -- threads

    def _schedule(self, run: Run, after_seconds: float) -> None:
        with self._condition:
            self._count += 1
            heapq.heappush(self._due, (time.monotonic() + after_seconds, self._count, run.task.task_id))
            self._condition.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._stopping and (not self._due or self._due[0][0] > time.monotonic()):
                    wait = self._due[0][0] - time.monotonic() if self._due else None
                    self._condition.wait(wait)
                if self._stopping:
                    return
                _, _, task_id = heapq.heappop(self._due)
                run = self._runs.get(task_id)
            if run is None:
                continue
            try:
                self._step(run)
            except Exception:  # out of our hands, so that its lease ends and the server offers it again
                log.exception("task %s is left: the agent failed", task_id)
                with self._condition:
                    self._runs.pop(task_id, None)

    def _step(self, run: Run) -> None:
        now = self._server.now()
        with self._condition:
            if run.cancelled:
                log.warning("task %s is left: its lease went to somebody else", run.task.task_id)
                self._runs.pop(run.task.task_id, None)
                return
        try:
            step = run.stepper(self._cluster, now, run.task.deadline)
        except ClusterError as error:
            step = self._after_error(run, error, now)
        except Exception as error:  # one broken task must not end the thread that serves the others
            log.exception("task %s failed", run.task.task_id)
            step = Finished(TaskStatus.FAILED, {"reason": f"the agent failed: {error!r}"[:1000]})
        if isinstance(step, Again):
            if step.progress is not None:
                log.info("task %s: %s", run.task.task_id, step.progress.get("progress"))
                run.last_report = time.monotonic()
                self.reports.put(
                    run.task.task_id,
                    run.epoch,
                    TaskStatus.RUNNING,
                    step.progress,
                    started_at=run.started_at.isoformat(),
                )
            self._schedule(run, step.after_seconds)
            return
        # Durable first, forgotten second: an offer in between finds one or the other.
        self._report(run.task.task_id, run.epoch, step, self._server.now(), run.started_at)
        with self._condition:
            self._remember(run.task.task_id, step)
            self._runs.pop(run.task.task_id, None)

    def _after_error(self, run: Run, error: ClusterError, now: datetime) -> Again | Finished:
        temporary = error.status in (0, 401, 409, 429) or error.status >= 500
        give_up_at = run.task.deadline or run.started_at + DEFAULT_LIMIT
        if error.status == 401:
            give_up_at = min(give_up_at, run.started_at + CREDENTIALS_LIMIT)
        if temporary and now < give_up_at:
            log.warning("task %s: %s; trying again", run.task.task_id, error)
            return Again(RETRY_SECONDS)
        return Finished(TaskStatus.FAILED, {"reason": f"the Kubernetes API answered {error}"[:1000]})

    def _report(
        self, task_id: UUID, epoch: int, end: Finished, now: datetime, started_at: datetime | None = None
    ) -> None:
        log.info("task %s: %s %s", task_id, end.status, end.detail.get("reason", ""))
        times = {"finished_at": now.isoformat()}
        if started_at is not None:
            times["started_at"] = started_at.isoformat()
        self.reports.put(task_id, epoch, end.status, end.detail, **times)

    def _answered(self, task_id: UUID, answer: dict[str, Any]) -> None:
        """A report was taken: the answer tells the task's deadline as of now."""
        try:
            deadline = datetime.fromisoformat(answer["deadline"])
        except (KeyError, TypeError, ValueError):
            return
        with self._condition:
            run = self._runs.get(task_id)
            if run is not None and deadline.tzinfo is not None:
                self._hurry(run, deadline)

    def _hurry(self, run: Run, deadline: datetime | None, grace_seconds: Any = None) -> None:
        """A sharper notice leaves less time than there was when the task began, and pods less to end; never more."""
        if isinstance(grace_seconds, int):
            known = run.task.parameters.get("grace_seconds")
            # The stepper reads it from there at each step.
            run.task.parameters["grace_seconds"] = min(grace_seconds, known if known is not None else grace_seconds)
        if deadline is not None and (run.task.deadline is None or deadline < run.task.deadline):
            log.warning("task %s: its deadline is now %s", run.task.task_id, deadline.isoformat())
            run.task = run.task.model_copy(update={"deadline": deadline})

    def _lost_lease(self, task_id: UUID, report: dict[str, Any]) -> None:
        """A report was answered 409. Stop the work if it is still under that lease; if it was done already, remember
        that, as the task may be offered again under a newer one."""
        status = TaskStatus(report["status"])
        with self._condition:
            run = self._runs.get(task_id)
            if run is not None and run.epoch == report["lease_epoch"]:
                run.cancelled = True
            elif run is None and status is not TaskStatus.RUNNING:
                self._remember(task_id, Finished(status, report["detail"]))

    def _remember(self, task_id: UUID, end: Finished) -> None:
        self._finished[task_id] = end
        while len(self._finished) > FINISHED_REMEMBERED:
            self._finished.popitem(last=False)

    def _heartbeat(self) -> None:
        """Renew the leases of what takes longer than a moment; not kept on disk, the next one follows soon."""
        while not self._stopping:
            time.sleep(min(1.0, HEARTBEAT_SECONDS / 4))
            now = time.monotonic()
            with self._condition:
                due = [run for run in self._runs.values() if now - run.last_report >= HEARTBEAT_SECONDS]
            for run in due:
                if self._stopping:
                    return
                run.last_report = time.monotonic()
                body = {"lease_epoch": run.epoch, "report_id": str(uuid4()), "status": TaskStatus.RUNNING, "detail": {}}
                try:
                    answer = self._server.report(run.task.task_id, json.dumps(body).encode())
                    if answer is None:
                        self._lost_lease(run.task.task_id, body)
                    else:
                        self._answered(run.task.task_id, answer)
                except (Unavailable, Rejected) as error:
                    log.debug("heartbeat of task %s: %s", run.task.task_id, error)
                except Exception:  # without this thread every longer task would lose its lease
                    log.exception("heartbeat of task %s: the agent failed", run.task.task_id)


def _understood(offered: dict[str, Any]) -> OptimizationTask:
    alias = TASK_TYPE_ALIASES.get(str(offered.get("task_type")))
    return OptimizationTask.model_validate({**offered, "task_type": alias} if alias else offered)
