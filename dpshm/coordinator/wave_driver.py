"""Drives a group's wave: gives events to the rules, stores the state that follows, and sends what they command.

The rules are `dpshm.rules.waves`; what the rows show becomes events in `dpshm.rules.reconciler`. The board is
written before a message is sent, so that a peer that hears of a change finds it on the board (rule 4).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from dpshm.board.words import ON_BEHALF, VERDICT_MASK, unpack_state
from dpshm.coordinator.publisher import Publisher
from dpshm.coordinator.settings import Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.stock_peers import StockEngines
from dpshm.net import wire
from dpshm.rules.liveness import HANGING, Verdict
from dpshm.rules.reconciler import RowState, WaveReconciler
from dpshm.rules.waves import (
    CoordinatorCommand,
    CoordinatorEvent,
    FirstRequest,
    Phase,
    PublishState,
    StartWave,
    WarnWakeFailed,
    handle_coordinator,
)

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)

_MS = 1_000_000
_S = 1_000_000_000


class WaveDriver:
    """One group's wave. Used in the wave thread alone. Without waves (dense models) every event is ignored.

    Attributes:
        state: wave and phase; the board's control word holds the same.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sockets,
        board: Board,
        row: CoordinatorRow,
        *,
        publisher: Publisher,
        stock: StockEngines,
    ) -> None:
        self._settings = settings
        self._sockets = sockets
        self._board = board
        self._row = row
        self._publisher = publisher
        self._stock = stock
        self._reconciler = WaveReconciler(settings.resend_interval_ms * _MS, round(settings.wake_timeout_s * _S))
        self._waking_since_ns = time.monotonic_ns()
        self.state = row.control

    def handle(self, event: CoordinatorEvent) -> None:
        """One step of the wave."""
        if not self._settings.waves:
            return
        before = self.state
        exclude_named = self._settings.exclude_receiver
        # Stock engines are searched for only where it matters: not before the first START, which all wait for.
        late = before.phase is Phase.WAKING or (isinstance(event, FirstRequest) and event.wave < before.wave)
        self.state, commands = handle_coordinator(
            before,
            event,
            exclude_named=exclude_named,
            repeat_start=exclude_named or (late and self._stock.count() > 0),
        )
        running_before, running = before.phase is Phase.RUNNING, self.state.phase is Phase.RUNNING
        if self.state != before:
            self._row.set_control(self.state)
            if running and (not running_before or self.state.wave > before.wave):
                self._row.count("waves_started")
        for command in commands:
            self._carry_out(command)
        # Logged and timed afterwards, so that the engines that wait for START wait less.
        if self.state != before:
            logger.debug("%s: %s -> %s", event, before, self.state)
            now_ns = time.monotonic_ns()
            if before.phase is Phase.PAUSED:
                self._waking_since_ns = now_ns
            if running and not running_before:
                # 0 if the doorbells were rung, and one of the ranks spoke before the front-end did.
                self._row.count_wake_up(now_ns - self._waking_since_ns)

    def handle_while_waking(self, event: CoordinatorEvent) -> None:
        """One step of the wave, if a START was sent and no engine was seen running since."""
        if self.state.phase is Phase.WAKING:
            self.handle(event)

    def scan(self, now_ns: int) -> bool:
        """Handles what the rows show; true if every rank is idle in the current wave, and none is being woken."""
        if not self._settings.waves:
            return True
        rows, unknown = [], 0
        for e, word in enumerate(self._board.engine_state[: self._board.dp_size].tolist()):
            mark = self._row.engine(e)
            if not mark & ON_BEHALF and mark & VERDICT_MASK in (Verdict.ALIVE, *HANGING):
                wave, running, _ = unpack_state(word)
                rows.append(RowState(e, wave, running))
            unknown += mark & VERDICT_MASK == Verdict.UNKNOWN
        stock = self._stock.count()
        for event in self._reconciler.events(now_ns, self.state, rows, unobserved_ranks=stock + unknown):
            self.handle(event)
        wave, phase = self.state
        idle = not stock and all(not row.running and row.wave <= wave for row in rows)
        return idle and phase is Phase.PAUSED

    def _carry_out(self, command: CoordinatorCommand) -> None:
        match command:
            case StartWave(wave, exclude):
                self._sockets.to_engines.send_multipart(wire.encode_start(wave, exclude))
                self._row.count("starts_sent")
            case PublishState():
                self._publisher.publish_state(self.state)
            case WarnWakeFailed(wave):
                self._warn_wake_failed(wave)

    def _warn_wake_failed(self, wave: int) -> None:
        """Tells the operator, unless the rows say why: the user paused the ranks that live."""
        lives, paused = [], []
        for e, word in enumerate(self._board.engine_state[: self._board.dp_size].tolist()):
            mark = self._row.engine(e)
            if mark & ON_BEHALF or mark & VERDICT_MASK in (Verdict.ALIVE, *HANGING):
                lives.append(e)
                if not mark & ON_BEHALF and unpack_state(word)[2]:
                    paused.append(e)
        if lives and lives == paused:
            logger.debug("the ranks stay paused by the user: no engine woke up for wave %d", wave)
            return
        logger.warning(
            "no engine woke up for wave %d within %g s: ranks %s are alive, of which the user paused %s",
            wave,
            self._settings.wake_timeout_s,
            lives or "none",
            paused or "none",
        )
