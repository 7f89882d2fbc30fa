"""Sorting and filtering of rows."""

from __future__ import annotations

import pytest

from dpshm.ops.screen.filter import arrange, matches
from dpshm.ops.screen.table import rank_columns
from dpshm.ops.screen.text import Glyphs
from tests.unit.ops.frames import make_frontend, make_rank

RANKS = [
    make_rank(0, waiting=2),
    make_rank(1, state="dead", waiting=9),
    make_rank(2, state="stalled"),
    make_rank(3, waiting=2),
]
COLUMNS = {column.title: column for column in rank_columns(Glyphs())}


@pytest.mark.parametrize(
    ("column", "reverse", "order"),
    [
        ("rank", False, [0, 1, 2, 3]),
        ("rank", True, [3, 2, 1, 0]),
        ("wait", False, [1, 0, 3, 2]),
        ("state", False, [1, 2, 0, 3]),
    ],
)
def test_the_worst_comes_first(column: str, reverse: bool, order: list[int]):
    """Guards against a sort that hides the rank one looks for, or that reorders equal ranks."""
    rows = arrange(RANKS, COLUMNS[column], reverse=reverse, text="")
    assert [r.dp_rank for r in rows] == order


def test_every_column_can_be_sorted_by():
    """Guards against a key that fails on values that are not known."""
    for column in COLUMNS.values():
        assert len(arrange(RANKS, column, reverse=False, text="")) == 4


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("", [0, 1, 2, 3]),
        ("dead", [1]),
        ("st", [2]),
        ("1-2", [1, 2]),
        ("3", [3]),
        ("0 dead", [0, 1]),
        ("zzz", []),
        ("-", []),
        ("2-", []),
        ("9" * 30, []),
    ],
)
def test_a_filter(text: str, ranks: list[int]):
    """Guards against a filter that shows others, or fails on what is half typed."""
    assert [r.dp_rank for r in RANKS if matches(r, text)] == ranks


def test_a_front_end_is_found_by_its_owner():
    """Guards against a filter that only knows numbers."""
    assert matches(make_frontend(3, owner="Node7:4711"), "node7")
    assert not matches(make_frontend(3, owner="node7:4711"), "node8")
