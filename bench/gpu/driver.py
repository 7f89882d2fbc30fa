"""The front-end of ``python -m bench gpu``: sends requests to ranks of its choice and waits for what follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from dpshm import Frontend, Route
from dpshm.rules.waves import Phase
from dpshm.sim.demo.messages import ReplyMessage, RequestMessage, engine_address, frontend_address

TIMEOUT_S = 60.0
LOAD_PER_RANK = 16
LOAD_PROMPT_TOKENS = 256


class Stuck(Exception):
    """A condition did not hold in time."""


class Driver:
    """The front-end: sends requests to ranks of its choice and receives the replies.

    Attributes:
        out: the routes of outstanding requests, by request.
        replied_ns: the time when the reply with the first token came, by request.
    """

    def __init__(self, group: str, dp_size: int) -> None:
        self.frontend = Frontend.attach(group, owner="bench")
        self.dp_size = dp_size
        self.out: dict[int, Route] = {}
        self.replied_ns: dict[int, int] = {}
        self._next_id = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._replies = self._context.socket(zmq.PULL)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(ReplyMessage)

    def connect(self, prefix: str) -> None:
        """Connects to a set of ranks; gives up the outstanding requests at the previous set."""
        for route in self.out.values():
            route.done()
        self.out.clear()
        self._replies.bind(frontend_address(prefix, 0))
        self._requests = [self._context.socket(zmq.PUSH) for _ in range(self.dp_size)]
        for rank, socket in enumerate(self._requests):
            socket.connect(engine_address(prefix, rank))

    def send(self, rank: int, prompt_tokens: int, output_tokens: int) -> int:
        """Sends a request; returns its number."""
        number = self._next_id
        self._next_id += 1
        route = self.out[number] = self.frontend.route(prompt_tokens, dp_rank=rank)
        message = RequestMessage.of(number, self.frontend.index, route, output_tokens)
        self._requests[rank].send(self._encode(message))
        return number

    def receive_replies(self, timeout_ms: int = 0) -> None:
        """Receives replies; waits up to `timeout_ms` for the first."""
        while self._replies.poll(timeout_ms):
            reply = self._decoder.decode(self._replies.recv())
            now = time.monotonic_ns()
            for number in reply.first:
                self.replied_ns[number] = now
            for number in (*reply.completed, *reply.refused):
                if number in self.out:
                    self.out.pop(number).done()
            timeout_ms = 0

    def wait(self, condition: Callable[[], object], what: str, patience_s: float = TIMEOUT_S) -> None:
        """Receives replies until the condition holds.

        Raises:
            Stuck: it did not hold in time.
        """
        deadline = time.monotonic() + patience_s
        while not condition():
            self.receive_replies(1)
            if time.monotonic() > deadline:
                raise Stuck(f"{what}: not within {patience_s:g} s; the board:\n{self.frontend.snapshot()}")

    def paused(self) -> bool:
        """Whether the coordinator says that the group is paused, and no rank runs."""
        board = self.frontend.board
        return board.phase is Phase.PAUSED and not any(
            word & 1 for word in board.engine_state[: self.dp_size].tolist()
        )

    def close(self) -> None:
        """Leaves."""
        self._context.destroy(linger=0)
        self.frontend.close()
