"""Tests of `dpshm.vllm.received`: what a request leaves on a real board when it reaches an engine."""

from __future__ import annotations

import threading

import pytest

from tests.unit.vllm.fake_core import Request, RequestType, counters, row, run, send


def test_a_received_request_is_in_flight_no_more(make_core, frontend, board):
    """Guards against a request that counts twice: as booked by its API server and as queued at its engine."""
    core = make_core()

    def body():
        core.turn()  # before the API server's first request: its row is found later
        route = frontend.route(10, dp_rank=0)
        assert int(row(board)["in_flight"]) == 1
        send(core, Request("a", prompt=10))
        core._process_input_queue()
        assert (int(row(board)["in_flight"]), int(row(board)["waiting"])) == (0, 1)
        route.done()
        _booked = frontend.route(10, dp_rank=0)
        send(core, Request("b", prompt=10))  # the row is known by now
        core._process_input_queue()
        assert int(row(board)["in_flight"]) == 0

    run(core, body)


def test_a_client_without_a_row_is_served(make_core, board):
    """Guards against an engine that fails at a request of an API server which has no row."""
    core = make_core()

    def body():
        send(core, Request("a"), client_index=0)
        core._process_input_queue()
        assert int(row(board)["waiting"]) == 1
        assert int(board.received_requests[0].sum()) == 0

    run(core, body)


def test_a_request_that_the_core_rejects_is_counted(make_core, frontend, board, monkeypatch):
    """Guards against a booking that stays for ever where a core in shutdown answers a request itself."""
    core = make_core()
    monkeypatch.setattr(core, "add_request", lambda request, _: core.answered.append(request.request_id))

    def body():
        _booked = frontend.route(12, dp_rank=0)
        send(core, Request("a", prompt=12))
        core._process_input_queue()
        assert core.answered == ["a"]
        assert counters(board, "in_flight", "in_flight_tokens", "waiting", "prefill_backlog") == (0, 0, 0, 0)

    run(core, body)


@pytest.mark.parametrize("kv_transfer", [False, True])
def test_a_request_that_a_paused_core_rejects_leaves_the_books_at_zero(
    make_core, frontend, board, monkeypatch, kv_transfer
):
    """Guards against a receipt that comes after the answer: since 0.33 a paused core answers with an error."""
    core = make_core()
    core.scheduler.paused = True
    routes = []

    def rejects(request, wave):
        core.answered.append(request.request_id)
        routes[len(core.answered) - 1].done()  # the API server may have the answer before this method returns
        if kv_transfer:  # the scheduler sees the request all the same, and ends it at once
            core.scheduler.add_request(request)
            core.scheduler.end(request.request_id)

    monkeypatch.setattr(core, "add_request", rejects)

    def body():
        for i in range(3):
            routes.append(frontend.route(12, dp_rank=0))
            send(core, Request(f"r{i}", prompt=12))
        core._process_input_queue()
        assert core.answered == ["r0", "r1", "r2"]
        assert (board.sent_requests[:, 0] == board.received_requests[0]).all()
        assert (board.sent_tokens[:, 0] == board.received_tokens[0]).all()
        assert int(board.sent_requests[:, 0].sum()) == 3
        assert counters(board, "requests", "in_flight", "in_flight_tokens", "prefill_backlog") == (0, 0, 0, 0)

    run(core, body)


REFUSALS = ["_handle_request_preproc_error", "_handle_mm_cache_miss", "_handle_request_validation_error"]


@pytest.mark.parametrize("name", REFUSALS)
def test_a_request_refused_in_the_input_thread_is_counted(make_core, frontend, board, name):
    """Guards against a refused request that stays booked for ever: no queue of the engine ever has it."""
    core = make_core()

    def body():
        _booked = frontend.route(12, dp_rank=0, wake=False)
        arguments = (Request("a", prompt=12), "drift")[: 1 if name == REFUSALS[0] else 2]
        arguments[0].client_index = 1
        thread = threading.Thread(target=getattr(core, name), args=arguments)
        thread.start()
        thread.join()
        assert len(core.answered) == 1
        assert int(row(board)["in_flight"]) == 1  # the row belongs to the busy loop, which is woken
        assert core.input_queue.queue[0] == (RequestType.WAKEUP, None)
        core._process_input_queue()
        assert int(row(board)["in_flight"]) == 0
        assert int(row(board)["in_flight_tokens"]) == 0

    run(core, body)


def test_a_refused_request_whose_prompt_cannot_be_counted_is_counted(make_core, frontend, board):
    """Guards against an engine that fails in its input thread because of the request which it refuses."""
    core = make_core()

    def body():
        _booked = frontend.route(0, dp_rank=0)
        request = Request("a")
        request.prompt_token_ids = None
        request.client_index = 1
        core._handle_request_preproc_error(request)
        core._process_input_queue()
        assert int(row(board)["in_flight"]) == 0

    run(core, body)
