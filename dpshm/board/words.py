"""How facts are packed into 64-bit words: the shifts, the masks, and the functions that use them.

Each fact that must be read as a whole is one word (rule 1 of dpshm/README.md), so its parts are packed. No
packed word has its top bit set: columns are int64, and a word is never negative. A value that does not fit
saturates; it never wraps.
"""

from __future__ import annotations

from bisect import bisect_left
from enum import IntEnum
from typing import NamedTuple

from dpshm.rules.waves import MAX_WAVE, Phase

WAKE_LIMITS_MS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Upper limits of the buckets of wake-ups by how long they took; one more bucket holds the rest."""
_BITS_12 = (1 << 12) - 1
_BITS_16 = (1 << 16) - 1
_BITS_23 = (1 << 23) - 1
_BITS_24 = (1 << 24) - 1
_BITS_31 = (1 << 31) - 1
_BITS_32 = (1 << 32) - 1
_KV_ONE = (1 << 16) - 1
MAX_WORD = (1 << 63) - 1
MAX_STEP = _BITS_32
COUNT_MASK = (1 << 48) - 1
"""Of a count that somebody else stored and that is counted on from: whatever was scribbled there, no sum over all
rows overflows. Honest counts never get there."""
MAX_PROMPT_TOKENS = _BITS_31  # of one request: what is booked and what is received saturate alike
# Flags of an engine's state word, below its wave.
RUNNING = 1
PAUSED_BY_USER = 2
# A mark: the verdict in the low two bits (see `dpshm.rules.liveness.Verdict`), then flags.
VERDICT_MASK = 3
DRAINED = 4
ON_BEHALF = 8


def pack_load(waiting: int, running: int, kv_cache_usage: float) -> int:
    """One word of an engine's load: waiting 23 bits, running 24 bits, KV-cache usage 16 bits (1.0 = all ones).

    Args:
        waiting: requests in the queue; saturates at 2**23 - 1.
        running: requests in the batch; saturates at 2**24 - 1.
        kv_cache_usage: a fraction; saturates at 0.0 and 1.0, NaN counts as 0.0.
    """
    waiting, running = max(0, min(int(waiting), _BITS_23)), max(0, min(int(running), _BITS_24))
    kv = int(kv_cache_usage * _KV_ONE + 0.5) if 0.0 < kv_cache_usage < 1.0 else _KV_ONE * (kv_cache_usage >= 1.0)
    return waiting << 40 | running << 16 | kv


def unpack_load(word: int) -> tuple[int, int, float]:
    """`(waiting, running, kv_cache_usage)` of a load word."""
    return word >> 40 & _BITS_23, word >> 16 & _BITS_24, (word & _KV_ONE) / _KV_ONE


def pack_control(wave: int, phase: Phase) -> int:
    """The control word: wave 31 bits, phase 2 bits."""
    return max(0, min(wave, MAX_WAVE)) << 2 | phase


def unpack_control(word: int) -> tuple[int, Phase]:
    """`(wave, phase)` of a control word; a phase that does not exist reads as paused."""
    bits = word & 3
    return word >> 2 & MAX_WAVE, Phase(bits) if bits <= Phase.RUNNING else Phase.PAUSED


def pack_state(wave: int, flags: int) -> int:
    """An engine's state word: its wave and flags in one, so that nobody sees the one without the other."""
    return max(0, min(wave, MAX_WAVE)) << 2 | flags


def unpack_state(word: int) -> tuple[int, bool, bool]:
    """`(wave, running, paused by the user)` of an engine's state word."""
    return word >> 2 & MAX_WAVE, bool(word & RUNNING), bool(word & PAUSED_BY_USER)


def pack_progress(wave: int, step: int) -> int:
    """The progress word: wave 31 bits, step within the incarnation 32 bits."""
    wave = 0 if wave < 0 else wave if wave <= MAX_WAVE else MAX_WAVE
    step = 0 if step < 0 else step if step <= MAX_STEP else MAX_STEP
    return wave << 32 | step


def unpack_progress(word: int) -> tuple[int, int]:
    """`(wave, step)` of a progress word."""
    return word >> 32 & MAX_WAVE, word & _BITS_32


class ChangeKind(IntEnum):
    """What a change was of."""

    ENGINE = 0  # an engine's mark
    FRONTEND = 1  # a front-end's mark
    DP_SIZE = 2
    COORDINATOR = 3  # the epoch: another coordinator


class Change(NamedTuple):
    """One change, as the board keeps it.

    Attributes:
        revision: its number's low 16 bits: a reader who finds another has been overtaken by the writer.
        row: the rank or front-end; 0 where there is none.
        before: the mark, size or epoch before it.
        after: and since.
    """

    revision: int
    kind: ChangeKind
    row: int
    before: int
    after: int


def pack_change(revision: int, kind: ChangeKind, row: int, before: int, after: int) -> int:
    """The change word: revision 16 bits, kind 2 bits, row 12 bits, before and after 16 bits each."""
    return (
        (revision & _BITS_16) << 46
        | kind << 44
        | (row & _BITS_12) << 32
        | (before & _BITS_16) << 16
        | after & _BITS_16
    )


def unpack_change(word: int) -> Change:
    """A change word, unpacked."""
    return Change(
        word >> 46 & _BITS_16,
        ChangeKind(word >> 44 & 3),
        word >> 32 & _BITS_12,
        word >> 16 & _BITS_16,
        word & _BITS_16,
    )


def wake_bucket(duration_ns: int) -> int:
    """The bucket of a wake-up that took so long."""
    return bisect_left(WAKE_LIMITS_MS, duration_ns / 1e6)


def saturate(value: int) -> int:
    """A count or a time as it fits a word: at least 0, at most 2**63 - 1."""
    return 0 if value < 0 else value if value <= MAX_WORD else MAX_WORD
