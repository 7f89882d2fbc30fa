"""The wave thread: owns every ZMQ socket of a coordinator; receives, asks the rules, applies, sends.

It decides nothing itself. Messages become events for `dpshm.waves`; what the rows show becomes events
through `dpshm.evidence`; the control word on the board holds the result, and a publication says that it
changed. Stock engines' reports are written to the board on their behalf, and stock front-ends hear counts
at their interval; both only while such peers are connected.

Each turn of its loop takes at most `BATCH` messages from each socket before it looks at its timers, so
publishing goes on however fast input comes in; and whatever a message makes fail is counted, logged
at a limited rate, and over with that message.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeAlias

import zmq

from dpshm import layout, wire
from dpshm.context import Socket, context
from dpshm.errors import HandleClosed, SettingError, StartupTimeout, WireError
from dpshm.evidence import EngineRow, RowWatch
from dpshm.limited import LimitedLog
from dpshm.liveness import Verdict
from dpshm.settings import Settings
from dpshm.stock import RankCounts, StepCounts
from dpshm.waves import (
    CoordinatorEvent,
    CoordinatorState,
    FirstRequest,
    Phase,
    PublishState,
    SeenRunning,
    StartWave,
    WarnWakeFailed,
    WaveCompleted,
    WaveStarted,
    handle_coordinator,
)

if TYPE_CHECKING:
    from dpshm.board import Board
    from dpshm.marks import Marks

logger = logging.getLogger(__name__)

BATCH = 256
_numbers = itertools.count()
LOOK_INTERVAL_NS = 100_000_000
_MS = 1_000_000
_S = 1_000_000_000

Addresses: TypeAlias = tuple[str, str, str]  # front-ends, to engines, from engines


class Sockets:
    """The three bound sockets, and how each is bound. Used in the wave thread alone."""

    def __init__(self) -> None:
        self.frontends = context().socket(zmq.XPUB)
        self.to_engines = context().socket(zmq.XPUB)
        self.from_engines = context().socket(zmq.PULL)
        self._bound: dict[Socket, str] = {}
        for s in self.all:
            s.linger = 0
            s.maxmsgsize = wire.MAX_MESSAGE_BYTES
        for s in (self.frontends, self.to_engines):
            s.setsockopt(zmq.XPUB_VERBOSER, 1)  # every join and leave is passed on, doubles too

    @property
    def all(self) -> tuple[Socket, Socket, Socket]:
        """All three."""
        return self.frontends, self.to_engines, self.from_engines

    def bind_ports(self, addresses: Addresses) -> Addresses:
        """Binds those that end in ``:*`` to a free port each; returns all, the ports filled in."""
        bound = [
            self._bind(s, address) if address.endswith(":*") else address
            for s, address in zip(self.all, addresses, strict=True)
        ]
        return bound[0], bound[1], bound[2]

    def bind(self, addresses: Addresses) -> None:
        """Binds those of the three that are not bound yet."""
        for s, address in zip(self.all, addresses, strict=True):
            if s not in self._bound:
                self._bind(s, address)

    def unbind(self) -> None:
        """Takes back what was bound."""
        for s, address in self._bound.items():
            s.unbind(address)
        self._bound.clear()

    def _bind(self, s: Socket, address: str) -> str:
        try:
            s.bind(address)
        except zmq.ZMQError as e:
            raise SettingError(f"cannot bind {address}: {e.strerror}") from e
        self._bound[s] = s.getsockopt_string(zmq.LAST_ENDPOINT)
        return self._bound[s]

    def close(self) -> None:
        """Closes all three."""
        for s in self.all:
            s.close()


class WaveThread(threading.Thread):
    """One coordinator's wave thread.

    Args:
        settings: what it was told.
        open_board: called in the thread with its unbound sockets; binds them and gives the board and marks.
        joined: called whenever an engine subscribes, so that the watch looks at once.
    """

    def __init__(
        self,
        settings: Settings,
        open_board: Callable[[Sockets], tuple[Board, Marks]],
        joined: Callable[[], None],
    ) -> None:
        super().__init__(name="dpshm-wave", daemon=True)
        self._settings = settings
        self._open_board = open_board
        self._joined = joined
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._nudge_lock = threading.Lock()
        self._nudge = context().socket(zmq.PAIR)
        self._nudge.linger = 0
        self._nudge_address = f"inproc://dpshm-wave-{next(_numbers)}"  # never again: ZMQ frees names late
        self._nudge.bind(self._nudge_address)
        self._stop_asked = False
        self.opened: Future[Board] = Future()
        self.all_ready: Future[None] = Future()
        self.dropped = LimitedLog(logger)

    # From other threads.

    def call(self, function: Callable[[], None], timeout_s: float = 5.0) -> None:
        """Runs a function in the wave thread and waits for it; raises what it raises.

        Raises:
            HandleClosed: the thread has ended, or is about to.
        """
        if self._stop_asked:
            raise HandleClosed(f"the coordinator of group {self._settings.group!r} is closed")
        done: Future[None] = Future()

        def run() -> None:
            try:
                function()
            except Exception as e:
                done.set_exception(e)
            else:
                done.set_result(None)

        self._calls.put(run)
        self._wake()
        done.result(timeout_s)

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stop_asked = True
        self._wake()
        self.join(timeout=5.0)
        with self._nudge_lock:
            self._nudge.close()

    def _wake(self) -> None:
        with self._nudge_lock, suppress(zmq.ZMQError):
            self._nudge.send(b"", zmq.NOBLOCK)

    # The thread.

    def run(self) -> None:
        """The thread: opens sockets and board, reports, serves until told to stop, closes the sockets."""
        with ExitStack() as stack:
            try:
                sockets = Sockets()
                stack.callback(sockets.close)
                nudged = context().socket(zmq.PAIR)
                stack.callback(nudged.close)
                nudged.connect(self._nudge_address)
                self._board, self._marks = self._open_board(sockets)
                self._prepare(sockets)
            except BaseException as e:
                self.opened.set_exception(e)
                del self._open_board, self._joined
                return
            self.opened.set_result(self._board)
            self._serve(nudged)
        if not self.all_ready.done():
            self.all_ready.set_exception(StartupTimeout("the coordinator was closed before all ranks came"))
        del self._open_board, self._joined  # which refer back: the memory goes with the last handle

    def _prepare(self, sockets: Sockets) -> None:
        settings, board = self._settings, self._board
        now = time.monotonic_ns()
        self._sockets = sockets
        self._words = board.words
        self._at_control = board.index("control")
        self._state = CoordinatorState(*layout.unpack_control(self._words[self._at_control]))
        self._rows = RowWatch(settings.resend_interval_ms * _MS, round(settings.wake_timeout_s * _S))
        self._counts = StepCounts()
        self._published: list[RankCounts] = []
        self._waking_since_ns = now
        self._stock_frontends = 0
        self._subscribed_engines = 0
        self._next_look_ns = now
        self._next_counts_ns = now
        self._next_refresh_ns = now
        self._ready_deadline_ns = now + round(settings.ready_timeout_s * _S) if settings.ready_timeout_s else None
        self._ready = self._words[board.index("ready")] == 1
        if self._ready:
            self.all_ready.set_result(None)

    def _serve(self, nudged: Socket) -> None:
        poller = zmq.Poller()
        for s in (nudged, *self._sockets.all):
            poller.register(s, zmq.POLLIN)
        takers: dict[Socket, Callable[[list[bytes]], None]] = {
            self._sockets.frontends: self._from_frontend,
            self._sockets.to_engines: self._engine_subscription,
            self._sockets.from_engines: self._from_engine,
        }
        while not self._stop_asked:
            readable = dict(poller.poll(self._timeout_ms()))
            if nudged in readable:
                with suppress(zmq.Again):
                    nudged.recv(zmq.NOBLOCK)
                with suppress(queue.Empty):
                    while True:
                        self._calls.get_nowait()()
            for s, take in takers.items():
                if s in readable:
                    self._receive(s, take)
            try:
                self._on_time(time.monotonic_ns())
            except Exception:
                logger.exception("the wave thread goes on after an error of its own")
                time.sleep(0.05)

    def _receive(self, s: Socket, take: Callable[[list[bytes]], None]) -> None:
        for _ in range(BATCH):
            try:
                frames = s.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                take(frames)
            except WireError as e:
                self._drop("malformed message", e)
            except Exception as e:
                self._drop("message that could not be handled", repr(e))
            self._count("messages_received")  # afterwards: what waits for an answer waits less

    def _drop(self, reason: str, detail: object) -> None:
        self._count("messages_dropped")
        self.dropped.warn(reason, detail)

    def _count(self, name: str, by: int = 1, *, row: int = 0) -> None:
        at = self._board.index(name, row)
        self._words[at] = layout.saturate(self._words[at] + by)

    # Messages.

    def _from_frontend(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise WireError(f"not a front-end's message: {len(frames)} frames")
        data = frames[0]
        if data[:1] == wire.SUBSCRIBE:
            self._stock_frontends += 1
            if self._settings.interval_ms:
                self._publish_counts(time.monotonic_ns(), self._counts_now())
            else:
                self._publish_state()
            return
        if data[:1] == wire.UNSUBSCRIBE:
            self._stock_frontends = max(0, self._stock_frontends - 1)
            return
        match wire.decode_frontend_message(data):
            case wire.FirstRequestMessage(engine, wave):
                self._take_event(FirstRequest(engine, wave))
            case wire.ScaleMessage(dp_size):
                try:
                    self.scale(dp_size)
                except SettingError as e:
                    self._drop("scaling refused", e)
            case wire.DrainMessage(dp_rank, drained):
                try:
                    self.set_drained(dp_rank, drained)
                except SettingError as e:
                    self._drop("drain refused", e)

    def _engine_subscription(self, frames: list[bytes]) -> None:
        data = frames[0]
        if data[:1] == wire.SUBSCRIBE:
            self._subscribed_engines += 1
            self._joined()
            self._greet()
        elif data[:1] == wire.UNSUBSCRIBE:
            self._subscribed_engines = max(0, self._subscribed_engines - 1)
            if not self._subscribed_engines:
                self._counts = StepCounts()  # whoever comes next counts steps and waves from 0
        else:
            raise WireError("engines only subscribe on this socket")

    def _greet(self) -> None:
        """READY to all once all are there, and again for whoever comes later (the others skip it)."""
        if self._ready:
            self._sockets.to_engines.send(wire.READY)
        elif self._subscribed_engines >= self._board.dp_size:
            self._ready = True
            self._sockets.to_engines.send(wire.READY)
            self._words[self._board.index("ready")] = 1
            logger.info("all %d engines of group %r are ready", self._board.dp_size, self._settings.group)
            if not self.all_ready.done():  # it may have failed at its deadline
                self.all_ready.set_result(None)
        if self._subscribed_engines >= self._board.dp_size:
            self._mark_stock()

    def _mark_stock(self) -> None:
        """All ranks are connected: those that never took their row are stock engines, which have none."""
        for e in range(self._board.dp_size):
            if not self._board.engine_incarnation[e] and not self._board.engine_alive(e):
                self._marks.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True)

    def _from_engine(self, frames: list[bytes]) -> None:
        message = wire.decode_engine_message(frames[0])
        e = message.engine_index
        if len(frames) != 1 or e >= self._board.dp_size:
            raise WireError(f"from engine {e} of {self._board.dp_size}, in {len(frames)} frames")
        if message.scheduler_stats is not None:
            self._take_stats(e, message.scheduler_stats)
        if message.wave_complete is not None:
            self._take_event(WaveCompleted(message.wave_complete))
        if message.start_wave is not None:
            self._take_event(WaveStarted(e, message.start_wave))

    def _take_stats(self, e: int, stats: wire.SchedulerStats) -> None:
        board, words = self._board, self._words
        if board.engine_pid[e] or board.engine_alive(e):
            return  # it writes its own row; and its last words, if it died, do not make it a stock engine
        waiting, running, kv = stats.num_waiting_reqs, stats.num_running_reqs, stats.kv_cache_usage
        if not self._counts.report(e, stats.current_wave, stats.step_counter, (waiting, running, kv)):
            logger.debug("engine %d reported step %d late", e, stats.step_counter)
        # SYNC: on a stock engine's behalf, in the order in which an engine would store it (`EngineRow.publish`).
        # It cannot say what it has taken in, so whatever was sent by now counts as received.
        used = board.frontends_used()
        sent_requests = board.sent_requests[:, e].tolist()
        sent_tokens = board.sent_tokens[:, e].tolist()
        words[board.index("load", e)] = layout.pack_load(waiting, running, kv)
        words[board.index("request_balance", e)] = waiting + running - sum(sent_requests[:used])
        words[board.index("token_balance", e)] = -sum(sent_tokens[:used])
        at_tokens, at_requests = board.index("received_tokens", e), board.index("received_requests", e)
        for f in range(used):
            words[at_tokens + f] = sent_tokens[f]
            words[at_requests + f] = sent_requests[f]
        words[board.index("progress", e)] = layout.pack_progress(stats.current_wave, stats.step_counter)
        words[board.index("beat", e)] = time.monotonic_ns()
        self._marks.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True)
        # The engines of 2025 never confirm a START in words; their work does.
        if self._state.phase is Phase.WAKING and stats.num_running_reqs:
            self._take_event(SeenRunning(e, stats.current_wave))

    # Waves.

    def _take_event(self, event: CoordinatorEvent) -> None:
        if not self._settings.waves:
            return
        before = self._state
        self._state, commands = handle_coordinator(before, event, exclude_named=self._settings.exclude_receiver)
        if self._state != before:
            # The board before the messages: whoever hears of the change finds it there.
            self._words[self._at_control] = layout.pack_control(*self._state)
            if self._state.phase is Phase.RUNNING and (
                before.phase is not Phase.RUNNING or self._state.wave > before.wave
            ):
                self._count("waves_started")
        for command in commands:
            match command:
                case StartWave(wave, exclude):
                    self._sockets.to_engines.send_multipart(wire.encode_start(wave, exclude))
                    self._count("starts_sent")
                case PublishState():
                    self._publish_state()
                case WarnWakeFailed(wave):
                    logger.warning(
                        "no engine woke up for wave %d within %g s: paused by the user, or gone?",
                        wave,
                        self._settings.wake_timeout_s,
                    )
        if self._state != before:  # noted afterwards: who waits for START waits less
            logger.debug("%s: %s -> %s", event, before, self._state)
            self._time_wake_up(before.phase)

    def _time_wake_up(self, before: Phase) -> None:
        phase = self._state.phase
        if phase is Phase.WAKING and before is not Phase.WAKING:
            self._waking_since_ns = time.monotonic_ns()
        elif phase is Phase.RUNNING and before is Phase.WAKING:
            duration_ns = time.monotonic_ns() - self._waking_since_ns
            self._count("wake_ns", duration_ns)
            self._count("wake_bucket", row=layout.wake_bucket(duration_ns))

    def scale(self, dp_size: int) -> None:
        """Changes the number of ranks; wave and phase stay. Called in this thread."""
        board = self._board
        if not 1 <= dp_size <= board.engines:
            raise SettingError(
                f"cannot scale group {self._settings.group!r} to {dp_size} ranks: its board holds 1 to "
                f"{board.engines} (max_engines)"
            )
        old = board.dp_size
        for e in range(old, dp_size):
            if not board.engine_alive(e):
                for name in ("load", *layout.ENGINE_WORDS):
                    self._words[board.index(name, e)] = 0
                board.nothing_outstanding(e)
            self._marks.clear_engine(e)
        self._marks.set_dp_size(dp_size)
        for e in range(dp_size, old):
            self._marks.clear_engine(e)
        self._counts.keep_only(dp_size)
        logger.info("group %r scaled from %d to %d ranks", self._settings.group, old, dp_size)
        self._joined()
        if self._subscribed_engines >= dp_size:
            self._greet()

    def set_drained(self, dp_rank: int, drained: bool) -> None:
        """Takes a rank out of routing, or puts it back. Called in this thread."""
        if not 0 <= dp_rank < self._board.dp_size:
            raise SettingError(f"dp_rank {dp_rank} is outside 0 to {self._board.dp_size - 1}")
        if bool(self._marks.engine(dp_rank) & layout.DRAINED) != drained:
            self._marks.set_engine(dp_rank, drained=drained)
            logger.info("engine %d is %s by an operator", dp_rank, "drained" if drained else "undrained")

    # Time.

    def _timeout_ms(self) -> int:
        due = [self._next_look_ns]
        if self._stock_frontends and self._settings.interval_ms:
            due.append(self._next_counts_ns)
        return max(0, -((time.monotonic_ns() - min(due)) // _MS))

    def _on_time(self, now: int) -> None:
        if now >= self._next_look_ns:
            self._next_look_ns = now + LOOK_INTERVAL_NS
            self._look(now)
            if self._ready_deadline_ns is not None and now >= self._ready_deadline_ns:
                self._ready_deadline_ns = None
                self._report_missing()
        if self._stock_frontends and self._settings.interval_ms and now >= self._next_counts_ns:
            self._next_counts_ns = now + self._settings.interval_ms * _MS
            counts = self._counts_now()
            if now >= self._next_refresh_ns or counts != self._published:
                self._publish_counts(now, counts)

    def _look(self, now: int) -> None:
        if not self._settings.waves:
            return
        board, marks = self._board, self._marks
        rows = []
        stock = 0
        for e, word in enumerate(board.engine_state[: board.dp_size].tolist()):
            mark = marks.engine(e)
            if mark & layout.VERDICT_MASK in (Verdict.ALIVE, Verdict.STALLED) and not mark & layout.ON_BEHALF:
                wave, running, _ = layout.unpack_state(word)
                rows.append(EngineRow(e, wave, running))
            elif mark & layout.ON_BEHALF:
                stock += 1
        for event in self._rows.look(now, self._state, rows, unseen_ranks=stock):
            self._take_event(event)

    def _counts_now(self) -> list[RankCounts]:
        """By rank: a stock engine's last complete step, or what one of ours has on the board."""
        board = self._board
        stock = self._counts.take()
        counts = []
        for e, word in enumerate(board.load[: board.dp_size].tolist()):
            on_behalf = self._marks.engine(e) & layout.ON_BEHALF
            counts.append(stock[e] if on_behalf and e in stock else layout.unpack_load(word))
        return counts

    def _publish_state(self) -> None:
        self._count("states_published")
        wave, phase = self._state
        self._sockets.frontends.send(wire.encode_state(None, wave, phase is Phase.RUNNING))

    def _publish_counts(self, now: int, counts: list[RankCounts]) -> None:
        self._published = counts
        self._next_refresh_ns = now + self._settings.idle_refresh_ms * _MS
        self._count("counts_published")
        wave, phase = self._state
        sent = counts if self._settings.counts_with_kv else [c[:2] for c in counts]
        self._sockets.frontends.send(wire.encode_state(sent, wave, phase is Phase.RUNNING))

    def _report_missing(self) -> None:
        if self.all_ready.done():
            return
        board = self._board
        absent = [e for e in range(board.dp_size) if not board.engine_alive(e)]
        error = StartupTimeout(
            f"{self._subscribed_engines} of {board.dp_size} engines of group {self._settings.group!r} connected "
            f"within {self._settings.ready_timeout_s:g} s; ranks without a row on the board: {absent} "
            "(a stock engine never takes one). See the logs of these ranks"
        )
        logger.error("%s", error)
        self.all_ready.set_exception(error)
