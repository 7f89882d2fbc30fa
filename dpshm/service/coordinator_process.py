"""`CoordinatorProcess`: a coordinator in a daemon process of its own, and the handle on it."""

from __future__ import annotations

import logging
import os
import signal
import time
import weakref
from contextlib import suppress
from operator import index
from typing import Unpack

from dpshm.board.board import Board
from dpshm.board.sweep import sweep
from dpshm.coordinator.settings import SettingsDict, make_settings
from dpshm.errors import DpshmError, SegmentError, SettingError, StartupTimeout
from dpshm.linux.waits import bounded, deadline
from dpshm.ops.drain import set_drained
from dpshm.ops.scale import set_size
from dpshm.service.child import REMOVE, STOP_TIMEOUT_S, read_report, start
from dpshm.service.process import Detached, Process

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
_LOOK_S = 0.01


class CoordinatorProcess:
    """Coordinates one group from a daemon process, until `close` or the end of this process.

    Takes the settings of `dpshm.coordinator.settings.Settings` as keyword arguments; `group` and `dp_size` are
    needed. With `hands_over` a SIGTERM from another process leaves a board that is in use, for the coordinator
    that is started next, and `close` removes it. If this process ends without `close`, the coordinator then serves
    the engines and front-ends that live on, ends with the last of them and removes the board. With `detached` the
    coordinator is no child of this process: one that kills this process with all its children leaves it, and it
    removes the board.

    Attributes:
        settings: the settings.
        proc: the process.
        stats_publish_address: where front-ends connect.
        engine_addresses: (input, output): where engines hear of waves, and where they report.
        metrics_address: (host, port) where metrics are served; None if they are not.

    Raises:
        StartupTimeout: it did not report within `start_timeout_s`.
        DpshmError: an error of `Coordinator`, as the same type.
    """

    def __init__(
        self,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        hands_over: bool = False,
        detached: bool = False,
        **settings: Unpack[SettingsDict],
    ) -> None:
        self.settings = make_settings(**settings)
        start_timeout_s = bounded(start_timeout_s, "start_timeout_s")
        popen, report_fd = start(self.settings, hands_over, detached)
        end_signal = REMOVE if hands_over else signal.SIGTERM
        self.proc = Process(popen, f"dpshm-coordinator-{self.settings.group}", end_signal)
        self._owner_pid = os.getpid()
        self._started_s = time.monotonic()
        self._finalizer = self._finalize()
        try:
            report = read_report(report_fd, self.proc, start_timeout_s, detached)
            if detached:
                popen.wait()
                self._finalizer.detach()
                self.proc = Detached(report.pid, self.proc.name)
                self._finalizer = self._finalize()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(report_fd)
        self.stats_publish_address = report.stats_address
        self.engine_addresses = (report.engine_input_address, report.engine_output_address)
        self.metrics_address = report.metrics_address

    def _finalize(self) -> weakref.finalize[..., CoordinatorProcess]:
        arguments = (self._owner_pid, self.settings.group, self.proc, STOP_TIMEOUT_S)
        return weakref.finalize(self, _stop, *arguments)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until every engine is there.

        Raises:
            StartupTimeout: they were not, in `timeout_s` or in the settings' `ready_timeout_s`; names the ranks
                that are missing. Or the process ended.
        """
        now_s, until_s = time.monotonic(), deadline(timeout_s)
        if limit_s := self.settings.ready_timeout_s:
            until_s = min(until_s, self._started_s + limit_s)
        group = self.settings.group
        with Board.attach(group) as board:
            while not board.ready[0]:
                if not self.proc.is_alive():
                    raise StartupTimeout(f"{self.proc.name} ended before all ranks of group {group!r} were there")
                if time.monotonic() >= until_s:
                    missing = [e for e in range(board.dp_size) if not board.engine_alive(e)]
                    raise StartupTimeout(
                        f"group {group!r} was not ready in {time.monotonic() - now_s:.3g} s; ranks without a row: "
                        f"{missing}"
                    )
                time.sleep(_LOOK_S)
                board.segment.refresh()

    def scale(self, dp_size: int, *, force: bool = False) -> None:
        """Changes the number of ranks; wave and phase stay. Ranks in lockstep have to be at rest.

        Args:
            dp_size: the new number of ranks.
            force: ranks in lockstep need not be at rest: they form a new collective while they run.

        Raises:
            SettingError: the board has no room for so many; or ranks in lockstep are not drained, have requests,
                or are in a wave.
            NotHeeded: the process did not do it in time.
        """
        with Board.attach(self.settings.group) as board:
            set_size(board, index(dp_size), force=force, curve_dir=self.settings.curve_dir)

    def drain(self, dp_rank: int) -> None:
        """Takes a rank out of routing; it finishes the requests that it has.

        Raises:
            SettingError: there is no such rank.
            NotHeeded: the process did not do it in time.
        """
        self._set_drained(index(dp_rank), True)

    def undrain(self, dp_rank: int) -> None:
        """Puts a drained rank back into routing.

        Raises:
            SettingError: there is no such rank.
            NotHeeded: the process did not do it in time.
        """
        self._set_drained(index(dp_rank), False)

    def _set_drained(self, dp_rank: int, drained: bool) -> None:
        with Board.attach(self.settings.group) as board:
            if not 0 <= dp_rank < board.dp_size:
                raise SettingError(f"dp_rank {dp_rank} is outside 0 to {board.dp_size - 1}")
            set_drained(board, [dp_rank], drained, curve_dir=self.settings.curve_dir)

    def is_healthy(self) -> bool:
        """Whether the process runs, and its watch thread does its rounds."""
        if not self.proc.is_alive():
            return False
        try:
            with Board.attach(self.settings.group) as board:
                return board.coordinator_alive() and board.is_watched()
        except DpshmError:
            return False

    def get_stats_publish_address(self) -> str:
        """Where front-ends connect. Named as in the class that this one replaces."""
        return self.stats_publish_address

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """(input, output) for engines. Named as in the class that this one replaces."""
        return self.engine_addresses

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the process; kills it after `timeout` seconds (5).

        Removes what a process that was killed has left, unless an engine or a front-end still uses it.
        """
        limit_s = STOP_TIMEOUT_S if timeout is None else bounded(timeout, "timeout")
        if self._finalizer.alive:
            _stop(self._owner_pid, self.settings.group, self.proc, limit_s)
            self._finalizer.detach()  # now: if a signal handler raises before, the next call goes on

    def close(self) -> None:
        """Ends the process."""
        self.shutdown()

    def __enter__(self) -> CoordinatorProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(pid: int, group: str, proc: Process, timeout_s: float) -> None:
    """Ends a child of this process, and removes what it left; a forked copy of the handle does nothing."""
    if pid != os.getpid():
        return
    if proc.is_alive():
        proc.terminate()
        proc.join(timeout_s)
    if proc.is_alive():
        logger.warning("%s (pid %d) did not end within %g s and is killed", proc.name, proc.pid, timeout_s)
        proc.kill()
        proc.join()
    with suppress(SegmentError, SettingError, OSError):
        sweep(group)  # of one that was killed; not if a process uses the board
