"""A server whose directory of segments has room for no board, or for the board and no prefix index."""

from __future__ import annotations

import subprocess

import pytest

from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL, Server

RANKS = 2
ARGUMENTS = ("--data-parallel-size", str(RANKS), "--api-server-count", "2", "--block-size", "16", *NO_MODEL)


@pytest.fixture
def start(tmp_path, short_path):
    """Starts a server whose directory of segments is a tmpfs of so many KiB, which no other process sees."""
    started = []

    def one(kib):
        mount = f"mount -t tmpfs -o size={kib}k none {short_path}"
        alone = ["unshare", "--mount", "--propagation", "private"]
        if subprocess.run([*alone, "sh", "-c", mount], capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a tmpfs here")
        within = [*alone, "sh", "-c", f'{mount} && exec "$@"', "sh"]
        started.append(Server(tmp_path, "dense", *ARGUMENTS, within=within, DPSHM_DIR=str(short_path)))
        started[-1].wait_ready()
        return started[-1]

    yield one
    for server in started:
        server.stop()


def test_without_room_for_a_board_the_server_runs_as_stock(start):
    """Guards against a container's small /dev/shm that keeps a server from starting, or that fails it later."""
    server = start(64)
    checks.answers_a_burst(server)
    assert server.log.count("vLLM starts its own") == 1
    assert "64 KiB free and the board" in server.log
    assert "chooses by the board" not in server.log


def test_without_room_for_an_index_requests_are_routed_by_load(start):
    """Guards against an engine that does not start, or is out of routing, because its index has no room."""
    server = start(420)
    checks.answers_a_burst(server)
    assert server.log.count("chooses by the board") == 2
    assert server.log.count("publishes to the board") == RANKS
    assert server.log.count("has no prefix index, and requests are routed to it by load alone") == RANKS
