"""The byte map: the one that its version promises, no word twice, no line with two writers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from dpshm.board import layout
from dpshm.board.layout import Column

DATA = Path(__file__).parents[2] / "data"


def words_of(column: Column) -> list[int]:
    """The byte offset of every word of a column."""
    axes = [range(0, n * step, step) for n, step in zip(column.shape, column.strides, strict=True)]
    return [column.offset + sum(at) for at in itertools.product(*axes)]


def test_the_map_is_the_one_that_its_version_promises():
    """Guards against a change of the map that forgets the version: other processes may run the older one.

    The file holds `make_layout(8, 17)`. Until the first release it may be replaced; after it, only together
    with a new version.
    """
    promised = json.loads((DATA / f"layout-{layout.VERSION_MAJOR}.{layout.VERSION_MINOR}.json").read_text())
    plan = layout.make_layout(8, 17)
    assert promised["magic"].encode() == layout.MAGIC
    assert plan.size == promised["size"]
    assert {name: json.loads(json.dumps(column)) for name, column in plan.columns.items()} == promised["columns"]


@pytest.mark.parametrize(("engines", "frontends"), [(1, 1), (3, 5), (16, 16), (17, 33), (64, 64)])
def test_no_two_words_are_the_same(engines: int, frontends: int):
    """Guards against columns that overlap, lie in the header, or run over the end."""
    plan = layout.make_layout(engines, frontends)
    everything = [at for column in plan.columns.values() for at in words_of(column)]
    assert len(set(everything)) == len(everything)
    assert all(at % 8 == 0 for at in everything)
    assert min(everything) == layout.PAGE_BYTES
    assert max(everything) + 8 <= plan.size
    assert plan.size % layout.PAGE_BYTES == 0


def writer(name: str) -> str:
    """Who writes a column; all engines together write the dense ones, on purpose."""
    if (
        name in layout.ENGINE_WORDS
        or name in ("step_model", "engine_time_namespace", "preemptions", "cache_state")
        or name.startswith("received_")
    ):
        return "engine"
    if name in layout.FRONTEND_WORDS or name.startswith("sent_") or name == "owner":
        return "front-end"
    return "engines" if name in ("load", "request_offset", "token_offset") else "coordinator"


def test_no_two_writers_share_two_lines():
    """Guards against false sharing: words of two processes in one pair of cache lines."""
    writer_of: dict[int, tuple[str, int]] = {}
    for name, column in layout.make_layout(5, 3).columns.items():
        who = writer(name)
        for row in range(column.shape[0]):
            first = column.offset + row * column.strides[0]
            last = first + (column.shape[1] - 1) * 8 if len(column.shape) > 1 else first
            process = (who, row if who in ("engine", "front-end") else 0)
            for pair in range(first // 128, last // 128 + 1):
                assert writer_of.setdefault(pair, process) == process, name


def test_the_loads_of_eight_engines_are_one_cache_line():
    """Guards against a decision over 8 engines that misses the cache more than once for their loads."""
    load = layout.make_layout(64, 64).columns["load"]
    assert load.offset % 64 == 0
    assert load.strides == (8,)
