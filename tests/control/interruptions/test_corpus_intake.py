"""The corpus and AWS's own documents through the intake, mixed one to one with good warnings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text

from control.interruptions.service import Received, ingest
from tests.control.interruptions.corpus import INSTANCE, cases
from tests.control.interruptions.tenants import Tenant, create_tenant
from warehouse.contracts import EventSource
from warehouse.postgres.session import Database

STORED = {"event": "handled", "drop": "dropped", "quarantine": "quarantined"}


@pytest.fixture
async def owner(database_url: str):
    """The customer the corpus was written for: its account, region and node."""
    db = Database(database_url)
    tenant = await create_tenant(db)
    async with db.system() as conn:
        await conn.execute(
            text("UPDATE customers SET aws_account_id = '123456789012' WHERE id = :id"), {"id": tenant.customer_id}
        )
    tenant.account_id = "123456789012"
    await tenant.node(INSTANCE)
    yield tenant
    await db.close()


async def test_every_case_ends_as_expected_and_disturbs_no_good_neighbour(owner: Tenant) -> None:
    wrong: list[str] = []
    facts = await owner.facts()
    for case in cases():
        # Cases are alternatives about one instance; each starts from the same state.
        for table in ("interruptions", "agent_tasks", "launch_intents", "spot_events", "inbox_messages"):
            await owner.rows(f"DELETE FROM {table} WHERE customer_id = :customer_id RETURNING 1")
        await owner.rows("UPDATE nodes SET terminated_at = NULL, status = 'ready', last_seen_at = now() RETURNING 1")
        good = await owner.node()
        batch = [
            Received(case.body, EventSource.PUSH),
            Received(json.dumps(owner.warning(good)), EventSource.SQS),
        ]
        done = await ingest(owner.db, facts, batch)
        outcome = await owner.row("SELECT outcome FROM inbox_messages WHERE source = 'push'")
        expected = case.expect.get("end_to_end") or STORED[case.expect["outcome"]]
        drained = await owner.rows(
            "SELECT 1 FROM agent_tasks WHERE parameters ->> 'instance_id' = :good AND state = 'queued'", good=good
        )
        if outcome.outcome != expected or not drained or done.new != 2:
            wrong.append(f"{case.name}: {outcome.outcome}, expected {expected}; neighbour drained: {bool(drained)}")
    assert not wrong


async def test_documents_of_aws_with_their_placeholders(owner: Tenant, shared_data: Path) -> None:
    """As they are, the two with placeholder accounts go to quarantine; with the account filled in, each is taken in."""
    documents = {
        path.name: json.loads(path.read_text())["event"] for path in sorted((shared_data / "events").glob("*.1.json"))
    }
    assert len(documents) == 5
    facts = await owner.facts()
    outcomes: dict[str, str] = {}
    for name, event in documents.items():
        await ingest(owner.db, facts, [Received(json.dumps(event), EventSource.SQS)])
        row = await owner.row("SELECT outcome, reason FROM inbox_messages ORDER BY received_at DESC LIMIT 1")
        outcomes[name] = f"{row.outcome}: {row.reason}" if row.outcome == "quarantined" else row.outcome
    assert {name.split(".")[0]: outcome.split(":")[0] for name, outcome in outcomes.items()} == {
        "aws-health-event": "quarantined",
        "ec2-instance-rebalance-recommendation": "handled",
        # A state of "pending" is nobody's business here.
        "ec2-instance-state-change-notification": "dropped",
        "ec2-instance-terminate-lifecycle-action": "waiting",
        "ec2-spot-instance-interruption-warning": "quarantined",
    }
    assert "account_malformed" in outcomes["ec2-spot-instance-interruption-warning.1.json"]

    # 1970 and an unknown instance are kept as they are; only the account is ours now.
    for name in ("ec2-spot-instance-interruption-warning.1.json", "aws-health-event.1.json"):
        filled = documents[name] | {"account": "123456789012", "id": f"filled-{name}"}
        await ingest(owner.db, facts, [Received(json.dumps(filled), EventSource.SQS)])
    warning = await owner.row("SELECT * FROM interruptions WHERE instance_id = :i", i=INSTANCE)
    assert (warning.state, warning.kind) == ("open", "spot_interruption")
    task = await owner.row("SELECT * FROM agent_tasks WHERE interruption_id = :id", id=warning.id)
    left = await owner.row("SELECT deadline_at > now() + interval '100 s' AS ok FROM agent_tasks")
    assert (task.parameters["instance_id"], left.ok) == (INSTANCE, True)
    waiting = await owner.row("SELECT * FROM interruptions WHERE instance_id = 'i-12345678'")
    assert (waiting.state, waiting.kind) == ("unmatched", "scheduled_change")


async def test_the_lambda_envelope_of_a_queue_is_quarantined_not_taken_apart(owner: Tenant, shared_data: Path) -> None:
    body = (shared_data / "events" / "sqs_lambda_envelope.template.json").read_text()
    done = await ingest(owner.db, await owner.facts(), [Received(body, EventSource.SQS)])
    assert done.quarantined == 1
