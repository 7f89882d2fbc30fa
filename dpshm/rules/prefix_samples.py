"""Samples of a prompt's fingerprints: enough to tell about how long a prefix two prompts share.

A fingerprint covers all blocks before its own. So two prompts that agree at one sampled block agree in all before
it, and the last sampled block at which they agree is a lower bound of what they share. Blocks are sampled at every
position up to 16 and at eight positions in each octave from there on: the bound is short by less than a ninth.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from dpshm.rules.prefix_hash import Fingerprints

SAMPLES = 128
_STEPS = 8  # in each octave
_FIRST = tuple(range(1, 2 * _STEPS + 1))
_OCTAVES = (SAMPLES - len(_FIRST)) // _STEPS
SAMPLED_BLOCKS = (
    *_FIRST,
    *(step << octave for octave in range(1, _OCTAVES + 1) for step in range(_STEPS + 1, 2 * _STEPS + 1)),
)
"""How many leading blocks each sample covers: 1 to 16, 18, 20, ... 32, 36, ... 262,144."""
_PLACES: NDArray[np.intp] = np.array(SAMPLED_BLOCKS) - 1


def samples_of(fingerprints: Fingerprints) -> Fingerprints:
    """The fingerprints of the sampled blocks that a prompt has, at most `SAMPLES`, the first ones first."""
    return fingerprints[_PLACES[: samples_within(len(fingerprints))]]


def samples_within(blocks: int) -> int:
    """How many sampled blocks there are among so many leading blocks."""
    return bisect_right(SAMPLED_BLOCKS, blocks)
