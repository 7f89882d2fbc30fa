"""What an engine learns of its steps, and what of it the board shows."""

from __future__ import annotations

import random

import pytest

from dpshm import Engine, Frontend
from dpshm.board.layout import STEP_MODEL_WORDS
from dpshm.policies import Request, View, sees_work
from dpshm.policies.step_model import BASE_NS, CHUNK_TOKENS, LIMIT_STEPS, MIN_STEPS, StepModel
from tests.support import LoneBoard

TRUE = (8_000_000, 200_000, 40_000)
"""Base, per request, per token; in ns."""


def words_of(model: StepModel) -> dict[str, int]:
    """Its words by name."""
    return dict(zip(STEP_MODEL_WORDS, model.words, strict=True))


def teach(
    model: StepModel, steps: int, rng: random.Random, *, times: float = 1.0, noise: float = 0.0, **fixed: int
):
    """Lets it see steps of an engine that is so many times as slow as `TRUE`."""
    for _ in range(steps):
        batch = fixed.get("batch", rng.randrange(1, 40))
        tokens = fixed.get("tokens", rng.choice([0, 0, 0, rng.randrange(4096)]))
        took = times * (TRUE[0] + TRUE[1] * batch + TRUE[2] * tokens) * max(0.1, rng.gauss(1, noise))
        model.begin(1, tokens, batch)
        model.end(int(took), tokens, batch)


def learnt(model: StepModel) -> tuple[int, int, int]:
    """Its coefficients."""
    words = words_of(model)
    return words["base_ns"], words["per_request_ns"], words["per_token_ns"]


def test_it_finds_the_coefficients():
    """Guards against an estimate that is biased, by the pull to the last one or by noise."""
    model = StepModel()
    teach(model, 2000, random.Random(1), noise=0.05)
    assert learnt(model) == pytest.approx(TRUE, rel=0.05)


def test_it_finds_what_held_tokens_cost():
    """Guards against contexts whose cost is taken for that of requests, and against a cost that no context has."""
    for per_request, per_held in ((20_000, 65), (200_000, 0)):
        model, rng = StepModel(), random.Random(4)
        for _ in range(3000):
            batch, tokens = rng.randrange(1, 40), rng.choice([0, 0, 0, rng.randrange(4096)])
            held = int(batch * rng.uniform(500, 4000))
            took = 8_000_000 + per_request * batch + 40_000 * tokens + per_held * held
            model.begin(1, tokens, batch, held)
            model.end(int(took * rng.gauss(1, 0.05)), tokens, batch, held)
        words = words_of(model)
        assert words["per_held_token_ps"] == pytest.approx(1000 * per_held, abs=8000)
        assert words["per_request_ns"] == pytest.approx(per_request, abs=20_000)
        assert words["held_tokens"] == held


def test_held_tokens_are_shown_while_requests_run():
    """Guards against a rank that looks loaded after its last request has ended, or empty between two steps."""
    model = StepModel()
    model.begin(1, 10, 2, 700)
    assert words_of(model)["held_tokens"] == 700
    model.end(9_000_000, 10, 2, 700, 710)
    assert words_of(model)["held_tokens"] == 710
    model.after_step(0, 2, 0)
    assert words_of(model)["held_tokens"] == 710
    model.end(9_000_000, 0, 2, 710, 712)
    model.finished(2)
    model.after_step(0, 0, 0)
    assert words_of(model)["held_tokens"] == 0


def test_it_says_nothing_until_it_has_seen_enough():
    """Guards against a first step, compiled and slow, that sends all requests elsewhere."""
    model = StepModel()
    teach(model, MIN_STEPS - 1, random.Random(1))
    assert learnt(model) == (0, 0, 0)
    teach(model, 1, random.Random(1))
    assert learnt(model)[0] > 0


def test_it_says_nothing_of_prompts_that_it_has_not_seen():
    """Guards against prompts that seem to cost nothing, because an engine only ran dummy steps so far."""
    model = StepModel()
    teach(model, 100, random.Random(1), batch=0, tokens=0)
    assert learnt(model) == (0, 0, 0)
    teach(model, 30, random.Random(1))
    assert learnt(model) == pytest.approx(TRUE, rel=0.3)


def test_it_follows_an_engine_that_slows_down():
    """Guards against a memory that is too long: an engine that throttles must be seen within seconds."""
    model, rng = StepModel(), random.Random(2)
    teach(model, 2000, rng)
    teach(model, 1500, rng, times=2.0)
    assert learnt(model) == pytest.approx([2 * x for x in TRUE], rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("times", [2.0, 4.0])
def test_it_follows_at_once(times: float, noise: float):
    """Guards against an engine that is slow, or has recovered, and gets its old share for another 350 steps."""
    model, rng = StepModel(), random.Random(6)
    teach(model, 1500, rng, noise=noise)
    usual = TRUE[0] + 16 * TRUE[1] + 512 * TRUE[2]
    teach(model, 60, rng, times=times, noise=noise)
    assert model.expect(512, 16) == pytest.approx(times * usual, rel=0.25)
    teach(model, 60, rng, noise=noise)
    assert model.expect(512, 16) == pytest.approx(usual, rel=0.25)


def test_noise_is_not_taken_for_a_change():
    """Guards against an estimate that forgets whenever some steps in a row are long."""
    model, rng = StepModel(), random.Random(7)
    usual = TRUE[0] + 16 * TRUE[1] + 512 * TRUE[2]
    teach(model, 500, rng, noise=0.4)
    worst = 0.0
    for _ in range(300):
        teach(model, 8, rng, noise=0.4)
        worst = max(worst, abs(model.expect(512, 16) / usual - 1))
    assert worst < 0.12


def test_it_does_not_drift_while_nothing_new_is_to_be_learnt():
    """Guards against the blow-up of forgetting: long decoding at one batch size must not spoil the rest."""
    model, rng = StepModel(), random.Random(3)
    teach(model, 1000, rng, noise=0.02)
    teach(model, 20_000, rng, noise=0.02, batch=16, tokens=0)
    assert model.expect(0, 16) == pytest.approx(TRUE[0] + 16 * TRUE[1], rel=0.02)
    assert learnt(model)[2] == pytest.approx(TRUE[2], rel=0.1)


def test_a_stray_step_does_little():
    """Guards against one step of ten seconds (a stopped process) that makes an engine look dead slow for long."""
    model, rng = StepModel(), random.Random(4)
    teach(model, 1000, rng)
    before = model.expect(0, 16)
    model.end(10_000_000_000, 0, 16)
    teach(model, 8, rng)
    assert model.expect(0, 16) < 1.1 * before


def test_a_few_small_steps_tell_little_of_large_ones():
    """Guards against an engine that had few requests at a time, one slow step among them, and gets none any more.

    Two engines are equally fast. Neither has seen a batch of 16, by which they are compared.
    """
    apart = []
    for seed in range(24):
        rng, found = random.Random(seed), []
        for stray in (False, True):
            model = StepModel()
            for step in range(64):
                batch, tokens = rng.randrange(1, 6), 3 * (step % 2)
                times = rng.choice([1.0, 1.0, 1.0, 1.3]) * (3.0 if stray and step == 22 else 1.0)
                model.begin(1, tokens, batch)
                model.end(int(10_800_000 * times), tokens, batch)
                if step > MIN_STEPS:
                    found.append(model.expect(512, 16))
        apart.append(max(found) / min(found))
    assert sum(apart) / len(apart) < 1.3


def test_coefficients_are_never_negative():
    """Guards against an engine whose noise makes work look like a gain."""
    model, rng = StepModel(), random.Random(5)
    for _ in range(500):
        batch = rng.randrange(40)
        model.end(20_000_000 - 300_000 * batch, 0, batch)
        assert min(learnt(model)) >= 0


def test_it_learns_how_much_a_step_holds():
    """Guards against a chunk that is taken from a step which was not full, or is less than a step has computed.

    Of short prompts that a full batch keeps waiting, the first step that leaves some computes few.
    """
    model = StepModel()
    for prompt, backlog, chunk in ((400, 0, 0), (18, 200, 400), (512, 2000, 512), (300, 900, 512), (600, 0, 600)):
        model.end(10_000_000, prompt, 9)
        model.after_step(waiting=backlog > 0, running=9, prefill_backlog=backlog)
        assert words_of(model)["chunk_tokens"] == chunk


def test_it_learns_how_many_requests_have_room():
    """Guards against an engine that counts as full because a request came while it stepped, or for its tokens."""
    model = StepModel()

    def step(tokens: int, waiting: int, running: int) -> int:
        model.end(10_000_000, tokens, running)
        model.after_step(waiting, running, prefill_backlog=800 * waiting)
        learnt = list(model.words)
        model.after_step(50, 0, 0)  # a publish that no step came before says nothing of one
        assert model.words == learnt
        return words_of(model)["max_running"]

    assert [step(512, 3, 10) for _ in range(9)] == [0] * 9  # each step was full of tokens
    assert [step(100, i % 3 > 0, 12) for i in range(10)] == [0] * 10  # newcomers
    assert [step(0, 2, running) for running in (64, 63, 63)] == [0, 0, 64]
    assert step(100, 0, 40) == 64  # still so when there is room again
    assert [step(0, 1, 50) for _ in range(3)] == [64, 64, 50]  # another limit: the KV cache


@pytest.mark.parametrize("after", ["more run", "long without a queue"])
def test_a_limit_does_not_last_for_ever(after: str):
    """Guards against ranks that count as full for good since a few long contexts filled the KV cache."""
    model = StepModel()

    def step(waiting: int, running: int) -> int:
        model.end(10_000_000, 100, running)
        model.after_step(waiting, running, prefill_backlog=0)
        return words_of(model)["max_running"]

    model.words[CHUNK_TOKENS] = 4096
    assert [step(2, 6) for _ in range(3)] == [0, 0, 6]
    if after == "more run":
        assert [step(0, 6), step(1, 7), step(0, 7)] == [6, 6, 0]  # with a queue it may still be full
    else:
        assert [step(0, 5) for _ in range(LIMIT_STEPS - 1)] == [6] * (LIMIT_STEPS - 1)
        assert [step(2, 6) for _ in range(3)] == [6] * 3  # full once more: it is counted from here
        assert [step(0, 5) for _ in range(LIMIT_STEPS)] == [6] * (LIMIT_STEPS - 1) + [0]
    assert [step(2, 30) for _ in range(3)] == [0, 0, 30]


def test_a_budget_that_decoding_shares_is_no_lack_of_room():
    """Guards against ranks that count as full for good since long prompts filled their steps beside 30 decodes."""
    model = StepModel()
    for running in (1, *[31] * 9):
        model.end(170_000_000, 4096 - (running - 1), running)
        model.after_step(waiting=3, running=running, prefill_backlog=20_000)
    assert words_of(model)["chunk_tokens"] == 4096
    assert words_of(model)["max_running"] == 0


@pytest.mark.parametrize("before", [True, False])
def test_those_that_a_step_finished_had_room_in_it(before: bool):
    """Guards against a limit that is too low by those that have just ended, whenever the engine counts them."""
    model = StepModel()
    for _ in range(5):
        if before:
            model.finished(3)
        model.end(10_000_000, 0, 64)
        if not before:
            model.finished(3)
        model.after_step(waiting=2, running=61, prefill_backlog=900)
    assert words_of(model)["max_running"] == 64


def test_it_learns_how_fast_requests_end():
    """Guards against a queue that is thought to move at another pace than it does."""
    model = StepModel()
    for i in range(2000):
        model.finished(i % 4 == 0)
        model.end(10_000_000, 0, 8)
    assert words_of(model)["ending_ns"] == pytest.approx(40_000_000, rel=0.01)


def test_a_running_step_says_when_it_ends():
    """Guards against front-ends that think an engine free which has a long prompt to compute."""
    model = StepModel()
    teach(model, 500, random.Random(6))
    model.begin(5_000_000_000, 1000, 10)
    words = words_of(model)
    assert words["step_tokens"] == 1000
    assert words["step_end"] - 5_000_000_000 == pytest.approx(TRUE[0] + 10 * TRUE[1] + 1000 * TRUE[2], rel=0.05)
    model.end(50_000_000, 1000, 10)
    assert (words_of(model)["step_end"], words_of(model)["step_tokens"]) == (0, 0)


def test_the_board_shows_what_an_engine_has_learnt(group, using):
    """Guards against words that are learnt and not stored, or stored where front-ends do not look."""
    using(LoneBoard(group, watched=False, dp_size=2, waves=False))
    engine = using(Engine.attach(group, 1))
    seen: list[View] = []

    @sees_work
    def policy(view: View, request: Request) -> int:
        seen.append(view)
        return 1

    frontend = using(Frontend.attach(group, policy=policy))
    for _ in range(MIN_STEPS):
        with engine.step(prefill_tokens=10, batch=2):
            pass
    engine.publish(waiting=1, running=0, prefill_backlog=700)
    frontend._decisions.reader.refresh()  # as it does every 100 ms
    _booked = frontend.route(300)
    with engine.step(prefill_tokens=512, batch=1):
        _second = frontend.route(40)
    first, second = (view.work for view in seen)
    assert first.learnt
    for column in (first.base_ns, first.per_request_ns, first.per_token_ns):
        assert column[0] == column[1]  # rank 0 has learnt nothing: taken to be like the other
    assert (first.step_end_ns[1], first.step_tokens[1]) == (0, 0)
    assert second.step_tokens[1] == 512
    assert first.now_ns < second.step_end_ns[1]
    assert [work.tokens for work in (first, second)] == [[0, 700], [0, 700 + 300]]


def test_counting_policies_are_not_shown_tokens(group, using):
    """Guards against decisions that pay for what they do not look at."""
    using(LoneBoard(group, watched=False, dp_size=1))
    using(Engine.attach(group, 0))
    seen: list[View] = []
    frontend = using(Frontend.attach(group, policy=lambda view, request: seen.append(view) or 0))
    frontend.route(300)
    assert not seen[0].has_work


def test_a_new_engine_has_learnt_nothing(group, using):
    """Guards against a fast engine that is taken for its slow predecessor."""
    board = using(LoneBoard(group, watched=False, dp_size=1))
    with Engine.attach(group, 0) as engine:
        for _ in range(MIN_STEPS):
            with engine.step(prefill_tokens=9, batch=1):
                pass
            engine.publish(waiting=0, running=0)
    assert board.step_model[0, BASE_NS] > 0
    using(Engine.attach(group, 0))
    assert board.step_model[0].tolist() == [0] * len(STEP_MODEL_WORDS)
