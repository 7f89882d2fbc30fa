"""Exclusive decisions: taken in turns, and never held up for good."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from dpshm import Engine, Frontend
from dpshm.board.segment import Segment
from dpshm.frontend import decision_lock
from dpshm.frontend.decision_lock import DecisionLock
from tests.support import LoneBoard, Remote

PATIENT_NS = 60_000_000_000


@pytest.fixture
def turnstiles(group, using):
    """Two handles' turnstiles on one segment."""
    using(LoneBoard(group, watched=False))
    return [DecisionLock(using(Segment.attach(group))) for _ in range(2)]


def test_one_at_a_time(turnstiles):
    """Guards against a lock that two handles hold at once, or that stays when it is given back."""
    one, other = turnstiles
    assert one.enter()
    assert not other.enter()
    one.leave()
    assert other.enter()
    other.leave()
    assert (one.missed, other.missed) == (0, 1)


def test_a_holder_that_dies_holds_up_nobody(group, using):
    """Guards against a group that stops routing because a front-end was killed in the middle of a decision."""
    using(LoneBoard(group, watched=False))
    mine = DecisionLock(using(Segment.attach(group)))
    remote = using(Remote())
    remote.run(
        "from dpshm.board.segment import Segment\nfrom dpshm.frontend.decision_lock import DecisionLock\n"
        "t = DecisionLock(Segment.attach(group)); assert t.enter()",
        group=group,
    )
    assert not mine.enter()
    remote.kill()
    assert mine.enter()


def test_a_holder_that_is_stopped_holds_up_nobody(group, using):
    """Guards against front-ends that hang because another is in a debugger: they decide without the lock."""
    using(LoneBoard(group, watched=False, dp_size=1))
    using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group, exclusive=True))
    remote = using(Remote())
    remote.run(
        "from dpshm.board.segment import Segment\nfrom dpshm.frontend.decision_lock import DecisionLock\n"
        "t = DecisionLock(Segment.attach(group)); assert t.enter()",
        group=group,
    )
    remote.signal(signal.SIGSTOP)
    try:
        assert frontend.route(1).dp_rank == 0
        assert frontend._decision_lock.missed == 1
    finally:
        remote.signal(signal.SIGCONT)


def test_the_lock_is_given_back_whatever_happens(group, using):
    """Guards against a policy that raises and leaves every other front-end waiting."""
    using(LoneBoard(group, watched=False, dp_size=1))
    using(Engine.attach(group, 0))

    def policy(view, request):
        raise ZeroDivisionError

    frontend = using(Frontend.attach(group, policy=policy, exclusive=True))
    with pytest.raises(ZeroDivisionError):
        frontend.route(1)
    assert DecisionLock(using(Segment.attach(group))).enter()


def test_decisions_see_all_bookings(group, using, monkeypatch):
    """Guards against a lock around the wrong part: with it no two of a burst may choose the same idle engine."""
    using(LoneBoard(group, watched=False, engines=8, frontends=4, dp_size=8))
    for rank in range(8):
        using(Engine.attach(group, rank))
    ours = using(Frontend.attach(group, exclusive=True))
    remotes = [using(Remote()) for _ in range(2)]
    monkeypatch.setattr(decision_lock, "TIMEOUT_NS", PATIENT_NS)  # on a busy machine a holder may be set aside
    code = (
        "from dpshm.frontend import decision_lock\ndecision_lock.TIMEOUT_NS = patient\n"
        "f = Frontend.attach(group, exclusive=True)\nroutes = []"
    )
    for remote in remotes:
        remote.run(code, group=group, patient=PATIENT_NS)
    # Without a coordinator a front-end knows of one that attached since within a tenth of a second. So all attach
    # first, and each reads the board anew at its first decision.
    for remote in remotes:
        remote.begin("for _ in range(800): routes.append(f.route(1))")
    routes = [ours.route(1) for _ in range(800)]
    chosen = Counter(route.dp_rank for route in routes)
    for remote in remotes:
        chosen.update(remote.eval("[route.dp_rank for route in routes]"))
    # Each decision takes a least loaded rank, and sees all that were made before it.
    assert set(chosen.values()) == {300}
    assert ours._decision_lock.missed == 0
