"""An engine's handle: publishes its load, counts what it receives, and takes part in the waves.

No call here waits for another process: messages to the coordinator go through a socket that drops what it cannot
accept, and the board tells what a lost message said (`dpshm.rules.waves`). An engine that starts locks its rank's
row (`dpshm.engine.row`) and begins in the wave of the control word.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import index
from typing import Any, Self

import zmq

from dpshm.board.board import Board
from dpshm.board.words import unpack_control
from dpshm.engine.row import EngineRow
from dpshm.errors import SettingError, WireError
from dpshm.net import wire
from dpshm.net.context import context
from dpshm.net.doorbell import DoorbellClient, open_doorbell
from dpshm.net.keys import Folder, connect, keys_for
from dpshm.rules.waves import (
    AllIdle,
    AllPaused,
    Attached,
    EngineEvent,
    EngineState,
    RequestArrived,
    Resumed,
    SendWaveCompleted,
    StartReceived,
    handle_engine,
)

logger = logging.getLogger(__name__)

_POLLIN, _NOBLOCK = int(zmq.POLLIN), int(zmq.NOBLOCK)  # as ints: an enumeration's `&` costs a microsecond


class Engine(EngineRow):
    """A rank's row of the board and its link to the coordinator. Belongs to the thread that made it.

    Attributes:
        dp_rank: the rank.
        board: the board, to read more of it.
        socket: readable when the coordinator sent a message; then call `poll`.
        bell: a file descriptor, readable when a front-end wakes this rank (`dpshm.net.doorbell`); then call
            `poll`.
            None if it cannot be opened, in a group without waves, and on another node than the group's.
        ready: whether the coordinator has said that all ranks are attached.
    """

    def __init__(self, board: Board, dp_rank: int, *, curve_dir: Folder | None = None) -> None:
        header = board.segment.header
        keys = keys_for(header, curve_dir)
        super().__init__(board, dp_rank)
        self.ready = False
        self._received_before = self._all_requests  # by the row's previous holders
        self._received_of_stock = 0
        self._state = EngineState()

        self.socket = context().socket(zmq.SUB)
        self._output = context().socket(zmq.PUSH)
        for s in (self.socket, self._output):
            s.linger = 0
            s.reconnect_ivl = 50
            s.maxmsgsize = wire.MAX_MESSAGE_BYTES
        connect(self.socket, header.engine_input_address, keys)
        self.socket.subscribe(wire.encode_name(dp_rank))
        self.socket.subscribe(b"")
        connect(self._output, header.engine_output_address, keys)
        rings = header.waves and board.segment.linked
        self._doorbell = open_doorbell(board.segment.sockets_path, dp_rank) if rings else None
        self._bells: DoorbellClient | None = None  # of the other ranks
        self.bell = None if self._doorbell is None else self._doorbell.socket.fileno()
        self._poller = zmq.Poller()  # made once: making one costs more than handling a START
        self.register(self._poller)
        self._handle(Attached(unpack_control(board.words[board.index("control")])[0]))

    @classmethod
    def attach(
        cls,
        group: str,
        dp_rank: int,
        *,
        timeout_s: float = 0.0,
        curve_dir: Folder | None = None,
        **options: Any,
    ) -> Self:
        """Takes the row of a rank; returns once a living coordinator has marked it alive.

        Attach late: in the process and the thread that run the scheduler, after any fork.

        Args:
            group: the group's name.
            dp_rank: the rank.
            timeout_s: how long to wait for the group, if its coordinator has not started yet, and until it has
                this rank, if it will be scaled.
            curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's
                ``DPSHM_CURVE_DIR``.
            options: of a subclass's constructor.

        Raises:
            SegmentNotFound: there is no such group on this node, or there was none within `timeout_s`.
            RowInUse: a live process has that rank.
            CapacityExceeded: the segment has no such row.
            SettingError: the group has fewer ranks, and was not scaled within `timeout_s`; or its keys are needed.
        """
        return super().attach(group, dp_rank, timeout_s=timeout_s, curve_dir=curve_dir, **options)

    @property
    def wave(self) -> int:
        """The wave that this rank is in."""
        return self._state.wave

    @property
    def running(self) -> bool:
        """Whether this rank steps, with work or to keep step with the others."""
        return self._state.running

    @property
    def paused(self) -> bool:
        """Whether the user paused this rank."""
        return self._state.paused

    def receive(self, stamp: Sequence[int] | int | None, prompt_tokens: int = 0, wave: int = 0) -> None:
        """Counts a request that came in, also a refused one. The next `publish` must count it in the queue.

        Args:
            stamp: what came with the request (`Route.stamp`). Where your messages have fields of their own for its
                three numbers: the front-end's index, with the other two as arguments. None: its sender has no row
                (a stock front-end).
            prompt_tokens: as the front-end booked them; not with a whole stamp.
            wave: in which it was sent; not with a whole stamp.

        Raises:
            SettingError: this is no stamp, or there is no such front-end row. Nothing was counted.
        """
        self._check()
        frontend: int | None
        if stamp is None or stamp.__class__ is int:
            frontend = stamp
        elif isinstance(stamp, (tuple, list)):
            frontend, prompt_tokens, wave = stamp if len(stamp) == 3 else _unpack(stamp)
            if not (frontend.__class__ is int is prompt_tokens.__class__ and wave.__class__ is int):
                frontend, prompt_tokens, wave = _unpack(stamp)
        else:
            frontend = index(stamp)  # type: ignore[arg-type]
        if wave.__class__ is not int:
            wave = index(wave)
        frontend, prompt_tokens = self._check_received(frontend, prompt_tokens)
        if wave > self._state.wave or not self._state.running:
            self._handle(RequestArrived(wave))
        # Counted last, so that a call that raises, also from a signal handler, has counted nothing.
        if frontend is not None:
            self._count_received(frontend, prompt_tokens)
        else:
            self._received_of_stock += 1

    def finished(self, requests: int = 1) -> None:
        """Counts requests that ended.

        Raises:
            SettingError: fewer were received and have not ended. Nothing was counted.
        """
        self._check()
        requests = index(requests)
        received = self._all_requests - self._received_before + self._received_of_stock
        if not 0 <= requests <= received - self._finished:
            raise SettingError(
                f"finished({requests}), and {received - self._finished} requests are unfinished: {received} were "
                f"received, {self._finished} have ended. Call receive() for each request that comes in, and "
                "finished() once for each that ended"
            )
        super().finished(requests)

    def register(self, poller: zmq.Poller) -> None:
        """Registers `socket` and `bell` in a poller, so that it returns when `poll` has a message to handle."""
        poller.register(self.socket, zmq.POLLIN)
        if self.bell is not None:
            poller.register(self.bell, zmq.POLLIN)

    def poll(self, timeout_ms: int = 0) -> bool:
        """Handles messages for this rank; waits up to `timeout_ms` for the first; returns `running`."""
        self._check()
        if timeout_ms:
            self._poller.poll(timeout_ms)
        if self._doorbell is not None:
            slept = not self.running
            for start in self._doorbell.drain():
                self._handle_message([wire.START_FRAME, start])
            if slept and self.running:
                return True  # at once: what the coordinator sent can wait
        while True:
            try:
                frames = self.socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                break
            self._handle_message(frames)
            if not int(self.socket.getsockopt(zmq.EVENTS)) & _POLLIN:
                break
        return self._state.running

    def wave_complete(self) -> None:
        """Ends the wave: an all-reduce said that no rank has work. Every rank calls this at the same step.

        Run the all-reduce every few steps (vLLM: every 16th, up to 0.28 every 32nd), not at each. A restarted rank
        may run in an old wave; it receives the START that corrects it only between two all-reduces.
        """
        self._check()
        self._restore_bell()  # before it is needed
        self._handle(AllIdle())

    def pause(self) -> None:
        """Pauses the rank, after an all-reduce said that the user asked every rank to pause.

        Every rank calls this at the same step. A pause that only some ranks were asked for counts as work in the
        all-reduce and keeps all stepping.
        """
        self._check()
        self._handle(AllPaused())

    def resume(self, has_work: bool) -> None:
        """Resumes: the user resumed all ranks. Call it past a barrier over them.

        Args:
            has_work: whether *any* rank has work, the same on all.
        """
        self._check()
        self._handle(Resumed(has_work))

    def close(self) -> None:
        """Leaves the group: the row is free for another process."""
        if self._segment.usable:
            self._check()
            if self._doorbell is not None:
                self._doorbell.close()
            if self._bells is not None:
                self._bells.close()
            self.socket.close()
            self._output.close()
        super().close()

    def _restore_bell(self) -> None:
        """Binds the doorbell again if its path was removed, or could not be bound before."""
        segment = self._segment
        if not segment.header.waves or not segment.linked:
            return
        try:
            if self._doorbell is not None:
                self._doorbell.restore()
            elif (doorbell := open_doorbell(segment.sockets_path, self.dp_rank)) is not None:
                self._doorbell, self.bell = doorbell, doorbell.socket.fileno()
                self._poller.register(self.bell, zmq.POLLIN)
        except OSError as e:
            logger.warning("rank %d has no doorbell and wakes up a little later: %s", self.dp_rank, e)

    def _handle_message(self, frames: list[bytes]) -> None:
        try:
            match frames:
                case [wire.START_FRAME, payload]:
                    start = wire.decode_start(payload)
                    self._handle(StartReceived(start.wave, start.exclude))
                case [wire.READY]:
                    self.ready = True
                    self._restore_bell()  # the coordinator may have made the sockets' folder again
                case _:
                    raise WireError(f"not from a coordinator: {len(frames)} frames, the first {frames[0]!r:.20}")
        except WireError as e:
            logger.warning("dropped a message: %s", e)

    def _ring(self, wave: int) -> None:
        """Wakes the other ranks: no coordinator may be running, and the front-end's view may have been old."""
        if self._doorbell is None or not self._segment.linked:
            return
        try:
            if self._bells is None:
                self._bells = DoorbellClient(self._segment.sockets_path, self.board.dp_size)
            self._bells.expect(self.board.dp_size)
            self._bells.ring(wave, leave_out=self.dp_rank)
        except OSError as e:  # no descriptor for a socket
            logger.warning("could not ring the other ranks: %s; the coordinator will wake them", e)

    def _handle(self, event: EngineEvent) -> None:
        self._state, commands = handle_engine(self._state, event, self.dp_rank)
        wave, running, paused = self._state
        # The row comes before the message, so that the receiver finds the board in agreement with it.
        self.show(wave, running=running, paused=paused)
        for command in commands:
            encode = (
                wire.encode_wave_complete if isinstance(command, SendWaveCompleted) else wire.encode_wave_started
            )
            if isinstance(event, RequestArrived):
                self._ring(wave)
            try:
                self._output.send(encode(self.dp_rank, command.wave), zmq.NOBLOCK)
            except zmq.ZMQError as e:
                logger.warning("could not send to the coordinator: %s; it will see the change on the board", e)


def _unpack(stamp: Sequence[int]) -> tuple[int, int, int]:
    try:
        frontend, prompt_tokens, wave = map(index, stamp)
    except (TypeError, ValueError):
        raise SettingError(f"{stamp!r:.80} is no stamp: send route.stamp with the request") from None
    return frontend, prompt_tokens, wave
