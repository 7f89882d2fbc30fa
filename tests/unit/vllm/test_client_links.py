"""Tests of `dpshm.vllm.client_links`, `shadow` and `api_server`: a client of vLLM's shape and a real board."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from dpshm import Board, Coordinator, Engine, Frontend, NoEngineAvailable
from dpshm.rules.waves import Phase
from dpshm.vllm import client_links, hooks, metrics
from dpshm.vllm.client_links import LINK
from dpshm.vllm.options import Options
from tests.support import polled, wait_until
from tests.unit.vllm.fakes import LATE, Request

HOOKED = ("get_core_engine_for_request", "add_request_async")


@pytest.fixture(autouse=True)
def _no_metrics_hook(monkeypatch):
    """The page of this process stays as it is: `test_hooks` has that."""
    monkeypatch.setattr(metrics, "install", lambda: None)


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def engines(group, coordinator, using):
    """Both ranks, alive and paused."""
    return [using(Engine.attach(group, rank)) for rank in range(2)]


@pytest.fixture
def board(group, coordinator, using):
    """The board of the group."""
    return using(Board.attach(group))


@pytest.fixture
def make(vllm, coordinator, engines, using):
    """`make()` gives a client that balances over both ranks, with the plugin's hooks on its class."""
    made = []

    def client(kind="DPLBAsyncMPClient", address=None, **options):
        hooks.install(Options(**options))
        made.append(using(getattr(vllm.client, kind)(address or coordinator.stats_publish_address)))
        return made[-1]

    yield client
    for each in made:
        if (link := vars(each).get(LINK)) is not None:
            link.close()


def add(client, *requests):
    """Sends requests as an API server does, each after the other."""

    async def sending():
        for request in requests:
            await client.add_request_async(request)

    asyncio.run(sending())


def finish(client, *request_ids):
    """The engines tell the client that requests are over."""
    outputs = SimpleNamespace(finished_requests=set(request_ids))
    asyncio.run(type(client).process_engine_outputs(client, outputs))


def in_flight(board):
    """By rank, what is booked and was not received."""
    return board.snapshot()["in_flight"].tolist()


def hooked(client):
    """Which methods of the client are hidden behind ours."""
    return [name for name in HOOKED if name in vars(client)]


def raising(*_, **__):
    """A failure of ours."""
    raise ZeroDivisionError


# Choosing and booking.


def test_the_board_chooses_and_what_was_sent_is_booked(make, board):
    """Guards against a choice that is not booked, or that vLLM's own record does not have."""
    client = make()
    add(client, *(Request(f"r{i}", prompt=10) for i in range(4)))
    assert hooked(client) == list(HOOKED)
    assert in_flight(board) == [2, 2]  # vLLM's own choice would have been rank 1, each time
    assert board.snapshot()["in_flight_tokens"].tolist() == [20, 20]
    assert {engine for _, engine, _ in client.sent} == set(client.core_engines)
    assert client.reqs_in_flight == {request_id: engine for request_id, engine, _ in client.sent}
    assert not client.listening
    assert client.first_requests == []


def test_a_chosen_request_is_not_left_pinned(make):
    """Guards against a request that is sent again, and has to go where the first try went."""
    client, request = make(), Request("a")
    add(client, request)
    assert request.data_parallel_rank is None


def test_finished_requests_leave_the_bookings(make, board, engines):
    """Guards against requests that count for ever, and against an abort that does."""
    client = make()
    add(client, Request("a"), Request("b"), Request("aborted"))
    finish(client, "a", "b", "aborted", "never seen")
    assert in_flight(board) == [0, 0]
    assert client.reqs_in_flight == {}
    finish(client)  # outputs in which no request finished


def test_an_output_of_a_client_without_a_board_goes_through(make):
    """Guards against a class-wide hook that fails where there is no link."""
    client = make(address="ipc:///nowhere")
    finish(client, "a")
    add(client, Request("a"))
    finish(client, "a")
    assert client.reqs_in_flight == {}


@pytest.mark.parametrize(("rank", "pooling"), [(0, None), (None, LATE)])
def test_a_pinned_request_goes_where_it_must_and_is_booked(make, board, rank, pooling):
    """Guards against a pinned request that goes elsewhere, or that no other API server sees."""
    client = make()
    add(client, *(Request(f"r{i}", rank=rank, pooling=pooling) for i in range(3)))
    assert in_flight(board) == [3, 0]


def test_a_session_stays_where_it_is(make, board):
    """Guards against the second part of a streamed input that goes to another engine than the first."""
    client = make()
    add(client, Request("session"), Request("session"), Request("session"))
    assert len({engine for _, engine, _ in client.sent}) == 1
    assert sorted(in_flight(board)) == [0, 3]
    finish(client, "session")
    assert in_flight(board) == [0, 0]


def test_affinity_keeps_equal_prompts_together(make, board):
    """Guards against a key that is not the prompt's beginning."""
    client = make(policy="affinity:epsilon=10")
    add(client, *(Request(f"r{i}", prompt=300) for i in range(2)))
    assert sorted(in_flight(board)) == [0, 2]


def test_a_prompt_of_embeddings_has_no_key(make, board):
    """Guards against the policy `affinity` that fails at a request without token ids."""
    client, request = make(policy="affinity"), Request("a")
    request.prompt_token_ids, request.prompt_embeds = None, [0.0] * 5
    add(client, request)
    assert sum(in_flight(board)) == 1
    assert board.snapshot()["in_flight_tokens"].sum() == 5


def test_a_send_that_fails_cancels_the_booking(make, board):
    """Guards against a request that was never sent and counts for ever."""
    client = make()
    client.on_send = raising
    with pytest.raises(ZeroDivisionError):
        add(client, Request("a"))
    assert in_flight(board) == [0, 0]
    assert hooked(client) == list(HOOKED)  # that failure was not ours


def test_without_an_engine_to_choose_vllm_chooses(make, board, engines, log):
    """Guards against a request that is refused because the board says that no engine lives."""
    client = make()
    add(client, Request("first"))
    finish(client, "first")
    for engine in engines:
        engine.close()
    wait_until(lambda: not any(board.engine_alive(rank) for rank in range(2)))
    wait_until(lambda: set(board.snapshot()["verdict"].tolist()).isdisjoint({"alive", "stalled"}))
    add(client, Request("a"), Request("b"))
    assert [engine for _, engine, _ in client.sent][1:] == [client.core_engines[-1]] * 2
    assert log("vLLM chooses") == 1
    assert hooked(client) == list(HOOKED)


# Waves.


def test_a_request_has_the_wave_of_the_board(make, board, engines):
    """Guards against a stale stamp, with which an engine starts a wave that is running already."""
    client = make()
    add(client, Request("first"))
    assert client.sent[0][2] == 0
    wait_until(lambda: polled(engines))
    engines[0].receive(None, wave=7)
    wait_until(lambda: (board.wave, board.phase) == (7, Phase.RUNNING))
    add(client, Request("a"))
    assert client.sent[1][2] == 7
    assert client.current_wave == 7


def test_paused_ranks_wake_up_once_the_request_is_sent(make, engines):
    """Guards against ranks that sleep on, and against a wake-up that comes before its request."""
    client = make()
    asleep = []
    client.on_send = lambda: asleep.append([engine.poll() for engine in engines])
    add(client, Request("a"))
    assert asleep == [[False, False]]
    wait_until(lambda: polled(engines))


def test_a_client_that_was_made_outside_a_loop_wakes_ranks_with_its_first_request(make, engines):
    """Guards against a first request that passes the hooks by, and then waits for ranks that sleep."""
    client = make()
    assert LINK not in vars(client)
    add(client, Request("a"))
    assert client.first_requests == []  # it would wait: no task reads it
    wait_until(lambda: polled(engines))


def test_a_client_behind_a_balancer_takes_the_wave_from_the_board(make, board, engines, log):
    """Guards against an external load balancer's client that chooses, books, or stamps a stale wave."""
    client = make("DPAsyncMPClient")
    add(client, Request("a"))
    assert client.listening  # its wake-ups go through vLLM's task
    assert (client.current_wave, client.engines_running) == (0, False)
    assert len(client.first_requests) == 1
    engines[0].receive(None, wave=7)
    wait_until(lambda: (board.wave, board.phase) == (7, Phase.RUNNING))
    add(client, Request("b"))
    assert client.sent[1][2] == 7
    assert len(client.first_requests) == 1
    assert in_flight(board) == [0, 0]
    assert log("chooses nothing") == 1
    link = vars(client)[LINK]
    link.finished(["a"])


# Shadow.


def test_shadow_leaves_the_choice_to_vllm_and_compares(make, board, log):
    """Guards against a shadow that chooses, or that compares with loads which miss the bookings."""
    client = make(mode="shadow", shadow_log_s=0.0)
    add(client, *(Request(f"r{i}") for i in range(4)), Request("pinned", rank=0))
    assert in_flight(board) == [1, 4]
    assert client.listening
    assert log("compares (shadow)") == 1
    assert log("shadow, API server 0: 4 decisions") >= 1  # the pinned one was no choice
    finish(client, *client.reqs_in_flight)
    assert in_flight(board) == [0, 0]


def test_shadow_says_nothing_between_its_times(make, log):
    """Guards against a line for each request."""
    client = make(mode="shadow", shadow_log_s=3600.0)
    add(client, *(Request(f"r{i}") for i in range(4)))
    assert log("decisions") == 0


def test_shadow_counts_no_decision_where_dpshm_has_none(make, board, monkeypatch, log):
    """Guards against a comparison with an engine that dpshm could not choose."""
    client = make(mode="shadow", shadow_log_s=0.0)

    def none(*_, **__):
        raise NoEngineAvailable("no engine")

    with monkeypatch.context() as broken:
        broken.setattr(Frontend, "choose", none)
        add(client, Request("a"))
    assert in_flight(board) == [0, 1]
    assert log("decisions") == 0
    assert hooked(client) == list(HOOKED)


# Giving up: logged once, hooks off, vLLM's own way goes on, no booking stays.


FAILURES = [
    ("on", "route", None),
    ("on", "route", 0),
    ("on", "wake", None),
    ("shadow", "choose", None),
    ("shadow", "route", None),
]
"""The mode, the method of `Frontend` that fails, and the rank to which the request is pinned."""


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_client_whose_link_fails_listens_to_the_coordinator_again(make, board, log, monkeypatch, failure):
    """Guards against a failure of ours that costs a request, is logged at each, or leaves bookings behind."""
    mode, name, rank = failure
    client = make(mode=mode)
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
def test_a_wave_that_cannot_be_read_ends_the_link(make, log, monkeypatch, kind):
    """Guards against a request that is lost because its wave could not be read."""
    client = make(kind)
    add(client, Request("before"))
    with monkeypatch.context() as broken:
        broken.setattr(client_links, "unpack_control", raising)
        add(client, Request("a"))
    add(client, Request("b"))
    assert [request_id for request_id, _, _ in client.sent] == ["before", "a", "b"]
    assert client.listening
    assert hooked(client) == []
    assert log("leaves the board") == 1


def test_a_finish_that_fails_ends_the_link(make, board, log, monkeypatch):
    """Guards against outputs that never reach their requests because a booking could not be ended."""
    client = make()
    add(client, Request("a"), Request("b"))
    with monkeypatch.context() as broken:
        broken.setattr(client_links.Route, "done", raising)
        finish(client, "a")
    assert client.reqs_in_flight.keys() == {"b"}
    assert hooked(client) == []
    assert in_flight(board) == [0, 0]
    assert log("leaves the board") == 1


def test_a_board_that_cannot_be_left_is_left_all_the_same(make, log, monkeypatch):
    """Guards against a failure on the way back that reaches vLLM."""
    client = make()
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


def test_a_request_under_way_while_the_link_ends_is_sent(make, monkeypatch, log):
    """Guards against two requests at once, of which one ends the link under the other."""
    client = make()

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


# Attaching.


def test_a_client_without_a_board_is_untouched(make, log):
    """Guards against an API server on another node that waits for a board, or asks for it at each request."""
    client = make(address="ipc:///nowhere")
    add(client, Request("a"), Request("b"))
    assert client.listening
    assert hooked(client) == []
    assert [engine for _, engine, _ in client.sent] == [client.core_engines[-1]] * 2
    assert log("finds no board") == 1


def test_a_client_that_cannot_attach_goes_on(make, log, monkeypatch):
    """Guards against an API server that does not start because its row cannot be had."""
    monkeypatch.setattr(Frontend, "attach", raising)
    client = make()
    add(client, Request("a"), Request("b"))
    assert client.listening
    assert hooked(client) == []
    assert log("goes on without the board") == 1


def test_a_client_of_some_ranks_chooses_among_those_alone(make, board):
    """Guards against hybrid load balancing that sends a request to another node's rank."""
    client = make()
    client.engine_ranks_managed, client.core_engines = [1], client.core_engines[1:]
    add(client, *(Request(f"r{i}") for i in range(3)))
    assert in_flight(board) == [0, 3]
