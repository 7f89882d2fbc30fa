"""Traffic between nodes, and the one sum that must hold at each moment: nothing is lost and nothing is doubled.

A front-end on the board's node books requests and sends them; engines on another node receive, run and answer
them. Of each rank, and however late its row is:

    outstanding requests + requests that its row says have finished = requests that were booked

The same number on both sides means that no booking was erased by a row, and none counted twice.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import zmq

from dpshm import Board, Frontend
from dpshm.board.layout import REMOTE_WORDS
from dpshm.board.words import KV_ONE, queued
from dpshm.engine.remote import RemoteEngine
from tests.support import in_flight, outstanding

TOKENS = 10
WINDOW = 256
"""Requests that are open at once."""
BURST = 32
"""Requests that are sent before answers are taken."""
CHECK_S = 0.005
STAMPS = 1 << 15
_HEARD = REMOTE_WORDS.index("heard")


class Told(NamedTuple):
    """What `Sender.run` saw.

    Attributes:
        sent: requests that were answered.
        checked: how often the sum was read.
        wrong: where it did not hold: (rank, outstanding, finished, booked).
    """

    sent: int
    checked: int
    wrong: list[tuple[int, int, int, int]]


def serve(engine: RemoteEngine, requests: Any, answers: Any, frontend: int, told: Any) -> None:
    """An engine's loop: takes in, runs what it took in at the last turn, and answers.

    Args:
        engine: on another node than its board.
        requests: the socket on which numbers of new requests come.
        answers: the socket on which numbers of finished ones go.
        frontend: the row of the front-end that sends them.
        told: whether to end.
    """
    waiting = running = total = 0
    while not told():
        requests.poll(20 if not running else 0)
        while requests.get(zmq.EVENTS) & zmq.POLLIN:
            for _ in range(int(requests.recv())):
                engine.receive(frontend, TOKENS)
                waiting += 1
        if not waiting and not running:
            continue
        finished, running, waiting = running, waiting, 0
        if finished:
            engine.finished(finished)
            total += finished
        engine.publish(waiting=0, running=running, kv_cache_usage=total % STAMPS / KV_ONE)
        if finished:
            answers.send(str(finished).encode())


def sockets(kinds: tuple[int, int], addresses: tuple[str, str], *, bind: bool) -> tuple[Any, Any, tuple[str, str]]:
    """Two sockets, and the addresses at which they are bound."""
    context: zmq.Context[Any] = zmq.Context.instance()
    made = [context.socket(kind) for kind in kinds]
    for s, address in zip(made, addresses, strict=True):
        s.linger, s.sndhwm, s.rcvhwm = 0, 0, 0
        s.bind(address) if bind else s.connect(address)
    ends = [s.getsockopt_string(zmq.LAST_ENDPOINT) if bind else "" for s in made]
    return made[0], made[1], (ends[0], ends[1])


class Sender:
    """A front-end that keeps `WINDOW` requests open at ranks 0, 1, ..., and checks the sum all the time.

    Args:
        frontend: on the board's node.
        links: for each rank, sockets to and from it.
    """

    def __init__(self, frontend: Frontend, links: list[tuple[Any, Any]]) -> None:
        self._frontend, self._links = frontend, links
        self._open: list[deque[Any]] = [deque() for _ in links]
        self._begun = self._ended = self._checked = 0
        self._wrong: list[tuple[int, int, int, int]] = []
        self._next_check = 0.0

    def run(self, number: int, told: Any) -> Told:
        """Sends so many requests, or until it is told to end."""
        while self._ended < number and not told():
            sent = self._send(min(number - self._begun, WINDOW - sum(map(len, self._open)), BURST))
            if not self._take_answers() and not sent:
                self._links[self._ended % len(self._links)][1].poll(1)
            self._check()
        return Told(self._ended, self._checked, self._wrong[:20])

    def _send(self, number: int) -> bool:
        counts = [0] * len(self._links)
        for i in range(self._begun, self._begun + max(0, number)):
            rank = i % len(counts)
            self._open[rank].append(self._frontend.route(TOKENS, dp_rank=rank, wake=False))
            counts[rank] += 1
        for (requests, _), count in zip(self._links, counts, strict=True):
            if count:
                requests.send(str(count).encode())
        self._begun += sum(counts)
        return number > 0

    def _take_answers(self) -> bool:
        before = self._ended
        for (_, answers), routes in zip(self._links, self._open, strict=True):
            while answers.get(zmq.EVENTS) & zmq.POLLIN:
                for _ in range(int(answers.recv())):
                    routes.popleft().done()
                    self._ended += 1
        return self._ended > before

    def _check(self) -> None:
        if (now := time.monotonic()) < self._next_check:
            return
        self._next_check = now + CHECK_S
        for rank in range(len(self._links)):
            if (seen := read_sum(self._frontend, rank)) is not None:
                self._checked += 1
                if seen[1] + seen[2] != seen[3]:
                    self._wrong.append(seen)


def read_sum(frontend: Frontend, rank: int) -> tuple[int, int, int, int] | None:
    """(rank, outstanding, finished, booked) of one row at one moment.

    None if the row is being written, or its writer was killed there. Each word is whole, and so is what is
    outstanding; only this test compares several words. The writer stores when it heard of a publication first, and
    the same time as the beat last (`RemoteRows.report`), so a row whose beat, loaded first, is what was heard,
    loaded last, is of one publication. The engine stamps its load with what has finished, as a second sign.
    """
    board, f = frontend.board, frontend.index
    beat = int(board.beat[rank])
    sent, load = int(board.sent_requests[f, rank]), int(board.load[rank])
    offset, finished = int(board.request_offset[rank]), int(board.requests_finished[rank])
    received = int(board.received_requests[rank].sum())
    whole = load & KV_ONE == finished % STAMPS and offset == queued(load) - received
    if not whole or beat != int(board.remote_state[rank, _HEARD]):
        return None
    return rank, offset + sent, finished, sent


def left_over(board: Board) -> list[tuple[int, ...]]:
    """By rank: outstanding requests and tokens, and what was sent and not received, of both; signed."""
    return list(zip(*outstanding(board).tolist(), *in_flight(board).sum(2).tolist(), strict=True))
