"""The board: numpy views over a group's segment, and which process writes which word.

Every column is a view named after its column in `dpshm.board.layout`, int64, over shared memory. Each word has
one writer (rule 2 of dpshm/README.md): an engine its row, its `load` and its `received`; a front-end its row and
its `sent`; the coordinator its row and the marks (and the row of an engine that cannot write it: a stock engine,
which knows no board, or an engine on another node). So nothing is ever read, changed and written back by two
processes.

Each fact is one word (rule 1), so a reader needs no lock: an aligned 64-bit load or store is single-copy atomic on
x86-64 and on Armv8, and numpy's scalar access, ``ndarray.tolist()``, elementwise ufuncs and
``memoryview('q')`` items each make one such access a word. ``struct.pack_into`` does not (it clears first),
and copies through ``memcpy`` promise nothing per word on Arm: hot columns are not read through slices'
``copy()``.

Between words no order matters to a decision: what is outstanding at an engine is a difference of counts of which
each is a whole word (`dpshm.board.outstanding`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from dpshm.board import layout
from dpshm.board.header import printable
from dpshm.board.locks import coordinator_byte, engine_byte, frontend_byte
from dpshm.board.outstanding import Outstanding, Words
from dpshm.board.segment import Segment
from dpshm.board.snapshot import Snapshot, take_snapshot
from dpshm.board.words import ON_BEHALF, REMOTE, VERDICT_MASK, unpack_control, unpack_load, unpack_state
from dpshm.linux import processes
from dpshm.linux.descriptors import explained
from dpshm.rules.liveness import HANGING, EngineSigns, Observation, Verdict, judge, still_holds
from dpshm.rules.waves import Phase

COORDINATOR_TIMEOUT_S = 2.0
COORDINATOR_SILENCE_NS = 500_000_000
"""A coordinator whose beat is older does not watch. Then each reader tests the locks itself."""


class Board:
    """The columns of one group's segment.

    Attributes:
        segment: the open segment; `close()` closes it.
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
        self._columns = segment.header.columns
        self._at_dp_size = self.index("dp_size")
        buffer = self.words.cast("B")
        for name in _VIEWS:  # a newer version's header may have more columns
            column = self._columns[name]
            view = np.ndarray(column.shape, np.int64, buffer, column.offset, strides=column.strides)
            setattr(self, name, view)

    @classmethod
    @explained()
    def attach(cls, group: str, *, readonly: bool = True, any_owner: bool = False) -> Board:
        """Opens the board of a group, read-only unless told otherwise.

        Args:
            group: the group's name.
            readonly: never to write to it.
            any_owner: read it also if another user owns it. Only for tools: that user decides what is in it, and
                can end this process by truncating the file.

        Raises:
            SegmentNotFound: there is no such group.
            SegmentInvalid: its segment is another user's, or not one that this version can use.
        """
        return cls(Segment.attach(group, readonly=readonly, any_owner=any_owner))

    def close(self) -> None:
        """Gives the locks back. Views that are still referenced stay valid."""
        self.segment.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    # The locks that tell which processes live. A reader of another user's group has none (`Segment.has_locks`).

    def coordinator_alive(self) -> bool:
        """Whether a coordinator holds the group."""
        if not self.segment.has_locks:
            return self.is_watched()
        return self.segment.locks.is_locked(coordinator_byte(self._columns))

    def engine_alive(self, dp_rank: int) -> bool:
        """Whether a process holds an engine's row."""
        if not self.segment.has_locks:
            return self._seems_alive("engine", dp_rank)
        return self.segment.locks.is_locked(engine_byte(self._columns, dp_rank))

    def engine_present(self, dp_rank: int) -> bool:
        """Whether a process holds an engine's row, or was heard on another node a moment ago."""
        mark = int(self.engine_mark[dp_rank])
        heard = mark & REMOTE and mark & VERDICT_MASK in (Verdict.ALIVE, *HANGING)
        return bool(heard) or self.engine_alive(dp_rank)

    def engine_ends(self, dp_rank: int) -> bool:
        """Whether the kernel ends the process that took an engine's row. Until then the row may be locked."""
        pid, started = int(self.engine_pid[dp_rank]), int(self.engine_start_time[dp_rank])
        visible = int(self.engine_pid_namespace[dp_rank]) == processes.namespace_inode("pid") != 0
        visible = visible and not int(self.engine_mark[dp_rank]) & REMOTE
        return visible and pid > 0 and processes.life_of(pid, started) is processes.Life.EXITS

    def frontend_alive(self, index: int) -> bool:
        """Whether a process holds a front-end's row."""
        if not self.segment.has_locks:
            return self._seems_alive("frontend", index)
        return self.segment.locks.is_locked(frontend_byte(self._columns, index))

    def is_used(self) -> bool:
        """Whether another handle is attached for writing: the group is not dead."""
        if self.segment.has_locks:
            return self.segment.locks.is_shared()
        return (
            self.coordinator_alive()
            or any(self.engine_alive(e) for e in range(self.dp_size))
            or any(self.frontend_alive(f) for f in range(self.frontends_used()))
        )

    def _seems_alive(self, role: str, row: int) -> bool:
        """What a reader without locks can tell: by the mark while a coordinator watches, else by the process."""
        mark = int((self.engine_mark if role == "engine" else self.frontend_mark)[row])
        pid = int(getattr(self, f"{role}_pid")[row])
        namespace = int(getattr(self, f"{role}_pid_namespace")[row])
        if self.is_watched() or mark & ON_BEHALF or namespace != processes.namespace_inode("pid"):
            return Verdict(mark & VERDICT_MASK) not in (Verdict.ABSENT, Verdict.DEAD)
        return pid > 0 and processes.start_time(pid) == int(getattr(self, f"{role}_start_time")[row])

    def lock_coordinator(self) -> bool:
        """Takes the coordinator's lock. False if another process has it."""
        return self.segment.locks.lock(coordinator_byte(self._columns))

    def lock_engine(self, dp_rank: int) -> bool:
        """Takes the lock of an engine's row. False if another process has it."""
        return self.segment.locks.lock(engine_byte(self._columns, dp_rank))

    def unlock_engine(self, dp_rank: int) -> None:
        """Gives the lock of an engine's row back."""
        self.segment.locks.unlock(engine_byte(self._columns, dp_rank))

    def lock_frontend(self, index: int) -> bool:
        """Takes the lock of a front-end's row. False if another process has it."""
        return self.segment.locks.lock(frontend_byte(self._columns, index))

    # Facts, decoded.

    @property
    def wave(self) -> int:
        """The coordinator's wave."""
        return unpack_control(int(self.control[0]))[0]

    @property
    def phase(self) -> Phase:
        """The coordinator's phase."""
        return unpack_control(int(self.control[0]))[1]

    @property
    def dp_size(self) -> int:
        """How many ranks take part: 0 to the segment's capacity, whatever the word says."""
        return max(0, min(self.words[self._at_dp_size], self.engines))

    def frontends_used(self) -> int:
        """One more than the highest front-end row that was ever taken."""
        taken = np.flatnonzero(self.frontend_incarnation)
        return int(taken[-1]) + 1 if len(taken) else 0

    def wait_for_coordinator(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds, no coordinator lives, or `COORDINATOR_TIMEOUT_S` has passed."""
        deadline = time.monotonic() + COORDINATOR_TIMEOUT_S
        while not condition() and time.monotonic() < deadline and self.coordinator_alive():
            time.sleep(0.002)

    def nothing_outstanding(self, dp_rank: int) -> None:
        """Resets an engine's offsets so that its outstanding count is zero."""
        self.request_offset[dp_rank] = -self.received_requests[dp_rank].sum()
        self.token_offset[dp_rank] = -self.received_tokens[dp_rank].sum()

    def owner_of(self, index: int) -> str:
        """The name under which a front-end took its row."""
        return printable(bytes(self.owner[index].tobytes()).rstrip(b"\0").decode("utf-8", "replace"))

    def is_watched(self) -> bool:
        """Whether a coordinator keeps the marks up to date: its beat is fresh."""
        return abs(time.monotonic_ns() - int(self.coordinator_beat[0])) < COORDINATOR_SILENCE_NS

    def engine_verdicts(self, *, watched: bool | None = None) -> list[Verdict]:
        """By rank, the coordinator's verdicts.

        While no coordinator watches, the locks tell which processes live. A verdict of stalled or stuck then stays
        until the words change from which it followed. Stock engines stay alive, and a rank of another node is what
        it was called last: no word from it can reach the board.

        Args:
            watched: whether a coordinator keeps the marks; default `is_watched`.
        """
        marks = self.engine_mark[: self.dp_size].tolist()
        if self.is_watched() if watched is None else watched:
            return [Verdict(mark & VERDICT_MASK) for mark in marks]
        return [
            Verdict.ALIVE
            if mark & ON_BEHALF
            else Verdict(mark & VERDICT_MASK)
            if mark & REMOTE
            else self._unwatched_verdict(e, Verdict(mark & VERDICT_MASK))
            for e, mark in enumerate(marks)
        ]

    def _unwatched_verdict(self, e: int, marked: Verdict) -> Verdict:
        locked = self.engine_alive(e)
        ending = locked and self.engine_ends(e)
        verdict = judge(Observation(bool(self.engine_pid[e]), locked, ending=ending), 0)
        holds = (
            verdict is Verdict.ALIVE
            and marked in HANGING
            and still_holds(marked, int(self.evidence[e]), self.engine_signs(e))
        )
        return marked if holds else verdict

    def engine_signs(self, e: int) -> EngineSigns:
        """What an engine's row shows of its life and work."""
        words, at = self.words, self.index
        waiting, running, _ = unpack_load(words[at("load", e)])
        return EngineSigns(
            incarnation=words[at("engine_incarnation", e)],
            beat=words[at("beat", e)],
            step_start=words[at("step_start", e)],
            waiting=waiting,
            running=running,
            paused=unpack_state(words[at("engine_state", e)])[2],
            tokens=words[at("prompt_tokens", e)] + words[at("generation_tokens", e)],
            finished=words[at("requests_finished", e)],
        )

    def clocks_agree(self) -> bool:
        """Whether this process shares CLOCK_MONOTONIC with the coordinator that made the board."""
        header = self.segment.header
        return header.boot_id == processes.boot_id() and header.time_namespace == _time_namespace()

    def engine_clock_agrees(self, e: int) -> bool:
        """Whether an engine's times can be compared with this process's clock: both have one time namespace.

        True also where the engine does not say which it has (a stock one, or no ``/proc``).
        """
        return int(self.engine_time_namespace[e]) in (0, _time_namespace())

    def counted_frontends(self) -> list[int]:
        """The rows whose bookings count: taken, and not those of a front-end that died."""
        taken = [f for f in range(self.frontends_used()) if self.frontend_pid[f]]
        if self.is_watched():
            return [f for f in taken if self.frontend_mark[f] != Verdict.DEAD]
        return [f for f in taken if self.frontend_alive(f)]

    def outstanding_requests(self, counted: Sequence[int]) -> Outstanding:
        """A counter of outstanding requests, valid until the board's marks change.

        Args:
            counted: the front-ends whose bookings count.
        """
        return self._outstanding("request_offset", "sent_requests", self.received_requests, counted)

    def outstanding_tokens(self, counted: Sequence[int]) -> Outstanding:
        """The same for prompt tokens."""
        return self._outstanding("token_offset", "sent_tokens", self.received_tokens, counted)

    def _outstanding(self, balance: str, sent: str, received: Words, counted: Sequence[int]) -> Outstanding:
        used, n = self.frontends_used(), self.dp_size
        at, strides = self._columns[balance].offset, self._columns[sent].strides
        table = np.ndarray((1 + used, n), np.int64, self.words.cast("B"), at, strides)
        return Outstanding(table, received[:n, :used], counted)

    def snapshot(
        self, now_ns: int | None = None, counted: Sequence[int] | None = None, *, watched: bool | None = None
    ) -> Snapshot:
        """What each rank does, according to the board.

        Args:
            now_ns: CLOCK_MONOTONIC; ages are counted up to it. Without it they are -1.
            counted: the front-ends whose bookings count; default `counted_frontends`.
            watched: whether a coordinator keeps the marks; default `is_watched`.

        Returns:
            A copy: an array of shape (dp_size,) and dtype `dpshm.board.snapshot.SNAPSHOT_DTYPE`.
        """
        return take_snapshot(self, now_ns, self.counted_frontends() if counted is None else counted, watched)


_time_namespace = cache(lambda: processes.namespace_inode("time"))
_VIEWS = tuple(name for name in layout.make_layout(1, 1).columns if name != "dp_size")
