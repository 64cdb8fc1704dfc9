"""The worker process: intake, launches, reconcilers, outbox and bus consumers. Any number may run; none leads.

Everything it does is read from tables and committed before it acts, so it may be killed at any moment. SIGTERM ends
it cleanly: no new work, what was received is taken in, calls under way are finished, leases are given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog
from prometheus_client import start_http_server
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from control.bus import outbox
from control.bus.bells import Bells
from control.bus.broker import Handlers, keep_consuming, make_broker
from control.gateways.aws import AwsGateway
from control.interruptions import closing, metrics, returning
from control.interruptions.consumers import handlers
from control.interruptions.intake import COMMITS_AT_ONCE, Intake
from control.interruptions.launching import ROUND_SECONDS, Launcher
from control.interruptions.reconcilers import (
    alarms,
    came_back,
    deadlines,
    invariants,
    leaving,
    lifecycle,
    missed,
    never_ready,
    orphans,
    ready,
    scores,
)
from control.interruptions.reconcilers import launch as launch_reconciler
from control.interruptions.reconcilers.ending import INTERVAL_SECONDS as ENDING_SECONDS
from control.interruptions.reconcilers.ending import Ending
from control.interruptions.runtime import Runtime
from control.security.redaction import configure_logging
from control.settings import Settings, get_settings
from warehouse.postgres.migrate import assert_durable
from warehouse.postgres.session import Database

log = structlog.get_logger(__name__)

# `cloudoptim up` gives 5 s, of which the connections' closing takes some; Kubernetes gives 30 s.
STOP_SECONDS = 4.0
# The intake has connections of its own: nothing else may keep a warning waiting (L-15).
INTAKE_POOL = COMMITS_AT_ONCE
LOOP_POOL = 6
FAILURE_PAUSE_SECONDS = (0.2, 5.0)
UNMATCHED_SECONDS = 5.0
CLOSING_SECONDS = 2.0
HOUSEKEEPING_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Loop:
    """One thing done over and over: every ``seconds``, and at once when ``bell`` rings.

    ``gather_seconds``: after a round that found work, wait this long before the next, so that what a storm brings is
    done in few large rounds.
    """

    name: str
    seconds: float
    work: Callable[[], Awaitable[object]]
    bell: str | None = None
    gather_seconds: float = 0.0


class Worker:
    """All of a worker's loops over one set of connections."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runtime = Runtime(
            db=Database(settings.database_url, pool_size=LOOP_POOL, max_overflow=4, pool_timeout=5.0, fresh_plans=True),
            intake_db=Database(
                settings.database_url, pool_size=INTAKE_POOL, max_overflow=0, pool_timeout=5.0, fresh_plans=True
            ),
            aws=AwsGateway(endpoint_url=settings.aws_endpoint_url, region=settings.aws_region),
            bells=Bells(settings.redis_url),
            worker=f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() % 1_000_000:06d}",
            deployment_id=settings.deployment_id,
        )
        self.launcher = Launcher(self.runtime)
        self.intake = Intake(self.runtime)
        self.stop = asyncio.Event()
        self.broker = make_broker(settings.redis_url)
        self._broker_ready = False

    def loops(self) -> list[Loop]:
        """What this worker does besides reading queues."""
        runtime = self.runtime
        return [
            Loop("launches", ROUND_SECONDS, self.launcher.plan_round, bell="launches", gather_seconds=ROUND_SECONDS),
            Loop(
                "launch_calls",
                launch_reconciler.INTERVAL_SECONDS,
                partial(launch_reconciler.run_once, self.launcher),
                bell="launch_calls",
            ),
            Loop("ready", ready.INTERVAL_SECONDS, partial(ready.run_once, runtime)),
            Loop("came_back", came_back.INTERVAL_SECONDS, partial(came_back.run_once, runtime)),
            Loop("never_ready", never_ready.INTERVAL_SECONDS, partial(never_ready.run_once, runtime)),
            Loop("returns", returning.LOOK_SECONDS, partial(returning.consider, self.launcher)),
            Loop("returning", returning.ADVANCE_SECONDS, partial(returning.advance, self.launcher)),
            Loop("lifecycle", lifecycle.INTERVAL_SECONDS, partial(lifecycle.run_once, runtime), bell="interruptions"),
            Loop("ending", ENDING_SECONDS, Ending(self.launcher).run_once),
            Loop("leaving", leaving.INTERVAL_SECONDS, partial(leaving.run_once, runtime)),
            Loop("alarms", alarms.INTERVAL_SECONDS, partial(alarms.run_once, runtime)),
            Loop("orphans", orphans.LOOK_SECONDS, partial(orphans.run_once, self.launcher)),
            Loop("missed", missed.LOOK_SECONDS, partial(missed.run_once, self.launcher)),
            Loop("scores", scores.INTERVAL_SECONDS, partial(scores.run_once, runtime)),
            Loop("invariants", invariants.LOOK_SECONDS, partial(invariants.run_once, runtime)),
            Loop("deadlines", deadlines.INTERVAL_SECONDS, partial(deadlines.run_once, runtime)),
            Loop("unmatched", UNMATCHED_SECONDS, partial(closing.settle_unmatched, runtime)),
            Loop("pre_spin", CLOSING_SECONDS, partial(closing.begin_waiting_drains, runtime), bell="interruptions"),
            Loop("closing", CLOSING_SECONDS, partial(closing.close_ended, runtime), bell="interruptions"),
            Loop("called_off", CLOSING_SECONDS, partial(closing.cancel_unwanted, runtime)),
            Loop("outbox", outbox.INTERVAL_SECONDS, self._relay, bell="outbox"),
            Loop("housekeeping", HOUSEKEEPING_SECONDS, partial(outbox.forget_old, runtime.db)),
        ]

    async def run(self) -> None:
        """Work until ``stop`` is set."""
        log.info("worker.started", worker=self.runtime.worker, deployment=self.runtime.deployment_id)
        tasks = [asyncio.create_task(self._keep(loop), name=loop.name) for loop in self.loops()]
        tasks.append(asyncio.create_task(self._keep_intake(), name="intake"))
        tasks.append(
            asyncio.create_task(
                keep_consuming(self.settings.redis_url, self._handlers(), self.stop, consumer=self.runtime.worker),
                name="bus",
            )
        )
        try:
            await self.stop.wait()
            log.info("worker.stopping")
            await asyncio.wait(tasks, timeout=STOP_SECONDS / 2)
            await self.launcher.finish_calls(STOP_SECONDS / 2)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.launcher.leave()
            await self._close()
        log.info("worker.stopped")

    def _handlers(self) -> Handlers:
        return handlers(self.runtime.db, self.runtime.bells)

    async def _keep_intake(self) -> None:
        """Read queues until ``stop`` is set; should that ever end before, it is told and started again."""
        while True:
            error: Exception | None = None
            try:
                await self.intake.run(self.stop)
            except Exception as raised:
                error = raised
            if self.stop.is_set():
                return
            metrics.LOOP_FAILURES.labels("intake", type(error).__name__).inc()
            log.error("worker.intake_ended", exc_info=error)
            await self._until_stop(FAILURE_PAUSE_SECONDS[0])

    async def _keep(self, loop: Loop) -> None:
        """Run a loop for ever: an error is counted and told, and the next round comes after a growing pause."""
        pause = FAILURE_PAUSE_SECONDS[0]
        async with self._bell(loop.bell) as wait:
            while not self.stop.is_set():
                started = time.monotonic()
                try:
                    found = await loop.work()
                    pause = FAILURE_PAUSE_SECONDS[0]
                    metrics.LOOP_SECONDS.labels(loop.name).observe(time.monotonic() - started)
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    metrics.LOOP_FAILURES.labels(loop.name, type(error).__name__).inc()
                    expected = isinstance(error, SQLAlchemyError | RedisError | OSError | TimeoutError)
                    log.warning(
                        "worker.loop_failed",
                        loop=loop.name,
                        error=type(error).__name__,
                        message=str(error)[:300],
                        exc_info=not expected,
                    )
                    await self._until_stop(pause)
                    pause = min(pause * 2, FAILURE_PAUSE_SECONDS[1])
                    continue
                if found and loop.gather_seconds:
                    await self._until_stop(loop.gather_seconds)
                await wait(loop.seconds * random.uniform(0.9, 1.1))

    @contextlib.asynccontextmanager
    async def _bell(self, topic: str | None) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
        if topic is None:
            yield self._until_stop
            return
        async with self.runtime.bells.listen(topic) as bell:

            async def wait(seconds: float) -> None:
                rung = asyncio.create_task(bell.wait(seconds))
                stopped = asyncio.create_task(self.stop.wait())
                try:
                    await asyncio.wait({rung, stopped}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    rung.cancel()
                    stopped.cancel()

            yield wait

    async def _until_stop(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()

    async def _relay(self) -> None:
        if not self._broker_ready:
            await self.broker.connect()
            self._broker_ready = True
        while await outbox.relay_once(self.runtime.db, self.broker) >= outbox.LIMIT:
            continue

    async def _close(self) -> None:
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await self.broker.stop()
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await self.runtime.bells.close()
        await self.runtime.aws.close()
        await self.runtime.db.close()
        await self.runtime.intake_db.close()


async def _serve(settings: Settings) -> None:
    await _until_durable(settings.database_url)
    worker = Worker(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop.set)
    await worker.run()


async def _until_durable(database_url: str) -> None:
    """Wait for the database, and refuse one that may lose acknowledged commits (C-30)."""
    pause = FAILURE_PAUSE_SECONDS[0]
    while True:
        try:
            await asyncio.to_thread(assert_durable, database_url)
            return
        except (SQLAlchemyError, OSError) as error:
            log.warning("worker.database_away", error=type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, FAILURE_PAUSE_SECONDS[1])


def main() -> None:
    """Run a worker until SIGTERM or Ctrl-C."""
    settings = get_settings()
    configure_logging(settings.log_level)
    _, port = _metrics_server(settings.worker_metrics_port)
    log.info("worker.metrics", port=port)
    # What is imported stays: a large body that makes the collector look at all of it would hold up everybody's warnings
    # for a tenth of a second.
    gc.collect()
    gc.freeze()
    asyncio.run(_serve(settings))


def _metrics_server(port: int) -> tuple[object, int]:
    """Prometheus metrics on loopback. A second worker on the machine takes a free port, and the log says which."""
    try:
        server, _ = start_http_server(port, addr="127.0.0.1")
    except OSError:
        server, _ = start_http_server(0, addr="127.0.0.1")
    return server, server.server_address[1]


if __name__ == "__main__":
    main()
