"""The limited log."""

from __future__ import annotations

import logging
import re

import pytest

from dpshm.coordinator.rate_limited_log import RateLimitedLog

logger = logging.getLogger("dpshm.test")


def test_a_flood_is_one_line(caplog: pytest.LogCaptureFixture):
    """Guards against a broken peer that fills the disk, and against its messages going uncounted."""
    flood = RateLimitedLog(logger, interval_s=3600)
    for i in range(1000):
        flood.note("malformed message", f"number {i}")
    assert [r.getMessage() for r in caplog.records] == ["malformed message: number 0"]
    assert caplog.records[0].levelno == logging.WARNING
    assert flood.counts == {"malformed message": 1000}


def test_one_reason_does_not_silence_another(caplog: pytest.LogCaptureFixture):
    """Guards against a flood of one kind hiding the only line of another."""
    flood = RateLimitedLog(logger, interval_s=3600)
    for reason in ("a", "a", "b", "a"):
        flood.note(reason, "x")
    assert [r.getMessage() for r in caplog.records] == ["a: x", "b: x"]
    assert flood.counts == {"a": 3, "b": 1}
    assert flood.counts["c"] == 0


def test_without_an_interval_every_line_comes(caplog: pytest.LogCaptureFixture):
    """Guards against suppressing at the end of an interval, where the next line is due."""
    flood = RateLimitedLog(logger, interval_s=0)
    for i in range(3):
        flood.note("a", i)
    assert [r.getMessage() for r in caplog.records] == ["a: 0", "a: 1", "a: 2"]


def test_lines_add_up_to_the_count(caplog: pytest.LogCaptureFixture):
    """Guards against occurrences that are neither logged nor mentioned by the next line."""
    flood = RateLimitedLog(logger, interval_s=0.02)
    while len(caplog.records) < 4 or "a: x (and" not in caplog.text:
        flood.note("a", "x")
        flood.note("b", "y")
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("a")]
    more = [int(m[1]) for line in lines if (m := re.fullmatch(r"a: x \(and (\d+) more like it\)", line))]
    assert lines[0] == "a: x"
    assert more
    told = len(lines) + sum(more)
    assert told <= flood.counts["a"]
    flood.note("c", "the last line of a is followed by silent ones alone")
    silent = flood.counts["a"] - told
    while (line := caplog.records[-1].getMessage())[:1] != "a":
        flood.note("a", "x")
        silent += 1
    assert line == (f"a: x (and {silent - 1} more like it)" if silent > 1 else "a: x")


def test_more_than_one_line_an_interval(caplog):
    """Guards against an operator's ten drains of which the log tells one, and against a peer's ten thousand."""
    news = RateLimitedLog(logging.getLogger("test"), interval_s=3600.0, lines=10, level=logging.INFO)
    with caplog.at_level(logging.INFO):
        for i in range(10_000):
            news.note("steering", i)
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", f"steering: {i}") for i in range(10)]
    assert news.counts == {"steering": 10_000}
