"""An engine's handle: publishes its load, counts what it takes in, and plays its part in the waves.

`Engine.publish` is a dozen 64-bit stores. Nothing here waits for anybody: the coordinator hears of waves
through a socket that drops what it cannot take, and whatever is lost the board tells (`dpshm.waves`).

An engine that starts takes its rank's row, zeroes it, copies every front-end's ``sent`` into its
``received`` (what its predecessor had, or what was on its way to it, is gone), and takes the wave of the
control word.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType

import zmq

from dpshm import layout, procs, wire
from dpshm.board import Board
from dpshm.context import context
from dpshm.errors import CapacityExceeded, RowInUse, SettingError, WireError, WrongThread
from dpshm.liveness import Verdict
from dpshm.segment import Segment
from dpshm.waves import (
    AllIdle,
    AllPaused,
    Attached,
    EngineEvent,
    EngineState,
    RequestArrived,
    Resumed,
    SendWaveCompleted,
    StartReceived,
    handle_engine,
)

logger = logging.getLogger(__name__)


class Step:
    """A context that times one step; see `Engine.step`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started_ns = 0
        self.prefill_tokens = 0
        self.batch = 0

    def __enter__(self) -> Step:
        engine = self._engine
        self._started_ns = time.monotonic_ns()
        engine._words[engine._at_step_start] = self._started_ns
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine._step_ended(time.monotonic_ns() - self._started_ns, self.prefill_tokens, self.batch)


class Engine:
    """A rank's row of the board and its link to the coordinator. Belongs to the thread that made it.

    Attributes:
        dp_rank: the rank.
        board: the board, for whoever wants to look closer.
        socket: receives START; register it in a poller beside your own sockets and call `poll` when it is
            readable.
        ready: the coordinator has said that all ranks are there.
    """

    def __init__(self, board: Board, dp_rank: int) -> None:
        self.board = board
        self.dp_rank = dp_rank
        self.ready = False
        self._segment = board.segment
        self._thread = threading.get_ident()
        self._step = Step(self)
        words = self._words = board.words
        self._at_control = board.index("control")
        self._at_load = board.index("load", dp_rank)
        self._at_state = board.index("engine_state", dp_rank)
        self._at_progress = board.index("progress", dp_rank)
        self._at_backlog = board.index("prefill_backlog", dp_rank)
        self._at_beat = board.index("beat", dp_rank)
        self._at_step_start = board.index("step_start", dp_rank)
        self._at_counters = board.index("steps", dp_rank)
        self._at_finished = board.index("requests_finished", dp_rank)
        self._at_received_requests = board.index("received_requests", dp_rank)
        self._at_received_tokens = board.index("received_tokens", dp_rank)
        self._received_requests = [words[self._at_received_requests + f] for f in range(board.frontends)]
        self._received_tokens = [words[self._at_received_tokens + f] for f in range(board.frontends)]
        self._unpublished: set[int] = set()
        self._counters = [0] * 5  # steps, dummy steps, busy ns, prompt tokens, generation tokens
        self._finished = 0
        self._state = EngineState()

        header = self._segment.header
        self.socket = context().socket(zmq.SUB)
        self._output = context().socket(zmq.PUSH)
        for s in (self.socket, self._output):
            s.linger = 0
            s.reconnect_ivl = 50
            s.maxmsgsize = wire.MAX_MESSAGE_BYTES
        self.socket.connect(header.engine_input_address)
        self.socket.subscribe(b"")
        self._output.connect(header.engine_output_address)
        self._handle(Attached(layout.unpack_control(words[self._at_control])[0]))

    @classmethod
    def attach(cls, group: str, dp_rank: int) -> Engine:
        """Takes the row of a rank; returns once a living coordinator has marked it alive.

        Attach late: in the process and the thread that run the scheduler, after any fork.

        Raises:
            SegmentNotFound: there is no such group on this node.
            RowInUse: a live process has that rank.
            CapacityExceeded: the segment has no such row.
        """
        board = Board(Segment.attach(group))
        try:
            if not 0 <= dp_rank < board.engines:
                raise CapacityExceeded(
                    f"dp_rank {dp_rank} is outside 0 to {board.engines - 1}, for which the board of group "
                    f"{group!r} was made: start its coordinator with a larger max_engines"
                )
            if not board.lock_engine(dp_rank):
                raise RowInUse(
                    f"rank {dp_rank} of group {group!r} is taken by the live process "
                    f"{int(board.engine_pid[dp_rank])}"
                )
            _initialise(board, dp_rank)
            engine = cls(board, dp_rank)
            board.wait_for_coordinator(
                lambda: (
                    dp_rank >= board.dp_size
                    or board.engine_mark[dp_rank] & (layout.VERDICT_MASK | layout.ON_BEHALF) == Verdict.ALIVE
                )
            )
        except BaseException:
            board.close()
            raise
        return engine

    @property
    def wave(self) -> int:
        """The wave that this rank is in."""
        return self._state.wave

    @property
    def running(self) -> bool:
        """Whether this rank steps, with work or to keep step with the others."""
        return self._state.running

    @property
    def paused(self) -> bool:
        """Whether the user paused this rank."""
        return self._state.paused

    def receive(self, frontend: int | None, prompt_tokens: int = 0, wave: int = 0) -> None:
        """A request came in and is in the queue that the next `publish` counts; refused ones too.

        Args:
            frontend: the index of the front-end that sent it; None if it has no row (a stock one).
            prompt_tokens: as the front-end booked them.
            wave: the request's stamp.

        Raises:
            SettingError: there is no such front-end row.
        """
        self._check()
        if frontend is not None:
            if not 0 <= frontend < len(self._received_requests):
                raise SettingError(f"frontend {frontend} is outside 0 to {len(self._received_requests) - 1}")
            self._received_requests[frontend] += 1
            self._received_tokens[frontend] += max(0, prompt_tokens)
            self._unpublished.add(frontend)
        if wave > self._state.wave or not self._state.running:
            self._handle(RequestArrived(wave))

    def publish(
        self,
        *,
        waiting: int,
        running: int,
        kv_cache_usage: float = 0.0,
        prefill_backlog: int = 0,
        step: int = 0,
    ) -> None:
        """Stores this rank's load; call it when the queue changed, before and after each step.

        Args:
            waiting: requests in the queue, those just received among them.
            running: requests in the batch.
            kv_cache_usage: fraction of the KV cache in use.
            prefill_backlog: prompt tokens received and not yet computed.
            step: number of the step, growing within an incarnation.
        """
        self._check()
        words = self._words
        # SYNC: the writer's half of rule 3 (`dpshm.board`): load and backlog first, then received tokens,
        # then received requests; readers load them in the opposite order. x86-64 keeps the order of stores.
        words[self._at_load] = layout.pack_load(waiting, running, kv_cache_usage)
        words[self._at_backlog] = prefill_backlog if prefill_backlog > 0 else 0
        if self._unpublished:
            for f in self._unpublished:
                words[self._at_received_tokens + f] = self._received_tokens[f]
            for f in self._unpublished:
                words[self._at_received_requests + f] = self._received_requests[f]
            self._unpublished.clear()
        words[self._at_progress] = layout.pack_progress(self._state[0], step)
        words[self._at_finished] = self._finished
        # SYNC: the beat comes last, so a reader that has seen it (x86-64) sees the report that it dates.
        words[self._at_beat] = time.monotonic_ns()

    def step(self, prefill_tokens: int = 0, batch: int = 0) -> Step:
        """A context for one step of the model: marks it as begun, times it, counts it.

        Args:
            prefill_tokens: prompt tokens that it computes.
            batch: requests that get a token from it. Neither of the two: a dummy step.
        """
        self._check()
        self._step.prefill_tokens = prefill_tokens
        self._step.batch = batch
        return self._step

    def finished(self, requests: int = 1) -> None:
        """Counts requests that ended; stored with the next `publish`."""
        self._check()
        self._finished += requests

    def poll(self, timeout_ms: int = 0) -> bool:
        """Handles what the coordinator sent, waiting up to `timeout_ms` for the first; returns `running`."""
        self._check()
        if timeout_ms and not self.socket.poll(timeout_ms):
            return self._state.running
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return self._state.running
            try:
                self._take(frames)
            except WireError as e:
                logger.warning("dropped a message from the coordinator: %s", e)

    def wave_complete(self) -> None:
        """An all-reduce said that no rank has work; every rank calls this at the same step."""
        self._check()
        self._handle(AllIdle())

    def pause(self) -> None:
        """An all-reduce said that the user asked every rank to pause; every rank calls this at the same step.

        A pause that only some ranks were asked for counts as work in the all-reduce and keeps all stepping.
        """
        self._check()
        self._handle(AllPaused())

    def resume(self, has_work: bool) -> None:
        """The user resumed all ranks; call it past a barrier over them.

        Args:
            has_work: whether *any* rank has work, the same on all.
        """
        self._check()
        self._handle(Resumed(has_work))

    def close(self) -> None:
        """Leaves the group: the row is free for another process."""
        if not self._segment.usable:
            return
        self._check()
        words = self._words
        for at in (self._at_load, self._at_backlog, self._at_step_start):
            words[at] = 0
        words[self._at_state] = layout.pack_state(self._state.wave, 0)
        words[self.board.index("engine_pid", self.dp_rank)] = 0  # left, not died
        self.socket.close()
        self._output.close()
        self.board.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if not self._segment.usable:
            raise self._segment.why_unusable()
        if threading.get_ident() != self._thread:
            raise WrongThread(
                f"engine {self.dp_rank} belongs to the thread that attached it: call it from there, or attach "
                "in the thread that runs the scheduler"
            )

    def _take(self, frames: list[bytes]) -> None:
        match frames:
            case [wire.READY]:
                self.ready = True
            case [wire.START_FRAME, payload]:
                start = wire.decode_start(payload)
                self._handle(StartReceived(start.wave, start.exclude))
            case _:
                raise WireError(f"not from a coordinator: {len(frames)} frames, the first {frames[0]!r:.20}")

    def _handle(self, event: EngineEvent) -> None:
        self._state, commands = handle_engine(self._state, event, self.dp_rank)
        wave, running, paused = self._state
        flags = (layout.RUNNING if running else 0) | (layout.PAUSED_BY_USER if paused else 0)
        # The row before the message: whoever hears the message finds the board agreeing with it.
        self._words[self._at_state] = layout.pack_state(wave, flags)
        for command in commands:
            encode = (
                wire.encode_wave_complete if isinstance(command, SendWaveCompleted) else wire.encode_wave_started
            )
            try:
                self._output.send(encode(self.dp_rank, command.wave), zmq.NOBLOCK)
            except zmq.ZMQError as e:
                logger.warning("could not tell the coordinator: %s; it will see it on the board", e)

    def _step_ended(self, duration_ns: int, prefill_tokens: int, batch: int) -> None:
        words, counters = self._words, self._counters
        counters[0] += 1
        if not prefill_tokens and not batch:
            counters[1] += 1
        counters[2] += duration_ns
        counters[3] += prefill_tokens
        counters[4] += batch
        at = self._at_counters
        for i, value in enumerate(counters):
            words[at + i] = value
        words[self._at_step_start] = 0


def _initialise(board: Board, dp_rank: int) -> None:
    words = board.words
    if not board.segment.linked:
        raise RowInUse(f"group {board.segment.group!r} ended while rank {dp_rank} attached; try again")
    incarnation = words[board.index("engine_incarnation", dp_rank)]
    for name in ("load", *layout.ENGINE_WORDS):
        if name != "engine_incarnation":
            words[board.index(name, dp_rank)] = 0
    for f in range(board.frontends):
        words[board.index("received_tokens", dp_rank, f)] = words[board.index("sent_tokens", f, dp_rank)]
        words[board.index("received_requests", dp_rank, f)] = words[board.index("sent_requests", f, dp_rank)]
    pid = os.getpid()
    words[board.index("engine_pid", dp_rank)] = pid
    words[board.index("engine_start_time", dp_rank)] = procs.start_time(pid)
    words[board.index("engine_pid_namespace", dp_rank)] = procs.namespace_inode("pid")
    words[board.index("beat", dp_rank)] = time.monotonic_ns()
    # SYNC: publication: the incarnation last, so that the watcher, who judges a row once it sees a new one,
    # reads this pid. (On Arm it may see it first; its next round reads the pid again.)
    words[board.index("engine_incarnation", dp_rank)] = incarnation + 1
