"""A segment's file: names, folders, permissions, and which files attach refuses."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dpshm.board import files
from dpshm.board.segment import Segment
from dpshm.board.sweep import sweep
from dpshm.errors import (
    SegmentError,
    SegmentInvalid,
    SettingError,
)
from tests.unit.board.headers import ADDRESSES, ENV, header

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".a", "-a", "a b", "x" * 49, "ä", "a\n", "a\0", "g.sockets", b"a", None, 3]
)
def test_a_name_that_cannot_name_a_group(folder: Path, name: str):
    """Guards against a group that writes outside its folder, or takes another group's sockets' folder."""
    with pytest.raises(SettingError, match="cannot name a group"):
        Segment.attach(name)


def test_groups_lists_files_that_can_be_groups(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against listing names that `attach` then refuses, and against failing where there is no folder."""
    for name in ("dpshm-b", "dpshm-a", "other", "dpshm-x y", "dpshm-a.sockets"):
        (folder / name).touch()
    (folder / "dpshm-link").symlink_to(folder / "dpshm-a")
    (folder / "dpshm-folder").mkdir()
    assert files.groups() == ["a", "b"]
    monkeypatch.setenv("DPSHM_DIR", str(folder / "none"))
    assert files.groups() == []
    monkeypatch.setenv("DPSHM_DIR", "")
    assert files.directory() == Path("/dev/shm")


def test_a_folder_that_cannot_be_used(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against a bare OSError for a mistyped DPSHM_DIR."""
    monkeypatch.setenv("DPSHM_DIR", str(folder / "none"))
    with pytest.raises(SegmentError, match="Set DPSHM_DIR"):
        Segment.create(header())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_others_may_be_let_read(folder: Path, mode: int):
    """Guards against a umask that takes the given permissions away, and against more than were given."""
    before = os.umask(0o077)
    try:
        with closing(Segment.create(header(), file_mode=mode, file_gid=os.getegid())):
            info = (folder / "dpshm-g").stat()
    finally:
        os.umask(before)
    assert (stat.S_IMODE(info.st_mode), info.st_gid) == (mode, os.getegid())


@as_root
def test_a_group_that_may_not_be_given(folder: Path):
    """Guards against a board that the wrong people can read, or half a segment, when a setting is refused."""
    code = (
        "import os; from dpshm.board.header import make_header; from dpshm.board.segment import Segment\n"
        f"header = make_header('g', 1, 1, settings={{}}, **{ADDRESSES})\n"
        "os.setgroups([]); os.setuid(12345); Segment.create(header, file_mode=0o640, file_gid=1)"
    )
    folder.chmod(0o777)
    env = {**ENV, "DPSHM_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "SegmentError: cannot give " in done.stderr
    assert "mode 0o640 and gid 1: Operation not permitted" in done.stderr
    assert list(folder.iterdir()) == []


def test_a_full_tmpfs_says_so_and_is_left_empty(tmp_path: Path):
    """Guards against SIGBUS in a writer much later, and against half a segment on a full tmpfs."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    code = (
        "import os; from dpshm.board.files import directory; from dpshm.board.header import make_header\n"
        "from dpshm.board.segment import Segment; from dpshm.errors import SegmentNoSpace\n"
        "try: Segment.create(make_header('g', 64, 64, settings={}, **{a: '' for a in "
        "('stats_address', 'engine_input_address', 'engine_output_address')}))\n"
        "except SegmentNoSpace as e: print(e, os.listdir(directory()), os.statvfs(directory()).f_bavail)"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code],
        env={**ENV, "DPSHM_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"has 64 KiB free and the board needs \d+ KiB: .*DPSHM_DIR.* \[\] 16$", done.stdout)


def test_a_symbolic_link_is_not_followed(folder: Path):
    """Guards against an attacker's link in a world-writable folder, to a file that gets mapped or removed."""
    with closing(Segment.create(header("real"))):
        (folder / "dpshm-g").symlink_to(folder / "dpshm-real")
        for readonly in (True, False):
            with pytest.raises(SegmentInvalid, match="symbolic link"):
                Segment.attach("g", readonly=readonly)
        with pytest.raises(SegmentError):
            sweep("g")
        with pytest.raises(FileExistsError):
            Segment.create(header())
        assert {f.name for f in folder.iterdir() if f.suffix != ".locks"} == {"dpshm-real", "dpshm-g"}


@pytest.mark.parametrize("readonly", [True, False])
def test_a_fifo_is_refused_without_waiting_for_its_other_end(folder: Path, readonly: bool):
    """Guards against `dpshm top` hanging for ever on a pipe that another user put in the folder."""
    os.mkfifo(folder / "dpshm-g")
    code = f"from dpshm.board.segment import Segment; Segment.attach('g', readonly={readonly})"
    env = {**ENV, "DPSHM_DIR": str(folder)}
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "SegmentInvalid" in done.stderr
    assert "not a regular file" in done.stderr


@as_root
def test_another_users_file_is_not_written_to(folder: Path):
    """Guards against booking on, or sweeping, what another user planted under the group's name."""
    Segment.create(header()).close()
    os.chown(folder / "dpshm-g", 12345, 12345)
    for act in (Segment.attach, sweep):
        with pytest.raises(SegmentInvalid, match=r"belongs to uid 12345 and this process is uid 0"):
            act("g")
    assert (folder / "dpshm-g").exists()


@as_root
def test_another_users_board_is_read_by_tools_alone(folder: Path):
    """Guards against a stranger's board that a server believes, and that ends it by SIGBUS when it shrinks."""
    Segment.create(header()).close()
    os.chown(folder / "dpshm-g", 12345, 12345)
    with pytest.raises(SegmentInvalid, match=r"belongs to uid 12345 and this process is uid 0"):
        Segment.attach("g", readonly=True)
    with pytest.raises(SegmentInvalid, match=r"belongs to uid 12345 and this process is uid 0"):
        Segment.attach("g", any_owner=True)  # a writer has to be the owner, whatever it asks for
    Segment.attach("g", readonly=True, any_owner=True).close()
    os.chown(folder / "dpshm-g", 0, 0)
    (folder / "dpshm-g").chmod(0o602)
    with pytest.raises(SegmentInvalid, match="may be written by others"):
        Segment.attach("g", readonly=True)
