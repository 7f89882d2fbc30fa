"""Draining and putting back, with a coordinator and without one."""

from __future__ import annotations

import os
import signal

import pytest

from dpshm import Board, Coordinator, Engine, Frontend, NoEngineAvailable, SegmentInvalid, SettingError
from dpshm.net import wire
from dpshm.ops import drain
from dpshm.ops.drain import NotHeeded, check_some_stay, parse_ranks, set_drained
from tests.support import LoneBoard, Remote, StockFrontend, wait_until
from tests.unit.ops.frames import make_frame, make_rank


def test_the_next_decision_honours_a_drain(group, using):
    """Guards against a drained rank that still gets requests, and one that gets none when it is back."""
    using(Coordinator(group=group, dp_size=2))
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    frontend = using(Frontend.attach(group))
    board = using(Board.attach(group))
    engines[0].publish(waiting=5, running=5)
    set_drained(board, [1], True)
    assert {frontend.route().dp_rank for _ in range(6)} == {0}
    set_drained(board, [0], True)
    with pytest.raises(NoEngineAvailable):
        frontend.route()
    set_drained(board, [0, 1], False)
    assert frontend.route().dp_rank in (0, 1)


def test_without_a_coordinator_the_operator_writes(group, using):
    """Guards against ranks that cannot be drained while the coordinator is down."""
    board = using(LoneBoard(group, watched=False))
    revision = board.words[board.index("revision")]
    looking = using(Board.attach(group))
    set_drained(looking, [1], True)
    assert looking.snapshot()["drained"].tolist() == [False, True]
    assert board.words[board.index("revision")] == revision + 1  # front-ends look at this word
    assert not board.coordinator_alive()
    set_drained(looking, [1], False)
    assert looking.snapshot()["drained"].tolist() == [False, False]


def test_a_coordinator_that_does_not_answer_is_named(group, using, monkeypatch: pytest.MonkeyPatch):
    """Guards against a drain that is said to be done, or waits for ever, when the coordinator hangs."""
    monkeypatch.setattr(drain, "TIMEOUT_S", 0.2)
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    board = using(Board.attach(group))
    remote.signal(signal.SIGSTOP)
    with pytest.raises(NotHeeded, match=rf"pid {remote.pid}, did not drain rank 0 within 0.2 s.*doctor"):
        set_drained(board, [0], True)
    remote.signal(signal.SIGCONT)
    remote.run("coordinator.close()")


def test_a_board_of_another_user_is_not_written(group, using, monkeypatch: pytest.MonkeyPatch):
    """Guards against a drain by a user with read access only."""
    using(LoneBoard(group, watched=False))
    looking = using(Board.attach(group))
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(SegmentInvalid, match="run as that user"):
        set_drained(looking, [0], True)


@pytest.mark.parametrize(
    ("words", "ranks"), [(["3"], [3]), (["4-7"], [4, 5, 6, 7]), (["5", "1-2", "2"], [1, 2, 5]), (["0-0"], [0])]
)
def test_ranks_as_they_are_written(words: list[str], ranks: list[int]):
    """Guards against a range that leaves out its end."""
    assert parse_ranks(words, 8) == ranks


@pytest.mark.parametrize(
    "word",
    ["8", "-1", "a", "", "3-", "-", "5-2", "1-99999999999999999999", "²", "1.5", "9" * 5000, "0-" + "9" * 5000],
)
def test_what_names_no_rank_is_refused(word: str):
    """Guards against a typing error that drains something else."""
    with pytest.raises(SettingError, match="names no ranks"):
        parse_ranks(["1", word], 8)


def test_the_last_one_stays():
    """Guards against an operator who takes the whole deployment out of service by mistake."""
    frame = make_frame([make_rank(0), make_rank(1, state="dead"), make_rank(2, drained=True, routable=False)])
    check_some_stay(frame, [1, 2])
    with pytest.raises(SettingError, match=r"draining rank 0 would leave no rank.*1 dead.*--force"):
        check_some_stay(frame, [0])


def test_the_message_says_which_and_what():
    """Guards against a drain that is taken for an undrain, or for a change of the number of ranks."""
    assert wire.decode_frontend_message(wire.encode_drain(7, True)) == wire.DrainMessage(7, True)
    assert wire.decode_frontend_message(wire.encode_drain(0, False)) == wire.DrainMessage(0, False)


def test_a_drain_of_a_rank_that_does_not_exist_is_dropped(group, using):
    """Guards against a message that writes beyond the ranks."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    peer = using(StockFrontend(coordinator.stats_publish_address))
    peer.send(wire.encode_drain(2, True))
    wait_until(lambda: coordinator.dropped.get("drain refused"))
    assert not coordinator.board.engine_mark.any()
