"""Doorbells between the lockstep ranks of one node: a rank that a request wakes up wakes the others itself.

vLLM's own way is through the coordinator: START goes to all ranks. A coordinator that is stopped sends none, and
the rank that got the request would wait in its first collective for ranks that sleep. So the rank also rings the
others (`dpshm.net.doorbell`), with the bytes of that START. A thread of each rank listens and puts what it hears
into the input queue, as vLLM's input thread does with START. vLLM's rules decide what follows: a rank that the
user paused, or that is past that wave, drops it.

The rank tells itself too. Up to vLLM 0.32 a rank that has a request is not marked as running, and would go back to
sleep if the request were aborted before its first step, while the others wait for it.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from dpshm.board.board import Board
from dpshm.errors import WireError
from dpshm.net import wire
from dpshm.net.doorbell import DoorbellClient, open_doorbell
from dpshm.vllm.log import logger


class Bells:
    """One rank's doorbell, the thread that listens to it, and a way to ring the others.

    Args:
        board: the group's.
        dp_rank: the rank.
        hear: called with a wave for which this rank is to wake up; in the listening thread, or in `ring`.
    """

    def __init__(self, board: Board, dp_rank: int, hear: Callable[[int], None]) -> None:
        self._board = board
        self._dp_rank = dp_rank
        self._hear = hear
        self._others = DoorbellClient(board.segment.sockets_path, board.dp_size)
        self._end_fd = -1
        self._bell = None
        try:
            self._bell = open_doorbell(board.segment.sockets_path, dp_rank)
            self._end_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._listen, name="dpshm-bell", daemon=True)
            self._thread.start()
        except BaseException:
            self._release()
            raise

    def ring(self, wave: int) -> None:
        """Wakes all ranks of this node for a wave, this one among them. Never waits."""
        if self._board.segment.linked:  # else the folder may be that of a new group of this name
            self._others.expect(self._board.dp_size)  # a rank that started later has a doorbell by now
            self._others.ring(wave, leave_out=self._dp_rank)
        self._hear(wave)

    def close(self) -> None:
        """Ends the thread and gives the sockets back."""
        os.eventfd_write(self._end_fd, 1)
        self._thread.join()
        self._release()

    def _release(self) -> None:
        if self._bell is not None:
            self._bell.close()
        if self._end_fd >= 0:
            os.close(self._end_fd)
        self._others.close()

    def _listen(self) -> None:
        bell = self._bell
        if bell is None:
            return  # a warning has said why
        poller = select.poll()
        poller.register(bell.socket, select.POLLIN)
        poller.register(self._end_fd, select.POLLIN)
        while self._end_fd not in dict(poller.poll()):
            for rung in bell.drain():
                try:
                    self._hear(wire.decode_start(rung).wave)
                except WireError as e:
                    logger.warning("dpshm: dropped what came through a doorbell: %s", e)
