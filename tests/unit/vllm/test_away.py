"""Tests of `dpshm.vllm.away`: a rank that is on its own dies and comes back, as one API server sees it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import zmq
import zmq.asyncio

from dpshm import Board, Coordinator, Engine
from dpshm.linux import processes
from dpshm.rules.liveness import Verdict
from dpshm.vllm.away import AwayRanks, output_handler
from dpshm.vllm.client_link import LINK
from tests.support import Remote
from tests.unit.vllm.fake_client import add, finish
from tests.unit.vllm.fake_core import Request

ENGINES = {0: b"\x00\x00", 1: b"\x01\x00"}


class GracefulHTTPError(Exception):
    """vLLM's, with the status that an API server answers."""

    def __init__(self, message, http_status):
        super().__init__(message)
        self.http_status = http_status


class Waiting:
    """Keeps what a request's generator would get."""

    def __init__(self):
        self.got = []

    def put(self, what):
        """Keeps it."""
        self.got.append(what)


class OutputProcessor:
    """vLLM's record of who waits."""

    def __init__(self, *request_ids):
        self.request_states = {r: SimpleNamespace(queue=Waiting()) for r in request_ids}
        self.aborted = []

    def abort_requests(self, request_ids, internal):
        """Forgets them."""
        assert internal
        self.aborted += request_ids
        for request_id in request_ids:
            self.request_states.pop(request_id)


class Client:
    """As `DPLBAsyncMPClient`, with the socket of requests."""

    def __init__(self, context):
        self.client_index = 0
        self.engine_ranks_managed, self.core_engines = list(ENGINES), list(ENGINES.values())
        self.reqs_in_flight, self.engine_inflight = {}, Counter()
        self.input_socket = context.socket(zmq.ROUTER)
        self.input_socket.bind("tcp://127.0.0.1:*")

    @staticmethod
    async def process_engine_outputs(client, outputs):
        """Finished requests leave the record."""
        for request_id in outputs.finished_requests:
            client.engine_inflight[client.reqs_in_flight.pop(request_id)] -= 1

    def has(self, request_id, rank):
        """Notes a request as sent."""
        self.reqs_in_flight[request_id] = ENGINES[rank]
        self.engine_inflight[ENGINES[rank]] += 1


@pytest.fixture(autouse=True)
def _error(monkeypatch):
    module = ModuleType("vllm.exceptions")
    module.GracefulHTTPError = GracefulHTTPError
    monkeypatch.setitem(sys.modules, "vllm.exceptions", module)


@pytest.fixture
def board(group, using):
    """The board of a group of two ranks without waves."""
    using(Coordinator(group=group, dp_size=2, waves=False))
    return using(Board.attach(group))


@pytest.fixture
def board_of_lockstep(group, using, coordinator):
    """The board of the group that `make_client` uses."""
    return using(Board.attach(group))


@pytest.fixture
def client():
    """A client."""
    with zmq.asyncio.Context() as context:
        made = Client(context)
        yield made
        made.input_socket.close()


def nobody(_rank, _connected):
    """Is told of connections, and does not care."""


def engine(group, rank, using):
    """A process that has the rank's row."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, rank)", group=group, rank=rank)
    return remote


def run(away, *until):
    """Looks until all conditions hold."""

    async def looking():
        while not all(condition() for condition in until):
            await away.look()
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(looking(), 60))


def test_what_a_dead_rank_had_fails_and_the_rest_goes_on(group, board, client, using):
    """Guards against requests that wait for a process that is gone, and others that end with them."""
    one, _ = engine(group, 1, using), engine(group, 0, using)
    processor = OutputProcessor("a", "b", "c")
    output_handler(lambda _: None)(SimpleNamespace(engine_core=client, output_processor=processor))
    away = AwayRanks(client, board, nobody)
    run(away, lambda: len(away._processes) == 2)
    for request_id, rank in (("a", 1), ("b", 0), ("c", 1)):
        client.has(request_id, rank)
    waiting = dict(processor.request_states)
    one.kill()
    run(away, lambda: away.ranks == {1})
    assert client.reqs_in_flight == {"b": ENGINES[0]}
    assert client.engine_inflight == {ENGINES[0]: 1, ENGINES[1]: 0}
    assert sorted(processor.aborted) == ["a", "c"]
    (error,) = waiting["a"].queue.got
    assert (error.http_status, "rank 1 died while it had the request" in str(error)) == (503, True)
    assert waiting["b"].queue.got == []


def test_a_rank_is_back_once_its_new_process_has_connected(group, board, client, using):
    """Guards against a request to a process that has the row and is not connected: it would be dropped."""
    one, _ = engine(group, 1, using), engine(group, 0, using)
    told = []
    away = AwayRanks(client, board, lambda *word: told.append(word))
    run(away, lambda: len(away._processes) == 2)
    one.kill()
    run(away, lambda: away.ranks == {1})
    again = [engine(group, 1, using)]
    for _ in range(3):
        asyncio.run(away.look())
    assert away.ranks == {1}
    with zmq.Context() as context, context.socket(zmq.DEALER) as ready:
        ready.setsockopt(zmq.IDENTITY, ENGINES[1])
        ready.connect(client.input_socket.getsockopt(zmq.LAST_ENDPOINT).decode())
        ready.send(b"ready")
        run(away, lambda: not away.ranks)
        one = again.pop()
        one.kill()  # and once more; now the process connects before it takes the row
        run(away, lambda: away.ranks == {1})
        ready.send(b"ready")
        run(away, lambda: not away.ranks)
    for _ in range(3):
        asyncio.run(away.look())
    assert away.ranks == set()
    one = engine(group, 1, using)
    for _ in range(3):
        asyncio.run(away.look())
    assert away.ranks == set()
    one.kill()
    run(away, lambda: away.ranks == {1})
    assert told == [(1, False), (1, True), (1, False), (1, True), (1, False)]


def test_a_process_that_took_the_row_unseen_is_another_one(group, board, client, using):
    """Guards against requests of a process that died and was replaced between two looks."""
    one, _ = engine(group, 1, using), engine(group, 0, using)
    away = AwayRanks(client, board, nobody)
    run(away, lambda: len(away._processes) == 2)
    client.has("a", 1)
    one.kill()
    engine(group, 1, using)
    run(away, lambda: away.ranks == {1})
    assert client.reqs_in_flight == {}


def test_a_rank_that_gave_its_row_up_is_not_dead(group, board, client, using):
    """Guards against requests that fail at an engine which goes on without the board, until it ends."""
    one, _ = engine(group, 1, using), engine(group, 0, using)
    away = AwayRanks(client, board, nobody)
    run(away, lambda: len(away._processes) == 2)
    client.has("a", 1)
    one.run("engine.close()")
    for _ in range(3):
        asyncio.run(away.look())
    assert (away.ranks, list(client.reqs_in_flight)) == (set(), ["a"])
    one.kill()
    run(away, lambda: away.ranks == {1})
    assert client.reqs_in_flight == {}


def test_a_request_for_a_rank_that_is_away_is_refused(board, client):
    """Guards against a pinned request that waits for ever, and against traces of it in vLLM's records."""
    processor = OutputProcessor("a", "b")
    output_handler(lambda _: None)(SimpleNamespace(engine_core=client, output_processor=processor))
    away = AwayRanks(client, board, nobody)
    away.ranks.add(1)
    client.has("a", 1)
    with pytest.raises(GracefulHTTPError, match="rank 1 died and is not back"):
        away.refuse(SimpleNamespace(request_id="a"), ENGINES[1])
    assert (client.reqs_in_flight, client.engine_inflight[ENGINES[1]]) == ({}, 0)
    with pytest.raises(GracefulHTTPError, match="all have died"):
        away.refuse(SimpleNamespace(request_id="b"))
    assert processor.request_states == {}


def test_a_call_to_a_rank_that_dies_fails(group, board, client, using):
    """Guards against a call to all ranks, such as /pause, that waits for one that is gone."""
    one, _ = engine(group, 1, using), engine(group, 0, using)
    away = AwayRanks(client, board, nobody)

    async def stock(method, *args, engine):
        if engine == ENGINES[1]:
            await asyncio.sleep(3600)
        return method, args

    async def calling():
        call = away.calling(stock)
        while len(away._processes) < 2:
            await away.look()
        assert await call("pause", 1, engine=ENGINES[0]) == ("pause", (1,))
        waiting = asyncio.ensure_future(call("pause", engine=ENGINES[1]))
        await asyncio.sleep(0)
        one.kill()
        while not away.ranks:
            await away.look()
        with pytest.raises(GracefulHTTPError, match="died before it answered"):
            await waiting
        with pytest.raises(GracefulHTTPError, match="died and is not back"):
            await call("pause", engine=ENGINES[1])

    asyncio.run(asyncio.wait_for(calling(), 60))


def test_an_api_server_sends_nothing_to_a_rank_that_is_away(make_client, board_of_lockstep):
    """Guards against a row that is alive again, and chosen, before its process has connected."""
    client = make_client()
    client.engine_inflight = Counter()
    add(client, Request("first"))
    link = vars(client)[LINK]
    link._away = AwayRanks(client, board_of_lockstep, nobody)
    link._away.ranks.add(1)
    client.sent.clear()
    add(client, *(Request(f"r{i}") for i in range(4)))
    assert {engine for _, engine, _ in client.sent} == {ENGINES[0]}
    with pytest.raises(GracefulHTTPError, match="rank 1"):
        add(client, Request("pinned", rank=1))
    link._away.ranks.add(0)
    with pytest.raises(GracefulHTTPError, match="all have died"):
        add(client, Request("none"))
    assert not {"pinned", "none"} & client.reqs_in_flight.keys()
    finish(client, *client.reqs_in_flight)
    assert board_of_lockstep.snapshot()["in_flight"].tolist() == [0, 0]


def test_a_process_that_has_just_taken_the_row_is_not_dead(group, board, client, using):
    """Guards against the mark of the process before it: the rank would stay away, since it connects only once."""
    engine(group, 1, using)
    away = AwayRanks(client, board, nobody)
    run(away, lambda: 1 in away._processes)
    assert not away._is_gone(1, Verdict.DEAD)
    away._dead[1] = away._processes.pop(1)
    assert [away._is_gone(1, Verdict.DEAD) for _ in range(3)] == [False] * 3
    assert 1 not in away._processes


def test_looks_while_a_process_takes_the_row(group, board, client, using, monkeypatch):
    """Guards against a rank that is lost because its words were read between two of its process's stores."""
    away, looks, looking = AwayRanks(client, board, nobody), [], []

    def looked(stock):
        def look_first(*args):
            # Not for the threads of the coordinator, nor for a look, which asks the same where no beat is fresh.
            if threading.current_thread() is threading.main_thread() and not looking:
                looking.append(True)
                for _ in range(2):  # as where the other process is kept waiting for longer than between two looks
                    asyncio.run(away.look())
                looks.append(int(board.engine_pid[1]))
                looking.clear()
            return stock(*args)

        return look_first

    for name in ("start_time", "namespace_inode"):
        monkeypatch.setattr(f"dpshm.engine.taking.processes.{name}", looked(getattr(processes, name)))
    using(Engine.attach(group, 1))
    monkeypatch.undo()
    run(away, lambda: 1 in away._processes)
    asyncio.run(away.look())
    assert set(looks) >= {os.getpid()}, "no look was within the stores"
    assert away.ranks == set()
