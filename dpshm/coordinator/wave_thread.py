"""The wave thread: owns every ZMQ socket of a coordinator; receives, asks the rules, applies, sends.

It decides nothing itself. Messages become events for `dpshm.rules.waves`; what the rows show becomes events
through `dpshm.rules.reconciler`; the control word on the board holds the result, and a publication says that it
changed. Stock engines' reports are written to the board on their behalf, and stock front-ends hear counts
at their interval; both only while such peers are connected.

Each turn of its loop takes at most `BATCH` messages from each socket before it looks at its timers, so
publishing goes on however fast input comes in; and whatever a message makes fail is counted, logged
at a limited rate, and over with that message.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import zmq

from dpshm.board import layout
from dpshm.board.words import (
    DRAINED,
    ON_BEHALF,
    VERDICT_MASK,
    pack_control,
    pack_load,
    pack_progress,
    saturate,
    unpack_control,
    unpack_load,
    unpack_state,
    wake_bucket,
)
from dpshm.coordinator.flood_guard import MemoryGuard
from dpshm.coordinator.rate_limited_log import LimitedLog
from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.stock_peers import RankCounts, StepCounts
from dpshm.errors import HandleClosed, SettingError, StartupTimeout, WireError
from dpshm.net import wire
from dpshm.net.context import Socket
from dpshm.net.keys import server_keys
from dpshm.rules.liveness import Verdict
from dpshm.rules.reconciler import RowState, WaveReconciler
from dpshm.rules.waves import (
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
    from dpshm.board.board import Board
    from dpshm.coordinator.row import Marks

logger = logging.getLogger(__name__)

BATCH = 256
LOOK_INTERVAL_NS = 100_000_000
REST_INTERVAL_NS = 500_000_000
"""How often the thread looks at the rows; and where all are idle, in the wave that the coordinator is in, and no
message came. What it would find there is a message that was lost. Each look costs an idle processor 0.2 ms."""
MAX_IN_A_ROW = 1 << 15
"""Messages from front-ends, or joins of engines, without the socket once being empty: libzmq queues them without a
limit, and all others wait behind them. Honest peers send a few a wave; thousands at worst, in a burst while none
has heard yet that the ranks were woken."""
MAX_GROWTH_BYTES = 256 << 20
"""Of a process that is a coordinator alone: a group of 4096 engines needs a tenth of it."""
RENEW_PAUSE_S = 0.2
START_TIMEOUT_S = 0.5
_MS = 1_000_000
_S = 1_000_000_000


class WaveThread(threading.Thread):
    """One coordinator's wave thread.

    Args:
        settings: what it was told.
        open_board: called in the thread with its unbound sockets; binds them and gives the board and marks.
        joined: called whenever an engine subscribes, so that the watch looks at once.
        own_process: this process is a coordinator alone: if it grows, that is the peers' doing.
    """

    def __init__(
        self,
        settings: Settings,
        open_board: Callable[[Sockets], tuple[Board, Marks]],
        joined: Callable[[], None],
        *,
        own_process: bool = False,
    ) -> None:
        super().__init__(name="dpshm-wave", daemon=True)
        self._settings = settings
        self._open_board = open_board
        self._joined = joined
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._nudge_lock = threading.Lock()
        self._nudge_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._growth = MemoryGuard(MAX_GROWTH_BYTES) if own_process else None
        self._stop_asked = False
        self.opened: Future[Board] = Future()
        self.all_ready: Future[None] = Future()
        self.dropped = LimitedLog(logger)
        self._news = LimitedLog(logger, lines=100, level=logging.INFO)  # what peers may ask for, and repeat

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
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.join(timeout=5.0)
                break
            except RuntimeError:  # not started; or a Ctrl-C ended `start`, and it is about to
                if time.monotonic() > deadline:
                    break
                time.sleep(0.001)
        with self._nudge_lock:
            if self._nudge_fd >= 0 and not self.is_alive():
                os.close(self._nudge_fd)
                self._nudge_fd = -1

    def _wake(self) -> None:
        with self._nudge_lock:
            if self._nudge_fd >= 0:
                os.eventfd_write(self._nudge_fd, 1)

    # The thread.

    def run(self) -> None:
        """The thread: opens sockets and board, reports, serves until told to stop, closes the sockets."""
        with ExitStack() as stack:
            try:
                folder = self._settings.curve_dir
                keys = server_keys(folder) if folder is not None and self._settings.needs_tcp else None
                sockets = Sockets(keys, lambda who: self._drop("peer refused", who))
                stack.callback(sockets.close)
                self._board, self._marks = self._open_board(sockets)
                self._prepare(sockets)
            except BaseException as e:
                self.opened.set_exception(e)
                del self._open_board, self._joined
                return
            self.opened.set_result(self._board)
            self._serve()
        if not self.all_ready.done():
            self.all_ready.set_exception(StartupTimeout("the coordinator was closed before all ranks came"))
        del self._open_board, self._joined  # which refer back: the memory goes with the last handle

    def _prepare(self, sockets: Sockets) -> None:
        settings, board = self._settings, self._board
        now = time.monotonic_ns()
        self._sockets = sockets
        self._words = board.words
        self._at_control = board.index("control")
        self._state = CoordinatorState(*unpack_control(self._words[self._at_control]))
        self._rows = WaveReconciler(settings.resend_interval_ms * _MS, round(settings.wake_timeout_s * _S))
        self._counts = StepCounts()
        self._published: list[RankCounts] = []
        self._waking_since_ns = now
        self._stock_frontends = 0
        self._subscribed_engines = 0
        self._next_look_ns = now
        self._next_counts_ns = now
        self._next_refresh_ns = now
        self._recount_at_ns: int | None = None
        self._topic_bytes = 0
        self._flooded = ""
        self._ready_deadline_ns = now + round(settings.ready_timeout_s * _S) if settings.ready_timeout_s else None
        self._ready = self._words[board.index("ready")] == 1
        if self._ready:
            self.all_ready.set_result(None)

    def _serve(self) -> None:
        poller, takers = self._listen()
        while not self._stop_asked:
            readable = dict(poller.poll(self._timeout_ms()))
            if self._nudge_fd in readable:
                os.eventfd_read(self._nudge_fd)
                with suppress(queue.Empty):
                    while True:
                        self._calls.get_nowait()()
            for s, take in takers.items():
                if s in readable:
                    self._receive(s, take)
            now = time.monotonic_ns()
            if readable:
                self._next_look_ns = min(self._next_look_ns, now + LOOK_INTERVAL_NS)
            try:
                self._on_time(now)
            except Exception:
                logger.exception("the wave thread goes on after an error of its own")
                time.sleep(0.05)
            if self._flooded:
                self._renew()
                poller, takers = self._listen()

    def _listen(self) -> tuple[zmq.Poller, dict[Socket, Callable[[list[bytes]], None]]]:
        """What to wait for, and what takes the messages of each socket."""
        self._in_a_row = {self._sockets.frontends: 0, self._sockets.to_engines: 0}
        takers: dict[Socket, Callable[[list[bytes]], None]] = {
            self._sockets.frontends: self._from_frontend,
            self._sockets.to_engines: self._engine_subscription,
            self._sockets.from_engines: self._from_engine,
        }
        if self._sockets.doorkeeper is not None:
            takers |= self._sockets.doorkeeper.takers
        poller = zmq.Poller()
        for s in (self._nudge_fd, *takers):
            poller.register(s, zmq.POLLIN)
        return poller, takers

    def _renew(self) -> None:
        """Ends every connection: see `dpshm.coordinator.sockets`. Honest peers subscribe again and are counted
        again.
        """
        self._drop("flood", f"{self._flooded}: every connection was ended; honest peers come back by themselves")
        self._flooded = ""
        self._topic_bytes = self._stock_frontends = self._subscribed_engines = 0
        while not self._stop_asked:
            try:
                self._sockets.renew()
                break
            except (SettingError, OSError) as e:
                self.dropped.note("the sockets cannot be opened again yet", e)
                time.sleep(RENEW_PAUSE_S)
        if self._growth is not None:
            self._growth.settle()

    def _count_topic(self, data: bytes) -> None:
        """Notes a subscription. Honest peers subscribe to everything, whose topic is empty."""
        self._topic_bytes += len(data) - 1
        if self._topic_bytes > wire.MAX_TOPIC_BYTES:
            self._flooded = f"peers subscribed to topics of {self._topic_bytes} bytes, where there are none"

    def _receive(self, s: Socket, take: Callable[[list[bytes]], None]) -> None:
        for _ in range(BATCH):
            try:
                frames = s.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if s in self._in_a_row:
                    self._in_a_row[s] = 0
                return
            try:
                take(frames)
            except WireError as e:
                self._drop("malformed message", e)
            except Exception as e:
                self._drop("message that could not be handled", repr(e))
            self._count("messages_received")  # afterwards: what waits for an answer waits less
        if s in self._in_a_row:
            self._in_a_row[s] += BATCH
            if self._in_a_row[s] > MAX_IN_A_ROW:
                self._flooded = f"peers sent {self._in_a_row[s]} messages in a row without a pause"

    def _drop(self, reason: str, detail: object) -> None:
        self._count("messages_dropped")
        self.dropped.note(reason, detail)

    def _count(self, name: str, by: int = 1, *, row: int = 0) -> None:
        at = self._board.index(name, row)
        self._words[at] = saturate(self._words[at] + by)

    # Messages.

    def _from_frontend(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise WireError(f"not a front-end's message: {len(frames)} frames")
        data = frames[0]
        if data[:1] == wire.SUBSCRIBE:
            self._count_topic(data)
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
            self._count_topic(data)
            self._subscribed_engines += 1
            self._recount_at_ns = time.monotonic_ns() + LOOK_INTERVAL_NS
            self._joined()
            self._greet()
        elif data[:1] == wire.UNSUBSCRIBE:
            self._subscribed_engines = max(0, self._subscribed_engines - 1)
            self._recount_at_ns = time.monotonic_ns() + LOOK_INTERVAL_NS
            if not self._subscribed_engines:
                self._counts = StepCounts()  # whoever comes next counts steps and waves from 0
        else:
            raise WireError("engines only subscribe on this socket")

    def _greet(self) -> None:
        """READY to all once all are there, and again for whoever comes later (the others skip it)."""
        n = self._board.dp_size
        if self._ready:
            self._sockets.to_engines.send(wire.READY)
        elif self._subscribed_engines >= n and all(map(self._board.engine_alive, range(n))):
            self._all_are_there()

    def _recount(self) -> None:
        """Whether all are there, a while after the last came or left: who is back at once counts twice first."""
        self._recount_at_ns = None
        if self._subscribed_engines >= self._board.dp_size:
            self._all_are_there()

    def _all_are_there(self) -> None:
        """All ranks are connected: those that never took their row are stock engines, which have none."""
        for e in range(self._board.dp_size):
            if not self._board.engine_incarnation[e] and not self._board.engine_alive(e):
                self._marks.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True)
        if not self._ready:
            self._ready = True
            self._words[self._board.index("ready")] = 1
            self._sockets.to_engines.send(wire.READY)
            logger.info("all %d engines of group %r are ready", self._board.dp_size, self._settings.group)
            if not self.all_ready.done():  # it may have failed at its deadline
                self.all_ready.set_result(None)

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
        # SYNC: on a stock engine's behalf, in the order in which an engine would store it (`RowState.publish`).
        # It cannot say what it has taken in, so whatever was sent by now counts as received.
        used = board.frontends_used()
        sent_requests = board.sent_requests[:, e].tolist()
        sent_tokens = board.sent_tokens[:, e].tolist()
        words[board.index("load", e)] = pack_load(waiting, running, kv)
        words[board.index("request_offset", e)] = waiting + running - sum(sent_requests[:used])
        words[board.index("token_offset", e)] = -sum(sent_tokens[:used])
        at_tokens, at_requests = board.index("received_tokens", e), board.index("received_requests", e)
        for f in range(used):
            words[at_tokens + f] = sent_tokens[f]
            words[at_requests + f] = sent_requests[f]
        words[board.index("progress", e)] = pack_progress(stats.current_wave, stats.step_counter)
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
        named = self._settings.exclude_receiver
        # Looked up only where it matters: not before the first START, which all wait for.
        late = before.phase is Phase.WAKING or (isinstance(event, FirstRequest) and event.wave < before.wave)
        self._state, commands = handle_coordinator(
            before,
            event,
            exclude_named=named,
            repeat_start=named or (late and self._has_stock_engines()),
        )
        if self._state != before:
            # The board before the messages: whoever hears of the change finds it there.
            self._words[self._at_control] = pack_control(*self._state)
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

    def _has_stock_engines(self) -> bool:
        """Whether some ranks' rows say nothing about whether they step."""
        return any(self._marks.engine(e) & ON_BEHALF for e in range(self._board.dp_size))

    def _time_wake_up(self, before: Phase) -> None:
        now_ns, phase = time.monotonic_ns(), self._state.phase
        if before is Phase.PAUSED:
            self._waking_since_ns = now_ns
        if phase is Phase.RUNNING and before is not Phase.RUNNING:
            duration_ns = now_ns - self._waking_since_ns  # 0 if the ranks were rung and one of them spoke first
            self._count("wake_ns", duration_ns)
            self._count("wake_bucket", row=wake_bucket(duration_ns))

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
            if board.lock_engine(e):  # nobody takes the row meanwhile; who has it keeps what it stored
                for name in ("load", *layout.ENGINE_WORDS):
                    self._words[board.index(name, e)] = 0
                board.nothing_outstanding(e)
                board.unlock_engine(e)
            self._marks.clear_engine(e)
        self._marks.set_dp_size(dp_size)
        for e in range(dp_size, old):
            self._marks.clear_engine(e)
        self._counts.keep_only(dp_size)
        self._news.note("steering", f"group {self._settings.group!r} scaled from {old} to {dp_size} ranks")
        self._joined()
        self._recount_at_ns = time.monotonic_ns() + LOOK_INTERVAL_NS

    def set_drained(self, dp_rank: int, drained: bool) -> None:
        """Takes a rank out of routing, or puts it back. Called in this thread."""
        if not 0 <= dp_rank < self._board.dp_size:
            raise SettingError(f"dp_rank {dp_rank} is outside 0 to {self._board.dp_size - 1}")
        if bool(self._marks.engine(dp_rank) & DRAINED) != drained:
            self._marks.set_engine(dp_rank, drained=drained)
            done = "drained" if drained else "undrained"
            self._news.note("steering", f"engine {dp_rank} is {done} by an operator")

    # Time.

    def _timeout_ms(self) -> int:
        due = [self._next_look_ns]
        if self._stock_frontends and self._settings.interval_ms:
            due.append(self._next_counts_ns)
        return max(0, -((time.monotonic_ns() - min(due)) // _MS))

    def _on_time(self, now: int) -> None:
        if now >= self._next_look_ns:
            self._next_look_ns = now + (REST_INTERVAL_NS if self._look(now) else LOOK_INTERVAL_NS)
            if self._recount_at_ns is not None and now >= self._recount_at_ns:
                self._recount()
            if self._ready_deadline_ns is not None and now >= self._ready_deadline_ns:
                self._ready_deadline_ns = None
                self._report_missing()
        if self._stock_frontends and self._settings.interval_ms and now >= self._next_counts_ns:
            self._next_counts_ns = now + self._settings.interval_ms * _MS
            counts = self._counts_now()
            if now >= self._next_refresh_ns or counts != self._published:
                self._publish_counts(now, counts)

    def _look(self, now: int) -> bool:
        """Looks at the rows; whether everything is at rest."""
        if self._growth is not None and self._growth.is_too_much():
            self._flooded = f"peers made this process grow by {self._growth.bytes() >> 20} MiB"
        if not self._settings.waves:
            return self._recount_at_ns is None
        board, marks = self._board, self._marks
        rows = []
        stock = 0
        for e, word in enumerate(board.engine_state[: board.dp_size].tolist()):
            mark = marks.engine(e)
            if mark & VERDICT_MASK in (Verdict.ALIVE, Verdict.STALLED) and not mark & ON_BEHALF:
                wave, running, _ = unpack_state(word)
                rows.append(RowState(e, wave, running))
            elif mark & ON_BEHALF:
                stock += 1
        for event in self._rows.look(now, self._state, rows, unobserved_ranks=stock):
            self._take_event(event)
        wave, phase = self._state
        idle = not stock and all(not row.running and row.wave <= wave for row in rows)
        return idle and phase is Phase.PAUSED and self._recount_at_ns is None

    def _counts_now(self) -> list[RankCounts]:
        """By rank: a stock engine's last complete step, or what one of ours has on the board."""
        board = self._board
        stock = self._counts.take()
        counts = []
        for e, word in enumerate(board.load[: board.dp_size].tolist()):
            on_behalf = self._marks.engine(e) & ON_BEHALF
            counts.append(stock[e] if on_behalf and e in stock else unpack_load(word))
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
