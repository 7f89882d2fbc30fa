"""Tests of `dpshm.vllm.client_link`: a link that fails is logged once; its hooks come off, its bookings end."""

from __future__ import annotations

import asyncio

import pytest

from dpshm import Frontend
from dpshm.vllm import board_link, booking_link, client_link
from dpshm.vllm.client_link import LINK
from tests.unit.vllm.fake_client import add, finish, hooked, raising
from tests.unit.vllm.fake_core import Request


def in_flight(board):
    """By rank, what is booked and was not received."""
    return board.snapshot()["in_flight"].tolist()


FAILURES = [
    ("on", "route", None),
    ("on", "route", 0),
    ("on", "wake", None),
    ("shadow", "choose", None),
    ("shadow", "route", None),
]
"""The mode, the method of `Frontend` that fails, and the rank to which the request is pinned."""


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_client_whose_link_fails_listens_to_the_coordinator_again(make_client, board, log, monkeypatch, failure):
    """Guards against a failure of ours that costs a request, is logged at each, or leaves bookings behind."""
    mode, name, rank = failure
    client = make_client(mode=mode)
    add(client, Request("before"))
    monkeypatch.setattr(Frontend, name, raising)
    add(client, Request("a", rank=rank), Request("b"), Request("c"))
    assert [request_id for request_id, _, _ in client.sent] == ["before", "a", "b", "c"]
    assert log("leaves the board") == 1
    assert hooked(client) == []
    assert vars(client)[LINK] is None
    assert client.listening
    assert client.engines_running is False
    assert len(client.first_requests) >= 2  # vLLM's own wake-ups
    finish(client, "before", "a", "b", "c")
    assert client.reqs_in_flight == {}
    assert in_flight(board) == [0, 0]


@pytest.mark.parametrize("kind", ["DPAsyncMPClient", "DPLBAsyncMPClient"])
def test_a_wave_that_cannot_be_read_ends_the_link(make_client, log, monkeypatch, kind):
    """Guards against a request that is lost because its wave could not be read."""
    client = make_client(kind)
    add(client, Request("before"))
    with monkeypatch.context() as broken:
        for module in (client_link, board_link):
            broken.setattr(module, "unpack_control", raising)
        add(client, Request("a"))
    add(client, Request("b"))
    assert [request_id for request_id, _, _ in client.sent] == ["before", "a", "b"]
    assert client.listening
    assert hooked(client) == []
    assert log("leaves the board") == 1


def test_a_finish_that_fails_ends_the_link(make_client, board, log, monkeypatch):
    """Guards against outputs that never reach their requests because a booking could not be ended."""
    client = make_client()
    add(client, Request("a"), Request("b"))
    with monkeypatch.context() as broken:
        broken.setattr(booking_link.Route, "done", raising)
        finish(client, "a")
    assert client.reqs_in_flight.keys() == {"b"}
    assert hooked(client) == []
    assert in_flight(board) == [0, 0]
    assert log("leaves the board") == 1


def test_a_board_that_cannot_be_left_is_left_all_the_same(make_client, log, monkeypatch):
    """Guards against a failure on the way back that reaches vLLM."""
    client = make_client()
    add(client, Request("before"))
    frontend = vars(client)[LINK]._frontend
    with monkeypatch.context() as broken:
        broken.setattr(Frontend, "close", raising)
        broken.setattr(Frontend, "route", raising)
        add(client, Request("a"))
    assert client.listening
    assert hooked(client) == []
    assert log("leaves the board") == 1
    frontend.close()


def test_a_request_under_way_while_the_link_ends_is_sent(make_client, monkeypatch, log):
    """Guards against two requests at once, of which one ends the link under the other."""
    client = make_client()

    async def both():
        gate = asyncio.Event()
        stock = type(client).add_request_async

        async def slow(request):
            await gate.wait()
            await stock(client, request)

        await client.add_request_async(Request("before"))
        begun = asyncio.create_task(client.add_request_async(Request("a")))
        monkeypatch.setattr(Frontend, "wake", raising)
        await client.add_request_async(Request("b"))
        gate.set()
        await begun
        await slow(Request("c"))

    asyncio.run(both())
    assert {request_id for request_id, _, _ in client.sent} == {"before", "a", "b", "c"}
    assert log("leaves the board") == 1
