"""A segment's life, its locks, and what it refuses to attach. See test_board.py for locks across processes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import dpshm
from dpshm.board import files, layout
from dpshm.board.header import PREAMBLE, Header, make_header
from dpshm.board.locks import coordinator_byte, engine_byte, frontend_byte
from dpshm.board.segment import Segment, sweep
from dpshm.errors import (
    HandleClosed,
    SegmentError,
    SegmentInvalid,
    SegmentNotFound,
    SettingError,
)

ENV = {**os.environ, "PYTHONPATH": str(Path(dpshm.__file__).parents[1])}
ADDRESSES = dict.fromkeys(("stats_address", "engine_input_address", "engine_output_address"), "ipc://x")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of our own on the tmpfs, in which all segments of a test lie."""
    path = Path(tempfile.mkdtemp(prefix="dpt-", dir="/dev/shm"))
    monkeypatch.setenv("DPSHM_DIR", str(path))
    yield path
    shutil.rmtree(path)


def header(group: str = "g", engines: int = 4, frontends: int = 3, **settings: Any) -> Header:
    """A header for a small segment."""
    return make_header(group, engines, frontends, **ADDRESSES, settings=settings)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


# Its life.


def test_a_new_segment_is_zero_but_for_its_header(folder: Path):
    """Guards against rubbish that reads as load, and against a file that others can open."""
    with closing(Segment.create(header(waves=True))) as made, closing(Segment.attach("g")) as found:
        assert set(made.words[layout.PAGE_BYTES // 8 :].tolist()) == {0}
        assert found.header == made.header
        assert found.header.settings == {"waves": True}
        assert found.header.boot_id
        assert stat.S_IMODE((folder / "dpshm-g").stat().st_mode) == 0o600
        assert made.layout == layout.make_layout(4, 3)
        assert [f.name for f in folder.iterdir()] == ["dpshm-g"]


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
        before = open_files()
        with pytest.raises(FileExistsError):
            Segment.create(header())
        assert open_files() == before
        assert made.linked
        assert os.stat(made.path).st_ino == os.fstat(made.fileno()).st_ino


def test_what_is_not_there_is_not_found(folder: Path):
    """Guards against an error that leaves the operator guessing which groups there are."""
    with closing(Segment.create(header("here"))), pytest.raises(SegmentNotFound, match="groups here: here"):
        Segment.attach("there")
    (folder / "dpshm-here").unlink()
    with pytest.raises(SegmentNotFound, match="groups here: none"):
        Segment.attach("there")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a b", "x" * 49, "ä", "a\n", "a\0", "g.sockets"])
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


def test_the_largest_header_fits_its_page(folder: Path):
    """Guards against capacities, or paths of the allowed length, for which no board can be made."""
    longest = dict.fromkeys(ADDRESSES, "ipc://" + "x" * 107)
    largest = make_header(
        "g" * 48, layout.MAX_ENGINES, layout.MAX_FRONTENDS, **longest, settings={"balancing": "internal"}
    )
    assert len(msgspec.json.encode(largest)) + 20 <= layout.PAGE_BYTES
    small = make_header("g", 1, 1, **dict.fromkeys(ADDRESSES, "ipc://" + "x" * 2000), settings={})
    with pytest.raises(SegmentError, match="shorter"):
        Segment.create(small)
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


# Locks.


def test_one_lock_a_row(folder: Path):
    """Guards against two rows that share a lock, which would make one process's death another's."""
    with closing(Segment.create(header())) as ours, closing(Segment.attach("g")) as theirs:
        c = ours.header.columns
        rows = [
            coordinator_byte(c),
            *(engine_byte(c, e) for e in range(4)),
            *(frontend_byte(c, f) for f in range(3)),
        ]
        assert len(set(rows)) == 8
        assert [theirs.locks.is_locked(row) for row in rows] == [True] + [
            False
        ] * 7  # create holds the coordinator's
        for row in rows[1:]:
            assert theirs.locks.lock(row)
        assert not any(ours.locks.lock(row) for row in rows[1:])
        for segment in (ours, theirs):  # whoever asks, its own locks count too
            assert all(segment.locks.is_locked(row) for row in rows)
        theirs.locks.unlock(rows[3])
        for segment in (ours, theirs):
            assert [segment.locks.is_locked(row) for row in rows] == [
                True,
                True,
                True,
                False,
                True,
                True,
                True,
                True,
            ]
        assert ours.locks.lock(rows[3])
        assert all(segment.locks.is_locked(rows[3]) for segment in (ours, theirs))


def test_a_lock_on_everything_needs_everybody_gone(folder: Path):
    """Guards against sweeping a group in which one single row is still held."""
    with closing(Segment.create(header())) as made:
        other = Segment.attach("g")
        assert other.locks.is_shared()
        assert not made.locks.is_shared()  # its own locks do not count here
        assert not other.locks.lock_all()
        made.locks.unlock(coordinator_byte(made.header.columns))
        assert not other.locks.is_shared()
        made.locks.lock(frontend_byte(made.header.columns, 2))
        assert not other.locks.lock_all()
        made.locks.unlock(frontend_byte(made.header.columns, 2))
        assert other.locks.lock_all()
        assert made.locks.is_locked(engine_byte(made.header.columns, 1))
        assert made.locks.is_shared()
        other.close()
        assert not made.locks.is_shared()


def test_a_reader_sees_locks_and_holds_none(folder: Path):
    """Guards against a tool that keeps a dead group from being swept."""
    made = Segment.create(header())
    with closing(Segment.attach("g", readonly=True)) as reader:
        assert reader.locks.is_locked(coordinator_byte(reader.header.columns))
        assert reader.locks.is_shared()
        made.close()
        assert not reader.locks.is_locked(coordinator_byte(reader.header.columns))
        assert not reader.locks.is_shared()
        assert sweep("g")
        assert not reader.linked


def test_closing_drops_the_locks_though_views_live_on(folder: Path):
    """Guards against a row that stays taken because somebody kept an array, and against a crash at its use."""
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
    """Guards against closing a descriptor that meanwhile belongs to somebody else."""
    made = Segment.create(header())
    before = open_files()
    made.close()
    assert open_files() < before
    with open(os.devnull) as somebody_elses:
        made.close()
        assert somebody_elses.read() == ""
    assert not made.usable
    assert isinstance(made.why_unusable(), HandleClosed)


def test_nothing_is_left_of_a_segment_that_is_closed(folder: Path):
    """Guards against a process that attaches often and runs out of descriptors or memory."""
    Segment.create(header()).close()
    before, mapped = open_files(), Path("/proc/self/maps").read_text().count("dpshm-g")
    for _ in range(5):
        Segment.attach("g").close()
    assert open_files() == before
    assert Path("/proc/self/maps").read_text().count("dpshm-g") == mapped


# Its name.


def test_an_unlinked_file_is_noticed(folder: Path):
    """Guards against a clean-up job that nobody hears of: a new attach fails, who is attached goes on."""
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
            assert {f.name for f in folder.iterdir()} == {"dpshm-g", "dpshm-g.sockets"}


def test_sweep_removes_only_the_dead(folder: Path):
    """Guards against removing a live board, and against a dead one that nobody removes."""
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


# What it refuses.


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
        assert {f.name for f in folder.iterdir()} == {"dpshm-real", "dpshm-g"}


@pytest.mark.parametrize("readonly", [True, False])
def test_a_fifo_is_refused_without_waiting_for_its_other_end(folder: Path, readonly: bool):
    """Guards against `dpshm top` hanging for ever on a pipe that somebody put in the folder."""
    os.mkfifo(folder / "dpshm-g")
    code = f"from dpshm.board.segment import Segment; Segment.attach('g', readonly={readonly})"
    env = {**ENV, "DPSHM_DIR": str(folder)}
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, env=env, capture_output=True, text=True, check=False, timeout=10)
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
    Segment.attach("g", readonly=True).close()
    assert (folder / "dpshm-g").exists()


Fields = dict[str, Any]


def rewrite(path: Path, change: Callable[[Fields], object], *, minor: int = 0) -> None:
    """Changes fields of a header, its checksum right."""
    page = path.read_bytes()[: layout.PAGE_BYTES]
    length = int.from_bytes(page[12:16], "little")
    fields = msgspec.json.decode(page[20 : 20 + length])
    change(fields)
    put(path, msgspec.json.encode(fields), minor=minor)


def put(path: Path, blob: bytes, *, minor: int = 0) -> None:
    """Writes a header, its checksum right."""
    preamble = PREAMBLE.pack(layout.MAGIC, layout.VERSION_MAJOR, minor, len(blob), zlib.crc32(blob))
    with path.open("r+b") as f:
        f.write(preamble + blob)


def overwrite(at: int, data: bytes) -> Callable[[Path], None]:
    """A change of the file's bytes."""

    def change(path: Path) -> None:
        with path.open("r+b") as f:
            f.seek(at)
            f.write(data)

    return change


def column(name: str, **changes: Any) -> Callable[[Path], None]:
    """A change of a column in the header's table."""
    places = {"offset": 0, "shape": 1, "strides": 2}

    def change(fields: Fields) -> None:
        for key, value in changes.items():
            fields["columns"][name][places[key]] = value

    return lambda path: rewrite(path, change)


SIZE = layout.make_layout(4, 4).size
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "magic": (overwrite(0, b"DPSHMBRX"), "the magic is b'DPSHMBRX', expected b'DPSHMBRD'"),
    "major version": (overwrite(8, b"\x02\x00"), "the layout version is 2.0, expected 1.0"),
    "length": (overwrite(12, b"\xff\xff\xff\xff"), "the header's length is 4294967295, expected at most 4076"),
    "length zero": (overwrite(12, b"\0\0\0\0"), "the header's checksum is 0x0"),
    "checksum": (overwrite(16, b"\0\0\0\0"), "the header's checksum is 0x[0-9a-f]+, expected 0x0"),
    "scribbled": (overwrite(40, b"\0" * 64), "the header's checksum"),
    "empty file": (lambda p: os.truncate(p, 0), "has 0 bytes, a board has a multiple of 4096"),
    "part of a page": (lambda p: os.truncate(p, 4095), "has 4095 bytes"),
    "torn page": (lambda p: os.truncate(p, 8191), "has 8191 bytes"),
    "header alone": (lambda p: os.truncate(p, 4096), f"the file's size is 4096, expected {SIZE}"),
    "longer": (lambda p: os.truncate(p, SIZE + 4096), f"the file's size is {SIZE + 4096}, expected {SIZE}"),
    "monstrous": (lambda p: os.truncate(p, 1 << 60), f"the file's size is {1 << 60}, expected {SIZE}"),
    "another group": (
        lambda p: rewrite(p, lambda f: f.update(group="h")),
        "the group's name is 'h', expected 'g'",
    ),
    "no engines": (lambda p: rewrite(p, lambda f: f.update(engines=0)), "the capacity is 0 engines"),
    "many engines": (lambda p: rewrite(p, lambda f: f.update(engines=1 << 62)), "the capacity"),
    "negative": (lambda p: rewrite(p, lambda f: f.update(frontends=-1)), "4 engines, -1 front-ends"),
    "more engines": (
        lambda p: rewrite(p, lambda f: f.update(engines=5)),
        "expected Column|column table is another",
    ),
    "a word for a number": (lambda p: rewrite(p, lambda f: f.update(engines="4")), "the header is Expected `int`"),
    "a field is missing": (lambda p: rewrite(p, lambda f: f.pop("boot_id")), "missing required field `boot_id`"),
    "not JSON": (lambda p: put(p, b"\x80"), "the header is"),
    "not UTF-8": (lambda p: put(p, b'{"group":"\xff\xfe"}'), "the header is"),
    "nested": (lambda p: put(p, b'{"x":' + b"[" * 4000), "the header is"),
    "a column is missing": (lambda p: rewrite(p, lambda f: f["columns"].pop("load")), "column"),
    "offset beyond the end": (column("load", offset=SIZE), "column"),
    "last word beyond the end": (column("load", offset=SIZE - 24), "column"),
    "offset before the start": (column("load", offset=-8), "column"),
    "offset between words": (column("load", offset=4225), "column"),
    "offset too large to add": (column("load", offset=(1 << 64) - 8), "column"),
    "larger shape": (column("load", shape=[5]), "column"),
    "another dimension": (column("load", shape=[4, 1], strides=[8, 8]), "column"),
    "negative stride": (column("load", strides=[-8]), "column"),
    "stride that runs out": (column("load", strides=[1 << 40]), "column"),
    "stride too large": (column("engine_state", strides=[1 << 62]), "column"),
    "stride missing": (column("sent_tokens", strides=[128]), "column"),
    "stride between words": (column("load", strides=[12]), "column"),
}


@pytest.mark.parametrize("readonly", [True, False], ids=["reader", "writer"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_header_is_refused(folder: Path, damage: Callable[[Path], object], message: str, readonly: bool):
    """Guards against using a board of which anything in the header is not as it must be, for any reason."""
    Segment.create(header()).close()
    damage(folder / "dpshm-g")
    before = open_files()
    with pytest.raises(SegmentInvalid, match=message):
        Segment.attach("g", readonly=readonly)
    assert open_files() == before


def added_column(name: str) -> Callable[[Fields], None]:
    """A change that adds a column to the header's table."""
    return lambda fields: fields["columns"].update({name: [4216, [1], [128]]})


def test_a_newer_minor_version_is_read_and_not_written(folder: Path):
    """Guards against tools that stop at each release, and against writers that do not know all columns."""
    Segment.create(header()).close()
    rewrite(folder / "dpshm-g", added_column("something_new"), minor=1)
    with pytest.raises(SegmentInvalid, match=r"layout version is 1\.1, expected 1\.0"):
        Segment.attach("g")
    with closing(Segment.attach("g", readonly=True)) as reader:
        assert reader.header.columns["something_new"] == layout.Column(4216, (1,), (128,))


def test_an_added_column_in_our_own_version_is_refused_to_writers(folder: Path):
    """Guards against two maps under one version number."""
    Segment.create(header()).close()
    rewrite(folder / "dpshm-g", added_column("something_new"))
    with pytest.raises(SegmentInvalid, match="column table is another"):
        Segment.attach("g")
