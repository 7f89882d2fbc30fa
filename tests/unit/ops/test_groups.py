"""Which group a command means."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpshm import Board, Coordinator, Engine, Frontend, SegmentError, SegmentNotFound, SettingError
from dpshm.board.header import make_header
from dpshm.board.segment import Segment
from dpshm.cli.doctor import as_text as diagnosis_as_text
from dpshm.cli.ls import as_text
from dpshm.ops.doctor.ranks import check_ranks
from dpshm.ops.groups import find_groups, live_groups, open_group, summaries
from dpshm.ops.read_frame import read_frame
from dpshm.rules.liveness import Verdict
from tests.support import LoneBoard

ADDRESSES = ("stats_address", "engine_input_address", "engine_output_address")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of segments that no other test uses."""
    folder = Path("/dev/shm") / f"dpt-{tmp_path.name[-20:]}-{id(tmp_path)}"
    folder.mkdir()
    monkeypatch.setenv("DPSHM_DIR", str(folder))
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_no_group(alone: Path):
    """Guards against an error that does not say what to do."""
    with pytest.raises(SegmentNotFound, match=r"no live group in .*dpshm coordinator --group NAME"):
        open_group(None)
    assert summaries() == []


@pytest.mark.parametrize("folder", ["/dev/shm/dpt-none", "/etc/passwd"])
def test_a_directory_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, folder: str):
    """Guards against a wrong DPSHM_DIR, or a container without /dev/shm, that is called a node without groups."""
    monkeypatch.setenv("DPSHM_DIR", folder)
    for look in (summaries, lambda: open_group(None)):
        with pytest.raises(SegmentError, match=f"cannot use {folder} .*Set DPSHM_DIR"):
            look()


def test_the_only_live_group_is_meant(alone: Path):
    """Guards against a name that must be typed where there is no choice, and against dead groups as a choice."""
    with Coordinator(group="a", dp_size=1), open_group(None) as board:
        Segment.create(make_header("dead", 1, 1, settings={}, **dict.fromkeys(ADDRESSES, ""))).close()
        assert board.segment.group == "a"
        assert board.segment.readonly
        assert [(f.group, f.state) for f in find_groups()] == [("a", "alive"), ("dead", "dead")]


def test_several_are_listed(alone: Path):
    """Guards against a command that acts on the wrong deployment."""
    with Coordinator(group="a", dp_size=1), Coordinator(group="b", dp_size=2):
        with pytest.raises(SettingError, match=r"(?s)2 groups.*--group.*a .*1 ranks.*b .*2 ranks"):
            open_group(None)
        with open_group("b") as board:
            assert board.dp_size == 2


def test_a_group_without_its_coordinator_still_counts(alone: Path):
    """Guards against a group that cannot be looked at because its coordinator died."""
    with LoneBoard("orphan") as board:
        assert board.lock_engine(0)
        assert find_groups()[0].state == "orphaned"
        with open_group(None) as found:
            assert found.segment.group == "orphan"


def test_what_cannot_be_read_is_told(alone: Path):
    """Guards against a damaged segment that hides the others."""
    (alone / "dpshm-bad").write_bytes(b"x" * 4096)
    found = find_groups()
    assert [(f.group, f.state) for f in found] == [("bad", "unreadable")]
    assert "magic" in found[0].detail
    with pytest.raises(SegmentNotFound, match=r"bad .*unreadable"):
        open_group(None)
    with Coordinator(group="good", dp_size=1), open_group(None) as board:
        assert isinstance(board, Board)


def test_each_group_is_one_line(alone: Path):
    """Guards against a list that hides a group which is ill, or counts what dead ranks had."""
    (alone / "dpshm-bad").write_bytes(b"\0" * 8192)
    with Coordinator(group="prod", dp_size=2) as coordinator, Engine.attach("prod", 0) as engine:
        engine.publish(waiting=1, running=2)
        Segment.create(make_header("dead", 1, 1, settings={}, **dict.fromkeys(ADDRESSES, ""))).close()
        with Frontend.attach("prod"):
            found = {one.group: one for one in summaries()}
            lines = as_text(summaries()).splitlines()
    assert [found[name].state for name in ("bad", "dead", "prod")] == ["unreadable", "dead", "alive"]
    prod = found["prod"]
    assert (prod.dp_size, prod.requests, prod.frontends) == (2, 3, 1)
    assert sum(prod.ranks.values()) == 2
    assert prod.ranks["absent"] == 1
    assert prod.coordinator_pid == coordinator.board.coordinator_pid[0]
    assert [line.split()[:2] for line in lines[1:]] == [["bad", "unreadable"], ["dead", "dead"], ["prod", "alive"]]
    assert "the magic is" in lines[1]
    assert as_text([]) == f"no group is in {alone}"


def test_ranks_on_other_nodes_have_a_sign(alone: Path):
    """Guards against a command run on this node for a process of another one."""
    with LoneBoard("g", engines=20, dp_size=20) as board:
        board.mark(range(20), Verdict.ALIVE)
        for rank in (1, 19):
            board.marks.set_engine(rank, verdict=Verdict.DEAD, remote=True)
        assert board.lock_engine(0)  # a group with a process
        board.engine_pid[[1, 2, 19]] = 1
        board.marks.set_engine(2, verdict=Verdict.DEAD)
        (found,) = summaries()
        assert found.remote == [1, 19]
        assert as_text([found]).endswith("; on other nodes: @1 @19")
        dead = next(f for f in check_ranks(read_frame(board)) if f.check == "dead ranks")
        assert dead.what == "rank @1, rank 2, rank @19: the process is gone"
        assert dead.fix.startswith("on its node: see its log")
        told = diagnosis_as_text(find_groups(), [dead], [], {"g": found.remote}).splitlines()
        assert told[0].endswith("; on other nodes: @1 @19")
        for rank in range(20):
            board.marks.set_engine(rank, remote=True)
        assert as_text(summaries()).endswith("@14 @15 and 4 more")
        for rank in range(20):
            board.marks.set_engine(rank, verdict=Verdict.DEAD, remote=False)
        assert "other nodes" not in as_text(summaries())
        dead = next(f for f in check_ranks(read_frame(board)) if f.check == "dead ranks")
        assert dead.fix.startswith("see its log")


def test_live_groups_are_offered(alone: Path):
    """Guards against dead groups among those that one can look at."""
    with Coordinator(group="a", dp_size=1), Coordinator(group="b", dp_size=1):
        Segment.create(make_header("dead", 1, 1, settings={}, **dict.fromkeys(ADDRESSES, ""))).close()
        assert [found.group for found in live_groups()] == ["a", "b"]
