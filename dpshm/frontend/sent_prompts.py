"""The prompts that a front-end sent a moment ago: what is about to be cached, before any index shows it.

An index shows a block from when its rank's scheduler has it. Requests of one burst come sooner: sixteen agents
with one new context are routed within milliseconds, when no rank has it yet. All ranks would compute it. So a
front-end takes what it sent to a rank within `REMEMBERED_NS` to be cached there. If the request was lost, or its
blocks were evicted since, a prefix is computed that was expected to be cached; no answer changes. The sums stay
exact, because engines subtract what front-ends booked.

Fingerprints may be made on demand (`dpshm.rules.prefix_hash.Prompt`), so they are compared only as far as two
prompts agree.
"""

from __future__ import annotations

from collections import deque

from dpshm.rules.prefix_hash import FingerprintList

REMEMBERED_NS = 1_000_000_000
MOST = 8
"""Prompts that are remembered of each rank, the newest ones."""


class SentPrompts:
    """What one front-end sent to each rank. The caller gives the time."""

    def __init__(self) -> None:
        self._sent: dict[int, deque[tuple[int, FingerprintList]]] = {}

    def add(self, dp_rank: int, fingerprints: FingerprintList, now_ns: int) -> None:
        """A prompt was sent to a rank."""
        if len(fingerprints):
            sent = self._sent.setdefault(dp_rank, deque(maxlen=MOST))
            sent.append((now_ns + REMEMBERED_NS, fingerprints))

    def forget(self, dp_rank: int) -> None:
        """The rank has a new cache."""
        self._sent.pop(dp_rank, None)

    def match(self, dp_rank: int, fingerprints: FingerprintList, held: int, now_ns: int) -> int:
        """How many leading blocks of a prompt are held or were sent a moment ago; at least `held`."""
        sent = self._sent.get(dp_rank)
        if not sent:
            return held
        while sent and sent[0][0] <= now_ns:
            sent.popleft()
        for _, other in sent:
            held = _agree(fingerprints, other, held)
        return held


def _agree(one: FingerprintList, other: FingerprintList, low: int) -> int:
    """How many leading blocks two prompts have in common, at least `low`; a fingerprint covers all before it."""
    high, stride = min(len(one), len(other)), 1
    while low < high:
        at = min(low + stride - 1 if stride else low + high >> 1, high - 1)
        if one.item(at) == other.item(at):
            low = at + 1
            stride *= 2
        else:
            high = at
            stride = 0
    return low
