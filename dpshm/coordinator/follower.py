"""A coordinator that follows another one: a board on each node of a group, and one coordinator of waves in all.

With hybrid and external load balancing the front-ends of a node choose among the ranks of that node. So a node has
all that they need on a board of its own, with a watch of its own. The group's coordinator, its *head* on another
node, is needed for the waves alone. A follower takes the place of the wave rules (`coordinator/wave_driver.py`):

    up      first requests, `wave_started` and `wave_complete`, as they come; the rows of this node's ranks, every
            100 ms, as engines on other nodes send them (`dpshm.coordinator.remote_rows`)
    down    READY and START, to this node's engines; wave and phase, to the control word

The head is a peer like any other: what it says is decoded strictly, and no call here waits for it. While it is
gone, routing goes on, and engines that a request wakes ring each other; ranks of other nodes hear of it later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2s
from typing import TYPE_CHECKING

import zmq

from dpshm.board.carried import CarriedWords
from dpshm.board.words import unpack_load, unpack_progress
from dpshm.coordinator.publisher import Publisher
from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.errors import WireError
from dpshm.net import wire
from dpshm.net.context import Socket, context
from dpshm.net.cuts import notice_cuts
from dpshm.net.keys import ClientKeys, client_keys, connect
from dpshm.rules.liveness import HANGING, Verdict
from dpshm.rules.waves import (
    CoordinatorEvent,
    CoordinatorState,
    FirstRequest,
    Phase,
    RankConnected,
    WaveCompleted,
    WaveStarted,
)

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)

BATCH = 64
REPORTS_HWM = 100
_PROCESS_BYTES = 7


class Follower:
    """One node's link to its head. Used in the wave thread alone.

    Args:
        settings: the coordinator's, with a head.
        sockets: of this node's peers.
        board: of this node.
        row: the coordinator's row of that board.
        publisher: tells this node's stock front-ends.
        on_ready: called when the head says that all ranks of the group are there.

    Attributes:
        state: wave and phase, as the head told them last; the board's control word holds the same.
        handlers: what to call when one of these sockets is readable.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sockets,
        board: Board,
        row: CoordinatorRow,
        *,
        publisher: Publisher,
        on_ready: Callable[[], None],
    ) -> None:
        stats, starts, self._reports_address = settings.head_addresses
        self._keys: ClientKeys | None = None if settings.curve_dir is None else client_keys(settings.curve_dir)
        self._starts_address = starts
        self._sockets, self._board, self._row = sockets, board, row
        self._publisher, self._on_ready = publisher, on_ready
        self.state = row.control
        self._states = self._connect(zmq.XSUB, stats)
        self._states.send(wire.SUBSCRIBE)
        self._starts = self._connect(zmq.SUB, starts)
        for topic in (wire.START_FRAME, wire.READY):  # READY last: the head answers it with both
            self._starts.subscribe(topic)
        self._reports = self._connect(zmq.PUSH, self._reports_address)
        # The head counts the connections of engines: each rank of this node has one there, that is not read.
        self._counted: dict[int, Socket] = {}
        self._sent: dict[int, tuple[int, bytes]] = {}  # by rank: number and words of its newest report
        self._carried: dict[int, CarriedWords] = {}
        self.handlers: dict[Socket, Callable[[list[bytes]], None]] = {
            self._states: self._from_head,
            self._starts: self._to_engines,
        }

    def close(self) -> None:
        """Ends the link."""
        for s in (self._states, self._starts, self._reports, *self._counted.values()):
            s.close()

    # From this node.

    def handle(self, event: CoordinatorEvent) -> None:
        """Passes on what a peer of this node says of the wave."""
        match event:
            case FirstRequest(engine, wave):
                self._send(self._states, wire.encode_first_request(engine, wave))
            case WaveStarted(engine, wave):
                self._send(self._reports, wire.encode_wave_started(engine, wave))
            case WaveCompleted(wave):
                self._send(self._reports, wire.encode_wave_complete(0, wave))
            case RankConnected() if self.state.phase is Phase.RUNNING:
                self._sockets.to_engines.send_multipart(wire.encode_start(self.state.wave, None))

    def handle_while_waking(self, event: CoordinatorEvent) -> None:
        """What a stock engine's report shows: the head sees it in the row."""

    def scan(self, now_ns: int) -> bool:
        """Sends the rows of this node's ranks; false: there is always a next time."""
        for e in range(self._board.dp_size):
            if self._row.is_relayed(e):
                continue  # of another node
            verdict = self._row.engine_verdict(e)
            if verdict in (Verdict.ALIVE, *HANGING):
                self._send_row(e, now_ns, here=True)
            elif e in self._sent and verdict in (Verdict.ABSENT, Verdict.DEAD):
                if verdict is Verdict.ABSENT:
                    self._send_row(e, now_ns, here=False)
                del self._sent[e]
                self._counted.pop(e).close()
        return False

    def _send_row(self, e: int, now_ns: int, *, here: bool) -> None:
        board, words = self._board, self._board.words
        stock = self._row.is_stock(e)
        if e not in self._counted:
            self._counted[e] = self._connect_to_be_counted(e, named=not stock)
        if self._board.nodes > 1 and not stock:
            self._sent[e] = 0, b""
            return  # the relay tells its row
        carried = (self._carried.get(e) or self._carried.setdefault(e, CarriedWords(board, e))).read()
        number, before = self._sent.get(e, (0, b""))
        if min(memoryview(carried).cast("q")) < 0:  # a damaged row (rule 6); the head takes no such message
            carried = wire.pack_words([max(0, word) for word in memoryview(carried).cast("q")])
        if carried != before or not here:
            # Of this clock, so that it grows also past a coordinator that takes this board over.
            number = now_ns
        self._sent[e] = number, carried
        waiting, running, kv = unpack_load(words[board.index("load", e)])
        wave, step = unpack_progress(words[board.index("progress", e)])
        stats = wire.SchedulerStats(running, waiting, step, wave, kv)
        if stock:  # its row does not show whether it steps
            self._send(self._reports, wire.encode_report(e, stats))
            return
        row = wire.RemoteRow(self._process(e), number, now_ns, here, carried, wire.pack_received(()))
        self._send(self._reports, wire.encode_remote_row(e, stats, row))

    def _connect_to_be_counted(self, e: int, *, named: bool) -> Socket:
        """A connection that is not read: the head counts those of engines, and a stock one has no name."""
        s = self._connect(zmq.SUB, self._starts_address)
        s.rcvhwm = 1
        if named:
            s.subscribe(wire.encode_name(e))
        s.subscribe(b"")
        return s

    def _process(self, e: int) -> int:
        """A number for the process that has a row: the same for each coordinator of this board."""
        header = self._board.segment.header
        name = f"{header.boot_id} {header.creator_pid} {header.creator_start_time} {e} "
        name += str(int(self._board.engine_incarnation[e]))
        return 1 + int.from_bytes(blake2s(name.encode(), digest_size=_PROCESS_BYTES).digest(), "little")

    # From the head.

    def _from_head(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise WireError(f"not a head's message: {len(frames)} frames")
        said = wire.decode_state(frames[0])
        state = CoordinatorState(said.wave, Phase.RUNNING if said.running else Phase.PAUSED)
        if state != self.state:
            self.state = state
            self._row.set_control(state)  # before a message about it (rule 4)
            self._publisher.publish_state(state)

    def _to_engines(self, frames: list[bytes]) -> None:
        match frames:
            case [wire.START_FRAME, payload]:
                wire.decode_start(payload)
                self._row.count("starts_sent")
            case [wire.READY]:
                self._on_ready()
            case _:
                raise WireError(f"not a head's message to engines: {len(frames)} frames")
        self._sockets.to_engines.send_multipart(frames)

    def _connect(self, kind: int, address: str) -> Socket:
        s: Socket = context().socket(kind)
        s.linger = 0
        s.maxmsgsize = wire.MAX_MESSAGE_BYTES
        s.sndhwm = REPORTS_HWM
        notice_cuts(s)
        connect(s, address, self._keys)
        return s

    def _send(self, s: Socket, message: bytes) -> None:
        try:
            s.send(message, zmq.NOBLOCK)
        except zmq.ZMQError as e:
            logger.debug("not sent to the head: %s; what is on the board is sent again", e)
