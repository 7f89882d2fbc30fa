"""A simulated front-end: one process that replays its share of the arrivals and times the replies.

Each request is sent at its own time, whether or not earlier ones were answered. Its time to first token counts
from the time when it was due, so a front-end that falls behind cannot improve the figures. When every request is
sent, the front-end waits for the outstanding ones. It gives up, and counts the rest as lost, only if for
``TIMEOUT_S`` no reply has come and no rank with requests has made a step. So a long queue is not a loss.
"""

from __future__ import annotations

import time
from math import floor, inf

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
        # By request id: when it was due, where it went, and the process that had that rank.
        self._out: dict[int, tuple[float, Route, int]] = {}
        self._homeless: dict[int, float] = {}  # by request id when it was due: no rank took it
        self._report = FrontendReport(0, 0, 0, [], [])
        self._start_s = 0.0
        self._router = make_router(settings)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._replies = context.socket(zmq.PULL)
        self._replies.setsockopt(zmq.RCVHWM, 0)
        self._replies.bind(frontend_address(settings.prefix, settings.index))
        self._engines = [context.socket(zmq.PUSH) for _ in range(settings.dp_size)]
        for rank, socket in enumerate(self._engines):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 10)
            socket.setsockopt(zmq.IMMEDIATE, int(settings.retries))  # nothing is kept for a rank that died
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
        self._start_s = start_s = start_ns / 1e9
        next_id = self._settings.first_id
        next_look_s = patience_ends_s = start_s
        last_sign: object = None
        while not self._lifeline.ended():
            now_s = time.monotonic()
            while (due_s := self._due_s(next_id)) <= now_s:
                self._report.sent += 1
                self._send(next_id, due_s)
                next_id += 1
            self._receive_replies()
            if due_s == inf and not self._out and not self._homeless:
                return
            now_s = time.monotonic()
            if now_s >= next_look_s:
                next_look_s = now_s + LOOK_S
                write_line(Progress(self._report.sent, self._answered))
                if self._settings.retries:
                    self._send_again()
                if due_s < inf or (sign := self._sign_of_life()) != last_sign:
                    patience_ends_s = now_s + TIMEOUT_S
                    last_sign = None if due_s < inf else sign
                elif now_s > patience_ends_s:
                    return
            self._sleep(min(self._due_s(next_id), next_look_s) - now_s)

    def _sleep(self, seconds: float) -> None:
        """Waits until that time, or until a message comes."""
        if seconds >= 1e-3:
            self._poller.poll(floor(seconds * 1e3))
        elif seconds > 0:
            time.sleep(seconds)  # a poller counts whole milliseconds

    @property
    def _answered(self) -> int:
        return self._report.completed + self._report.refused

    def _due_s(self, request_id: int) -> float:
        """When a request is due (CLOCK_MONOTONIC); infinity if there is none of that number."""
        arrivals, repeat_s = self._settings.arrivals, self._settings.repeat_s
        turn, at = divmod(request_id - self._settings.first_id, max(1, len(arrivals)))
        if not arrivals or (turn and not repeat_s):
            return inf
        return self._start_s + turn * repeat_s + arrivals[at][0]

    def _arrival(self, request_id: int) -> tuple[float, int, int, tuple[int, ...]]:
        arrivals = self._settings.arrivals
        return arrivals[(request_id - self._settings.first_id) % len(arrivals)]

    def _send(self, request_id: int, due_s: float) -> None:
        _, prompt_tokens, output_tokens, blocks = self._arrival(request_id)
        try:
            route = self._router.route(prompt_tokens, blocks)
        except DpshmError:
            # No engine accepts it. Without retries it counts as lost: it was sent and never answered.
            if self._settings.retries:
                self._homeless[request_id] = due_s
            return
        message = RequestMessage.of(
            *(request_id, self._router.frontend.index, route, output_tokens),
            blocks=blocks,
            reply_to=self._settings.index,
        )
        incarnation = int(self._router.frontend.board.engine_incarnation[route.dp_rank])
        try:
            self._engines[route.dp_rank].send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the rank died, and the board does not tell it yet
            route.cancel()
            self._homeless[request_id] = due_s
            return
        self._out[request_id] = (due_s, route, incarnation)

    def _send_again(self) -> None:
        """Sends the requests whose rank died, or that no rank took, to others."""
        board = self._router.frontend.board
        there = {
            rank: int(board.engine_incarnation[rank])
            for rank in {route.dp_rank for _, route, _ in self._out.values()}
            if board.engine_alive(rank)
        }
        for request_id, (due_s, route, incarnation) in list(self._out.items()):
            if there.get(route.dp_rank) != incarnation:
                del self._out[request_id]
                route.done()
                self._homeless[request_id] = due_s
        homeless, self._homeless = self._homeless, {}
        for request_id, due_s in homeless.items():
            self._send(request_id, due_s)

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
                    due_s, route, _ = self._out[request_id]
                    self._report.ttft_ms.append((now_s - due_s) * 1e3)
                    route.first_token(queue_s)
            self._report.completed += sum(map(self._end, reply.completed))
            self._report.refused += sum(map(self._end, reply.refused))

    def _end(self, request_id: int) -> bool:
        if request_id not in self._out:
            return False
        output_tokens = self._arrival(request_id)[2]
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
    report = None
    try:
        frontend.wait_until_able()
        write_line(Ready())
        frontend.run(read_line(Go).start_ns)
        report = frontend.close()
    finally:
        if report is None:
            frontend.close()  # after an error there is no report: the parent tells the error
        else:
            write_line(report)
        zmq.Context.instance().destroy(linger=0)
