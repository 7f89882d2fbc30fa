"""The coordinator of a group, as threads of this process: the board's life, the waves, the verdicts.

    wave thread     owns every ZMQ socket; wave rules; stock peers       `dpshm.coordinator.wave_thread`
    watch thread    locks, beats, pidfds; verdicts on the board          `dpshm.coordinator.watch_thread`

The coordinator is not in the path of the stats: engines store, front-ends read. If it dies, routing goes
on; the next coordinator of the group finds the board alive, takes it over with wave, bookings and marks as
they are, and binds the same addresses, to which everybody reconnects.
"""

from __future__ import annotations

import grp
import logging
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpshm.board import files
from dpshm.board.board import Board
from dpshm.board.files import sockets_path
from dpshm.board.header import make_header
from dpshm.board.segment import Segment, sweep
from dpshm.coordinator.row import Marks
from dpshm.coordinator.settings import IMMUTABLE, make_settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.watch_thread import WatchThread
from dpshm.coordinator.wave_thread import WaveThread
from dpshm.errors import GroupInUse, SegmentError, SegmentInvalid, SegmentNotFound, SettingError, StartupTimeout
from dpshm.linux import processes
from dpshm.linux.descriptors import explained
from dpshm.net.keys import HEADER_SETTING, ServerKeys
from dpshm.version import version_word

logger = logging.getLogger(__name__)

MAX_IPC_PATH_BYTES = 107  # sockaddr_un, less its final zero
OPEN_TIMEOUT_S = 0.5


class Coordinator:
    """Coordinates one group from threads of this process, until `close`.

    Takes the settings of `dpshm.coordinator.settings.Settings` as keyword arguments; `group` and `dp_size` are
    needed. `own_process` says that this process is nothing else: then what peers can make it grow by is bounded.

    Attributes:
        settings: what it was told.
        board: the group's board.
        stats_publish_address: where front-ends connect.
        engine_addresses: (input, output): where engines hear of waves, and where they report.
        metrics_address: (host, port) where metrics are served; None if they are not.

    Raises:
        GroupInUse: a live coordinator has the group.
        SegmentNoSpace: there is no room for the board.
        SettingError: a setting is out of range.
    """

    _watch: WatchThread | None = None
    _finalizer: weakref.finalize[..., Coordinator] | None = None

    @explained()
    def __init__(self, *, own_process: bool = False, **settings: Any) -> None:
        self.settings = make_settings(**settings)
        self._wave = WaveThread(self.settings, self._open_board, self._poke_watch, own_process=own_process)
        try:
            self._wave.start()
            error = self._wave.opened.exception()
            if error is not None:
                # Without its traceback, whose frames keep the segment open until the collector comes by.
                raise error.with_traceback(None)
            self.board = self._wave.opened.result()
        except BaseException:
            # A Ctrl-C too, which may find the board made and its watch running.
            self._wave.stop()
            if self._finalizer is not None:
                self._finalizer()
            raise
        header = self.board.segment.header
        self.stats_publish_address = header.stats_address
        self.engine_addresses = (header.engine_input_address, header.engine_output_address)
        self.metrics_address: tuple[str, int] | None = None
        if self.settings.metrics_port is not None:
            try:
                self._serve_metrics(self.settings.metrics_host, self.settings.metrics_port)
            except BaseException:
                self.close()
                raise

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until every engine is there.

        Raises:
            StartupTimeout: they were not, in `timeout_s` or in the settings' `ready_timeout_s`; names who is
                missing.
        """
        try:
            self._wave.all_ready.result(timeout_s)
        except FutureTimeoutError:
            board = self.board
            missing = [e for e in range(board.dp_size) if not board.engine_alive(e)]
            raise StartupTimeout(
                f"group {self.settings.group!r} was not ready in {timeout_s:g} s; ranks without a row: {missing}"
            ) from None

    @property
    def dropped(self) -> dict[str, int]:
        """How many messages were dropped, by reason."""
        return dict(self._wave.dropped.counts)

    def scale(self, dp_size: int) -> None:
        """Changes the number of ranks; wave and phase stay.

        Raises:
            SettingError: the board has no room for so many.
        """
        self._in_wave_thread(lambda: self._wave.scale(dp_size))

    def drain(self, dp_rank: int) -> None:
        """Takes a rank out of routing; it finishes what it has."""
        self._set_drained(dp_rank, True)

    def undrain(self, dp_rank: int) -> None:
        """Puts a drained rank back into routing."""
        self._set_drained(dp_rank, False)

    def _set_drained(self, dp_rank: int, drained: bool) -> None:
        self._in_wave_thread(lambda: self._wave.set_drained(dp_rank, drained))

    def _in_wave_thread(self, function: Callable[[], None]) -> None:
        if not self.board.segment.usable:
            raise self.board.segment.why_unusable()
        self._wave.call(function)

    def is_healthy(self) -> bool:
        """Whether both threads still run."""
        return self._wave.is_alive() and self._watch is not None and self._watch.is_alive()

    def _serve_metrics(self, host: str, port: int) -> None:
        from dpshm.ops.metrics import MetricsServer  # needs an extra

        metrics = MetricsServer(self.board.segment.group, self._wave.dropped.counts, host, port)
        self.metrics_address = metrics.address
        self._metrics_finalizer = weakref.finalize(self, metrics.close)

    def close(self) -> None:
        """Ends the threads, closes the sockets, removes the segment and the sockets' folder."""
        if self.metrics_address is not None:
            self._metrics_finalizer()
        if self._finalizer is not None:
            self._finalizer()

    def hand_over(self) -> bool:
        """Ends this coordinator alone: the board stays, and the next coordinator of the group takes it over.

        If nobody else is attached this is `close`. Returns whether the board stays.
        """
        stays = self.board.segment.usable and self.board.segment.locks.is_shared()
        if stays and self._finalizer is not None and (alive := self._finalizer.detach()) is not None:
            _, shut_down, arguments, _ = alive
            shut_down(*arguments, unlink=False)
        self.close()
        return stays

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _poke_watch(self) -> None:
        if self._watch is not None:
            self._watch.poke()

    # In the wave thread, while the constructor waits.

    def _open_board(self, sockets: Sockets) -> tuple[Board, Marks]:
        group = self.settings.group
        # First of all the folder: only its holder may bind ipc paths, a second bind would steal them silently.
        folder = self._take_folder(group)
        try:
            segment = self._take_over_or_create(sockets)
        except BaseException:
            with suppress(OSError):
                sockets_path(group).rmdir()  # not if anything is in it
            os.close(folder)
            raise
        segment.keep_sockets(folder)
        watch: WatchThread | None = None
        try:
            header = segment.header
            sockets.bind((header.stats_address, header.engine_input_address, header.engine_output_address))
            board = Board(segment)
            marks = self._marks = Marks(board)
            words = board.words
            if words[board.index("epoch")] == 0:
                marks.set_dp_size(self.settings.dp_size)
            words[board.index("coordinator_pid")] = os.getpid()
            words[board.index("coordinator_start_time")] = processes.start_time(os.getpid())
            words[board.index("coordinator_version")] = version_word()
            marks.begin_epoch()
            watch = WatchThread(board, marks, round(self.settings.stall_timeout_s * 1e9))
            watch.round(time.monotonic_ns())
            watch.start()
            self._watch = watch
            self._finalizer = weakref.finalize(self, _shut_down, os.getpid(), self._wave, watch, segment)
        except BaseException:
            if watch is not None:
                watch.stop()
            if not segment.locks.is_shared():
                segment.unlink()
            segment.close()
            raise
        return board, marks

    def _take_folder(self, group: str) -> int:
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        while (folder := files.lock_sockets_folder(sockets_path(group))) is None:
            if time.monotonic() > deadline:
                raise GroupInUse(_in_use(group))
            time.sleep(0.02)  # another coordinator is just ending
        return folder

    def _take_over_or_create(self, sockets: Sockets) -> Segment:
        """The group's segment, the coordinator's lock held: the live one, or a new one."""
        group = self.settings.group
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        while True:
            try:
                segment = Segment.attach(group)
            except SegmentNotFound:
                with suppress(FileExistsError):
                    return self._create(sockets)
                continue
            except SegmentInvalid:
                if sweep(group):
                    logger.info("removed what a dead group %r of another version, or damaged, left", group)
                    continue
                raise
            try:
                board = Board(segment)
                owned = board.lock_coordinator()
                if owned and segment.linked and segment.locks.is_shared():
                    self._check_takeover(segment, sockets.keys)
                    logger.info("taking over the live board of group %r at wave %d", group, board.wave)
                    if self.settings.dp_size != board.dp_size:
                        logger.warning(
                            "group %r keeps its %d ranks: dp_size %d is for a new board (see `scale`)",
                            *(group, board.dp_size, self.settings.dp_size),
                        )
                    return segment
                if owned and segment.locks.lock_all():
                    segment.unlink()
                    logger.info("removed what the dead group %r left", group)
                elif time.monotonic() > deadline:
                    raise GroupInUse(_in_use(group))
                else:
                    time.sleep(0.02)  # another coordinator is starting, or sweeping
            except BaseException:
                segment.close()
                raise
            segment.close()

    def _create(self, sockets: Sockets) -> Segment:
        settings = self.settings
        folder = sockets_path(settings.group)
        frontends, to_engines, from_engines = files.SOCKET_NAMES
        wanted = (
            _endpoint(settings.frontends_local, folder, frontends, settings.host),
            _endpoint(settings.engines_local, folder, to_engines, settings.host),
            _endpoint(settings.engines_local, folder, from_engines, settings.host),
        )
        # A port is known once it is bound, and the header names it: so tcp is bound before the group is ours,
        # which steals nothing, and ipc after.
        addresses = sockets.bind_ports(wanted)
        header = make_header(
            settings.group,
            settings.engine_capacity,
            settings.max_frontends,
            stats_address=addresses[0],
            engine_input_address=addresses[1],
            engine_output_address=addresses[2],
            settings={name: getattr(settings, name) for name in IMMUTABLE} | _public_key(sockets.keys),
        )
        try:
            return Segment.create(header, file_mode=settings.file_mode, file_gid=_gid(settings.file_group))
        except BaseException:
            sockets.unbind()
            raise

    def _check_takeover(self, segment: Segment, keys: ServerKeys | None) -> None:
        for name in IMMUTABLE:
            theirs, ours = segment.header.settings.get(name), getattr(self.settings, name)
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
    """Where a socket is to be bound: a path in the group's folder, or any port of the host."""
    if not local:
        return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"
    path = os.fsencode(folder / name)
    if len(path) > MAX_IPC_PATH_BYTES:
        raise SettingError(
            f"the socket path {folder / name} has {len(path)} bytes, and the system allows {MAX_IPC_PATH_BYTES}: "
            "use a shorter DPSHM_DIR or group name"
        )
    return f"ipc://{folder / name}"


def _gid(name: str | None) -> int:
    """A group's number; -1 for none."""
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


def _shut_down(pid: int, wave: WaveThread, watch: WatchThread, segment: Segment, *, unlink: bool = True) -> None:
    """Ends a coordinator; in a forked child, which has neither its threads nor its group, does nothing."""
    if pid != os.getpid():
        return
    wave.stop()
    watch.stop()
    if unlink:
        segment.unlink()
    segment.close()
