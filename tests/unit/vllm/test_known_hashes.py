"""Hashes that an API server keeps."""

from __future__ import annotations

from dpshm.vllm.known_hashes import KnownHashes


def test_what_is_asked_for_stays_and_the_rest_is_forgotten():
    """Guards against memory that grows without bound, and a system prompt that is forgotten while in use."""
    known = KnownHashes(most=10)
    known.put([(0, (7, b"used"))])
    for name in range(1, 200, 2):
        pairs = [(n, (n, str(n).encode())) for n in (name, name + 1)]
        known.put(pairs)
        assert known.get(0) == (7, b"used")
        assert all(known.get(n) == pair for n, pair in pairs)
        assert len(known) <= 22
    assert known.get(150) is None
    assert known.get(-1) is None
