"""What a signal means for what is known of its instance: pure functions, so that a test can drive every sequence.

``owner`` says which interruption a signal belongs to, ``begin`` makes a new one of it, ``merge`` changes the one it
belongs to. All answer with the interruption as it is now, with notes for its history and with ``Effects``: what is to
be done in the same transaction. Nothing here reads a clock or a table.

A signal is never lost: it begins an interruption, sharpens the one under way, or repeats what was answered already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from control.interruptions.parsing import ParsedEvent
from control.interruptions.policies import (
    NOTICE,
    SOFT_KINDS,
    Decision,
    NodeFacts,
    maintenance,
    maintenance_deadline,
    maintenance_launch_at,
)
from warehouse.contracts import EventKind, InterruptionAction

# A signal this long after a notice may be what the notice announced. EC2 leaves two minutes, queues add some.
COMES_TRUE_WITHIN = timedelta(minutes=15)
# A node that was drained for a maintenance, or on a recommendation, is back at work or gone after this long.
MAINTENANCE_TAKES = timedelta(hours=1)

# A sharper signal about an interruption under way takes it over; a duller one only adds its name. A recommendation is
# a rumour, a maintenance is announced, a group decides, a state is a fact, and a warning also says when.
STRENGTH = {
    EventKind.REBALANCE_RECOMMENDATION: 1,
    EventKind.SCHEDULED_CHANGE: 2,
    EventKind.ASG_TERMINATE: 3,
    EventKind.INSTANCE_STATE_CHANGE: 4,
    EventKind.SPOT_INTERRUPTION: 5,
    EventKind.CAPACITY_RESERVATION_INTERRUPTION: 5,
}
# Who says no more than that a maintenance is planned.
MAINTENANCE_LABELS = frozenset({EventKind.SCHEDULED_CHANGE.value})
# What says that EC2 takes its capacity back.
TAKES_CAPACITY = frozenset({EventKind.SPOT_INTERRUPTION, EventKind.INSTANCE_STATE_CHANGE})


@dataclass(frozen=True, slots=True)
class Word:
    """What was said last of one maintenance. Only where AWS names it is a later day another word about the same, which
    ``may_postpone`` it."""

    maintenance: str
    said_at: datetime
    ends_at: datetime
    may_postpone: bool
    called_off: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """An interruption, as far as later signals depend on it.

    ``notice_at`` is the notice of ``kind``, the sharpest signal so far; ``first_notice_at`` the first word about it,
    where that was another one. ``words`` are read from what was said, not kept with the interruption.
    """

    key: str
    kind: EventKind
    action: InterruptionAction
    state: str
    notice_at: datetime
    received_at: datetime
    deadline_at: datetime
    detected_by: tuple[str, ...]
    drain_pending: bool = False
    first_notice_at: datetime | None = None
    outcome: str | None = None
    reason: str | None = None
    gone_at: datetime | None = None
    closed_at: datetime | None = None
    words: tuple[Word, ...] = field(default=(), compare=False)

    @property
    def soft(self) -> bool:
        """Whether the instance may live on."""
        return self.kind in SOFT_KINDS


@dataclass(frozen=True, slots=True)
class Note:
    """A line of the history."""

    event: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Effects:
    """What a signal asks for, besides the interruption's own row.

    ``begins``: it is under way now, which is told. ``drains``: a drain of its node, now. ``drain_may_retry``: a drain
    that failed does not stand in the way of another. ``launches``: a replacement, from ``act_at`` on (None: at once).
    ``hastens_to``: a replacement planned for later is wanted at this moment. ``shortens``: a drain that is under way
    has less time. ``postpones``: it has more; a replacement planned for ``act_at`` or later is wanted for the new day.
    ``closes``: it is over, and what was planned for it is wanted no more. ``took_capacity``: its pool is to blame.
    """

    begins: bool = False
    matched: bool = False
    drains: bool = False
    drain_may_retry: bool = False
    launches: bool = False
    act_at: datetime | None = None
    hastens_to: datetime | None = None
    shortens: bool = False
    postpones: bool = False
    closes: bool = False
    took_capacity: bool = False


@dataclass(frozen=True, slots=True)
class Merged:
    """The interruption after a signal. Without notes nothing changed."""

    known: Known
    notes: tuple[Note, ...] = ()
    effects: Effects = Effects()


# --- whose signal it is -----------------------------------------------------------------------------------------


def owner(known: Sequence[Known], event: ParsedEvent, decision: Decision, now: datetime) -> int | None:
    """Which of an instance's interruptions a signal belongs to, as its index; None: it is the first word of a new one.

    One under way gets every signal, but for a late copy of a stop that is over. A closed one gets what repeats it, what
    it announced, and what it has dealt with; it never swallows news about a node that lives on.
    """
    if decision.key and decision.action is not InterruptionAction.TERMINATE:
        # The key carries the minute: what is under way now is about another moment of the instance.
        over = _newest(known, lambda one: one.key == decision.key and one.state == "closed")
        if over is not None and known[over].outcome != "unmatched":
            return over
    under_way = [index for index, one in enumerate(known) if one.state != "closed"]
    if under_way:
        return max(under_way, key=lambda index: STRENGTH[known[index].kind])
    if not decision.key:
        return _newest(known, lambda one: one.notice_at > event.occurred_at - MAINTENANCE_TAKES)
    soft = event.kind in SOFT_KINDS
    if soft or event.kind is EventKind.INSTANCE_STATE_CHANGE:
        # What was announced has come true, though it may have been handled and closed by now: a stop's or
        # hibernation's key carries the minute of its notice, not of its end.
        announced = _newest(
            known, lambda one: not left_alive(one, now) and one.notice_at > event.occurred_at - COMES_TRUE_WITHIN
        )
        if announced is not None:
            return announced
    same = _newest(known, lambda one: base_key(one.key) == decision.key)
    if same is not None and not _is_news(known[same], event, decision, now):
        return same
    return _newest(known, lambda one: _dealt_with(one, event, decision, now))


def _newest(known: Sequence[Known], fits: Callable[[Known], bool]) -> int | None:
    found = [index for index, one in enumerate(known) if fits(one)]
    return max(found, key=lambda index: known[index].notice_at) if found else None


def left_alive(one: Known, now: datetime) -> bool:
    """Whether an interruption is over and its node lives on, so that what comes later about it is news: it was kept, or
    was drained for a maintenance so long ago that it is back at work."""
    if one.state != "closed" or not one.soft:
        return False
    return not _drained(one) or (one.closed_at is not None and now - one.closed_at > MAINTENANCE_TAKES)


def _drained(one: Known) -> bool:
    return one.outcome in ("handled", "handled_late")


def _is_news(one: Known, event: ParsedEvent, decision: Decision, now: datetime) -> bool:
    """Whether a signal of a closed one's key is another than that one was."""
    if one.outcome == "unmatched":
        return False
    if one.action is not decision.action and event.occurred_at - one.notice_at > COMES_TRUE_WITHIN:
        # Begun as an end and stopped instead: the instance may be back, and end after all.
        return True
    if not left_alive(one, now):
        return False
    if one.closed_at is None or event.occurred_at <= one.closed_at:
        return False
    # A maintenance is told of many times, before and after it; only one still to come, of a node that was not drained
    # for it or that was drained for an earlier day, is worth another try.
    return event.starts_at is None or (
        event.starts_at > now and (not _drained(one) or event.starts_at > one.deadline_at)
    )


def _dealt_with(one: Known, event: ParsedEvent, decision: Decision, now: datetime) -> bool:
    """Whether a closed interruption leaves nothing to do about the signal."""
    if one.soft:
        # Its node was drained and replaced a moment ago, whatever becomes of it now.
        return not left_alive(one, now)
    if one.action is not decision.action:
        return False
    # An instance is terminated once; of stops and hibernations, the same one told again.
    return decision.action is InterruptionAction.TERMINATE or abs(one.notice_at - event.occurred_at) <= NOTICE


def base_key(key: str) -> str:
    """A key without the number of its repetition."""
    return key.partition("#")[0]


def new_key(key: str, known: Iterable[Known]) -> str:
    """The key of a new interruption: recommendations and maintenances come again, and are numbered from the second on.
    Two consumers that hear of one at the same time number it alike, so that one of them gives way."""
    numbers = [int(one.key.partition("#")[2] or 1) for one in known if base_key(one.key) == key]
    return f"{key}#{max(numbers) + 1}" if numbers else key


# --- a new one --------------------------------------------------------------------------------------------------


def begin(
    known: Sequence[Known], event: ParsedEvent, decision: Decision, node: NodeFacts | None, label: str, now: datetime
) -> Merged:
    """An interruption by its first signal. Without a node it waits for one."""
    assert decision.deadline_at is not None
    one = Known(
        key=new_key(decision.key, known),
        kind=event.kind,
        action=decision.action,
        state="open" if node else "unmatched",
        notice_at=event.occurred_at,
        received_at=now,
        deadline_at=decision.deadline_at,
        detected_by=(label,),
        drain_pending=decision.drain_after_launch,
        gone_at=now if decision.gone else None,
        words=words_with((), event, now),
    )
    note = Note("detected", {"by": label, "flags": sorted(event.flags)})
    return Merged(one, (note,), _started(event, decision, node) if node else Effects())


def _started(event: ParsedEvent, decision: Decision, node: NodeFacts) -> Effects:
    return Effects(
        begins=True,
        drains=decision.wants_drain and node.node_name is not None,
        launches=decision.wants_launch,
        act_at=decision.act_at if decision.wants_launch else None,
        took_capacity=_takes_capacity(event, node),
    )


def _takes_capacity(event: ParsedEvent, node: NodeFacts) -> bool:
    return event.kind in TAKES_CAPACITY and node.node_type == "spot"


# --- one more signal --------------------------------------------------------------------------------------------


def merge(
    one: Known, event: ParsedEvent, decision: Decision, node: NodeFacts | None, label: str, now: datetime
) -> Merged:
    """An interruption after one more signal that something is to be done about."""
    if one.state == "unmatched" or one.outcome == "unmatched":
        merged = _waiting(one, event, decision, node, label, now)
    elif one.state == "open" and node is not None:
        merged = _sharpen(one, event, decision, node, label, now)
    else:
        merged = Merged(one)
    known, notes = merged.known, merged.notes
    if decision.gone and known.gone_at is None:
        known, notes = replace(known, gone_at=now), (*notes, Note("instance_gone", {"by": label}))
    heard = hear(known, label)
    words = words_with(one.words, event, now)
    return Merged(replace(heard.known, words=words), (*notes, *heard.notes), merged.effects)


def hear(one: Known, label: str) -> Merged:
    """An interruption after a signal that asks for nothing: who told us is written down."""
    if label in one.detected_by:
        return Merged(one)
    return Merged(replace(one, detected_by=(*one.detected_by, label)), (Note("detected_again", {"by": label}),))


CALLED_OFF = "AWS called the maintenance off"


def call_off(one: Known, event: ParsedEvent, label: str, now: datetime) -> Merged:
    """An interruption after AWS closed a maintenance. What has begun, and what anything else was said about, goes on;
    of several maintenances the others are left."""
    words = words_with(one.words, event, now)
    waits = one.state == "unmatched" or (one.state == "open" and one.drain_pending)
    if not waits or set(words) == set(one.words) or set(one.detected_by) - MAINTENANCE_LABELS:
        return Merged(replace(one, words=words))
    ends = [word.ends_at for word in words if not word.called_off]
    if len(ends) == len([word for word in one.words if not word.called_off]):
        # Of one that nobody spoke of before.
        return Merged(replace(one, words=words))
    if not ends:
        closed = replace(one, state="closed", outcome="cancelled", reason=CALLED_OFF, closed_at=now, words=words)
        return Merged(replace(closed, drain_pending=False), (Note("called_off", {"by": label}),), Effects(closes=True))
    if min(ends) <= one.deadline_at:
        return Merged(replace(one, words=words))
    moved = replace(one, deadline_at=min(ends), words=words)
    note = Note("deadline_moved", {"by": label, "deadline_at": moved.deadline_at})
    return Merged(moved, (note,), Effects(postpones=True, act_at=maintenance_launch_at(one.deadline_at)))


def _waiting(
    one: Known, event: ParsedEvent, decision: Decision, node: NodeFacts | None, label: str, now: datetime
) -> Merged:
    """A signal about an instance that no cluster had registered."""
    sharper = STRENGTH[event.kind] > STRENGTH[one.kind]
    if node is not None and STRENGTH[event.kind] >= STRENGTH[one.kind]:
        taken = _taken_over(one, event, decision) if sharper else one
        ends = _end_said(one, event, decision, now)
        opened = replace(
            taken,
            state="open",
            outcome=None,
            reason=None,
            closed_at=None,
            deadline_at=ends,
            drain_pending=decision.drain_after_launch,
        )
        started = _started(event, decision, node)
        effects = replace(started, matched=True, act_at=started.act_at and maintenance_launch_at(ends))
        return Merged(opened, (Note("matched", {"by": label}),), effects)
    # Nobody's still; or a duller word, and the loop that matches knows the sharper ones.
    notes: list[Note] = []
    waiting = one
    if one.state == "closed":
        waiting = replace(one, state="unmatched", outcome=None, reason=None, closed_at=None, received_at=now)
        notes.append(Note("waits_again", {"by": label}))
    if sharper:
        assert decision.deadline_at is not None
        waiting = replace(_taken_over(waiting, event, decision), deadline_at=decision.deadline_at)
        notes.append(_escalated(label, waiting))
    return Merged(waiting, tuple(notes))


def _sharpen(one: Known, event: ParsedEvent, decision: Decision, node: NodeFacts, label: str, now: datetime) -> Merged:
    """A signal about an interruption under way: a recommendation first, then the warning, or the other way round."""
    ends = _end_said(one, event, decision, now)
    sharper = STRENGTH[event.kind] > STRENGTH[one.kind]
    # Only while its drain is still to come: what was begun goes on.
    postponed = one.kind is EventKind.SCHEDULED_CHANGE and one.drain_pending and _postponed(one, event, now)
    rumour = event.kind is EventKind.REBALANCE_RECOMMENDATION and one.kind is EventKind.SCHEDULED_CHANGE
    changed = _taken_over(one, event, decision) if sharper else one
    drains = decision.wants_drain and node.node_name is not None and (sharper or one.drain_pending)
    waits = sharper and decision.drain_after_launch and node.node_name is not None and not drains
    if drains or waits:
        changed = replace(changed, drain_pending=waits)
    if sharper and one.soft and event.kind in SOFT_KINDS:
        # A recommendation has no end of its own; an announced one has, be it later.
        changed = replace(changed, deadline_at=ends)
    elif not decision.gone and (drains or not rumour):
        changed = replace(changed, deadline_at=ends if postponed else min(one.deadline_at, ends))
    earlier = changed.deadline_at < one.deadline_at
    later = postponed and changed.deadline_at > one.deadline_at
    hastens = decision.wants_launch and (
        # A replacement planned for the day of a maintenance is wanted now, or a maintenance is earlier than was said.
        (sharper and decision.act_at is None) or (rumour and one.drain_pending) or (earlier and one.soft)
    )
    effects = Effects(
        drains=drains,
        drain_may_retry=drains or waits,
        hastens_to=(decision.act_at or now) if hastens else None,
        shortens=earlier,
        postpones=later,
        # Failing hardware's replacement is not put off.
        act_at=maintenance_launch_at(one.deadline_at) if later and decision.act_at else None,
        took_capacity=_takes_capacity(event, node) and one.kind not in TAKES_CAPACITY,
    )
    if sharper:
        return Merged(changed, (_escalated(label, changed),), effects)
    if changed == one:
        return Merged(one, (), effects)
    moved = {"deadline_at": changed.deadline_at} if changed.deadline_at != one.deadline_at else {}
    return Merged(changed, (Note("deadline_moved" if moved else "drain_begun", {"by": label} | moved),), effects)


# --- what was said of maintenances ------------------------------------------------------------------------------


def words_with(words: tuple[Word, ...], event: ParsedEvent, now: datetime) -> tuple[Word, ...]:
    """The last words about an instance's maintenances after one more event, whatever it is about. A late copy of an
    earlier word takes nothing back, and of two said at once the one that leaves less time counts."""
    if event.kind is not EventKind.SCHEDULED_CHANGE:
        return words
    name, named = maintenance(event)
    ends_at = maintenance_deadline(event.starts_at, now)
    word = Word(name, event.occurred_at, ends_at, may_postpone=named, called_off=event.called_off)
    known = next((one for one in words if one.maintenance == name), None)
    if known is not None:
        if word.called_off or known.called_off:
            # The later word counts, and of two said at once that it is over.
            word = max(word, known, key=lambda one: (one.said_at, one.called_off))
        elif word.may_postpone and word.said_at < known.said_at:
            word = known
        elif not word.may_postpone or word.said_at == known.said_at:
            word = replace(word, ends_at=min(word.ends_at, known.ends_at))
    return (*(one for one in words if one is not known), word)


def _end_said(one: Known, event: ParsedEvent, decision: Decision, now: datetime) -> datetime:
    """When it ends by a signal's word; of several maintenances, by the first one's."""
    if event.kind is EventKind.SCHEDULED_CHANGE:
        ends = [word.ends_at for word in words_with(one.words, event, now) if not word.called_off]
        # None: a late copy of what was called off. What is under way goes on.
        return min(ends, default=one.deadline_at)
    assert decision.deadline_at is not None
    return decision.deadline_at


def _postponed(one: Known, event: ParsedEvent, now: datetime) -> bool:
    before = {word.maintenance: word.ends_at for word in one.words}
    return any(
        word.ends_at > before.get(word.maintenance, word.ends_at)
        for word in words_with(one.words, event, now)
        if not word.called_off
    )


def _taken_over(one: Known, event: ParsedEvent, decision: Decision) -> Known:
    return replace(
        one,
        kind=event.kind,
        action=decision.action,
        notice_at=event.occurred_at,
        first_notice_at=min(one.first_notice_at or one.notice_at, event.occurred_at),
    )


def _escalated(label: str, one: Known) -> Note:
    return Note("escalated", {"by": label, "kind": one.kind.value, "deadline_at": one.deadline_at})
