"""The wave thread: receives what peers send, and hands it to the part of the coordinator that it concerns.

    waves         the wave and its rules; scans the rows        `dpshm.coordinator.wave_driver`
                  or those of a head on another node            `dpshm.coordinator.follower`
    ranks         who has come; scaling and draining            `dpshm.coordinator.ranks`
    stock         stock engines' rows                           `dpshm.coordinator.stock_peers`
    remote        rows of engines on other nodes                `dpshm.coordinator.remote_rows`
    publisher     what stock front-ends hear                    `dpshm.coordinator.publisher`
    flood         what peers pile up                            `dpshm.coordinator.flood_guard`

Each turn of the loop reads at most `BATCH` messages from each socket before it checks the timers, so publishing
goes on however fast messages come in. A message that makes anything fail is counted and logged at a limited rate;
the loop goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import zmq

from dpshm.coordinator.flood_guard import FloodGuard
from dpshm.coordinator.follower import Follower
from dpshm.coordinator.mailbox import Mailbox
from dpshm.coordinator.publisher import Publisher
from dpshm.coordinator.ranks import Ranks
from dpshm.coordinator.rate_limited_log import RateLimitedLog
from dpshm.coordinator.remote_rows import RemoteRows
from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.stock_peers import StockEngines
from dpshm.coordinator.waiting import Waiting
from dpshm.coordinator.wave_driver import WaveDriver
from dpshm.errors import DpshmError, SegmentNoSpace, SettingError, WireError
from dpshm.net import wire
from dpshm.net.context import Socket
from dpshm.rules.waves import FirstRequest, RankConnected, WaveCompleted, WaveStarted

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
        self.mailbox = Mailbox(f"the coordinator of group {settings.group!r}")
        self.dropped = RateLimitedLog(logger)
        # SYNC: another thread made the sockets and uses them no more. ZMQ lets a socket migrate with a full fence;
        # `Thread.start` is one: it passes a lock (x86 and Arm alike) that `run` takes first.
        self._sockets = sockets
        self._board = board
        self._row = row
        self.flood = FloodGuard(own_process=own_process)
        self.stock = StockEngines(board, row)
        self.remote = RemoteRows(board, row)
        self.publisher = Publisher(settings, sockets, row, self.stock)
        self.ranks = Ranks(settings, sockets, board, row, self.stock, watch=watch)
        self.follower = (
            None
            if settings.head is None
            else Follower(
                *(settings, sockets, board, row), publisher=self.publisher, on_ready=self.ranks.on_heads_ready
            )
        )
        self.waves: WaveDriver | Follower = self.follower or WaveDriver(
            settings, sockets, board, row, publisher=self.publisher, stock=self.stock
        )
        self.all_ready = self.ranks.all_ready
        self._next_scan_ns = 0
        self._only_reports = False  # in this turn; see `dpshm.coordinator.waiting`
        self._removed = False  # the files of the ipc sockets are gone, and their folder is there

    # From other threads.

    def scale(self, dp_size: int, *, force: bool) -> None:
        """Changes the number of ranks."""
        self.mailbox.call(lambda: self.ranks.scale(dp_size, force=force))

    def set_drained(self, dp_rank: int, drained: bool) -> None:
        """Takes a rank out of routing, or puts it back."""
        self.mailbox.call(lambda: self.ranks.set_drained(dp_rank, drained))

    def stop(self) -> None:
        """Ends the thread and waits for it. For a thread that was started."""
        self.mailbox.end()
        self.join(STOP_TIMEOUT_S)
        if not self.is_alive():
            self.mailbox.close()

    # The loop.

    def run(self) -> None:
        """Serves until it is asked to end, then closes the sockets."""
        try:
            handlers, waiting = self._prepare()
            while not self.mailbox.end_asked:
                self._turn(waiting.wait(self._wait_ms(), only_reports=self._only_reports), handlers)
                if self.flood.flood or self._removed:
                    self._renew()
                    handlers, waiting = self._prepare()
        finally:
            self._sockets.close()
            if self.follower is not None:
                self.follower.close()
            self.ranks.give_up("the coordinator was closed before all ranks came")

    def _prepare(self) -> tuple[dict[Socket, Handler], Waiting]:
        self._only_reports = False
        handlers = self._handlers()
        return handlers, Waiting((self.mailbox.fd, *handlers), self._sockets.from_engines)

    def _handlers(self) -> dict[Socket, Handler]:
        handlers: dict[Socket, Handler] = {
            self._sockets.frontends: self._from_frontend,
            self._sockets.to_engines: self._from_engine_subscription,
            self._sockets.from_engines: self._from_engine,
        }
        if self.follower is not None:
            handlers |= self.follower.handlers
        for s, handle in self._sockets.authenticator.handlers.items():
            handlers[s] = partial(self._from_authenticator, handle)
        return handlers

    def _turn(self, readable: dict[Socket | int, int], handlers: dict[Socket, Handler]) -> None:
        # What follows makes it false again where it uses another socket, or may do so.
        self._only_reports = not readable or (len(readable) == 1 and self._sockets.from_engines in readable)
        if self.mailbox.fd in readable:
            self.mailbox.receive()
        for s, handle in handlers.items():
            if s in readable:
                self._receive(s, handle)
        self._greet()
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
        number = 0
        while number < BATCH:
            try:
                frames = s.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            number += 1
            try:
                handle(frames)
            except WireError as e:
                self._drop("malformed message", e)
            except Exception as e:
                self._drop("message that could not be handled", repr(e))
        if number:
            self._row.count("messages_received", number)  # afterwards: a peer that waits for an answer waits less
        more = number == BATCH
        self._only_reports &= not more
        if queued:
            self.flood.on_messages(s, number if more else 0, more=more)

    def _drop(self, reason: str, detail: object) -> None:
        self._row.count_drop(reason)
        self.dropped.note(reason, detail)

    def _check_files(self) -> None:
        """Notes that the files of the ipc sockets were removed, once their folder is there again."""
        segment = self._board.segment
        if self._sockets.are_linked() or not segment.linked:
            return
        try:
            self._removed = segment.restore_sockets()
            if not self._removed:
                self.dropped.note("the sockets' folder cannot be made again yet", "another process holds it")
        except (DpshmError, OSError) as e:
            self.dropped.note("the sockets' folder cannot be made again yet", e)

    def _renew(self) -> None:
        """Ends every connection: see `dpshm.coordinator.sockets`. Honest peers subscribe again."""
        if self.flood.flood:
            self._drop(
                "flood", f"{self.flood.flood}: every connection was ended; honest peers come back by themselves"
            )
        if self._removed:
            segment = self._board.segment
            logger.warning(
                "sockets of group %r were removed from %s: they are made again, and peers connect again. Find "
                "what cleans that folder (systemd's RemoveIPC?)",
                segment.group,
                segment.sockets_path,
            )
        self._removed = False
        self.publisher.on_disconnect()
        self.ranks.on_disconnect()
        while not self.mailbox.end_asked:
            try:
                self._sockets.renew()
                break
            except (SettingError, SegmentNoSpace, OSError) as e:
                self.dropped.note("the sockets cannot be opened again yet", e)
                time.sleep(RENEW_PAUSE_S)
        self.flood.on_disconnect()

    def _due_ns(self) -> int:
        due_ns = self._next_scan_ns
        if self.publisher.due_ns is not None:
            due_ns = min(due_ns, self.publisher.due_ns)
        if self.stock.due_ns is not None:
            due_ns = min(due_ns, self.stock.due_ns)
        return due_ns

    def _wait_ms(self) -> int:
        return max(0, -((time.monotonic_ns() - self._due_ns()) // _MS))

    def _on_time(self, now_ns: int) -> None:
        self._only_reports &= now_ns < self._due_ns()
        if now_ns >= self._next_scan_ns:
            self.flood.check_growth()
            self._check_files()
            at_rest = self.waves.scan(now_ns)
            at_rest &= self.ranks.readiness.settled
            self._next_scan_ns = now_ns + (REST_INTERVAL_NS if at_rest else SCAN_INTERVAL_NS)
            self.ranks.on_time(now_ns)
            self._greet()
        self.stock.on_time(now_ns)
        self.publisher.on_time(now_ns, self.waves.state)

    def _greet(self) -> None:
        """Tells engines that connected what they missed: READY, then START if the group is not paused."""
        if self.ranks.greet():
            self._only_reports = False
            self.waves.handle(RankConnected())

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
                    self.ranks.scale(dp_size)
                except SettingError as e:
                    self._drop("scaling refused", e)
            case wire.DrainMessage(dp_rank, drained):
                try:
                    self.ranks.set_drained(dp_rank, drained)
                except SettingError as e:
                    self._drop("drain refused", e)
            case wire.HeardMessage(dp_ranks):
                self.stock.heard(dp_ranks, time.monotonic_ns())

    def _from_engine_subscription(self, frames: list[bytes]) -> None:
        data = frames[0]
        if data[:1] not in (wire.SUBSCRIBE, wire.UNSUBSCRIBE):
            raise WireError("engines only subscribe on this socket")
        topic = data[1:]
        if topic in (wire.START_FRAME, wire.READY):
            if data == wire.SUBSCRIBE + wire.READY:
                self.ranks.on_follower()
            return
        name = wire.decode_name(topic)
        honest = not topic or (name is not None and name < self._board.engines)
        if data[:1] == wire.SUBSCRIBE:
            if honest:
                self.ranks.on_join(name)
            else:
                self.flood.on_subscription(data)
        elif honest:
            self.ranks.on_leave(name)

    def _from_engine(self, frames: list[bytes]) -> None:
        message = wire.decode_engine_message(frames[0])
        e = message.engine_index
        if len(frames) != 1 or e >= self._board.dp_size:
            raise WireError(f"from engine {e} of {self._board.dp_size}, in {len(frames)} frames")
        if message.row is not None:
            self.remote.report(e, message.row, time.monotonic_ns())
            if message.wave_complete is None and message.start_wave is None:
                return
        self._only_reports = False
        if message.row is None and message.scheduler_stats is not None:
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
        if self._sockets.authenticator.exhausted:
            self.flood.flood = "peers opened connections until hardly a file descriptor was left"
