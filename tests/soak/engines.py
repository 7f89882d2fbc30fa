"""The engines of the soak: they answer what comes. One uses dpshm, the other speaks vLLM's messages alone."""

from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable

import zmq

from dpshm import Board, Engine
from dpshm.net import wire
from tests.soak.ledger import Ledger
from tests.soak.messages import BATCH, REFUSALS, REQUEST, engine_inbox, frontend_inbox, inbox
from tests.support import StockEngine


class AnsweringEngine(ABC):
    """One engine's life, but for how it tells others of its work."""

    def __init__(self, group: str, ledger: Ledger, life: int, dp_rank: int, incarnation: int) -> None:
        self._group = group
        self._inbox: socket.socket = inbox(engine_inbox(group, dp_rank, incarnation))
        self._words = ledger.words
        self._at = {name: ledger.at(life, name) for name in ("quiet", "finished", "undeliverable", "taken")}
        self._words[ledger.at(life, "index")] = incarnation
        self._queue: list[tuple[int, int]] = []  # (life of the front-end, number)
        self._answers: dict[int, list[int]] = defaultdict(list)
        self._steps = 0

    def run(self, told: Callable[[], bool]) -> None:
        """Takes requests in and answers them until told to end."""
        words, at = self._words, self._at
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        self._register(poller)
        try:
            while not told():
                if not self._queue:
                    poller.poll(2 if self._answers else 20)
                self._hear()
                self._take_in()
                self._publish()
                if self._queue:
                    self._step()
                elif self._running():
                    self._end_wave()
                self._answer()
                words[at["quiet"]] = not self._queue and not self._answers and not self._running()
        finally:
            self._inbox.close()
            self._leave()

    @abstractmethod
    def _register(self, poller: zmq.Poller) -> None: ...

    @abstractmethod
    def _hear(self) -> None: ...

    @abstractmethod
    def _running(self) -> bool: ...

    @abstractmethod
    def _received(self, row: int, tokens: int, wave: int) -> None: ...

    @abstractmethod
    def _publish(self) -> None: ...

    @abstractmethod
    def _compute(self, batch: int) -> None: ...

    @abstractmethod
    def _finished(self, batch: int) -> None: ...

    @abstractmethod
    def _end_wave(self) -> None: ...

    @abstractmethod
    def _leave(self) -> None: ...

    def _take_in(self) -> None:
        for _ in range(BATCH):
            try:
                request = self._inbox.recv(REQUEST.size)
            except BlockingIOError:
                return
            number, row, slot, life, tokens, wave = REQUEST.unpack(request)
            self._received(row, tokens, wave)
            self._queue.append((life, number))
            self._words[self._at["taken"] + slot] += 1

    def _step(self) -> None:
        """Computes the older half of the queue."""
        batch = self._queue[: (len(self._queue) + 1) // 2]
        self._compute(len(batch))
        self._steps += 1
        for life, number in batch:
            self._answers[life].append(number)
        self._finished(len(batch))
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
            except REFUSALS:
                self._words[self._at["undeliverable"]] += len(numbers)
                numbers.clear()
            del numbers[:BATCH]
            if not numbers:
                del self._answers[life]


class SoakEngine(AnsweringEngine):
    """One that takes its row."""

    def __init__(self, group: str, ledger: Ledger, dp_rank: int, life: int) -> None:
        self._engine = Engine.attach(group, dp_rank)
        super().__init__(group, ledger, life, dp_rank, int(self._engine.board.engine_incarnation[dp_rank]))

    def _register(self, poller: zmq.Poller) -> None:
        self._engine.register(poller)

    def _hear(self) -> None:
        self._engine.poll()

    def _running(self) -> bool:
        return self._engine.running

    def _received(self, row: int, tokens: int, wave: int) -> None:
        self._engine.receive(row, tokens, wave)

    def _publish(self) -> None:
        self._engine.publish(
            waiting=len(self._queue), running=0, prefill_backlog=7 * len(self._queue), step=self._steps
        )

    def _compute(self, batch: int) -> None:
        with self._engine.step(prefill_tokens=7 * batch, batch=batch):
            del self._queue[:batch]

    def _finished(self, batch: int) -> None:
        self._engine.finished(batch)

    def _end_wave(self) -> None:
        self._engine.wave_complete()

    def _leave(self) -> None:
        self._engine.close()


class SoakStockEngine(AnsweringEngine):
    """One that knows no board and sends what vLLM's engines send. Its first report says that it is there."""

    def __init__(self, group: str, ledger: Ledger, dp_rank: int, life: int) -> None:
        super().__init__(group, ledger, life, dp_rank, life + 1)
        with Board.attach(group, readonly=True) as board:
            header = board.segment.header
            addresses = header.engine_input_address, header.engine_output_address
        self._peer = StockEngine(addresses, dp_rank)
        self._rank, self._wave, self._awake = dp_rank, 0, False
        self._told: int | None = None
        ledger.set_stock(dp_rank, life + 1)

    def _register(self, poller: zmq.Poller) -> None:
        poller.register(self._peer.input, zmq.POLLIN)

    def _hear(self) -> None:
        while self._peer.input.poll(0):
            frames = self._peer.input.recv_multipart()
            if frames[0] != wire.START_FRAME:
                continue
            start = wire.decode_start(frames[1])
            if start.exclude != self._rank and start.wave >= self._wave:
                self._wave, self._awake = start.wave, True

    def _running(self) -> bool:
        return self._awake

    def _received(self, row: int, tokens: int, wave: int) -> None:
        if wave <= self._wave and not self._awake:
            self._peer.send(wire.encode_wave_started(self._rank, self._wave))
        self._wave, self._awake = max(self._wave, wave), True

    def _publish(self) -> None:
        if self._told != len(self._queue):
            self._told = len(self._queue)
            self._peer.report(self._told, 0, step=self._steps, wave=self._wave)

    def _compute(self, batch: int) -> None:
        del self._queue[:batch]

    def _finished(self, batch: int) -> None: ...

    def _end_wave(self) -> None:
        self._wave, self._awake = self._wave + 1, False

    def _leave(self) -> None:
        self._peer.close()
