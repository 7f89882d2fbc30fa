"""Tests of `dpshm.vllm.adapters`: a client of vLLM's shape sends a request where its adapter has a place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dpshm.vllm.client_link import LINK
from tests.support import wait_until
from tests.unit.vllm.fake_client import add, finish
from tests.unit.vllm.fake_core import Request


def request(name: str, adapter: int, rank: int | None = None) -> Request:
    """A request for an adapter; 0: for the model itself."""
    made = Request(name, rank=rank)
    if adapter:
        made.lora_request = SimpleNamespace(lora_int_id=adapter, lora_name=f"adapter-{adapter}", lora_path="/a")
    return made


@pytest.fixture
def client(make_client, engines):
    """A client whose two ranks run two adapters each in a step."""
    made = make_client()
    made.vllm_config.lora_config = SimpleNamespace(max_loras=2)
    return made


def rank_of(client, name):
    """The rank that got a request."""
    ranks = {request_id: client.core_engines.index(engine) for request_id, engine, _ in client.sent}
    return ranks[name]


def test_a_request_goes_where_its_adapter_has_a_place(client):
    """Guards against a request that waits at the less loaded rank until another adapter's requests end."""
    add(client, request("a", 1, rank=0), request("b", 2, rank=0))  # rank 0 has no place left
    add(client, *(request(f"load-{i}", 0, rank=1) for i in range(6)))  # and is far less loaded
    add(client, request("c", 3))
    assert rank_of(client, "c") == 1
    add(client, request("again", 1))
    assert rank_of(client, "again") == 0  # its adapter runs there
    add(client, request("none", 0))
    assert rank_of(client, "none") == 0  # the model itself needs no place


def test_a_place_is_free_once_the_last_request_has_ended(client):
    """Guards against a rank that counts as full for ever."""
    add(client, request("a1", 1, rank=0), request("a2", 1, rank=0), request("b", 2, rank=0))
    add(client, *(request(f"load-{i}", 0, rank=1) for i in range(6)))
    finish(client, "a1")
    add(client, request("c", 3))
    assert rank_of(client, "c") == 1
    finish(client, "a2")
    add(client, request("d", 3))
    assert rank_of(client, "d") == 0
    assert sorted(vars(client)[LINK]._adapters._routes[0]) == [2, 3]


def test_the_least_loaded_of_full_ranks_is_chosen(client):
    """Guards against a request that is refused because no rank has a place."""
    add(client, *(request(f"{rank}-{adapter}", adapter, rank=rank) for rank in (0, 1) for adapter in (1, 2)))
    add(client, *(request(f"load-{i}", 1, rank=1) for i in range(6)))
    add(client, request("c", 3))
    assert rank_of(client, "c") == 0


def test_a_full_rank_is_chosen_if_the_other_has_left(client, engines):
    """Guards against a choice of vLLM's own because no rank with a place can take the request."""
    add(client, request("a", 1, rank=0), request("b", 2, rank=0))
    engines[1].close()
    wait_until(lambda: vars(client)[LINK]._frontend.health().routable == [0])
    add(client, request("c", 3))
    assert rank_of(client, "c") == 0  # vLLM's own choice would have been rank 1


def test_pinned_requests_leave_nothing(client):
    """Guards against ended bookings that pile up where no request asks for a place."""
    for number in range(20):
        add(client, request(f"r{number}", 1, rank=0))
        finish(client, f"r{number}")
    (routes,) = vars(client)[LINK]._adapters._routes[0].values()
    assert len(routes) == 1
