"""The load generator against a server that answers as vLLM streams."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bench.processes import Worker
from bench.vllm.player import Answer, play
from dpshm.sim.workloads.traces import Arrival

TOKENS_AFTER_S = 0.05


class Streamer:
    """Answers with a first token, and, `TOKENS_AFTER_S` later, with the end; refuses prompts of one token.

    Attributes:
        prompts: lengths of the prompts that came.
    """

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            length = 0
            while (text := file.readline().strip()) != b"":
                if text.lower().startswith(b"content-length:"):
                    length = int(text.split(b":")[1])
            prompt = len(json.loads(file.read(length))["token_ids"])
            self.prompts.append(prompt)
            if prompt == 1:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                return
            connection.sendall(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": []}\n\n')
            time.sleep(TOKENS_AFTER_S)
            connection.sendall(b"data: [DONE]\n\n")

    def close(self) -> None:
        """Accepts no more."""
        self._listening.close()


@pytest.fixture
def streamer() -> Iterator[Streamer]:
    """One, closed at the end."""
    server = Streamer()
    yield server
    server.close()


def test_answers_are_timed_and_refusals_told(streamer: Streamer) -> None:
    """Guards against a failed request that counts as a fast one."""
    arrivals = [(0, Arrival(0.0, 30, 5)), (1, Arrival(0.05, 1, 5))]
    with Worker(play, streamer.port, "chat 1", 512, arrivals) as player:
        player.wait_ready()
        start_s = time.monotonic() + 0.05
        player.tell(start_s)
        fields, percent = player.result()
    whole, refused = (Answer(*f) for f in fields)
    assert sorted(streamer.prompts) == [1, 30]
    assert whole.first_s is not None
    assert whole.total_s is not None
    assert whole.total_s - whole.first_s > TOKENS_AFTER_S / 2
    assert whole.late_s >= 0.0
    assert whole.ended_s >= start_s + whole.total_s
    assert refused.total_s is None
    assert "400" in refused.said
    assert percent > 0.0
