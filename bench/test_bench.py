"""The benchmark's own arithmetic, on values worked out by hand: a figure is no better than what computes it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import style
from bench.comparison import busy_share
from bench.distribution import compare, quantiles
from bench.measures.accuracy import HORIZON_MS, Belief, judge
from bench.measures.freshness import first_known, sampled_ages
from bench.report import figure, show, too_busy


def _array(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values, float)


def test_an_update_is_known_with_a_newer_one() -> None:
    """Guards against counting an update that was overtaken as lost, or as known too early."""
    published = _array(0, 10, 20, 30)
    known = first_known(published, _array(1, 25, 40), _array(1, 3, 3))
    assert known.tolist() == [1, 25, 25, np.inf]


def test_the_age_is_that_of_the_oldest_unknown() -> None:
    """Guards against an age that starts anew with each newer update."""
    ages = sampled_ages(_array(0, 10, 100), _array(50, 60, 101), samples=11)
    assert ages.tolist() == [0, 10, 20, 30, 40, 40, 0, 0, 0, 0, 0]


def test_ratios_are_of_pairs() -> None:
    """Guards against a ratio of medians, which a slow moment of the machine would shift."""
    result = compare({"board": [{"us": 1.0}, {"us": 10.0}], "pub": [{"us": 4.0}, {"us": 20.0}]}, "us")
    assert result["ratios"] == {"pub": {"min": 2.0, "median": 3.0, "max": 4.0}}
    assert result["pub"] == {"us": 12.0, "rounds": [4.0, 20.0]}


def test_a_measurement_without_a_sample_is_refused() -> None:
    """Guards against a figure of a measurement that saw nothing."""
    with pytest.raises(ValueError, match="no sample"):
        quantiles([])


def test_accuracy_counts_sent_less_finished() -> None:
    """Guards against judging a belief by anything but what was sent and finished by then."""
    sent = [Belief(0.9, [0], [0], 0, 1.0), Belief(1.9, [1], [1], 0, 2.0), Belief(3.5, [2], [1], 0, 4.0)]
    finished = [_array(3.0)]
    booked = judge(sent, finished, bookings=True)
    assert booked["requests_mean"] == 0
    assert booked["ms_p99"] == 0
    reported = judge(sent, finished, bookings=False)
    assert reported["requests_mean"] == pytest.approx(1 / 3)
    # At 3.5 it believes 2; that ended being so at 3.0.
    assert reported["ms_mean"] == pytest.approx(500 / 3)


def test_a_belief_that_never_was_true_is_as_old_as_can_be() -> None:
    """Guards against leaving the worst beliefs out of the figure."""
    wrong = [Belief(0.5, [7], [7], 0, 1.0)]
    assert judge(wrong, [_array(2.0)], bookings=True)["ms_p50"] == HORIZON_MS


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("p50", 7.66, "p50 7.66 us"),
        ("us", 0.998, "0.998 us"),
        ("us_nothing_received", 0.909, "nothing received 0.909 us"),
        ("middle_cpu_us", 3.95, "middle cpu 3.95 us"),
        ("requests_mean", 0.5, "mean 0.5 requests"),
        ("rss_mb", 41.0, "rss 41 MB"),
        ("count", 20000.0, "count 20,000"),
        ("percent", 0.172, "0.172 %"),
    ],
)
def test_a_figure_has_its_unit(name: str, value: float, text: str) -> None:
    """Guards against a table whose reader has to know which of its numbers are microseconds."""
    assert figure(name, value) == text


def test_a_busy_machine_is_told() -> None:
    """Guards against figures of a busy machine that are quoted, and a quiet one that is called busy."""
    assert "too busy for figures: other processes took 63% of it" in too_busy({"busy_before": 0.63})
    assert too_busy({"busy_before": 0.02}) == too_busy({}) == ""
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    busy.start()
    share = busy_share(0.2)
    stop.set()
    busy.join()
    assert 0.5 / (os.cpu_count() or 1) < share <= 1


def test_the_tables_fit_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against tables that a terminal of 80 columns breaks, or from which it cuts numbers."""
    monkeypatch.setenv("COLUMNS", "80")
    show(json.loads((Path(__file__).parent / "charts/result.json").read_text(encoding="utf-8")))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", style.COLOURS)
def test_charts_can_be_read_on_white_and_on_dark_pages(colour: str, page: str) -> None:
    """Guards against ink or a colour that only one of a page's two modes shows."""
    assert style.contrast("#000000", "#ffffff") == 21
    assert style.contrast(colour, page) >= 3
