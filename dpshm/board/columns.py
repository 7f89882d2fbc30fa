"""The columns: numpy views over a group's segment, and which process writes which word.

Every column is a view named after its column in `dpshm.board.layout`, int64, over shared memory. Each word has
one writer (rule 2 of dpshm/README.md): an engine its row, its `load` and its `received`; a front-end its row and
its `sent`; the coordinator its row and the marks (and the row of an engine that cannot write it: a stock engine,
which knows no board, or an engine on another node). So nothing is ever read, changed and written back by two
processes.

Each fact is one word (rule 1), so a reader needs no lock: an aligned 64-bit load or store is single-copy atomic on
x86-64 and on Armv8, and numpy's scalar access, ``ndarray.tolist()``, elementwise ufuncs, assignments from columns
whose words lie apart, and ``memoryview('q')`` items each make one such access a word. ``struct.pack_into`` does
not (it clears first), and copies through ``memcpy`` promise nothing per word on Arm: hot columns are not read
through slices' ``copy()``.

Between words no order matters to a decision: what is outstanding at an engine is a difference of counts of which
each is a whole word (`dpshm.board.outstanding`).
"""

from __future__ import annotations

import numpy as np

from dpshm.board import layout
from dpshm.board.outstanding import Words
from dpshm.board.segment import Segment


class Columns:
    """The columns of one group's segment.

    Attributes:
        segment: the open segment; `close()` closes it.
        node, nodes: the number of this board's node, and how many nodes' front-ends choose among all ranks
            (`dpshm.coordinator.relay`). Front-end row f is of node ``f % nodes`` on all their boards.
        words: all words of the segment, for those who store.

    There are two ways to a word. Readers use the column's view: ``board.beat[rank]``. A row type, which owns the
    words that it stores, asks `index` once for their offsets and uses ``words[offset]``: one 64-bit load or store.
    """

    # The coordinator's row: [0]. `dp_size` is a property, clipped.
    control: Words
    revision: Words
    epoch: Words
    coordinator_beat: Words
    coordinator_pid: Words
    coordinator_start_time: Words
    ready: Words
    waves_started: Words
    starts_sent: Words
    states_published: Words
    counts_published: Words
    messages_received: Words
    messages_dropped: Words
    wake_ns: Words
    coordinator_version: Words
    # Written by the coordinator too: [engine], [front-end], and [slot].
    engine_mark: Words
    frontend_mark: Words
    change: Words
    change_time: Words
    wake_bucket: Words
    evidence: Words
    kept_settings: Words
    drops: Words
    remote_state: Words  # [engine, item of layout.REMOTE_WORDS]
    base_requests: Words  # [engine, front-end]
    base_tokens: Words
    # An engine's row: [engine].
    engine_state: Words
    progress: Words
    prefill_backlog: Words
    beat: Words
    step_start: Words
    engine_incarnation: Words
    engine_pid: Words
    engine_start_time: Words
    engine_pid_namespace: Words
    steps: Words
    dummy_steps: Words
    busy_ns: Words
    prompt_tokens: Words
    generation_tokens: Words
    requests_finished: Words
    engine_version: Words
    engine_time_namespace: Words
    preemptions: Words
    # Written by the engine too: [engine], [engine, item of layout.STEP_MODEL_WORDS], [engine, front-end].
    load: Words
    request_offset: Words
    token_offset: Words
    step_model: Words
    cache_state: Words  # [engine, item of layout.CACHE_WORDS]
    received_requests: Words
    received_tokens: Words
    # A front-end's row: [front-end], and [front-end, word of its name].
    frontend_beat: Words
    frontend_incarnation: Words
    frontend_pid: Words
    frontend_start_time: Words
    frontend_pid_namespace: Words
    routed: Words
    frontend_version: Words
    owner: Words
    # Written by the front-end too: [front-end, engine].
    sent_requests: Words
    sent_tokens: Words

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.words = segment.words
        self.engines = segment.header.engines
        self.frontends = segment.header.frontends
        self.node, self.nodes = segment.header.node, segment.header.nodes
        self._columns = segment.header.columns
        self._at_dp_size = self.index("dp_size")
        buffer = self.words.cast("B")
        for name in _VIEWS:  # a newer version's header may have more columns
            column = self._columns[name]
            view = np.ndarray(column.shape, np.int64, buffer, column.offset, strides=column.strides)
            setattr(self, name, view)

    def index(self, name: str, row: int = 0, item: int = 0) -> int:
        """The offset of a word in `words`.

        Raises:
            IndexError: the row or item is outside the column.
            KeyError: there is no such column.
        """
        column = self._columns[name]
        rows, items = column.shape[0], (1, *column.shape)[-1] if len(column.shape) > 1 else 1
        if not 0 <= row < rows or not 0 <= item < items:
            raise IndexError(f"{name}[{row}, {item}] is outside {column.shape}")
        offset = column.offset + row * column.strides[0] + item * layout.WORD_BYTES
        return offset // layout.WORD_BYTES

    @property
    def dp_size(self) -> int:
        """How many ranks take part: 0 to the segment's capacity, whatever the word says."""
        return max(0, min(self.words[self._at_dp_size], self.engines))

    def frontends_used(self) -> int:
        """One more than the highest front-end row that was ever taken."""
        taken = np.flatnonzero(self.frontend_incarnation)
        return int(taken[-1]) + 1 if len(taken) else 0


_VIEWS = tuple(name for name in layout.make_layout(1, 1).columns if name != "dp_size")
