"""The relay of a node: its rows go to the boards of the other nodes, and theirs come to its board.

It runs where front-ends of several nodes choose among the ranks of all: two threads in the process that holds a
node's board (no daemon of its own).

    telling    looks at this node's rows (`dpshm.coordinator.own_rows`), and tells what changed: every `TICK_S`
               while anything changes, and every `REST_S` at rest; and at prefix indexes (`own_indexes`)
    hearing    writes what other nodes tell to this board (`dpshm.coordinator.relayed_rows`); at the head, it sends
               it on to the others first

All relays meet at the head, the group's first coordinator: one connection each way from each node. While the head
is gone, ranks of other nodes are unknown, and each node routes to its own.

No message is needed: what changed is told again with all counts within `PARTS` intervals, and at once when another
relay comes. And none is waited for: a peer that does not read loses messages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import zmq

from dpshm.coordinator.own_indexes import OwnIndexes, in_messages
from dpshm.coordinator.own_rows import NOTHING, OwnRows, Told
from dpshm.coordinator.rate_limited_log import RateLimitedLog
from dpshm.coordinator.relay_peers import RelayPeers
from dpshm.coordinator.relayed_rows import RelayedRows
from dpshm.errors import SettingError, WireError
from dpshm.net.relay_wire import Echo, IndexNews, News, decode_news, encode_news
from dpshm.rules.liveness import REMOTE_INTERVAL_NS

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.relay_sockets import RelaySockets
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)

TICK_S = 0.0005
REST_S = 0.01
"""Between two looks at rows that do not change: so much later is a first change told."""
PARTS = 4
"""Each row is told whole in one of so many intervals of `REMOTE_INTERVAL_NS`."""
ROUND_TRIPS = 8
"""The shortest of so many round trips counts: what is longer than that is waiting."""
ROWS_A_MESSAGE = 32
LISTEN_NS = 100_000_000
SAYS_ALL_NS = 100_000_000
"""The shortest time between two looks at which all is told, however often peers join."""
RENEW_PAUSE_S = 0.2
STOP_TIMEOUT_S = 5.0
_ERROR_PAUSE_S = 0.1
_TWO = 2


class Relay:
    """Between this node's board and the others. Made once its sockets are open.

    Args:
        board: of this node.
        row: the coordinator's row of that board.
        sockets: open; the relay closes them when it ends.
        scale: changes this board's number of ranks to the head's.
        own_process: this process is a coordinator alone.
    """

    def __init__(
        self,
        board: Board,
        row: CoordinatorRow,
        sockets: RelaySockets,
        scale: Callable[[int], None],
        *,
        own_process: bool = False,
    ) -> None:
        self._board, self._row, self._sockets, self._scale = board, row, sockets, scale
        self._number = board.segment.header.board_number
        self._own = OwnRows(board)
        self._own_indexes = OwnIndexes(board)
        self._others = RelayedRows(board, row, time.monotonic_ns())
        self.dropped = RateLimitedLog(logger)
        self._peers = RelayPeers(sockets, board.nodes, self._drop, own_process=own_process)
        # SYNC: held over each use of relayed words, and of all sockets but `hears`, which two threads use: a full
        # fence, as ZMQ asks for (x86 and Arm).
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._says_all, self._asks = True, True
        self._delays: deque[int] = deque(maxlen=ROUND_TRIPS)  # half round trips to the head
        self._delay_ns = 0  # the least of them; 0 at the head, and until one is known
        self._heard_clocks: dict[int, tuple[int, int]] = {}  # by node: its newest clock, and when it came
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"dpshm-relay-{name}", daemon=True)
            for name, loop in (("tells", self._tell), ("hears", self._hear))
        ]

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Ends it, and closes its sockets."""
        self._ended.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_TIMEOUT_S)
        if not any(thread.is_alive() for thread in self._threads):
            self._sockets.close()

    def _guarded(self, loop: Callable[[], None]) -> None:
        while not self._ended.is_set():
            try:
                loop()
            except Exception:
                logger.exception("relay error, continuing")
                self._ended.wait(_ERROR_PAUSE_S)

    # Telling.

    def _tell(self) -> None:
        wait_s, part, next_ns, says_all_ns = TICK_S, 0, 0, 0
        while not self._ended.is_set():
            time.sleep(wait_s)  # half of the processor time of a wait for an event
            now_ns = time.monotonic_ns()
            due = now_ns >= next_ns
            with self._lock:
                if self._peers.look(now_ns, growth=due):  # another relay listens now: all is told, by all
                    self._says_all = self._asks = True
                whole = None
                if self._says_all and now_ns >= says_all_ns:
                    self._says_all, whole, says_all_ns = False, slice(None), now_ns + SAYS_ALL_NS
                elif due:
                    part = (part + 1) % PARTS
                    whole = slice(part, None, PARTS)
                if self._others.renumbered:
                    self._renumber()
                told = self._own.look(now_ns, whole)
                changed = bool(told.engines or told.frontends)
                if changed or due or self._others.indexes.wanted:
                    self._send(told, due=due)
            # Not under the lock: it looks at more words, and nobody else does.
            if indexes := self._own_indexes.look(self._own.ranks, now_ns, due=due):
                with self._lock:
                    for message in in_messages(indexes):
                        self._send(NOTHING, indexes=message)
            if due:
                next_ns = now_ns + REMOTE_INTERVAL_NS
            # At rest a look every `REST_S`; the first ones follow soon, as changes come in groups.
            wait_s = TICK_S if changed and not whole else min(wait_s * 1.2, REST_S)

    def _renumber(self) -> None:
        self._own.renumbered(self._others.renumbered)
        self._others.renumbered.clear()
        self._asks = True

    def _send(self, told: Told, *, due: bool = False, indexes: Sequence[IndexNews] = ()) -> None:
        head = self._sockets.is_head
        echoes: list[Echo] = []
        asks = due and self._asks
        if due:
            self._asks = False
            if head:
                now_ns = time.monotonic_ns()
                echoes = [
                    Echo(node, clock_ns, now_ns - came_ns)
                    for node, (clock_ns, came_ns) in self._heard_clocks.items()
                ]
        engines, frontends = told.engines, told.frontends
        while True:
            part, engines = engines[:ROWS_A_MESSAGE], engines[ROWS_A_MESSAGE:]
            other, frontends = frontends[:ROWS_A_MESSAGE], frontends[ROWS_A_MESSAGE:]
            news = News(
                node=self._board.node,
                board=self._number,
                clock_ns=time.monotonic_ns(),
                delay_ns=self._delay_ns,
                dp_size=self._board.dp_size if head else 0,
                ask=asks,
                boards=told.boards,
                engines=part,
                frontends=other,
                echoes=echoes,
                indexes=list(indexes),
                wanted=self._others.indexes.wanted,
            )
            self._others.indexes.wanted = []
            self._pass_on(encode_news(news))
            if not (engines or frontends):
                break

    def _pass_on(self, message: bytes) -> None:
        try:
            self._sockets.tells.send(message, zmq.NOBLOCK)
        except zmq.ZMQError as e:
            logger.debug("news were not sent: %s; they are told again", e)

    # Hearing.

    def _hear(self) -> None:
        next_ns = 0
        while not self._ended.is_set():
            if self._peers.flood:
                self._renew()
            self._receive()
            now_ns = time.monotonic_ns()
            if now_ns >= next_ns:
                next_ns = now_ns + LISTEN_NS
                with self._lock:
                    self._others.listen(now_ns)

    def _renew(self) -> None:
        """Ends every connection: see `dpshm.coordinator.sockets`. Other relays connect again, and are told all."""
        with self._lock:
            ended = "every connection of the relay was ended; other nodes come back by themselves"
            self._drop("flood", f"{self._peers.flood}: {ended}")
            while not self._ended.is_set():
                try:
                    self._sockets.renew()
                    break
                except (SettingError, OSError) as e:
                    self.dropped.note("the relay's sockets cannot be opened again yet", e)
                    self._ended.wait(RENEW_PAUSE_S)
            self._peers.on_disconnect()

    def _receive(self) -> None:
        try:
            self._handle(self._sockets.hears.recv())
        except zmq.Again:
            return
        except (WireError, SettingError) as e:
            self._drop("malformed message", e)
        except Exception as e:
            self._drop("message that could not be handled", repr(e))

    def _handle(self, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        news = decode_news(message)
        with self._lock:
            if self._sockets.is_head:
                if self._board.nodes > _TWO:
                    self._pass_on(message)
                self._heard_clocks[news.node] = news.clock_ns, now_ns
            for echo in news.echoes:
                if echo.node == self._board.node:
                    self._delays.append(max(0, now_ns - echo.clock_ns - echo.held_ns) // 2)
                    self._delay_ns = min(self._delays)
            self._says_all = self._says_all or news.ask
            for wanted in news.wanted:
                if wanted.board == self._number:
                    self._own_indexes.want(wanted)
            self._others.write(news, self._delay_ns + news.delay_ns, now_ns)
        if news.dp_size and news.node == 0 and news.dp_size != self._board.dp_size:
            self._scale(news.dp_size)

    def _drop(self, reason: str, detail: object) -> None:
        self._row.count_drop(reason)
        self.dropped.note(reason, detail)
