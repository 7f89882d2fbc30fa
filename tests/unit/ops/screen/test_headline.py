"""Tests of `dpshm.ops.screen.headline`: what stands above and below the rows."""

from __future__ import annotations

import pytest

from dpshm.board.events import Event
from dpshm.ops.frame import Latency
from dpshm.ops.screen.headline import below, headline
from dpshm.ops.screen.help import COLUMNS, MEANINGS, help_text
from dpshm.ops.screen.table import STATES, rank_columns
from dpshm.ops.screen.text import Glyphs
from tests.unit.ops.frames import make_coordinator, make_frame, make_frontend, make_rank


def test_the_headline_tells_of_the_whole_group():
    """Guards against totals that leave ranks out, and work of a dead rank that counts as running."""
    dead = make_rank(1, state="dead", running=5, waiting=1, in_flight=2)
    ranks = [make_rank(0, waiting=3, running=4), dead, make_rank(2, in_flight=1)]
    frame = make_frame(ranks, balance=1.8, waves_per_minute=8.2)
    lines = [line.plain for line in headline(frame, 200, Glyphs())]
    assert lines[0] == "g · wave 17 running · 8.2 waves/min · balance 1.80 · coordinator alive (pid 42)"
    assert lines[1] == "3 ranks: 1 dead, 2 running · 3 waiting · 4 running · 1 in flight · 8 lost"
    assert lines[2] == "! out of routing: rank 1 dead: dpshm doctor"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coordinator": make_coordinator(state="none")}, "no coordinator: routing goes on; start one"),
        ({"coordinator": make_coordinator(state="silent")}, "coordinator pid 42 hangs or is stopped"),
        ({"linked": False}, "this group has ended, or its segment was unlinked"),
    ],
)
def test_what_is_wrong_with_the_group_is_said(fields, words):
    """Guards against a group without a coordinator, or without a name, that looks healthy."""
    lines = headline(make_frame([make_rank()], **fields), 120, Glyphs())
    assert lines[2].plain.startswith(f"! {words}")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_headline_goes_on_in_the_next_line(width):
    """Guards against rates that a standard terminal cuts off."""
    ranks = [
        make_rank(i, state=state, requests_per_s=4.0, generation_tokens_per_s=500.0)
        for i, state in enumerate(("dead", "stalled", "silent", "drained", "running", "idle", "absent"))
    ]
    frame = make_frame(ranks, rates_over_s=5.0, ttft=Latency(count=9, mean_s=0.1, p50_s=0.1, p99_s=1.2))
    lines = [line.plain for line in headline(frame, width, Glyphs())]
    text = " · ".join(lines)
    for part in ("20 req/s", "2.5k tok/s", "coordinator alive (pid 42)", "ttft 100ms/1.2s", "1 absent"):
        assert part in text
    if width >= 80:
        assert "…" not in text
    low = [line.plain for line in headline(frame, width, Glyphs(), 6)]
    assert len(low) == 2
    assert low[1].startswith("7 ranks: 1 dead")
    assert max(map(len, lines)) <= width


def test_latencies_stand_only_where_they_are_measured():
    """Guards against a line of dashes where front-ends tell of no tokens."""
    assert not any("ttft" in line.plain for line in headline(make_frame([make_rank()]), 120, Glyphs()))


def events(n):
    """Events, the oldest first."""
    kinds = ["rank_joined"] * (n - 1) + ["rank_died"]
    return [
        Event(time=1.7e9 + i, recorded=True, group="g", kind=kind, row=i, text=f"event {i}")
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("height", range(24))
def test_the_free_lines_hold_front_ends_and_events(height):
    """Guards against lines that push the keys off the screen, and a tall terminal that stays empty."""
    frame = make_frame([make_rank()], [make_frontend(i) for i in range(8)])
    lines = [line.plain for line in below(frame, events(30), 100, height, Glyphs(), frontends=True)]
    assert len(lines) <= height
    if height >= 3:
        assert "event 29" in lines[lines.index("events") + 1]  # the newest first
    if height >= 15:
        assert sum("api:" in line for line in lines) == 8
    if height == 10:
        assert "... 6 more: Tab" in lines or "... 5 more: Tab" in lines or "... 4 more: Tab" in lines
    table = [line for line in lines if "owner" in line]
    assert not table or sum("api:" in line for line in lines) >= 1  # no title without a row
    without = [line.plain for line in below(frame, events(30), 100, height, Glyphs(), frontends=False)]
    assert not any("api:" in line for line in without)


def test_the_help_explains_every_column_and_state():
    """Guards against a column or a state that a reader has to look up elsewhere, and a help that does not fit."""
    named = {name for names, _ in COLUMNS for name in names.split(", ")}
    assert {c.title for c in rank_columns(Glyphs())} - named == {"rank", "state", "pid"}
    assert set(STATES) - set(MEANINGS) == {"running", "idle", "alive"}
    lines = help_text(Glyphs()).plain.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 78
    assert help_text(Glyphs(False)).plain.isascii()
