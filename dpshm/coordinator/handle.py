"""The coordinator of a group, as threads of this process.

    wave thread     the sockets, the waves, stock peers          `dpshm.coordinator.wave_thread`
    watch thread    locks, beats, pidfds; verdicts               `dpshm.coordinator.watch_thread`
    relay           rows of other nodes, where there are any     `dpshm.coordinator.relay`

Engines store their load and front-ends read it without the coordinator. If it dies, routing goes on; the group's
next coordinator takes the live board over, with its wave, bookings and marks, and binds the same addresses, to
which all peers reconnect.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from functools import partial
from operator import index
from typing import Self

from dpshm.board.board import Board
from dpshm.coordinator.relay import Relay
from dpshm.coordinator.relay_sockets import RelaySockets
from dpshm.coordinator.settings import KEY_DIGITS, Settings
from dpshm.coordinator.sockets import Sockets
from dpshm.coordinator.takeover import leave_board, open_board
from dpshm.coordinator.watch_thread import WatchThread
from dpshm.coordinator.wave_thread import WaveThread
from dpshm.errors import StartupTimeout
from dpshm.linux.descriptors import explained
from dpshm.linux.uninterrupted import uninterrupted
from dpshm.linux.waits import bounded
from dpshm.net.keys import server_keys


class CoordinatorThreads:
    """Coordinates one group from threads of this process, until `close`.

    Args:
        settings: the coordinator's; what they say of metrics is for `dpshm.service.coordinator`.
        own_process: this process is a coordinator alone. Then its memory has a bound, whatever peers send.

    Attributes:
        settings: the same.
        board: the group's board.
        stats_publish_address: where front-ends connect.
        engine_addresses: (input, output): where engines hear of waves, and where they report.

    Raises:
        GroupInUse: a live coordinator has the group.
        SegmentNoSpace: there is no room for the board.
        SettingError: a live group has other settings, or an address cannot be bound.
    """

    _running: _Running | None = None

    @explained()
    def __init__(self, settings: Settings, *, own_process: bool = False) -> None:
        self.settings = settings
        try:
            running = self._running = uninterrupted(partial(_start, settings, own_process), _Running.close)
            self._finalizer = weakref.finalize(self, running.close)
        except BaseException:
            if self._running is not None:  # a signal handler raised
                self._running.close()
            raise
        self.board = running.board
        self._wave, self._watch = running.wave, running.watch
        header = self.board.segment.header
        self.stats_publish_address = header.stats_address
        self.engine_addresses = (header.engine_input_address, header.engine_output_address)

    @property
    def head_addresses(self) -> str:
        """The setting `head` of coordinators on other nodes that follow this one.

        With relays it ends with the key of the group's prefix indexes: a secret, as the board is.
        """
        header = self.board.segment.header
        relay = header.relay_addresses
        more = () if relay is None else (*relay, f"{header.prefix_key:0{KEY_DIGITS}x}")
        return ",".join((self.stats_publish_address, *self.engine_addresses, *more))

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until every engine is there.

        Raises:
            StartupTimeout: they were not, in `timeout_s` or in the settings' `ready_timeout_s`; names the ranks
                that are missing.
        """
        limit_s = None if timeout_s is None else bounded(timeout_s)
        try:
            self._wave.all_ready.result(limit_s)
        except FutureTimeoutError:
            board = self.board
            missing = [e for e in range(board.dp_size) if not board.engine_present(e)]
            raise StartupTimeout(
                f"group {self.settings.group!r} was not ready in {limit_s:g} s; ranks without a row: {missing}"
            ) from None

    @property
    def dropped(self) -> dict[str, int]:
        """How many messages were dropped, by reason."""
        relay = None if self._running is None else self._running.relay
        return dict(self._wave.dropped.counts + (Counter() if relay is None else relay.dropped.counts))

    def scale(self, dp_size: int, *, force: bool = False) -> None:
        """Changes the number of ranks; wave and phase stay. Ranks in lockstep have to be at rest.

        Args:
            dp_size: the new number of ranks.
            force: ranks in lockstep need not be at rest: they form a new collective while they run.

        Raises:
            SettingError: the board has no room for so many; or ranks in lockstep are not drained, have requests,
                or are in a wave.
        """
        self._check_usable()
        self._wave.scale(index(dp_size), force=force)

    def drain(self, dp_rank: int) -> None:
        """Takes a rank out of routing; it finishes the requests that it has.

        Raises:
            SettingError: there is no such rank.
        """
        self._check_usable()
        self._wave.set_drained(index(dp_rank), True)

    def undrain(self, dp_rank: int) -> None:
        """Puts a drained rank back into routing.

        Raises:
            SettingError: there is no such rank.
        """
        self._check_usable()
        self._wave.set_drained(index(dp_rank), False)

    def is_healthy(self) -> bool:
        """Whether all threads run."""
        relay = None if self._running is None else self._running.relay
        return self._wave.is_alive() and self._watch.is_alive() and (relay is None or relay.is_alive())

    def close(self) -> None:
        """Ends the threads, closes the sockets, removes the segment and the sockets' folder."""
        self._finalizer()

    def hand_over(self) -> bool:
        """Closes this coordinator and leaves the board to the group's next one; true if the board stays.

        A board that no other process uses is removed.
        """
        segment = self.board.segment
        stays = segment.usable and segment.locks.is_shared()
        if stays and self._running is not None:
            self._running.close(unlink=False)
        self.close()
        return stays

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if not self.board.segment.usable:
            raise self.board.segment.why_unusable()


class _Running:
    """A coordinator's threads and board. Refers to no handle, so that a handle's finalizer can hold it."""

    def __init__(self, board: Board, wave: WaveThread, watch: WatchThread, relay: Relay | None) -> None:
        self.board = board
        self.relay = relay
        self.wave = wave
        self.watch = watch
        self._pid = os.getpid()
        self._closed = False

    def close(self, *, unlink: bool = True) -> None:
        """Ends it, once; in a forked child, which has neither threads nor group, does nothing."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        if self.relay is not None:
            self.relay.stop()
        self.wave.stop()
        self.watch.stop()
        if unlink:
            self.board.segment.unlink()
        self.board.segment.close()


def _start(settings: Settings, own_process: bool) -> _Running:
    """Opens sockets and board, and starts the threads; if anything fails, all is undone."""
    keys = server_keys(settings.curve_dir) if settings.curve_dir is not None and settings.needs_tcp else None
    with ExitStack() as undo:
        sockets = Sockets(keys)
        undo.callback(sockets.close)
        relay_sockets = None if settings.nodes == 1 else RelaySockets(settings, keys)
        if relay_sockets is not None:
            undo.callback(relay_sockets.close)
        segment, board, row = open_board(settings, sockets, relay_sockets)
        undo.callback(leave_board, segment)
        watch = WatchThread(board, row, round(settings.stall_timeout_s * 1e9))
        undo.callback(watch.stop)
        wave = WaveThread(settings, sockets, board, row, watch.mailbox, own_process=own_process)
        watch.round(time.monotonic_ns())  # a live group's verdicts are right before its peers hear of us
        relay = None
        if relay_sockets is not None:
            scale = partial(wave.scale, force=True)
            relay = Relay(board, row, relay_sockets, scale, own_process=own_process)
        watch.start()
        wave.start()
        if relay is not None:
            relay.start()
        undo.pop_all()
    return _Running(board, wave, watch, relay)
