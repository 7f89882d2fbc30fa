"""Hashes that an API server keeps."""

from __future__ import annotations

from dpshm.vllm.known_hashes import KnownHashes


def test_what_is_asked_for_stays_and_the_rest_is_forgotten():
    """Guards against memory that grows without bound, and a system prompt that is forgotten while in use."""
    known = KnownHashes(most=10)
    known.put(0, b"used")
    for name in range(1, 200):
        known.put(name, str(name).encode())
        assert known.get(0) == b"used"
        assert known.get(name) == str(name).encode()
        assert len(known) <= 20
    assert known.get(150) is None
    assert known.get(-1) is None
