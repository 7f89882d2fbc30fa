"""The programs of the soak's processes: front-ends send as fast as answers come, engines answer.

Requests and answers are Unix datagrams, which arrive or are refused at once, so it is always clear where one is:
what a process had in its inbox dies with it, and what it has sent is in its peer's inbox. A front-end calls a
request lost when the engine incarnation that it went to is gone *and* no answer is in its own inbox.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable

import zmq

from dpshm import Engine, Frontend, NoEngineAvailable, Route
from tests.soak.ledger import Ledger

WINDOW = 8
"""How many requests a front-end has out at most."""
BATCH = 64
LOOK_INTERVAL_S = 0.02
_REQUEST = struct.Struct("<6q")  # number, row, slot, life, prompt tokens, wave
_REFUSALS = (BlockingIOError, ConnectionRefusedError, FileNotFoundError)


def _inbox(name: str) -> socket.socket:
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    inbox.bind(f"\0{name}")
    return inbox


def engine_inbox(group: str, dp_rank: int, incarnation: int) -> str:
    """The name of an engine's inbox; a successor has another."""
    return f"{group}-engine-{dp_rank}-{incarnation}"


def frontend_inbox(group: str, life: int) -> str:
    """The name of a front-end's inbox."""
    return f"{group}-frontend-{life}"


class SoakFrontend:
    """One front-end's life."""

    def __init__(self, group: str, ledger: Ledger, slot: int, life: int) -> None:
        self._group, self._slot, self._life = group, slot, life
        self._frontend = Frontend.attach(group, owner=f"soak-{slot}")
        self._inbox = _inbox(frontend_inbox(group, life))
        self._out: dict[int, tuple[Route, int, int]] = {}  # by number: route, rank, incarnation
        self._number = 0
        self._ledger, self._words = ledger, ledger.words
        self._at = {name: ledger.at(life, name) for name in ("quiet", "attempted", "no_engine", "unexpected")}
        self._at |= {name: ledger.at(life, name) for name in ("sent", "refused", "completed", "lost")}
        self._words[ledger.at(life, "index")] = self._frontend.index

    def run(self, told: Callable[[], bool]) -> None:
        """Sends and hears until told to end."""
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        next_look = 0.0
        with self._frontend, self._inbox:
            while not told():
                paused = self._ledger.paused
                if not paused:
                    self._words[self._at["quiet"]] = 0
                    while len(self._out) < WINDOW and self._send():
                        pass
                elif not self._out:
                    self._words[self._at["quiet"]] = 1
                poller.poll(5)
                self._hear()
                if (now := time.monotonic()) >= next_look:
                    next_look = now + LOOK_INTERVAL_S
                    self._give_up_the_lost()

    def _count(self, name: str, peer: int = 0, by: int = 1) -> None:
        self._words[self._at[name] + peer] += by

    def _send(self) -> bool:
        try:
            route = self._frontend.route(7)
        except NoEngineAvailable:
            self._count("no_engine")
            return False
        self._number += 1
        rank = route.dp_rank
        incarnation = int(self._frontend.board.engine_incarnation[rank])
        message = _REQUEST.pack(self._number, self._frontend.index, self._slot, self._life, 7, route.wave)
        self._count("attempted")
        self._count("sent", rank)  # first: a process killed in between has sent less than it says
        try:
            self._inbox.sendto(message, "\0" + engine_inbox(self._group, rank, incarnation))
        except _REFUSALS:
            self._count("sent", rank, -1)
            self._count("refused", rank)
            route.cancel()
            return False
        self._out[self._number] = route, rank, incarnation
        return True

    def _hear(self) -> None:
        while True:
            try:
                answer = self._inbox.recv(8 * BATCH)
            except BlockingIOError:
                return
            for (number,) in struct.iter_unpack("<q", answer):
                if number not in self._out:
                    self._count("unexpected")
                    continue
                route, rank, _ = self._out.pop(number)
                route.done()
                self._count("completed", rank)

    def _give_up_the_lost(self) -> None:
        board = self._frontend.board
        gone = {
            (rank, incarnation)
            for rank, incarnation in {(rank, incarnation) for _, rank, incarnation in self._out.values()}
            if board.engine_incarnation[rank] != incarnation or not board.engine_alive(rank)
        }
        if not gone:
            return
        self._hear()  # its answers have arrived by now
        for number in [n for n, (_, *where) in self._out.items() if tuple(where) in gone]:
            route, rank, _ = self._out.pop(number)
            route.done()
            self._count("lost", rank)


class SoakEngine:
    """One engine's life."""

    def __init__(self, group: str, ledger: Ledger, dp_rank: int, life: int) -> None:
        self._group = group
        self._engine = Engine.attach(group, dp_rank)
        incarnation = int(self._engine.board.engine_incarnation[dp_rank])
        self._inbox = _inbox(engine_inbox(group, dp_rank, incarnation))
        self._words = ledger.words
        self._at = {name: ledger.at(life, name) for name in ("quiet", "finished", "undeliverable", "taken")}
        self._words[ledger.at(life, "index")] = incarnation
        self._queue: list[tuple[int, int]] = []  # (life of the front-end, number)
        self._answers: dict[int, list[int]] = defaultdict(list)
        self._steps = 0

    def run(self, told: Callable[[], bool]) -> None:
        """Takes requests in and answers them until told to end."""
        engine, words, at = self._engine, self._words, self._at
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        engine.register(poller)
        with engine, self._inbox:
            while not told():
                if not self._queue:
                    poller.poll(2 if self._answers else 20)
                engine.poll()
                self._take_in()
                self._publish()
                if self._queue:
                    self._step()
                elif engine.running:
                    engine.wave_complete()
                self._answer()
                words[at["quiet"]] = not self._queue and not self._answers and not engine.running

    def _publish(self) -> None:
        self._engine.publish(
            waiting=len(self._queue), running=0, prefill_backlog=7 * len(self._queue), step=self._steps
        )

    def _take_in(self) -> None:
        for _ in range(BATCH):
            try:
                request = self._inbox.recv(_REQUEST.size)
            except BlockingIOError:
                return
            number, row, slot, life, tokens, wave = _REQUEST.unpack(request)
            self._engine.receive(row, tokens, wave)
            self._queue.append((life, number))
            self._words[self._at["taken"] + slot] += 1

    def _step(self) -> None:
        """Computes the older half of the queue."""
        batch = self._queue[: (len(self._queue) + 1) // 2]
        with self._engine.step(prefill_tokens=7 * len(batch), batch=len(batch)):
            del self._queue[: len(batch)]
        self._steps += 1
        for life, number in batch:
            self._answers[life].append(number)
        self._engine.finished(len(batch))
        self._words[self._at["finished"]] += len(batch)
        self._publish()

    def _answer(self) -> None:
        for life, numbers in list(self._answers.items()):
            try:
                self._inbox.sendto(
                    struct.pack(f"<{len(numbers[:BATCH])}q", *numbers[:BATCH]),
                    "\0" + frontend_inbox(self._group, life),
                )
            except BlockingIOError:
                continue  # its inbox is full; it is busy, or stopped
            except _REFUSALS:
                self._words[self._at["undeliverable"]] += len(numbers)
                numbers.clear()
            del numbers[:BATCH]
            if not numbers:
                del self._answers[life]


ROLES: dict[str, Callable[..., SoakEngine | SoakFrontend]] = {"engine": SoakEngine, "front-end": SoakFrontend}


def run(role: str, told: Callable[[], bool], *, group: str, ledger: str, peers: int, slot: int, life: int) -> None:
    """A process's whole life."""
    ROLES[role](group, Ledger(ledger, peers), slot, life).run(told)
