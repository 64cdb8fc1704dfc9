"""Faults on request: what real AWS does to clients, made to happen at the nth call of a kind."""

import os
import random
import re
import signal as signals
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from control.sandbox.aws.protocol import Call

Mode = Literal[
    "drop_before", "drop_after", "hang", "hang_after", "delay", "error", "http_error", "ice", "throttle",
    "garbage", "truncate", "rewrite", "duplicate", "signal",
]  # fmt: skip


@dataclass(slots=True)
class Fault:
    """One fault. It strikes matching calls number `nth` to `nth + count - 1` after it was injected.

    | mode | what the client sees |
    |---|---|
    | drop_before | connection cut, nothing applied |
    | drop_after | applied, then the connection is cut: the response is lost |
    | hang, hang_after | silence (for `seconds`, or until the client leaves), without or after applying |
    | delay | `seconds` later, the normal answer |
    | error | the refusal `code`, `message`, `status`; nothing applied |
    | http_error | `status` with an HTML body, as a load balancer answers |
    | ice | InsufficientInstanceCapacity |
    | throttle | the service's own throttling error |
    | garbage, truncate | 200 with a broken body; half a body, then the connection is cut |
    | rewrite | the real answer with regular expression `pattern` replaced by `replacement` |
    | duplicate | SQS: messages are handed out and stay visible |
    | signal | `signal_number` is sent to process `pid` at `moment` (before, applied, answered) |
    """

    mode: Mode
    action: str | None = None
    service: str | None = None
    account_id: str | None = None
    region: str | None = None
    match: dict[str, str] = field(default_factory=dict)
    """Parameter name to a regular expression its value (as text) must contain."""
    nth: int = 1
    count: int | None = 1
    """How many calls it strikes; None for all from `nth` on."""
    probability: float = 1.0
    seed: int = 0
    code: str = "InternalError"
    message: str = "An internal error has occurred"
    status: int = 500
    seconds: float | None = None
    pattern: str = ""
    replacement: str = ""
    pid: int = 0
    signal_number: int = int(signals.SIGKILL)
    moment: Literal["before", "applied", "answered"] = "applied"
    seen: int = 0
    struck: int = 0
    id: int = 0
    _random: random.Random | None = None

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "Fault":
        """From the control API; raises ValueError naming an unknown field or mode."""
        known = {f.name for f in fields(cls)} - {"seen", "struck", "id", "_random"}
        if unknown := set(document) - known:
            raise ValueError(f"unknown fault fields {sorted(unknown)}; known: {sorted(known)}")
        modes = Mode.__args__  # type: ignore[attr-defined]
        if document.get("mode") not in modes:
            raise ValueError(f"mode must be one of {', '.join(modes)}")
        if document["mode"] == "signal":
            # a page on loopback must not be able to kill any process of this user
            raise ValueError("mode signal is only available from Python: SandboxAWS.inject(Fault(mode='signal', …))")
        return cls(**document)

    def strikes(self, call: Call) -> bool:
        """Count this call and say whether the fault hits it."""
        if self.action is not None and self.action != call.action:
            return False
        if self.service is not None and self.service != call.service:
            return False
        if self.account_id is not None and self.account_id != call.caller.account_id:
            return False
        if self.region is not None and self.region != call.region:
            return False
        if not all(re.search(p, str(call.params.get(name, ""))) for name, p in self.match.items()):
            return False
        if self.probability < 1.0:
            self._random = self._random or random.Random(self.seed)
            if self._random.random() >= self.probability:
                return False
        self.seen += 1
        if self.seen < self.nth or (self.count is not None and self.struck >= self.count):
            return False
        self.struck += 1
        return True

    def send_signal(self) -> None:
        """Kill from outside, the way a machine dies; a process that is already gone is no error."""
        try:
            os.kill(self.pid, self.signal_number)
        except ProcessLookupError:
            return


class Faults:
    """The active faults, in order; the first that strikes wins."""

    def __init__(self) -> None:
        self._active: list[Fault] = []
        self._next_id = 1

    def inject(self, fault: Fault) -> int:
        fault.id, self._next_id = self._next_id, self._next_id + 1
        self._active.append(fault)
        return fault.id

    def clear(self, fault_id: int | None = None) -> None:
        self._active = [] if fault_id is None else [f for f in self._active if f.id != fault_id]

    def active(self) -> list[Fault]:
        return list(self._active)

    def strike(self, call: Call) -> Fault | None:
        for fault in self._active:
            if fault.strikes(call):
                if fault.count is not None and fault.struck >= fault.count:
                    self._active.remove(fault)
                return fault
        return None
