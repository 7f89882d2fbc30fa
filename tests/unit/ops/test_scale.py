"""Scaling a group from outside its coordinator's process."""

from __future__ import annotations

import signal

import msgspec
import pytest

from dpshm import Board, Coordinator, Engine, SettingError
from dpshm.ops import drain
from dpshm.ops.drain import NotHeeded
from dpshm.ops.scale import set_size
from tests.support import LoneBoard, Remote


def test_the_board_shows_the_new_size(group, using):
    """Guards against a command that returns before the group has its new size."""
    using(Coordinator(group=group, dp_size=2, max_engines=4))
    board = using(Board.attach(group))
    for size in (4, 1, 1):
        set_size(board, size)
        assert board.dp_size == size


@pytest.mark.parametrize("size", [0, -1, 5])
def test_a_size_that_the_board_cannot_hold(group, using, size):
    """Guards against a message that the coordinator refuses, and a wait for what never comes."""
    using(Coordinator(group=group, dp_size=2, max_engines=4))
    board = using(Board.attach(group))
    with pytest.raises(SettingError, match=rf"to {size} ranks: its board holds 1 to 4"):
        set_size(board, size)
    assert board.dp_size == 2


def test_without_a_coordinator_it_says_so(group, using):
    """Guards against a group that is scaled by a process which does not know its waves."""
    using(LoneBoard(group))
    board = using(Board.attach(group))
    with pytest.raises(NotHeeded, match="no coordinator, which alone may scale"):
        set_size(board, 3)
    assert board.dp_size == 2


def test_a_coordinator_that_hangs_is_named(group, using, monkeypatch):
    """Guards against a wait without an end."""
    monkeypatch.setattr(drain, "TIMEOUT_S", 0.2)
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    board = using(Board.attach(group))
    remote.signal(signal.SIGSTOP)
    with pytest.raises(NotHeeded, match=rf"pid {remote.pid}, did not scale it to 2 ranks within 0.2 s"):
        set_size(board, 2)
    remote.signal(signal.SIGCONT)
    remote.run("coordinator.close()")


def test_an_engine_beyond_the_size_is_shown(group, using):
    """Guards against an engine that scaling left over, which is healthy for itself and seen by no tool."""
    from dpshm.ops.doctor.group import check_group
    from dpshm.ops.read_frame import read_frame
    from dpshm.ops.screen.headline import warnings

    coordinator = using(Coordinator(group=group, dp_size=8, waves=False))
    board = using(Board.attach(group))
    engine = using(Engine.attach(group, 7))
    coordinator.scale(2)
    frame = read_frame(board)
    assert frame.beyond == [7]
    assert "rank 7 attached, and the group has 0 to 1: dpshm doctor" in warnings(frame)
    two = msgspec.structs.replace(frame, beyond=[2, 7])
    assert "ranks 2, 7 attached, and the group has 0 to 1: dpshm doctor" in warnings(two)
    found = [finding for finding in check_group(board) if finding.check == "rank number"]
    assert f"dpshm scale 8 --group {group}" in found[0].fix
    engine.close()
    assert read_frame(board).beyond == []
