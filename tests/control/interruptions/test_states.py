"""Two state machines. The launch of a replacement: whatever comes in whatever order, one instance at most is alive. The
signals about an instance: none is lost, and one interruption at most is under way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control.interruptions import merging, states
from control.interruptions.merging import Effects, Known
from control.interruptions.messages import label_of
from control.interruptions.parsing import STALE_AFTER, ParsedEvent
from control.interruptions.policies import (
    SOFT_KINDS,
    Act,
    Decision,
    NodeFacts,
    Policy,
    decide,
    maintenance_launch_at,
)
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
    Withdrawn,
    apply_launch,
    close_open,
    close_unmatched,
)
from warehouse.contracts import EventKind, EventSource, InterruptionAction

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
    def withdraw(self) -> None:
        self.apply(Withdrawn("the kill switch is on"))

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


# --- signals about one instance ---------------------------------------------------------------------------------

INSTANCE = "i-0123456789abcdef0"
ZONE = UUID(int=1)
FAR = timedelta(days=3)
KINDS = sorted(merging.STRENGTH)
ONLY_AWS = (EventKind.SCHEDULED_CHANGE, EventKind.ASG_TERMINATE, EventKind.CAPACITY_RESERVATION_INTERRUPTION)


@dataclass
class Branch:
    """What became of an interruption's drain and launch. None: never asked for."""

    drain: str | None = None
    drained_at: datetime | None = None
    launch: IntentState | None = None
    launch_at: datetime = NOW


class SignalMachine(RuleBasedStateMachine):
    """Signals about one living instance in any order, early, late and repeated, while an agent drains and a launcher
    launches, or both fail; ``decide`` and ``merging`` answer, and the workers' loops do what they ask for."""

    @initialize(
        policies=st.fixed_dictionaries({kind: st.sampled_from([Policy.PRE_SPIN, Policy.DRAIN]) for kind in KINDS}),
        registered=st.booleans(),
    )
    def start(self, policies: dict[EventKind, Policy], registered: bool) -> None:
        self.now = NOW
        self.policies = policies
        self.known: list[Known] = []
        self.branches: list[Branch] = []
        self.sent: list[ParsedEvent] = []
        self.gone = False
        self.registered = registered
        self.hard: dict[int, datetime] = {}
        self.heard: list[list[tuple[ParsedEvent, datetime]]] = []

    def node(self) -> NodeFacts | None:
        if not self.registered:
            return None
        seen, gone = (self.now, None) if not self.gone else (self.now - timedelta(hours=1), self.now)
        return NodeFacts(ZONE, ZONE, ZONE, "node", INSTANCE, "m5.large", "us-east-1a", "spot", "us-east-1", seen, gone)

    # --- what comes in

    def tell(self, event: ParsedEvent, label: str) -> None:
        """As a batch does: decide, find whose it is, begin or merge."""
        # Of maintenances and groups only AWS knows.
        told_by = EventSource.SQS if event.kind in ONLY_AWS else EventSource(label)
        label = label_of(told_by, event.kind)
        node = self.node()
        decision = decide(event, INSTANCE, node, self.policies, self.now)
        index = merging.owner(self.known, event, decision, self.now)
        before = self.known[index] if index is not None else None
        if decision.act is Act.CALL_OFF:
            if index is not None:
                self.call_off(index, event, label)
            return
        if decision.act not in (Act.INTERRUPT, Act.UNMATCHED):
            if index is not None:
                self.known[index] = merging.hear(self.known[index], label).known
            return
        if before is None or index is None:
            merged = merging.begin(self.known, event, decision, node, label, self.now)
            index = len(self.known)
            self.known.append(merged.known)
            self.branches.append(Branch())
            self.heard.append([])
            assert merged.known.state == ("open" if node else "unmatched")
        else:
            merged = merging.merge(before, event, decision, node, label, self.now)
            self.known[index] = merged.known
            assert bool(merged.notes) == (merged.known != before), "a change without a line in the history"
        self.heard[index].append((event, self.now))
        self.do(index, merged.effects)
        # The same again, by whomever and at once, changes nothing but names.
        assert merging.owner(self.known, event, decision, self.now) == index
        repeated = merging.merge(self.known[index], event, decision, node, label, self.now)
        assert repeated.known == self.known[index]
        assert not repeated.effects.launches
        self.answered(index, before, event, decision)

    def call_off(self, index: int, event: ParsedEvent, label: str) -> None:
        before, branch = self.known[index], self.branches[index]
        merged = merging.call_off(before, event, label, self.now)
        self.known[index] = merged.known
        self.heard[index].append((event, self.now))
        assert bool(merged.notes) == (merged.known != before), "a change without a line in the history"
        if merged.effects.closes:
            assert before.kind is EventKind.SCHEDULED_CHANGE, "only a maintenance is called off"
            assert branch.drain is None, "what has begun goes on"
            assert {heard.kind for heard, _ in self.heard[index]} == {EventKind.SCHEDULED_CHANGE}, "others spoke too"
            assert all(word.called_off for word in merged.known.words), "another maintenance is still to come"
            branch.launch = branch.launch and IntentState.CANCELLED
        else:
            assert merged.known.state == before.state
            days = [word.ends_at for word in merged.known.words if not word.called_off]
            if before.state == "open" and before.drain_pending and before.detected_by == (label,) and days:
                assert merged.known.deadline_at == min(days), "it is prepared for on the day of the next one"
        self.do(index, merged.effects)
        assert not merging.call_off(self.known[index], event, label, self.now).notes, "the same again changes nothing"

    def do(self, index: int, effects: Effects) -> None:
        branch = self.branches[index]
        if effects.launches:
            assert branch.launch is None, "two replacements of one interruption"
            branch.launch, branch.launch_at = IntentState.PLANNED, effects.act_at or self.now
        if effects.hastens_to and branch.launch is IntentState.PLANNED:
            branch.launch_at = min(branch.launch_at, effects.hastens_to)
        if effects.postpones:
            assert self.known[index].kind is EventKind.SCHEDULED_CHANGE, "an announced end was put off"
            if branch.launch is IntentState.PLANNED and effects.act_at and branch.launch_at >= effects.act_at:
                branch.launch_at = maintenance_launch_at(self.known[index].deadline_at)
        if effects.drain_may_retry and branch.drain in ("failed", "expired"):
            branch.drain = None
        if effects.drains and branch.drain is None:
            branch.drain = "queued"

    def answered(self, index: int, before: Known | None, event: ParsedEvent, decision: Decision) -> None:
        """No signal is lost: it is under way, or was dealt with and nothing is left to do."""
        one, branch = self.known[index], self.branches[index]
        strength = merging.STRENGTH
        if one.state == "unmatched":
            assert strength[one.kind] >= strength[event.kind], "a sharper word is not waited with"
        elif one.state == "closed":
            assert self.dealt_with(one, branch, event), "a closed one swallowed it"
        elif event.kind not in SOFT_KINDS and not decision.gone:
            assert strength[one.kind] >= strength[event.kind], "an announced end took nothing over"
            assert branch.drain is not None or one.drain_pending, "an end without a drain"
            assert one.deadline_at <= (decision.deadline_at or self.now)
            if before is None or strength[event.kind] > strength[before.kind]:
                assert branch.drain in ("queued", "done") or one.drain_pending, "a drain that failed is not tried again"

    def dealt_with(self, one: Known, branch: Branch, event: ParsedEvent) -> bool:
        """Whether nothing is left to do about a signal whose interruption is closed, as a person would say it."""
        assert one.closed_at is not None
        drained = branch.drain == "done"
        if one.kind not in SOFT_KINDS:
            # The instance ended, or has been stopped by this very notice.
            ended = one.action is InterruptionAction.TERMINATE
            return ended or event.occurred_at - one.notice_at <= timedelta(minutes=15)
        if drained and self.now - one.closed_at <= timedelta(hours=1):
            return True
        if event.kind not in SOFT_KINDS:
            return False
        if event.starts_at is not None:
            for_it = drained and event.starts_at <= one.deadline_at
            return for_it or event.starts_at <= self.now or event.occurred_at <= one.closed_at
        return event.occurred_at <= one.closed_at

    @rule(
        kind=st.sampled_from([*KINDS, *SOFT_KINDS, *SOFT_KINDS]),
        action=st.sampled_from(sorted(InterruptionAction)),
        age=st.sampled_from([0, 3, 100, 1200]),
        starts=st.sampled_from([None, timedelta(minutes=10), FAR, 2 * FAR]),
        state=st.sampled_from(["stopping", "shutting-down", "terminated"]),
        label=st.sampled_from(["sqs", "agent", "poll"]),
        exact=st.booleans(),
        name=st.sampled_from([None, "a", "a", "b"]),
    )
    def signal(
        self,
        kind: EventKind,
        action: InterruptionAction,
        age: int,
        starts: timedelta | None,
        state: str,
        label: str,
        exact: bool,
        name: str | None = None,
    ) -> None:
        """Any signal, now or as old as a queue may make it."""
        if self.gone and kind is not EventKind.INSTANCE_STATE_CHANGE:
            return
        occurred = self.now - timedelta(seconds=age)
        warned = kind is EventKind.SPOT_INTERRUPTION
        event = ParsedEvent(
            kind=kind,
            dedupe_key="",
            region="us-east-1",
            account_id=None,
            occurred_at=occurred,
            instance_ids=(INSTANCE,),
            action=action if warned else None,
            state=state if kind is EventKind.INSTANCE_STATE_CHANGE else None,
            starts_at=self.now + starts if starts and kind is EventKind.SCHEDULED_CHANGE else None,
            exact_deadline=self.now + timedelta(seconds=90) if warned and exact else None,
            flags=frozenset({"stale"} if age > 900 else ()),
            detail={"eventArn": f"arn:aws:health:us-east-1::event/EC2/CODE/{name}"} if name else {},
        )
        self.sent.append(event)
        self.tell(event, label)
        if event.state == "terminated":
            self.gone = True

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), label=st.sampled_from(["sqs", "agent", "poll"]))
    def again(self, data: st.DataObject, label: str) -> None:
        """An earlier message under another id: by another detector, or late."""
        event = data.draw(st.sampled_from(self.sent))
        if self.now - event.occurred_at > STALE_AFTER:
            event = replace(event, flags=event.flags | {"stale"})
        open_before = sum(one.state != "closed" for one in self.known)
        self.tell(event, label)
        assert sum(one.state != "closed" for one in self.known) <= max(open_before, 1)

    @precondition(lambda self: any(event.kind is EventKind.SCHEDULED_CHANGE for event in self.sent))
    @rule(data=st.data(), age=st.sampled_from([0, 3, 1200]))
    def maintenance_is_over(self, data: st.DataObject, age: int) -> None:
        """AWS closes a maintenance it spoke of: it took place, or will not."""
        planned = [event for event in self.sent if event.kind is EventKind.SCHEDULED_CHANGE]
        event = data.draw(st.sampled_from(planned))
        over = {"statusCode": "closed"}
        event = replace(event, occurred_at=self.now - timedelta(seconds=age), detail=event.detail | over)
        self.sent.append(event)
        self.tell(event, "sqs")

    # --- what goes on meanwhile

    @rule(seconds=st.sampled_from([1, 30, 70, 600, 3700, 86_400]))
    def time_passes(self, seconds: int) -> None:
        """In steps as small as the loops', as far as something is due."""
        ends = self.now + timedelta(seconds=seconds)
        moments = [one.deadline_at - lead for one in self.known for lead in LEADS if one.state == "open"]
        for moment in sorted(moment for moment in moments if self.now < moment < ends):
            self.now = moment
            self.loops()
        self.now = ends
        self.loops()

    def loops(self) -> None:
        self.sweep()
        self.begin_waiting_drains()
        self.close()

    @rule()
    def sweep(self) -> None:
        """Waits for a node, drains and launches end."""
        for index, (one, branch) in enumerate(zip(self.known, self.branches, strict=True)):
            if one.state == "unmatched" and self.now - one.received_at >= states.UNMATCHED_FOR:
                self.known[index] = replace(one, state="closed", outcome="unmatched", closed_at=self.now)
            if one.state == "open" and self.now > one.deadline_at + timedelta(minutes=15):
                branch.launch = IntentState.EXHAUSTED if branch.launch is IntentState.PLANNED else branch.launch
            if one.state == "open" and branch.drain == "queued" and self.now > one.deadline_at:
                branch.drain = "expired"

    @rule()
    def begin_waiting_drains(self) -> None:
        """As the loop's SQL has it."""
        for index, (one, branch) in enumerate(zip(self.known, self.branches, strict=True)):
            if one.state != "open":
                continue
            if one.drain_pending and self.due(one, branch):
                if not self.kept(one, branch) and not self.gone and branch.drain not in ("queued", "done"):
                    branch.drain = "queued"
                self.known[index] = replace(one, drain_pending=False)
            if not one.soft and not self.gone and self.now >= one.deadline_at - LEADS[0]:
                assert branch.drain is not None, "a minute before its end, nothing is waited for"

    @rule()
    def close(self) -> None:
        """What has nothing left to do."""
        for index, (one, branch) in enumerate(zip(self.known, self.branches, strict=True)):
            kept = self.kept(one, branch) and one.gone_at is None
            found = Branches(branch.drain, branch.drained_at, branch.launch, one.drain_pending, kept)
            closing = close_open(found, deadline_at=one.deadline_at) if one.state == "open" else None
            if closing is not None:
                self.known[index] = replace(
                    one, state="closed", outcome=closing.outcome.value, reason=closing.reason, closed_at=self.now
                )

    def kept(self, one: Known, branch: Branch) -> bool:
        return one.kind is EventKind.REBALANCE_RECOMMENDATION and branch.launch is not IntentState.READY

    def due(self, one: Known, branch: Branch) -> bool:
        if branch.launch is IntentState.READY:
            return True
        if one.kind is EventKind.SCHEDULED_CHANGE:
            lead = timedelta(minutes=45 if branch.launch is IntentState.EXHAUSTED else 15)
            return self.now > one.deadline_at - lead
        if branch.launch is IntentState.EXHAUSTED:
            return True
        return one.kind is not EventKind.REBALANCE_RECOMMENDATION and self.now >= one.deadline_at - LEADS[0]

    @rule(end=st.sampled_from(["done", "failed"]))
    def agent_works(self, end: str) -> None:
        for branch in self.branches:
            if branch.drain == "queued":
                branch.drain, branch.drained_at = end, self.now

    @rule(end=st.sampled_from([IntentState.READY, IntentState.EXHAUSTED]))
    def launcher_works(self, end: IntentState) -> None:
        for branch in self.branches:
            if branch.launch is IntentState.PLANNED and branch.launch_at <= self.now:
                branch.launch = end

    @precondition(lambda self: not self.registered)
    @rule()
    def node_registers_late(self) -> None:
        """Its interruption waits without a node; the loop that matches tells it again, the sharpest word first."""
        self.registered = True
        waiting = [index for index, one in enumerate(self.known) if one.state == "unmatched"]
        for index in waiting:
            for event in sorted(self.sent, key=lambda event: -merging.STRENGTH[event.kind]):
                if event.kind is self.known[index].kind:
                    self.tell(event, "sqs")

    # --- what always holds

    @invariant()
    def one_is_under_way_at_a_time(self) -> None:
        assert sum(one.state != "closed" for one in self.known) <= 1

    @invariant()
    def keys_are_unique(self) -> None:
        assert len({one.key for one in self.known}) == len(self.known)

    @invariant()
    def the_end_of_a_hard_one_only_comes_nearer(self) -> None:
        for index, one in enumerate(self.known):
            if not one.soft and one.state == "open":
                assert one.deadline_at <= self.hard.get(index, one.deadline_at)
                self.hard[index] = one.deadline_at

    @invariant()
    def a_maintenance_is_prepared_for_the_day_that_was_said_last(self) -> None:
        """Of each; of several, for the first. One without a name is never put off."""
        for one, heard in zip(self.known, self.heard, strict=True):
            if one.state != "open" or one.kind is not EventKind.SCHEDULED_CHANGE or not one.drain_pending:
                continue
            last: dict[Any, tuple[datetime, bool, datetime]] = {}
            for event, at in heard:
                if event.kind is not EventKind.SCHEDULED_CHANGE:
                    continue
                ends = max(event.starts_at or at, at) + timedelta(minutes=15)
                arn = event.detail.get("eventArn") if event.starts_at else None
                name = arn or event.starts_at
                said, over, known = last.get(name, (event.occurred_at, event.called_off, ends))
                if event.called_off or over:
                    if (event.occurred_at, event.called_off) > (said, over):
                        said, over, known = event.occurred_at, event.called_off, ends
                elif arn is None or event.occurred_at == said:
                    said, known = event.occurred_at, min(ends, known)
                elif event.occurred_at > said:
                    said, known = event.occurred_at, ends
                last[name] = said, over, known
            days = [ends for _, over, ends in last.values() if not over]
            if not any(event.called_off for event, _ in heard):
                assert one.deadline_at == min(days)
            elif days:
                # Of what was called off the day may stay, where anything else was said.
                assert one.deadline_at <= min(days)

    @invariant()
    def an_announced_end_has_its_drain_decided(self) -> None:
        for one, branch in zip(self.known, self.branches, strict=True):
            if one.state == "open" and not one.soft and one.gone_at is None and not self.gone:
                assert branch.drain is not None or one.drain_pending, one

    @invariant()
    def the_first_word_is_kept(self) -> None:
        for one in self.known:
            assert one.first_notice_at is None or one.first_notice_at <= one.notice_at


LEADS = (timedelta(minutes=1), timedelta(minutes=15), timedelta(minutes=45))
TestSignalMachine = SignalMachine.TestCase
TestSignalMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


class Walk(SignalMachine):
    """The same, one step after another by hand: what chance takes long to find."""

    def __init__(self, policy: Policy, *, registered: bool = True) -> None:
        super().__init__()
        self.start(policies=dict.fromkeys(KINDS, policy), registered=registered)

    def hear(self, kind: EventKind, **values: Any) -> Known:
        said = {"action": InterruptionAction.TERMINATE, "age": 0, "starts": None, "state": "shutting-down"}
        self.signal(kind=kind, label="sqs", exact=False, **said | values)
        self.check_invariants()
        return self.known[-1]

    def check_invariants(self) -> None:
        self.one_is_under_way_at_a_time()
        self.keys_are_unique()
        self.the_end_of_a_hard_one_only_comes_nearer()
        self.a_maintenance_is_prepared_for_the_day_that_was_said_last()
        self.an_announced_end_has_its_drain_decided()
        self.the_first_word_is_kept()

    def keep(self) -> None:
        """There is no replacement, and the node stays."""
        self.launcher_works(end=IntentState.EXHAUSTED)
        self.begin_waiting_drains()


REBALANCE, SCHEDULED, WARNING = (
    EventKind.REBALANCE_RECOMMENDATION,
    EventKind.SCHEDULED_CHANGE,
    EventKind.SPOT_INTERRUPTION,
)


@pytest.mark.parametrize("policy", [Policy.PRE_SPIN, Policy.DRAIN])
@pytest.mark.parametrize("end", [kind for kind in KINDS if kind not in SOFT_KINDS])
def test_an_end_after_a_recommendation_that_kept_the_node_is_acted_on(end: EventKind, policy: Policy) -> None:
    """Whether the recommendation is closed by then or not, and whether its drain failed."""
    for closed in (False, True):
        walk = Walk(policy)
        walk.hear(REBALANCE)
        walk.keep()
        walk.agent_works(end="failed")
        if closed:
            walk.close()
        found = walk.hear(end)
        assert len(walk.known) == 1 + closed
        assert (found.state, found.kind) == ("open", end)
        walk.time_passes(seconds=3600)


def test_recommendations_about_a_node_that_stays_are_numbered() -> None:
    walk = Walk(Policy.PRE_SPIN)
    for _ in range(3):
        walk.hear(REBALANCE)
        walk.keep()
        walk.close()
        walk.time_passes(seconds=600)
    assert [one.key.removeprefix(INSTANCE) for one in walk.known] == [
        "@rebalance_recommendation",
        "@rebalance_recommendation#2",
        "@rebalance_recommendation#3",
    ]


@pytest.mark.parametrize("order", [(REBALANCE, SCHEDULED), (SCHEDULED, REBALANCE)])
def test_a_maintenance_of_another_day_and_a_recommendation_drain_with_a_replacement_or_in_time(
    order: tuple[EventKind, EventKind],
) -> None:
    for replaced in (True, False):
        walk = Walk(Policy.PRE_SPIN)
        for kind in order:
            walk.hear(kind, starts=FAR)
        (one,), (branch,) = walk.known, walk.branches
        assert (one.kind, one.drain_pending, one.deadline_at) == (SCHEDULED, True, NOW + FAR + timedelta(minutes=15))
        assert branch.launch_at == NOW, "its replacement is launched now"
        walk.launcher_works(end=IntentState.READY if replaced else IntentState.EXHAUSTED)
        walk.begin_waiting_drains()
        assert branch.drain == ("queued" if replaced else None)
        walk.time_passes(seconds=int(FAR.total_seconds()))
        assert branch.drain is not None
    # A warning is another matter than both.
    walk = Walk(Policy.PRE_SPIN)
    for kind in (*order, WARNING):
        walk.hear(kind, starts=FAR)
    assert (walk.known[0].kind, walk.known[0].deadline_at) == (WARNING, NOW + timedelta(seconds=120))


def test_the_same_stop_told_twice_is_one_and_another_one_is_another() -> None:
    walk = Walk(Policy.DRAIN)
    walk.hear(WARNING, action=InterruptionAction.STOP)
    walk.agent_works(end="done")
    walk.launcher_works(end=IntentState.READY)
    walk.close()
    # Its notice comes by the agent a second later, in another minute by the clock.
    walk.now += timedelta(seconds=57)
    walk.hear(WARNING, action=InterruptionAction.STOP, age=3)
    walk.hear(EventKind.INSTANCE_STATE_CHANGE, state="stopping")
    assert len(walk.known) == 1
    walk.now += timedelta(days=30)
    assert walk.hear(WARNING, action=InterruptionAction.STOP).state == "open"
    assert len(walk.known) == 2


def test_an_instance_that_was_to_end_and_was_stopped_may_end_another_day() -> None:
    walk = Walk(Policy.DRAIN)
    walk.hear(EventKind.ASG_TERMINATE)
    walk.hear(EventKind.INSTANCE_STATE_CHANGE, state="stopping")
    walk.time_passes(seconds=3600)
    assert walk.known[0].state == "closed"
    warned = walk.hear(WARNING)
    assert (len(walk.known), warned.state, warned.key) == (2, "open", f"{INSTANCE}#2")


def test_a_late_copy_of_a_stop_does_not_turn_what_is_under_way_into_one() -> None:
    walk = Walk(Policy.DRAIN)
    stop = walk.hear(WARNING, action=InterruptionAction.STOP)
    walk.agent_works(end="done")
    walk.launcher_works(end=IntentState.READY)
    walk.close()
    walk.time_passes(seconds=3600)
    walk.hear(EventKind.ASG_TERMINATE)
    walk.hear(WARNING, action=InterruptionAction.STOP, age=3600)
    assert [(one.state, one.kind) for one in walk.known] == [("closed", WARNING), ("open", EventKind.ASG_TERMINATE)]
    assert walk.known[0].notice_at == stop.notice_at


def test_a_node_that_was_never_known_waits_again_when_it_is_told_of_again() -> None:
    walk = Walk(Policy.DRAIN, registered=False)
    walk.hear(SCHEDULED, starts=FAR)
    walk.time_passes(seconds=601)
    assert walk.known[0].outcome == "unmatched"
    assert walk.hear(SCHEDULED, starts=FAR - timedelta(seconds=601)).state == "unmatched"
    assert len(walk.known) == 1
    assert walk.hear(WARNING).kind is WARNING
    walk.node_registers_late()
    assert [(one.state, one.kind) for one in walk.known] == [("open", WARNING)]
    assert walk.branches[0].drain == "queued"
