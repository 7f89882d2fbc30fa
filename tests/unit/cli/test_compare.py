"""Tests of `dpshm.cli.compare`: both sides in one table, and a sentence that the spread supports."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the command line is an extra: pip install 'dpshm[cli]'")

from dpshm.cli.compare import Pair, as_table, play_both
from dpshm.errors import SettingError
from dpshm.sim.demo.report import Imbalance, Report, Staleness, Ttft
from dpshm.sim.demo.workload import DemoSettings


def report(stats: str, policy: str, mean: float | None, seed: int = 0) -> Report:
    """A report of a run whose mean time to first token was that."""
    return Report(
        *(stats, policy, None, 9.0, seed, 8, 4, 20.0, 900, 900, 0, 0, 0, 3),
        Staleness(0.0, 5.0, 0.01),
        Ttft(mean, mean, mean),
        Imbalance(3.5, 9),
        *(None, 100, 5, 0, [450, 450], [900], [], "chat"),
    )


@pytest.mark.parametrize(
    ("ratios", "ratio", "sentence"),
    [
        ([0.8, 0.82, 0.81], "0.81 ± 0.02", "comes sooner: 0.81 ± 0.02 of the broadcast's mean"),
        ([1.3, 1.32, 1.31], "1.31 ± 0.02", "comes later: 1.31 ± 0.02 of the broadcast's mean"),
        ([0.8, 0.9, 1.0], "0.90 ± 0.25", "No difference is shown: 0.90 ± 0.25"),
        ([0.5], "0.50", "One run of each, a ratio of 0.50, shows nothing: say --seeds 5"),
        ([None, None], "-", "there is nothing to compare"),
    ],
)
def test_the_sentence_is_what_the_spread_supports(ratios, ratio, sentence):
    """Guards against a sentence that claims what other seeds contradict, or the better half of the numbers."""
    pairs = [Pair(report("board", "vllm", r and 100 * r), report("pub", "vllm", r and 100.0)) for r in ratios]
    text = as_table(pairs)
    title, sides, head, first, *_, last = text.splitlines()
    assert title == f"8 engines, 4 front-ends, chat at 9x, {len(ratios)} seeds"
    assert "board: vllm; broadcast: vllm" in sides
    assert head.split() == ["board", "broadcast", "ratio", "of", "each", "seed"]
    assert f"  {ratio}  " in first
    assert sentence in last
    assert all(len(line) <= 80 for line in text.splitlines())


def test_one_policy_on_both_sides_and_the_same_arrivals():
    """Guards against a difference of policies or seeds that is taken for one of the source of the load."""
    played = []

    def run(settings):
        played.append(settings)
        return report(settings.stats, settings.policy, 1.0, settings.seed)

    pairs = play_both(DemoSettings(policy="least_loaded", seed=7), 2, run)
    assert [(s.stats, s.policy, s.seed) for s in played] == [
        *(("board", "least_loaded", 7), ("pub", "least_loaded", 7)),
        *(("pub", "least_loaded", 8), ("board", "least_loaded", 8)),  # they take turns in playing first
    ]
    assert [(pair.board.stats, pair.broadcast.stats) for pair in pairs] == [("board", "pub")] * 2
    (default,) = play_both(DemoSettings(policy="least_work"), 1, run)
    assert (default.board.policy, default.broadcast.policy) == ("least_work", "vllm")  # which carries no work


@pytest.mark.parametrize(
    ("wrong", "seeds"), [({"keep": True}, 1), ({"chaos": True}, 1), ({"stats": "pub"}, 1), ({}, 0)]
)
def test_what_cannot_be_compared_is_refused(wrong, seeds):
    """Guards against a comparison that never ends, or that plays one side twice."""
    with pytest.raises(SettingError):
        play_both(DemoSettings(**wrong), seeds, lambda _: pytest.fail("it began"))
