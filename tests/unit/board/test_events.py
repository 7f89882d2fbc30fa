"""Events: recorded changes, and what is noticed."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing

import pytest

from dpshm import Board, Coordinator, Engine
from dpshm.board.events import KINDS, EventReader, Waves, from_change, from_waves, read_changes
from dpshm.board.layout import CHANGES
from dpshm.board.sweep import sweep
from dpshm.board.words import DRAINED, ON_BEHALF, REMOTE, Change, ChangeKind, pack_change
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import LoneBoard, Remote, wait_until

ABSENT, ALIVE, STALLED, DEAD, STUCK, UNKNOWN = Verdict
PAUSED, WAKING, RUNNING = Phase


@pytest.mark.parametrize(
    ("kind", "before", "after", "events"),
    [
        (ChangeKind.ENGINE, ABSENT, ALIVE, ["rank_joined"]),
        (ChangeKind.ENGINE, ALIVE, DEAD, ["rank_died"]),
        (ChangeKind.ENGINE, STALLED, DEAD, ["rank_died"]),
        (ChangeKind.ENGINE, DEAD, ALIVE, ["rank_joined"]),
        (ChangeKind.ENGINE, ALIVE, STALLED, ["rank_stalled"]),
        (ChangeKind.ENGINE, STALLED, ALIVE, ["rank_recovered"]),
        (ChangeKind.ENGINE, ALIVE, STUCK, ["rank_stuck"]),
        (ChangeKind.ENGINE, STALLED, STUCK, ["rank_stuck"]),
        (ChangeKind.ENGINE, STUCK, STALLED, ["rank_stalled"]),
        (ChangeKind.ENGINE, STUCK, ALIVE, ["rank_recovered"]),
        (ChangeKind.ENGINE, ALIVE | REMOTE, UNKNOWN | REMOTE, ["rank_lost"]),
        (ChangeKind.ENGINE, UNKNOWN | REMOTE, ALIVE | REMOTE, ["rank_heard"]),
        (ChangeKind.ENGINE, UNKNOWN | REMOTE, ABSENT | REMOTE, ["rank_left"]),
        (ChangeKind.ENGINE, STUCK | DRAINED, STUCK, ["rank_undrained"]),
        (ChangeKind.ENGINE, ALIVE, ABSENT, ["rank_left"]),
        (ChangeKind.ENGINE, ALIVE, ALIVE | DRAINED, ["rank_drained"]),
        (ChangeKind.ENGINE, DEAD | DRAINED, DEAD, ["rank_undrained"]),
        (ChangeKind.ENGINE, ALIVE | DRAINED, 0, ["rank_left", "rank_undrained"]),
        (ChangeKind.ENGINE, ALIVE, ALIVE | ON_BEHALF, []),
        (ChangeKind.FRONTEND, ABSENT, ALIVE, ["frontend_joined"]),
        (ChangeKind.FRONTEND, ALIVE, DEAD, ["frontend_died"]),
        (ChangeKind.DP_SIZE, 4, 6, ["scaled"]),
        (ChangeKind.COORDINATOR, 1, 2, ["coordinator_started"]),
    ],
)
def test_what_a_change_means(kind: ChangeKind, before: int, after: int, events: list[str]):
    """Guards against a death told as a stall, and against a drain told as a change of verdict."""
    found = from_change(Change(1, kind, 3, before, after))
    assert [happened.kind for happened in found] == events
    assert set(events) <= set(KINDS)


@pytest.mark.parametrize(
    ("before", "after", "events"),
    [
        ((0, PAUSED, 0), (0, PAUSED, 0), []),
        ((0, PAUSED, 0), (0, WAKING, 0), ["wave_waking"]),
        ((0, WAKING, 0), (0, RUNNING, 1), ["wave_started"]),
        ((0, PAUSED, 0), (0, RUNNING, 1), ["wave_started"]),
        ((0, RUNNING, 1), (1, PAUSED, 1), ["wave_ended"]),
        ((0, RUNNING, 1), (1, RUNNING, 2), ["wave_started"]),
        ((0, RUNNING, 1), (4, RUNNING, 5), ["waves_unseen 3", "wave_started"]),
        ((0, PAUSED, 0), (2, PAUSED, 2), ["waves_unseen 2", "wave_ended"]),
    ],
)
def test_what_became_of_the_waves(before, after, events: list[str]):
    """Guards against waves that run between two looks and are never told of."""
    found = from_waves(Waves(*before), Waves(*after))
    assert [h.kind + (f" {h.value}" if h.kind == "waves_unseen" else "") for h in found] == events
    assert {happened.kind for happened in found} <= set(KINDS)


def test_changes_are_read_once_and_in_order(group, using):
    """Guards against changes that are told twice or not at all."""
    board = using(LoneBoard(group, watched=False))
    start = read_changes(board, 0)[1]
    for rank in (0, 1, 0):
        board.marks.set_engine(rank, drained=not board.marks.engine(rank) & DRAINED)
    found, newest, lost = read_changes(board, start)
    assert [(c.row, c.before, c.after) for c, _ in found] == [(0, 0, DRAINED), (1, 0, DRAINED), (0, DRAINED, 0)]
    assert (newest, lost) == (start + 3, 0)
    times = [t for _, t in found]
    assert times == sorted(times)
    assert time.monotonic_ns() - times[0] < 60e9
    assert read_changes(board, newest) == ([], newest, 0)


def test_what_is_overwritten_is_counted(group, using):
    """Guards against a reader that was away for long and does not know that it missed something."""
    board = using(LoneBoard(group, watched=False))
    start = read_changes(board, 0)[1]
    for i in range(CHANGES + 40):
        board.marks.set_engine(0, drained=not i % 2)
    found, newest, lost = read_changes(board, start)
    assert newest == start + CHANGES + 40
    assert len(found) + lost == CHANGES + 40
    # The slot of the oldest may be in the making for the next.
    assert len(found) == CHANGES - 1
    assert found[-1][0].revision == newest & 0xFFFF


def test_a_record_in_the_making_is_not_read(group, using):
    """Guards against half a record: the time of a new change with the words of an old one."""
    board = using(LoneBoard(group, watched=False))
    board.marks.set_engine(0, drained=True)
    newest = board.words[board.index("revision")]
    board.words[board.index("change", newest % CHANGES)] = pack_change(newest + 1, ChangeKind.ENGINE, 9, 0, 1)
    found, _, lost = read_changes(board, newest - 1)
    assert (found, lost) == ([], 1)


def test_history_is_what_happened_before_anybody_looked(group, using):
    """Guards against events that only a reader of that time sees."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    before = time.time()
    using(Engine.attach(group, 1))
    coordinator.drain(1)
    after = time.time()
    events = using(EventReader(Board.attach(group))).read()
    assert [e.kind for e in events] == ["scaled", "coordinator_started", "rank_joined", "rank_drained"]
    assert all(e.recorded and e.group == group for e in events)
    assert before - 0.05 <= events[2].time <= events[3].time <= after + 0.05
    assert using(EventReader(Board.attach(group), history=False)).read() == []


@pytest.fixture
def elsewhere(group):
    """A process to be killed with the coordinator in it; what it leaves is swept."""
    with ExitStack() as stack:
        stack.callback(sweep, group)
        yield stack.enter_context(closing(Remote()))


def test_deaths_that_nobody_records(group, elsewhere, using):
    """Guards against silence while no coordinator lives, and against the same death told again by the next one."""
    elsewhere.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    using(Engine.attach(group, 0))
    victim = using(Remote())
    victim.run("e = Engine.attach(group, 1)", group=group)
    reader = using(EventReader(Board.attach(group)))
    reader.read()
    elsewhere.kill()
    assert [(e.kind, e.recorded) for e in reader.read()] == [("coordinator_gone", False)]
    assert reader.read() == []
    victim.kill()
    assert [(e.kind, e.row, e.recorded) for e in reader.read()] == [("rank_died", 1, False)]
    assert reader.read() == []
    using(Coordinator(group=group, dp_size=2))
    events = wait_until(reader.read)
    assert [(e.kind, e.value) for e in events] == [("coordinator_started", 2)]


def test_a_group_that_ends_and_comes_again(group, using):
    """Guards against a follower that must be restarted with the group, or that repeats its end for ever."""
    first = using(Coordinator(group=group, dp_size=1))
    reader = using(EventReader(Board.attach(group)))
    reader.read()
    first.close()
    assert [e.kind for e in reader.read()] == ["coordinator_gone", "group_ended"]
    assert reader.read() == []
    using(Coordinator(group=group, dp_size=1))
    assert reader.read() == []  # finds it
    assert [e.kind for e in reader.read()] == ["scaled", "coordinator_started"]
