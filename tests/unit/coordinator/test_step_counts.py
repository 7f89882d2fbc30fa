"""Tests of `dpshm.coordinator.step_counts`."""

from __future__ import annotations

from dpshm.coordinator.step_counts import StepCounts

A, B, C, D = (1, 2, 0.1), (3, 4, 0.2), (5, 6, 0.3), (7, 8, 0.4)


def test_nothing_was_reported():
    """Guards against made-up counts before the first report."""
    counts = StepCounts()
    assert counts.next_to_publish() == {}
    assert counts.next_to_publish() == {}


def test_a_step_that_is_coming_in_is_not_mixed_with_the_one_before():
    """Guards against publishing a mixture of two steps, in which even ranks look uneven."""
    counts = StepCounts()
    assert counts.report(0, 0, 1, A)
    assert counts.report(1, 0, 1, A)
    assert counts.report(0, 0, 2, B)  # step 2 begins: step 1 is complete
    assert counts.next_to_publish() == {0: A, 1: A}
    assert counts.report(1, 0, 2, B)
    assert counts.next_to_publish() == {0: B, 1: B}


def test_the_newest_complete_step_is_the_one_published():
    """Guards against falling behind by a step at each interval that spans several."""
    counts = StepCounts()
    for step, number in enumerate((A, B, C), start=1):
        counts.report(0, 0, step, number)
        counts.report(1, 0, step, number)
    counts.report(0, 0, 4, D)
    assert counts.next_to_publish() == {0: C, 1: C}


def test_once_taken_the_newest_counts():
    """Guards against publishing a step again and again while nothing newer begins."""
    counts = StepCounts()
    counts.report(0, 0, 1, A)
    counts.report(0, 0, 2, B)
    assert counts.next_to_publish() == {0: A}
    assert counts.next_to_publish() == {0: B}
    assert counts.next_to_publish() == {0: B}
    counts.report(0, 0, 2, C)  # more of the same step
    assert counts.next_to_publish() == {0: C}


def test_a_newer_wave_is_newer_though_its_step_is_lower():
    """Guards against steps that start again at 0 in each wave being taken for late ones."""
    counts = StepCounts()
    assert counts.report(0, 3, 90, A)
    assert counts.report(1, 3, 90, A)
    assert counts.report(0, 4, 1, B)
    assert not counts.report(1, 3, 91, C)  # late
    assert counts.next_to_publish() == {0: A, 1: A}
    assert counts.report(1, 4, 1, D)


def test_the_first_step_is_no_complete_one():
    """Guards against counts of no rank at all, as if a step before the first had been complete."""
    counts = StepCounts()
    counts.report(0, 3, 9, A)
    assert counts.next_to_publish() == {0: A}


def test_late_reports_say_so_and_count():
    """Guards against losing a rank's only report because another rank was quicker."""
    counts = StepCounts()
    counts.report(0, 0, 5, A)
    assert not counts.report(1, 0, 4, B)
    assert counts.next_to_publish() == {0: A, 1: B}


def test_counts_that_are_taken_belong_to_who_took_them():
    """Guards against a publisher that changes its copy and so what is published next."""
    counts = StepCounts()
    counts.report(0, 0, 1, A)
    counts.report(0, 0, 2, B)
    counts.next_to_publish()[0] = D
    counts.next_to_publish()[0] = D
    assert counts.next_to_publish() == {0: B}


def test_what_is_taken_stays_as_it_was():
    """Guards against counts that change after they were returned, and then equal the next ones."""
    counts = StepCounts()
    counts.report(0, 0, 1, A)
    taken = counts.next_to_publish()
    counts.report(0, 0, 1, B)
    assert taken == {0: A}


def test_ranks_that_were_scaled_away_are_forgotten():
    """Guards against counts of ranks that are gone coming back when the group grows again."""
    counts = StepCounts()
    for dp_rank in range(4):
        counts.report(dp_rank, 0, 1, A)
    counts.report(3, 0, 2, B)
    counts.keep_only(2)
    assert counts.next_to_publish() == {0: A, 1: A}
    assert counts.next_to_publish() == {0: A, 1: A}
    counts.keep_only(0)
    assert counts.next_to_publish() == {}
