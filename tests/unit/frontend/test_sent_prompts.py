"""What a front-end takes to be cached soon."""

from __future__ import annotations

from dpshm.frontend.sent_prompts import MOST, REMEMBERED_NS, SentPrompts


class Lazy:
    """Fingerprints that are made at their first use; `made` says how far."""

    def __init__(self, *blocks: int) -> None:
        self.blocks, self.made = blocks, 0

    def __len__(self) -> int:
        return len(self.blocks)

    def item(self, index: int, /) -> int:
        self.made = max(self.made, index + 1)
        return self.blocks[index]


def test_what_two_prompts_have_in_common():
    """Guards against a run that is off by one, and against one that shrinks what the index shows."""
    for common in range(40):
        sent = SentPrompts()
        sent.add(3, Lazy(*range(1, common + 1), *range(900, 907)), 0)
        prompt = Lazy(*range(1, common + 1), *range(800, 830))
        for held in (0, common // 2, common):
            assert sent.match(3, prompt, held, 1) == common
        assert sent.match(3, prompt, common + 2, 1) == common + 2
        assert sent.match(2, prompt, 0, 1) == 0


def test_prompts_are_compared_as_far_as_they_agree():
    """Guards against a prompt of vLLM that is hashed to its end, 2.5 ms of 12,000 tokens, for a first block."""
    sent, old, new = SentPrompts(), Lazy(*range(1, 800)), Lazy(5, *range(2, 800))
    sent.add(0, old, 0)
    assert sent.match(0, new, 0, 1) == 0
    assert (old.made, new.made) == (1, 1)


def test_what_was_sent_is_forgotten():
    """Guards against a memory that grows, or that outlives the request."""
    sent = SentPrompts()
    for i in range(MOST + 1):
        sent.add(0, Lazy(i + 1), i)
    assert [sent.match(0, Lazy(i + 1), 0, MOST) for i in range(MOST + 1)] == [0] + [1] * MOST
    assert sent.match(0, Lazy(MOST + 1), 0, MOST + REMEMBERED_NS - 1) == 1
    assert sent.match(0, Lazy(MOST + 1), 0, MOST + REMEMBERED_NS) == 0
    sent.add(0, Lazy(1), 0)
    sent.forget(0)
    assert sent.match(0, Lazy(1), 0, 1) == 0
    sent.add(0, Lazy(), 0)
    assert sent.match(0, Lazy(), 0, 1) == 0
