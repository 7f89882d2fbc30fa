"""The board, the prefix index and the table of just-sent prompts: all that `dpshm.Frontend.route` knows.

It runs the front-end's own code (`dpshm.frontend.sent_prompts`) on a table in private memory, in simulated time.
Block ids stand for fingerprints. Blocks of traces are large, often 512 tokens, so samples lie as far apart as in a
prompt of 16-token blocks that is 32 times as long: what is shared counts as short as it does there.
"""

from __future__ import annotations

import numpy as np

from dpshm.board.sent_table import SentTable
from dpshm.frontend.sent_prompts import SentPrompts
from dpshm.rules.hashing import mix_array
from dpshm.rules.prefix_hash import Fingerprints
from dpshm.rules.prefix_samples import samples_of
from dpshm.sim.lab.live_information import LiveIndex
from dpshm.sim.lab.rank import Job, SimRank

_START_NS = 1 << 40  # so that no stamp is 0


class LiveIndexSent(LiveIndex):
    """The board, the prefix index, and the prompts that front-ends have just sent."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]]) -> None:
        super().__init__(ranks, own, 0.0)
        table = SentTable.private(len(own))
        self._sent = [SentPrompts(table, frontend) for frontend in range(len(own))]
        for sent in self._sent:
            sent.rows = len(own)
        self._now_ns = 0
        self._samples: Fingerprints = np.empty(0, np.uint64)

    def cached(self, job: Job, now_s: float) -> list[int] | None:
        self._now_ns = _START_NS + round(now_s * 1e9)
        found = super().cached(job, now_s)
        if found is None:
            self._samples = np.empty(0, np.uint64)
            return None
        self._samples = samples_of(mix_array(np.array(job.blocks, np.uint64) + np.uint64(1)))
        size = self.ranks[0].cache.block_tokens
        blocks = [tokens // size for tokens in found]
        self._sent[job.frontend].extend(blocks, self._samples, self._now_ns)
        return [max(n, min(held * size, job.prompt_tokens - 1)) for n, held in zip(found, blocks, strict=True)]

    def sent(self, job: Job) -> None:
        self._sent[job.frontend].add(job.rank, self._samples, self._now_ns)
