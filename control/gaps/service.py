"""Gaps and their filling. Our ``gap_fills`` row is the record; Dagster only does the work.

A request is written down first, then launched with its id as a tag. A launch whose answer was lost is found again by
that tag; a fill that was cut short is taken up again with the partitions that are still missing, never with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

from control.errors import Conflict, Invalid, NotFound, Unavailable
from control.gaps import repository
from control.gateways.dagster import DagsterError, DagsterGateway, DagsterUnreachable, Work, WorkState
from control.security import audit
from control.security.principal import Principal
from warehouse.postgres.session import Database

FILL_TAG = "cloudoptim/fill_id"
REQUESTED_BY_TAG = "cloudoptim/requested_by"
GAPS_SHOWN = 50
DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """How partitions are sent to Dagster: one run over a range (about ten seconds), or a backfill of any set."""

    first: str | None
    last: str | None
    partitions: tuple[str, ...]

    @property
    def one_run(self) -> bool:
        """Whether a single range run does it."""
        return self.first is not None


def plan(partitions: Sequence[str]) -> Plan:
    """One run when the partitions are consecutive days of one region (or of none), else a backfill."""
    keys = sorted(set(partitions))
    days = [date.fromisoformat(key[:10]) for key in keys]
    regions = {key.partition("|")[2] for key in keys}
    consecutive = all(later - earlier == DAY for earlier, later in pairwise(days))
    if len(regions) == 1 and consecutive:
        return Plan(keys[0], keys[-1], tuple(keys))
    return Plan(None, None, tuple(keys))


def verdict(remaining: int, work: Work | None) -> tuple[str, str | None] | None:
    """How a fill that is under way ends, with its error; None while it goes on.

    Args:
        remaining: partitions not written since the fill was asked for.
        work: what Dagster says; None when nothing was launched yet.
    """
    if work is None or work.state is WorkState.ACTIVE:
        return None
    if remaining == 0:
        # A failed check or a failed sibling does not unwrite partitions, but people must see it.
        return "succeeded", (work.error if work.state is WorkState.FAILED else None)
    if work.state is WorkState.CANCELLED:
        return "cancelled", None
    if work.state is WorkState.UNKNOWN:
        return "failed", f"Dagster no longer knows this work; {remaining} partitions are still missing: resume the fill"
    return "failed", work.error or f"Dagster ended without writing {remaining} partitions; see its run for the reason"


async def list_gaps(
    db: Database,
    principal: Principal,
    *,
    now: datetime,
    lookback_days: int,
    model_id: UUID | None,
    table_name: str | None,
    series: str | None,
    state: str | None,
    limit: int,
) -> dict[str, Any]:
    """Gaps of a window: the lookback, or a model's training window.

    Raises:
        NotFound: no such model. Invalid: the model has no training window.
    """
    start, end = now - timedelta(days=lookback_days), now
    async with principal.scope(db) as conn:
        if model_id is not None:
            window = await repository.model_window(conn, model_id)
            if window is None:
                raise NotFound("model")
            if window[0] is None or window[1] is None:
                raise Invalid("The model has no training window; upload it with trained_from and trained_until.")
            start, end = window[0], window[1]
        total, gaps = await repository.gaps(
            conn, start=start, end=end, table_name=table_name, series=series, state=state, limit=limit
        )
        coverage = await repository.coverage(conn, start=start, end=end, table_name=table_name)
    return {
        "window_start": start,
        "window_end": end,
        "model_id": model_id,
        "total": total,
        "gaps": gaps,
        "coverage": coverage,
    }


async def start_fill(
    db: Database,
    dagster: DagsterGateway,
    principal: Principal,
    *,
    table_name: str | None,
    partitions: Sequence[str],
    gap_ids: Sequence[UUID],
) -> dict[str, Any]:
    """Write a fill down and launch it.

    Raises:
        NotFound: an unknown gap. Invalid: gaps of several tables, or none that can be filled, or partitions Dagster
            does not know. Conflict: a fill of one of the partitions is under way; ``fill_id`` names it.
    """
    async with principal.scope(db) as conn:
        if gap_ids:
            table_name, partitions = _of_gaps(await repository.gaps_by_id(conn, gap_ids), gap_ids)
        assert table_name is not None
        _check_keys(table_name, partitions)
        if running := await repository.active_overlap(conn, table_name, partitions):
            raise Conflict("A fill of one of these partitions is under way.", code="fill_running", fill_id=str(running))
        fill_id = await repository.create_fill(
            conn, requested_by=principal.actor, table_name=table_name, partitions=sorted(set(partitions))
        )
        await audit.record(
            conn,
            customer_id=None,
            actor=principal.actor,
            action="gap_fill.requested",
            subject=str(fill_id),
            detail={"table_name": table_name, "partitions": len(set(partitions))},
        )
    await _launch(db, dagster, principal, fill_id, table_name, partitions)
    return await get_fill(db, dagster, principal, fill_id)


def _of_gaps(gaps: Sequence[dict[str, Any]], asked: Sequence[UUID]) -> tuple[str, list[str]]:
    if len(gaps) != len(set(asked)):
        raise NotFound("gap")
    tables = {gap["table_name"] for gap in gaps}
    if len(tables) > 1:
        raise Invalid(f"gap_ids: the gaps are of several tables ({', '.join(sorted(tables))}); fill each by itself.")
    fillable = [gap for gap in gaps if gap["state"] != "filled"]
    if not fillable:
        raise Invalid("gap_ids: all these gaps are filled already.")
    return tables.pop(), sorted({gap["partition_key"] for gap in fillable})


def _check_keys(table_name: str, partitions: Sequence[str]) -> None:
    by_region = table_name == "spot_prices"
    for key in partitions:
        day, separator, region = key.partition("|")
        try:
            date.fromisoformat(day)
        except ValueError:
            raise Invalid(f"partitions: {key!r} does not begin with a date like 2026-11-20.") from None
        if by_region != bool(separator and region):
            form = "2026-11-20|us-east-1" if by_region else "2026-11-20"
            raise Invalid(f"partitions: {key!r} is no partition of {table_name}; they look like {form}.")


async def _launch(
    db: Database,
    dagster: DagsterGateway,
    principal: Principal,
    fill_id: UUID,
    table_name: str,
    partitions: Sequence[str],
) -> None:
    """Send a fill to Dagster, unless an earlier try of this fill got there.

    Raises:
        Invalid: Dagster refused, e.g. it does not know a partition; the fill is failed.
        Unavailable: no answer; the fill stays requested and is launched when it is asked about next.
    """
    tags = {FILL_TAG: str(fill_id), REQUESTED_BY_TAG: principal.actor}
    work = plan(partitions)
    try:
        run_id = backfill_id = None
        if work.first is not None and work.last is not None:
            run_id = await dagster.launch_range(f"fill_{table_name}", work.first, work.last, tags)
        else:
            title = f"Fill {len(work.partitions)} partitions of {table_name}"
            backfill_id = await dagster.launch_backfill(table_name, work.partitions, title, tags)
    except DagsterUnreachable as error:
        raise Unavailable(f"{error}. The request {fill_id} is written down; ask for it again to launch it.") from error
    except DagsterError as error:
        async with principal.scope(db) as conn:
            await repository.close(conn, fill_id, "failed", str(error))
        raise Invalid(f"Dagster refused the partitions: {error}") from error
    async with principal.scope(db) as conn:
        await repository.launched(conn, fill_id, run_id=run_id, backfill_id=backfill_id)


async def get_fill(db: Database, dagster: DagsterGateway, principal: Principal, fill_id: UUID) -> dict[str, Any]:
    """How a fill stands. Level-triggered: whatever was cut short is noticed and taken further here.

    Raises:
        NotFound: no such fill.
    """
    row = await _row(db, principal, fill_id)
    work: Work | None = None
    if row["state"] in ("requested", "running"):
        row, work = await _advance(db, dagster, principal, row)
    async with principal.scope(db) as conn:
        left = await repository.gaps_of_fill(conn, fill_id, GAPS_SHOWN)
    return _shown(row, work, left, dagster.url)


async def _row(db: Database, principal: Principal, fill_id: UUID) -> dict[str, Any]:
    async with principal.scope(db) as conn:
        row = await repository.fill(conn, fill_id)
    if row is None:
        raise NotFound("fill")
    return row


async def _advance(
    db: Database, dagster: DagsterGateway, principal: Principal, row: dict[str, Any]
) -> tuple[dict[str, Any], Work | None]:
    fill_id = row["id"]
    try:
        if not (row["dagster_run_id"] or row["dagster_backfill_id"]):
            found = await dagster.find(FILL_TAG, str(fill_id))
            if found.run_id or found.backfill_id:
                async with principal.scope(db) as conn:
                    await repository.launched(conn, fill_id, run_id=found.run_id, backfill_id=found.backfill_id)
            elif row["remaining"]:
                await _launch(db, dagster, principal, fill_id, row["table_name"], row["remaining"])
            row = await _row(db, principal, fill_id)
        work = await _work(dagster, row)
    except DagsterUnreachable:
        return row, None  # our own record stands; Dagster is asked again next time
    # Read after Dagster was asked: what it calls finished is written by now.
    row = await _row(db, principal, fill_id)
    if row["state"] in ("requested", "running") and (end := verdict(len(row["remaining"]), work)):
        async with principal.scope(db) as conn:
            await repository.close(conn, fill_id, *end)
        row = await _row(db, principal, fill_id)
    return row, work


async def _work(dagster: DagsterGateway, row: dict[str, Any]) -> Work | None:
    if row["dagster_backfill_id"]:
        return await dagster.backfill(row["dagster_backfill_id"])
    if row["dagster_run_id"]:
        return await dagster.run(row["dagster_run_id"])
    return None


def _shown(row: dict[str, Any], work: Work | None, left: list[dict[str, Any]], dagster_url: str) -> dict[str, Any]:
    done = len(row["partitions"]) - len(row["remaining"])
    url = None
    if row["dagster_backfill_id"]:
        url = f"{dagster_url}/runs/b/{row['dagster_backfill_id']}"
    elif row["dagster_run_id"]:
        url = f"{dagster_url}/runs/{row['dagster_run_id']}"
    return {
        "fill_id": row["id"],
        "table_name": row["table_name"],
        "state": row["state"],
        "requested_by": row["requested_by"],
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
        "seconds": round(((row["finished_at"] or row["read_at"]) - row["created_at"]).total_seconds(), 3),
        "partitions": len(row["partitions"]),
        "partitions_done": done,
        "records_filled": row["records_filled"],
        "sources_used": row["sources_used"],
        "dagster_run_id": row["dagster_run_id"],
        "dagster_backfill_id": row["dagster_backfill_id"],
        "dagster_url": url,
        "runs": dict(work.runs) if work else {},
        "error": row["error"],
        "gaps_left": left,
    }


async def list_fills(db: Database, principal: Principal, *, limit: int) -> list[dict[str, Any]]:
    """The newest fills."""
    async with principal.scope(db) as conn:
        return await repository.fills(conn, limit)


async def resume_fill(db: Database, dagster: DagsterGateway, principal: Principal, fill_id: UUID) -> dict[str, Any]:
    """Take up a failed or cancelled fill again, with the partitions that are still missing.

    Raises:
        NotFound: no such fill. Conflict: it is under way, or done.
    """
    async with principal.scope(db) as conn:
        row = await repository.fill(conn, fill_id)
        if row is None:
            raise NotFound("fill")
        if not row["remaining"] or not await repository.reopen(conn, fill_id):
            raise Conflict(f"The fill is {row['state']}; only one that failed or was cancelled can be resumed.")
    await _launch(db, dagster, principal, fill_id, row["table_name"], row["remaining"])
    return await get_fill(db, dagster, principal, fill_id)


async def cancel_fill(db: Database, dagster: DagsterGateway, principal: Principal, fill_id: UUID) -> dict[str, Any]:
    """Stop a fill; partitions already written stay. One that ended already is left as it is.

    Raises:
        NotFound: no such fill. Unavailable: Dagster does not answer; nothing was stopped.
    """
    row = await _row(db, principal, fill_id)
    if row["state"] in ("requested", "running"):
        try:
            if row["dagster_backfill_id"]:
                await dagster.cancel_backfill(row["dagster_backfill_id"])
            elif row["dagster_run_id"]:
                await dagster.cancel_run(row["dagster_run_id"])
        except DagsterError as error:
            raise Unavailable(f"{error}; nothing was stopped, try again.") from error
        async with principal.scope(db) as conn:
            await repository.close(conn, fill_id, "cancelled", None)
            await audit.record(
                conn,
                customer_id=None,
                actor=principal.actor,
                action="gap_fill.cancelled",
                subject=str(fill_id),
            )
    return await get_fill(db, dagster, principal, fill_id)


def utcnow() -> datetime:
    """The clock of the endpoints."""
    return datetime.now(UTC)
