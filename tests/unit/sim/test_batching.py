"""The model of an engine: what it may never lose or exceed, and how long its steps take."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm.errors import SettingError
from dpshm.sim.batching import Batcher, SimRequest
from dpshm.sim.step_cost import StepCost


def run(batcher: Batcher, limit: int = 100_000):
    """Steps until nothing is left; what happened in each step."""
    history = []
    while batcher.unfinished:
        step = batcher.plan()
        history.append((step, batcher.finish(step)))
        assert len(history) < limit
    return history


def test_one_request():
    """Guards against a first or last token a step early or late, and against a wrong step time."""
    batcher = Batcher()
    batcher.add(SimRequest("a", 1000, 3))
    history = run(batcher)
    assert [(s.prompt_tokens, s.batch, s.output_tokens) for s, _ in history] == [
        (1000, 1, 1),
        (0, 1, 1),
        (0, 1, 1),
    ]
    held = [0, 1000, 1001]
    assert [s.held_tokens for s, _ in history] == held
    in_ms = [8.02 + 40, *(8.02 + 65e-6 * tokens for tokens in held[1:])]
    assert [s.seconds * 1e3 for s, _ in history] == pytest.approx(in_ms)
    assert [[r.key for r in f.first_tokens] for _, f in history] == [["a"], [], []]
    assert [[r.key for r in f.completed] for _, f in history] == [[], [], ["a"]]
    assert (batcher.kv_used, batcher.prefill_backlog) == (0, 0)


def test_single_output_token_completes_with_its_prefill():
    """Guards against a request of one token that never ends."""
    batcher = Batcher()
    batcher.add(SimRequest("a", 10, 1))
    ((_, finished),) = run(batcher)
    assert finished.first_tokens == finished.completed


def test_prompts_are_computed_in_chunks_beside_decoding():
    """Guards against a long prompt that stops the others, or exceeds the budget of a step."""
    batcher = Batcher(StepCost(max_step_tokens=100))
    batcher.add(SimRequest("short", 60, 9))
    batcher.add(SimRequest("long", 250, 2))
    steps = [step for step, _ in run(batcher)]
    assert [s.prompt_tokens for s in steps[:5]] == [100, 99, 99, 12, 0]
    assert [s.batch for s in steps[:5]] == [2, 2, 2, 2, 2]
    assert [s.output_tokens for s in steps[:5]] == [1, 1, 1, 2, 2]


def test_batch_limit_and_order():
    """Guards against more running than allowed, and against overtaking."""
    batcher = Batcher(StepCost(max_running=2))
    for key in range(5):
        batcher.add(SimRequest(key, 10, 4))
    batcher.plan()
    assert (batcher.running, batcher.waiting) == (2, 3)
    first = [r.key for _, f in run(batcher) for r in f.first_tokens]
    assert first == [0, 1, 2, 3, 4]


def test_kv_cache_is_released_and_usage_is_a_share():
    """Guards against a usage that creeps up until nothing fits."""
    batcher = Batcher(StepCost(kv_tokens=200))
    batcher.add(SimRequest("a", 100, 50))
    batcher.finish(batcher.plan())
    assert batcher.kv_cache_usage == 0.5
    run(batcher)
    assert batcher.kv_cache_usage == 0


class Half:
    """A prefix cache that holds half of each prompt."""

    def cached(self, request: SimRequest) -> int:
        return request.prompt_tokens // 2

    def computed(self, request: SimRequest, tokens: int) -> None:
        return


def test_held_tokens_are_the_context_of_the_running():
    """Guards against contexts counted twice, kept after an end or a preemption, or without what was cached."""
    batcher = Batcher(StepCost(kv_tokens=700, max_step_tokens=100, max_running=8), Half())
    for key in range(12):
        batcher.add(SimRequest(key, 40 + 20 * key, 5 + 3 * key))
    while batcher.unfinished:
        step = batcher.plan()
        decoding = batcher.work(step).decoding
        tokens = [r.prompt_tokens + r.generated - 1 + batcher._steps - r.base_step for r in decoding]
        tokens += [r.prompt_tokens + r.generated - r.prompt_left for r in batcher._prefilling]
        assert step.held_tokens == batcher.held_tokens == sum(tokens)
        assert batcher.copy().held_tokens == batcher.held_tokens
        batcher.finish(step)
    assert batcher.preemptions > 0
    assert batcher.held_tokens == 0


def test_youngest_is_preempted_and_its_first_token_comes_once():
    """Guards against a full cache that stops the oldest request, or tells of a first token twice."""
    batcher = Batcher(StepCost(kv_tokens=100))
    batcher.add(SimRequest("old", 40, 50))
    batcher.add(SimRequest("young", 40, 50))
    history = run(batcher)
    assert batcher.preemptions >= 1
    assert [r.key for _, f in history for r in f.completed] == ["old", "young"]
    assert [r.key for _, f in history for r in f.first_tokens] == ["old", "young"]


def test_dummy_step():
    """Guards against an idle rank that would not keep step, or would count work."""
    batcher = Batcher()
    step = batcher.plan()
    assert (step.prompt_tokens, step.batch, step.output_tokens, step.seconds) == (0, 0, 0, 0.008)
    assert batcher.finish(step) == ([], [])


@pytest.mark.parametrize(("prompt", "output"), [(90, 11), (101, 1), (0, 5), (5, 0), (-1, 5)])
def test_impossible_requests_are_refused(prompt, output):
    """Guards against a request at the head of the queue that blocks it for ever."""
    batcher = Batcher(StepCost(kv_tokens=100))
    with pytest.raises(SettingError):
        batcher.add(SimRequest("a", prompt, output))
    assert batcher.unfinished == 0


def test_largest_possible_request_completes():
    """Guards against an off-by-one in what is refused."""
    batcher = Batcher(StepCost(kv_tokens=100))
    batcher.add(SimRequest("a", 90, 10))
    run(batcher)


@settings(max_examples=300)
@given(
    requests=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(1, 40)), max_size=40),
    max_running=st.integers(1, 8),
    max_step_tokens=st.integers(1, 50),
    kv_tokens=st.integers(100, 300),
)
def test_nothing_lost_nothing_exceeded(requests, max_running, max_step_tokens, kv_tokens):
    """Guards against a lost or doubled request, an overfull cache or batch, and tokens from nowhere.

    Requests come in at any step; a small cache makes preemption common.
    """
    cost = StepCost(max_running=max_running, max_step_tokens=max_step_tokens, kv_tokens=kv_tokens)
    batcher = Batcher(cost)
    pending = sorted(requests)
    first, completed = [], []
    steps = prompt_tokens = output_tokens = added = 0
    while pending or batcher.unfinished:
        while pending and pending[0][0] <= steps:
            _, prompt, output = pending.pop(0)
            batcher.add(SimRequest((added, prompt, output), prompt, output))
            added += 1
        step = batcher.plan()
        assert batcher.running <= max_running
        decoding = len(batcher.work(step).decoding)
        assert step.prompt_tokens + decoding <= max(max_step_tokens, decoding)
        assert step.output_tokens <= step.batch <= batcher.running
        finished = batcher.finish(step)
        assert 0 <= batcher.kv_used <= kv_tokens
        assert batcher.prefill_backlog >= 0
        assert batcher.unfinished == added - len(completed) - len(finished.completed)
        first += [r.key for r in finished.first_tokens]
        completed += [r.key for r in finished.completed]
        assert set(completed) <= set(first)
        prompt_tokens += step.prompt_tokens
        output_tokens += step.output_tokens
        steps += 1
        assert steps < 50_000
    assert sorted(completed) == sorted(first)
    assert len(set(completed)) == len(requests)
    assert output_tokens == sum(output for _, _, output in requests)
    recomputed = prompt_tokens - sum(prompt for _, prompt, _ in requests)
    assert recomputed == 0 if not batcher.preemptions else recomputed >= 0
    assert (batcher.kv_used, batcher.prefill_backlog) == (0, 0)


def test_same_calls_same_answers():
    """Guards against a model that depends on a clock or on the order of a set."""

    def trace():
        batcher = Batcher(StepCost(kv_tokens=500, max_running=5))
        for i in range(50):
            batcher.add(SimRequest(i, 7 * i % 90 + 1, 13 * i % 60 + 1))
        return [(s, [r.key for r in f.completed]) for s, f in run(batcher)]

    assert trace() == trace()


def test_work_is_what_the_step_says_and_finish_takes():
    """Guards against an accelerator that computes other tokens than those which the scheduler counts."""
    batcher = Batcher(StepCost(max_running=3, max_step_tokens=7, kv_tokens=60))
    requests = [SimRequest(n, prompt, output) for n, (prompt, output) in enumerate([(20, 9), (3, 12), (15, 20)])]
    for request in requests:
        batcher.add(request)
    computed = dict.fromkeys(requests, 0)
    preempted = batcher.preemptions
    while batcher.unfinished:
        step = batcher.plan()
        work = batcher.work(step)
        left = {request: request.prompt_left for request, _ in work.chunks}
        assert sum(tokens for _, tokens in work.chunks) == step.prompt_tokens
        assert len(work.decoding) + len(work.chunks) == step.batch
        ending = [request for request, tokens in work.chunks if tokens == request.prompt_left]
        assert len(work.decoding) + len(ending) == step.output_tokens
        assert all(batcher.is_running(request) for request in (*work.decoding, *left))
        finished = batcher.finish(step)
        for request, tokens in work.chunks:
            computed[request] += tokens
            assert request.prompt_left == left[request] - tokens
        for request in finished.completed:
            assert not batcher.is_running(request)
    assert batcher.preemptions == preempted
    assert [computed[request] for request in requests] == [20, 3, 15]


def test_a_request_longer_than_a_row_is_refused():
    """Guards against a request that outgrows its row of a static KV cache."""
    batcher = Batcher(StepCost(kv_tokens=100, max_context=40))
    batcher.add(SimRequest("fits", 30, 10))
    with pytest.raises(SettingError, match="max_context 40"):
        batcher.add(SimRequest("does not", 30, 11))


class Blocks:
    """A prefix cache of one prompt, which all requests share: so many leading tokens of it are cached."""

    def __init__(self) -> None:
        self.tokens = 0

    def cached(self, request: SimRequest) -> int:
        return min(self.tokens, request.prompt_tokens - 1)

    def computed(self, request: SimRequest, tokens: int) -> None:
        self.tokens = max(self.tokens, min(tokens, request.prompt_tokens))


def test_what_is_cached_is_decided_when_a_request_is_admitted():
    """Guards against a burst on one prompt that computes it once for each request: the later ones wait, and when
    they are admitted the first has computed it.
    """
    blocks = Blocks()
    batcher = Batcher(StepCost(max_step_tokens=1000), blocks)
    for i in range(4):
        batcher.add(SimRequest(i, 1500, 3))
    assert batcher.prefill_backlog == 6000
    steps = []
    while batcher.unfinished:
        steps.append(batcher.plan())
        batcher.finish(steps[-1])
    assert [step.prompt_tokens for step in steps[:3]] == [1000, 503, 0]
    assert [step.batch for step in steps[:3]] == [1, 4, 4]
    assert (batcher.prefill_backlog, batcher.kv_used) == (0, 0)


def test_an_expectation_that_was_wrong_is_put_right():
    """Guards against a backlog that keeps what was expected at a request's arrival, and against a prompt that is
    not computed although its blocks have left the cache.
    """
    blocks = Blocks()
    batcher = Batcher(StepCost(max_step_tokens=1000), blocks)
    batcher.add(SimRequest(0, 800, 2, cached=600))
    assert batcher.prefill_backlog == 200
    step = batcher.plan()
    assert (step.prompt_tokens, batcher.prefill_backlog, batcher.kv_used) == (800, 800, 800)
    batcher.finish(step)
    batcher.finish(batcher.plan())
    assert (batcher.prefill_backlog, batcher.kv_used, batcher.unfinished) == (0, 0, 0)


def test_preempted_requests_look_again():
    """Guards against room or backlog that is lost where requests with cached prefixes are preempted."""
    blocks = Blocks()
    batcher = Batcher(StepCost(max_step_tokens=256, kv_tokens=700), blocks)
    for i in range(6):
        batcher.add(SimRequest(i, 300, 200))
    while batcher.unfinished:
        batcher.finish(batcher.plan())
        assert 0 <= batcher.kv_used <= 700
        blocks.tokens = blocks.tokens // 2  # what was cached is evicted in part
    assert batcher.preemptions > 0
    assert (batcher.prefill_backlog, batcher.kv_used) == (0, 0)
