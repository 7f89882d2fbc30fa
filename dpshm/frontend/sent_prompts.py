"""The prompts that front-ends sent a moment ago: what is about to be cached, before any index shows it.

An index shows a block from when its rank's scheduler has it. Requests of one burst come sooner: sixteen agents
with one new context are routed within milliseconds, by several front-ends, when no rank has it yet. All ranks
would compute it. So each front-end notes in shared memory (`dpshm.board.sent_table`) what it sends, and takes what
any front-end sent to a rank within `REMEMBERED_NS` to be cached there. If the request was lost, or its blocks were
evicted since, a prefix is computed that was expected to be cached; no answer changes. The sums stay exact, because
engines subtract what front-ends booked.

What is noted and compared are samples of fingerprints (`dpshm.rules.prefix_samples`), so what two prompts share
counts a little shorter than it is. They are always made by `dpshm.rules.prefix_hash.PrefixHasher`, whatever hash
the ranks' indexes have: only front-ends compare them.
"""

from __future__ import annotations

import logging
from bisect import bisect_right

import numpy as np

from dpshm.board.board import Board
from dpshm.board.sent_table import RANK_BITS, SLOTS, TICK_SHIFT, SentTable, sent_path, stamp_of
from dpshm.errors import SegmentError
from dpshm.rules.prefix_hash import Fingerprints
from dpshm.rules.prefix_samples import SAMPLED_BLOCKS, SAMPLES

logger = logging.getLogger(__name__)

REMEMBERED_NS = 1_000_000_000
_AHEAD_NS = 16_000_000
"""Another front-end may have stamped a prompt after this one took the time of its decision."""
_AHEAD = np.uint64(_AHEAD_NS >> TICK_SHIFT << RANK_BITS)
_VALID = np.uint64((REMEMBERED_NS + _AHEAD_NS) >> TICK_SHIFT << RANK_BITS)
_RANK = (1 << RANK_BITS) - 1
_NOT_THERE = 1  # no stored word, unless by the chance that any has: what is stored and no sample is 0


class SentPrompts:
    """What front-ends sent to each rank, as one of them sees and writes it. The caller gives the time."""

    def __init__(self, table: SentTable, row: int) -> None:
        """Begins with what the others noted.

        Args:
            table: the group's, or a private one.
            row: this front-end's.
        """
        self._stamps, self._samples = table.stamps, table.samples
        self._samples_by_slot = table.samples.reshape(-1, SAMPLES)
        self._samples_in_a_row = table.samples.reshape(-1)
        self._mine = np.empty(SAMPLES, np.uint64)
        self._row = row
        self._next = 0
        self._forgotten: dict[int, int] = {}  # rank -> stamp from which on prompts count
        self.rows = row + 1

    @property
    def rows(self) -> int:
        """How many rows of the table are looked at: those of front-ends that there were."""
        return len(self._all_stamps) // SLOTS

    @rows.setter
    def rows(self, rows: int) -> None:
        self._all_stamps = self._stamps[:rows].reshape(-1)
        self._by_sample = self._samples_by_slot[: len(self._all_stamps)].T

    @classmethod
    def open(cls, board: Board, row: int) -> SentPrompts:
        """Those of a group; if its table cannot be used, what this front-end sends by itself."""
        try:
            table = SentTable.open(sent_path(board.segment.sockets_path), board.frontends)
        except SegmentError as e:
            logger.warning("front-end %d does not see which prompts the others have just sent: %s", row, e)
            return cls(SentTable.private(), 0)
        return cls(table, row) if row < len(table.stamps) else cls(SentTable.private(), 0)

    def add(self, dp_rank: int, samples: Fingerprints, now_ns: int) -> None:
        """A prompt was sent to a rank.

        Args:
            dp_rank: the rank.
            samples: from `dpshm.rules.prefix_samples.samples_of`.
            now_ns: CLOCK_MONOTONIC.
        """
        if not len(samples):
            return
        slot = self._next
        self._next = (slot + 1) % SLOTS
        stamps, stored = self._stamps[self._row], self._samples[self._row, slot]
        # SYNC: partner of `extend`: the stamp is cleared before the samples are stored, and stored last.
        stamps[slot] = 0
        stored[: len(samples)] = samples
        stored[len(samples) :] = 0
        stamps[slot] = stamp_of(dp_rank, now_ns)

    def forget(self, dp_rank: int, now_ns: int) -> None:
        """The rank has a new cache: what was sent there before does not count."""
        self._forgotten[dp_rank] = stamp_of(0, now_ns)

    def extend(self, blocks: list[int], samples: Fingerprints, now_ns: int) -> None:
        """Adds what is about to be cached of a prompt to what is.

        Args:
            blocks: by rank, how many leading blocks of the prompt it holds; -1 for a rank that does not count.
                Raised in place where more were sent there a moment ago.
            samples: of the prompt.
            now_ns: CLOCK_MONOTONIC.
        """
        if not len(samples):
            return
        stamps = self._all_stamps
        # SYNC: partner of `add`, with the last comparison: each stamp is loaded once, before any sample. One that
        # was loaded again here could be 0, for a prompt that is being replaced, and would still be so at the end.
        loaded = stamps.copy()
        # The subtraction wraps: a stamp of the far future is as old as can be.
        base = np.uint64(now_ns >> TICK_SHIFT << RANK_BITS) + _AHEAD
        (recent,) = (base - loaded < _VALID).nonzero()
        if not len(recent):
            return
        # The usual case first: no prompt agrees with this one beyond what every rank holds of it.
        first = bisect_right(SAMPLED_BLOCKS, min([n for n in blocks if n >= 0], default=SAMPLED_BLOCKS[-1]))
        if first >= len(samples):
            return
        (agree,) = (self._by_sample[first][recent] == samples[first]).nonzero()
        if not len(agree):
            return
        recent = recent[agree]
        when = loaded.view(np.int64).take(recent)
        dp_ranks = when & _RANK
        mine = self._mine
        mine[: len(samples)] = samples
        mine[len(samples) :] = _NOT_THERE
        # Only prompts that agree at the first sample beyond what the rank holds can raise it. A rank that there is
        # not, because it was scaled away or a word is damaged, is compared as the last one.
        beyond = np.array([min(bisect_right(SAMPLED_BLOCKS, n), SAMPLES - 1) for n in blocks])
        beyond = beyond.take(dp_ranks, mode="clip")
        (agree,) = (self._samples_in_a_row.take(recent * SAMPLES + beyond) == mine.take(beyond)).nonzero()
        if not len(agree):
            return
        recent, when, dp_ranks = recent[agree], when[agree], dp_ranks[agree]
        counts = np.count_nonzero(self._samples_by_slot[recent] == mine, axis=1)
        # SYNC: partner of `add`. Samples belong to a stamp that is the same before and after they were loaded.
        counts[stamps.view(np.int64).take(recent) != when] = 0
        for count, dp_rank, stamp in zip(counts.tolist(), dp_ranks.tolist(), when.tolist(), strict=True):
            if count and dp_rank < len(blocks) and stamp >= self._forgotten.get(dp_rank, 0):
                found = SAMPLED_BLOCKS[count - 1]
                if 0 <= blocks[dp_rank] < found:
                    blocks[dp_rank] = found
