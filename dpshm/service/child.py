"""The child process of a coordinator: its start, its report, and what it runs.

The child is a fresh interpreter that imports dpshm alone. With multiprocessing's spawn it would import the main
module of its parent again, and with it the whole server (for vLLM 5.6 s and half a GB). It reports its addresses,
or its error, through a pipe. It ends when it is asked to, and when its parent has ended in any way: it holds a
pidfd of the parent. One that hands over outlives its parent while the group does.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from dpshm import errors
from dpshm.board.board import Board
from dpshm.coordinator.settings import Settings
from dpshm.errors import DpshmError, StartupTimeout
from dpshm.linux import descriptors, processes
from dpshm.linux.signals import EndRequest
from dpshm.service.coordinator import Coordinator
from dpshm.service.process import Process

REMOVE = signal.SIGUSR1
"""From the parent of a child that hands over: end, and remove the board."""
STOP_TIMEOUT_S = 5.0
_ORPHAN_INTERVAL_MS = 200
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


def start(settings: Settings, hands_over: bool, detached: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a child; the descriptor gets its report. The arguments are those of `CoordinatorProcess`."""
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


def read_report(fd: int, proc: Process, timeout_s: float, detached: bool) -> Report:
    """Waits for a child's report.

    Raises:
        StartupTimeout: it did not report in time, or ended without a report.
        DpshmError: the error that it reported, as the same type.
    """
    until_s = time.monotonic() + timeout_s
    data = b""
    readable = select.poll()  # select(2) refuses descriptors above 1023
    readable.register(fd, select.POLLIN)
    if not detached:  # else that one ends at once
        readable.register(proc.sentinel, select.POLLIN)
    # Not until the end of the pipe: a forked child of this process may hold it open.
    while not data.endswith(b"\n"):
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
    request = EndRequest((signal.SIGTERM, REMOVE))
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
