"""The packing of words: fields stay apart, values saturate, and any word unpacks within bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm.board import layout
from dpshm.board.words import (
    AWAKE,
    MAX_WAVE,
    MAX_WORD,
    PHASE_MASK,
    WAKE_LIMITS_MS,
    ChangeKind,
    pack_change,
    pack_control,
    pack_load,
    pack_progress,
    pack_state,
    queued,
    saturate,
    unpack_change,
    unpack_control,
    unpack_load,
    unpack_progress,
    unpack_state,
    wake_bucket,
)
from dpshm.rules.waves import Phase

WORDS = st.integers(-(1 << 63), MAX_WORD)
ANY_INT = st.integers(-(1 << 70), 1 << 70)
COUNT_23 = (1 << 23) - 1
COUNT_24 = (1 << 24) - 1


@pytest.mark.parametrize(
    ("given_", "word", "back"),
    [
        ((0, 0, 0.0), 0, (0, 0, 0.0)),
        ((1, 0, 0.0), 1 << 40, (1, 0, 0.0)),
        ((0, 1, 0.0), 1 << 16, (0, 1, 0.0)),
        ((0, 0, 1.0), 65535, (0, 0, 1.0)),
        ((2, 30, 0.5), (2 << 40) + (30 << 16) + 32768, (2, 30, 32768 / 65535)),
        ((COUNT_23, COUNT_24, 1.0), MAX_WORD, (COUNT_23, COUNT_24, 1.0)),
        ((COUNT_23 + 1, COUNT_24 + 1, 1.5), MAX_WORD, (COUNT_23, COUNT_24, 1.0)),
        ((-1, -1, -0.5), 0, (0, 0, 0.0)),
        ((0, 0, math.nan), 0, (0, 0, 0.0)),
        ((0, 0, math.inf), 65535, (0, 0, 1.0)),
        ((0, 0, -math.inf), 0, (0, 0, 0.0)),
        ((0, 0, 1.0 - 1e-12), 65535, (0, 0, 1.0)),
        ((1 << 40, 1 << 40, 0.0), (COUNT_23 << 40) + (COUNT_24 << 16), (COUNT_23, COUNT_24, 0.0)),
    ],
)
def test_load_words(given_: tuple[int, int, float], word: int, back: tuple[int, int, float]):
    """Guards against a field that runs into its neighbour, and against a change of the packing."""
    assert pack_load(*given_) == word
    assert unpack_load(word) == back


@settings(deadline=None, derandomize=True)
@given(waiting=ANY_INT, running=ANY_INT, kv=st.floats())
def test_a_load_saturates_and_never_wraps(waiting: int, running: int, kv: float):
    """Guards against a huge queue that reads as an empty one, which would draw all requests."""
    word = pack_load(waiting, running, kv)
    assert 0 <= word <= MAX_WORD
    back = unpack_load(word)
    assert back[:2] == (min(max(waiting, 0), COUNT_23), min(max(running, 0), COUNT_24))
    wanted = 0.0 if math.isnan(kv) else min(max(kv, 0.0), 1.0)
    assert abs(back[2] - wanted) <= 0.5 / 65535 + 1e-12


@settings(deadline=None, derandomize=True)
@given(wave=ANY_INT, phase=st.sampled_from(Phase), flags=st.integers(0, 3), step=ANY_INT)
def test_waves_and_steps_saturate_and_never_wrap(wave: int, phase: Phase, flags: int, step: int):
    """Guards against a wave that falls when it runs out of bits, or that reaches into the flags."""
    kept = min(max(wave, 0), MAX_WAVE)
    control, state = pack_control(wave, phase), pack_state(wave, flags)
    progress = pack_progress(wave, step)
    assert all(type(word) is int and 0 <= word <= MAX_WORD for word in (control, state, progress))
    assert unpack_control(control) == (kept, phase)
    assert unpack_state(state) == (kept, bool(flags & 1), bool(flags & 2))
    assert unpack_progress(progress) == (kept, min(max(step, 0), (1 << 32) - 1))


@settings(deadline=None, derandomize=True)
@given(word=WORDS)
def test_whatever_a_word_holds_it_unpacks_within_bounds(word: int):
    """Guards against a reader that a scribbled word makes raise, or believe in an impossible wave."""
    waiting, running, kv = unpack_load(word)
    assert 0 <= waiting <= COUNT_23
    assert 0 <= running <= COUNT_24
    assert 0.0 <= kv <= 1.0
    assert queued(word) == waiting + running
    assert np.array_equal(queued(np.array([word])), [waiting + running])  # type: ignore[arg-type]
    wave, phase = unpack_control(word)
    assert 0 <= wave <= MAX_WAVE
    assert phase in Phase
    assert 0 <= unpack_state(word)[0] <= MAX_WAVE
    assert 0 <= unpack_progress(word)[0] <= MAX_WAVE


def test_a_phase_that_does_not_exist_reads_as_paused():
    """Guards against a scribbled control word that no request could ever wake."""
    assert unpack_control(7 << 2 | 3) == (7, Phase.PAUSED)
    assert [bits for bits in range(PHASE_MASK + 1) if unpack_control(bits)[1] is not Phase.PAUSED] == list(AWAKE)


@settings(deadline=None, derandomize=True)
@given(value=ANY_INT)
def test_a_saturated_count_fits_a_word(value: int):
    """Guards against an OverflowError, or a wrapped count, at the store."""
    fitted = saturate(value)
    assert int(np.array([fitted], np.int64)[0]) == min(max(value, 0), MAX_WORD)


def test_counts_from_numpy_pack_like_those_of_python():
    """Guards against numpy scalars, which schedulers hand around, packing into something else."""
    numbers = (np.int64(5), np.int64(7), np.float32(0.25))
    assert pack_load(*numbers) == pack_load(5, 7, 0.25)


@settings(deadline=None, derandomize=True)
@given(
    revision=st.integers(0, MAX_WORD),
    kind=st.sampled_from(ChangeKind),
    row=st.integers(0, layout.MAX_ENGINES - 1),
    before=st.integers(0, 65535),
    after=st.integers(0, 65535),
)
def test_changes_fit_their_word(revision: int, kind: ChangeKind, row: int, before: int, after: int):
    """Guards against a record of a change whose parts run into each other."""
    word = pack_change(revision, kind, row, before, after)
    assert 0 <= word <= MAX_WORD
    assert unpack_change(word) == (revision % 65536, kind, row, before, after)


@settings(deadline=None, derandomize=True)
@given(word=WORDS)
def test_whatever_a_record_holds_it_unpacks(word: int):
    """Guards against `dpshm events` stopping at a scribbled record."""
    change = unpack_change(word)
    assert change.kind in ChangeKind
    assert 0 <= change.row < layout.MAX_ENGINES


@pytest.mark.parametrize(
    ("duration_ns", "bucket"),
    [(0, 0), (100_000, 0), (100_001, 1), (1_000_000, 3), (5_000_000_000, 14), (5_000_000_001, 15), (1 << 62, 15)],
)
def test_wake_ups_fall_into_buckets(duration_ns: int, bucket: int):
    """Guards against a limit that is counted above itself, and a long wake-up outside the column."""
    assert wake_bucket(duration_ns) == bucket
    assert bucket < layout.make_layout(1, 1).columns["wake_bucket"].shape[0]


@given(
    st.integers(0, MAX_WORD),
    st.sampled_from(ChangeKind),
    st.integers(0, (1 << 12) - 1),
    st.integers(0, (1 << 16) - 1),
    st.integers(0, (1 << 16) - 1),
)
def test_a_change_comes_back(revision: int, kind: ChangeKind, row: int, before: int, after: int):
    """Guards against records whose fields run into each other, or whose top bit makes the word negative."""
    word = pack_change(revision, kind, row, before, after)
    assert 0 <= word <= MAX_WORD
    assert unpack_change(word) == (revision & 0xFFFF, kind, row, before, after)


@given(st.integers(0, MAX_WORD))
def test_every_wake_up_has_one_bucket(duration_ns: int):
    """Guards against a wake-up in a bucket whose limit it exceeds, or outside of all."""
    bucket = wake_bucket(duration_ns)
    limits = [0, *WAKE_LIMITS_MS, math.inf]
    assert limits[bucket] <= duration_ns / 1e6 <= limits[bucket + 1]
