"""The pure broadcast design: vLLM's coordinator of August 2025, with its rate limit and without.

    engines   --PUSH-->  coordinator process  --XPUB-->  every front-end
                         keeps the newest counts of each rank; publishes all of them, together with the
                         wave, at most every `interval_s` while they change, every 5 s otherwise

Wire and ends are vLLM's (`dpshm.net.wire`, `bench.baselines.stock`), so the same ends meet vLLM's own coordinator
in `bench.baselines.vllm`. Open choices favour the broadcast. The coordinator imports nothing of vLLM. It receives
all waiting messages before it reads the clock (vLLM: one message a turn). It sends when its interval is over, not
when its input has been silent for 50 ms. With ``interval_s = 0`` it sends each change at once, so no message can
be fresher.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from bench.baselines import Middle, Spec, Start, stock
from bench.processes import Line, Told, Worker
from dpshm.errors import WireError
from dpshm.net import wire

IDLE_REFRESH_S = 5.0
BATCH = 256

engine_end, frontend_end = stock.StockEngine, stock.StockFrontend


class Pub:
    """A coordinator process that publishes at most every `interval_s` seconds."""

    def __init__(self, interval_s: float, dp_size: int, num_frontends: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-pub-")
        addresses = stock.Addresses(*(f"ipc://{Path(self._folder.name) / name}" for name in ("f", "i", "o")))
        self._worker = Worker(serve, addresses, dp_size, interval_s)
        self._worker.wait_ready()
        self._worker.tell()
        self.spec = Spec("pub", dp_size, num_frontends, addresses)
        self.pids = [self._worker.pid]

    def close(self) -> None:
        """Ends it."""
        self._worker.tell()
        self._worker.close()
        self._folder.cleanup()


def start_every(interval_s: float) -> Start:
    """Returns a function that starts coordinators with that interval."""
    return partial(Pub, interval_s)


def start(dp_size: int, num_frontends: int) -> Middle:
    """Starts a coordinator with vLLM's interval, 100 ms."""
    return Pub(0.1, dp_size, num_frontends)


class Broadcaster:
    """The newest counts, the wave, and when to publish."""

    def __init__(self, frontends: Any, engines: Any, dp_size: int, interval_s: float) -> None:
        self._frontends, self._engines = frontends, engines
        self._counts: list[tuple[int, int, float]] = [(0, 0, 0.0)] * dp_size
        self._interval_s = interval_s
        self._changed = False
        self._published_s = 0.0
        self._wave, self._running = 0, False

    def due_in_ms(self) -> int:
        """Milliseconds until the next publication, rounded up."""
        wait_s = self._interval_s if self._changed else IDLE_REFRESH_S
        return max(0, -int(-(self._published_s + wait_s - time.monotonic()) * 1000 // 1))

    def on_time(self) -> None:
        """Publishes if the interval is over."""
        if self.due_in_ms() == 0:
            self._frontends.send(wire.encode_state(self._counts, self._wave, self._running))
            self._changed = False
            self._published_s = time.monotonic()

    def from_engine(self, data: bytes) -> None:
        message = wire.decode_engine_message(data)
        stats = message.scheduler_stats
        if stats is not None:
            self._counts[message.engine_index] = (
                stats.num_waiting_reqs,
                stats.num_running_reqs,
                stats.kv_cache_usage,
            )
            self._changed = True
        if message.wave_complete is not None and message.wave_complete >= self._wave:
            self._enter(message.wave_complete + 1, running=False)
        w = message.start_wave
        if w is not None and (w > self._wave or (w == self._wave and not self._running)):
            self._enter(w, running=True)
            self._engines.send_multipart(wire.encode_start(w, message.engine_index))

    def from_frontend(self, data: bytes) -> None:
        if data[:1] in (wire.SUBSCRIBE, wire.UNSUBSCRIBE):
            return
        message = wire.decode_frontend_message(data)
        if isinstance(message, wire.FirstRequestMessage) and not self._running:
            # No engine is excluded, as in dpshm and, in effect, in vLLM 0.32.
            self._engines.send_multipart(wire.encode_start(self._wave, None))

    def _enter(self, wave: int, *, running: bool) -> None:
        self._wave, self._running = wave, running
        self._frontends.send(wire.encode_state(None, wave, running))


def serve(line: Line, addresses: stock.Addresses, dp_size: int, interval_s: float) -> None:
    """The coordinator's process."""
    context: zmq.Context[Any] = zmq.Context()
    frontends, engines, reports = context.socket(zmq.XPUB), context.socket(zmq.XPUB), context.socket(zmq.PULL)
    engines.setsockopt(zmq.XPUB_VERBOSE, 1)  # gets a message for every engine, not only for the first
    reports.rcvhwm = 0  # as vLLM sets it: nothing is dropped on the way in
    for socket, address in zip((frontends, engines, reports), addresses, strict=True):
        socket.linger = 0
        socket.bind(address)
    broadcaster = Broadcaster(frontends, engines, dp_size, interval_s)
    take = {
        frontends: broadcaster.from_frontend,
        reports: broadcaster.from_engine,
        engines: lambda data: engines.send(wire.READY) if data == wire.SUBSCRIBE else None,
    }
    poller = zmq.Poller()
    for socket in take:
        poller.register(socket, zmq.POLLIN)
    poller.register(line.fileno(), zmq.POLLIN)
    try:
        line.ready()
        while True:
            events = dict(poller.poll(broadcaster.due_in_ms()))
            if line.fileno() in events:
                line.expect()
                break
            for socket, taker in take.items():
                if socket in events:
                    _drain(socket, taker)
            broadcaster.on_time()
    except Told:
        pass
    finally:
        context.destroy(linger=0)


def _drain(socket: Any, take: Any) -> None:
    for _ in range(BATCH):
        try:
            take(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return
        except WireError as e:
            os.write(2, f"bench pub: dropped {e}\n".encode())
