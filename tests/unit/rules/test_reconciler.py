"""What rows say, and for how long they must say it."""

from __future__ import annotations

import pytest

from dpshm.rules.reconciler import RowState, WaveReconciler
from dpshm.rules.waves import CoordinatorState, Phase, RanksIdle, RanksSplit, SeenRunning, WakeTimer

RESEND, TIMEOUT = 200, 1000
T = 10_000  # when the tests begin
PAUSED, WAKING, RUNNING = (CoordinatorState(5, phase) for phase in Phase)


def rows(*waves: int) -> list[RowState]:
    """One row a rank; a negative wave is that of an idle rank (wave 0 is not used)."""
    return [RowState(dp_rank, abs(wave), wave > 0) for dp_rank, wave in enumerate(waves)]


def watch() -> WaveReconciler:
    """A new watch."""
    return WaveReconciler(RESEND, TIMEOUT)


@pytest.mark.parametrize(
    ("state", "shown", "events"),
    [
        (PAUSED, rows(), []),
        (WAKING, rows(), []),
        (RUNNING, rows(), []),
        (PAUSED, rows(-5, -5), []),
        (WAKING, rows(-5, -5), []),
        (RUNNING, rows(-5, -5), []),
        (PAUSED, rows(5, 5), [SeenRunning(0, 5)]),
        (WAKING, rows(5, 5), [SeenRunning(0, 5)]),
        (RUNNING, rows(5, 5), []),
        (PAUSED, rows(-5, 5), [SeenRunning(1, 5)]),
        (WAKING, rows(-5, 5), [SeenRunning(1, 5)]),
        (RUNNING, rows(-5, 5), []),
        (PAUSED, rows(6, 5), [SeenRunning(0, 6)]),
        (WAKING, rows(5, 6), [SeenRunning(1, 6)]),
        (RUNNING, rows(5, 6), [SeenRunning(1, 6)]),
        (PAUSED, rows(4, 4), []),
        (WAKING, rows(4, 4), []),
        (RUNNING, rows(4, 4), []),
        (PAUSED, rows(-9, 5), [SeenRunning(1, 5)]),
    ],
)
def test_at_first_sight_only_running_rows_say_something(
    state: CoordinatorState, shown: list[RowState], events: list[object]
):
    """Guards against acting at once on what the next message is about to explain."""
    assert watch().events(T, state, shown) == events


@pytest.mark.parametrize(
    ("state", "shown", "wave"),
    [
        (RUNNING, rows(5, -5, -5), 5),
        (RUNNING, rows(-6, 5), 6),
        (RUNNING, rows(4, 5), 5),
        (PAUSED, rows(4, -5), 5),
        (PAUSED, rows(4, -4), 4),
        (WAKING, rows(4, -4), 4),
        (RUNNING, rows(5, 5, 5, -5), 5),
    ],
)
def test_ranks_that_stay_split_are_told_apart(state: CoordinatorState, shown: list[RowState], wave: int):
    """Guards against a rank that waits in a collective for one whose START was lost."""
    rows_ = watch()
    assert rows_.events(T, state, shown) == []
    assert rows_.events(T + RESEND - 1, state, shown) == []
    assert rows_.events(T + RESEND, state, shown) == [RanksSplit(wave)]
    # And again at the same interval, for that START may be lost too.
    assert rows_.events(T + 2 * RESEND - 1, state, shown) == []
    assert rows_.events(T + 2 * RESEND, state, shown) == [RanksSplit(wave)]


def test_a_wake_up_after_one_that_was_given_up_has_its_own_time():
    """Guards against a timer that has expired once and then ends each wake-up of that wave at the next look."""
    rows_ = watch()
    for begin in (T, T + 5000, T + 10_000):  # the coordinator never looks while the group is paused
        assert rows_.events(begin, WAKING, rows(-5, -5)) == []
        said = [rows_.events(begin + t, WAKING, rows(-5, -5)) for t in range(RESEND, TIMEOUT + 1, RESEND)]
        assert said == [[WakeTimer(expired=False)]] * (len(said) - 1) + [[WakeTimer(expired=True)]]


def test_a_split_that_healed_counts_anew():
    """Guards against adding up the short splits at the start and end of every wave."""
    rows_ = watch()
    assert rows_.events(T, RUNNING, rows(5, -5)) == []
    assert rows_.events(T + 150, RUNNING, rows(5, 5)) == []
    assert rows_.events(T + 250, RUNNING, rows(5, -5)) == []
    assert rows_.events(T + 250 + RESEND - 1, RUNNING, rows(5, -5)) == []
    assert rows_.events(T + 250 + RESEND, RUNNING, rows(5, -5)) == [RanksSplit(5)]


@pytest.mark.parametrize(
    ("state", "shown", "wave"),
    [
        (RUNNING, rows(-5, -5), 5),
        (RUNNING, rows(-6, -6), 6),
        (RUNNING, rows(-4, -4), 4),
        (PAUSED, rows(-6, -5), 6),
        (RUNNING, rows(-5), 5),
    ],
)
def test_ranks_that_stay_idle_end_the_wave(state: CoordinatorState, shown: list[RowState], wave: int):
    """Guards against a phase that stays RUNNING for ever because one message was lost."""
    rows_ = watch()
    assert rows_.events(T, state, shown) == []
    assert rows_.events(T + RESEND - 1, state, shown) == []
    assert rows_.events(T + RESEND, state, shown) == [RanksIdle(wave)]
    assert rows_.events(T + RESEND + 1, state, shown) == []


def test_ranks_idle_in_a_later_wave_end_a_wake_up_too():
    """Guards against sending START for a wave that is over until the wake-up times out."""
    rows_ = watch()
    assert rows_.events(T, WAKING, rows(-6, -6)) == []
    assert RanksIdle(6) in rows_.events(T + RESEND, WAKING, rows(-6, -6))


@pytest.mark.parametrize("state", [PAUSED, WAKING], ids=["paused", "waking"])
def test_idle_ranks_of_this_wave_say_nothing(state: CoordinatorState):
    """Guards against a loop: a group at rest must not be told that it is at rest."""
    rows_ = watch()
    for at in range(0, 3 * RESEND, 50):
        events = rows_.events(T + at, state, rows(-5, -5, -4))
        assert [e for e in events if not isinstance(e, WakeTimer)] == []


def test_a_moment_of_work_counts_anew():
    """Guards against ending a wave because its ranks were idle twice, with work between."""
    rows_ = watch()
    rows_.events(T, RUNNING, rows(-5, -5))
    rows_.events(T + 150, RUNNING, rows(5, 5))
    assert rows_.events(T + 250, RUNNING, rows(-5, -5)) == []
    assert rows_.events(T + 250 + RESEND, RUNNING, rows(-5, -5)) == [RanksIdle(5)]


def test_no_rows_are_no_evidence():
    """Guards against pausing a group of stock engines, which have no rows that say whether they step."""
    rows_ = watch()
    assert [rows_.events(T + at, RUNNING, []) for at in (0, RESEND, 10 * RESEND)] == [[], [], []]


@pytest.mark.parametrize("shown", [rows(-5, -5), rows()], ids=["idle", "stock engines"])
def test_an_unanswered_wake_up_is_repeated_and_given_up(shown: list[RowState]):
    """Guards against a lost START that is never repeated, and one that is repeated for ever."""
    rows_ = watch()
    seen = {at: rows_.events(T + at, WAKING, shown) for at in range(0, TIMEOUT + 1, 100)}
    again, gave_up = [WakeTimer(expired=False)], [WakeTimer(expired=True)]
    assert seen == {
        0: [], 100: [], 200: again, 300: [], 400: again, 500: [], 600: again, 700: [], 800: again, 900: [],
        1000: gave_up,
    }  # fmt: skip


def test_a_wake_up_that_was_answered_starts_a_new_timer():
    """Guards against giving a wake-up up early because one before it took long."""
    rows_ = watch()
    for at in range(0, 900, 100):
        rows_.events(T + at, WAKING, rows(-5, -5))
    rows_.events(T + 900, RUNNING, rows(5, 5))
    assert rows_.events(T + 1000, WAKING, rows(-5, -5)) == []
    assert rows_.events(T + 1000 + RESEND - 1, WAKING, rows(-5, -5)) == []
    assert rows_.events(T + 1000 + RESEND, WAKING, rows(-5, -5)) == [WakeTimer(expired=False)]


def test_a_wake_up_of_another_wave_starts_a_new_timer():
    """Guards against giving a wake-up up at once, because between two late looks one wave ended and one began."""
    rows_ = watch()
    rows_.events(T, WAKING, rows(-5, -5))
    later = CoordinatorState(6, Phase.WAKING)
    assert rows_.events(T + 5 * TIMEOUT, later, rows(-6, -6)) == []
    assert rows_.events(T + 5 * TIMEOUT + RESEND, later, rows(-6, -6)) == [WakeTimer(expired=False)]


def test_while_a_rank_runs_the_wake_up_waits():
    """Guards against a warning that no rank woke up while ranks are seen running."""
    rows_ = watch()
    for at in range(0, 3 * TIMEOUT, 100):
        events = rows_.events(T + at, WAKING, rows(4, 4))
        assert events == []


@pytest.mark.parametrize(
    ("state", "shown", "event"),
    [
        (RUNNING, rows(5, -5), RanksSplit(5)),
        (RUNNING, rows(-5), RanksIdle(5)),
        (WAKING, rows(-5), WakeTimer(False)),
    ],
)
def test_time_may_begin_at_zero(state: CoordinatorState, shown: list[RowState], event: object):
    """Guards against an instant that reads as "not set", in the simulations if not on a machine."""
    rows_ = watch()
    assert rows_.events(0, state, shown) == []
    assert rows_.events(RESEND, state, shown) == [event]


def test_any_iterable_of_rows_will_do():
    """Guards against a generator that the first pass over it empties."""
    assert watch().events(T, WAKING, iter(rows(-5, 5))) == [SeenRunning(1, 5)]
