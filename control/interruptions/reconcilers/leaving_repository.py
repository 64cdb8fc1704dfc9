"""SQL of customers and clusters that leave."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_GONE = "(c.status = 'deleted' OR m.status IN ('offboarding', 'offboarded'))"

_UNWANTED = text(f"""
    SELECT l.id FROM launch_intents l
    JOIN clusters c ON c.id = l.cluster_id JOIN customers m ON m.id = l.customer_id
    WHERE l.state IN ('planned', 'launching', 'launched', 'blocked') AND {_GONE}
    ORDER BY l.id LIMIT :limit
""")


async def unwanted_intents(conn: AsyncConnection, *, limit: int) -> list[UUID]:
    """Launches for clusters that were deleted, or for customers that leave."""
    return list((await conn.execute(_UNWANTED, {"limit": limit})).scalars())


_STOP_PLANS = text(f"""
    WITH plan AS (
        UPDATE optimization_history p SET stop_requested_at = now(), version = p.version + 1
        FROM clusters c, customers m
        WHERE c.id = p.cluster_id AND m.id = p.customer_id AND {_GONE}
          AND p.status IN ('running', 'compensating') AND p.stop_requested_at IS NULL
        RETURNING p.customer_id, p.id, p.version, p.status
    )
    INSERT INTO plan_history (customer_id, plan_id, version, event, status, detail)
    SELECT customer_id, id, version, 'stop_requested', status, '{{}}' FROM plan
""")


async def stop_plans(conn: AsyncConnection) -> None:
    """Plans there are to end where they are."""
    await conn.execute(_STOP_PLANS)


_LEAVING = text("SELECT id FROM customers WHERE status = 'offboarding' ORDER BY id FOR UPDATE SKIP LOCKED")


async def leaving_customers(conn: AsyncConnection) -> list[UUID]:
    """Customers whose off-boarding was asked for and is not finished; locked."""
    return list((await conn.execute(_LEAVING)).scalars())


@dataclass(frozen=True, slots=True)
class InFlight:
    """What a customer's role is still needed for."""

    unanswered_launches: int
    unfinished_replacements: int
    running_plans: int
    instances: list[str]

    @property
    def nothing(self) -> bool:
        """Whether the role may be given up."""
        return not (self.unanswered_launches or self.unfinished_replacements or self.running_plans or self.instances)

    def as_dict(self) -> dict[str, Any]:
        """For answers and the audit log."""
        return asdict(self)


_IN_FLIGHT = text("""
    SELECT (SELECT count(*) FROM launch_batches b WHERE b.customer_id = :id AND b.state IN ('calling', 'unknown'))
               AS unanswered_launches,
           (SELECT count(*) FROM launch_intents l WHERE l.customer_id = :id
               AND l.state IN ('launching', 'launched', 'blocked')) AS unfinished_replacements,
           (SELECT count(*) FROM optimization_history p WHERE p.customer_id = :id
               AND p.status IN ('running', 'compensating')) AS running_plans,
           ARRAY(SELECT instance_id FROM launch_attempts a WHERE a.customer_id = :id
                 AND a.state IN ('launched', 'adopted', 'terminating') AND a.instance_id IS NOT NULL
                 UNION SELECT instance_id FROM refused_endings r WHERE r.customer_id = :id ORDER BY 1) AS instances
""")


async def in_flight(conn: AsyncConnection, customer_id: UUID) -> InFlight:
    """What has to end before a customer's role is given up. What is only planned is cancelled without it."""
    return InFlight(**(await conn.execute(_IN_FLIGHT, {"id": customer_id})).one()._mapping)


# Calls, intents, attempts: the order in which an answer that comes meanwhile takes them.
_GIVE_UP = (
    text("""
        UPDATE customers SET status = 'offboarded', aws_role_arn = NULL, sqs_queue_url = NULL, aws_account_id = NULL,
            data_key = NULL
        WHERE id = :id AND status <> 'offboarded'
    """),
    # Without a role there is nothing to ask, now or later.
    text("DELETE FROM refused_endings WHERE customer_id = :id"),
    text("""
        UPDATE launch_batches SET state = 'abandoned', version = version + 1, lease_until = NULL, leased_by = NULL
        WHERE customer_id = :id AND state IN ('calling', 'unknown')
    """),
    text("""
        UPDATE launch_intents SET state = 'cancelled', reason = 'customer off-boarded', version = version + 1,
            lease_until = NULL, leased_by = NULL
        WHERE customer_id = :id AND state IN ('planned', 'launching', 'launched', 'blocked')
    """),
    text("""
        UPDATE launch_attempts SET state = 'abandoned', ended_at = now(), version = version + 1,
            failure = 'the customer was off-boarded before it could be ended'
        WHERE customer_id = :id AND state IN ('terminating', 'unknown', 'calling', 'launched', 'adopted')
    """),
    text("""
        UPDATE lifecycle_actions SET state = 'left', ended_at = now(), reason = 'the customer was off-boarded'
        WHERE customer_id = :id AND state = 'open'
    """),
)


async def give_up_role(conn: AsyncConnection, customer_id: UUID) -> None:
    """The last step: the role is forgotten. What could not be ended until now is marked as left behind."""
    for statement in _GIVE_UP:
        await conn.execute(statement, {"id": customer_id})
