"""A front-end of the soak: it sends as fast as answers come.

It calls a request lost when the engine incarnation that it went to is gone *and* no answer is in its own inbox.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import zmq

from dpshm import Frontend, NoEngineAvailable, Route
from tests.soak.ledger import NOT_STOCK, Ledger
from tests.soak.messages import BATCH, REFUSALS, REQUEST, engine_inbox, frontend_inbox, inbox

WINDOW = 8
"""How many requests a front-end has out at most."""
LOOK_INTERVAL_S = 0.02


class SoakFrontend:
    """One front-end's life."""

    def __init__(self, group: str, ledger: Ledger, slot: int, life: int) -> None:
        self._group, self._slot, self._life = group, slot, life
        self._frontend = Frontend.attach(group, owner=f"soak-{slot}")
        self._inbox = inbox(frontend_inbox(group, life))
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
        incarnation = self._incarnation(rank)
        message = REQUEST.pack(self._number, self._frontend.index, self._slot, self._life, 7, route.wave)
        self._count("attempted")
        self._count("sent", rank)  # first: a process killed in between has sent less than it says
        try:
            self._inbox.sendto(message, "\0" + engine_inbox(self._group, rank, incarnation))
        except REFUSALS:
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

    def _incarnation(self, rank: int) -> int:
        stock = self._ledger.stock(rank)
        return int(self._frontend.board.engine_incarnation[rank]) if stock == NOT_STOCK else stock

    def _gone(self, rank: int, incarnation: int) -> bool:
        if self._incarnation(rank) != incarnation:
            return True
        return self._ledger.stock(rank) == NOT_STOCK and not self._frontend.board.engine_alive(rank)

    def _give_up_the_lost(self) -> None:
        peers = {(rank, incarnation) for _, rank, incarnation in self._out.values()}
        gone = {peer for peer in peers if self._gone(*peer)}
        if not gone:
            return
        self._hear()  # its answers have arrived by now
        for number in [n for n, (_, *where) in self._out.items() if tuple(where) in gone]:
            route, rank, _ = self._out.pop(number)
            route.done()
            self._count("lost", rank)
