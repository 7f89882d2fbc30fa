"""Traffic between nodes of which each has a board: front-ends of both send to ranks of both.

A front-end keeps requests open at ranks that its policy chooses from its own node's board. All the time it checks
of each rank on that board: what its row has in the queue and what it has finished are what its row has received.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from typing import Any, NamedTuple

import zmq

from dpshm import Board, Engine, Frontend
from dpshm.board.words import KV_ONE, queued
from tests.nodes.traffic import CHECK_S, STAMPS, TOKENS
from tests.support import in_flight, outstanding

WINDOW = 64
"""Requests that a front-end has open at once."""
SUSPECTS = 3
"""So many readings of a row in succession must be wrong."""


class Told(NamedTuple):
    """What `Caller.run` saw.

    Attributes:
        sent: requests that were answered.
        ranks: how many of them at each rank.
        checked: how often a row was read whole.
        wrong: where a sum did not hold: (rank, queued, finished, received).
        slowest_ms: CPU time of the longest decision, without what Python's garbage collector took during it.
    """

    sent: int
    ranks: list[int]
    checked: int
    wrong: list[tuple[int, int, int, int]]
    slowest_ms: float


def socket(kind: int, address: str = "tcp://127.0.0.1:*", *, bind: bool = False) -> Any:
    """A socket with room for all that is sent."""
    s: Any = zmq.Context.instance().socket(kind)
    s.linger, s.sndhwm, s.rcvhwm = 0, 0, 0
    s.bind(address) if bind else s.connect(address)
    return s


def serve(engine: Engine, requests: Any, answers: dict[int, Any], told: Any) -> None:
    """An engine's loop: takes in, runs what it took in at the last turn, and answers.

    Args:
        engine: on the node of its board.
        requests: the socket on which front-ends send "front-end number".
        answers: by front-end, the socket on which numbers of finished requests go.
        told: whether to end.
    """
    waiting: Counter[int] = Counter()
    running: Counter[int] = Counter()
    total = 0
    while not told():
        requests.poll(20 if not running else 0)
        while requests.get(zmq.EVENTS) & zmq.POLLIN:
            f, number = map(int, requests.recv().split())
            for _ in range(number):
                engine.receive(f, TOKENS)
            waiting[f] += number
        if not waiting and not running:
            continue
        finished, running, waiting = running, waiting, Counter()
        if count := finished.total():
            engine.finished(count)
            total += count
        engine.publish(waiting=0, running=running.total(), kv_cache_usage=total % STAMPS / KV_ONE)
        for f, number in finished.items():
            answers[f].send(b"%d %d" % (engine.dp_rank, number))


class Collector:
    """CPU time that this thread has spent in Python's garbage collector since this was made.

    Attributes:
        spent_s: in seconds.
    """

    def __init__(self) -> None:
        self.spent_s = self._began = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.spent_s += time.thread_time() - self._began


class Caller:
    """A front-end that keeps `WINDOW` requests open.

    Args:
        frontend: of its node's board.
        requests: by rank, the socket to it.
        answers: the socket on which ranks answer "rank number".
    """

    def __init__(self, frontend: Frontend, requests: list[Any], answers: Any) -> None:
        self._frontend, self._requests, self._answers = frontend, requests, answers
        self._open: list[deque[Any]] = [deque() for _ in requests]
        self._ranks = [0] * len(requests)
        self._begun = self._ended = self._checked = 0
        self._wrong: list[tuple[int, int, int, int]] = []
        # A row may be read while its writer stands between its sums and its load, and look whole: one reading in
        # 1,000 of a remote rank does. Three in succession, each of another moment, may not. A request that is lost
        # or counted twice stays so, and is in all of them.
        self._suspects: list[list[tuple[int, int, int, int]]] = [[] for _ in requests]
        self._next_check = self._slowest_s = 0.0
        self._collector = Collector()

    def run(self, number: int, told: Any) -> Told:
        """Sends so many requests, or until it is told to end."""
        while self._ended < number and not told():
            self._send(min(number, self._ended + WINDOW) - self._begun)
            if not self._take_answers():
                self._answers.poll(1)
            self._check()
        slowest_ms = 1e3 * self._slowest_s
        return Told(self._ended, self._ranks, self._checked, self._wrong[:20], slowest_ms)

    def _send(self, number: int) -> None:
        counts: Counter[int] = Counter()
        for _ in range(number):
            collected = self._collector.spent_s
            began = time.thread_time()
            route = self._frontend.route(TOKENS, wake=False)
            took_s = time.thread_time() - began - (self._collector.spent_s - collected)
            self._slowest_s = max(self._slowest_s, took_s)
            self._open[route.dp_rank].append(route)
            counts[route.dp_rank] += 1
        for rank, count in counts.items():
            self._requests[rank].send(b"%d %d" % (self._frontend.index, count))
            self._ranks[rank] += count
        self._begun += max(0, number)

    def _take_answers(self) -> bool:
        before = self._ended
        while self._answers.get(zmq.EVENTS) & zmq.POLLIN:
            rank, number = map(int, self._answers.recv().split())
            for _ in range(number):
                self._open[rank].popleft().done()
            self._ended += number
        return self._ended > before

    def _check(self) -> None:
        if (now := time.monotonic()) < self._next_check:
            return
        self._next_check = now + CHECK_S
        for rank in range(len(self._requests)):
            if (seen := read_row(self._frontend.board, rank)) is not None:
                self._checked += 1
                suspects = self._suspects[rank]
                if seen[1] + seen[2] == seen[3]:
                    suspects.clear()
                elif not suspects or suspects[-1] != seen:
                    suspects.append(seen)
                    if len(suspects) >= SUSPECTS:
                        self._wrong.append(seen)


def read_row(board: Board, rank: int) -> tuple[int, int, int, int] | None:
    """(rank, queued, finished, received) of one row; None if its words are not of one publication."""
    load, finished, offset = (
        int(board.load[rank]),
        int(board.requests_finished[rank]),
        int(board.request_offset[rank]),
    )
    received = int(board.received_requests[rank].sum())
    whole = load & KV_ONE == finished % STAMPS and offset == queued(load) - received
    return (rank, queued(load), finished, received) if whole else None


def left_over(board: Board) -> tuple[int, int, int, int]:
    """Of all ranks: outstanding requests and tokens, and what pairs have in flight, of both. Below 0 counts."""
    requests, tokens = abs(outstanding(board)).sum(1).tolist()
    return requests, tokens, *abs(in_flight(board)).sum((1, 2)).tolist()


def received_here(board: Board, ranks: list[int]) -> tuple[int, int]:
    """Requests and tokens that these ranks have received."""
    return int(board.received_requests[ranks].sum()), int(board.received_tokens[ranks].sum())
