"""Peers that send as much as they can: the others are served, and the coordinator's memory has a bound.

Each hostile peer is a process that writes prepared frames into a plain socket, faster than any ZMQ library would.
"""

from __future__ import annotations

import os
import threading
import time

import pytest

from dpshm import Board, CoordinatorProcess, Engine
from dpshm.coordinator.flood_guard import MAX_GROWTH_BYTES
from dpshm.coordinator.settings import KEY_DIGITS
from tests.hostile import Honest, dial, frame, resident_bytes, send_while_taken
from tests.support import HEARING_S, Remote, StockFrontend, wait_until

SLACK_BYTES = 300 << 20
"""What may come in between two looks at the memory, at the speed of this machine's memory."""

FLOOD = """
import os, time
from tests.hostile import *
def topics(size, count):
    return b"".join(frame(b"\\x01" + os.urandom(size)) for _ in range(count))
while not told():
    try:
        with dial(addresses[which], kind) as s:
            while not told():
                try:
                    s.sendall(eval(what))
                except TimeoutError:
                    pass
    except OSError:
        time.sleep(0.01)  # it was thrown out, and comes again
"""
FLOODS = {
    "scaling and draining": (
        0,
        b"XSUB",
        "b''.join(map(frame, (encode_scale(3), encode_scale(2), wire.encode_drain(1, True), "
        "wire.encode_drain(1, False)))) * 1000",
    ),
    "rubbish from front-ends": (0, b"XSUB", 'frame(b"\\xc1") * 4000'),
    "joins of front-ends": (0, b"XSUB", 'frame(b"\\x01") * 4000'),
    "joins of engines": (1, b"XSUB", 'frame(b"\\x01") * 4000'),
    "rubbish from engines": (2, b"PUSH", 'frame(b"\\xc1") * 4000'),
    "large messages": (2, b"PUSH", 'frame(b"x" * 1_000_000)'),
    "short topics": (0, b"XSUB", "topics(16, 1000)"),
    "long topics": (1, b"XSUB", "topics(1000, 50)"),
    "endless parts from engines": (2, b"PUSH", 'frame(b"x" * 65_000, more=True) * 8'),
    "endless parts from front-ends": (0, b"XSUB", 'frame(b"x" * 1000, more=True) * 500'),
}

RELAY_FLOODS = {
    "rubbish news": (0, b"PUB", 'frame(b"\\x01\\x00\\xc1") * 4000'),
    "news of nobody": (0, b"PUB", 'frame(b"\\x07\\x07\\xc1") * 4000'),
    "endless parts of news": (0, b"PUB", 'frame(b"\\x01\\x00" + b"x" * 65_000, more=True) * 8'),
    "joins": (1, b"SUB", 'frame(b"\\x01\\x00\\x00") * 4000'),
    "joins and leaves": (1, b"SUB", '(frame(b"\\x01\\x00\\x00") + frame(b"\\x00\\x00\\x00")) * 2000'),
    "rubbish subscriptions": (1, b"SUB", 'frame(b"\\xc1") * 4000'),
    "short topics": (1, b"SUB", "topics(16, 1000)"),
    "long topics": (1, b"SUB", "topics(1000, 50)"),
    "endless parts of subscriptions": (1, b"SUB", 'frame(b"x" * 1000, more=True) * 500'),
}


def addresses(coordinator):
    """Of the three sockets."""
    return coordinator.stats_publish_address, *coordinator.engine_addresses


def stands(using, flood, addresses, pid, go_round):
    """Asserts that a process goes on while a peer floods it and afterwards, and that its memory has a bound."""
    which, kind, what = flood
    before = resident_bytes(pid)
    hostile = using(Remote())
    hostile.begin(FLOOD, addresses=addresses, which=which, kind=kind, what=what)
    most, rounds, deadline = 0, 0, time.monotonic() + 2.0
    while rounds < 3 or time.monotonic() < deadline:
        go_round()
        rounds += 1
        most = max(most, resident_bytes(pid))
    hostile.kill()
    assert most - before < MAX_GROWTH_BYTES + SLACK_BYTES
    go_round()


def ended(s):
    """Whether the other side hung up, within the socket's timeout."""
    try:
        while s.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_starves_nobody_and_has_a_bound(group, using, flood):
    """Guards against one peer that keeps all others from being heard, or makes the coordinator eat the machine."""
    coordinator = using(CoordinatorProcess(group=group, dp_size=2))
    honest = using(Honest(group))
    honest.go_round()
    stands(using, FLOODS[flood], addresses(coordinator), coordinator.proc.pid, honest.go_round)
    assert coordinator.proc.is_alive()
    stock = using(StockFrontend(coordinator.stats_publish_address))
    assert stock.heard_state().counts is not None


@pytest.mark.slow
def test_a_message_that_is_too_long_ends_its_own_connection(group, using):
    """Guards against a peer that makes the coordinator hold what it likes, and against others paying for it."""
    coordinator = using(CoordinatorProcess(group=group, dp_size=2))
    honest = using(Honest(group))
    before = resident_bytes(coordinator.proc.pid)
    for address, kind, size in zip(
        addresses(coordinator), (b"XSUB", b"XSUB", b"PUSH"), (1100, 1100, (1 << 20) + 1), strict=True
    ):
        with dial(address, kind) as bystander, dial(address, kind) as s:
            send_while_taken(s, [frame(b"x" * size)] * 3)
            s.settimeout(HEARING_S)
            assert ended(s)
            bystander.sendall(frame(b"\xc1"))
            bystander.settimeout(0.2)
            assert not ended(bystander)
    honest.go_round()
    assert resident_bytes(coordinator.proc.pid) - before < 64 << 20


@pytest.mark.slow
def test_who_does_not_listen_holds_nobody_up(group, using):
    """Guards against publishing that waits for a peer which stopped reading, or that piles up for it."""
    coordinator = using(CoordinatorProcess(group=group, dp_size=2, stats_interval_ms=1))
    honest = using(Honest(group))
    deaf = [dial(coordinator.stats_publish_address, b"XSUB") for _ in range(4)]
    deaf += [dial(coordinator.engine_addresses[0], b"XSUB") for _ in range(4)]
    for s in deaf:
        s.sendall(frame(b"\x01"))
    listener = using(StockFrontend(coordinator.stats_publish_address))
    listener.heard()
    before = resident_bytes(coordinator.proc.pid)
    published = honest.board.index("counts_published")
    i, enough = 0, honest.board.words[published] + 1000
    while i < 4000 or honest.board.words[published] < enough:
        honest.engines[0].publish(waiting=i % 1000, running=i % 7)
        i += 1
        if listener.socket.poll(1):
            listener.heard()
    honest.go_round()
    assert resident_bytes(coordinator.proc.pid) - before < 64 << 20
    for s in deaf:
        s.close()


@pytest.mark.slow
def test_connections_that_say_nothing_or_rubbish(group, using):
    """Guards against half-open connections, and bytes that are not ZMTP at all, that keep honest peers out."""
    settings = {"balancing": "hybrid", "dp_size_local": 0}  # tcp: any user of this machine can connect
    coordinator = using(CoordinatorProcess(group=group, dp_size=2, **settings))
    honest = using(Honest(group))
    silent = [dial(a, None) for a in addresses(coordinator) for _ in range(60)]
    ends = [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, bytes(64), os.urandom(64), b"\xff" + bytes(8) + b"\x7f\x03"]
    for address in addresses(coordinator):
        for data in ends:
            with dial(address, None) as s:
                send_while_taken(s, [data])
            with dial(address, b"XSUB") as s:
                send_while_taken(s, [data, os.urandom(1000)])
    honest.go_round()
    for s in silent:
        s.close()
    honest.go_round()


@pytest.mark.slow
def test_all_connections_are_made_anew_while_waves_go_round(group, using):
    """Guards against a cure that is worse than the illness: honest peers come back by themselves, each time."""
    coordinator = using(CoordinatorProcess(group=group, dp_size=2))
    honest = using(Honest(group))
    listener = using(StockFrontend(coordinator.stats_publish_address))
    listener.heard()
    dropped = honest.board.index("messages_dropped")
    for times in range(1, 4):
        with dial(coordinator.stats_publish_address, b"XSUB") as s:
            topics = (b"".join(frame(b"\x01" + os.urandom(1000)) for _ in range(20)) for _ in range(200))
            sender = threading.Thread(target=send_while_taken, args=(s, topics))
            sender.start()
            wait_until(lambda times=times: honest.board.words[dropped] >= times)
            sender.join()
        honest.go_round()
        while listener.socket.poll(0):
            listener.heard()
        honest.engines[0].publish(waiting=times, running=0)
        listener.wait_for(lambda state, times=times: (state.counts or [None])[0].waiting == times)


@pytest.mark.slow
@pytest.mark.parametrize("flood", RELAY_FLOODS)
def test_a_flood_of_the_relay_starves_no_node_and_has_a_bound(group, using, flood):
    """Guards against a peer that keeps a relay from hearing and telling the other nodes, or eats the machine."""
    settings = {"dp_size": 2, "nodes": 2, "waves": False, "insecure": True}
    head = using(CoordinatorProcess(group=group, host="127.0.0.1", **settings))
    boards = [using(Board.attach(group))]
    header = boards[0].segment.header
    relay = header.relay_addresses
    addresses = (head.stats_publish_address, *head.engine_addresses, *relay, f"{header.prefix_key:0{KEY_DIGITS}x}")
    follower = using(CoordinatorProcess(group=f"{group}-1", node=1, head=",".join(addresses), **settings))
    boards.append(using(Board.attach(f"{group}-1")))
    engines = [using(Engine.attach(board.segment.group, rank)) for rank, board in enumerate(boards)]
    count = 0

    def go_round():
        """What each engine publishes comes to the other node."""
        nonlocal count
        count += 1
        for engine in engines:
            engine.publish(waiting=count, running=0)
        wait_until(lambda: all(b.snapshot()["waiting"].tolist() == [count, count] for b in boards))
        wait_until(lambda: all(b.snapshot()["verdict"].tolist() == ["alive", "alive"] for b in boards))

    go_round()
    stands(using, RELAY_FLOODS[flood], relay, head.proc.pid, go_round)
    assert head.proc.is_alive()
    assert follower.proc.is_alive()
