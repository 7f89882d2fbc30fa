"""Tests of `dpshm.vllm.engine_core` where the board is on another node: the row goes to the coordinator."""

from __future__ import annotations

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.vllm.find import owner_name
from tests.support import wait_until
from tests.unit.vllm.fake_core import INPUTS, Request, failing, hooked, run, send

ELSEWHERE = "tcp://127.0.0.1:9"
"""A stats address that no board here has."""


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks, of which rank 1 is on another node."""
    return using(Coordinator(group=group, dp_size=2, dp_size_local=1))


@pytest.fixture
def core(vllm, coordinator):
    """A core of rank 1 that finds no board."""
    core = vllm.core.DPEngineCoreProc(ELSEWHERE, engine_index=1, inputs=INPUTS)
    core.addresses.coordinator_output = coordinator.engine_addresses[1]
    return core


def row(board):
    """Rank 1's row."""
    return board.snapshot()[1]


def test_a_core_on_another_node_is_on_the_board(core, board, group, using, log):
    """Guards against remote ranks whose bookings each report erases, and whose backlog no policy sees."""
    using(Engine.attach(group, 0))
    frontends = [using(Frontend.attach(group, owner=owner_name(i, INPUTS[i]))) for i in range(2)]

    def body():
        wait_until(lambda: row(board)["verdict"] == "alive")
        _booked = [frontends[1].route(100, dp_rank=1) for _ in range(3)]
        send(core, Request("a", prompt=100, max_tokens=2), client_index=1)
        core._process_input_queue()
        wait_until(lambda: row(board)["waiting"] == 1)
        assert (row(board)["requests"], row(board)["in_flight"]) == (3, 2)
        assert (row(board)["prefill_backlog"], row(board)["in_flight_tokens"]) == (300, 200)
        core._process_engine_step()
        wait_until(lambda: row(board)["running"] == 1)
        assert (row(board)["in_flight"], row(board)["prefill_backlog"]) == (2, 236)
        for _ in range(3):
            core.turn()
        wait_until(lambda: row(board)["requests_finished"] == 1)
        assert (row(board)["requests"], row(board)["in_flight"]) == (2, 2)
        assert not row(board)["stock"]

    run(core, body)
    assert core.reported == []  # the row said all of it
    assert hooked(core) == []
    assert log("sends its row to tcp:") == 1
    wait_until(lambda: row(board)["verdict"] == "absent")


def test_a_core_that_gives_up_reports_as_a_stock_one(core, board, log):
    """Guards against a rank that is not chosen any more because code of dpshm failed in its core."""

    def body():
        wait_until(lambda: row(board)["verdict"] == "alive")
        send(core, Request("a"))
        failing(core.scheduler)
        core.turn()
        assert hooked(core) == []

    run(core, body)
    assert log("gives its row up") == 1
    assert core.reported


def test_a_core_without_tcp_has_no_other_node(vllm, coordinator, board, log):
    """Guards against a row that is carried to a coordinator which is on this node, and not dpshm's."""
    core = vllm.core.DPEngineCoreProc("ipc:///elsewhere", engine_index=1, inputs=INPUTS)
    core.addresses.coordinator_output = "ipc:///elsewhere-too"
    run(core, lambda: None)
    assert log("finds no board") == 1
    assert row(board)["verdict"] == "absent"
