"""The guesses with which a look-up begins."""

from __future__ import annotations

import numpy as np

from dpshm.frontend import last_matches
from dpshm.frontend.last_matches import LastMatches
from dpshm.rules.prefix_samples import samples_of


def samples(*blocks: int):
    """Samples of a prompt that has these fingerprints."""
    return samples_of(np.array(blocks, np.uint64))


def test_a_prompt_that_goes_on_is_guessed_like_the_last():
    """Guards against guesses from another conversation that begins alike, and from a turn before the last."""
    last = LastMatches()
    assert last.guess(samples(1, 2, 3)) == []
    last.note(samples(1, 2), [2, 0])
    last.note(samples(1, 2, 3, 4), [2, 4])
    last.note(samples(1, 2, 5), [0, 3])
    assert last.guess(samples(1, 2)) == [2, 0]
    assert last.guess(samples(1, 2, 3, 4, *range(50, 90))) == [2, 4]
    assert last.guess(samples(1, 2, 9)) == [2, 0]
    assert last.guess(samples(1)) == last.guess(samples()) == []
    last.note(samples(), [7, 7])
    assert last.guess(samples(8)) == []


def test_guesses_do_not_grow_without_bound(monkeypatch):
    """Guards against a front-end that keeps something of every prompt it has seen."""
    monkeypatch.setattr(last_matches, "MOST", 40)
    last = LastMatches()
    for number in range(1, 1000):
        last.note(samples(number), [number, 0])
    assert 0 < sum(bool(last.guess(samples(number))) for number in range(1, 1000)) <= 20
    assert last.guess(samples(999)) == [999, 0]
