"""A coordinator process that is started again when it dies, behind the handle that vLLM watches.

vLLM ends the server when the process of its coordinator ends. A coordinator of dpshm that dies can be replaced:
the new process takes the live board over, with its wave and bookings, and binds the same addresses, to which all
peers reconnect. So vLLM watches a stand-in, whose sentinel becomes readable only when a restart has failed.

A coordinator that was told to end (SIGTERM) is started again too, unless the server is ending: one signal to all
processes of the server reaches the coordinator first, and then the server shuts it down within `GRACE_S`.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from dpshm.board.board import Board
from dpshm.errors import SegmentError, SettingError
from dpshm.service.child import STOP_TIMEOUT_S
from dpshm.service.coordinator_process import START_TIMEOUT_S, CoordinatorProcess
from dpshm.vllm.log import logger
from dpshm.vllm.summary import SummaryLog

MAX_RESTARTS = 5
"""Restarts within `RESTART_WINDOW_S` before the supervisor gives up; also attempts at one restart."""
RESTART_WINDOW_S = 60.0
GRACE_S = 1.0
"""How long a coordinator that was told to end stays down, in case its server was told to end with it."""
RESTART_PAUSE_S = 0.2
"""The pause after the first failed attempt at a restart; it doubles with each."""


def remove_group(group: str) -> None:
    """Removes the board of a group without a coordinator, also one that engines which are ending still use."""
    with suppress(SegmentError, SettingError), Board.attach(group, readonly=False) as board:
        if board.lock_coordinator():
            board.segment.unlink()


class StandIn:
    """What vLLM's monitor watches in the place of the coordinator's process; outlives restarts of that process.

    Attributes:
        process: the coordinator's process at this moment.
        name: for vLLM's messages.
        sentinel: a descriptor that is readable once the coordinator has ended for good.
        exitcode: None until then.
    """

    def __init__(self, process: CoordinatorProcess) -> None:
        self.process = process
        self.name = "dpshm-coordinator"
        self.exitcode: int | None = None
        # An eventfd, not a pipe: forked engines inherit the write end of a pipe and keep it open.
        self.sentinel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = threading.Event()

    @property
    def pid(self) -> int:
        """The pid of the coordinator's process at this moment."""
        return self.process.proc.pid

    def is_alive(self) -> bool:
        """Whether the coordinator runs or is being restarted."""
        return self.exitcode is None

    def terminate(self) -> None:
        """Asks the coordinator to end; it is not started again."""
        self.end(0)
        self.process.proc.terminate()

    def kill(self) -> None:
        """Sends SIGKILL to the coordinator, which is not started again."""
        self.end(-9)
        self.process.proc.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the coordinator has ended for good, for `timeout` seconds at most."""
        self._ended.wait(timeout)

    def end(self, exitcode: int) -> None:
        """Marks the coordinator as ended for good, and makes the sentinel readable. The first exit code stays."""
        if self.exitcode is None:
            self.exitcode = exitcode
            self._ended.set()
            os.eventfd_write(self.sentinel, 1)


class WatchedCoordinator:
    """vLLM's handle on a coordinator; starts it again when it dies.

    Takes the settings of `dpshm.coordinator.settings.Settings`.

    Attributes:
        settings: the settings of the coordinator.
        proc: the stand-in that vLLM watches.
        restarts: how many times the coordinator was started again.
    """

    def __init__(self, **settings: Any) -> None:
        process = CoordinatorProcess(hands_over=True, **settings)
        self.settings = process.settings
        self.proc = StandIn(process)
        self.restarts = 0
        self._addresses = (process.get_stats_publish_address(), *process.get_engine_socket_addresses())
        self._pid = os.getpid()
        self._given = settings
        self._summaries: SummaryLog | None = None
        self._times: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._watch, name="dpshm-watch-coordinator", daemon=True)
        self._thread.start()

    def log_summaries(self, every_s: float) -> None:
        """Logs a line about the whole group every so many seconds, until `shutdown`; 0: never."""
        if every_s > 0 and self._summaries is None:
            self._summaries = SummaryLog(self.settings.group, every_s)

    def get_stats_publish_address(self) -> str:
        """The address to which front-ends connect."""
        return self._addresses[0]

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """The addresses to which engines connect: (input, output)."""
        return self._addresses[1], self._addresses[2]

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the coordinator for good; kills it after `timeout` seconds, at least 5."""
        if self._pid != os.getpid():
            return  # a forked child's copy of the handle
        os.eventfd_write(self._stop_fd, 1)
        if self._summaries is not None:
            self._summaries.close()
        self._thread.join(START_TIMEOUT_S)
        # vLLM often gives no time at all, and a coordinator that is killed leaves the board behind.
        self.proc.process.shutdown(max(timeout or 0.0, STOP_TIMEOUT_S))
        self.proc.end(0)
        remove_group(self.settings.group)

    # The watching thread.

    def _watch(self) -> None:
        while True:
            child = self.proc.process.proc
            poller = select.poll()
            for fd in (child.sentinel, self._stop_fd):
                poller.register(fd, select.POLLIN)
            if self._stop_fd in dict(poller.poll()):
                return
            child.join()  # another thread may be about to reap it, and then `exitcode` is None
            exitcode = child.exitcode
            told_to_end = not exitcode  # it ended in good order
            if told_to_end:
                logger.debug("dpshm's coordinator (pid %d) was told to end: is its server, too?", child.pid)
                poller.unregister(child.sentinel)
                poller.register(self.proc.sentinel, select.POLLIN)
                if poller.poll(GRACE_S * 1000):
                    return  # the server ends
            if self.proc.exitcode is not None:
                return  # vLLM ended it
            logger.warning(
                "dpshm's coordinator (pid %d) %s: starting it again; serving goes on",
                child.pid,
                "was told to end, and its server was not" if told_to_end else f"died, exit status {exitcode}",
            )
            if not self._start_again():
                self.proc.end(exitcode or 1)
                return

    def _start_again(self) -> bool:
        now = time.monotonic()
        if len(self._times) == MAX_RESTARTS and now - self._times[0] < RESTART_WINDOW_S:
            logger.error(
                "dpshm's coordinator died %d times within %g s: giving up", MAX_RESTARTS + 1, RESTART_WINDOW_S
            )
            return False
        self._times.append(now)
        for attempt in range(MAX_RESTARTS):
            try:
                process = CoordinatorProcess(hands_over=True, **self._given)
            except Exception:
                logger.log(
                    logging.WARNING if attempt + 1 < MAX_RESTARTS else logging.ERROR,
                    "dpshm's coordinator did not start again",
                    exc_info=True,
                )
                time.sleep(RESTART_PAUSE_S * 2**attempt)
                continue
            addresses = (process.get_stats_publish_address(), *process.get_engine_socket_addresses())
            if addresses != self._addresses:
                logger.error("dpshm's coordinator has new addresses, since its board is gone: giving up")
                process.close()
                return False
            self.proc.process = process
            self.restarts += 1
            logger.info("dpshm's coordinator is back, pid %d", process.proc.pid)
            return True
        return False
