"""A router's bookings: where they go, and that each one ends."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.coordinator.remote_rows import RemoteRows
from dpshm.ray.bookings import RETRY_S, Bookings
from dpshm.ray.names import Place, group_name
from tests.support import LoneBoard
from tests.unit.coordinator.test_remote_rows import message

RANKS = 3


@pytest.fixture
def coordinator(group, using):
    """A coordinator of replicas, which all have their rows."""
    coordinator = using(Coordinator(group=group, dp_size=RANKS, waves=False))
    coordinator.engines = [using(Engine.attach(group, rank)) for rank in range(RANKS)]
    return coordinator


@pytest.fixture
def bookings(group, using, coordinator):
    """Of one router."""
    return using(Bookings(group, "router-0"))


def outstanding(coordinator):
    """Requests and tokens in flight, by rank."""
    rows = coordinator.board.snapshot()
    return rows["in_flight"].tolist(), rows["in_flight_tokens"].tolist()


def test_the_fewest_tokens(coordinator, bookings, using, group):
    """Guards against a router that counts requests although it knows their sizes, or not what others sent."""
    other = using(Bookings(group, "router-1"))
    first = bookings.choose("a", 1000, range(RANKS))
    assert {other.choose(str(i), 10, range(RANKS)) for i in range(20)} == set(range(RANKS)) - {first}
    requests, tokens = outstanding(coordinator)
    assert sorted(requests) == [1, 10, 10]
    assert sorted(tokens) == [100, 100, 1000]
    bookings.ended("a")
    for i in range(20):
        other.ended(str(i))
    assert outstanding(coordinator) == ([0] * RANKS, [0] * RANKS)


def test_only_the_replicas_that_ray_offers(bookings):
    """Guards against a request for a replica that Ray is stopping: its row lives until its process ends."""
    assert [bookings.choose(str(i), 1, {1}) for i in range(3)] == [1, 1, 1]
    assert bookings.choose("x", 1, {7}) is None
    assert len(bookings) == 3


def test_a_request_is_booked_once(coordinator, bookings):
    """Guards against a booking for each time that a replica refused, and one that stays where no request is."""
    chosen = bookings.choose("a", 5, range(RANKS))
    again = bookings.choose("a", 5, set(range(RANKS)) - {chosen})
    assert again != chosen
    elsewhere = ({0, 1, 2} - {again}).pop()
    bookings.moved("a", elsewhere)
    requests, tokens = outstanding(coordinator)
    assert requests == [int(rank == elsewhere) for rank in range(RANKS)]
    assert tokens == [5 * int(rank == elsewhere) for rank in range(RANKS)]
    bookings.moved("a", None)
    assert outstanding(coordinator)[0] == [0] * RANKS
    bookings.ended("a")
    bookings.cancel("never booked")


def test_a_prompt(coordinator, bookings):
    """Guards against a replica's cache that the router does not look at."""
    prompt = np.arange(512)
    cache = coordinator.engines[1].open_cache(64, block_tokens=16)
    cache.insert(cache.hasher.fingerprints(prompt))
    assert bookings.choose("a", prompt, range(RANKS)) == 1
    assert outstanding(coordinator)[1][1] < len(prompt)


def test_no_board(group, monkeypatch):
    """Guards against a router that fails, or asks the kernel at each request, where there is no board."""
    asked = []

    def attach(*arguments, **options):
        asked.append(arguments)
        return Frontend.attach(*arguments, **options)

    bookings = Bookings(group, "router-0", attach)
    assert [bookings.choose(str(i), 1, range(RANKS)) for i in range(10)] == [None] * 10
    assert len(asked) == 1
    monkeypatch.setattr("dpshm.ray.bookings.time.monotonic", lambda: bookings._next_try + RETRY_S)
    with Coordinator(group=group, dp_size=1, waves=False), Engine.attach(group, 0):
        assert bookings.choose("a", 1, range(RANKS)) == 0
        bookings.close()


def test_a_new_board(group, using):
    """Guards against a router that goes on with the board of an actor that has ended."""
    bookings = using(Bookings(group, "router-0"))
    for _ in range(2):
        with Coordinator(group=group, dp_size=1, waves=False), Engine.attach(group, 0):
            assert bookings.choose("a", 1, {0}) == 0
            assert len(bookings) == 1


def test_places_travel():
    """Guards against metadata that another version of Ray makes something else of."""
    place = Place("node", "group", 3)
    assert Place.of(place.to_metadata()) == place
    assert Place.of({"theirs": 1}) is None


def test_names_of_groups():
    """Guards against two clusters, or two applications, that share a board."""
    names = {group_name(c, a, "m/x") for c in ("1:1", "1:2") for a in ("a", "b")}
    assert len(names) == 4
    assert all(name.startswith("ray-m-x-") for name in names)


def test_bookings_at_a_rank_of_another_node_end_at_once(group, using):
    """Guards against bookings that stay, and grow, because a rank whose row comes late may yet receive them."""
    board = using(LoneBoard(group))
    remote = RemoteRows(board, board.marks)
    remote.report(1, message(1), time.monotonic_ns())
    bookings = using(Bookings(group, "router-0"))
    for i in range(50):
        assert bookings.choose(f"{i}", 7, {1}) == 1
        assert bookings.choose(f"more {i}", 9, {1}) == 1  # at no moment is nothing in flight
        if i:
            bookings.ended(f"{i - 1}")
            bookings.ended(f"more {i - 1}")
        remote.report(1, message(2 + i), time.monotonic_ns())
        row = board.snapshot()[1]
        assert (int(row["in_flight"]), int(row["in_flight_tokens"])) == (2, 16)
