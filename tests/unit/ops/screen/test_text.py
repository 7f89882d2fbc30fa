"""Short numbers, bars and sparklines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpshm.ops.screen.text import Glyphs, count, duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.04, "0.0"),
        (3, "3"),
        (3.26, "3.3"),
        (999, "999"),
        (999.6, "1.0k"),
        (1000, "1.0k"),
        (1249, "1.2k"),
        (9960, "10k"),
        (34_000, "34k"),
        (999_700, "1.0M"),
        (5.6e6, "5.6M"),
        (2e9, "2.0G"),
    ],
)
def test_counts(value: float | None, text: str):
    """Guards against a number that is rounded to another unit, or loses its unit."""
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.00034, "0.3ms"),
        (0.012, "12ms"),
        (0.9996, "1.0s"),
        (1.24, "1.2s"),
        (45, "45s"),
        (120, "2.0m"),
        (99.6, "1.7m"),
        (12_240, "3.4h"),
        (12 * 86400, "12d"),
    ],
)
def test_durations(seconds: float | None, text: str):
    """Guards against a time whose unit is wrong."""
    assert duration(seconds) == text


@given(st.floats(0, 1e14))
def test_nothing_is_wider_than_its_column(value: float):
    """Guards against a table whose columns shift."""
    assert len(count(value)) <= 5
    assert len(duration(value / 1e6)) <= 5


@given(st.floats(-1, 2), st.integers(1, 30), st.booleans())
def test_a_bar_has_its_width(fraction: float, width: int, unicode: bool):
    """Guards against a bar that overflows its cell, whatever the board says."""
    assert len(Glyphs(unicode).bar(fraction, width)) == width


def test_a_bar_grows_in_eighths():
    """Guards against a bar that shows a full cache as nearly full, or an empty one as used."""
    assert [Glyphs().bar(f, 4) for f in (0, 1 / 32, 0.5, 31 / 32, 1)] == ["    ", "▏   ", "██  ", "███▉", "████"]
    assert Glyphs(unicode=False).bar(0.5, 4) == "##--"


def test_a_sparkline_shows_the_newest_at_the_right():
    """Guards against history that runs backwards, and against a busy rank that looks idle."""
    assert Glyphs().spark([9, 9, 0, 1, 4, 8], 8, 4) == "▁▂▅█"
    assert Glyphs().spark([5], 5, 3) == "  █"
    assert Glyphs().spark([0, 0], 0, 2) == "▁▁"
    assert Glyphs(unicode=False).spark([0, 8], 8, 2) == "_@"
