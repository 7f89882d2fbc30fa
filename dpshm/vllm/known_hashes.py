"""Hashes of prompt blocks that an API server has made, so that prompts which go on from others are hashed once.

They are known by names: 64-bit fingerprints of the block and all before it. A name that two blocks share, with the
probability of a false hit (`dpshm.rules.prefix_hash`), makes a wrong expectation of what is cached, never a wrong
answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

MOST = 1 << 15
"""Blocks in each of two generations: together up to a million tokens in blocks of 16, some 20 MB."""


Known: TypeAlias = tuple[int, bytes]
"""Of a block: the fingerprint that an index has of its hash, and the hash."""


class KnownHashes:
    """A map from names to hashes that forgets those that were not asked for lately.

    A hash that is put or asked for is in the young generation. When that is full it becomes the old one, and what
    is in the old one until then is forgotten.

    Attributes:
        young: the young generation now, to read.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self.young: dict[int, Known] = {}
        self._old: dict[int, Known] = {}

    def __len__(self) -> int:
        """How many hashes are known; one that is in both generations counts twice."""
        return len(self.young) + len(self._old)

    def get(self, name: int) -> Known | None:
        """The hash of that name; None if it is not known."""
        found = self.young.get(name)
        if found is None and (found := self._old.get(name)) is not None:
            self.put(((name, found),))
        return found

    def put(self, known: Iterable[tuple[int, Known]]) -> None:
        """Keeps what is known of blocks, by their names; the young generation may exceed its size by so many."""
        if len(self.young) >= self._most:
            self._old, self.young = self.young, {}
        self.young.update(known)
