"""The lock file: who may open it, and what happens where it is missing or full of others' locks."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import closing
from pathlib import Path

import pytest

from dpshm.board import files, lock_file
from dpshm.board.board import Board
from dpshm.board.locks import coordinator_byte
from dpshm.board.segment import Segment
from dpshm.errors import HandleError, SegmentInvalid, SegmentNoSpace, SegmentNotFound
from tests.support import count_fds
from tests.unit.board.headers import header


def locks_of(segment: Segment) -> Path:
    """Its lock file."""
    return lock_file.path_beside(segment.path, segment.header.lock_token)


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_only_the_owner_may_open_it(folder: Path, umask: int):
    """Guards against a board that others may read, whose locks they can reach, and against an odd umask."""
    before = os.umask(umask)
    try:
        made = Segment.create(header(), file_mode=0o644)
    finally:
        os.umask(before)
    with closing(made):
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o644
        assert stat.S_IMODE(locks_of(made).stat().st_mode) == 0o600


def test_it_is_locked_and_named_before_the_segment_has_a_name(folder: Path, monkeypatch):
    """Guards against a sweep, or a second start, amid a start."""
    link, named = files.link, []

    def look(directory: int, fd: int, name: str) -> None:
        named.append((Path(name).suffix, "lock:" in Path(f"/proc/self/fdinfo/{fd}").read_text()))
        link(directory, fd, name)

    monkeypatch.setattr(files, "link", look)
    Segment.create(header()).close()
    assert named == [(".locks", True), ("", False)]


def test_a_start_that_is_too_late_leaves_no_lock_file(folder: Path):
    """Guards against lock files that pile up with each refused start."""
    with closing(Segment.create(header())) as made:
        fds = count_fds()
        with pytest.raises(FileExistsError):
            Segment.create(header())
        assert count_fds() <= fds
        assert {path.name for path in folder.iterdir()} == {"dpshm-g", locks_of(made).name}


def test_no_room_for_it(folder: Path, monkeypatch):
    """Guards against a segment that stays, or a bare OSError, where the file system has one inode too few."""

    def full(*_: object, **__: object) -> int:
        raise SegmentNoSpace("no inode left")

    monkeypatch.setattr(lock_file, "create", full)
    fds = count_fds()
    with pytest.raises(SegmentNoSpace):
        Segment.create(header())
    assert list(folder.iterdir()) == []
    assert count_fds() <= fds


def test_where_it_is_gone(folder: Path):
    """Guards against a second process on a row: nothing tells who lives any more. A reader goes without."""
    with closing(Segment.create(header())) as made:
        assert made.linked
        locks_of(made).unlink()
        assert not made.linked  # the coordinator warns of it
        with pytest.raises(SegmentInvalid, match=r"the lock file .* was removed"):
            Segment.attach("g")
        with closing(Board.attach("g")) as board:
            assert not board.segment.has_locks
            with pytest.raises(HandleError, match="may not open the lock file"):
                board.segment.locks  # noqa: B018
            assert not board.coordinator_alive()  # no beat
            assert not board.is_used()
        made.unlink()


def test_where_others_could_lock_in_it(folder: Path):
    """Guards against trust in locks that another user can take."""
    with closing(Segment.create(header())) as made:
        locks_of(made).chmod(0o644)
        with pytest.raises(SegmentInvalid, match=r"not a file that uid .* alone may open"):
            Segment.attach("g")
        locks_of(made).unlink()
        locks_of(made).symlink_to(made.path)
        with pytest.raises(SegmentInvalid, match=os.strerror(errno.ELOOP)):
            Segment.attach("g")


def test_a_segment_that_is_removed_amid_an_attach(folder: Path, monkeypatch):
    """Guards against an error that tells of damage, where the group just ended."""
    made = Segment.create(header())
    check = Segment.map_and_check

    def check_and_unlink(segment: Segment) -> None:
        check(segment)
        made.unlink()

    monkeypatch.setattr(Segment, "map_and_check", check_and_unlink)
    with pytest.raises(SegmentNotFound):
        Segment.attach("g")
    made.close()


def test_a_token_names_no_other_file(folder: Path):
    """Guards against a header that leads to a file elsewhere (rule 6)."""
    for token in ("", "../../../../etc/passwd", "0" * 15, "0" * 17, "0123456789abcdeF", "0123456789abcdef\n"):
        with pytest.raises(SegmentInvalid, match="names no lock file"):
            lock_file.path_beside(folder / "dpshm-g", token)


def test_locks_of_rows_are_in_it_and_not_on_the_segment(folder: Path):
    """Guards against a lock that is taken on the segment, where a reader can be in its way."""
    with closing(Segment.create(header())) as made, closing(Segment.attach("g")) as other:
        assert made.locks.is_locked(coordinator_byte(made.header.columns))
        for segment in (made, other):
            assert "lock:" not in Path(f"/proc/self/fdinfo/{segment.fileno()}").read_text()
