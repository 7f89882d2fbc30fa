"""Waits for sockets: for all of them, or, where only reports have come, in a way that costs a tenth.

ZMQ's own poll asks each socket. The descriptor of a socket becomes readable when something happens that the socket
has not seen yet, so it is enough to wait for the descriptors, as long as each socket has seen all before it. That
holds for the sockets that nobody used since ZMQ's own poll looked at them, and for one that was read until nothing
was left.
"""

from __future__ import annotations

import select
from collections.abc import Iterable

import zmq

from dpshm.net.context import Socket


class Waiting:
    """Waits for sockets and descriptors to be readable. Of one thread; opens no descriptor.

    Args:
        all_of_them: for which it waits.
        reports: the one of them on which reports come.
    """

    def __init__(self, all_of_them: Iterable[Socket | int], reports: Socket) -> None:
        self._poller, self._descriptors = zmq.Poller(), select.poll()
        for s in all_of_them:
            self._poller.register(s, zmq.POLLIN)
            self._descriptors.register(s if isinstance(s, int) else int(s.getsockopt(zmq.FD)), select.POLLIN)
        self._reports: dict[Socket | int, int] = {reports: zmq.POLLIN}
        self._reports_fd = int(reports.getsockopt(zmq.FD))

    def wait(self, timeout_ms: int, *, only_reports: bool = False) -> dict[Socket | int, int]:
        """What is readable, after `timeout_ms` at most; nothing, perhaps sooner, where a peer came or went.

        With `only_reports`, the socket of reports is told where a peer came or went, too: it may hold nothing, and
        it has to be read until it says so.

        Args:
            timeout_ms: the longest wait.
            only_reports: since the last call, no socket was used but that of reports, and nothing is left there.
        """
        if only_reports:
            readable = self._descriptors.poll(timeout_ms)
            if not readable:
                return {}
            if len(readable) == 1 and readable[0][0] == self._reports_fd:
                return self._reports
            timeout_ms = 0
        return dict(self._poller.poll(timeout_ms))
