"""Tests of `dpshm.coordinator.kept_settings`: what a takeover knows of the coordinator before it."""

from __future__ import annotations

import logging
import stat

import msgspec
import pytest

from dpshm import Coordinator
from dpshm.coordinator.kept_settings import MAX_BYTES, differences, keep, kept
from dpshm.coordinator.settings import make_settings
from dpshm.service.serve import settings_of_live_group
from tests.support import LoneBoard, Remote


def test_what_is_kept_is_what_was_set(group, using):
    """Guards against a setting that a takeover resets silently."""
    board = using(LoneBoard(group))
    assert kept(board) == {}
    settings = make_settings(group=group, dp_size=2, stall_timeout_s=5, metrics_port=9400, metrics_host="::1")
    keep(board, settings)
    assert make_settings(**kept(board) | {"group": group, "dp_size": 2}) == settings
    assert differences(board, settings) == []
    other = make_settings(group=group, dp_size=2, stall_timeout_s=60, metrics_port=9400, metrics_host="::1")
    assert differences(board, other) == ["stall_timeout_s is 60.0, was 5.0"]
    readable = msgspec.structs.replace(settings, file_mode=0o640)
    assert differences(board, readable) == ["file_mode is 0o640, was 0o600"]


def test_what_a_takeover_sets_is_set(group, using, caplog):
    """Guards against `--mode 0644`, which an error about another user's board advises, without effect on a live
    group; and against a log that tells of more rows than the board has.
    """
    keeper = using(Remote())
    keeper.run(
        "coordinator = Coordinator(group=group, dp_size=3, max_engines=5, max_frontends=9)\n"
        "frontend = Frontend.attach(group)\n"
        "coordinator.hand_over()",
        group=group,
    )
    settings = settings_of_live_group(group)
    with using(Coordinator(group=group, **settings)) as taken:
        assert not [m for m in caplog.messages if "rows" in m]
        assert stat.S_IMODE(taken.board.segment.path.stat().st_mode) == 0o600
        taken.hand_over()
    with caplog.at_level(logging.WARNING):
        taken = using(Coordinator(group=group, **settings | {"file_mode": 0o644, "max_engines": 7}))
    assert stat.S_IMODE(taken.board.segment.path.stat().st_mode) == 0o644
    assert [m for m in caplog.messages if "keeps its rows for 5 engines and 9 front-ends" in m]


def test_settings_that_do_not_fit_are_not_kept(group, using):
    """Guards against half a text, or words beyond the column."""
    board = using(LoneBoard(group))
    end = board.words[len(board.words) - 1]
    for length in (MAX_BYTES, 100, MAX_BYTES * 3):
        keep(board, make_settings(group=group, dp_size=2, curve_dir="k" * length))
        assert bool(kept(board)) is (length == 100)
    assert board.words[len(board.words) - 1] == end


@pytest.mark.parametrize("value", [-1, 0, 1, (1 << 63) - 1, -(1 << 63)])
@pytest.mark.parametrize("at", [0, 1, 40, 191])
def test_damaged_words_are_no_settings(group, using, at, value):
    """Guards against trust in shared memory."""
    board = using(LoneBoard(group))
    settings = make_settings(group=group, dp_size=2, stall_timeout_s=5)
    keep(board, settings)
    board.kept_settings[at] = value
    assert kept(board) in ({}, {n: getattr(settings, n) for n in kept(board)})


def test_a_takeover_keeps_the_settings(group, using, caplog):
    """Guards against `dpshm coordinator --group G`, which tools recommend, that resets a group to defaults."""
    keeper = using(Remote())
    keeper.run(
        "coordinator = Coordinator(group=group, dp_size=3, waves=False, stall_timeout_s=7, metrics_port=0,"
        " max_frontends=9)\nfrontend = Frontend.attach(group)",
        group=group,
    )
    keeper.run("coordinator.hand_over()")
    found = settings_of_live_group(group)
    assert (found["stall_timeout_s"], found["metrics_port"], found["waves"], found["dp_size"]) == (7, 0, False, 3)
    with caplog.at_level(logging.WARNING):
        with Coordinator(**{"group": group} | found) as second:
            assert second.settings.stall_timeout_s == 7
            assert second.metrics_address
            assert not [m for m in caplog.messages if "other settings" in m]
            second.hand_over()
        with Coordinator(**{"group": group} | found | {"stall_timeout_s": 8.0}):
            assert [m for m in caplog.messages if "stall_timeout_s is 8.0, was 7.0" in m]
