"""Rates over a window, and a group that restarts under the watcher."""

from __future__ import annotations

import pytest

from dpshm import Board, Coordinator, Engine
from dpshm.ops.watcher import Watcher, with_rates
from tests.unit.ops.frames import make_coordinator, make_frame, make_frontend, make_rank


def test_rates_are_differences_over_the_time_between():
    """Guards against rates over the wrong time, and a mean step that counts idle time."""
    before = make_frame(
        [make_rank(0, steps=100, busy_s=1.0, requests_finished=7, prompt_tokens=50, generation_tokens=10)],
        [make_frontend(0, routed=5)],
        coordinator=make_coordinator(waves_started=3),
    )
    after = make_frame(
        [make_rank(0, steps=150, busy_s=2.0, requests_finished=17, prompt_tokens=150, generation_tokens=30)],
        [make_frontend(0, routed=25)],
        coordinator=make_coordinator(waves_started=5),
        monotonic_s=104.0,
    )
    found = with_rates(before, after)
    rank = found.ranks[0]
    assert (rank.step_ms, rank.busy, rank.requests_per_s) == (20.0, 0.25, 2.5)
    assert (rank.prompt_tokens_per_s, rank.generation_tokens_per_s) == (25.0, 5.0)
    assert (found.rates_over_s, found.waves_per_minute, found.frontends[0].routed_per_s) == (4.0, 30.0, 5.0)


def test_a_restart_gives_no_rates():
    """Guards against a negative rate when a rank's counters begin anew."""
    before = make_frame([make_rank(0, steps=900), make_rank(1, steps=900)])
    after = make_frame([make_rank(0, steps=3, incarnation=2), make_rank(1, steps=901)], monotonic_s=101.0)
    ranks = with_rates(before, after).ranks
    assert ranks[0].requests_per_s is None
    assert ranks[1].requests_per_s == 0.0
    # Its counters are cleared, and its incarnation, which it stores last, is still that of the one before.
    clearing = make_frame([make_rank(0, steps=0, pid=0), make_rank(1, steps=901)], monotonic_s=101.0)
    assert with_rates(before, clearing).ranks[0].requests_per_s is None


def test_ranks_that_are_new_give_no_rates():
    """Guards against a failure while a group grows."""
    before = make_frame([make_rank(0)])
    found = with_rates(before, make_frame([make_rank(0), make_rank(1)], monotonic_s=101.0))
    assert found.ranks[1].requests_per_s is None


def test_the_window_moves(group, using):
    """Guards against rates over all the time since the start, which no longer change."""
    using(Coordinator(group=group, dp_size=1))
    engine = using(Engine.attach(group, 0))
    watcher = using(Watcher(Board.attach(group), window_s=0.0))
    watcher.read()
    for _ in range(5):
        engine.receive(None)
    engine.finished(5)
    engine.publish(waiting=0, running=0)
    assert watcher.read().ranks[0].requests_per_s > 0
    assert watcher.read().ranks[0].requests_per_s == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_group_that_ends(group, using, again: bool):
    """Guards against a watcher that fails with its group, or shows the dead one for ever when a new one came."""
    first = using(Coordinator(group=group, dp_size=1))
    watcher = using(Watcher(Board.attach(group)))
    assert watcher.read().linked
    first.close()
    if again:
        using(Coordinator(group=group, dp_size=3))
        assert watcher.read().dp_size == 3
    else:
        frame = watcher.read()
        assert (frame.linked, frame.dp_size, frame.coordinator.state) == (False, 1, "none")
