"""Runs a coordinator in the foreground until a signal ends it, and keeps a service manager informed.

SIGTERM           ends the coordinator with exit status 0. A board that is in use stays, and the next coordinator
                  takes it over: a service manager sends the same signal to restart and to stop.
SIGINT, SIGHUP    end the group with exit status 0: the board is removed.
service manager   READY=1 once sockets and board are there (engines may start), STATUS, STOPPING=1,
                  and WATCHDOG=1 at the interval that it set, as long as both threads run.
"""

from __future__ import annotations

import logging
import select
import signal
import time
import tomllib
from pathlib import Path
from typing import Any

from dpshm.board.board import Board
from dpshm.coordinator.kept_settings import kept
from dpshm.coordinator.settings import IMMUTABLE, check_names
from dpshm.errors import SegmentError, SettingError
from dpshm.linux import descriptors, processes
from dpshm.linux.signals import EndRequest
from dpshm.net.addresses import joined, reachable
from dpshm.rules.liveness import State
from dpshm.service.coordinator import Coordinator
from dpshm.service.systemd import notify, watchdog_interval_s

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 0.5
MAX_CONFIG_BYTES = 1 << 20


class CoordinatorFailed(Exception):
    """A thread of the coordinator ended by itself."""


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        SettingError: it cannot be read, or a name in it is not one of a setting.
    """
    try:
        with path.open("rb") as f:
            data = f.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise SettingError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: it holds no settings")
        settings = tomllib.loads(data.decode("utf-8-sig"))  # an editor may have put a mark at the start
    except OSError as e:
        raise SettingError(f"cannot read the settings in {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingError(
            f'{path} is not TOML: {e}. It holds lines such as: dp_size = 8, or file_mode = "0640"'
        ) from e
    try:
        check_names(settings)
    except SettingError as e:
        raise SettingError(f"{path}: {e}") from None
    if isinstance(mode := settings.get("file_mode"), str):
        settings["file_mode"] = octal(mode)
    return settings


def octal(text: str) -> int:
    """Permissions as they are written for chmod.

    Raises:
        SettingError: it is not octal.
    """
    try:
        return int(text, 8)
    except ValueError:
        raise SettingError(f"file_mode {text!r} is not octal: 0600, 0640, 0604 or 0644") from None


def settings_of_live_group(group: str) -> dict[str, Any]:
    """The settings of a live board's last coordinator, for the next one; none if no process uses the board."""
    try:
        with Board.attach(group) as board:
            if not board.is_used():
                return {}
            header = board.segment.header.settings
            own = {name: value for name, value in kept(board).items() if value is not None}
            shared = {name: header[name] for name in IMMUTABLE if name in header}
            return own | shared | {"dp_size": board.dp_size}
    except SegmentError:
        return {}


def serve(settings: dict[str, Any]) -> None:
    """Runs a coordinator until a signal asks it to end.

    Raises:
        DpshmError: it could not start.
        CoordinatorFailed: a thread of it ended by itself.
    """
    descriptors.raise_limit()
    with EndRequest() as request:
        with Coordinator(own_process=True, **settings) as coordinator:
            group = coordinator.settings.group
            processes.set_title(f"dpshm-coord {group}")
            _announce(coordinator)
            _wait(coordinator, request)
            if not request.signum:
                notify("STATUS=a thread of the coordinator ended")
                raise CoordinatorFailed(f"a thread of the coordinator of group {group!r} ended: see the log above")
            logger.info("ending group %r: %s", group, signal.Signals(request.signum).name)
            notify("STOPPING=1", f"STATUS=ending: {signal.Signals(request.signum).name}")
            stays = request.signum == signal.SIGTERM and coordinator.hand_over()
        if stays:
            logger.info(
                "the board of group %r stays: it is in use, and the next coordinator takes it over; "
                "once its processes have ended, `dpshm doctor --sweep` removes it",
                group,
            )
        else:
            logger.info("group %r has ended", group)


def _announce(coordinator: Coordinator) -> None:
    settings, board = coordinator.settings, coordinator.board
    logger.info(
        "group %r: %d ranks, board %s, epoch %d, wave %d; front-ends %s, engines %s and %s",
        settings.group,
        board.dp_size,
        board.segment.path,
        int(board.epoch[0]),
        board.wave,
        coordinator.stats_publish_address,
        *coordinator.engine_addresses,
    )
    if coordinator.metrics_address:
        host, port = coordinator.metrics_address
        logger.info("metrics on http://%s/metrics", joined(reachable(host), port))
    notify("READY=1", f"STATUS=group {settings.group}: waiting for {board.dp_size} ranks")


def _wait(coordinator: Coordinator, request: EndRequest) -> None:
    """Returns when a signal came or a thread ended."""
    signalled = select.poll()
    signalled.register(request, select.POLLIN)
    watchdog_s = watchdog_interval_s()
    next_watchdog = time.monotonic()
    status = ""
    while not request.signum and coordinator.is_healthy():
        if watchdog_s is not None and time.monotonic() >= next_watchdog:
            next_watchdog = time.monotonic() + watchdog_s
            notify("WATCHDOG=1")
        if (now := _status(coordinator)) != status:
            status = now
            notify(f"STATUS={status}")
        signalled.poll(1000 * min(STATUS_INTERVAL_S, watchdog_s or STATUS_INTERVAL_S))


def _status(coordinator: Coordinator) -> str:
    board = coordinator.board
    states = board.snapshot()["state"].tolist()
    there = sum(state not in (State.DEAD, State.ABSENT) for state in states)
    worth_telling = (State.DEAD, State.STALLED, State.STUCK, State.UNKNOWN, State.SILENT, State.DRAINED)
    bad = {state: states.count(state) for state in worth_telling if state in states}
    return f"group {coordinator.settings.group}: {there} of {len(states)} ranks are there" + "".join(
        f", {number} {state}" for state, number in bad.items()
    )
