"""``dpshm feed`` and ``GET /loads``: what a router outside reads, over both ways, from a live group."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
import zmq

from dpshm import Board, Coordinator, Engine, Frontend, SettingError
from dpshm.ops.feed import TOPIC, Feed
from dpshm.ops.loads import Loads, RankLoad
from dpshm.ops.web import Server
from tests.e2e.load import environment
from tests.support import Popen, wait_until


@pytest.fixture
def loaded(group, using):
    """A group of two ranks: rank 0 has requests and one in flight, rank 1 is drained."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    publish(engines[0])
    frontend = using(Frontend.attach(group))
    coordinator.drain(1)
    using(_Ending(frontend.route(10, dp_rank=0)))
    return engines


def publish(engine):
    """What rank 0 has."""
    engine.publish(waiting=2, running=3, kv_cache_usage=0.5, prefill_backlog=70)


class _Ending:
    """Keeps a route until the test ends."""

    def __init__(self, route):
        self.close = route.done


def check(loads):
    """Compares loads with those of the group above."""
    assert list(loads) == list(Loads.__struct_fields__)
    assert (loads["schema_version"], loads["linked"], loads["watched"]) == (1, True, True)
    first, second = loads["ranks"]
    assert list(first) == list(RankLoad.__struct_fields__)
    assert isinstance(first.pop("age_us"), int)
    assert first.pop("kv_cache_usage") == pytest.approx(0.5, abs=1e-4)
    assert first == {
        "dp_rank": 0,
        "state": "running",
        "routable": True,
        "waiting": 2,
        "running": 3,
        "in_flight": 1,
        "requests": 6,
        "prefill_backlog": 80,
    }
    assert (second["state"], second["routable"], second["requests"]) == ("drained", False, 0)


def subscribed(address):
    """A socket that hears all loads there."""
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.linger = 0
    socket.subscribe(TOPIC)
    socket.connect(address)
    return socket


def heard(socket):
    """The next message."""
    assert socket.poll(60_000), "nothing was published"
    topic, payload = socket.recv_multipart()
    return topic, json.loads(payload)


def test_loads_over_http_are_those_of_the_moment(loaded, group):
    """Guards against a router that decides by the page's last frame, which is a second old."""
    server = Server(group, interval_s=3600)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("GET", "/loads")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
            loads = json.loads(answer.read())
            connection.close()
            return loads

        def healthy():  # a rank that does not publish for long is silent, and a busy machine may hold a beat up
            publish(loaded[0])
            loads = ask()
            return loads["watched"] and loads["ranks"][0]["state"] == "running" and loads

        check(wait_until(healthy))
        loaded[0].publish(waiting=0, running=1)
        assert ask()["ranks"][0]["requests"] == 2
    finally:
        server.shutdown()
        server.close()


def test_the_command_publishes(loaded, group, using):
    """Guards against a feed that says something else than /loads, does not follow the group, or does not end."""
    options = ["--group", group, "--address", "tcp://127.0.0.1:*", "--rate", "50"]
    command = [sys.executable, "-m", "dpshm", "feed", *options]
    with Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        address = re.search(r"publishing at (\S+), 50 times a second", process.stderr.readline())[1]
        socket = using(subscribed(address))
        topic, _ = heard(socket)
        assert topic == f"dpshm/loads/1 {group}".encode()

        def healthy():  # as above
            publish(loaded[0])
            _, loads = heard(socket)
            return loads["watched"] and loads["ranks"][0]["state"] == "running" and loads

        check(wait_until(healthy))
        loaded[0].publish(waiting=0, running=1)
        wait_until(lambda: heard(socket)[1]["ranks"][0]["requests"] == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_group_that_ends_and_starts_again_is_followed(group, using):
    """Guards against a feed of a dead group's last loads for ever, as if they were new."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    feed = Feed(Board.attach(group), "ipc://@" + group)
    publishing = threading.Thread(target=feed.run, args=(100.0,))
    publishing.start()
    try:
        socket = using(subscribed(feed.address))
        assert heard(socket)[1]["linked"]
        coordinator.close()
        wait_until(lambda: not heard(socket)[1]["linked"])
        using(Coordinator(group=group, dp_size=3))
        wait_until(lambda: len(heard(socket)[1]["ranks"]) == 3)
    finally:
        feed.stop()
        publishing.join()
        feed.close()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://0.0.0.0:5560", "--insecure"),
        ("tcp://[::]:5560", "--insecure"),
        ("udp://127.0.0.1:1", "is no address"),
        ("tcp://", "is no address"),
        ("tcp://127.0.0.1:99999", "has no port from 0 to 65535"),
        ("tcp://127.0.0.1", "has no port"),
        ("ipc:///nowhere/at/all", "cannot publish at"),
    ],
)
def test_an_address_that_cannot_be(group, using, address, says):
    """Guards against loads that any machine may read by default, and a traceback for a mistyped address."""
    using(Coordinator(group=group, dp_size=1))
    with Board.attach(group) as board, pytest.raises(SettingError, match=re.escape(says)):
        Feed(board, address)
