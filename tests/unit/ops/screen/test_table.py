"""A frame as lines of a terminal."""

from __future__ import annotations

import pytest

from dpshm.ops.screen.headline import screen
from dpshm.ops.screen.table import (
    CACHES,
    LATENCIES,
    STATES,
    History,
    Sort,
    frontend_table,
    rank_columns,
    rank_table,
)
from dpshm.ops.screen.text import Glyphs
from tests.unit.ops.frames import make_frame, make_frontend, make_rank

HUGE = 1 << 40
WIDTHS = (40, 80, 100, 120, 237)


@pytest.fixture
def busy():
    """256 ranks in every state with large numbers, and 5 front-ends."""
    ranks = [
        make_rank(
            i, state=list(STATES)[i % 8], waiting=HUGE, running=i, kv_cache_usage=i / 255, pid=4_194_303,
            prefill_backlog=HUGE, step_ms=12.5, requests_per_s=99.9, generation_tokens_per_s=1e9, age_s=1e6,
        )
        for i in range(256)
    ]  # fmt: skip
    frontends = [
        make_frontend(i, owner="x" * 48, sent_by_rank=[HUGE] * 256, in_flight_by_rank=[i] * 256) for i in range(5)
    ]
    return make_frame(ranks, frontends, waves_per_minute=8.0, rates_over_s=1.0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_terminal(busy, width: int, unicode: bool):
    """Guards against lines that wrap and push the rest off the screen, with the largest numbers there are."""
    history = History()
    for _ in range(300):
        history.add(busy)
    lines = screen(busy, history, width, Glyphs(unicode))
    assert max(line.cell_len for line in lines) <= width
    if not unicode:
        assert all(line.plain.isascii() for line in lines)


def test_columns_stand_under_their_headings(busy):
    """Guards against cells that shift when a value is wide or missing."""
    title, line = rank_table(History(), 120, Glyphs(), without=CACHES)
    lines = list(map(line, busy.ranks))
    for name in ("wait", "run", "age", "pid"):
        end = title.plain.index(name) + len(name)
        assert all(line.plain[end - 1] != " " and line.plain[end : end + 1] in ("", " ") for line in lines)


def test_eighty_columns_hold_what_matters(busy):
    """Guards against a standard terminal that lacks a rank's state, queue, cache, step or age."""
    history = History()
    history.add(busy)
    title, _ = rank_table(history, 80, Glyphs())
    assert " ".join(title.plain.split()) == "rank state wait run flight KV req/s tok/s ttft p99 age hist ≤1T"
    title, _ = rank_table(history, 80, Glyphs(), without=LATENCIES)  # front-ends that measure nothing
    assert " ".join(title.plain.split()) == "rank state wait run flight backlog KV req/s tok/s age requests ≤1T"


def test_columns_of_which_nothing_is_known_are_left_out():
    """Guards against a wide terminal without a rank's pid, and with columns that are empty from top to bottom."""
    cached = make_rank(0, num_blocks=100, cached_share=0.5, index_fill=0.25)
    for ranks, shown in (([cached, make_rank(1)], True), ([make_rank(0), make_rank(1)], False)):
        lines = [line.plain for line in screen(make_frame(ranks), History(), 160, Glyphs())]
        (heading,) = [line.split() for line in lines if "state" in line.split()]
        assert ({"hit", "index"} <= set(heading)) == shown
        assert not {"ttft", "p99", "queue", "tpot"} & set(heading)
    (line,) = [
        line.plain for line in screen(make_frame([cached]), History(), 160, Glyphs()) if "50%" in line.plain
    ]
    assert "50%   25%" in line


def test_the_column_that_sorts_is_marked(busy):
    """Guards against rows in an order that the reader cannot know."""
    for title, sign, reverse in (("wait", "▾", False), ("rank", "▾", False), ("state", "▴", True)):
        heading, _ = rank_table(History(), 120, Glyphs(), sort=Sort(title, reverse=reverse))
        plain, _ = rank_table(History(), 120, Glyphs())
        assert heading.plain.count(sign) == 1
        assert f"{sign}{title}" in heading.plain or f"{title}{sign}" in heading.plain
        assert heading.plain.replace(sign, " ") == plain.plain
    assert "^age" in rank_table(History(), 120, Glyphs(False), sort=Sort("age", reverse=True))[0].plain


def test_all_histories_have_one_scale_and_name_it():
    """Guards against two ranks whose bars look alike and are ten times apart, and bars of work that is lost."""
    history = History()
    history.add(make_frame([make_rank(0, running=900), make_rank(1)]))
    for _ in range(100):
        history.add(make_frame([make_rank(0, running=4), make_rank(1, running=40)]))
    history.add(make_frame([make_rank(0, running=4), make_rank(1, state="dead", running=40)]))
    heading, line = rank_table(history, 160, Glyphs())
    assert heading.plain.endswith("requests ≤40")  # the 900 were before what is shown
    assert line(make_rank(0)).plain[-3:] == "▂▂▂"
    assert line(make_rank(1)).plain[-3:] == "██ "


def test_the_state_is_a_word_and_a_sign_of_its_own():
    """Guards against states that only a colour tells apart."""
    # alive has the sign of running, stuck that of stalled, and unknown that of silent
    assert len({sign for sign, _, _ in STATES.values()}) == len(STATES) - 3
    assert len({plain for _, plain, _ in STATES.values()}) == len(STATES) - 3
    _, line = rank_table(History(), 80, Glyphs())
    assert "✕ dead" in line(make_rank(3, state="dead")).plain


def test_ranks_of_other_nodes_have_a_sign():
    """Guards against a rank whose process a reader looks for on the wrong node."""
    _, line = rank_table(History(), 80, Glyphs())
    assert [line(make_rank(3, remote=remote)).plain.split()[0] for remote in (False, True)] == ["3", "@3"]


def test_a_step_that_lasts_shows_how_long():
    """Guards against a rank that hangs in a step and shows the fine mean of the steps before."""
    columns = {c.title: c for c in rank_columns(Glyphs())}
    assert columns["step"].cell(make_rank(step_ms=20.0, step_age_s=0.03)) == "20ms"
    assert columns["step"].cell(make_rank(step_ms=20.0, step_age_s=45.0)) == "45s"
    assert columns["step"].cell(make_rank(step_ms=None, step_age_s=None)) == "-"


def test_front_ends_show_what_is_in_flight_by_rank():
    """Guards against bookings of one rank shown as another's."""
    frontends = [make_frontend(0, sent_by_rank=[10, 20, 30], in_flight_by_rank=[0, 7, 0])]
    title, line = frontend_table(120, Glyphs())
    assert line(frontends[0]).plain[title.plain.index("in flight by rank") :].split() == [
        "0",
        "7",
        "0",
        "10",
        "20",
        "30",
    ]
