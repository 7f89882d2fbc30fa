"""Tests of `dpshm.vllm.api_server`: which client gets a link, and which stays unchanged."""

from __future__ import annotations

from dpshm import Frontend
from tests.unit.vllm.fake_client import add, finish, hooked, raising
from tests.unit.vllm.fake_core import Request


def in_flight(board):
    """By rank, what is booked and was not received."""
    return board.snapshot()["in_flight"].tolist()


def test_an_output_of_a_client_without_a_board_goes_through(make_client):
    """Guards against a class-wide hook that fails where there is no link."""
    client = make_client(address="ipc:///nowhere")
    finish(client, "a")
    add(client, Request("a"))
    finish(client, "a")
    assert client.reqs_in_flight == {}


def test_a_client_without_a_board_is_untouched(make_client, log):
    """Guards against an API server on another node that waits for a board, or asks for it at each request."""
    client = make_client(address="ipc:///nowhere")
    add(client, Request("a"), Request("b"))
    assert client.listening
    assert hooked(client) == []
    assert [engine for _, engine, _ in client.sent] == [client.core_engines[-1]] * 2
    assert log("finds no board") == 1


def test_a_client_that_cannot_attach_goes_on(make_client, log, monkeypatch):
    """Guards against an API server that does not start because its row cannot be had."""
    monkeypatch.setattr(Frontend, "attach", raising)
    client = make_client()
    add(client, Request("a"), Request("b"))
    assert client.listening
    assert hooked(client) == []
    assert log("goes on without the board") == 1


def test_a_client_of_some_ranks_chooses_among_those_alone(make_client, board):
    """Guards against hybrid load balancing that sends a request to another node's rank."""
    client = make_client()
    client.engine_ranks_managed, client.core_engines = [1], client.core_engines[1:]
    add(client, *(Request(f"r{i}") for i in range(3)))
    assert in_flight(board) == [0, 3]
