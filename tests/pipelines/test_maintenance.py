"""What Postgres forgets, and what it keeps."""

from __future__ import annotations

from datetime import timedelta

from tests.pipelines.conftest import World, add_tenant
from warehouse.postgres.models import InboxMessage


def test_messages_nobody_can_repeat_are_forgotten_and_quarantine_stays(world: World) -> None:
    tenant = add_tenant(world)
    world.insert(
        InboxMessage,
        *(
            {
                "customer_id": tenant.customer_id,
                "source": "sqs",
                "dedupe_key": f"{outcome}-{days}",
                "body_sha256": "x",
                "outcome": outcome,
                "received_at": world.now - timedelta(days=days),
            }
            for outcome in ("handled", "dropped", "quarantined", "waiting")
            for days in (29, 31)
        ),
    )
    world.run_unpartitioned(["inbox_retention"])
    left = {row["dedupe_key"] for row in world.sql("SELECT dedupe_key FROM inbox_messages")}
    assert left == {
        *("handled-29", "dropped-29", "quarantined-29", "waiting-29"),
        *("quarantined-31", "waiting-31"),
    }
