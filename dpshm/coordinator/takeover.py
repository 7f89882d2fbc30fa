"""Opens a group's board for its coordinator: takes a live board over, or removes a dead one and creates another.

Two locks make this safe. The lock on the sockets' folder comes first: only its holder may bind the ipc paths, as a
second bind silently takes a path over. The coordinator's lock on the segment says that the board is watched.
"""

from __future__ import annotations

import grp
import logging
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from dpshm.board import files
from dpshm.board.board import Board
from dpshm.board.files import sockets_path
from dpshm.board.header import make_header
from dpshm.board.segment import Segment
from dpshm.board.sweep import sweep, sweep_dead
from dpshm.coordinator import kept_settings
from dpshm.coordinator.relay_sockets import RelaySockets
from dpshm.coordinator.row import CoordinatorRow
from dpshm.coordinator.settings import IMMUTABLE, Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.errors import GroupInUse, SegmentError, SegmentInvalid, SegmentNotFound, SettingError
from dpshm.linux.forks import PrivateFd
from dpshm.net.addresses import joined
from dpshm.net.keys import HEADER_SETTING, ServerKeys

logger = logging.getLogger(__name__)

MAX_IPC_PATH_BYTES = 107  # sockaddr_un, less its final zero
OPEN_TIMEOUT_S = 0.5
_PAUSE_S = 0.02


def open_board(
    settings: Settings, sockets: Sockets, relay: RelaySockets | None = None
) -> tuple[Segment, Board, CoordinatorRow]:
    """The group's board, its coordinator's lock held, and the sockets bound to the group's addresses.

    Args:
        settings: the coordinator's.
        sockets: not bound yet.
        relay: not open yet; None if the group has no relay.

    Raises:
        GroupInUse: a live coordinator has the group.
        SegmentNoSpace: there is no room for the board.
        SettingError: a live group has other settings, or an address cannot be bound.
    """
    folder = _lock_folder(settings.group)
    try:
        if removed := sweep_dead():
            logger.info("removed what dead groups left: %s", ", ".join(removed))
        segment = _attach_or_create(settings, sockets, relay)
    except BaseException:
        with suppress(OSError):
            sockets_path(settings.group).rmdir()  # fails if there is anything in it
        folder.close()
        raise
    segment.keep_sockets(folder)
    try:
        header = segment.header
        sockets.bind((header.stats_address, header.engine_input_address, header.engine_output_address))
        board = Board(segment)
        row = CoordinatorRow(board)
        row.begin(settings.dp_size)
        kept_settings.keep(board, settings)
    except BaseException:
        leave_board(segment)
        raise
    return segment, board, row


def leave_board(segment: Segment) -> None:
    """Undoes `open_board`: a board that other processes use stays, another one is removed."""
    if not segment.locks.is_shared():
        segment.unlink()
    segment.close()


def _lock_folder(group: str) -> PrivateFd:
    deadline = time.monotonic() + OPEN_TIMEOUT_S
    while (folder := files.lock_sockets_folder(sockets_path(group))) is None:
        if time.monotonic() > deadline:
            raise GroupInUse(_in_use(group))
        time.sleep(_PAUSE_S)  # another coordinator may just be ending
    return folder


def _attach_or_create(settings: Settings, sockets: Sockets, relay: RelaySockets | None) -> Segment:
    group = settings.group
    deadline = time.monotonic() + OPEN_TIMEOUT_S
    while True:
        try:
            segment = Segment.attach(group)
        except SegmentNotFound:
            with suppress(FileExistsError):
                return _create(settings, sockets, relay)
            continue
        except SegmentInvalid:
            if sweep(group):
                logger.info("removed the board of the dead group %r: it was of another version, or damaged", group)
                continue
            raise
        try:
            if _take_over(segment, settings, sockets.keys):
                if relay is not None:
                    relay.open(segment.header.relay_addresses)
                return segment
            if not _remove_dead(segment):
                if time.monotonic() > deadline:
                    raise GroupInUse(_in_use(group))
                time.sleep(_PAUSE_S)  # another coordinator may be starting, or sweeping
        except BaseException:
            segment.close()
            raise
        segment.close()


def _take_over(segment: Segment, settings: Settings, keys: ServerKeys | None) -> bool:
    """Locks a board that other processes use; false if none does, or if it has a coordinator."""
    board = Board(segment)
    if not (board.lock_coordinator() and segment.linked and segment.locks.is_shared()):
        return False
    _check_settings(segment, settings, keys)
    files.set_access(segment.path, segment.fileno(), settings.file_mode, _gid(settings.file_group))
    logger.info("taking over the live board of group %r at wave %d", segment.group, board.wave)
    if found := kept_settings.differences(board, settings):
        logger.warning("group %r: other settings than its last coordinator's: %s", segment.group, "; ".join(found))
    if settings.dp_size != board.dp_size:
        logger.warning(
            "group %r keeps its %d ranks: dp_size %d is for a new board (see `scale`)",
            *(segment.group, board.dp_size, settings.dp_size),
        )
    rows = segment.header.engines, segment.header.frontends
    if (settings.max_engines or rows[0], settings.max_frontends) != rows:
        logger.warning(
            "group %r keeps its rows for %d engines and %d front-ends: max_engines and max_frontends are for "
            "a new board",
            *(segment.group, *rows),
        )
    return True


def _remove_dead(segment: Segment) -> bool:
    """Removes a board that no process uses."""
    if not segment.locks.lock_all():
        return False
    segment.unlink()
    logger.info("removed what the dead group %r left", segment.group)
    return True


def _create(settings: Settings, sockets: Sockets, relay: RelaySockets | None) -> Segment:
    folder = sockets_path(settings.group)
    frontends, to_engines, from_engines = files.SOCKET_NAMES
    wanted = (
        _endpoint(settings.frontends_local, folder, frontends, settings.host),
        _endpoint(settings.engines_local, folder, to_engines, settings.host),
        _endpoint(settings.engines_local, folder, from_engines, settings.host),
    )
    # The header names the ports, and a port is known once it is bound. So tcp is bound before the group is ours,
    # which takes nothing from another coordinator, and ipc afterwards.
    addresses = sockets.bind_ports(wanted)
    fixed = {name: getattr(settings, name) for name in IMMUTABLE}
    if relay is not None:
        fixed["relay"] = relay.open(None)
    if (key := settings.head_prefix_key) is None:
        key = secrets.randbits(63)
    header = make_header(
        settings.group,
        settings.engine_capacity,
        settings.max_frontends,
        stats_address=addresses[0],
        engine_input_address=addresses[1],
        engine_output_address=addresses[2],
        settings=fixed | _public_key(sockets.keys) | {"prefix_key": key},
    )
    try:
        return Segment.create(header, file_mode=settings.file_mode, file_gid=_gid(settings.file_group))
    except BaseException:
        sockets.unbind()
        if relay is not None:
            relay.unbind()
        raise


def _check_settings(segment: Segment, settings: Settings, keys: ServerKeys | None) -> None:
    """Raises if this coordinator's idea of a live group is not that of the group's processes."""
    there = {"node": 0, "nodes": 1} | segment.header.settings
    for name in IMMUTABLE:
        theirs, ours = there.get(name), getattr(settings, name)
        if theirs != ours:
            raise SettingError(
                f"group {segment.group!r} is alive with {name}={theirs!r}, and this coordinator was told "
                f"{ours!r}: start it with the group's settings, or stop the group first"
            )
    theirs, ours = segment.header.settings.get(HEADER_SETTING), _public_key(keys).get(HEADER_SETTING)
    if theirs != ours:
        raise SettingError(
            f"group {segment.group!r} is alive with the server key {theirs}, and this coordinator has {ours}: "
            "start it with the group's --curve-dir, or stop the group first"
        )


def _public_key(keys: ServerKeys | None) -> dict[str, str]:
    return {HEADER_SETTING: keys.public.decode()} if keys else {}


def _endpoint(local: bool, folder: Path, name: str, host: str) -> str:
    """The address to bind a socket to: a path in the group's folder, or any port of the host."""
    if not local:
        return f"tcp://{joined(host, '*')}"
    path = os.fsencode(folder / name)
    if len(path) > MAX_IPC_PATH_BYTES:
        raise SettingError(
            f"the socket path {folder / name} has {len(path)} bytes, and the system allows {MAX_IPC_PATH_BYTES}: "
            "use a shorter DPSHM_DIR or group name"
        )
    return f"ipc://{folder / name}"


def _gid(name: str | None) -> int:
    """The number of a group of users; -1 for none."""
    if name is None:
        return -1
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise SettingError(f"file_group {name!r} is no group of this machine: see getent group") from None


def _in_use(group: str) -> str:
    try:
        with Board.attach(group) as board:
            pid, epoch = int(board.coordinator_pid[0]), int(board.epoch[0])
    except SegmentError:
        return (
            f"the sockets of group {group!r} in {sockets_path(group)} are held by a live coordinator, but its "
            "segment was unlinked: stop that process, or use another group name"
        )
    return f"group {group!r} has a coordinator, pid {pid}, since epoch {epoch}: stop it, or use another group name"
