"""The pure PUB path of ``--stats pub``: load by broadcast instead of the board, for comparison.

Engines push every report to a broadcaster. It publishes all of them together, at most once every ``INTERVAL_S``
while they change. Each front-end decides from its last copy. As vLLM's API servers do, a front-end raises the
waiting count of the chosen rank by the number of front-ends, because it assumes that the others choose alike. The
next broadcast overwrites its copy.

This is the best case of that path. The broadcaster does nothing else, has the machine's fastest transport, and
sends when its 100 ms are over, even if more input waits. After a pause it waits ``GATHER_S`` for the reports of
all ranks, because ranks that step together report together.
"""

from __future__ import annotations

import time
from math import ceil
from typing import Annotated

import msgspec
import zmq

from dpshm.linux.processes import set_title
from dpshm.policies import Policy, Request, View
from dpshm.sim.demo.child import Lifeline, read_line, write_line
from dpshm.sim.demo.messages import BroadcastSettings, Ready, broadcast_address, reports_address

INTERVAL_S = 0.1
GATHER_S = 0.005

_Count = Annotated[int, msgspec.Meta(ge=0)]


class RankReport(msgspec.Struct, array_like=True, frozen=True):
    """An engine's report, stamped with the CLOCK_MONOTONIC time at which it was published."""

    dp_rank: _Count
    waiting: _Count
    running: _Count
    kv_cache_usage: float
    published_ns: _Count


class StatsSender:
    """The engine's side: pushes its reports."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], prefix: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(reports_address(prefix))
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, report: RankReport) -> None:
        """Pushes one report. A report that the broadcaster has no room for is dropped; the next one is newer."""
        try:
            self._socket.send(self._encoder.encode(report), zmq.NOBLOCK)
        except zmq.Again:
            return

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class Broadcaster:
    """The broadcaster's state: the newest report of each rank, and when to publish them.

    Pure: `update` adds a report, `due_in_s` tells the time until a broadcast is due, `broadcast` makes it.
    """

    def __init__(self, dp_size: int) -> None:
        self._reports = [RankReport(rank, 0, 0, 0.0, 0) for rank in range(dp_size)]
        self._changed_s: float | None = None  # when the first report since the last broadcast came
        self._last_s = float("-inf")

    def update(self, report: RankReport, now_s: float) -> None:
        """Adds a report. A report of a rank that does not exist is dropped."""
        if report.dp_rank < len(self._reports):
            self._reports[report.dp_rank] = report
            self._changed_s = now_s if self._changed_s is None else self._changed_s

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until the next broadcast, 0 if it is due; None while nothing has changed."""
        if self._changed_s is None:
            return None
        return max(0.0, self._changed_s + GATHER_S - now_s, self._last_s + INTERVAL_S - now_s)

    def broadcast(self, now_s: float) -> list[RankReport]:
        """The message to publish now."""
        self._changed_s = None
        self._last_s = now_s
        return self._reports


class StatsCopy:
    """The front-end's side: the copy of the load that its decisions use.

    Attributes:
        published_ns: by rank, when the report in the copy was published; 0 before the first broadcast.
    """

    def __init__(self, dp_size: int, num_frontends: int, index: int, policy: Policy) -> None:
        self._dp_size = dp_size
        self._num_frontends = num_frontends
        self._policy = policy
        self._turn = index  # front-ends start at different ranks, or they would break ties alike
        self._waiting = [0] * dp_size
        self._running = [0] * dp_size
        self._kv_cache_usage = [0.0] * dp_size
        self.published_ns = [0] * dp_size

    def update(self, reports: list[RankReport]) -> None:
        """Replaces the copy by a broadcast; the copy loses this front-end's own additions."""
        if len(reports) != self._dp_size:
            return
        self._waiting = [r.waiting for r in reports]
        self._running = [r.running for r in reports]
        self._kv_cache_usage = [r.kv_cache_usage for r in reports]
        self.published_ns = [r.published_ns for r in reports]

    def choose(self, request: Request, own: list[int]) -> int:
        """The rank for a request; raises the copy's count of it.

        Args:
            request: the request as the policy sees it.
            own: this front-end's unfinished requests, by rank.
        """
        n = self._dp_size
        self._turn += 1
        ranks = [(self._turn + i) % n for i in range(n)]
        view = View.of(
            *(self._waiting, self._running),
            kv_cache_usage=self._kv_cache_usage,
            own=own,
            ranks=ranks,
            num_frontends=self._num_frontends,
        )
        rank = self._policy(view, request)
        self._waiting[rank] += self._num_frontends
        return rank


broadcast_decoder = msgspec.msgpack.Decoder(list[RankReport])
_report_decoder = msgspec.msgpack.Decoder(RankReport)


def main() -> None:
    """The broadcaster's process."""
    settings = read_line(BroadcastSettings)
    lifeline = Lifeline(settings.parent_pid)
    set_title("dpshm:pub")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    reports, out = context.socket(zmq.PULL), context.socket(zmq.PUB)
    reports.bind(reports_address(settings.prefix))
    out.bind(broadcast_address(settings.prefix))
    poller = zmq.Poller()
    poller.register(reports, zmq.POLLIN)
    lifeline.register(poller)
    broadcaster = Broadcaster(settings.dp_size)
    write_line(Ready())
    while not lifeline.ended():
        due_in_s = broadcaster.due_in_s(time.monotonic())
        poller.poll(None if due_in_s is None else ceil(due_in_s * 1000))
        receive_reports(reports, broadcaster)
        if broadcaster.due_in_s(now_s := time.monotonic()) == 0:
            out.send(msgspec.msgpack.encode(broadcaster.broadcast(now_s)))
    context.destroy(linger=0)


def receive_reports(socket: zmq.Socket[bytes], broadcaster: Broadcaster, most: int = 256) -> None:
    """Receives waiting reports, a limited number at a time, so that a flood cannot delay a broadcast."""
    for _ in range(most):
        try:
            broadcaster.update(_report_decoder.decode(socket.recv(zmq.NOBLOCK)), time.monotonic())
        except zmq.Again:
            return
        except msgspec.MsgspecError:
            continue
