"""The ends of the broadcast: the sockets and messages of vLLM's engines and API servers.

Two costs of vLLM's own ends are left out, which favours the broadcast: the hop from an engine's step loop to its
output thread, and the asyncio loop of an API server between the socket and its copy of the counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import zmq

from bench.baselines import Spec
from dpshm.net import wire
from tests.stock_wire import encode_stats

_decode, _encode = msgspec.msgpack.decode, msgspec.msgpack.encode


class Addresses(NamedTuple):
    """The coordinator's addresses: for front-ends, for engines' input, for engines' output."""

    frontends: str
    engine_input: str
    engine_output: str


class StockEngine:
    """An engine's end: XSUB for READY and START, PUSH for its reports."""

    def __init__(self, spec: Spec, dp_rank: int) -> None:
        self._rank = dp_rank
        self._wave, self._runs = 0, False
        self._context: zmq.Context[Any] = zmq.Context()
        self._input, self._output = self._context.socket(zmq.XSUB), self._context.socket(zmq.PUSH)
        self._output.sndhwm = 0  # as vLLM sets it: an engine never waits for the coordinator
        self._input.connect(spec.where.engine_input)
        self._output.connect(spec.where.engine_output)
        self._input.send(wire.SUBSCRIBE)
        if not self._input.poll(30_000):
            raise TimeoutError(f"no READY for engine {dp_rank}: are there {spec.dp_size} of them?")
        self._input.recv()

    def publish(self, waiting: int, running: int) -> None:
        stats = wire.SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting)
        self._output.send(encode_stats(self._rank, stats, timestamp=time.monotonic()))

    def wait_ready(self) -> None:
        """Does nothing: READY has come already."""

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self._input, zmq.POLLIN)

    def receive_start(self) -> bool:
        if self._input.poll(0):
            frames = self._input.recv_multipart()
            if frames[0] == wire.START_FRAME:
                wave, exclude = _decode(frames[1])
                if exclude != self._rank and wave >= self._wave and not self._runs:
                    self._wave, self._runs = wave, True
                    if self._rank == 0:
                        self._output.send(wire.encode_wave_started(0, wave))
        return self._runs

    def accept_request(self, wave: int) -> None:
        """Marks the rank as running without START. A START that follows is handled as usual."""

    def wave_complete(self) -> None:
        if self._rank == 0:
            self._output.send(wire.encode_wave_complete(0, self._wave))
        self._wave, self._runs = self._wave + 1, False

    def close(self) -> None:
        self._context.destroy(linger=0)


class StockFrontend:
    """A front-end's end: the copy of the counts, and vLLM 0.32's choice from it, in code of our own."""

    def __init__(self, spec: Spec, index: int) -> None:
        n = spec.dp_size
        self.index = index
        self._count = spec.num_frontends
        self._start = n * index // self._count
        self._counts: list[list[Any]] = [[0, 0, 0.0] for _ in range(n)]
        self._own = [0] * n
        self._wave, self._running, self._woken_wave = 0, False, -1
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.XSUB)
        self._socket.connect(spec.where.frontends)
        self._socket.send(wire.SUBSCRIBE)

    def _receive_counts(self) -> None:
        newest = None
        while True:
            try:
                newest = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
        if newest is not None:  # vLLM's API servers skip all but the newest, too
            counts, self._wave, self._running = _decode(newest)
            if counts is not None:
                self._counts = counts

    def known(self) -> list[list[Any]]:
        self._receive_counts()
        return self._counts

    def waiting(self, item: Any) -> int:
        return int(item[0])

    def wait(self, timeout_ms: int) -> None:
        deadline = time.monotonic() + timeout_ms / 1e3
        self._receive_counts()
        while (left := deadline - time.monotonic()) > 0:
            if self._socket.poll(max(1, round(left * 1e3))):
                self._receive_counts()

    def sockets(self) -> list[Any]:
        return [self._socket]

    def beliefs(self) -> tuple[list[int], list[int]]:
        # Its own increments of the copy replace bookings, until the next broadcast overwrites them.
        there = [waiting + running for waiting, running, _ in self._counts]
        return there, there

    def choose(self) -> int:
        # The choice reads the present copy: in an API server another task receives the broadcasts.
        counts, own, frontends, n = self._counts, self._own, self._count, len(self._counts)
        best, least = 0, float("inf")
        for i in range(n):
            rank = (self._start + i) % n
            waiting, running, kv_cache_usage = counts[rank]
            score = max(frontends * own[rank], waiting + running)
            if waiting:
                score += 6 * waiting * max(0.0, kv_cache_usage - 0.5)
            if score < least:
                best, least = rank, score
        counts[best][0] += frontends  # the others are assumed to choose alike, until the next broadcast
        self._start = (self._start + 1) % n
        own[best] += 1
        return best

    def finished(self, dp_rank: int) -> None:
        self._own[dp_rank] -= 1

    def first_request(self, send: Callable[[int, int], None]) -> None:
        rank = self.choose()
        self._woken_wave = self._wave
        send(rank, self._wave)  # before the notice, as vLLM 0.32 does
        # vLLM 0.32 names the engine by its identity, two bytes, which no engine compares equal to its number: so
        # no engine is excluded, and the engine that gets the request is woken like the others.
        self._socket.send(_encode((rank.to_bytes(2, "little"), self._wave)))
        self.finished(rank)

    def paused(self) -> bool:
        self._receive_counts()
        return not self._running and self._wave > self._woken_wave

    def close(self) -> None:
        self._context.destroy(linger=0)
