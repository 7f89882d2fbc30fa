"""How much a process has grown."""

from __future__ import annotations

from dpshm.coordinator.flood_guard import MAX_IN_A_ROW, FloodGuard, MemoryGuard
from dpshm.net import wire
from tests.support import count_fds


def test_growth_is_seen_and_settled():
    """Guards against a limit that is never reached, or that is reached for ever once it was."""
    before = count_fds()
    growth = MemoryGuard(32 << 20)
    assert not growth.is_too_much()
    block = bytearray(64 << 20)
    for i in range(0, len(block), 4096):
        block[i] = 1
    assert growth.is_too_much()
    assert growth.bytes() > 60 << 20
    growth.settle()
    assert not growth.is_too_much()
    del block
    assert growth.bytes() <= 0
    growth.settle()
    assert not growth.is_too_much()
    del growth
    assert count_fds() <= before


def test_what_was_freed_goes_back():
    """Guards against a limit that creeps up with every flood, because the allocator keeps what was freed."""
    growth = MemoryGuard(1)
    pieces = [bytes(400) for _ in range(200_000)]
    kept = pieces[::1000]
    del pieces
    growth.settle()
    again = [bytes(400) for _ in range(200_000)]
    assert growth.bytes() < 120 << 20
    assert len(kept) + len(again) == 200_200


def test_messages_without_a_pause_are_a_flood():
    """Guards against a peer behind whose queue all others wait."""
    guard = FloodGuard(own_process=False)
    for _ in range(4):
        guard.on_messages("front-ends", MAX_IN_A_ROW // 4, more=True)
    assert guard.flood == ""
    guard.on_messages("front-ends", 1, more=True)
    assert f"{MAX_IN_A_ROW + 1} messages in a row" in guard.flood


def test_a_pause_or_another_socket_counts_anew():
    """Guards against honest peers that are disconnected because they sent much over a long time."""
    guard = FloodGuard(own_process=False)
    for _ in range(3):
        guard.on_messages("front-ends", MAX_IN_A_ROW, more=True)
        guard.on_messages("engines", MAX_IN_A_ROW, more=True)
        guard.on_messages("front-ends", 0, more=False)
        guard.on_messages("engines", 0, more=False)
    assert guard.flood == ""


def test_topics_are_a_flood():
    """Guards against subscriptions that libzmq keeps, a node for each byte; honest ones have no topic."""
    guard = FloodGuard(own_process=False)
    for _ in range(10_000):
        guard.on_subscription(wire.SUBSCRIBE)
    guard.on_subscription(wire.SUBSCRIBE + bytes(wire.MAX_TOPIC_BYTES))
    assert guard.flood == ""
    guard.on_subscription(wire.SUBSCRIBE + b"x")
    assert f"topics of {wire.MAX_TOPIC_BYTES + 1} bytes" in guard.flood


def test_a_flood_ends_with_the_connections():
    """Guards against one flood after which every connection is ended again and again."""
    guard = FloodGuard(own_process=True)
    guard.on_messages("front-ends", MAX_IN_A_ROW + 1, more=True)
    guard.on_subscription(wire.SUBSCRIBE + bytes(wire.MAX_TOPIC_BYTES + 1))
    guard.on_disconnect()
    assert guard.flood == ""
    guard.on_messages("front-ends", 1, more=True)
    guard.on_subscription(wire.SUBSCRIBE + b"x")
    guard.check_growth()
    assert guard.flood == ""
