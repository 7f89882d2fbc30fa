"""Tests of `dpshm.vllm.board_link`: a client of vLLM's shape chooses by a real board and books on it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from dpshm import Board, Coordinator, Frontend
from dpshm.board.latency import BUCKETS, read_latencies
from dpshm.ops.latency import summary
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from dpshm.vllm import client_link
from dpshm.vllm.board_link import BoardLink
from dpshm.vllm.client_link import LINK
from dpshm.vllm.options import Options
from tests.support import StockEngine, polled, wait_until
from tests.unit.vllm.fake_client import HOOKED, LATE, add, finish, hear, hooked, raising
from tests.unit.vllm.fake_core import Request


def in_flight(board):
    """By rank, what is booked and was not received."""
    return board.snapshot()["in_flight"].tolist()


# Choosing and booking.


def test_stock_ranks_that_never_had_a_request_are_chosen(vllm, group, using):
    """Guards against a rank that reports only after a request, and gets none: its client has heard of it."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    for rank in range(2):
        using(StockEngine(coordinator.engine_addresses, rank))
    client = using(vllm.client.DPLBAsyncMPClient(coordinator.stats_publish_address))
    link = using(BoardLink(client, group, Options()))
    with using(Board.attach(group)) as board:
        wait_until(lambda: board.engine_verdicts()[:2] == [Verdict.ALIVE] * 2)
        wait_until(lambda: len(link._frontend.health().routable) == 2)
        add(client, *(Request(f"r{i}") for i in range(4)))
        # Not what is in flight: at a stock rank a booking counts as received a tenth of a second later.
        assert board.sent_requests[:, :2].sum(axis=0).tolist() == [2, 2]
        assert [engine for _, engine, _ in client.sent].count(client.core_engines[0]) == 2


def test_the_board_chooses_and_what_was_sent_is_booked(make_client, board):
    """Guards against a choice that is not booked, or that vLLM's own record does not have."""
    client = make_client()
    add(client, *(Request(f"r{i}", prompt=10) for i in range(4)))
    assert hooked(client) == list(HOOKED)
    assert in_flight(board) == [2, 2]  # vLLM's own choice would have been rank 1, each time
    assert board.snapshot()["in_flight_tokens"].tolist() == [20, 20]
    assert {engine for _, engine, _ in client.sent} == set(client.core_engines)
    assert client.reqs_in_flight == {request_id: engine for request_id, engine, _ in client.sent}
    assert not client.listening
    assert client.first_requests == []


def test_a_chosen_request_is_not_left_pinned(make_client):
    """Guards against a request that is sent again, and has to go where the first try went."""
    client, request = make_client(), Request("a")
    add(client, request)
    assert request.data_parallel_rank is None


def test_finished_requests_leave_the_bookings(make_client, board, engines):
    """Guards against requests that count for ever, and against an abort that does."""
    client = make_client()
    add(client, Request("a"), Request("b"), Request("aborted"))
    finish(client, "a", "b", "aborted", "never seen")
    assert in_flight(board) == [0, 0]
    assert client.reqs_in_flight == {}
    finish(client)  # outputs in which no request finished


def test_tokens_are_timed_where_they_arrive(make_client, board, engines):
    """Guards against an API server that measures nothing, or counts a request's time twice."""
    client = make_client()
    add(client, Request("a", rank=1), Request("quiet", rank=0))
    queued, scheduled = (SimpleNamespace(name=name) for name in ("QUEUED", "SCHEDULED"))
    events = [SimpleNamespace(type=queued, timestamp=5.0), SimpleNamespace(type=scheduled, timestamp=5.5)]
    hear(client, SimpleNamespace(request_id="a", new_token_ids=[], events=None))  # a chunk of its prompt
    hear(client, SimpleNamespace(request_id="a", new_token_ids=[7], events=events))
    hear(client, SimpleNamespace(request_id="a", new_token_ids=[7, 7], events=None))
    hear(client, SimpleNamespace(request_id="stranger", new_token_ids=[7], events=None))
    hear(client, SimpleNamespace(request_id="quiet", new_token_ids=[7]))  # stats are not logged
    finish(client, "a", "quiet")
    counts = read_latencies(board)[:, :, :BUCKETS].sum(axis=2)
    assert counts.tolist() == [[1, 0, 0], [1, 1, 1]]
    queue = summary(read_latencies(board)[1, 1])
    assert queue.mean_s == 0.5
    assert client.__dict__[LINK] is not None


@pytest.mark.parametrize(("rank", "pooling"), [(0, None), (None, LATE)])
def test_a_pinned_request_goes_where_it_must_and_is_booked(make_client, board, rank, pooling):
    """Guards against a pinned request that goes elsewhere, or that no other API server sees."""
    client = make_client()
    add(client, *(Request(f"r{i}", rank=rank, pooling=pooling) for i in range(3)))
    assert in_flight(board) == [3, 0]


def test_a_session_stays_where_it_is(make_client, board):
    """Guards against the second part of a streamed input that goes to another engine than the first."""
    client = make_client()
    add(client, Request("session"), Request("session"), Request("session"))
    assert len({engine for _, engine, _ in client.sent}) == 1
    assert sorted(in_flight(board)) == [0, 3]
    finish(client, "session")
    assert in_flight(board) == [0, 0]


def test_affinity_keeps_a_session_together(make_client, board):
    """Guards against the requests of a session that meet on no rank."""
    client = make_client(policy="affinity:epsilon=10")
    add(client, *(Request(f"r{i}", prompt=10 + i, session_id="s") for i in range(4)))
    assert sorted(in_flight(board)) == [0, 4]


def test_affinity_keeps_an_adapter_together(make_client, board):
    """Guards against an adapter that every rank has to load, though the operator asked for affinity."""
    client = make_client(policy="affinity:epsilon=10")
    requests = [Request(f"r{i}", prompt=10) for i in range(4)]
    for request in requests:
        request.lora_request = SimpleNamespace(lora_name="an adapter")
    add(client, *requests)
    assert sorted(in_flight(board)) == [0, 4]


def test_a_session_whose_prompts_cannot_be_looked_up_stays_together(make_client, vllm, board, monkeypatch):
    """Guards against a session that loses its cache where engines hash with a random seed; and a lost balance."""
    random_seeds(vllm, monkeypatch)
    client = make_client()
    add(client, *(Request(f"r{i}", prompt=10, session_id="s") for i in range(2)))
    assert sorted(in_flight(board)) == [0, 2]
    add(client, *(Request(f"more{i}", prompt=10, session_id="s") for i in range(30)))
    assert min(in_flight(board)) > 0  # its rank was loaded
    finish(client, *client.reqs_in_flight)
    add(client, *(Request(f"none{i}", prompt=10) for i in range(4)))
    assert in_flight(board) == [2, 2]


@pytest.mark.parametrize("off", ["looked up", "not cached", "policy"])
def test_a_session_is_no_reason_where_there_is_a_better_one(make_client, vllm, board, monkeypatch, off):
    """Guards against sessions that unbalance ranks though the index tells what is cached, or nothing is."""
    if off != "looked up":
        random_seeds(vllm, monkeypatch)
    if off == "not cached":
        init = vllm.client.DPLBAsyncMPClient.__init__
        monkeypatch.setattr(vllm.client.DPLBAsyncMPClient, "__init__", without_cache(init))
    client = make_client(**({"policy": "least_loaded"} if off == "policy" else {}))
    add(client, *(Request(f"r{i}", prompt=10, session_id="s") for i in range(4)))
    assert in_flight(board) == [2, 2]


def random_seeds(vllm, monkeypatch):
    """Each engine hashes with a seed of its own."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    del vllm.hashes.NONE_HASH
    vllm.hashes.resolve_none_hash_seed = lambda _: random.random()


def without_cache(init):
    """A client of engines without a prefix cache."""

    def made(client, *args, **kwargs):
        init(client, *args, **kwargs)
        client.vllm_config.cache_config.enable_prefix_caching = False

    return made


def test_affinity_has_no_key_in_a_common_beginning(make_client, board):
    """Guards against one key for all requests: prompts that all begin alike would all go to one rank."""
    client = make_client(policy="affinity:epsilon=10")
    add(client, *(Request(f"r{i}", prompt=300) for i in range(4)))
    assert in_flight(board) == [2, 2]


def test_a_prompt_of_embeddings_has_no_key(make_client, board):
    """Guards against the policy `affinity` that fails at a request without token ids."""
    client, request = make_client(policy="affinity"), Request("a")
    request.prompt_token_ids, request.prompt_embeds = None, [0.0] * 5
    add(client, request)
    assert sum(in_flight(board)) == 1
    assert board.snapshot()["in_flight_tokens"].sum() == 5


def test_a_send_that_fails_cancels_the_booking(make_client, board):
    """Guards against a request that was never sent and counts for ever."""
    client = make_client()
    client.on_send = raising
    with pytest.raises(ZeroDivisionError):
        add(client, Request("a"))
    assert in_flight(board) == [0, 0]
    assert hooked(client) == list(HOOKED)  # that failure was not ours


def test_without_an_engine_to_choose_vllm_chooses(make_client, board, engines, log):
    """Guards against a request that is refused because the board says that no engine lives."""
    client = make_client()
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


@pytest.mark.parametrize("pinned", [None, 0])
def test_where_vllm_knows_better_the_booking_follows(make_client, vllm, board, monkeypatch, pinned):
    """Guards against a booking at a rank that vLLM passes over: one that sleeps, or that was scaled away."""
    client = make_client()
    stock = vllm.client.DPLBAsyncMPClient.get_core_engine_for_request

    def passes_over_rank_0(client, request):
        request.data_parallel_rank = 1 if request.data_parallel_rank == 0 else request.data_parallel_rank
        return stock(client, request)

    monkeypatch.setattr(vllm.client.DPLBAsyncMPClient, "get_core_engine_for_request", passes_over_rank_0)
    add(client, *(Request(f"r{i}", prompt=10, rank=pinned) for i in range(4)))
    assert {engine for _, engine, _ in client.sent} == {client.core_engines[1]}
    assert in_flight(board) == [0, 4]
    assert board.snapshot()["in_flight_tokens"].tolist() == [0, 40]
    finish(client, *(f"r{i}" for i in range(4)))
    assert in_flight(board) == [0, 0]


# Waves.


def test_a_request_has_the_wave_of_the_board(make_client, board, engines):
    """Guards against a stale stamp, with which an engine starts a wave that is running already."""
    client = make_client()
    add(client, Request("first"))
    assert client.sent[0][2] == 0
    wait_until(lambda: polled(engines))
    engines[0].receive(None, wave=7)
    wait_until(lambda: (board.wave, board.phase) == (7, Phase.RUNNING))
    add(client, Request("a"))
    assert client.sent[1][2] == 7
    assert client.current_wave == 7


def test_a_request_has_the_wave_in_which_it_was_booked(make_client, board, engines):
    """Guards against a wave that begins between vLLM's stamp and the booking."""
    client = make_client()
    add(client, Request("first"))
    engines[0].receive(None, wave=7)
    wait_until(lambda: board.wave == 7)
    late = Request("late")  # vLLM stamped it before: with 0
    client.get_core_engine_for_request(late)
    assert late.current_wave == 7


def test_paused_ranks_wake_up_once_the_request_is_sent(make_client, engines):
    """Guards against ranks that sleep on, and against a wake-up that comes before its request."""
    client = make_client()
    asleep = []
    client.on_send = lambda: asleep.append([engine.poll() for engine in engines])
    add(client, Request("a"))
    assert asleep == [[False, False]]
    wait_until(lambda: polled(engines))


def test_a_client_that_was_made_outside_a_loop_wakes_ranks_with_its_first_request(make_client, engines):
    """Guards against a first request that passes the hooks by, and then waits for ranks that sleep."""
    client = make_client()
    assert LINK not in vars(client)
    add(client, Request("a"))
    assert client.first_requests == []  # it would wait: no task reads it
    wait_until(lambda: polled(engines))


@pytest.mark.parametrize("kind", ["DPLBAsyncMPClient", "DPAsyncMPClient"])
def test_the_flag_says_what_the_board_says(make_client, board, engines, kind, monkeypatch):
    """Guards against a drain that never ends: true while the ranks run, false while they wake up or sleep."""
    monkeypatch.setattr(client_link, "BROADCAST_S", 0.0)
    client = make_client(kind)
    seen = []
    client.on_send = lambda: seen.append((client.engines_running, client.dp_engines_running()))
    add(client, Request("a"))
    assert seen == [(False, False)]
    if kind == "DPLBAsyncMPClient":  # the other one's wake-up goes through vLLM's task
        wait_until(lambda: board.phase is Phase.WAKING)
        assert not client.dp_engines_running()
        add(client, Request("b"))
        assert not client.dp_engines_running()
        wait_until(lambda: polled(engines))
    else:
        engines[0].receive(None, wave=0)
    wait_until(lambda: board.phase is Phase.RUNNING)
    assert client.dp_engines_running()
    assert client.engines_running
    wait_until(lambda: polled(engines))
    for engine in engines:
        engine.wave_complete()
    wait_until(lambda: board.phase is Phase.PAUSED)
    assert not client.dp_engines_running()


def test_a_request_to_ranks_that_sleep_says_so_until_the_next_broadcast(make_client, board, monkeypatch):
    """Guards against a caller that waits until the ranks run and never sees it: stock clients say it (to 0.32)."""
    monkeypatch.setattr(client_link, "BROADCAST_S", 3600.0)
    client = make_client()
    assert not client.dp_engines_running()
    add(client, Request("a"))
    assert client.dp_engines_running()
    assert board.phase is not Phase.RUNNING
    monkeypatch.setattr(client_link, "BROADCAST_S", 0.0)
    other = make_client()
    add(other, Request("b"))
    assert not other.dp_engines_running()


def test_a_flag_that_cannot_be_read_is_false(make_client, monkeypatch):
    """Guards against a reader in vLLM that fails because ours does."""
    monkeypatch.setattr(client_link, "BROADCAST_S", 0.0)
    client = make_client()
    add(client, Request("a"))
    monkeypatch.setattr(client_link, "unpack_control", raising)
    assert client.dp_engines_running() is False


def test_from_033_on_no_client_tells_of_a_first_request(make_client, vllm, board, monkeypatch, log):
    """Guards against a message that the coordinator of that release logs as an error, and ranks woken twice."""
    monkeypatch.setattr(vllm.client.DPAsyncMPClient, "tells_of_first_requests", False)
    monkeypatch.setattr(Frontend, "wake", raising)  # it would end the link
    client = make_client()
    add(client, Request("a"), Request("b"))
    assert hooked(client) == list(HOOKED)
    assert log("leaves the board") == 0
    assert sum(in_flight(board)) == 2


def test_a_client_behind_a_balancer_takes_the_wave_from_the_board(make_client, board, engines, log):
    """Guards against an external load balancer's client that chooses, books, or stamps a stale wave."""
    client = make_client("DPAsyncMPClient")
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
