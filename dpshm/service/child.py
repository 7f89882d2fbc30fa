"""A coordinator in a daemon process of its own, and the handle on it.

The child is a fresh interpreter that imports dpshm alone. With multiprocessing's spawn it would import the main
module of its parent again, and with it the whole server (for vLLM 5.6 s and half a GB). It reports its addresses,
or its error, through a pipe before the constructor returns. It ends when it is asked to, and when its parent has
ended in any way: it holds a pidfd of the parent. One that hands over outlives its parent while the group does.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import Any, Unpack

import msgspec

from dpshm import errors
from dpshm.board.board import Board
from dpshm.board.sweep import sweep
from dpshm.coordinator.settings import Settings, SettingsDict, make_settings
from dpshm.errors import DpshmError, SegmentError, SettingError, StartupTimeout
from dpshm.linux import descriptors, processes
from dpshm.linux.signals import EndRequest
from dpshm.linux.waits import bounded, deadline
from dpshm.ops.drain import set_drained
from dpshm.ops.scale import set_size
from dpshm.service.coordinator import Coordinator

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
_ORPHAN_INTERVAL_MS = 200
_LOOK_S = 0.01
_REMOVE = signal.SIGUSR1
"""From the parent of a child that hands over: end, and remove the board."""
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# -P, and the path at the end: no file in the parent's folder can take the place of a module.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from dpshm.service.child import main; sys.exit(main(sys.argv[2:]))"
)


class Report(msgspec.Struct):
    """The child's one report: its addresses, or its error."""

    stats_address: str = ""
    engine_input_address: str = ""
    engine_output_address: str = ""
    metrics_address: tuple[str, int] | None = None
    error: str = ""
    error_type: str = ""
    pid: int = 0


class Process:
    """A child process with the part of `multiprocessing.Process` that a server's monitor uses.

    Attributes:
        name: for messages.
        pid: the process id.
        sentinel: a descriptor that is readable once the process has ended (a pidfd); for
            ``multiprocessing.connection.wait``.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], name: str, end_signal: signal.Signals = signal.SIGTERM
    ) -> None:
        self._popen = popen
        self._end_signal = end_signal
        self.name = name
        self.pid = popen.pid
        self.sentinel = os.pidfd_open(popen.pid)
        self._close_sentinel = weakref.finalize(self, os.close, self.sentinel)

    @property
    def exitcode(self) -> int | None:
        """None while the process runs; else its exit status, or minus the signal that ended it."""
        return self._popen.poll()

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._popen.poll() is None

    def terminate(self) -> None:
        """Asks the process to end."""
        self._popen.send_signal(self._end_signal)

    def kill(self) -> None:
        """Ends the process (SIGKILL)."""
        self._popen.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended, for `timeout` seconds at most."""
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return

    def __repr__(self) -> str:
        return f"<Process name={self.name!r} pid={self.pid} exitcode={self.exitcode}>"


class Detached(Process):
    """The same of a process that is no child of this one, so that whoever ends this one's children leaves it."""

    def __init__(self, pid: int, name: str) -> None:
        self.name, self.pid = name, pid
        self.sentinel = os.pidfd_open(pid)
        self._close_sentinel = weakref.finalize(self, os.close, self.sentinel)

    @property
    def exitcode(self) -> int | None:
        """None while the process runs; then 0: how it ended, only its parent knows."""
        return None if self.is_alive() else 0

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return not self._ended(0)

    def terminate(self) -> None:
        """Asks the process to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process (SIGKILL)."""
        self._send(signal.SIGKILL)

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended, for `timeout` seconds at most."""
        self._ended(None if timeout is None else timeout * 1000)

    def _ended(self, timeout_ms: float | None) -> bool:
        ended = select.poll()
        ended.register(self.sentinel, select.POLLIN)
        return bool(ended.poll(timeout_ms))

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.sentinel, number)


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
        popen, report_fd = _start(self.settings, hands_over, detached)
        end_signal = _REMOVE if hands_over else signal.SIGTERM
        self.proc = Process(popen, f"dpshm-coordinator-{self.settings.group}", end_signal)
        self._owner_pid = os.getpid()
        self._started_s = time.monotonic()
        self._finalizer = self._finalize()
        try:
            report = _read_report(report_fd, self.proc, start_timeout_s, detached)
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


def _start(settings: Settings, hands_over: bool, detached: bool) -> tuple[subprocess.Popen[bytes], int]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        arguments = [
            *(sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT),
            *("dpshm-coordinator", str(os.getpid()), str(write_fd), str(int(hands_over)), str(int(detached))),
            msgspec.json.encode(settings).decode(),
        ]
        # In a process group of its own: a Ctrl-C in the terminal is for the parent, which then ends its child.
        popen = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=[write_fd], process_group=0)
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return popen, read_fd


def _read_report(fd: int, proc: Process, timeout_s: float, detached: bool) -> Report:
    until_s = time.monotonic() + timeout_s
    data = b""
    readable = select.poll()  # select(2) refuses descriptors above 1023
    readable.register(fd, select.POLLIN)
    if not detached:  # else that one ends at once
        readable.register(proc.sentinel, select.POLLIN)
    while not data.endswith(
        b"\n"
    ):  # not until the end of the pipe: a forked child of this process may hold it open
        ready = dict(readable.poll(max(0.0, until_s - time.monotonic()) * 1000))
        if not ready:
            raise StartupTimeout(
                f"{proc.name} (pid {proc.pid}) did not report its addresses within {timeout_s:g} s: "
                "is the machine overloaded? See its log above"
            )
        chunk = os.read(fd, 65536) if fd in ready else b""
        if not chunk:
            break
        data += chunk
    if not data:
        proc.join(STOP_TIMEOUT_S)
        raise StartupTimeout(
            f"{proc.name} (pid {proc.pid}) ended with exit status {proc.exitcode} before it reported its "
            "addresses; see its log above"
        )
    report = msgspec.json.decode(data, type=Report)
    if report.error:
        kind = getattr(errors, report.error_type, DpshmError)
        raise kind(report.error)
    return report


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


def main(argv: list[str]) -> int:
    """The child: ``dpshm-coordinator PARENT_PID REPORT_FD HANDS_OVER DETACHED SETTINGS_JSON``."""
    _, parent_pid, report_fd, hands_over, detached, settings_json = argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s dpshm %(message)s")
    processes.ignore_interrupts()
    descriptors.raise_limit()
    settings: dict[str, Any] = msgspec.json.decode(settings_json)
    processes.set_title(f"dpshm-coord {settings.get('group')}")
    parent = processes.parent_pidfd(int(parent_pid))
    if int(detached) and os.fork():
        os._exit(0)
    request = EndRequest((signal.SIGTERM, _REMOVE))
    with os.fdopen(int(report_fd), "wb") as report:
        try:
            coordinator = Coordinator(own_process=True, **settings)
        except DpshmError as e:
            report.write(msgspec.json.encode(Report(error=str(e), error_type=type(e).__name__)) + b"\n")
            return 1
        addresses = (coordinator.stats_publish_address, *coordinator.engine_addresses, coordinator.metrics_address)
        try:
            report.write(msgspec.json.encode(Report(*addresses, pid=os.getpid())) + b"\n")
            report.flush()
        except BrokenPipeError:  # the parent waited no longer
            coordinator.close()
            os._exit(1)
    with coordinator:
        ended = select.poll()
        ended.register(parent, select.POLLIN)
        ended.register(request, select.POLLIN)
        ended.poll()
        if int(hands_over):
            ended.unregister(parent)
            while not request.signum and _in_use(coordinator.board):
                ended.poll(_ORPHAN_INTERVAL_MS)
            if request.signum == signal.SIGTERM:
                coordinator.hand_over()
    return 0


def _in_use(board: Board) -> bool:
    """Whether an engine or a front-end of the group lives."""
    engines, frontends = range(board.dp_size), range(board.frontends_used())
    return any(map(board.engine_alive, engines)) or any(map(board.frontend_alive, frontends))
