"""Code that packs or unpacks words in place, for speed, agrees with the functions of `dpshm.board.words`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import Engine, Frontend, SettingError
from dpshm.board.words import (
    KV_ONE,
    MAX_RUNNING,
    MAX_STEP,
    MAX_WAITING,
    MAX_WAVE,
    MAX_WORD,
    pack_control,
    pack_load,
    pack_progress,
    queued,
    unpack_control,
    unpack_load,
)
from dpshm.net import wire
from dpshm.net.doorbell import Doorbell
from dpshm.policies import View
from dpshm.policies.columns import ArrayColumns, ListColumns
from dpshm.rules.liveness import has_work
from dpshm.rules.waves import Phase
from tests.support import LoneBoard

repeatable = settings(deadline=None, derandomize=True, max_examples=300)
EDGES = [
    *(0, 1, 2, 3, KV_ONE, KV_ONE + 1, MAX_WORD, MAX_WORD - 3),
    *(pack_control(wave, phase) for wave in (1, MAX_WAVE - 1, MAX_WAVE) for phase in Phase),
    *(pack_control(MAX_WAVE, Phase.PAUSED) + extra for extra in (3, 4, 1 << 33, 1 << 62)),
    *(pack_load(w, r, kv) for w in (0, 1, MAX_WAITING) for r in (0, 1, MAX_RUNNING) for kv in (0.0, 0.95, 1.0)),
]
WORDS = st.one_of(st.sampled_from(EDGES), st.integers(0, MAX_WORD))


def around(*limits: int) -> st.SearchStrategy[int]:
    """Integers of every size, limits and their neighbours among them."""
    edges = [n + more for n in (0, *limits) for more in (-1, 0, 1)]
    return st.one_of(st.sampled_from(edges), st.integers(0, 200), st.integers(-(1 << 64), 1 << 64))


def test_what_publish_stores(group, using):
    """Guards against an engine that stores another word than the packing functions make."""
    board = using(LoneBoard(group))
    engine = using(Engine.attach(group, 0))

    @repeatable
    @given(
        waiting=around(MAX_WAITING, KV_ONE),
        running=around(MAX_WAITING, MAX_RUNNING),
        kv=st.one_of(st.floats(), st.floats(0.0, 1.0)),
        backlog=around(MAX_WORD),
        step=around(MAX_STEP),
    )
    def check(waiting, running, kv, backlog, step):
        before = int(board.load[0])
        given = {"waiting": waiting, "running": running, "kv_cache_usage": kv, "prefill_backlog": backlog}
        try:
            engine.publish(**given, step=step)
        except SettingError:
            assert min(waiting, running, backlog) < 0 or not 0.0 <= kv <= 1.0
            assert board.load[0] == before
            return
        word = pack_load(waiting, running, kv)
        assert board.load[0] == word
        assert board.request_offset[0] == queued(word)
        assert board.prefill_backlog[0] == board.token_offset[0] == max(0, min(backlog, MAX_WORD))
        assert board.progress[0] == pack_progress(0, step if 0 <= step <= MAX_STEP else 0)

    check()


@pytest.mark.parametrize("call", ["route", "wake"])
def test_what_a_front_end_reads_in_the_control_word(group, using, call):
    """Guards against a front-end that takes another wave or phase from the word than the coordinator put there."""
    board = using(LoneBoard(group))
    folder = board.segment.sockets_path
    folder.mkdir()
    bells = [using(Doorbell(folder, rank)) for rank in range(2)]
    frontend = using(Frontend.attach(group))
    rung = -1

    @repeatable
    @given(word=WORDS)
    def check(word):
        nonlocal rung
        board.control[0] = word
        wave, phase = unpack_control(word)
        if call == "route":
            route = frontend.route(1)
            route.done()
            assert route.wave == wave
        else:
            frontend.wake()
        heard = {start for bell in bells for start in bell.drain()}
        expected = phase is Phase.PAUSED and wave != rung  # a wave is rung once
        assert heard == ({wire.encode_start(wave, None)[1]} if expected else set())
        rung = wave if expected else rung

    check()


@pytest.mark.parametrize(("form", "as_held"), [(ListColumns, list), (ArrayColumns, np.array)])
def test_what_a_view_reads_in_a_load_word(form, as_held):
    """Guards against a policy that sees other counts than the engine stored."""

    @repeatable
    @given(words=st.lists(WORDS, min_size=2, max_size=2), more=st.integers(0, 9))
    def check(words, more):
        columns = (as_held(row) for row in ([0, 1], words, [queued(w) + more for w in words]))
        view = View(form(*columns, [0, 0], 1))
        assert list(zip(view.waiting, view.running, view.kv_cache_usage, strict=True)) == list(
            map(unpack_load, words)
        )
        assert view.in_flight == [more, more]
        full = [waiting > 0 and kv > 0.95 for waiting, _, kv in map(unpack_load, words)]
        assert [view.overloaded(rank) for rank in range(2)] == full
        assert view.free() == ([rank for rank in range(2) if not full[rank]] or [0, 1])
        assert view.least([1, 2]) == (1 if full == [True, False] else 0)

    check()


def test_what_the_watch_reads_in_a_load_word(group, using):
    """Guards against a coordinator that believes an engine idle while requests wait in it."""
    board = using(LoneBoard(group, dp_size=1))

    @repeatable
    @given(word=WORDS, requests=around(MAX_RUNNING))
    def check(word, requests):
        requests = max(0, min(requests, MAX_WORD))
        board.load[0], board.request_offset[0] = word, requests
        waiting, running, _ = unpack_load(word)
        assert has_work(board.engine_signs(0)) == (waiting > 0 or running > 0)

    check()
