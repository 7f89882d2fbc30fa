"""Verdicts, the whole table."""

from __future__ import annotations

import itertools

import pytest

from dpshm.rules.liveness import (
    REMOTE_INTERVAL_NS,
    SILENT_INTERVALS,
    EngineSigns,
    Observation,
    Silence,
    Stillness,
    Verdict,
    evidence_of,
    has_work,
    is_silent,
    judge,
    still_holds,
)

ABSENT, ALIVE, STALLED, DEAD, STUCK, UNKNOWN = Verdict
REST = list(itertools.product((False, True), (False, True), (0, 59, 60, 61, 1 << 62), (0, 60)))


def test_a_process_that_ends_is_dead_although_its_lock_is_held():
    """Guards against an engine that is routed to for as long as the kernel frees its memory."""
    for work, paused, age, timeout in REST:
        rest = work, paused, age, age
        assert judge(Observation(True, True, *rest, ending=True), timeout) is DEAD
        assert judge(Observation(True, False, *rest, ending=True), timeout) is DEAD
        assert judge(Observation(False, True, *rest, ending=True), timeout) is ABSENT


def test_the_values_are_those_of_marks_on_a_board():
    """Guards against a renumbering that makes zeroed memory, or another process's marks, mean something else."""
    values = {"ABSENT": 0, "ALIVE": 1, "STALLED": 2, "DEAD": 3, "STUCK": 18, "UNKNOWN": 34}
    assert {v.name: v.value for v in Verdict} == values
    assert Verdict.STUCK & 3 == Verdict.UNKNOWN & 3 == Verdict.STALLED  # to a reader that does not know them
    for damaged in (16, 17, 19, 33, 35, 50, -1, 1 << 62):
        assert Verdict(damaged) is Verdict(damaged & 3)


@pytest.mark.parametrize(("has_work", "paused", "beat_age_ns", "timeout_ns"), REST)
def test_without_its_lock_nothing_else_matters(has_work: bool, paused: bool, beat_age_ns: int, timeout_ns: int):
    """Guards against a dead process called alive because its row looks busy, or its beat is fresh."""
    assert judge(Observation(True, False, has_work, paused, beat_age_ns), timeout_ns) is DEAD
    assert judge(Observation(False, False, has_work, paused, beat_age_ns), timeout_ns) is ABSENT


@pytest.mark.parametrize(("has_work", "paused", "beat_age_ns", "timeout_ns"), REST)
def test_a_row_that_is_being_taken_is_absent(has_work: bool, paused: bool, beat_age_ns: int, timeout_ns: int):
    """Guards against routing to an engine that has its lock and has not stored anything yet."""
    assert judge(Observation(False, True, has_work, paused, beat_age_ns), timeout_ns) is ABSENT


@pytest.mark.parametrize(
    ("has_work", "paused", "beat_age_ns", "timeout_ns", "verdict"),
    [
        (True, False, 60, 60, STALLED),
        (True, False, 61, 60, STALLED),
        (True, False, 1 << 62, 60, STALLED),
        (True, False, 59, 60, ALIVE),
        (True, False, 0, 60, ALIVE),
        (True, False, 0, 1, ALIVE),
        (True, False, 1, 1, STALLED),
        (False, False, 1 << 62, 60, ALIVE),  # idle for days
        (True, True, 1 << 62, 60, ALIVE),  # paused by the user
        (False, True, 1 << 62, 60, ALIVE),
        (True, False, 1 << 62, 0, ALIVE),  # turned off
        (True, False, 0, 0, ALIVE),
        (False, False, 0, 60, ALIVE),
        (False, True, 0, 60, ALIVE),
        (True, True, 60, 60, ALIVE),
    ],
)
def test_who_holds_its_row_is_alive_or_stalled(
    has_work: bool, paused: bool, beat_age_ns: int, timeout_ns: int, verdict: Verdict
):
    """Guards against calling idle or paused engines stalled, and against an engine wedged in a step."""
    assert judge(Observation(True, True, has_work, paused, beat_age_ns), timeout_ns) is verdict


@pytest.mark.parametrize(("has_work", "paused", "beat_age_ns", "timeout_ns"), REST)
def test_a_remote_row_that_is_not_heard_is_unknown(
    has_work: bool, paused: bool, beat_age_ns: int, timeout_ns: int
):
    """Guards against a rank called dead because its network is cut, and one that left called unknown."""
    rest = has_work, paused, beat_age_ns, 0, True
    assert judge(Observation(True, False, *rest), timeout_ns) is UNKNOWN
    assert judge(Observation(False, False, *rest), timeout_ns) is ABSENT
    heard = judge(Observation(True, True, *rest), timeout_ns)
    assert heard is judge(Observation(True, True, has_work, paused, beat_age_ns), timeout_ns)


def test_a_process_is_silent_after_three_intervals():
    """Guards against a rank that is given up while it is heard, or kept though its link was cut."""
    silence, interval = Silence(), REMOTE_INTERVAL_NS
    times = [silence.look(7, t) for t in range(0, 4 * interval, interval // 5)]
    assert times == [t >= SILENT_INTERVALS * interval for t in range(0, 4 * interval, interval // 5)]
    assert not silence.look(8, 4 * interval)  # heard again
    assert not silence.look(8, 5 * interval)


def test_a_watcher_that_did_not_look_calls_no_process_silent():
    """Guards against a coordinator that was stopped for a minute and then calls every remote rank silent."""
    silence = Silence()
    assert not silence.look(7, 0)
    assert not silence.look(7, 60_000_000_000)
    later = [silence.look(7, 60_000_000_000 + i * REMOTE_INTERVAL_NS) for i in range(SILENT_INTERVALS)]
    assert later == [False] * (SILENT_INTERVALS - 1) + [True]


WAITS = EngineSigns(incarnation=1, beat=5, waiting=26)
COUNTS = WAITS._replace(running=3, tokens=700, finished=9)


@pytest.mark.parametrize(
    ("signs", "works"),
    [
        (EngineSigns(), False),
        (EngineSigns(incarnation=3, beat=9, tokens=7, finished=1), False),  # idle
        (EngineSigns(step_start=1), True),
        (EngineSigns(waiting=1), True),
        (EngineSigns(running=5), True),  # between two steps
    ],
)
def test_what_work_is(signs: EngineSigns, works: bool):
    """Guards against a rank that hangs between two steps, and an idle one that a lost request excludes."""
    assert has_work(signs) is works


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (WAITS, WAITS, False),
        (WAITS, WAITS._replace(beat=9, waiting=40), False),  # it publishes, and more wait
        (WAITS, WAITS._replace(waiting=25), True),  # it counts no tokens: its queue is all that shows
        (WAITS, WAITS._replace(running=1), True),
        (WAITS, WAITS._replace(finished=1), True),
        (WAITS._replace(running=1), WAITS._replace(running=1, beat=9), True),  # it may compute and not count
        (COUNTS, COUNTS._replace(waiting=25, beat=9), False),  # clients give up
        (COUNTS, COUNTS._replace(tokens=701), True),
        (COUNTS, COUNTS._replace(finished=10), True),
        (COUNTS, COUNTS._replace(running=4), True),
        (COUNTS, COUNTS._replace(incarnation=2), True),
        (WAITS, EngineSigns(incarnation=1, beat=5), True),
    ],
)
def test_what_progress_is(before: EngineSigns, after: EngineSigns, moved: bool):
    """Guards against an engine whose loop turns in vain for ever, and a verdict on one that works."""
    still = Stillness()
    still.look(before, 100)
    assert still.look(after, 160)[1] == (0 if moved else 60)


@pytest.mark.parametrize(("verdict", "signs"), [(STALLED, COUNTS), (STUCK, COUNTS), (STUCK, WAITS)])
def test_a_verdict_holds_until_its_evidence_changes(verdict: Verdict, signs: EngineSigns):
    """Guards against a verdict that ends with the coordinator that gave it, and one that never ends."""
    evidence = evidence_of(verdict, signs)
    assert still_holds(verdict, evidence, signs)
    assert still_holds(verdict, evidence, signs._replace(beat=6)) is (verdict is STUCK)
    for other in (signs._replace(tokens=999), signs._replace(incarnation=2), signs._replace(paused=True)):
        assert not still_holds(verdict, evidence, other._replace(beat=7))
    assert not still_holds(verdict, evidence, EngineSigns())
    assert not still_holds(ALIVE, evidence, signs)


def test_a_kept_verdict_is_judged_again_at_once():
    """Guards against a coordinator that starts and calls a rank healthy until the timeout is over again."""
    for verdict in (STALLED, STUCK):
        still = Stillness()
        still.keep(verdict, COUNTS, 40, 100)
        ages = still.look(COUNTS, 100)
        assert judge(Observation(True, True, True, False, *ages), 60) is verdict


def test_no_progress_is_stuck():
    """Guards against an engine that beats and finishes nothing, called alive; and no beat is worse."""
    assert judge(Observation(True, True, True, False, 0, 60), 60) is STUCK
    assert judge(Observation(True, True, True, False, 60, 60), 60) is STALLED
    assert judge(Observation(True, True, True, False, 0, 59), 60) is ALIVE
    assert judge(Observation(True, True, True, True, 0, 60), 60) is ALIVE
    assert judge(Observation(True, True, True, False, 0, 60), 0) is ALIVE


@pytest.mark.parametrize(
    ("signs", "age_s", "steps", "busy_s", "silent"),
    [
        (COUNTS, 1.9, 1000, 10, False),
        (COUNTS, 2.1, 1000, 10, True),
        (COUNTS, 19, 10, 10, False),  # steps of a second
        (COUNTS, 21, 10, 10, True),
        (COUNTS, 9, 0, 0, False),
        (COUNTS, 11, 0, 0, True),
        (EngineSigns(), 600, 10, 1, False),
        (COUNTS._replace(paused=True), 600, 10, 1, False),
    ],
)
def test_silent_is_many_steps(signs: EngineSigns, age_s: float, steps: int, busy_s: float, silent: bool):
    """Guards against a stopped rank that looks healthy for a minute, and an idle one that looks ill."""
    assert is_silent(signs, round(age_s * 1e9), steps, round(busy_s * 1e9)) is silent


def test_what_is_not_known_is_not_held_against_anybody():
    """Guards against a front-end, which has no work and no beat that is timed, ever being stalled."""
    assert judge(Observation(taken=True, locked=True), 1) is ALIVE
