"""Lifecycle hooks of Auto Scaling groups: kept waiting while a node drains or starts, answered when it is done.

A group that ends an instance waits for a hook's answer, by default an hour, and goes on by itself when it gets none.
Heartbeats keep it waiting, at most until the drain's own deadline. What is answered is read from tables, so any worker
may answer; a second answer to the same hook is refused by the group and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

import structlog

from control.gateways.aws import AwsError, Role
from control.interruptions import answers, intake_repository, metrics
from control.interruptions.reconcilers import lifecycle_repository
from control.interruptions.reconcilers.lifecycle_repository import Hook
from control.interruptions.runtime import Runtime
from control.interruptions.states import DRAIN_ENDED

log = structlog.get_logger(__name__)

# The shortest time-out a hook can have is 30 s.
INTERVAL_SECONDS = 2.0
HEARTBEAT_SECONDS = 20.0
LIMIT = 200
# An account that does not answer must not make the heartbeats of others late.
CALL_SECONDS = 5.0
# An instance of nobody's cluster by then is somebody else's affair, and so is its hook.
STRANGER_AFTER = timedelta(minutes=10)
# A node that is not Ready by then will not be: the group's own time-out decides about it.
LAUNCH_GIVE_UP_AFTER = timedelta(minutes=30)
# A refused or failed answer is given again after this long.
REFUSED_SECONDS = 60.0
FAILED_SECONDS = 5.0
REMEDY = "let the role use autoscaling:CompleteLifecycleAction and autoscaling:RecordLifecycleActionHeartbeat"


class Step(StrEnum):
    """What to do about a hook now."""

    WAIT = "wait"
    HEARTBEAT = "heartbeat"
    COMPLETE = "complete"
    LEAVE = "leave"


def judge(hook: Hook, now: datetime) -> tuple[Step, str]:
    """What to do about a hook, and why."""
    age = now - hook.received_at
    due = hook.heartbeat_at is None or (now - hook.heartbeat_at).total_seconds() >= HEARTBEAT_SECONDS
    if hook.transition == "launching":
        if hook.node_status in ("ready", "cordoned"):
            return Step.COMPLETE, "the node is Ready"
        if hook.node_status is None:
            if age >= STRANGER_AFTER:
                return Step.LEAVE, "no cluster has registered the instance"
            return Step.WAIT, "no cluster has registered the instance yet"
        if age >= LAUNCH_GIVE_UP_AFTER:
            return Step.LEAVE, "the node never became Ready"
        return (Step.HEARTBEAT if due else Step.WAIT), "the node is not Ready yet"
    if hook.drain in DRAIN_ENDED:
        return Step.COMPLETE, f"the drain is {hook.drain}"
    if hook.outcome == "unmatched":
        return Step.LEAVE, "no cluster has registered the instance"
    if hook.interruption_state == "unmatched":
        return Step.WAIT, "no cluster has registered the instance yet"
    if hook.interruption_state in (None, "closed") or (hook.drain is None and hook.instance_gone):
        return Step.COMPLETE, "there is nothing to drain"
    return (Step.HEARTBEAT if due else Step.WAIT), "the node is drained"


async def run_once(runtime: Runtime) -> int:
    """Answer the hooks that are due; returns how many were answered or kept waiting."""
    async with runtime.db.system() as conn:
        hooks = await lifecycle_repository.claim(conn, seconds=INTERVAL_SECONDS, limit=LIMIT)
    if not hooks:
        return 0
    by_customer: dict[UUID, list[Hook]] = defaultdict(list)
    for hook in hooks:
        by_customer[hook.customer_id].append(hook)
    # One customer's slow account must not keep another's hooks waiting.
    return sum(await asyncio.gather(*(_serve(runtime, group) for group in by_customer.values())))


async def _serve(runtime: Runtime, hooks: Sequence[Hook]) -> int:
    done = 0
    for hook in hooks:
        step, reason = judge(hook, runtime.db.now())
        if step is Step.WAIT:
            continue
        try:
            if step is not Step.LEAVE:
                await _call(runtime, hook, step)
        except AwsError as error:
            await _failed(runtime, hook, step, error)
            if error.code in answers.DENIED_CODES or not error.definite:
                # The others of this account would meet the same.
                break
            continue
        async with runtime.db.system() as conn:
            if step is Step.HEARTBEAT:
                await lifecycle_repository.beaten(conn, hook)
            else:
                state = "left" if step is Step.LEAVE else "completed"
                await lifecycle_repository.end(conn, hook, state=state, reason=reason)
        metrics.LIFECYCLE.labels(step.value).inc()
        done += 1
        log.info("lifecycle.answered", **_names(hook), step=step.value, reason=reason)
    return done


async def _call(runtime: Runtime, hook: Hook, step: Step) -> None:
    if not hook.role_arn:
        raise AwsError("AssumeRole", "NoCredentials", "the customer has no aws_role_arn")
    credentials = await runtime.aws.assume(Role(hook.customer_id, hook.role_arn, hook.external_id))
    parameters = {
        "AutoScalingGroupName": hook.group_name,
        "LifecycleHookName": hook.hook_name,
        "LifecycleActionToken": hook.token,
        "InstanceId": hook.instance_id,
    }
    operation = "RecordLifecycleActionHeartbeat"
    if step is Step.COMPLETE:
        operation = "CompleteLifecycleAction"
        parameters["LifecycleActionResult"] = "CONTINUE"
    await runtime.aws.call(
        "autoscaling",
        operation,
        parameters,
        region=hook.region,
        credentials=credentials,
        timeout_seconds=CALL_SECONDS,
    )


async def _failed(runtime: Runtime, hook: Hook, step: Step, error: AwsError) -> None:
    denied = error.code in answers.DENIED_CODES
    over = error.code == "ValidationError"
    log.log(
        20 if over else 40,
        "lifecycle.not_answered",
        **_names(hook),
        step=step.value,
        code=error.code,
        message=error.message[:200],
    )
    async with runtime.db.system() as conn:
        if over:
            # The group waits no more: somebody else answered, or its own time was up.
            await lifecycle_repository.end(conn, hook, state="left", reason=f"the group had gone on: {error.message}")
            return
        await lifecycle_repository.postpone(conn, hook, seconds=REFUSED_SECONDS if denied else FAILED_SECONDS)
        if denied:
            metrics.ALARMS.labels("lifecycle").inc()
            await intake_repository.mark_degraded(
                conn, hook.customer_id, detector="lifecycle", reason=str(error)[:500], remedy=REMEDY
            )


def _names(hook: Hook) -> dict[str, str]:
    return {
        "customer_id": str(hook.customer_id),
        "instance_id": hook.instance_id,
        "group": hook.group_name,
        "hook": hook.hook_name,
        "transition": hook.transition,
    }
