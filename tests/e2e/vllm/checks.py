"""Properties of any deployment, asserted the same way with dpshm and without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from dpshm.board import files
from dpshm.board.board import Board
from tests.e2e.vllm import environment
from tests.e2e.vllm.server import Server
from tests.support import wait_until

_GROUP = """
import sys, time
from dpshm import Coordinator, Engine
coordinator = Coordinator(group=sys.argv[1], dp_size=1)
engine = Engine.attach(sys.argv[1], 0)
print("up", flush=True)
time.sleep(1000)
"""

GAUGES = {"waiting": "vllm:num_requests_waiting", "running": "vllm:num_requests_running"}
"""Figures of a rank's row, and the gauges in which vLLM shows the same."""
BURST = [(1 + 37 * i % 300, 1 + 7 * i % 40) for i in range(96)]
"""Requests as (prompt tokens, tokens to generate)."""


def answers_a_burst(server: Server) -> None:
    """Every request of a burst gets as many tokens as it asked for."""
    assert server.generate_all(BURST) == [max_tokens for _, max_tokens in BURST]


def is_idle(board: Board) -> bool:
    """Whether nothing waits, runs or is in flight."""
    rows = board.snapshot()
    loaded = rows["requests"].any() or rows["prefill_backlog"].any()
    return not loaded and bool((rows["state"] == "idle").all())


def board_agrees_with_vllm(server: Server) -> None:
    """When idle, the board tells of each rank what vLLM's own metrics tell.

    vLLM sends a step's gauges to one API server alone, and shows those that were stored last. Where two API
    servers are behind, an older figure may be stored later, and it stays until the rank steps again. So each rank
    gets a request by itself if the gauges do not agree.
    """
    with server.board() as board:
        wait_until(lambda: is_idle(board))
        if any(set(server.metric(name).values()) != {0.0} for name in GAUGES.values()):
            for rank in range(len(board.snapshot())):
                assert len(server.generate(3, 2, rank)) == 2
            wait_until(lambda: is_idle(board))
        rows = board.snapshot()
        pairs = {
            "requests_finished": server.metric("vllm:request_success_total"),
            "generation_tokens": server.metric("vllm:generation_tokens_total"),
            "prompt_tokens": server.metric("vllm:prompt_tokens_by_source_total", source="local_compute"),
            **{name: server.metric(of_vllm) for name, of_vllm in GAUGES.items()},
        }
        for name, theirs in pairs.items():
            ours = {int(r["dp_rank"]): float(r[name]) for r in rows}
            assert ours == theirs, f"{name}: the board says {ours}, vLLM {theirs}"
        sent, received = board.sent_requests, board.received_requests
        assert (sent[:, : len(rows)] == received[: len(rows), :].T).all()
        assert (board.sent_tokens[:, : len(rows)] == board.received_tokens[: len(rows), :].T).all()


def killed_group(group: str) -> str:
    """Makes a group, and kills it so that its segment stays; gives its name back."""
    command = [sys.executable, "-c", _GROUP, group]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=environment.ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        os.kill(process.pid, signal.SIGKILL)
    assert group in files.groups()
    return group
