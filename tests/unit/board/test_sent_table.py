"""The file in which front-ends share what they have just sent."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from dpshm.board.sent_table import MAX_ROWS, SLOTS, SentTable
from dpshm.errors import SegmentError, SegmentInvalid, SegmentNoSpace
from dpshm.rules.prefix_samples import SAMPLES


def test_all_that_open_it_share_it(tmp_path):
    """Guards against front-ends that each make a table of their own, and rows that overlap."""
    path = tmp_path / "sent"
    one, other = SentTable.open(path, 3), SentTable.open(path, 3)
    assert one.stamps.shape == (3, SLOTS)
    assert one.samples.shape == (3, SLOTS, SAMPLES)
    for row in range(3):
        one.stamps[row] = row + 1
        one.samples[row] = row + 11
    for row in range(3):
        assert (other.stamps[row] == row + 1).all()
        assert (other.samples[row] == row + 11).all()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["sent"]
    assert not SentTable.private().stamps.any()


def _mark(path: Path, row: int, begin: object) -> None:
    begin.wait(30)
    SentTable.open(path, 8).stamps[row] = row + 1


def test_those_that_make_it_at_once_share_it(tmp_path):
    """Guards against a front-end that replaces the table which another one made a moment before."""
    spawn = multiprocessing.get_context("fork")
    begin = spawn.Barrier(8)
    path = tmp_path / "sent"
    processes = [spawn.Process(target=_mark, args=(path, row, begin)) for row in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert SentTable.open(path, 8).stamps[:, 0].tolist() == list(range(1, 9))


def test_a_large_group_has_a_table_of_bounded_size(tmp_path):
    """Guards against 68 MiB of shared memory for 4,096 front-ends that might come."""
    assert SentTable.open(tmp_path / "sent", 4096).stamps.shape == (MAX_ROWS, SLOTS)
    assert (tmp_path / "sent").stat().st_size < 4_400_000


def test_what_is_no_table_is_refused(tmp_path):
    """Guards against a file of another user, version or size that is written to, or kills its reader."""
    path = tmp_path / "sent"
    SentTable.open(path, 2)
    with pytest.raises(SegmentInvalid, match="should have"):
        SentTable.open(path, 3)
    path.chmod(0o644)
    with pytest.raises(SegmentInvalid, match="alone may use"):
        SentTable.open(path, 2)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"another")
    with pytest.raises(SegmentInvalid, match="not a table of version"):
        SentTable.open(path, 2)
    path.unlink()
    path.symlink_to(tmp_path / "other")
    with pytest.raises(SegmentError, match="cannot use the table"):
        SentTable.open(path, 2)
    with pytest.raises(SegmentError):
        SentTable.open(tmp_path / "missing" / "sent", 2)


def test_without_room_there_is_no_table(tmp_path, monkeypatch):
    """Guards against a front-end that is killed later, when it writes to a page that was never reserved."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SegmentNoSpace):
        SentTable.open(tmp_path / "sent", 2)
    assert not os.listdir(tmp_path)
