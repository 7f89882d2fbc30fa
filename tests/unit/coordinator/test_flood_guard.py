"""How much a process has grown."""

from __future__ import annotations

from dpshm.coordinator.flood_guard import MemoryGuard
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
    assert count_fds() == before


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
