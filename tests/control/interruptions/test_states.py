"""The launch of a replacement as a state machine: whatever comes in whatever order, one instance at most is alive."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control.interruptions import states
from control.interruptions.states import (
    DRAIN_ENDED,
    LAUNCH_ENDED,
    LIVE,
    MAX_ATTEMPTS,
    RUNNING,
    UNANSWERED,
    Abandoned,
    Alarm,
    Attempted,
    AttemptState,
    Branches,
    Cancel,
    Denied,
    InstanceEnded,
    Intent,
    IntentState,
    Launched,
    LaunchEvent,
    Mismatched,
    NeverReady,
    NoCandidate,
    NodeReady,
    Outcome,
    Plan,
    Refused,
    Terminate,
    Unanswered,
    Unblocked,
    apply_launch,
    close_open,
    close_unmatched,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class LaunchMachine(RuleBasedStateMachine):
    """A cloud that may apply a call and lose its answer, an agent, an operator, and workers that repeat themselves.

    ``cloud`` holds what EC2 really did for each attempt's token; the machine may only learn of it by events.
    """

    @initialize()
    def start(self) -> None:
        self.intent = Intent(IntentState.PLANNED)
        self.cloud: dict[int, str | None] = {}
        self.alive: set[str] = set()
        self.to_end: set[str] = set()
        self.alarms = 0

    def apply(self, event: LaunchEvent) -> None:
        before = self.intent
        self.intent, commands = apply_launch(before, event)
        for command in commands:
            match command:
                case Terminate(instance_id):
                    self.to_end.add(instance_id)
                case Alarm():
                    self.alarms += 1
                case Plan():
                    assert self.intent.state is IntentState.PLANNED
        if before.state in LAUNCH_ENDED:
            assert self.intent.state == before.state, "an ended intent does not begin again"
        # The same event again, from a worker that did not know, changes nothing.
        assert apply_launch(self.intent, event)[0] == self.intent

    @rule()
    def plan(self) -> None:
        before = len(self.intent.attempts)
        self.apply(Attempted())
        if len(self.intent.attempts) > before:
            assert not self.alive - self.to_end, "a new attempt while an instance of the intent is alive"
            self.cloud[before + 1] = None

    @precondition(lambda self: self.intent.current and self.intent.current.state in UNANSWERED)
    @rule(launches=st.booleans(), answered=st.booleans())
    def call(self, launches: bool, answered: bool) -> None:
        """A call with the attempt's token: EC2 launches once per token, and the answer may be lost."""
        number = len(self.intent.attempts)
        if self.cloud[number] is None and launches:
            self.cloud[number] = f"i-{number:04d}"
            self.alive.add(self.cloud[number] or "")
        instance = self.cloud[number]
        if not answered:
            self.apply(Unanswered())
        elif instance is None:
            self.apply(Refused("InsufficientInstanceCapacity"))
        elif instance in self.alive:
            self.apply(Launched(instance))
        else:
            self.apply(InstanceEnded())

    @precondition(lambda self: self.intent.current and self.intent.current.state in UNANSWERED)
    @rule()
    def adopt_by_tag(self) -> None:
        instance = self.cloud[len(self.intent.attempts)]
        if instance in self.alive:
            self.apply(Launched(instance or "", adopted=True))

    @rule()
    def mismatch(self) -> None:
        self.apply(Mismatched())

    @precondition(lambda self: self.intent.current and self.cloud[len(self.intent.attempts)] is None)
    @rule()
    def give_up(self) -> None:
        self.apply(Abandoned())

    @precondition(lambda self: self.intent.current and self.cloud[len(self.intent.attempts)] is None)
    @rule()
    def deny(self) -> None:
        self.apply(Denied("UnauthorizedOperation"))

    @rule()
    def unblock(self) -> None:
        self.apply(Unblocked())

    @precondition(lambda self: self.intent.current and self.intent.current.instance_id in self.alive)
    @rule()
    def node_is_ready(self) -> None:
        self.apply(NodeReady())

    @rule()
    def never_ready(self) -> None:
        self.apply(NeverReady())

    @rule()
    def terminate_what_is_to_end(self) -> None:
        self.alive -= self.to_end
        current = self.intent.current
        if current and current.instance_id in self.to_end:
            self.apply(InstanceEnded())

    @precondition(lambda self: self.intent.current and self.intent.current.state in RUNNING)
    @rule()
    def aws_takes_the_replacement(self) -> None:
        current = self.intent.current
        assert current is not None
        self.alive.discard(current.instance_id or "")
        self.apply(InstanceEnded())

    @rule()
    def no_candidate(self) -> None:
        self.apply(NoCandidate("every allowed pool was tried"))

    @rule()
    def cancel(self) -> None:
        self.apply(Cancel("not needed"))

    @invariant()
    def at_most_one_alive(self) -> None:
        assert len(self.alive - self.to_end) <= 1
        assert sum(attempt.state in LIVE for attempt in self.intent.attempts) <= 1

    @invariant()
    def attempts_are_few_and_counted(self) -> None:
        assert [attempt.number for attempt in self.intent.attempts] == list(range(1, len(self.intent.attempts) + 1))
        assert len(self.intent.attempts) <= MAX_ATTEMPTS

    @invariant()
    def an_instance_is_known_or_looked_for(self) -> None:
        """Nothing alive is forgotten: its attempt is live, on its way out, or was made by an attempt given up on."""
        for attempt in self.intent.attempts:
            instance = self.cloud.get(attempt.number)
            if instance in self.alive:
                assert attempt.state in LIVE | {AttemptState.TERMINATING}, attempt

    @invariant()
    def a_ready_intent_has_a_ready_attempt(self) -> None:
        if self.intent.state is IntentState.READY:
            assert self.intent.current is not None
            assert self.intent.current.state is AttemptState.READY

    @invariant()
    def an_end_without_capacity_is_told(self) -> None:
        if self.intent.state is IntentState.EXHAUSTED:
            assert self.alarms > 0
            assert self.intent.reason


TestLaunchMachine = LaunchMachine.TestCase
TestLaunchMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("launch", [*IntentState, None])
@pytest.mark.parametrize("drain", [*sorted(DRAIN_ENDED), "queued", "leased", None])
def test_an_interruption_closes_when_both_branches_ended_and_only_then(
    drain: str | None, launch: IntentState | None
) -> None:
    closing = close_open(Branches(drain, NOW, launch), deadline_at=NOW)
    ended = (drain is None or drain in DRAIN_ENDED) and (launch is None or launch in LAUNCH_ENDED)
    assert (closing is not None) == ended
    assert close_open(Branches(drain, NOW, launch, drain_pending=True), deadline_at=NOW) is None


@pytest.mark.parametrize(
    ("drain", "late_seconds", "launch", "outcome"),
    [
        ("done", 0, IntentState.READY, Outcome.HANDLED),
        ("done", 1, IntentState.READY, Outcome.HANDLED_LATE),
        ("done", 0, IntentState.EXHAUSTED, Outcome.HANDLED),
        ("expired", 0, IntentState.READY, Outcome.MISSED),
        ("failed", 0, IntentState.READY, Outcome.MISSED),
        ("refused", 0, IntentState.READY, Outcome.CANCELLED),
        ("superseded", 0, IntentState.READY, Outcome.CANCELLED),
        (None, 0, IntentState.READY, Outcome.MISSED),
        (None, 0, IntentState.CANCELLED, Outcome.CANCELLED),
    ],
)
def test_the_drain_decides_how_well_it_went(
    drain: str | None, late_seconds: int, launch: IntentState, outcome: Outcome
) -> None:
    closing = close_open(Branches(drain, NOW + timedelta(seconds=late_seconds), launch), deadline_at=NOW)
    assert closing is not None
    assert closing.outcome is outcome
    if launch is IntentState.EXHAUSTED:
        assert closing.reason == "no replacement could be launched"


def test_an_unmatched_warning_waits_ten_minutes() -> None:
    assert close_unmatched(NOW, NOW + timedelta(minutes=9, seconds=59)) is None
    closing = close_unmatched(NOW, NOW + states.UNMATCHED_FOR)
    assert closing is not None
    assert closing.outcome is Outcome.UNMATCHED
