"""From a message on SQS to a drained node and a Ready replacement, with real worker processes."""

from __future__ import annotations

from tests.control.interruptions.harness import Stage


async def test_a_warning_is_drained_and_replaced(stage: Stage) -> None:
    (instance,) = await stage.launch_nodes()
    stage.start_worker()
    stage.aws.send_event(stage.queue, stage.tenant.warning(instance))
    (interruption,) = await stage.closed(1)
    assert (interruption.outcome, interruption.reason) == ("handled", None)
    (replacement,) = stage.ours()
    pool = (replacement.instance_type, replacement.zone_name)
    assert pool != ("m5.large", stage.zone_of(instance))
    assert replacement.tags["cloudoptim:tenant"] == str(stage.tenant.customer_id)
    assert replacement.tags["kubernetes.io/cluster/one"] == "owned"
    event = await stage.tenant.row("SELECT * FROM spot_events WHERE customer_id = :customer_id")
    assert event.replacement_instance_id == replacement.instance_id

    async def deleted() -> bool:
        return stage.aws.queue_depth(stage.queue) == (0, 0)

    await stage.until(deleted)


async def test_a_hook_and_every_loop_of_a_worker_beside_it(stage: Stage) -> None:
    (instance,) = await stage.launch_nodes()
    stage.start_worker()
    action = stage.aws.begin_lifecycle_action(instance)
    (interruption,) = await stage.closed(1)
    assert interruption.outcome == "handled"

    async def answered() -> bool:
        return action.result is not None

    await stage.until(answered)
    assert (action.result, stage.ours()) == ("CONTINUE", [])

    async def judged() -> bool:
        rows = await stage.tenant.rows("SELECT 1 FROM round_claims WHERE name LIKE 'returns:%' AND rounds > 0")
        return bool(rows)

    await stage.until(judged)
    assert "loop_failed" not in stage.logs()
    assert "plan_failed" not in stage.logs()
