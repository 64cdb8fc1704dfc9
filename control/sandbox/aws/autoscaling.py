"""Auto Scaling as far as lifecycle hooks go: actions that wait for an answer, their heartbeats and their completion."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from control.sandbox.aws.protocol import Answer, AwsError, Call, query_answer

NAMESPACE = "http://autoscaling.amazonaws.com/doc/2011-01-01/"
ACTIONS = frozenset({"CompleteLifecycleAction", "RecordLifecycleActionHeartbeat"})


@dataclass(slots=True)
class LifecycleAction:
    """One hook's wait for one instance; it ends with an answer or when nothing was heard for its time-out."""

    account_id: str
    region: str
    group_name: str
    hook_name: str
    instance_id: str
    transition: str
    timeout_seconds: float
    token: str = field(default_factory=lambda: str(uuid.uuid4()))
    heard_at: float = field(default_factory=time.time)
    heartbeats: int = 0
    result: str | None = None

    @property
    def waiting(self) -> bool:
        """Whether the group still waits."""
        return self.result is None and time.time() - self.heard_at <= self.timeout_seconds


class AutoScaling:
    """All lifecycle actions, in memory."""

    def __init__(self) -> None:
        self.actions: list[LifecycleAction] = []

    def begin(self, action: LifecycleAction) -> LifecycleAction:
        self.actions.append(action)
        return action

    def handle(self, call: Call) -> Answer:
        """CompleteLifecycleAction and RecordLifecycleActionHeartbeat, refused as AWS does when nothing waits."""
        wanted = call.params
        for action in self.actions:
            named = action.token == wanted.get("LifecycleActionToken") or (
                "LifecycleActionToken" not in wanted and action.instance_id == wanted.get("InstanceId")
            )
            same = (action.account_id, action.region, action.group_name, action.hook_name) == (
                call.caller.account_id,
                call.region,
                wanted.get("AutoScalingGroupName"),
                wanted.get("LifecycleHookName"),
            )
            if named and same and action.waiting:
                break
        else:
            instance = wanted.get("InstanceId", "")
            raise AwsError("ValidationError", f"No active Lifecycle Action found with instance ID {instance}")
        if call.action == "CompleteLifecycleAction":
            result = str(wanted.get("LifecycleActionResult", ""))
            if result not in ("CONTINUE", "ABANDON"):
                raise AwsError("ValidationError", f"LifecycleActionResult {result!r} is neither CONTINUE nor ABANDON")
            action.result = result
        else:
            action.heartbeats += 1
            action.heard_at = time.time()
        return query_answer(call, NAMESPACE, "")
