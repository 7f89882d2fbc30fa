"""Replay: another policy's choices from what was seen."""

from __future__ import annotations

import csv
import sys

import pytest

from dpshm.board.words import pack_load
from dpshm.errors import SettingError
from dpshm.frontend.recorder import Decision
from dpshm.ops.replay import export, replay, summarise
from dpshm.policies import LeastWork, Request, View, least_loaded, round_robin
from dpshm.policies.columns import ListColumns, ListWork

MODEL = [10_000_000, 100_000, 50_000, 0, 0, 0, 0]


def decision(
    number: int,
    running: tuple[int, int],
    backlog: tuple[int, int] | None = None,
    choice: int = 0,
    cached: list[int] | None = None,
):
    """A decision between two ranks."""
    load = [pack_load(0, n, 0.5) for n in running]
    work = backlog and ListWork(list(backlog), [[0] * 2] * 3, [MODEL] * 2, 1000)
    return Decision(
        number,
        1000,
        View(ListColumns([0, 1], load, list(running), [1, 0], 2, work)),
        Request(100, cached=cached),
        choice,
        [2_000_000, 1_000_000],
    )


def test_another_policy_is_asked():
    """Guards against a replay that repeats what was chosen."""
    seen = [decision(1, (3, 1)), decision(2, (1, 3)), decision(3, (2, 2), choice=1)]
    replayed = replay(seen, least_loaded)
    assert [(r.choice, r.other) for r in replayed] == [(0, 1), (0, 0), (1, 0)]
    s = summarise("g", 4, "least_loaded", replayed)
    assert (s.group, s.frontend, s.decisions, s.agreed) == ("g", 4, 3, 1)
    assert (s.by_rank, s.other_by_rank) == ([2, 1], [2, 1])
    assert s.requests_at_choice == pytest.approx((3 + 1 + 2) / 3)
    assert s.requests_at_other == pytest.approx((1 + 1 + 2) / 3)
    assert s.expected_ms_at_choice is None
    assert (s.age_ms_p50, s.age_ms_p99) == (2.0, 2.0)


def test_expected_times():
    """Guards against an estimate for the wrong rank."""
    replayed = replay([decision(1, (1, 1), (4000, 0))], LeastWork())
    assert replayed[0].other == 1
    s = summarise("g", 0, "least_work", replayed)
    assert s.expected_ms_at_choice - s.expected_ms_at_other == pytest.approx(4000 * 0.05)


def test_what_ranks_had_cached():
    """Guards against a replay that asks a policy without what the front-end knew of the prompt."""
    seen = [decision(1, (2, 2), cached=[16, 64]), decision(2, (2, 2), cached=[48, 0]), decision(3, (1, 9))]
    replayed = replay(seen, least_loaded)
    assert [(r.choice, r.other) for r in replayed] == [(0, 1), (0, 0), (0, 0)]
    s = summarise("g", 0, "least_loaded", replayed)
    assert (s.cached_tokens_at_choice, s.cached_tokens_at_other) == ((16 + 48) / 2, (64 + 48) / 2)
    s = summarise("g", 0, "least_loaded", replayed[2:])
    assert (s.cached_tokens_at_choice, s.cached_tokens_at_other) == (None, None)


def test_a_policy_that_needs_more_than_was_recorded():
    """Guards against choices from tokens that were never recorded."""
    with pytest.raises(SettingError, match="the ring has none"):
        replay([decision(1, (1, 1))], LeastWork())
    with pytest.raises(SettingError, match="no decision yet"):
        summarise("g", 0, "x", [])


def test_export_to_csv(tmp_path):
    """Guards against a table that loses decisions, ranks, or which of them was chosen."""
    replayed = replay([decision(7, (3, 1), (10, 20), cached=[5, 6]), decision(8, (1, 3))], least_loaded)
    path = tmp_path / "out.csv"
    export(path, replayed)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["number"], r["dp_rank"], r["running"], r["chosen"], r["other"]) for r in rows] == [
        *(("7", "0", "3", "1", "0"), ("7", "1", "1", "0", "1")),
        *(("8", "0", "1", "1", "1"), ("8", "1", "3", "0", "0")),
    ]
    assert [r["outstanding_tokens"] for r in rows] == ["10", "20", "-1", "-1"]
    assert [r["cached_tokens"] for r in rows] == ["5", "6", "-1", "-1"]
    assert rows[0]["age_ns"] == "2000000"


def test_export_to_parquet(tmp_path):
    """Guards against a Parquet file that differs from the CSV."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    export(tmp_path / "out.parquet", replay([decision(7, (3, 1))], round_robin))
    assert pq.read_table(tmp_path / "out.parquet").to_pylist()[1]["running"] == 1


def test_exports_that_cannot_be(tmp_path, monkeypatch):
    """Guards against an export under a name that says something else, or that fails without a reason."""
    replayed = replay([decision(7, (3, 1))], round_robin)
    with pytest.raises(SettingError, match=r"ends in \.csv or \.parquet"):
        export(tmp_path / "out.xlsx", replayed)
    with pytest.raises(SettingError, match="cannot write"):
        export(tmp_path / "none" / "out.csv", replayed)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingError, match="Parquet needs pyarrow"):
        export(tmp_path / "out.parquet", replayed)
