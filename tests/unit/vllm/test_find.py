"""Tests of `dpshm.vllm.find`: a process finds its board by an address."""

from __future__ import annotations

import os

import pytest

from dpshm import Coordinator, Frontend
from dpshm.board import files, layout
from dpshm.board.header import make_header
from dpshm.board.segment import Segment
from dpshm.vllm.find import group_at, owner_name
from tests.support import NOWHERE, LoneBoard


def test_the_address_leads_to_the_board(group, using):
    """Guards against a process that does not find the board of its own deployment, or finds another's."""
    mine = using(Coordinator(group=group, dp_size=2))
    using(Coordinator(group=f"{group}-other", dp_size=2))
    assert group_at(mine.stats_publish_address) == group
    assert group_at("ipc:///nowhere") is None
    assert group_at(None) is None
    assert group_at("") is None


def test_a_dead_groups_board_is_not_found(group, using, monkeypatch):
    """Guards against a new server that writes to what a killed one left."""
    monkeypatch.setattr(files, "groups", lambda: [group])  # all lone boards have one address
    board = using(LoneBoard(group))
    address = board.segment.header.stats_address
    assert group_at(address) is None
    using(Frontend.attach(group))
    assert group_at(address) == group


def test_a_damaged_board_is_passed_over(group, using):
    """Guards against one broken file on the node that keeps every server from its board."""
    broken = LoneBoard(f"{group}-broken")
    try:
        with open(broken.segment.path, "r+b") as f:
            f.write(b"rubbish!")
        mine = using(Coordinator(group=group, dp_size=1))
        assert group_at(mine.stats_publish_address) == group
    finally:
        broken.segment.unlink()
        broken.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_strangers_board_is_passed_over(group, using):
    """Guards against a board of another user, whose name sorts first and which names a server's address."""
    mine = using(Coordinator(group=group, dp_size=1))
    stranger = f"{group[:-1]}-"  # sorts before the group
    assert stranger < group
    settings = {"balancing": "external", "waves": True, "counts_with_kv": True}
    addresses = dict.fromkeys(("engine_input_address", "engine_output_address"), NOWHERE)
    header = make_header(stranger, 4, 4, stats_address=mine.stats_publish_address, settings=settings, **addresses)
    segment = using(Segment.create(header))
    try:
        assert group_at(mine.stats_publish_address) == stranger  # its owner is this user, and it lives
        os.chown(segment.path, 65534, 65534)
        assert group_at(mine.stats_publish_address) == group
    finally:
        segment.unlink()


def test_owner_names_fit_and_differ():
    """Guards against API servers of two launchers that take each other's row: both count from 0."""
    names = {owner_name(i, a) for i in (0, 63) for a in ("tcp://10.0.0.1:5555", "ipc:///tmp/" + "x" * 80)}
    assert len(names) == 4
    assert all(len(name.encode()) <= layout.OWNER_BYTES for name in names)
