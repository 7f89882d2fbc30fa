"""The ranks of a group: which have come, how many there are to be, and which are drained.

Peers and operators may repeat what they ask for without end, so it is logged at a limited rate.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from dpshm.board.words import DRAINED
from dpshm.coordinator.draining import why_not_here
from dpshm.coordinator.mailbox import Mailbox
from dpshm.coordinator.rate_limited_log import RateLimitedLog
from dpshm.coordinator.readiness import Readiness, ReadinessEvent
from dpshm.coordinator.scaling import check_rest, check_size
from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.stock_peers import StockEngines
from dpshm.errors import SettingError, StartupTimeout
from dpshm.net import wire

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)

_S = 1_000_000_000


class Ranks:
    """Welcomes, scales and drains a group's ranks. Used in the wave thread alone.

    Args:
        settings: the coordinator's.
        sockets: READY goes to its engines.
        board: the group's.
        row: the coordinator's row of that board.
        stock: the group's stock engines.
        watch: notified when ranks come, so that the watch thread judges them at once.

    Attributes:
        readiness: whether all ranks are there.
        all_ready: done once all ranks are there; fails at the deadline, or with `give_up`. For any thread.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sockets,
        board: Board,
        row: CoordinatorRow,
        stock: StockEngines,
        *,
        watch: Mailbox,
    ) -> None:
        self._group = settings.group
        # A follower's ranks are not all of the group, and its head waits for them.
        self._timeout_s = settings.ready_timeout_s if settings.head is None else 0.0
        self._sockets = sockets
        self._board = board
        self._row = row
        self._stock = stock
        self._watch = watch
        self._log = RateLimitedLog(logger, lines=100, level=logging.INFO)
        self._connections = stock.connections
        self._held = partial(
            _held, board
        )  # not a method: a cycle would keep the board mapped until it is collected
        self.readiness = Readiness(
            *(time.monotonic_ns(), round(self._timeout_s * _S), self._connections, self._held), ready=row.ready
        )
        self._returned = self._greeted = False
        self.all_ready: Future[None] = Future()
        if self.readiness.ready:
            self.all_ready.set_result(None)

    def on_join(self, name: int | None) -> None:
        """An engine subscribed: to everything (None), or to the name of its rank."""
        self._connections.on_join(name)
        if name is None:
            self._watch.notify()
            self._apply(self.readiness.on_join(time.monotonic_ns(), self._board.dp_size))

    def on_leave(self, name: int | None) -> None:
        """A subscription ended."""
        self._connections.on_leave(name)
        self.readiness.on_change(time.monotonic_ns())
        if not self._connections.count:
            self._stock.forget()

    def on_follower(self) -> None:
        """A follower subscribed to READY and START. It may have missed those that were sent before."""
        self._returned |= self.readiness.ready

    def on_disconnect(self) -> None:
        """Every connection was ended; engines that live subscribe again."""
        self._connections.on_disconnect()
        self._stock.on_disconnect(time.monotonic_ns())

    def on_heads_ready(self) -> None:
        """The head says that all ranks of the group are there."""
        self._row.set_ready()
        self.readiness.set_ready()
        if not self.all_ready.done():
            self.all_ready.set_result(None)

    def greet(self) -> bool:
        """Sends READY if peers joined a ready group since the last call; true if READY was sent since."""
        greeted, self._greeted = self._greeted, False
        if self._returned:
            self._returned = False
            self._sockets.to_engines.send(wire.READY)
            return True
        return greeted

    def on_time(self, now_ns: int) -> None:
        """Time has passed."""
        self._apply(self.readiness.on_time(now_ns, self._board.dp_size))
        self._stock.drop_unconnected(now_ns)

    def give_up(self, reason: str) -> None:
        """Ends the wait for ranks that have not come."""
        if not self.all_ready.done():
            self.all_ready.set_exception(StartupTimeout(reason))

    def scale(self, dp_size: int, *, force: bool = True) -> None:
        """Changes the number of ranks; wave and phase stay.

        New ranks of a group in lockstep begin as drained if all ranks are: all of them have to be restarted first.

        Args:
            dp_size: the new number of ranks.
            force: also if ranks in lockstep are not at rest.

        Raises:
            SettingError: the board has no room for so many, or the ranks are not at rest.
        """
        board, old = self._board, self._board.dp_size
        check_size(board, dp_size)
        if dp_size == old:
            return
        if not force:
            check_rest(board)
        drained = board.segment.header.waves and all(self._row.engine(e) & DRAINED for e in range(old))
        self._row.resize(dp_size, drained=drained)
        self._stock.keep_only(dp_size)
        self._log.note("steering", f"group {self._group!r} scaled from {old} to {dp_size} ranks")
        self._watch.notify()
        self.readiness.on_change(time.monotonic_ns())

    def set_drained(self, dp_rank: int, drained: bool) -> None:
        """Takes a rank out of routing, or puts it back.

        Raises:
            SettingError: there is no such rank, or it has to be drained on another node.
        """
        if not 0 <= dp_rank < self._board.dp_size:
            raise SettingError(f"dp_rank {dp_rank} is outside 0 to {self._board.dp_size - 1}")
        if (why := why_not_here(self._board, dp_rank)) is not None:
            raise SettingError(why)
        if bool(self._row.engine(dp_rank) & DRAINED) != drained:
            self._row.set_engine(dp_rank, drained=drained)
            self._log.note(
                "steering", f"engine {dp_rank} is {'drained' if drained else 'undrained'} by an operator"
            )

    def _apply(self, events: list[ReadinessEvent]) -> None:
        for event in events:
            match event:
                case ReadinessEvent.ENGINE_RETURNED:
                    self._returned = True  # many may come at once, and each hears what is sent to one
                case ReadinessEvent.BECAME_READY:
                    self._row.set_ready()
                    self._sockets.to_engines.send(wire.READY)
                    self._greeted = True
                    logger.info("all %d engines of group %r are ready", self._board.dp_size, self._group)
                    if not self.all_ready.done():  # it may have failed at its deadline
                        self.all_ready.set_result(None)
                case ReadinessEvent.TIMED_OUT:
                    held = self._held()
                    missing = [e for e, row in enumerate(held) if not row]
                    reason = (
                        f"{self._connections.ranks(held)} of {len(held)} engines of group {self._group!r} "
                        f"connected within {self._timeout_s:g} s; ranks without a row on the board: {missing} "
                        "(a stock engine never takes one). See the logs of these ranks"
                    )
                    logger.error("%s", reason)
                    self.give_up(reason)


def _held(board: Board) -> list[bool]:
    """By rank, whether a process holds its row, or was heard on another node."""
    return list(map(board.engine_present, range(board.dp_size)))
