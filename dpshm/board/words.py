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

# A load word: waiting, running, KV-cache usage.
WAITING_SHIFT = 40
RUNNING_SHIFT = 16
MAX_WAITING = (1 << 23) - 1
MAX_RUNNING = (1 << 24) - 1
KV_ONE = (1 << 16) - 1
"""A KV cache that is full; also the mask of its usage, which has the lowest bits."""

# A control word (wave, phase) and an engine's state word (wave, flags). `MAX_WAVE` is the mask of a wave.
WAVE_SHIFT = 2
PHASE_MASK = 3
AWAKE = (int(Phase.WAKING), int(Phase.RUNNING))
"""The phases in which ranks are awake. Every other value of the phase's bits reads as paused."""
RUNNING = 1
PAUSED_BY_USER = 2

# A progress word: wave, step.
PROGRESS_WAVE_SHIFT = 32
MAX_STEP = (1 << 32) - 1

# A mark: the verdict (`dpshm.rules.liveness.Verdict`) in the low two bits, `STUCK` and `UNKNOWN`; and flags.
STUCK = 16
UNKNOWN = 32
VERDICT_MASK = 3 | STUCK | UNKNOWN
DRAINED = 4
ON_BEHALF = 8
REMOTE = 64
RELAYED = 128

# A change word: revision, kind, row, and what was stored before and after.
_REVISION_SHIFT = 46
_KIND_SHIFT = 44
_ROW_SHIFT = 32
_BEFORE_SHIFT = 16
_KIND_MASK = 3
_ROW_MASK = (1 << 12) - 1
_MASK_16 = (1 << 16) - 1

MAX_WORD = (1 << 63) - 1
COUNT_MASK = (1 << 48) - 1
"""Mask for counters inherited from a previous holder, so that a corrupt value cannot overflow a sum over all rows.
Honest counts stay far below it."""
MAX_PROMPT_TOKENS = (1 << 31) - 1
"""The most prompt tokens of one request; bookings and receipts saturate alike."""
WAKE_LIMITS_MS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Upper limits of the buckets of wake-up durations; one more bucket holds the longer ones."""


def pack_load(waiting: int, running: int, kv_cache_usage: float) -> int:
    """One word of an engine's load: waiting 23 bits, running 24 bits, KV-cache usage 16 bits (1.0 = all ones).

    Args:
        waiting: requests in the queue; saturates at 2**23 - 1.
        running: requests in the batch; saturates at 2**24 - 1.
        kv_cache_usage: a fraction; saturates at 0.0 and 1.0, NaN counts as 0.0.
    """
    waiting, running = max(0, min(int(waiting), MAX_WAITING)), max(0, min(int(running), MAX_RUNNING))
    kv = int(kv_cache_usage * KV_ONE + 0.5) if 0.0 < kv_cache_usage < 1.0 else KV_ONE * (kv_cache_usage >= 1.0)
    return waiting << WAITING_SHIFT | running << RUNNING_SHIFT | kv


def unpack_load(word: int) -> tuple[int, int, float]:
    """`(waiting, running, kv_cache_usage)` of a load word, or of an int64 array of them."""
    return word >> WAITING_SHIFT & MAX_WAITING, word >> RUNNING_SHIFT & MAX_RUNNING, (word & KV_ONE) / KV_ONE


def queued(word: int) -> int:
    """Requests that wait or run, of a load word."""
    return (word >> WAITING_SHIFT & MAX_WAITING) + (word >> RUNNING_SHIFT & MAX_RUNNING)


def pack_control(wave: int, phase: Phase) -> int:
    """The control word: wave 31 bits, phase 2 bits."""
    return max(0, min(wave, MAX_WAVE)) << WAVE_SHIFT | phase


def unpack_control(word: int) -> tuple[int, Phase]:
    """`(wave, phase)` of a control word; a phase that does not exist reads as paused."""
    bits = word & PHASE_MASK
    return word >> WAVE_SHIFT & MAX_WAVE, Phase(bits) if bits in AWAKE else Phase.PAUSED


def pack_state(wave: int, flags: int) -> int:
    """An engine's state word: its wave and its flags in one, so that a reader never sees one without the other."""
    return max(0, min(wave, MAX_WAVE)) << WAVE_SHIFT | flags


def unpack_state(word: int) -> tuple[int, bool, bool]:
    """`(wave, running, paused by the user)` of an engine's state word."""
    return word >> WAVE_SHIFT & MAX_WAVE, bool(word & RUNNING), bool(word & PAUSED_BY_USER)


def pack_progress(wave: int, step: int) -> int:
    """The progress word: wave 31 bits, step within the incarnation 32 bits."""
    wave = 0 if wave < 0 else wave if wave <= MAX_WAVE else MAX_WAVE
    step = 0 if step < 0 else step if step <= MAX_STEP else MAX_STEP
    return wave << PROGRESS_WAVE_SHIFT | step


def unpack_progress(word: int) -> tuple[int, int]:
    """`(wave, step)` of a progress word."""
    return word >> PROGRESS_WAVE_SHIFT & MAX_WAVE, word & MAX_STEP


class ChangeKind(IntEnum):
    """What a change is about."""

    ENGINE = 0  # an engine's mark
    FRONTEND = 1  # a front-end's mark
    DP_SIZE = 2
    COORDINATOR = 3  # the epoch: another coordinator


class Change(NamedTuple):
    """One change, as the board keeps it.

    Attributes:
        revision: the low 16 bits of its number. A reader that expects another number was overtaken by the writer.
        kind: which word changed.
        row: the rank or front-end; 0 where there is none.
        before: the mark, size or epoch before the change.
        after: the mark, size or epoch after it.
    """

    revision: int
    kind: ChangeKind
    row: int
    before: int
    after: int


def pack_change(revision: int, kind: ChangeKind, row: int, before: int, after: int) -> int:
    """The change word: revision 16 bits, kind 2 bits, row 12 bits, before and after 16 bits each."""
    return (
        (revision & _MASK_16) << _REVISION_SHIFT
        | kind << _KIND_SHIFT
        | (row & _ROW_MASK) << _ROW_SHIFT
        | (before & _MASK_16) << _BEFORE_SHIFT
        | after & _MASK_16
    )


def change_revision(word: int) -> int:
    """The low 16 bits of the number of a change, whatever else the word holds."""
    return word >> _REVISION_SHIFT & _MASK_16


def unpack_change(word: int) -> Change:
    """A change word, unpacked."""
    return Change(
        change_revision(word),
        ChangeKind(word >> _KIND_SHIFT & _KIND_MASK),
        word >> _ROW_SHIFT & _ROW_MASK,
        word >> _BEFORE_SHIFT & _MASK_16,
        word & _MASK_16,
    )


def wake_bucket(duration_ns: int) -> int:
    """The bucket for the duration of a wake-up."""
    return bisect_left(WAKE_LIMITS_MS, duration_ns / 1e6)


def saturate(value: int) -> int:
    """A count or a time, clipped to what a word holds: 0 to 2**63 - 1."""
    return 0 if value < 0 else value if value <= MAX_WORD else MAX_WORD
