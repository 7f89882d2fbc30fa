"""Tests of `dpshm.cli.demo`: two reports beside each other."""

from __future__ import annotations

import msgspec
import pytest

pytest.importorskip("typer", reason="the command line is an extra: pip install 'dpshm[cli]'")

from dpshm.cli.demo import compared
from dpshm.sim.demo.report import Imbalance, Report, Staleness, Ttft


def report(stats: str, policy: str, mean: float | None) -> Report:
    """A report of a run whose mean time to first token was that."""
    return Report(
        *(stats, policy, None, 1.5, 0, 8, 4, 20.0, 900, 900, 0, 0, 0, 3),
        Staleness(0.0, 5.0, 0.01),
        Ttft(mean, mean, mean),
        Imbalance(3.5, 9),
        *(None, 100, 5, 0, [450, 450], [900], []),
    )


@pytest.mark.parametrize(
    ("board", "broadcast", "ratio", "sentence"),
    [
        (100.0, 150.0, "0.67", "came 1.50 times sooner: after 100 ms instead of 150 ms"),
        (150.0, 100.0, "1.50", "came 1.50 times later: after 150 ms instead of 100 ms"),
        (100.0, 101.0, "0.99", "it makes no difference (100 and 101 ms)"),
        (None, None, "-", "there is nothing to compare"),
    ],
)
def test_two_reports_in_one_table(board, broadcast, ratio, sentence):
    """Guards against a comparison whose words say something else than its numbers, or the better half of them."""
    text = compared(report("board", "least_work", board), report("pub", "vllm", broadcast))
    title, head, first, *_, last = text.splitlines()
    assert title == "8 engines, 4 front-ends, the same 900 arrivals twice, built-in at 1.5x"
    assert head.split("  ")[-1] == "ratio"
    assert "board, least_work" in head
    assert "broadcast, vllm" in head
    assert first.split()[-1] == ratio
    assert sentence in last
    assert all(len(line) <= 115 for line in text.splitlines())
    assert msgspec.json.decode(msgspec.json.encode(report("board", "least_work", board)))["cut_off"] == 0
