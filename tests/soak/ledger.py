"""The soak's books: one row of words for each life of a process, in a file that outlives every one of them.

A process may be killed between any two instructions, so it keeps its counts where they stay: a row of a shared
file that it alone writes, one 64-bit store at a time. The parent reads the rows, those of the dead too.
"""

from __future__ import annotations

import mmap
from pathlib import Path

PER_PEER = ("sent", "refused", "completed", "lost", "taken")
"""One count a peer: a front-end's by rank, an engine's (`taken`) by front-end slot."""
SINGLE = ("quiet", "index", "attempted", "no_engine", "unexpected", "finished", "undeliverable")
MAX_LIVES = 1 << 15
NOT_STOCK, NO_STOCK = 0, -1
_WORD_BYTES = 8


class Ledger:
    """The file, mapped.

    Args:
        path: the file; made if it is not there.
        peers: how many engines and how many front-ends at most.
    """

    def __init__(self, path: Path | str, peers: int) -> None:
        self._peers = peers
        self._row_words = len(SINGLE) + len(PER_PEER) * peers
        size = (1 + peers + MAX_LIVES * self._row_words) * _WORD_BYTES
        with open(path, "ab") as file:
            if file.tell() < size:
                file.truncate(size)  # sparse
        with open(path, "r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), size)).cast("q")

    def at(self, life: int, name: str, peer: int = 0) -> int:
        """Where a word of a life is in `words`."""
        row = 1 + self._peers + life * self._row_words
        if name in PER_PEER:
            return row + len(SINGLE) + PER_PEER.index(name) * self._peers + peer
        return row + SINGLE.index(name)

    def get(self, life: int, name: str) -> int:
        """A single count."""
        return self.words[self.at(life, name)]

    def by_peer(self, life: int, name: str) -> list[int]:
        """The counts of one kind, by peer."""
        at = self.at(life, name)
        return self.words[at : at + self._peers].tolist()

    def stock(self, dp_rank: int) -> int:
        """Which stock engine is a rank now, by a number of its own; `NO_STOCK`: none, or `NOT_STOCK`."""
        return self.words[1 + dp_rank]

    def set_stock(self, dp_rank: int, number: int) -> None:
        """Says so. No board does: a stock engine takes no row."""
        self.words[1 + dp_rank] = number

    @property
    def paused(self) -> bool:
        """Whether front-ends are to send nothing."""
        return bool(self.words[0])

    @paused.setter
    def paused(self, value: bool) -> None:
        self.words[0] = value
