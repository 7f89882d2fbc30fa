"""The wave thread: receives what peers send, and hands it to the part of the coordinator that it concerns.

    waves         the wave and its rules; scans the rows        `dpshm.coordinator.wave_driver`
    readiness     whether all ranks are there                   `dpshm.coordinator.readiness`
    stock         stock engines' rows                           `dpshm.coordinator.stock_peers`
    publisher     what stock front-ends hear                    `dpshm.coordinator.publisher`
    flood         what peers pile up                            `dpshm.coordinator.flood_guard`

Each turn of the loop reads at most `BATCH` messages from each socket before it looks at the timers, so publishing
goes on however fast messages come in. A message that makes anything fail is counted and logged at a limited rate;
the loop goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import zmq

from dpshm.board.words import DRAINED
from dpshm.coordinator.flood_guard import FloodGuard
from dpshm.coordinator.mailbox import Mailbox
from dpshm.coordinator.publisher import Publisher
from dpshm.coordinator.rate_limited_log import RateLimitedLog
from dpshm.coordinator.readiness import Readiness, ReadinessEvent
from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.stock_peers import StockEngines
from dpshm.coordinator.wave_driver import WaveDriver
from dpshm.errors import SettingError, StartupTimeout, WireError
from dpshm.net import wire
from dpshm.net.context import Socket
from dpshm.rules.waves import FirstRequest, WaveCompleted, WaveStarted

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)

BATCH = 256
SCAN_INTERVAL_NS = 100_000_000
REST_INTERVAL_NS = 500_000_000
"""Interval between scans of the rows; REST applies while every rank is idle in the current wave and no message
comes. A scan only finds lost messages, and costs an idle processor 0.2 ms."""
RENEW_PAUSE_S = 0.2
STOP_TIMEOUT_S = 5.0
_MS = 1_000_000
_S = 1_000_000_000

Handler: TypeAlias = Callable[[list[bytes]], None]


class WaveThread(threading.Thread):
    """One coordinator's wave thread.

    Args:
        settings: the coordinator's.
        sockets: bound; the thread closes them when it ends.
        board: the group's.
        row: the coordinator's row of that board.
        watch: notified when ranks come, so that the watch thread judges them at once.
        own_process: this process is a coordinator alone.

    Attributes:
        mailbox: calls from other threads.
        dropped: counts dropped messages by reason.
        all_ready: done once all ranks are there; fails at the deadline, or when the thread ends before.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sockets,
        board: Board,
        row: CoordinatorRow,
        watch: Mailbox,
        *,
        own_process: bool = False,
    ) -> None:
        super().__init__(name="dpshm-wave", daemon=True)
        now_ns = time.monotonic_ns()
        self.mailbox = Mailbox(f"the coordinator of group {settings.group!r}")
        self.dropped = RateLimitedLog(logger)
        self.all_ready: Future[None] = Future()
        self._steering = RateLimitedLog(logger, lines=100, level=logging.INFO)  # a peer can repeat it without end
        self._settings = settings
        # SYNC: another thread made the sockets and uses them no more. ZMQ lets a socket migrate with a full fence;
        # `Thread.start` is one: it passes a lock (x86 and Arm alike) that `run` takes first.
        self._sockets = sockets
        self._board = board
        self._row = row
        self._watch = watch
        self.flood = FloodGuard(own_process=own_process)
        self.stock = StockEngines(board, row)
        self.publisher = Publisher(settings, sockets, row, self.stock)
        self.waves = WaveDriver(settings, sockets, board, row, self.publisher)
        self.readiness = Readiness(now_ns, round(settings.ready_timeout_s * _S), ready=row.ready)
        if self.readiness.ready:
            self.all_ready.set_result(None)
        self._next_scan_ns = now_ns

    # From other threads.

    def scale(self, dp_size: int) -> None:
        """Changes the number of ranks."""
        self.mailbox.call(lambda: self._scale(dp_size))

    def set_drained(self, dp_rank: int, drained: bool) -> None:
        """Takes a rank out of routing, or puts it back."""
        self.mailbox.call(lambda: self._set_drained(dp_rank, drained))

    def stop(self) -> None:
        """Ends the thread and waits for it. For a thread that was started."""
        self.mailbox.end()
        self.join(STOP_TIMEOUT_S)
        if not self.is_alive():
            self.mailbox.close()

    # The loop.

    def run(self) -> None:
        """Serves until it is told to end, then closes the sockets."""
        try:
            handlers = self._handlers()
            poller = self._make_poller(handlers)
            while not self.mailbox.end_asked:
                self._turn(dict(poller.poll(self._wait_ms())), handlers)
                if self.flood.flood:
                    self._renew()
                    handlers = self._handlers()
                    poller = self._make_poller(handlers)
        finally:
            self._sockets.close()
            if not self.all_ready.done():
                self.all_ready.set_exception(StartupTimeout("the coordinator was closed before all ranks came"))

    def _handlers(self) -> dict[Socket, Handler]:
        handlers: dict[Socket, Handler] = {
            self._sockets.frontends: self._from_frontend,
            self._sockets.to_engines: self._from_engine_subscription,
            self._sockets.from_engines: self._from_engine,
        }
        if self._sockets.authenticator is not None:
            for s, handle in self._sockets.authenticator.handlers.items():
                handlers[s] = partial(self._from_authenticator, handle)
        return handlers

    def _make_poller(self, handlers: dict[Socket, Handler]) -> zmq.Poller:
        poller = zmq.Poller()
        for s in (self.mailbox.fd, *handlers):
            poller.register(s, zmq.POLLIN)
        return poller

    def _turn(self, readable: dict[Socket | int, int], handlers: dict[Socket, Handler]) -> None:
        if self.mailbox.fd in readable:
            self.mailbox.receive()
        for s, handle in handlers.items():
            if s in readable:
                self._receive(s, handle)
        now_ns = time.monotonic_ns()
        if readable:
            self._next_scan_ns = min(self._next_scan_ns, now_ns + SCAN_INTERVAL_NS)
        try:
            self._on_time(now_ns)
        except Exception:
            logger.exception("wave loop error, continuing")
            time.sleep(0.05)

    def _receive(self, s: Socket, handle: Handler) -> None:
        # Only what libzmq queues without a limit counts as a flood: reports wait in their senders.
        queued = s in (self._sockets.frontends, self._sockets.to_engines)
        for _ in range(BATCH):
            try:
                frames = s.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if queued:
                    self.flood.on_messages(s, 0, more=False)
                return
            try:
                handle(frames)
            except WireError as e:
                self._drop("malformed message", e)
            except Exception as e:
                self._drop("message that could not be handled", repr(e))
            self._row.count("messages_received")  # afterwards: a peer that waits for an answer waits less
        if queued:
            self.flood.on_messages(s, BATCH, more=True)

    def _drop(self, reason: str, detail: object) -> None:
        self._row.count("messages_dropped")
        self.dropped.note(reason, detail)

    def _renew(self) -> None:
        """Ends every connection: see `dpshm.coordinator.sockets`. Honest peers subscribe again."""
        self._drop(
            "flood", f"{self.flood.flood}: every connection was ended; honest peers come back by themselves"
        )
        self.publisher.on_disconnect()
        self.readiness.on_disconnect()
        while not self.mailbox.end_asked:
            try:
                self._sockets.renew()
                break
            except (SettingError, OSError) as e:
                self.dropped.note("the sockets cannot be opened again yet", e)
                time.sleep(RENEW_PAUSE_S)
        self.flood.on_disconnect()

    def _wait_ms(self) -> int:
        due_ns = self._next_scan_ns
        if self.publisher.due_ns is not None:
            due_ns = min(due_ns, self.publisher.due_ns)
        return max(0, -((time.monotonic_ns() - due_ns) // _MS))

    def _on_time(self, now_ns: int) -> None:
        if now_ns >= self._next_scan_ns:
            self.flood.check_growth()
            at_rest = self.waves.scan(now_ns)
            at_rest &= self.readiness.settled
            self._next_scan_ns = now_ns + (REST_INTERVAL_NS if at_rest else SCAN_INTERVAL_NS)
            self._apply(self.readiness.on_time(now_ns, self._board.dp_size))
        self.publisher.on_time(now_ns, self.waves.state)

    # Messages.

    def _from_frontend(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise WireError(f"not a front-end's message: {len(frames)} frames")
        data = frames[0]
        if data[:1] == wire.SUBSCRIBE:
            self.flood.on_subscription(data)
            self.publisher.on_join(time.monotonic_ns(), self.waves.state)
            return
        if data[:1] == wire.UNSUBSCRIBE:
            self.publisher.on_leave()
            return
        match wire.decode_frontend_message(data):
            case wire.FirstRequestMessage(engine, wave):
                self.waves.handle(FirstRequest(engine, wave))
            case wire.ScaleMessage(dp_size):
                try:
                    self._scale(dp_size)
                except SettingError as e:
                    self._drop("scaling refused", e)
            case wire.DrainMessage(dp_rank, drained):
                try:
                    self._set_drained(dp_rank, drained)
                except SettingError as e:
                    self._drop("drain refused", e)

    def _from_engine_subscription(self, frames: list[bytes]) -> None:
        data = frames[0]
        if data[:1] == wire.SUBSCRIBE:
            self.flood.on_subscription(data)
            self._watch.notify()
            self._apply(self.readiness.on_join(time.monotonic_ns(), self._board.dp_size, self._every_row_is_held))
        elif data[:1] == wire.UNSUBSCRIBE:
            self.readiness.on_leave(time.monotonic_ns())
            if not self.readiness.subscribed:
                self.stock.forget()
        else:
            raise WireError("engines only subscribe on this socket")

    def _from_engine(self, frames: list[bytes]) -> None:
        message = wire.decode_engine_message(frames[0])
        e = message.engine_index
        if len(frames) != 1 or e >= self._board.dp_size:
            raise WireError(f"from engine {e} of {self._board.dp_size}, in {len(frames)} frames")
        if message.scheduler_stats is not None:
            seen = self.stock.report(e, message.scheduler_stats, time.monotonic_ns())
            if seen is not None:
                self.waves.handle_while_waking(seen)
        if message.wave_complete is not None:
            self.waves.handle(WaveCompleted(message.wave_complete))
        if message.start_wave is not None:
            self.waves.handle(WaveStarted(e, message.start_wave))

    def _from_authenticator(self, handle: Callable[[list[bytes]], str | None], frames: list[bytes]) -> None:
        if (refused := handle(frames)) is not None:
            self._drop("peer refused", refused)

    # Ranks.

    def _every_row_is_held(self) -> bool:
        return all(map(self._board.engine_alive, range(self._board.dp_size)))

    def _apply(self, events: list[ReadinessEvent]) -> None:
        for event in events:
            match event:
                case ReadinessEvent.ENGINE_RETURNED:
                    self._sockets.to_engines.send(wire.READY)
                case ReadinessEvent.ALL_CONNECTED:
                    self.stock.mark_missing_rows()
                case ReadinessEvent.BECAME_READY:
                    self._row.set_ready()
                    self._sockets.to_engines.send(wire.READY)
                    logger.info("all %d engines of group %r are ready", self._board.dp_size, self._settings.group)
                    if not self.all_ready.done():  # it may have failed at its deadline
                        self.all_ready.set_result(None)
                case ReadinessEvent.TIMED_OUT:
                    self._report_missing()

    def _report_missing(self) -> None:
        board = self._board
        missing = [e for e in range(board.dp_size) if not board.engine_alive(e)]
        error = StartupTimeout(
            f"{self.readiness.subscribed} of {board.dp_size} engines of group {self._settings.group!r} connected "
            f"within {self._settings.ready_timeout_s:g} s; ranks without a row on the board: {missing} "
            "(a stock engine never takes one). See the logs of these ranks"
        )
        logger.error("%s", error)
        self.all_ready.set_exception(error)

    def _scale(self, dp_size: int) -> None:
        group, old = self._settings.group, self._board.dp_size
        if not 1 <= dp_size <= self._board.engines:
            raise SettingError(
                f"cannot scale group {group!r} to {dp_size} ranks: its board holds 1 to {self._board.engines} "
                "(max_engines)"
            )
        self._row.resize(dp_size)
        self.stock.keep_only(dp_size)
        self._steering.note("steering", f"group {group!r} scaled from {old} to {dp_size} ranks")
        self._watch.notify()
        self.readiness.on_resize(time.monotonic_ns())

    def _set_drained(self, dp_rank: int, drained: bool) -> None:
        if not 0 <= dp_rank < self._board.dp_size:
            raise SettingError(f"dp_rank {dp_rank} is outside 0 to {self._board.dp_size - 1}")
        if bool(self._row.engine(dp_rank) & DRAINED) != drained:
            self._row.set_engine(dp_rank, drained=drained)
            done = "drained" if drained else "undrained"
            self._steering.note("steering", f"engine {dp_rank} is {done} by an operator")
