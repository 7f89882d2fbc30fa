"""What a sweep removes, and what it leaves. See test_board.py for groups whose processes are killed."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from dpshm.board import files, lock_file
from dpshm.board.locks import coordinator_byte, engine_byte
from dpshm.board.segment import Segment
from dpshm.board.sweep import sweep, sweep_dead, sweep_lock_files
from dpshm.errors import SegmentInvalid
from tests.unit.board.headers import header


def test_sweep_removes_only_the_dead(folder: Path):
    """Guards against removing a live board, and against keeping a dead one."""
    assert not sweep("g")
    made = Segment.create(header())
    files.sockets_path("g").mkdir()
    assert not sweep("g")
    made.locks.unlock(coordinator_byte(made.header.columns))
    made.locks.lock(engine_byte(made.header.columns, 0))
    assert not sweep("g")  # an engine lives on
    made.close()
    assert sweep("g")
    assert list(folder.iterdir()) == []
    assert not sweep("g")


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 8192, b"\xff" * 8192], ids=lambda c: f"{len(c)}")
def test_sweep_removes_what_no_version_understands(folder: Path, content: bytes):
    """Guards against a damaged file that blocks its group's name until an operator comes."""
    (folder / "dpshm-g").write_bytes(content)
    with pytest.raises(SegmentInvalid):
        Segment.attach("g")
    assert sweep("g")


def test_sweep_dead_removes_the_dead_of_this_user(folder: Path):
    """Guards against dead groups that fill the tmpfs, and against a start that removes what it should leave."""
    live = Segment.create(header("live"))
    for name in ("dead-1", "dead-2"):
        Segment.create(header(name)).close()
        files.sockets_path(name).mkdir(0o700)
        (files.sockets_path(name) / "frontends").touch()
    Segment.create(header("other-user")).close()
    os.chown(folder / "dpshm-other-user", 12345, -1)
    (folder / "dpshm-notes").write_bytes(b"my notes")
    (folder / "dpshm-link").symlink_to(folder / "dpshm-notes")
    os.mkfifo(folder / "dpshm-fifo")
    files.sockets_path("stray").mkdir(0o700)
    starting = files.lock_sockets_folder(files.sockets_path("starting"))
    assert starting is not None
    assert sweep_dead() == ["dead-1", "dead-2"]
    left = {entry.name.removeprefix("dpshm-") for entry in folder.iterdir()}
    left = {name for name in left if not name.endswith(".locks")}
    assert left == {"live", "other-user", "notes", "link", "fifo", "starting.sockets"}
    live.close()
    starting.close()
    assert sweep_dead() == ["live"]


def locks_of(segment: Segment) -> Path:
    """Its lock file."""
    return lock_file.path_beside(segment.path, segment.header.lock_token)


def damage(segment: Segment) -> None:
    """Scribbles over the header, past every check of this process."""
    with open(segment.path, "r+b") as file:
        file.write(b"\0" * 64)


def test_a_group_whose_locks_cannot_be_asked_is_not_swept(folder: Path):
    """Guards against a sweep under the living: without its lock file a group does not show that it lives."""
    with closing(Segment.create(header())) as made:
        locks = locks_of(made)
        locks.chmod(0o640)
        assert not sweep("g")
        locks.unlink()
        assert not sweep("g")
        assert sweep_dead() == []
        assert made.path.exists()
        made.unlink()
        assert list(folder.iterdir()) == []


def test_a_damaged_header_does_not_make_the_living_dead(folder: Path):
    """Guards against a sweep of a live group whose header does not tell its lock file any more."""
    made = Segment.create(header())
    damage(made)
    assert not sweep("g")
    assert sweep_dead() == []
    made.close()
    assert sweep("g")
    assert list(folder.iterdir()) == []


def test_a_damaged_header_beside_locks_that_cannot_be_opened(folder: Path):
    """Guards against taking a lock file that may not be opened for one that is free."""
    with closing(Segment.create(header())) as made:
        damage(made)
        locks_of(made).chmod(0o640)
        assert not sweep("g")


def test_lock_files_of_killed_starts_are_swept(folder: Path):
    """Guards against files that killed starts leave for ever, and against removing one that is in use."""
    token = "0123456789abcdef"
    made = Segment.create(header())
    damaged = Segment.create(header("damaged"))
    damage(damaged)
    damaged.close()
    with closing(Segment.create(header("unlinked"))) as unlinked:
        unlinked.path.unlink()
        left = {locks_of(made), locks_of(damaged), locks_of(unlinked)}
        made.close()
        strays = [lock_file.path_beside(folder / f"dpshm-{name}", token) for name in ("a.b", "g", "never")]
        for path in strays:
            path.touch(0o600)
        others = [folder / "dpshm-g.locks", folder / "other.0123456789abcdef.locks", folder / f"dpshm-g.{token}"]
        for path in others:
            path.touch(0o600)
        assert sweep_lock_files() == strays
        assert left | set(others) < set(folder.iterdir())
        assert sweep_dead() == ["g"]
