"""A segment's header: what fits its page, and which damage attach refuses."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dpshm.board import layout
from dpshm.board.header import PREAMBLE, make_header
from dpshm.board.segment import Segment
from dpshm.errors import (
    SegmentError,
    SegmentInvalid,
)
from tests.support import count_fds
from tests.unit.board.headers import ADDRESSES, header

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


SIZE = layout.make_layout(4, 3).size  # as `header` gives it
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
    before = count_fds()
    with pytest.raises(SegmentInvalid, match=message):
        Segment.attach("g", readonly=readonly)
    assert count_fds() <= before


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
