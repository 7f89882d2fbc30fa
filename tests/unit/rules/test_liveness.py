"""Verdicts, the whole table."""

from __future__ import annotations

import itertools

import pytest

from dpshm.rules.liveness import Observation, Verdict, judge

ABSENT, ALIVE, STALLED, DEAD = Verdict.ABSENT, Verdict.ALIVE, Verdict.STALLED, Verdict.DEAD
REST = list(itertools.product((False, True), (False, True), (0, 59, 60, 61, 1 << 62), (0, 60)))


def test_the_values_are_those_of_marks_on_a_board():
    """Guards against a renumbering that makes zeroed memory, or another process's marks, mean something else."""
    assert {v.name: v.value for v in Verdict} == {"ABSENT": 0, "ALIVE": 1, "STALLED": 2, "DEAD": 3}


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


def test_what_is_not_known_is_not_held_against_anybody():
    """Guards against a front-end, which has no work and no beat that is timed, ever being stalled."""
    assert judge(Observation(taken=True, locked=True), 1) is ALIVE
