"""What bills and cannot be ended, found or seen is told where people look: the customer's health, with instance ids,
cost and what to do; and it is taken back when it is over.

Level-triggered: every round reads from tables what is wrong now and compares it with what was told. Any worker may do
it, all of them do, and only a difference is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions import intake_repository, metrics
from control.interruptions.reconcilers import alarms_repository, refusals_repository
from control.interruptions.reconcilers.never_ready import NEVER_READY_SECONDS
from control.interruptions.runtime import Runtime
from control.interruptions.states import NEVER_READY

log = structlog.get_logger(__name__)

# A person reacts in minutes; the queries read a few rows through partial indexes.
INTERVAL_SECONDS = 5.0
# As long as a token is repeated; after that only its tag can say whether a launch was carried out.
UNANSWERED_SECONDS = 600.0
# Named one by one; the rest is counted.
NAMED = 20

ENDING, LAUNCHES, NEVER_SEEN, ADOPT_ONLY, ADOPTED = "ending", "launches", "never_ready", "adopt_only", "adopted"
# Why an adopted instance is not ours to end.
_NOT_OURS = {
    "restored": "was launched before the database was restored",
    "node": "was a node of a cluster and has left it",
    "copied": "has our tags from the instance it was copied from, and was not launched by us",
}
REMEDIES = {
    ENDING: (
        "End these instances in the EC2 console, or let us: give the role its trust and permissions back "
        "(POST /customers/{id}/verify shows both and asks again at once), lift the instance's protection, or start the "
        "cluster's agent again where it is away."
    ),
    LAUNCHES: (
        "Give the role its trust and permissions back (POST /customers/{id}/verify shows both); if it stays away, look "
        "in EC2 for instances with the tag cloudoptim:batch named here and end them."
    ),
    NEVER_SEEN: (
        "Start the cluster's agent again, or look whether the instance joined the cluster: end it in the EC2 console "
        "when it did not. It is ended by itself once the agent is heard and does not see it Ready."
    ),
    ADOPT_ONLY: (
        "Compare the adopted instances with the account, end those nobody needs, and lift it: "
        "POST /customers/{id}/adopt-only/lift or `cloudoptim adopt-only --lift`."
    ),
    ADOPTED: (
        "End these instances in the EC2 console when nobody needs them, or take their cloudoptim: tags off; we end "
        "none of them."
    ),
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong: the line that tells it, what it costs, how many instances it is about."""

    line: str
    usd_per_hour: float | None = None
    instances: int = 1


async def run_once(runtime: Runtime) -> int:
    """Tell what is wrong and take back what is over; returns how many (customer, detector) changed."""
    async with runtime.db.system() as conn:
        await refusals_repository.refresh(conn)
        found = await _find(conn)
        told = {(row.customer_id, row.detector): row for row in await alarms_repository.told(conn, list(found))}
        over: dict[str, list[UUID]] = defaultdict(list)
        for customer_id, detector in told:
            if customer_id not in found[detector]:
                over[detector].append(customer_id)
        changed = 0
        for detector, troubles in found.items():
            for customer_id, lines in troubles.items():
                reason, last = reason_of(lines), told.get((customer_id, detector))
                # A person who verified the role made the customer active, and this is still so.
                if last is not None and last.shown and last.reason == reason:
                    continue
                changed += 1
                await intake_repository.mark_degraded(
                    conn,
                    customer_id,
                    detector=detector,
                    reason=reason,
                    remedy=REMEDIES[detector].replace("{id}", str(customer_id)),
                )
                if last is None:
                    metrics.ALARMS.labels(detector).inc()
                log.error("alarm.raised", customer_id=str(customer_id), detector=detector, reason=reason)
        for detector, customers in over.items():
            changed += len(customers)
            await intake_repository.mark_healthy(conn, customers, detector=detector)
            log.info("alarm.over", detector=detector, customer_ids=[str(customer) for customer in customers])
    for detector, troubles in found.items():
        metrics.TROUBLED.labels(detector).set(sum(one.instances for lines in troubles.values() for one in lines))
    return changed


def reason_of(troubles: Iterable[Trouble]) -> str:
    """One text of all of a customer's lines, with the sum of what they cost where it is known."""
    lines = list(troubles)
    cost = sum(trouble.usd_per_hour or 0.0 for trouble in lines)
    more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    bills = f"; together {cost:.4f} USD/h" if cost and len(lines) > 1 else ""
    return "; ".join(trouble.line for trouble in lines[:NAMED]) + more + bills


async def _find(conn: AsyncConnection) -> Mapping[str, Mapping[UUID, list[Trouble]]]:
    found: dict[str, dict[UUID, list[Trouble]]] = {name: defaultdict(list) for name in REMEDIES}
    for row in await alarms_repository.refused_endings(conn):
        line = (
            f"{row.instance_id} ({row.why.replace('_', ' ')}{_usd(row)}) is to end since {_at(row.first_at)} and still "
            f"bills: {row.operation} {row.code}"
        )
        found[ENDING][row.customer_id].append(Trouble(line, row.usd_per_hour))
    for row in await alarms_repository.unanswered_launches(conn, seconds=UNANSWERED_SECONDS):
        line = (
            f"up to {row.instances} instances{_usd(row)} may have been launched in {row.region} at "
            f"{_at(row.first_called_at)} (tag cloudoptim:batch={row.batch_id}), and nobody can say: "
            f"{row.error_code or 'no answer'}"
        )
        found[LAUNCHES][row.customer_id].append(Trouble(line, row.usd_per_hour, row.instances))
    for row in await alarms_repository.blocked_launches(conn):
        line = f"{row.launches} replacements cannot be launched: {row.reason}"
        found[LAUNCHES][row.customer_id].append(Trouble(line, None, row.launches))
    unseen = await alarms_repository.unseen_replacements(conn, seconds=NEVER_READY_SECONDS, never_ready=NEVER_READY)
    for row in unseen:
        line = (
            f"{row.instance_id}{_usd(row)} runs since {_at(row.launched_at)} for cluster {row.cluster_name} and is no "
            f"Ready node; the cluster's agent was last heard {_at(row.last_seen_at) if row.last_seen_at else 'never'}"
        )
        found[NEVER_SEEN][row.customer_id].append(Trouble(line, row.usd_per_hour))
    for row in await alarms_repository.adopt_only_customers(conn):
        line = f"nothing is terminated for this customer: {row.reason}"
        found[ADOPT_ONLY][row.customer_id].append(Trouble(line, None, row.instances))
    for row in await alarms_repository.adopted_outside(conn, seconds=NEVER_READY_SECONDS):
        line = (
            f"{row.instance_id}{_usd(row)} in {row.region} runs since {_at(row.launched_at)} and is no Ready node; it "
            f"{_NOT_OURS[row.reason]}"
        )
        found[ADOPTED][row.customer_id].append(Trouble(line, row.usd_per_hour))
    return found


def _usd(row: Any) -> str:
    return f", {row.usd_per_hour:.4f} USD/h" if row.usd_per_hour is not None else ""


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
