"""SQL of the launch branch: intents, batches, attempts, clusters and templates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control.interruptions.repository import insert_rows, to_json
from control.interruptions.states import LAUNCH_WINDOW

# A launch worker that dies is replaced after this long and the next look, within 20 s together (RELIABILITY R-08); one
# that lives says so while it works.
LEASE_SECONDS = 15
HEARTBEAT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class IntentRow:
    """A launch intent as claimed."""

    id: UUID
    customer_id: UUID
    cluster_id: UUID
    interruption_id: UUID | None
    requirements: dict[str, Any]
    state: str
    reason: str | None
    deadline_at: datetime
    created_at: datetime
    version: int
    lease_epoch: int


_INTENT_COLUMNS = """i.id, i.customer_id, i.cluster_id, i.interruption_id, i.requirements, i.state, i.reason,
    i.deadline_at, i.created_at, i.version, i.lease_epoch"""

# After an outage most nodes are gone: the replacement of one that still has its two minutes helps more.
_MOST_URGENT = "i.deadline_at <= now() + make_interval(secs => :window_seconds), i.deadline_at, i.id"
_CLAIM_INTENTS = text(f"""
    WITH due AS (
        SELECT id FROM launch_intents i
        WHERE state IN ('planned', 'blocked') AND next_action_at <= now()
          AND (lease_until IS NULL OR lease_until <= now())
        ORDER BY {_MOST_URGENT} LIMIT :limit FOR UPDATE SKIP LOCKED
    ), claimed AS (
        UPDATE launch_intents i
        SET leased_by = :worker, lease_epoch = i.lease_epoch + 1,
            lease_until = now() + make_interval(secs => :lease_seconds)
        FROM due WHERE i.id = due.id
        RETURNING {_INTENT_COLUMNS}
    )
    SELECT * FROM claimed i ORDER BY {_MOST_URGENT}
""")


async def claim_intents(conn: AsyncConnection, *, worker: str, limit: int) -> list[IntentRow]:
    """Intents that want an attempt now, leased to this worker: earliest deadline first, those of nodes that are gone
    after all others."""
    values = {
        "worker": worker,
        "limit": limit,
        "lease_seconds": LEASE_SECONDS,
        "window_seconds": LAUNCH_WINDOW.total_seconds(),
    }
    return [IntentRow(**row._mapping) for row in await conn.execute(_CLAIM_INTENTS, values)]


_LOCK_INTENTS = text(f"""
    SELECT {_INTENT_COLUMNS} FROM launch_intents i WHERE i.id = ANY(:ids) ORDER BY i.id FOR UPDATE
""")


async def lock_intents(conn: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, IntentRow]:
    """Intents under a row lock, in id order."""
    result = await conn.execute(_LOCK_INTENTS, {"ids": list(ids)})
    return {row.id: IntentRow(**row._mapping) for row in result}


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """A launch attempt."""

    id: UUID
    customer_id: UUID
    intent_id: UUID
    attempt_no: int
    batch_id: UUID
    slot: int
    instance_type: str
    availability_zone: str
    node_type: str
    price_usd_per_hour: float | None
    state: str
    instance_id: str | None
    failure: str | None
    launched_at: datetime | None


_ATTEMPTS = text("""
    SELECT id, customer_id, intent_id, attempt_no, batch_id, slot, instance_type, availability_zone, node_type,
           CAST(price_usd_per_hour AS double precision) AS price_usd_per_hour, state, instance_id, failure, launched_at
    FROM launch_attempts WHERE intent_id = ANY(:ids) ORDER BY intent_id, attempt_no
""")


async def attempts_of(conn: AsyncConnection, intent_ids: Sequence[UUID]) -> dict[UUID, list[AttemptRow]]:
    """All attempts of intents, oldest first."""
    found: dict[UUID, list[AttemptRow]] = {intent_id: [] for intent_id in intent_ids}
    for row in await conn.execute(_ATTEMPTS, {"ids": list(intent_ids)}):
        found[row.intent_id].append(AttemptRow(**row._mapping))
    return found


_UPDATE_INTENTS = text("""
    UPDATE launch_intents i SET state = r.state, reason = r.reason, decided_by = coalesce(r.decided_by, i.decided_by),
        next_action_at = coalesce(r.next_action_at, i.next_action_at), lease_until = NULL, leased_by = NULL,
        version = i.version + 1
    FROM jsonb_populate_recordset(CAST(NULL AS launch_intents), CAST(:rows AS jsonb)) r
    WHERE i.id = r.id AND i.version = r.version
    RETURNING i.id
""")


async def update_intents(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> set[UUID]:
    """Move intents on from ``version``; returns those that were still there."""
    if not rows:
        return set()
    return {row.id for row in await conn.execute(_UPDATE_INTENTS, {"rows": to_json(rows)})}


_UPDATE_ATTEMPTS = text("""
    UPDATE launch_attempts a SET state = r.state, instance_id = r.instance_id, failure = r.failure,
        -- From the moment we know of an instance it bills, also when nobody wants it any more.
        launched_at = CASE WHEN r.instance_id IS NOT NULL THEN coalesce(a.launched_at, now()) ELSE a.launched_at END,
        ready_at = CASE WHEN r.state = 'ready' THEN coalesce(a.ready_at, r.ready_at, now()) ELSE a.ready_at END,
        ended_at = CASE WHEN r.state IN ('failed', 'terminated', 'abandoned') THEN coalesce(a.ended_at, now())
                        ELSE a.ended_at END,
        version = a.version + 1
    FROM jsonb_populate_recordset(CAST(NULL AS launch_attempts), CAST(:rows AS jsonb)) r
    WHERE a.id = r.id
""")


async def update_attempts(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Move attempts; their intents are locked by the caller, so nobody else can."""
    if rows:
        await conn.execute(_UPDATE_ATTEMPTS, {"rows": to_json(rows)})


async def insert_batches(
    conn: AsyncConnection, batches: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]
) -> None:
    """Frozen calls and the attempts in their slots, before anything is sent to EC2."""
    await insert_rows(conn, "launch_batches", batches, order="id")
    await insert_rows(conn, "launch_attempts", attempts, order="intent_id")


_RELEASE_INTENTS = text("""
    UPDATE launch_intents i SET lease_until = NULL, leased_by = NULL, reason = coalesce(:reason, i.reason),
        next_action_at = now() + make_interval(secs => :seconds)
    WHERE i.id = ANY(:ids) AND i.leased_by = :worker
""")


async def postpone_intents(
    conn: AsyncConnection, ids: Sequence[UUID], *, worker: str, seconds: float, reason: str | None = None
) -> None:
    """Give claimed intents back, to be looked at again after ``seconds``."""
    await conn.execute(_RELEASE_INTENTS, {"ids": list(ids), "worker": worker, "seconds": seconds, "reason": reason})


_KEEP_INTENTS = text("""
    UPDATE launch_intents SET lease_until = now() + make_interval(secs => :lease_seconds)
    WHERE id = ANY(:ids) AND leased_by = :worker AND lease_until IS NOT NULL AND state IN ('planned', 'blocked')
""")
_KEEP_BATCH = text("""
    UPDATE launch_batches SET lease_until = now() + make_interval(secs => :lease_seconds)
    WHERE id = :id AND lease_epoch = :lease_epoch AND lease_until IS NOT NULL AND state IN ('calling', 'unknown')
""")


async def keep_intents(conn: AsyncConnection, ids: Sequence[UUID], *, worker: str) -> bool:
    """A heartbeat: claimed intents stay this worker's for another lease; False when none of them is any more."""
    result = await conn.execute(_KEEP_INTENTS, {"ids": list(ids), "worker": worker, "lease_seconds": LEASE_SECONDS})
    return result.rowcount > 0


async def keep_batch(conn: AsyncConnection, batch: BatchRow) -> bool:
    """A heartbeat: a call under way stays its holder's for another lease; False when it is somebody else's."""
    result = await conn.execute(
        _KEEP_BATCH, {"id": batch.id, "lease_epoch": batch.lease_epoch, "lease_seconds": LEASE_SECONDS}
    )
    return result.rowcount > 0


_RELEASE_ALL = text("""
    WITH intents AS (
        UPDATE launch_intents SET lease_until = NULL, leased_by = NULL
        WHERE leased_by = :worker AND state IN ('planned', 'blocked') RETURNING 1
    ), batches AS (
        UPDATE launch_batches SET lease_until = NULL, leased_by = NULL, next_action_at = now()
        WHERE leased_by = :worker AND state IN ('calling', 'unknown') RETURNING 1
    )
    SELECT (SELECT count(*) FROM intents) AS intents, (SELECT count(*) FROM batches) AS batches
""")


async def release_leases(conn: AsyncConnection, worker: str) -> int:
    """Give back all that a worker which is leaving still holds, due at once; returns how many leases."""
    released = (await conn.execute(_RELEASE_ALL, {"worker": worker})).one()
    return released.intents + released.batches


# --- batches


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One frozen RunInstances call."""

    id: UUID
    customer_id: UUID
    cluster_id: UUID
    region: str
    client_token: str
    request_json: str
    size: int
    state: str
    calls: int
    first_called_at: datetime | None
    created_at: datetime
    lease_epoch: int
    error_code: str | None = None


_BATCH_COLUMNS = """b.id, b.customer_id, b.cluster_id, b.region, b.client_token, b.request_json, b.size, b.state,
    b.calls, b.first_called_at, b.created_at, b.lease_epoch, b.error_code"""

# One customer's calls must not keep another's waiting: each customer's longest due comes first.
_CLAIM_BATCHES = text(f"""
    WITH ranked AS (
        SELECT id, row_number() OVER (PARTITION BY customer_id ORDER BY next_action_at, id) AS place
        FROM launch_batches
        WHERE state IN ('calling', 'unknown') AND next_action_at <= now()
          AND (lease_until IS NULL OR lease_until <= now())
    ), due AS (
        SELECT b.id FROM launch_batches b JOIN ranked USING (id)
        WHERE b.state IN ('calling', 'unknown') AND b.next_action_at <= now()
          AND (b.lease_until IS NULL OR b.lease_until <= now())
        ORDER BY ranked.place, b.next_action_at LIMIT :limit FOR UPDATE OF b SKIP LOCKED
    )
    UPDATE launch_batches b
    SET leased_by = :worker, lease_epoch = b.lease_epoch + 1,
        next_action_at = now() + make_interval(secs => :lease_seconds),
        lease_until = now() + make_interval(secs => :lease_seconds)
    FROM due WHERE b.id = due.id
    RETURNING {_BATCH_COLUMNS}
""")


async def claim_batches(conn: AsyncConnection, *, worker: str, limit: int) -> list[BatchRow]:
    """Calls whose outcome nobody knows and nobody is making."""
    result = await conn.execute(_CLAIM_BATCHES, {"worker": worker, "limit": limit, "lease_seconds": LEASE_SECONDS})
    return [BatchRow(**row._mapping) for row in result]


_LOCK_BATCH = text(f"SELECT {_BATCH_COLUMNS} FROM launch_batches b WHERE b.id = :id FOR UPDATE")
_SLOTS = text("""
    SELECT id, customer_id, intent_id, attempt_no, batch_id, slot, instance_type, availability_zone, node_type,
           CAST(price_usd_per_hour AS double precision) AS price_usd_per_hour, state, instance_id, failure, launched_at
    FROM launch_attempts WHERE batch_id = :id ORDER BY slot
""")


async def lock_batch(conn: AsyncConnection, batch_id: UUID) -> tuple[BatchRow, list[AttemptRow]] | None:
    """A batch and its slots, locked."""
    row = (await conn.execute(_LOCK_BATCH, {"id": batch_id})).one_or_none()
    if row is None:
        return None
    slots = [AttemptRow(**slot._mapping) for slot in await conn.execute(_SLOTS, {"id": batch_id})]
    return BatchRow(**row._mapping), slots


_CALLED = text("""
    UPDATE launch_batches SET calls = calls + 1, first_called_at = coalesce(first_called_at, now())
    WHERE id = :id AND state IN ('calling', 'unknown') AND lease_epoch = :lease_epoch
    RETURNING calls
""")


async def note_call(conn: AsyncConnection, batch: BatchRow) -> int:
    """Count a call before it is made; returns which one it is (from 1), or 0 when the batch is not ours any more."""
    result = await conn.execute(_CALLED, {"id": batch.id, "lease_epoch": batch.lease_epoch})
    return result.scalar_one_or_none() or 0


_UPDATE_BATCH = text("""
    UPDATE launch_batches SET state = :state, error_code = :error_code, error_message = :error_message,
        lease_until = NULL, leased_by = NULL, version = version + 1,
        next_action_at = now() + make_interval(secs => :seconds)
    WHERE id = :id
""")


async def update_batch(
    conn: AsyncConnection,
    batch_id: UUID,
    *,
    state: str,
    error_code: str | None = None,
    error_message: str | None = None,
    retry_seconds: float = 0.0,
) -> None:
    """Record what became of a call; ``retry_seconds`` until an unknown one is repeated."""
    await conn.execute(
        _UPDATE_BATCH,
        {
            "id": batch_id,
            "state": state,
            "error_code": error_code,
            "error_message": error_message,
            "seconds": retry_seconds,
        },
    )


# --- what a choice reads


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What launching for a cluster needs."""

    customer_id: UUID
    cluster_id: UUID
    cluster_name: str
    region: str
    status: str
    customer_status: str
    stopped: bool
    role_arn: str | None
    external_id: str
    account_id: str | None
    config: dict[str, Any]
    recent_replacements_interrupted: int

    @property
    def leaving(self) -> bool:
        """Whether nothing is launched here any more, and no agent will say what becomes of its nodes."""
        return self.status == "deleted" or self.customer_status in ("offboarding", "offboarded")


_CLUSTERS = text("""
    SELECT c.customer_id, c.id AS cluster_id, c.cluster_name, c.region, c.status, m.status AS customer_status,
           c.kill_switch OR m.kill_switch AS stopped, m.aws_role_arn AS role_arn,
           CAST(m.external_id AS text) AS external_id, m.aws_account_id AS account_id,
           coalesce((SELECT jsonb_object_agg(k.config_key, k.config_value) FROM customer_config k
                     WHERE k.customer_id = m.id), CAST('{}' AS jsonb)) AS config,
           (SELECT count(*) FROM interruptions n JOIN launch_attempts a
                ON a.customer_id = n.customer_id AND a.instance_id = n.instance_id
            WHERE n.customer_id = c.customer_id AND n.cluster_id = c.id
              AND n.received_at > now() - interval '10 minutes') AS recent_replacements_interrupted
    FROM clusters c JOIN customers m ON m.id = c.customer_id
    WHERE c.id = ANY(:ids)
""")


async def cluster_facts(conn: AsyncConnection, cluster_ids: Sequence[UUID]) -> dict[UUID, ClusterFacts]:
    """Facts of clusters, by id."""
    result = await conn.execute(_CLUSTERS, {"ids": list(cluster_ids)})
    return {row.cluster_id: ClusterFacts(**row._mapping) for row in result}


_LOCK_LAUNCHES = text("SELECT pg_advisory_xact_lock(hashtextextended('cloudoptim.launches:' || :customer_id, 0))")


async def lock_launches(conn: AsyncConnection, customer_id: UUID) -> None:
    """Nobody else commits launches of this customer until this transaction ends."""
    await conn.execute(_LOCK_LAUNCHES, {"customer_id": str(customer_id)})


@dataclass(frozen=True, slots=True)
class RecentLaunches:
    """A customer's launches of the last hour, unanswered ones included, and the pace of its calls."""

    launches_last_hour: int
    spend_last_hour_usd: float
    calls_last_minute: int
    seconds_since_last_call: float | None


_RECENT = text("""
    WITH known AS (
        SELECT count(*) AS launches, coalesce(sum(price_usd_per_hour), 0) AS usd FROM launch_attempts
        WHERE customer_id = :customer_id AND created_at > now() - interval '1 hour' AND instance_id IS NOT NULL
    ), unanswered AS (
        SELECT count(*) AS launches, coalesce(sum(a.price_usd_per_hour), 0) AS usd
        FROM launch_batches b JOIN launch_attempts a ON a.batch_id = b.id
        WHERE b.customer_id = :customer_id AND b.state IN ('calling', 'unknown') AND a.instance_id IS NULL
          AND a.state IN ('calling', 'unknown')
    ), calls AS (
        SELECT count(*) FILTER (WHERE region = :region) AS calls,
               CAST(extract(epoch FROM now() - max(created_at) FILTER (WHERE cluster_id = :cluster_id))
                    AS double precision) AS seconds
        FROM launch_batches WHERE customer_id = :customer_id AND created_at > now() - interval '1 minute'
    )
    SELECT known.launches + unanswered.launches AS launches_last_hour,
           CAST(known.usd + unanswered.usd AS double precision) AS spend_last_hour_usd,
           calls.calls AS calls_last_minute, calls.seconds AS seconds_since_last_call
    FROM known, unanswered, calls
""")


async def recent_launches(conn: AsyncConnection, customer_id: UUID, region: str, cluster_id: UUID) -> RecentLaunches:
    """What a customer launched lately, for its caps; and how fast this cluster's account is calling."""
    values = {"customer_id": customer_id, "region": region, "cluster_id": cluster_id}
    return RecentLaunches(**(await conn.execute(_RECENT, values)).one()._mapping)


# --- templates

# Instance ids kept with a template, the newest.
KEPT_INSTANCES = 5000
_TEMPLATES = text("""
    SELECT id, cluster_id, fingerprint, template, instance_ids FROM launch_templates
    WHERE cluster_id = :cluster_id ORDER BY seen_at DESC
""")


async def templates(conn: AsyncConnection, cluster_id: UUID) -> list[tuple[dict[str, Any], list[str]]]:
    """A cluster's templates, newest first, each with the instances it was seen on."""
    result = await conn.execute(_TEMPLATES, {"cluster_id": cluster_id})
    return [(row.template, row.instance_ids) for row in result]


_BY_TYPE = text("""
    SELECT DISTINCT ON (n.instance_type) n.instance_type, t.template
    FROM launch_templates t JOIN nodes n ON n.cluster_id = t.cluster_id AND n.instance_id = ANY(t.instance_ids)
    WHERE t.cluster_id = :cluster_id AND n.instance_type = ANY(:types)
    ORDER BY n.instance_type, n.last_seen_at DESC, t.seen_at DESC
""")


async def templates_by_type(
    conn: AsyncConnection, cluster_id: UUID, types: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The template of the node of each of these types that was seen last in a cluster."""
    result = await conn.execute(_BY_TYPE, {"cluster_id": cluster_id, "types": list(types)})
    return {row.instance_type: row.template for row in result}


async def save_templates(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep what was derived from running instances."""
    await insert_rows(
        conn,
        "launch_templates",
        rows,
        order="fingerprint",
        conflict="(cluster_id, fingerprint) DO UPDATE SET template = excluded.template, seen_at = now(), "
        # Those seen last, which are more than any group has nodes.
        "instance_ids = ARRAY(SELECT id FROM unnest(excluded.instance_ids || launch_templates.instance_ids) "
        f"WITH ORDINALITY AS seen (id, place) GROUP BY id ORDER BY min(place) LIMIT {KEPT_INSTANCES})",
    )


_LIVING = text("""
    SELECT instance_id FROM nodes WHERE cluster_id = :cluster_id AND terminated_at IS NULL
    ORDER BY last_seen_at DESC LIMIT :limit
""")


async def living_instances(conn: AsyncConnection, cluster_id: UUID, *, limit: int) -> list[str]:
    """Instances of a cluster's living nodes, those seen last first."""
    result = await conn.execute(_LIVING, {"cluster_id": cluster_id, "limit": limit})
    return [row.instance_id for row in result]
