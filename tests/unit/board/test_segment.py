"""A segment's life: creation, attach, close and unlink. See test_board.py for locks across processes."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dpshm.board import files, layout
from dpshm.board.locks import coordinator_byte
from dpshm.board.segment import Segment
from dpshm.errors import (
    HandleClosed,
    SegmentNotFound,
)
from tests.support import count_fds
from tests.unit.board.headers import header


def test_a_new_segment_is_zero_but_for_its_header(folder: Path):
    """Guards against rubbish that reads as load, and against a file that others can open."""
    with closing(Segment.create(header(waves=True))) as made, closing(Segment.attach("g")) as found:
        assert set(made.words[layout.PAGE_BYTES // 8 :].tolist()) == {0}
        assert found.header == made.header
        assert found.header.settings == {"waves": True}
        assert found.header.boot_id
        assert stat.S_IMODE((folder / "dpshm-g").stat().st_mode) == 0o600
        assert made.layout == layout.make_layout(4, 3)
        names = {"dpshm-g", f"dpshm-g.{made.header.lock_token}.locks"}
        assert {f.name for f in folder.iterdir()} == names
        assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o600 for name in names)


def test_writers_see_each_other_and_readers_cannot_write(folder: Path):
    """Guards against private mappings, and against a tool that can damage what it looks at."""
    with (
        closing(Segment.create(header())) as made,
        closing(Segment.attach("g")) as writer,
        closing(Segment.attach("g", readonly=True)) as reader,
    ):
        at = made.header.columns["load"].offset // 8
        writer.words[at] = 17
        assert (made.words[at], reader.words[at]) == (17, 17)
        with pytest.raises(TypeError, match="read-only"):
            reader.words[at] = 18
        with pytest.raises(ValueError, match="read-only"):
            np.asarray(reader.words)[at] = 18
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.locks.lock(coordinator_byte(reader.header.columns))
        assert made.words[at] == 17


def test_nobody_makes_a_group_twice(folder: Path):
    """Guards against a second coordinator that replaces a living group's board."""
    with closing(Segment.create(header())) as made:
        before = count_fds()
        with pytest.raises(FileExistsError):
            Segment.create(header())
        assert count_fds() <= before
        assert made.linked
        assert os.stat(made.path).st_ino == os.fstat(made.fileno()).st_ino


def test_what_is_not_there_is_not_found(folder: Path):
    """Guards against an error that leaves the operator guessing which groups there are."""
    with closing(Segment.create(header("here"))), pytest.raises(SegmentNotFound, match="groups here: here"):
        Segment.attach("there")
    (folder / "dpshm-here").unlink()
    with pytest.raises(SegmentNotFound, match="groups here: none"):
        Segment.attach("there")


def test_closing_drops_the_locks_though_views_live_on(folder: Path):
    """Guards against a row that stays taken while an array is in use, and against a crash at its use."""
    made = Segment.create(header())
    at = made.header.columns["load"].offset // 8
    made.words[at] = 5
    view = np.asarray(made.words)
    made.close()
    assert not made.usable
    assert view[at] == 5
    with closing(Segment.attach("g")) as other:
        assert not other.locks.is_shared()


def test_closing_twice_is_once(folder: Path):
    """Guards against closing a descriptor that now belongs to another file."""
    made = Segment.create(header())
    before = count_fds()
    made.close()
    assert count_fds() < before
    with open(os.devnull) as other:
        made.close()
        assert other.read() == ""
    assert not made.usable
    assert isinstance(made.why_unusable(), HandleClosed)


def test_nothing_is_left_of_a_segment_that_is_closed(folder: Path):
    """Guards against a process that attaches often and runs out of descriptors or memory."""
    Segment.create(header()).close()
    before, mapped = count_fds(), Path("/proc/self/maps").read_text().count("dpshm-g")
    for _ in range(5):
        Segment.attach("g").close()
    assert count_fds() <= before
    assert Path("/proc/self/maps").read_text().count("dpshm-g") <= mapped  # what other tests left may go meanwhile


def test_an_unlinked_file_is_noticed(folder: Path):
    """Guards against an unlink that stays unnoticed: a new attach fails, attached processes go on."""
    with closing(Segment.create(header())) as made, closing(Segment.attach("g")) as other:
        assert made.linked
        os.unlink(made.path)
        assert not made.linked
        assert not other.linked
        other.words[600] = 3
        assert made.words[600] == 3
        with pytest.raises(SegmentNotFound):
            Segment.attach("g")


def test_unlink_takes_the_sockets_with_it(folder: Path):
    """Guards against a sockets' folder that is left behind, and against a second unlink failing."""
    with closing(Segment.create(header())) as made:
        files.sockets_path("g").mkdir()
        (files.sockets_path("g") / "frontends").touch()
        made.unlink()
        assert list(folder.iterdir()) == []
        made.unlink()


def test_unlink_leaves_a_successors_file_alone(folder: Path):
    """Guards against an old coordinator that, closing late, removes the new one's board and sockets."""
    with closing(Segment.create(header())) as old:
        os.unlink(old.path)
        with closing(Segment.create(header())) as new:
            files.sockets_path("g").mkdir()
            old.unlink()
            assert new.linked
            locks = f"dpshm-g.{new.header.lock_token}.locks"
            assert {f.name for f in folder.iterdir()} == {"dpshm-g", "dpshm-g.sockets", locks}
