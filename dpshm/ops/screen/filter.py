"""Filters and sorts the rows of a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from dpshm.ops.frame import Frontend, Rank
from dpshm.ops.screen.table import Column

T = TypeVar("T", Rank, Frontend)


def arrange(rows: Sequence[T], column: Column[T], *, reverse: bool, text: str) -> list[T]:
    """The rows that match, sorted by a column: the largest or worst first, equal ones by their number."""
    key = column.key or number
    return sorted((row for row in rows if matches(row, text)), key=key, reverse=reverse)


def matches(row: Rank | Frontend, text: str) -> bool:
    """Whether a row has any of the words of a filter: a number, a range 4-7, the start of a state or an owner."""
    words = text.split()
    return not words or any(_matches(row, word.lower()) for word in words)


def _matches(row: Rank | Frontend, word: str) -> bool:
    first, dash, last = word.partition("-")
    if first.isdecimal() and (last.isdecimal() if dash else True):
        return int(first) <= number(row) <= int(last or first)
    owner = row.owner.lower() if isinstance(row, Frontend) else ""
    return row.state.startswith(word) or (bool(owner) and word in owner)


def number(row: Rank | Frontend) -> int:
    """The number of a rank, or the index of a front-end."""
    return row.dp_rank if isinstance(row, Rank) else row.index
