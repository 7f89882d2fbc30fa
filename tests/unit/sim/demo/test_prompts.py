"""Prompts of traces: engine and front-end make the same fingerprints of the same blocks."""

from __future__ import annotations

from dpshm.sim.demo.prompts import TracePrompt, fingerprint_of, identity_of

KEY = 77


def test_both_sides_agree():
    """Guards against an engine that inserts other fingerprints than front-ends look up."""
    blocks = [0, 1, 5, -3, 1 << 40, (1 << 64) - 1, KEY]
    found = TracePrompt(blocks, 512).fingerprints(512, identity_of(512), KEY)
    assert found is not None
    assert found.tolist() == [fingerprint_of(block, KEY) for block in blocks]
    assert 0 not in found.tolist()
    assert len(set(found.tolist())) == len(blocks)


def test_an_index_of_another_kind_is_not_matched():
    """Guards against blocks of a trace that are looked up among fingerprints of tokens."""
    prompt = TracePrompt([1, 2], 512)
    assert prompt.fingerprints(512, identity_of(512) + 1, KEY) is None
    assert prompt.fingerprints(16, identity_of(16), KEY) is None
    assert identity_of(16) != identity_of(512)
