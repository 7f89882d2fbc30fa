"""Tests of `dpshm.vllm.shadow`: vLLM chooses, and the comparison."""

from __future__ import annotations

from dpshm import Frontend, NoEngineAvailable
from dpshm.vllm.shadow import ShadowTally
from tests.unit.vllm.fake_client import HOOKED, add, finish, hooked
from tests.unit.vllm.fake_core import Request


def test_the_summary_tells_both_sides():
    """Guards against a comparison that hides which side chose better."""
    tally = ShadowTally()
    assert tally.summary() == "no decisions yet"
    tally.count(0, 0, [3, 9])
    tally.count(1, 0, [3, 9])
    assert (tally.decisions, tally.agreed) == (2, 1)
    assert tally.summary() == (
        "2 decisions, 1 the same (50 %). Requests already at the chosen engine: "
        "vLLM 6.00, dpshm 3.00 on average; vLLM's engine had up to 6 more"
    )


def in_flight(board):
    """By rank, what is booked and was not received."""
    return board.snapshot()["in_flight"].tolist()


def test_shadow_leaves_the_choice_to_vllm_and_compares(make_client, board, log):
    """Guards against a shadow that chooses, or that compares with loads which miss the bookings."""
    client = make_client(mode="shadow", shadow_log_s=0.0)
    add(client, *(Request(f"r{i}") for i in range(4)), Request("pinned", rank=0))
    assert in_flight(board) == [1, 4]
    assert client.listening
    assert log("compares (shadow)") == 1
    assert log("shadow, API server 0: 4 decisions") >= 1  # the pinned one was no choice
    finish(client, *client.reqs_in_flight)
    assert in_flight(board) == [0, 0]


def test_shadow_says_nothing_between_its_times(make_client, log):
    """Guards against a line for each request."""
    client = make_client(mode="shadow", shadow_log_s=3600.0)
    add(client, *(Request(f"r{i}") for i in range(4)))
    assert log("decisions") == 0


def test_shadow_counts_no_decision_where_dpshm_has_none(make_client, board, monkeypatch, log):
    """Guards against a comparison with an engine that dpshm could not choose."""
    client = make_client(mode="shadow", shadow_log_s=0.0)

    def none(*_, **__):
        raise NoEngineAvailable("no engine")

    with monkeypatch.context() as broken:
        broken.setattr(Frontend, "choose", none)
        add(client, Request("a"))
    assert in_flight(board) == [0, 1]
    assert log("decisions") == 0
    assert hooked(client) == list(HOOKED)
