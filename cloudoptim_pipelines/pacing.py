"""When a scheduled job is due. Schedules look every few minutes and launch only when this says so.

That way a fresh start computes at once, a stop of the server is caught up with, a failing source is not hammered, and
two runs of one job never overlap. Looking costs milliseconds; a run costs about five seconds of one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import dagster as dg
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

RETRY_AFTER = timedelta(minutes=10)
# Ticks are a minute apart and a run starts seconds after its tick: without slack every turn would slip a minute.
SLACK = timedelta(seconds=40)
# What decisions and the cost page wait for goes first when runs queue up.
URGENT = {"dagster/priority": "10"}
# Cron of the schedules that look and decide: what people wait for, and what may wait.
EVERY_MINUTE = "* * * * *"
EVERY_TEN_MINUTES = "*/10 * * * *"


class Outcome(StrEnum):
    """How the newest run of a job stands."""

    ACTIVE = "active"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LastRun:
    """The newest run of a job."""

    created_at: datetime
    outcome: Outcome


def why_not(now: datetime, last: LastRun | None, *, every: timedelta) -> str | None:
    """Why the job is not due, or None when it is.

    Due means: it never ran, it succeeded ``every`` ago, or it failed ``RETRY_AFTER`` ago.
    """
    if last is None:
        return None
    if last.outcome is Outcome.ACTIVE:
        return "the last run is still active"
    wait = every if last.outcome is Outcome.SUCCEEDED else min(every, RETRY_AFTER)
    due_at = last.created_at + wait - SLACK
    return None if now >= due_at else f"{last.outcome} at {last.created_at:%H:%M:%S}, due at {due_at:%H:%M:%S} UTC"


def why_not_today(now: datetime, last: LastRun | None, *, not_before: timedelta) -> str | None:
    """The same for a job that runs once a day, ``not_before`` after midnight UTC."""
    opens = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + not_before
    if now < opens:
        return f"opens at {opens:%H:%M} UTC"
    if last is None or last.created_at < opens:
        return None
    if last.outcome is Outcome.SUCCEEDED:
        return f"done today at {last.created_at:%H:%M} UTC"
    return why_not(now, last, every=timedelta(days=1))


def last_run(
    instance: DagsterInstance, job_name: str, statuses: Sequence[DagsterRunStatus] | None = None
) -> LastRun | None:
    """The newest run of a job, whoever launched it; with ``statuses`` the newest that stands at one of them."""
    records = instance.get_run_records(RunsFilter(job_name=job_name, statuses=statuses), limit=1)
    if not records:
        return None
    status = records[0].dagster_run.status
    if status == DagsterRunStatus.SUCCESS:
        outcome = Outcome.SUCCEEDED
    elif status in (DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED):
        outcome = Outcome.FAILED
    else:
        outcome = Outcome.ACTIVE
    return LastRun(records[0].create_timestamp.astimezone(UTC), outcome)


def tick(
    context: dg.ScheduleEvaluationContext,
    job_name: str,
    *,
    every: timedelta | None = None,
    daily: timedelta | None = None,
    after: Sequence[str] = (),
) -> dg.SkipReason | None:
    """Skip unless the job is due: ``every`` so often, or once a day not before ``daily`` after midnight UTC.

    The first run of a job waits until each of ``after`` has ended once: a new installation reads prices first.
    """
    now = context.scheduled_execution_time.astimezone(UTC)
    last = last_run(context.instance, job_name)
    if last is None:
        for other in after:
            first = last_run(context.instance, other)
            if first is None or first.outcome is Outcome.ACTIVE:
                return dg.SkipReason(f"waits for the first run of {other}")
    if daily is not None:
        reason = why_not_today(now, last, not_before=daily)
    else:
        reason = why_not(now, last, every=every or SLACK)
    return dg.SkipReason(reason) if reason else None
