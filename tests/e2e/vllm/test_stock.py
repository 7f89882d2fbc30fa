"""The ways out: switched off, only comparing, and API servers that cannot use the board."""

from __future__ import annotations

import re
from pathlib import Path

from dpshm.board import files
from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL
from tests.support import wait_until

ARGUMENTS = ("moe", "--data-parallel-size", "2", "--api-server-count", "2", *NO_MODEL)
OURS = re.compile(r"(?:\]|INFO|WARNING) dpshm")  # a line of our own, and not a path with our name in it
FAULTS = f"{Path(__file__).parent / 'faults'}:{environment.ROOT}"


def test_switched_off_vllm_runs_as_ever(serve):
    """Guards against a switch that does not switch off."""
    server = serve(*ARGUMENTS, DPSHM="0")
    checks.answers_a_burst(server)
    assert not OURS.search(server.log)
    assert server.group not in files.groups()
    server.stop()


def test_shadow_leaves_the_choice_to_vllm_and_tells_the_difference(serve):
    """Guards against a rehearsal that changes the play."""
    server = serve(*ARGUMENTS, DPSHM="shadow", DPSHM_SHADOW_LOG_S="0")
    checks.answers_a_burst(server)
    checks.board_agrees_with_vllm(server)
    assert OURS.search(server.log)
    assert server.log.count("leaves the choice to vLLM and compares") == 2
    assert "decisions," in server.log
    server.stop()
    assert server.left() == []


def test_api_servers_without_the_board_work_with_engines_that_have_it(serve):
    """Guards against a failure of ours that becomes one of the server: a mixed group must serve."""
    server = serve(*ARGUMENTS, PYTHONPATH=FAULTS, FAULT_ATTACH="1")
    assert server.log.count("goes on without the board") == 2
    checks.answers_a_burst(server)
    with server.board() as board:
        wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
        assert board.requests_finished[:2].sum() == len(checks.BURST)
        assert board.counts_published[0] > 0
    server.stop()
    assert server.left() == []


def test_whatever_raises_in_a_hook_leaves_the_server_running(serve):
    """Guards against a bug of ours that costs a request: the process where it is goes on as vLLM does."""
    server = serve(*ARGUMENTS, PYTHONPATH=FAULTS, FAULT_AFTER="20")
    assert server.log.count("publishes to the board") == server.log.count("chooses by the board") == 2
    checks.answers_a_burst(server)
    checks.answers_a_burst(server)
    assert server.log.count("gives its row up and reports to the coordinator") == 2
    assert server.log.count("leaves the board and listens to the coordinator") == 2
    with server.board() as board:
        wait_until(lambda: board.phase is Phase.PAUSED)
        rows = board.snapshot()
        assert rows["stock"].all()  # the coordinator writes for them again
        wait_until(lambda: not board.snapshot()["requests"].any())
    server.stop()
    assert server.left() == []
