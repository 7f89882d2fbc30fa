"""How much of a prompt each rank held when it, or a prompt that it goes on from, was looked up last.

A conversation's next turn begins with all of the last one, and most ranks hold of it what they held then. So that
is the guess with which a look-up begins, and where it is right two looks at a rank's index are enough. A wrong
guess costs some looks more.
"""

from __future__ import annotations

from dpshm.rules.prefix_hash import Fingerprints

MOST = 1 << 16
"""Numbers that are kept; with 8 ranks those of 8,192 prompts, some 3 MB."""


class LastMatches:
    """The matches of prompts, by the last of each prompt's samples (`dpshm.rules.prefix_samples`)."""

    def __init__(self) -> None:
        self._found: dict[int, list[int]] = {}

    def guess(self, samples: Fingerprints) -> list[int]:
        """Blocks by rank that the longest prompt had with which this one begins; empty if none is known.

        Args:
            samples: of the prompt.
        """
        get = self._found.get
        if len(samples) and (found := get(samples.item(-1))):
            return found
        for sample in reversed(samples.tolist()):
            if found := get(sample):
                return found
        return []

    def note(self, samples: Fingerprints, blocks: list[int]) -> None:
        """Keeps what was found of a prompt.

        Args:
            samples: of the prompt.
            blocks: by rank, how many leading blocks it holds or soon will; -1: not known. The list is kept.
        """
        if len(samples):
            if len(self._found) * len(blocks) >= MOST:
                self._found.clear()
            self._found[samples.item(-1)] = blocks
