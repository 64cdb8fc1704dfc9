"""What may follow what: pure transitions of interruptions, launch intents and their attempts.

``(state, event, now) -> (state, commands)``: nothing here reads a clock, a table or the network, so a test can drive
every path. Workers fetch the state, apply one event, commit what changed together with a history row, and only then
execute the commands. An event that does not fit the state changes nothing: it came late, twice or from a zombie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

# The ladder ends here: same type elsewhere, other types, On-Demand.
MAX_ATTEMPTS = 6
# A node that registers up to this late is still matched with its warning.
UNMATCHED_FOR = timedelta(minutes=10)
# The ladder of a replacement ends this long after the deadline: later, the cluster has helped itself.
LAUNCH_WINDOW = timedelta(minutes=15)
# Why an attempt is ended whose node did not become Ready in time.
NEVER_READY = "never Ready"
# Why an attempt ended whose call was not made: nothing is wrong with its pool.
WITHDRAWN = "withdrawn before it was called"


class IntentState(StrEnum):
    """A wanted replacement, from the wish to a Ready node."""

    PLANNED = "planned"
    LAUNCHING = "launching"
    LAUNCHED = "launched"
    READY = "ready"
    EXHAUSTED = "exhausted"
    CANCELLED = "cancelled"
    BLOCKED = "blocked"


class AttemptState(StrEnum):
    """One try: a slot of one RunInstances call."""

    CALLING = "calling"
    UNKNOWN = "unknown"
    LAUNCHED = "launched"
    ADOPTED = "adopted"
    READY = "ready"
    FAILED = "failed"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    ABANDONED = "abandoned"


LIVE = frozenset(
    {AttemptState.CALLING, AttemptState.UNKNOWN, AttemptState.LAUNCHED, AttemptState.ADOPTED, AttemptState.READY}
)
UNANSWERED = frozenset({AttemptState.CALLING, AttemptState.UNKNOWN})
RUNNING = frozenset({AttemptState.LAUNCHED, AttemptState.ADOPTED})
LAUNCH_ENDED = frozenset({IntentState.READY, IntentState.EXHAUSTED, IntentState.CANCELLED})
DRAIN_ENDED = frozenset({"done", "failed", "refused", "expired", "superseded"})


@dataclass(frozen=True, slots=True)
class Attempt:
    """Attempt ``number`` (from 1) of an intent; ``instance_id`` once EC2 told us."""

    number: int
    state: AttemptState
    instance_id: str | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """A launch intent with all its attempts, oldest first."""

    state: IntentState
    attempts: tuple[Attempt, ...] = ()
    reason: str | None = None

    @property
    def live(self) -> Attempt | None:
        """The one attempt that may have an instance, if any."""
        return next((attempt for attempt in self.attempts if attempt.state in LIVE), None)

    @property
    def current(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None


# --- events of a launch


@dataclass(frozen=True, slots=True)
class Attempted:
    """A slot of a frozen batch was committed for this intent; the call may or may not have been made."""


@dataclass(frozen=True, slots=True)
class Refused:
    """EC2 answered that it launched nothing, or filled fewer slots than asked."""

    code: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The committed call was never made and will not be: nothing was launched."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Time-out, connection lost or a 5xx: the instance may exist."""


@dataclass(frozen=True, slots=True)
class Mismatched:
    """The token was used with another request (C-14): never a second attempt, a person must look."""


@dataclass(frozen=True, slots=True)
class Launched:
    """EC2 named the instance, or it was found by its tag (``adopted``)."""

    instance_id: str
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class NodeReady:
    """The instance is a Ready node of its cluster."""


@dataclass(frozen=True, slots=True)
class NeverReady:
    """The instance ran for ten minutes without becoming a Ready node."""


@dataclass(frozen=True, slots=True)
class InstanceEnded:
    """The instance is gone: we terminated it, or somebody else did."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """No answer for ten minutes and nothing carries the batch's tag."""


@dataclass(frozen=True, slots=True)
class Denied:
    """The customer's account refuses us (C-33)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unblocked:
    """Time to try a blocked intent again."""


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """No pool is left that the rules allow."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """The replacement is not needed any more."""

    reason: str


LaunchEvent = (
    Attempted
    | Refused
    | Withdrawn
    | Unanswered
    | Mismatched
    | Launched
    | NodeReady
    | NeverReady
    | InstanceEnded
    | Abandoned
    | Denied
    | Unblocked
    | NoCandidate
    | Cancel
)


# --- commands


@dataclass(frozen=True, slots=True)
class Plan:
    """Choose a pool and commit the next attempt."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """End an instance of ours, after reading its tag again."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """A person should know."""

    reason: str


Command = Plan | Terminate | Alarm


def apply_launch(
    intent: Intent, event: LaunchEvent, *, max_attempts: int = MAX_ATTEMPTS
) -> tuple[Intent, list[Command]]:
    """The intent after an event, and what to do about it once it is committed."""
    current = intent.current
    match event:
        case Attempted():
            if intent.state is not IntentState.PLANNED or intent.live or len(intent.attempts) >= max_attempts:
                return intent, []
            attempt = Attempt(len(intent.attempts) + 1, AttemptState.CALLING)
            return Intent(IntentState.LAUNCHING, (*intent.attempts, attempt)), []
        case Refused(code):
            if current is None or current.state not in UNANSWERED:
                return intent, []
            return _again(_change(intent, AttemptState.FAILED, failure=code), f"last refusal: {code}", max_attempts)
        case Withdrawn(reason):
            if current is None or current.state not in UNANSWERED:
                return intent, []
            return _again(_change(intent, AttemptState.FAILED, failure=WITHDRAWN), reason, max_attempts)
        case Denied(reason):
            if current is None or current.state not in UNANSWERED:
                return intent, []
            failed = _change(intent, AttemptState.FAILED, failure=reason)
            if intent.state is IntentState.CANCELLED:
                return failed, []
            return replace(failed, state=IntentState.BLOCKED, reason=reason), [Alarm(reason)]
        case Unblocked():
            if intent.state is not IntentState.BLOCKED:
                return intent, []
            return _again(intent, intent.reason or "the account refuses us", max_attempts)
        case Unanswered():
            if current is None or current.state is not AttemptState.CALLING:
                return intent, []
            return _change(intent, AttemptState.UNKNOWN), []
        case Mismatched():
            if current is None or current.state not in UNANSWERED:
                return intent, []
            return _change(intent, AttemptState.UNKNOWN), [Alarm("the launch token was used with another request")]
        case Launched(instance_id, adopted):
            if current is None or current.state not in UNANSWERED:
                return intent, []
            if intent.state is IntentState.CANCELLED:
                return _change(intent, AttemptState.TERMINATING, instance_id=instance_id), [Terminate(instance_id)]
            state = AttemptState.ADOPTED if adopted else AttemptState.LAUNCHED
            return replace(_change(intent, state, instance_id=instance_id), state=IntentState.LAUNCHED), []
        case NodeReady():
            if current is None or current.state not in RUNNING | {AttemptState.TERMINATING}:
                return intent, []
            joined = _change(intent, AttemptState.READY)
            if intent.state in LAUNCH_ENDED:
                # Nobody waits for it any more, but pods may run there by now.
                return joined, []
            return replace(joined, state=IntentState.READY), []
        case NeverReady():
            if current is None or current.state not in RUNNING or current.instance_id is None:
                return intent, []
            ending = _change(intent, AttemptState.TERMINATING, failure=NEVER_READY)
            return ending, [Terminate(current.instance_id), Alarm("a replacement never became Ready")]
        case InstanceEnded():
            if current is None or current.state not in RUNNING | UNANSWERED | {AttemptState.TERMINATING}:
                return intent, []
            ended = _change(intent, AttemptState.TERMINATED, failure=current.failure or "the instance ended")
            return _again(ended, "the replacement ended before it was Ready", max_attempts)
        case Abandoned():
            if current is None or current.state not in UNANSWERED:
                return intent, []
            left = _change(intent, AttemptState.ABANDONED, failure="no answer for ten minutes")
            if intent.state is IntentState.CANCELLED:
                return left, []
            # Not planned again: an instance that shows up later would be a second one. The orphan loop ends it.
            reason = "EC2 never said what became of the launch"
            return replace(left, state=IntentState.EXHAUSTED, reason=reason), [Alarm(reason)]
        case NoCandidate(reason):
            # One that is ending and will not end (protected, or its account refuses us) is not waited for.
            waiting = current is not None and current.state is AttemptState.TERMINATING
            if intent.state not in (IntentState.PLANNED, IntentState.BLOCKED) and not (
                waiting and intent.state is IntentState.LAUNCHED
            ):
                return intent, []
            return replace(intent, state=IntentState.EXHAUSTED, reason=reason), [Alarm(reason)]
        case Cancel(reason):
            return _cancel(intent, reason)


def _cancel(intent: Intent, reason: str) -> tuple[Intent, list[Command]]:
    if intent.state in LAUNCH_ENDED:
        return intent, []
    cancelled = replace(intent, state=IntentState.CANCELLED, reason=reason)
    current = intent.current
    if current is not None and current.state in RUNNING and current.instance_id is not None:
        return _change(cancelled, AttemptState.TERMINATING, failure=reason), [Terminate(current.instance_id)]
    # An unanswered call may still have an instance: it is ended when it is found.
    return cancelled, []


def _change(
    intent: Intent, state: AttemptState, *, instance_id: str | None = None, failure: str | None = None
) -> Intent:
    last = intent.attempts[-1]
    changed = replace(last, state=state, instance_id=instance_id or last.instance_id, failure=failure or last.failure)
    return replace(intent, attempts=(*intent.attempts[:-1], changed))


def _again(intent: Intent, reason: str, max_attempts: int) -> tuple[Intent, list[Command]]:
    if intent.state in LAUNCH_ENDED:
        return intent, []
    if len(intent.attempts) >= max_attempts:
        return replace(intent, state=IntentState.EXHAUSTED, reason=reason), [
            Alarm(f"no replacement after {max_attempts} attempts; {reason}")
        ]
    return replace(intent, state=IntentState.PLANNED, reason=reason), [Plan()]


# --- interruptions ----------------------------------------------------------------------------------------------


class Outcome(StrEnum):
    """How an interruption ended."""

    HANDLED = "handled"
    HANDLED_LATE = "handled_late"
    MISSED = "missed"
    CANCELLED = "cancelled"
    UNMATCHED = "unmatched"


@dataclass(frozen=True, slots=True)
class Branches:
    """Where the two branches of an interruption stand. None: that branch was never wanted.

    ``drain_pending`` is true while a drain will follow the replacement (policy ``pre_spin``). ``kept``: the node lives
    on, because there was no replacement and the signal alone is no reason to lose it.
    """

    drain: str | None
    drained_at: datetime | None
    launch: IntentState | None
    drain_pending: bool = False
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Closing:
    """The interruption is over."""

    outcome: Outcome
    reason: str | None


def close_unmatched(received_at: datetime, now: datetime) -> Closing | None:
    """A warning whose node never registered is closed ten minutes after it came."""
    if now - received_at < UNMATCHED_FOR:
        return None
    return Closing(Outcome.UNMATCHED, "no cluster has registered this instance within ten minutes")


def close_open(branches: Branches, *, deadline_at: datetime) -> Closing | None:
    """Whether both branches ended, and how well it went: the drain decides, late is not missed."""
    if branches.drain_pending or (branches.drain is not None and branches.drain not in DRAIN_ENDED):
        return None
    if branches.launch is not None and branches.launch not in LAUNCH_ENDED:
        return None
    lacking = "no replacement could be launched" if branches.launch is IntentState.EXHAUSTED else None
    match branches.drain:
        case "done":
            late = branches.drained_at is not None and branches.drained_at > deadline_at
            reason = "drained after the deadline" if late else None
            return Closing(Outcome.HANDLED_LATE if late else Outcome.HANDLED, _join(reason, lacking))
        case "superseded":
            return Closing(Outcome.CANCELLED, _join("the drain was superseded", lacking))
        case None if branches.launch is IntentState.CANCELLED:
            return Closing(Outcome.CANCELLED, "nothing to replace")
        case None if branches.kept:
            return Closing(Outcome.CANCELLED, _join("the node is kept", lacking))
        case None:
            return Closing(Outcome.MISSED, _join("the instance was gone before it could be drained", lacking))
        case "expired":
            return Closing(Outcome.MISSED, _join("no agent drained the node before the deadline", lacking))
        case "refused":
            return Closing(Outcome.CANCELLED, _join("the agent refused: the node is not this instance", lacking))
        case _:
            return Closing(Outcome.MISSED, _join("the drain failed", lacking))


def _join(*reasons: str | None) -> str | None:
    return "; ".join(reason for reason in reasons if reason) or None
