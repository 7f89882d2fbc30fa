"""The byte map of a board: the offset of every word.

    offset 0        +------------------------------------------------------------------+
                    | magic  8 | major u16 | minor u16 | length u32 | crc32 u32 | JSON |  one page
    page 1          +------------------------------------------------------------------+
                    | coordinator row, 128 bytes: control, dp_size, epoch, pid, ...    |
                    +------------------------------------------------------------------+
                    | load           [engine]              dense: 8 engines a line     |
                    | engine mark    [engine]              dense                       |
                    | front-end mark [front-end]           dense                       |
                    +------------------------------------------------------------------+
                    | engine rows    [engine]              128 bytes each              |
                    | step models    [engine]              128 bytes each              |
                    | front-end rows [front-end]           128 bytes each, ids inside  |
                    +------------------------------------------------------------------+
                    | received requests, tokens  [engine, front-end]   rows padded     |
                    | offset [engine], sent requests [front-end, engine]   rows padded |
                    | the same of tokens                                               |
                    +------------------------------------------------------------------+
                    | changes: the newest `CHANGES` of marks, dp_size and coordinator  |
                    | wake buckets: how long wake-ups took                             |
                    | cache states   [engine]              128 bytes each              |
                    | evidence of verdicts [engine], and the coordinator's settings    |
                    | drops: how many messages were dropped, by reason                 |
                    | remote rows [engine]                 128 bytes each              |
                    | bases of remote received counts [engine, front-end]  rows padded |
                    +------------------------------------------------------------------+

Everything is little-endian and every word is an int64 on an 8-byte boundary. Rows are padded to 128
bytes, two cache lines, because the adjacent-line prefetcher of x86 moves lines in pairs; so no two
writers share a line. The exceptions are the dense columns: a decision over 8 engines then reads one
line of loads, and the marks have one writer anyway.

The JSON of the header carries the column table (name, offset, shape, strides), so a tool of another
version or language finds its way. Columns are int64 because numpy turns ``uint64 - int64`` into float64;
no packed word ever has its top bit set, so none is ever negative. A value that does not fit saturates.
"""

from __future__ import annotations

from typing import NamedTuple

from dpshm.board.words import WAKE_LIMITS_MS

MAGIC = b"DPSHMBRD"
VERSION_MAJOR = 1  # readers and writers need the same
VERSION_MINOR = 0  # writers need the same; readers take a newer one: columns were only added
PAGE_BYTES = 4096
ROW_BYTES = 128
WORD_BYTES = 8
OWNER_BYTES = 48

DEFAULT_ENGINES = 64
DEFAULT_FRONTENDS = 64
MAX_ENGINES = 4096
MAX_FRONTENDS = 4096

CHANGES = 256
"""How many of the newest changes the board keeps; change number n, the board's n-th revision, is in slot
n % CHANGES."""

SETTINGS_WORDS = 192
"""Room for the settings that a coordinator keeps on the board for its successor."""


# What the coordinator stores in its row, word by word.
COORDINATOR_WORDS = (
    "control",  # wave and phase
    "dp_size",  # ranks that take part now
    "revision",  # grows by one after every change of a mark or of dp_size
    "epoch",  # how many coordinators this board has had
    "coordinator_beat",  # CLOCK_MONOTONIC ns of the watch thread's last round
    "coordinator_pid",
    "coordinator_start_time",
    "ready",  # 1 once all ranks were there
    "waves_started",
    "starts_sent",
    "states_published",
    "counts_published",
    "messages_received",
    "messages_dropped",
    "wake_ns",  # how long all wake-ups took together
    "coordinator_version",  # see `dpshm.version`
)
# Why the coordinator drops a message: the items of `drops`. `messages_dropped` is their sum.
DROP_REASONS = (
    "malformed message",
    "message that could not be handled",
    "flood",
    "scaling refused",
    "drain refused",
    "peer refused",
)
# What an engine stores in its row. `steps` and the words after it only grow within an incarnation.
ENGINE_WORDS = (
    "engine_state",  # wave and flags: running, paused by the user
    "progress",  # wave and step of the newest report
    "prefill_backlog",  # prompt tokens taken in and not computed
    "beat",  # CLOCK_MONOTONIC ns of the newest publish
    "step_start",  # CLOCK_MONOTONIC ns; 0 between steps
    "engine_incarnation",  # grows by one with each process; stored last
    "engine_pid",
    "engine_start_time",
    "engine_pid_namespace",  # inode
    "steps",
    "dummy_steps",
    "busy_ns",
    "prompt_tokens",
    "generation_tokens",
    "requests_finished",
    "engine_version",
)
# The items of an engine's row in `step_model`: its running step, then what it has learnt
# (`dpshm.policies.step_model`).
STEP_WORDS = (
    "step_end",  # CLOCK_MONOTONIC ns at which the running step should end; 0 between steps, or unknown
    "step_tokens",  # prompt tokens that the running step computes
    "held_tokens",  # tokens of context of the running requests, computed or cached
)
MODEL_WORDS = (
    "base_ns",  # what a step takes by itself; 0: nothing was learnt yet
    "per_request_ns",
    "per_token_ns",
    "chunk_tokens",  # the most prompt tokens of a step; 0: no step was seen to be full
    "max_running",  # requests that ran when some had to wait for room; 0: none ever had to
    "ending_ns",  # mean time from one request's end to the next
    "per_held_token_ps",  # what a token of context of the running requests adds to a step, in picoseconds
)
STEP_MODEL_WORDS = (*STEP_WORDS, *MODEL_WORDS)
# The items of an engine's row in `remote_state`, for a rank of another node: what its newest message said.
REMOTE_WORDS = (
    "heard",  # CLOCK_MONOTONIC ns of this node at which the process was heard last
    "heard_report",  # the number of its newest report
    "heard_process",  # a random number that the process drew
    "home",  # the number of the board on whose node it is, if a relay brought the row (`Header.board_number`)
    "delay",  # ns, half of a round trip to its node, if a relay brought the row
)
# The items of an engine's row in `cache_state`: its KV cache and its prefix index (`dpshm.board.prefix_index`).
CACHE_WORDS = (
    "index_incarnation",  # of the engine that made the prefix index; 0: there is none
    "block_tokens",  # tokens a block
    "num_blocks",  # blocks of the KV cache
    "blocks_in_use",  # of those, held by requests
    "cached_tokens",  # prompt tokens that were found in the cache; only grows within an incarnation
    "indexed_blocks",  # different blocks that the prefix index holds
    "dropped_blocks",  # blocks that found no place in it; only grows with each index
)
# What a front-end stores in its row, its name (`owner`, OWNER_BYTES) after them.
FRONTEND_WORDS = (
    "frontend_beat",
    "frontend_incarnation",
    "frontend_pid",
    "frontend_start_time",
    "frontend_pid_namespace",
    "routed",
    "frontend_version",
)
OWNER_OFFSET = ROW_BYTES - OWNER_BYTES


# The words of an engine's row that a message carries to a board on another node, in its order: (column, item).
CARRIED_WORDS = (
    ("load", 0),
    *((name, 0) for name in ENGINE_WORDS if name not in ("beat", "engine_incarnation", "engine_pid_namespace")),
    *(("step_model", i) for i in range(len(STEP_MODEL_WORDS))),
    *(("cache_state", i) for i in range(1, 6)),  # how full the cache is; a prefix index is told apart
)


class Column(NamedTuple):
    """One int64 column: where it starts, how many items each axis has, how far apart (bytes) they are."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Layout(NamedTuple):
    """The whole map for given capacities."""

    engines: int
    frontends: int
    columns: dict[str, Column]
    size: int


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def make_layout(engines: int, frontends: int) -> Layout:
    """The map of a segment with room for so many engines and front-ends."""
    columns: dict[str, Column] = {}
    end = PAGE_BYTES

    def reserve(size: int) -> int:
        nonlocal end
        start, end = end, end + _padded(size, ROW_BYTES)
        return start

    def rows(count: int, words: tuple[str, ...]) -> int:
        start = reserve(count * ROW_BYTES)
        for i, name in enumerate(words):
            columns[name] = Column(start + i * WORD_BYTES, (count,), (ROW_BYTES,))
        return start

    rows(1, COORDINATOR_WORDS)
    for name, count in (("load", engines), ("engine_mark", engines), ("frontend_mark", frontends)):
        columns[name] = Column(reserve(count * WORD_BYTES), (count,), (WORD_BYTES,))
    rows(engines, ENGINE_WORDS)
    steps = reserve(engines * ROW_BYTES)
    columns["step_model"] = Column(steps, (engines, len(STEP_MODEL_WORDS)), (ROW_BYTES, WORD_BYTES))
    columns["engine_time_namespace"] = Column(  # inode: of which clock the engine's times are
        steps + len(STEP_MODEL_WORDS) * WORD_BYTES, (engines,), (ROW_BYTES,)
    )
    columns["preemptions"] = Column(  # requests that lost their place in the batch; grows within an incarnation
        steps + (len(STEP_MODEL_WORDS) + 1) * WORD_BYTES, (engines,), (ROW_BYTES,)
    )
    owners = rows(frontends, FRONTEND_WORDS) + OWNER_OFFSET
    owner_words = OWNER_BYTES // WORD_BYTES
    columns["owner"] = Column(owners, (frontends, owner_words), (ROW_BYTES, WORD_BYTES))
    stride = _padded(frontends * WORD_BYTES, ROW_BYTES)
    for name in ("received_requests", "received_tokens"):
        columns[name] = Column(reserve(engines * stride), (engines, frontends), (stride, WORD_BYTES))
    stride = _padded(engines * WORD_BYTES, ROW_BYTES)
    for offset, sent in (("request_offset", "sent_requests"), ("token_offset", "sent_tokens")):
        # The offsets are the row before the first front-end's: `dpshm.board.outstanding` sums both as one table.
        columns[offset] = Column(reserve(stride), (engines,), (WORD_BYTES,))
        columns[sent] = Column(reserve(frontends * stride), (frontends, engines), (stride, WORD_BYTES))
    for name, count in (
        ("change_time", CHANGES),  # CLOCK_MONOTONIC ns
        ("change", CHANGES),
        ("wake_bucket", len(WAKE_LIMITS_MS) + 1),
    ):
        columns[name] = Column(reserve(count * WORD_BYTES), (count,), (WORD_BYTES,))
    columns["cache_state"] = Column(
        reserve(engines * ROW_BYTES), (engines, len(CACHE_WORDS)), (ROW_BYTES, WORD_BYTES)
    )
    # From what a verdict of stalled or stuck followed (`dpshm.rules.liveness.evidence_of`).
    columns["evidence"] = Column(reserve(engines * WORD_BYTES), (engines,), (WORD_BYTES,))
    columns["kept_settings"] = Column(reserve(SETTINGS_WORDS * WORD_BYTES), (SETTINGS_WORDS,), (WORD_BYTES,))
    columns["drops"] = Column(reserve(len(DROP_REASONS) * WORD_BYTES), (len(DROP_REASONS),), (WORD_BYTES,))
    columns["remote_state"] = Column(
        reserve(engines * ROW_BYTES), (engines, len(REMOTE_WORDS)), (ROW_BYTES, WORD_BYTES)
    )
    # What a remote engine has received counts from its own start: `received` is this base and what it says.
    stride = _padded(frontends * WORD_BYTES, ROW_BYTES)
    for name in ("base_requests", "base_tokens"):
        columns[name] = Column(reserve(engines * stride), (engines, frontends), (stride, WORD_BYTES))
    return Layout(engines, frontends, columns, _padded(end, PAGE_BYTES))
