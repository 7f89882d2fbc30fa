"""Tests of `dpshm.vllm.backlog`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dpshm.vllm.backlog import PrefillBacklog
from tests.unit.vllm.fake_core import Status


class Prompted:
    """A request as vLLM's scheduler keeps it, the part that counts."""

    def __init__(self, request_id, prompt):
        self.request_id = request_id
        self.num_prompt_tokens = prompt
        self.num_computed_tokens = 0
        self.prefill_stats = SimpleNamespace(num_cached_tokens=0)
        self.status = Status.WAITING

    def is_finished(self):
        """Whether it ended."""
        return self.status is Status.FINISHED


def backlog_of(*requests):
    """A backlog that follows these requests."""
    backlog = PrefillBacklog(Status.RUNNING)
    for request in requests:
        backlog.add(request)
    return backlog


def update(backlog, batch, num_waiting, everything):
    """An update whose requests have the status that the scheduler gives them."""
    for request in everything:
        request.status = Status.RUNNING if request in batch else Status.WAITING
    return backlog.update(batch, num_waiting, everything)


def test_it_falls_as_prompts_are_computed():
    """Guards against a backlog that only grows, or counts a prompt twice."""
    a, b = Prompted("a", 100), Prompted("b", 50)
    backlog = backlog_of(a, b)
    assert backlog.tokens == 150
    assert update(backlog, [], 2, [a, b]) == 0
    a.num_computed_tokens = 64
    assert update(backlog, [a], 1, [a, b]) == 64
    assert backlog.tokens == 86
    a.num_computed_tokens = 101  # its prompt, and a token of its own
    assert update(backlog, [a], 1, [a, b]) == 36
    assert backlog.tokens == 50
    assert update(backlog, [a], 1, [a, b]) == 0
    b.num_computed_tokens = 50
    assert update(backlog, [a, b], 0, [a, b]) == 50
    assert backlog.tokens == 0


def test_what_a_cache_held_was_not_computed():
    """Guards against prefix-cache hits that pass for work, and make a step look faster than it was."""
    a = Prompted("a", 100)
    backlog = backlog_of(a)
    stats, a.prefill_stats = a.prefill_stats, None  # the first token takes it off the request
    stats.num_cached_tokens, a.num_computed_tokens = 48, 100
    assert update(backlog, [a], 0, [a]) == 52
    assert backlog.tokens == 0


def test_a_request_that_ended_early_leaves():
    """Guards against aborted prompts that stay in the backlog for ever, from the batch or from the queue."""
    a, b, c = Prompted("a", 100), Prompted("b", 10), Prompted("c", 1)
    backlog = backlog_of(a, b, c)
    a.num_computed_tokens = 30
    assert update(backlog, [a], 2, [a, b, c]) == 30
    b.status = Status.FINISHED  # in the queue
    assert update(backlog, [a], 1, [a, c]) == 0
    assert backlog.tokens == 71
    a.status = Status.FINISHED  # in the batch, and it left at once
    assert update(backlog, [], 1, [c]) == 0
    assert backlog.tokens == 1
    ended = Prompted("d", 5)
    ended.status = Status.FINISHED
    backlog.add(ended)
    assert backlog.tokens == 1


def test_a_preempted_request_counts_again():
    """Guards against a prompt that has to be computed anew and counts in no sum."""
    a, b = Prompted("a", 100), Prompted("b", 10)
    backlog = backlog_of(a, b)
    a.num_computed_tokens = 120
    assert update(backlog, [a], 1, [a, b]) == 100
    a.num_computed_tokens = 0  # preempted: it waits beside b, and is not followed
    assert update(backlog, [], 2, [a, b]) == 0
    assert backlog.tokens == 110


def test_what_is_expected_in_a_cache_is_no_backlog():
    """Guards against a sum that counts as work what the engine finds cached, while the request waits."""
    a = Prompted("a", 100)
    backlog = PrefillBacklog(Status.RUNNING)
    backlog.add(a, 48)
    assert backlog.tokens == 52
    assert update(backlog, [], 1, [a]) == 0
    assert backlog.tokens == 52
    a.prefill_stats.num_cached_tokens, a.num_computed_tokens = 48, 80
    assert update(backlog, [a], 0, [a]) == 32
    assert (backlog.tokens, backlog.cached) == (20, 48)
    a.num_computed_tokens = 100
    assert update(backlog, [a], 0, [a]) == 20
    assert (backlog.tokens, backlog.cached) == (0, 48)


@pytest.mark.parametrize("found", [0, 16, 96])
def test_another_hit_than_expected_is_counted_as_it_is(found):
    """Guards against tokens that were computed and count as cached, because they were expected there."""
    a = Prompted("a", 100)
    backlog = PrefillBacklog(Status.RUNNING)
    backlog.add(a, 48)
    a.prefill_stats.num_cached_tokens, a.num_computed_tokens = found, found + 2
    assert update(backlog, [a], 0, [a]) == 2
    assert (backlog.tokens, backlog.cached) == (98 - found, found)
    a.num_computed_tokens = 100
    assert update(backlog, [a], 0, [a]) == 98 - found
    assert backlog.tokens == 0


def test_tokens_from_another_engine_are_no_hit_of_this_cache():
    """Guards against a hit rate that counts what came over the network from a prefill engine."""
    a = Prompted("a", 100)
    backlog = backlog_of(a)
    a.prefill_stats.num_cached_tokens, a.prefill_stats.num_local_cached_tokens = 64, 16
    a.num_computed_tokens = 100
    assert update(backlog, [a], 0, [a]) == 36
    assert backlog.cached == 16


def test_it_is_current_until_something_leaves_or_a_step_ran():
    """Guards against an aborted prompt that stays in the backlog of a rank which has nothing left to step for."""
    a, b, c = Prompted("a", 100), Prompted("b", 10), Prompted("c", 10)
    backlog = backlog_of(a, b)
    a.num_computed_tokens = 30
    update(backlog, [a], 1, [a, b])
    assert backlog.is_current(1, 1)
    backlog.add(c)
    assert backlog.is_current(1, 2)
    assert not backlog.is_current(0, 2)  # a was aborted
    assert not backlog.is_current(1, 1)  # b or c was
    update(backlog, [a], 2, [a, b, c])
    a.num_computed_tokens = 100
    update(backlog, [a], 2, [a, b, c])
    assert backlog.is_current(1, 2)
