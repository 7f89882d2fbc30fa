"""`least_work` against its formula, written out: what is prepared or left out changes nothing."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import Engine, Frontend
from dpshm.board.layout import MODEL_WORDS, STEP_MODEL_WORDS
from dpshm.board.words import pack_load
from dpshm.policies import LeastWork, Request, View, comparable
from dpshm.policies.columns import ArrayColumns, ArrayRows, ArrayWork, ListColumns, ListWork
from dpshm.policies.prepared import prepare, prepare_arrays
from dpshm.policies.usual import usual_of_few, usual_of_many
from dpshm.policies.work import scores_of_few, scores_of_many
from tests.support import LoneBoard

NOW = 1_000_000_000_000
SEEDED = st.integers(0, 1 << 32).map(random.Random)
deterministic = settings(deadline=None, derandomize=True, max_examples=300)


def formula(view: View, request: Request) -> list[Fraction]:
    """By rank, the score that the documentation of `dpshm.policies.work` and `dpshm.policies.lockstep` gives."""
    work, cached = view.work, request.cached or [0] * len(view.requests)
    backlogs, loads, waits, scores = [], [], [], []
    for e, requests in enumerate(view.requests):
        own = max(1, request.prompt_tokens - cached[e])
        backlog = max(0, work.tokens[e] - work.step_tokens[e])
        base, per_token = work.base_ns[e] + work.per_request_ns[e], work.per_token_ns[e]
        held = Fraction(work.per_held_token_ps[e] * (work.held_tokens[e] + work.tokens[e]), 1024)
        load = work.per_request_ns[e] * requests + held
        steps = -(-(backlog + own) // work.chunk_tokens[e])
        computed = steps * (base + load) + per_token * (backlog + own)
        delay = Fraction(per_token * min(own, 8_192) * requests, 8)
        room = Fraction(0)
        if requests >= work.max_running[e]:
            room = Fraction(work.ending_ns[e] * (requests + 1 - work.max_running[e]))
        rest = min(max(0, work.step_end_ns[e] - work.now_ns), 4 * (base + per_token * work.step_tokens[e]))
        backlogs.append(backlog)
        loads.append(load)
        waits.append(max(computed, room))
        scores.append(max(computed + delay, room) + rest + 16 * load - cached[e])
    if not work.lockstep:
        return scores
    own = max(1, request.prompt_tokens)
    one = work.per_request_ns[0] + Fraction(work.per_held_token_ps[0] * own, 1024)
    return [
        wait
        - hit
        + 8 * work.per_token_ns[0] * max(0, backlog + own - hit - max(backlogs))
        + 8 * 64 * max(Fraction(0), load + one - max(loads))
        for wait, hit, backlog, load in zip(waits, cached, backlogs, loads, strict=True)
    ]


def check(view: View, request: Request, chosen: int) -> None:
    """That it is the choice of the formula, but for what rounding to a nanosecond moves."""
    scores = formula(view, request)
    slack = 600 + max(view.requests)
    least = min(scores[e] for e in view.ranks)
    free = [e for e in view.ranks if not view.overloaded(e)] or view.ranks
    least_free = min(scores[e] for e in free)
    if least_free <= Fraction(3, 2) * least - 2 * slack:
        assert scores[chosen] <= least_free + slack
        assert chosen in free
    elif least_free > Fraction(3, 2) * least + 2 * slack:
        assert scores[chosen] <= least + slack
    else:
        assert scores[chosen] <= least_free + slack


def seen(rng: random.Random, n: int, *, arrays: bool, prepared: bool) -> tuple[View, Request]:
    """Any group of so many ranks, of one kind or several, that meets limits or none, cached or not."""
    kinds = [
        {
            "base_ns": rng.randint(1, 20_000_000),
            "per_request_ns": rng.choice([0, 30_000, 300_000]),
            "per_token_ns": rng.choice([1, 900, 45_000]),
            "per_held_token_ps": rng.choice([0, 0, 40, 65_000]),
        }
        for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    chunk, full = rng.choice([0, 0, 512, 8192]), rng.choice([0, 0, 12, 40])
    models = []
    for _ in range(n):
        words = {**rng.choice(kinds), "ending_ns": rng.randint(0, 200_000_000)}
        words["chunk_tokens"] = rng.choice([0, chunk])
        words["max_running"] = rng.choice([0, full, full + 2])
        models.append([words.get(name, 0) if rng.random() < 0.97 else 0 for name in MODEL_WORDS])
    lockstep = rng.random() < 0.4
    requests = [rng.randrange(rng.choice([4, 16, 60])) for _ in range(n)]
    load = [pack_load(rng.randrange(2), max(1, r), rng.choice([0.3, 0.9, 0.99])) for r in requests]
    models = comparable(models, lockstep=lockstep, running=requests, held=[9000] * n)
    tokens = [rng.randrange(rng.choice([1, 400, 30_000])) for _ in range(n)]
    steps = [
        [rng.choice([0, NOW + rng.randrange(-5_000_000, 40_000_000), 3 * NOW]) for _ in range(n)],
        [rng.choice([0, rng.randrange(2048), t]) for t in tokens],
        [rng.randrange(60_000) for _ in range(n)],
    ]
    ranks = rng.sample(range(n), n if rng.random() < 0.5 else rng.randint(1, n))
    prompt_tokens = rng.choice([0, 1, 512, 12_000, 60_000])
    cached = [rng.randrange(prompt_tokens + 1) for _ in range(n)] if rng.random() < 0.4 else None
    columns: Any
    if arrays:
        many = np.array(models, np.int64)
        work = ArrayWork(ArrayRows.of(requests, tokens, steps), many, NOW, lockstep)
        if prepared:
            work.prepared = prepare_arrays(many)
        columns = ArrayColumns(np.array(ranks), np.array(load), np.array(requests), [0] * n, 1, work)
    else:
        few = ListWork(tokens, steps, models, NOW, lockstep, prepare(models) if prepared else None)
        columns = ListColumns(ranks, load, requests, [0] * n, 1, few)
    return View(columns), Request(prompt_tokens, None, cached)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("arrays", [False, True])
@deterministic
@given(rng=SEEDED)
def test_the_choice_is_that_of_the_formula(rng: random.Random, arrays: bool, prepared: bool):
    """Guards against a usual case whose short cut decides otherwise than the formula does."""
    view, request = seen(rng, rng.choice([1, 2, 3, 8, 20]), arrays=arrays, prepared=prepared)
    if view.work.learnt:
        check(view, request, LeastWork()(view, request))


@deterministic
@given(seed=st.integers(0, 1 << 32), n=st.sampled_from([1, 3, 8, 20]), prepared=st.booleans())
def test_lists_and_arrays_choose_alike(seed: int, n: int, prepared: bool):
    """Guards against a choice that depends on how many ranks there are, by more than rounding to a nanosecond."""
    few, request = seen(random.Random(seed), n, arrays=False, prepared=prepared)
    many, again = seen(random.Random(seed), n, arrays=True, prepared=prepared)
    assert request == again
    one, other = LeastWork()(few, request), LeastWork()(many, request)
    assert LeastWork().expected_ns(few, request) == LeastWork().expected_ns(many, request)
    if few.work.learnt:
        scores = scores_of_few(few.columns, few.columns.work, request)  # type: ignore[arg-type]
        found = scores_of_many(many.columns, many.columns.work, request)  # type: ignore[arg-type]
        assert scores == found.tolist()
        assert abs(scores[one] - scores[other]) <= 1 + max(few.requests)
    else:
        assert one == other
    assert LeastWork()(many, request) == other  # a choice leaves the view as it was


@pytest.mark.parametrize("arrays", [False, True])
@deterministic
@given(seed=st.integers(0, 1 << 32), n=st.sampled_from([1, 3, 8, 20]))
def test_the_usual_decision_is_the_one_of_all_scores(arrays: bool, seed: int, n: int):
    """Guards against a short cut that is taken where a limit, or another kind of rank, decides."""
    view, request = seen(random.Random(seed), n, arrays=arrays, prepared=True)
    columns: Any = view.columns
    own, work = max(1, request.prompt_tokens), columns.work
    if arrays:
        usual = usual_of_many(work.prepared, columns.ranks, work.rows, own, work.now_ns)
        scores = scores_of_many(columns, work, Request(request.prompt_tokens)).tolist()
    elif (shared := work.prepared.shared) is None:
        return
    else:
        rows = columns.requests, work.tokens, work.steps
        usual = usual_of_few(shared, columns.ranks, *rows, own, work.now_ns)
        scores = scores_of_few(columns, work, Request(request.prompt_tokens))
    if usual >= 0 and not work.lockstep:
        assert usual in view.ranks
        assert scores[usual] <= min(scores[e] for e in view.ranks) + 1 + max(view.requests)


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize(
    ("change", "usual"),
    [
        ({}, True),
        ({"requests": 0}, True),
        ({"chunk_tokens": 900}, True),  # of the ranks with a backlog; the best has none
        ({"chunk_tokens": 500}, False),
        ({"max_running": 30}, True),
        ({"max_running": 4}, False),
        ({"base_ns": 0}, False),
        ({"unlike": True}, False),
    ],
)
def test_where_a_decision_is_usual(n: int, change: dict[str, int], usual: bool):
    """Guards against a short cut that is never taken, or taken where the best rank meets a limit."""
    words = {"base_ns": 8_000_000, "per_request_ns": 200_000, "per_token_ns": 40_000} | change
    models = [[words.get(name, 0) for name in MODEL_WORDS] for _ in range(n)]
    if "unlike" in change:
        models[0][0] *= 3
    models = comparable(models)
    requests, tokens = [change.get("requests", 20)] * n, [700] * n
    requests[1], tokens[1] = change.get("requests", 5), 0
    steps = [[NOW + 1000] * n, [0] * n, [9000] * n]
    if n < 16:
        shared = prepare(models).shared
        found = -1
        if shared is not None:
            rows = requests, tokens, steps
            found = usual_of_few(shared, list(range(n)), *rows, 512, NOW)
    else:
        many = prepare_arrays(np.array(models, np.int64))
        found = usual_of_many(many, np.arange(n), ArrayRows.of(requests, tokens, steps), 512, NOW)
    assert found == (1 if usual else -1)


@pytest.mark.parametrize("waves", [False, True])
@pytest.mark.parametrize("n", [2, 8, 40])
def test_what_is_read_from_a_board_is_compared_by_the_formula(group: str, using: Any, n: int, waves: bool):
    """Guards against a reader that hands over a column in the place of another."""
    rng = random.Random(n)
    board = using(LoneBoard(group, engines=n, frontends=3, dp_size=n, waves=waves))
    engines = [using(Engine.attach(group, e)) for e in range(n)]
    kept: list[tuple[View, Request, int, list[Fraction]]] = []

    def policy(view: View, request: Request) -> int:
        chosen = LeastWork()(view, request)
        check(view, request, chosen)
        kept.append((view, request, chosen, formula(view, request)))
        return chosen

    policy.sees_work = True  # type: ignore[attr-defined]
    frontends = [using(Frontend.attach(group, owner=str(f), policy=policy)) for f in range(2)]
    routes = []
    for _ in range(6):
        for e, engine in enumerate(engines):
            words = [rng.randrange(1, 60_000) for _ in STEP_MODEL_WORDS]
            words[STEP_MODEL_WORDS.index("base_ns")] = 8_000_000
            words[0] = rng.choice([0, 1 << 62])
            for i, word in enumerate(words):
                board.step_model[e, i] = word
            engine.publish(
                waiting=rng.randrange(2), running=rng.randrange(40), prefill_backlog=rng.randrange(9000)
            )
        for frontend in frontends:
            frontend._decisions.reader.refresh()  # as it does every 100 ms
            routes += [frontend.route(rng.randrange(4000)) for _ in range(3)]
    assert len(kept) == len(routes) == 36
    assert len({chosen for *_, chosen, _ in kept}) > 1
    # A policy may keep its views: what was seen stays what was seen.
    for view, request, _, scores in kept:
        fresh = View(view.columns)
        assert formula(fresh, request) == scores
    for route in routes:
        route.done()


@pytest.mark.parametrize("n", [2, 8, 40])
def test_a_front_end_decides_by_the_formula_without_a_view(group: str, using: Any, n: int):
    """Guards against a usual decision that reads another board than the view shows, or is not taken."""
    rng = random.Random(n)
    board = using(LoneBoard(group, engines=n, frontends=3, dp_size=n, waves=False))
    engines = [using(Engine.attach(group, e)) for e in range(n)]
    frontend = using(Frontend.attach(group))
    reader, chosen, routes = frontend._decisions.reader, [], []
    words = {"base_ns": 8_000_000, "per_request_ns": 200_000, "per_token_ns": 40_000, "per_held_token_ps": 65_000}
    for _ in range(30):
        for e, engine in enumerate(engines):
            steps = {"step_end": time.monotonic_ns() + rng.randrange(-9_000_000, 90_000_000)}
            steps |= {"step_tokens": rng.choice([0, 512]), "held_tokens": rng.randrange(60_000)}
            for name, word in {**words, **steps}.items():
                board.step_model[e, STEP_MODEL_WORDS.index(name)] = word
            engine.publish(
                waiting=rng.randrange(2),
                running=rng.randrange(40),
                kv_cache_usage=rng.choice([0.4, 0.99]),
                prefill_backlog=rng.randrange(9000),
            )
        reader.refresh()
        assert reader.usual is not None
        now_ns, prompt_tokens = time.monotonic_ns(), rng.randrange(4000)
        rank = reader.usual(prompt_tokens, now_ns)
        view = reader.read(now_ns, again=True)
        if rank >= 0:
            chosen.append(rank)
            check(view, Request(prompt_tokens), rank)
        else:
            assert any(view.overloaded(e) for e in view.ranks)
        routes.append(frontend.route(prompt_tokens))
    assert len(chosen) > 10
    assert len(set(chosen)) > 1
    for route in routes:
        route.done()


def test_ties_turn_where_no_view_is_made(group: str, using: Any):
    """Guards against equal ranks that do not get equal shares, or an order that a failed short cut moves on."""
    board = using(LoneBoard(group, engines=4, frontends=3, dp_size=4, waves=False))
    for e in range(4):
        using(Engine.attach(group, e))
        board.step_model[e, STEP_MODEL_WORDS.index("base_ns")] = 8_000_000
        board.step_model[e, STEP_MODEL_WORDS.index("chunk_tokens")] = 512
    frontend = using(Frontend.attach(group))
    frontend._decisions.reader.refresh()
    for prompt_tokens in (100, 5000):  # a chunk, and more than one: the whole formula
        chosen = [frontend.choose(prompt_tokens) for _ in range(8)]
        assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]
