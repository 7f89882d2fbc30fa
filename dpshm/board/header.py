"""The first page of a segment: what never changes while the segment lives, checked before anything else is read.

The page holds a preamble (magic, layout version, length and checksum) and then JSON. Nothing in it is trusted
(rule 6): a reader checks every field once, when it attaches, and then uses its own copy.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from hashlib import blake2s
from pathlib import Path
from typing import Any

import msgspec

from dpshm.board import layout
from dpshm.board.layout import Column
from dpshm.board.words import MAX_WORD
from dpshm.errors import SegmentError, SegmentInvalid
from dpshm.linux import processes

PREAMBLE = struct.Struct("<8sHHII")
"""Magic, major version, minor version, length of the JSON, CRC-32 of the JSON."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """The fixed facts of a segment.

    The addresses are those of the ZMQ sockets: a process that finds the board finds them here, and a coordinator
    that takes the board over binds them again.
    """

    group: str
    size: int
    engines: int  # capacity
    frontends: int  # capacity
    stats_address: str  # front-ends
    engine_input_address: str  # coordinator to engines
    engine_output_address: str  # engines to coordinator
    settings: dict[str, bool | int | float | str | None]  # of the coordinator: balancing, waves, ...
    creator_pid: int
    creator_start_time: int
    boot_id: str
    pid_namespace: int
    time_namespace: int
    columns: dict[str, Column]
    lock_token: str = ""  # in the name of the lock file

    @property
    def prefix_key(self) -> int:
        """The secret of the group's prefix index, 63 bits."""
        key = self.settings.get("prefix_key", 0)
        return key & MAX_WORD if isinstance(key, int) else 0

    @property
    def head_address(self) -> str | None:
        """Where front-ends connect to the coordinator that this board's one follows; None if it follows none."""
        head = self.settings.get("head")
        return head.partition(",")[0] if isinstance(head, str) else None

    @property
    def board_number(self) -> int:
        """A number of this board alone, from 1 to 2**61: another board of the group has another one."""
        return 1 + int.from_bytes(blake2s(self.lock_token.encode(), digest_size=8).digest(), "little") % (1 << 61)

    @property
    def node(self) -> int:
        """The number of this board's node among those whose front-ends choose among the ranks of all."""
        node = self.settings.get("node", 0)
        return node if isinstance(node, int) and 0 <= node < self.nodes else 0

    @property
    def nodes(self) -> int:
        """How many such nodes there are; 1: the group has no relay."""
        nodes = self.settings.get("nodes", 1)
        return max(1, min(nodes, self.frontends)) if isinstance(nodes, int) else 1

    @property
    def relay_addresses(self) -> tuple[str, str] | None:
        """Where relays of other nodes send, and where they hear; None if they meet at another node, or nowhere."""
        text = self.settings.get("relay")
        up, comma, down = text.partition(",") if isinstance(text, str) else ("", "", "")
        return (up, down) if comma else None

    @property
    def waves(self) -> bool:
        """Whether the group's ranks run in lockstep."""
        return bool(self.settings.get("waves", True))


def make_header(group: str, engines: int, frontends: int, **fields: Any) -> Header:
    """A header for a new segment that this process creates."""
    plan = layout.make_layout(engines, frontends)
    return Header(
        group=group,
        size=plan.size,
        engines=engines,
        frontends=frontends,
        creator_pid=os.getpid(),
        creator_start_time=processes.start_time(os.getpid()),
        boot_id=processes.boot_id(),
        pid_namespace=processes.namespace_inode("pid"),
        time_namespace=processes.namespace_inode("time"),
        columns=plan.columns,
        lock_token=secrets.token_hex(8),
        **fields,
    )


def encode_header(header: Header) -> bytes:
    """The beginning of the first page.

    Raises:
        SegmentError: the header is longer than a page.
    """
    blob = msgspec.json.encode(header)
    size = PREAMBLE.size + len(blob)
    if size > layout.PAGE_BYTES:
        raise SegmentError(
            f"the header of group {header.group!r} needs {size} bytes and has {layout.PAGE_BYTES}: use shorter "
            "addresses (a shorter DPSHM_DIR)"
        )
    versions = layout.VERSION_MAJOR, layout.VERSION_MINOR
    return PREAMBLE.pack(layout.MAGIC, *versions, len(blob), zlib.crc32(blob)) + blob


def group_in(page: bytes) -> str | None:
    """The group that a first page of any version names, printable. None if the page is not a segment's."""
    if len(page) < PREAMBLE.size or not page.startswith(layout.MAGIC):
        return None
    length = PREAMBLE.unpack_from(page)[3]
    try:
        group = msgspec.json.decode(page[PREAMBLE.size : PREAMBLE.size + length])["group"]
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return printable(group) if isinstance(group, str) else None


def printable(text: str) -> str:
    """A text from a board, for people: what a terminal would obey is replaced."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    )


def _is_printable(value: Any) -> bool:
    """Whether every text in a decoded JSON value is printable."""
    match value:
        case str():
            return value.isprintable()
        case dict():
            return all(map(_is_printable, (*value.keys(), *value.values())))
        case list():
            return all(map(_is_printable, value))
    return True


def read_header(path: Path, page: bytes, size: int, group: str, readonly: bool) -> Header:
    """The header in a first page.

    Args:
        path: the file, for the error's text.
        page: the first page, `dpshm.board.layout.PAGE_BYTES` long.
        size: the file's size in bytes.
        group: the group that the file's name names.
        readonly: accept a newer minor version.

    Raises:
        SegmentInvalid: this version cannot use the segment.
    """
    magic, major, minor, length, crc = PREAMBLE.unpack_from(page)

    def refuse(what: str, found: object, expected: object) -> SegmentInvalid:
        return SegmentInvalid(
            f"{path}: {what} is {found}, expected {expected}. If no process uses the group, remove the file"
        )

    if magic != layout.MAGIC:
        raise refuse("the magic", magic, layout.MAGIC)
    found, ours = f"{major}.{minor}", f"{layout.VERSION_MAJOR}.{layout.VERSION_MINOR}"
    if major != layout.VERSION_MAJOR or (
        minor < layout.VERSION_MINOR if readonly else minor != layout.VERSION_MINOR
    ):
        raise refuse("the layout version", found, f"{ours} (use one dpshm version for the whole group)")
    if length > len(page) - PREAMBLE.size:
        raise refuse("the header's length", length, f"at most {len(page) - PREAMBLE.size}")
    blob = page[PREAMBLE.size : PREAMBLE.size + length]
    if zlib.crc32(blob) != crc:
        raise refuse("the header's checksum", hex(zlib.crc32(blob)), hex(crc))
    try:
        header = msgspec.json.decode(blob, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise refuse("the header", str(e), "a header of this version") from None
    if not _is_printable(msgspec.json.decode(blob)):
        raise refuse("the header's text", "such that a terminal would obey it", "printable")
    if header.size != size:
        raise refuse("the file's size", size, header.size)
    if header.group != group:
        raise refuse("the group's name", repr(header.group), repr(group))
    _check_columns(header, refuse, exact=not readonly)
    return header


def _check_columns(header: Header, refuse: Any, *, exact: bool) -> None:
    if not 1 <= header.engines <= layout.MAX_ENGINES or not 1 <= header.frontends <= layout.MAX_FRONTENDS:
        raise refuse(
            "the capacity",
            f"{header.engines} engines, {header.frontends} front-ends",
            f"1 to {layout.MAX_ENGINES} and 1 to {layout.MAX_FRONTENDS}",
        )
    ours = layout.make_layout(header.engines, header.frontends).columns
    if exact and header.columns != ours:
        raise refuse("the column table", "another", "that of this version")
    for offset, sent in (("request_offset", "sent_requests"), ("token_offset", "sent_tokens")):
        first, table = header.columns.get(offset), header.columns.get(sent)
        if first and table and (len(table.strides) < 1 or first.offset + table.strides[0] != table.offset):
            raise refuse(f"column {offset!r}", first, f"one row before {sent!r}")
    for name, mine in ours.items():
        column = header.columns.get(name)
        if column is None:
            raise refuse(f"column {name!r}", "missing", "present")
        end = column.offset + layout.WORD_BYTES
        end += sum((n - 1) * step for n, step in zip(column.shape, column.strides, strict=False))
        numbers = (column.offset, *column.strides)
        if (
            column.shape != mine.shape
            or len(column.strides) != len(column.shape)
            or any(n < 0 or n % layout.WORD_BYTES for n in numbers)
            or end > header.size
        ):
            raise refuse(f"column {name!r}", column, mine)
