"""A simulated front-end: one process that replays its share of the arrivals and times the replies.

Each request is sent at its own time, whether or not earlier ones were answered. Its time to first token counts
from the time when it was due, so a front-end that falls behind cannot improve the figures. When every request is
sent, the front-end waits for the outstanding ones. It gives up, and counts the rest as lost, only if for
``TIMEOUT_S`` no reply has come and no rank with requests has made a step. So a long queue is not a loss.
"""

from __future__ import annotations

import time
from math import floor

import msgspec
import zmq

from dpshm.board.words import queued
from dpshm.errors import DpshmError
from dpshm.frontend.route import Route
from dpshm.linux.processes import set_title
from dpshm.sim.demo.child import EndSignal, Lifeline, read_line, write_line
from dpshm.sim.demo.messages import (
    FrontendReport,
    FrontendSettings,
    Go,
    Progress,
    Ready,
    ReplyMessage,
    RequestMessage,
    engine_address,
    frontend_address,
)
from dpshm.sim.demo.router import make_router

TIMEOUT_S = 10.0
LOOK_S = 0.1
"""Interval at which it reports its progress and, at the end, checks that the engines still step."""


class SimFrontend:
    """One front-end: its router, its sockets, and its outstanding requests."""

    def __init__(self, settings: FrontendSettings, lifeline: EndSignal) -> None:
        self._settings = settings
        self._lifeline = lifeline
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ReplyMessage)
        self._out: dict[int, tuple[float, Route]] = {}  # by request id: when it was due, where it went
        self._report = FrontendReport(0, 0, 0, [], [])
        self._router = make_router(settings)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._replies = context.socket(zmq.PULL)
        self._replies.setsockopt(zmq.RCVHWM, 0)
        self._replies.bind(frontend_address(settings.prefix, settings.index))
        self._engines = [context.socket(zmq.PUSH) for _ in range(settings.dp_size)]
        for rank, socket in enumerate(self._engines):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 10)
            socket.connect(engine_address(settings.prefix, rank))
        self._poller = zmq.Poller()
        self._poller.register(self._replies, zmq.POLLIN)
        self._router.register(self._poller)
        lifeline.register(self._poller)

    def wait_until_able(self) -> None:
        """Waits until the front-end can decide; on the PUB path until a broadcast names all ranks."""
        while not self._router.receive_broadcasts() and not self._lifeline.ended():
            self._poller.poll()

    def run(self, start_ns: int) -> None:
        """Sends every arrival at its time and receives the replies, until all came or it gives up."""
        arrivals = self._settings.arrivals
        start_s = start_ns / 1e9
        next_id = 0
        next_look_s = patience_ends_s = start_s
        last_sign: object = None
        while not self._lifeline.ended():
            now_s = time.monotonic()
            while next_id < len(arrivals) and start_s + arrivals[next_id][0] <= now_s:
                self._send(next_id, start_s + arrivals[next_id][0])
                next_id += 1
            self._receive_replies()
            if next_id == len(arrivals) and not self._out:
                return
            now_s = time.monotonic()
            if now_s >= next_look_s:
                next_look_s = now_s + LOOK_S
                write_line(Progress(self._report.sent, self._answered))
                if next_id < len(arrivals) or (sign := self._sign_of_life()) != last_sign:
                    patience_ends_s = now_s + TIMEOUT_S
                    last_sign = None if next_id < len(arrivals) else sign
                elif now_s > patience_ends_s:
                    return
            due_s = start_s + arrivals[next_id][0] if next_id < len(arrivals) else next_look_s
            self._sleep(min(due_s, next_look_s) - now_s)

    def _sleep(self, seconds: float) -> None:
        """Waits until that time, or until a message comes."""
        if seconds >= 1e-3:
            self._poller.poll(floor(seconds * 1e3))
        elif seconds > 0:
            time.sleep(seconds)  # a poller counts whole milliseconds

    @property
    def _answered(self) -> int:
        return self._report.completed + self._report.refused

    def _send(self, request_id: int, due_s: float) -> None:
        _, prompt_tokens, output_tokens, blocks = self._settings.arrivals[request_id]
        self._report.sent += 1
        try:
            route = self._router.route(prompt_tokens, blocks)
        except DpshmError:
            return  # no engine accepts it: it counts as lost, because it was sent and never answered
        self._out[request_id] = (due_s, route)
        message = RequestMessage.of(
            *(request_id, self._router.frontend.index, route, output_tokens),
            blocks=blocks,
            reply_to=self._settings.index,
        )
        self._engines[route.dp_rank].send(self._encoder.encode(message))

    def _receive_replies(self) -> None:
        self._router.receive_broadcasts()
        while True:
            try:
                reply = self._decoder.decode(self._replies.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.MsgspecError:
                continue
            now_s = time.monotonic()
            for request_id, queue_s in zip(reply.first, reply.queue_s, strict=False):
                if request_id in self._out:
                    due_s, route = self._out[request_id]
                    self._report.ttft_ms.append((now_s - due_s) * 1e3)
                    route.first_token(queue_s)
            self._report.completed += sum(map(self._end, reply.completed))
            self._report.refused += sum(map(self._end, reply.refused))

    def _end(self, request_id: int) -> bool:
        if request_id not in self._out:
            return False
        output_tokens = self._settings.arrivals[request_id][2]
        self._router.done(self._out.pop(request_id)[1], output_tokens)
        return True

    def _sign_of_life(self) -> object:
        """A value that changes as long as an outstanding request may still be answered."""
        board, n = self._router.frontend.board, self._settings.dp_size
        loads, progress = board.load[:n].tolist(), board.progress[:n].tolist()
        return self._answered, [p for load, p in zip(loads, progress, strict=True) if queued(load)]

    def close(self) -> FrontendReport:
        """Leaves the group; returns the report."""
        self._report.staleness_us = self._router.staleness_us
        self._router.close()
        return self._report


def main() -> None:
    """The front-end's process."""
    settings = read_line(FrontendSettings)
    lifeline = Lifeline(settings.parent_pid)
    set_title(f"dpshm:front{settings.index}")
    frontend = SimFrontend(settings, lifeline)
    try:
        frontend.wait_until_able()
        write_line(Ready())
        frontend.run(read_line(Go).start_ns)
    finally:
        write_line(frontend.close())
        zmq.Context.instance().destroy(linger=0)
