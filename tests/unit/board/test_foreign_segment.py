"""Segments of another user, which tools may read: texts, sizes and columns that are meant to harm."""

from __future__ import annotations

import os

import msgspec
import pytest

from dpshm.board import files, layout, lock_file
from dpshm.board.board import Board
from dpshm.board.events import EventReader
from dpshm.board.header import encode_header, group_in, printable, read_header
from dpshm.board.segment import FOREIGN_BYTES
from dpshm.errors import SegmentInvalid
from dpshm.ops.groups import find_groups
from dpshm.ops.read_frame import read_frame
from tests.support import LoneBoard
from tests.unit.board.headers import header

ESCAPE = "\x1b]2;PWNED\x1b\\\x1b[2J\x1b[31mfake"
STRANGER = 65_534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def foreign(group, using):
    """A tool's view of a board that belongs to another user, and that board."""
    board = using(LoneBoard(group))
    os.chown(board.segment.path, STRANGER, -1)
    yield using(Board.attach(group, any_owner=True)), board
    os.chown(board.segment.path, os.geteuid(), -1)


@needs_root
def test_a_truncated_board_ends_no_tool(foreign):
    """Guards against a user who ends root's tools with SIGBUS: the copy keeps its last values."""
    seen, board = foreign
    events = EventReader(seen)
    events.read()
    os.truncate(board.segment.path, layout.PAGE_BYTES)
    assert read_frame(seen).dp_size == 2
    events.read()
    os.truncate(board.segment.path, board.segment.header.size)


@needs_root
def test_a_copy_is_as_new_as_the_last_look(foreign):
    """Guards against a tool that shows another user's board as it was when the tool began."""
    seen, board = foreign
    board.marks.set_dp_size(3)
    assert read_frame(seen).dp_size == 3
    board.revision[0] += 1
    assert EventReader(seen).read()


@needs_root
def test_a_large_board_of_another_user_is_refused(group, using):
    """Guards against gigabytes of memory in a tool that only looks."""
    board = using(LoneBoard(group, engines=900, frontends=900))
    assert board.segment.header.size > FOREIGN_BYTES
    os.chown(board.segment.path, STRANGER, -1)
    with pytest.raises(SegmentInvalid, match="tools read at most"):
        Board.attach(group, any_owner=True)
    assert [f.state for f in find_groups() if f.group == group] == ["unreadable"]
    os.chown(board.segment.path, os.geteuid(), -1)


def test_an_owners_name_is_printable(group, using):
    """Guards against escape sequences that reach the terminal of an operator."""
    board = using(LoneBoard(group))
    name = ESCAPE.encode().ljust(layout.OWNER_BYTES, b"\0")
    for i in range(layout.OWNER_BYTES // 8):
        board.owner[0, i] = int.from_bytes(name[8 * i : 8 * i + 8], "little", signed=True)
    board.frontend_incarnation[0] = board.frontend_pid[0] = 1
    assert board.owner_of(0).isprintable()
    assert "PWNED" in read_frame(board).frontends[0].owner
    assert printable("Zürich\n\x9b1m") == "Zürich\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}1m"


@pytest.mark.parametrize("suffix", [".sockets", ".0123456789abcdef.locks", ""])
def test_names_of_files_that_no_group_has_are_not_shown(folder, suffix):
    """Guards against a name that any user can give to a file here, and that a terminal obeys."""
    (folder / f"dpshm-{ESCAPE.replace('/', '')}{suffix}").mkdir()
    (folder / f"dpshm-a\n{suffix}").mkdir()
    assert files.stray_sockets_folders() == []
    assert lock_file.all_files() == []
    assert files.groups() == []
    (folder / "dpshm-a.sockets").mkdir()
    assert files.stray_sockets_folders() == [folder / "dpshm-a.sockets"]


def test_the_group_of_an_open_segment_is_printable():
    """Guards against the header of a segment that only a process has open, and that is read without a check."""
    page = encode_header(header("g" + ESCAPE))
    assert (group_in(page) or "").isprintable()
    assert group_in(encode_header(header())) == "g"


@pytest.mark.parametrize("field", ["stats_address", "engine_input_address", "boot_id", "settings", "setting"])
def test_texts_of_a_header_are_printable(tmp_path, field):
    """Guards against an address or a setting that a terminal obeys, wherever a tool prints it."""
    good = header()
    changed = {"settings": {"balancing": ESCAPE}, "setting": {ESCAPE: 1}}.get(field, ESCAPE)
    bad = msgspec.structs.replace(good, **{"settings" if field == "setting" else field: changed})
    for one, fine in ((good, True), (bad, False)):
        page = encode_header(one).ljust(layout.PAGE_BYTES, b"\0")
        if fine:
            assert read_header(tmp_path, page, one.size, "g", True) == good
        else:
            with pytest.raises(SegmentInvalid, match="text") as caught:
                read_header(tmp_path, page, one.size, "g", True)
            assert str(caught.value).isprintable()


@pytest.mark.parametrize("column", ["request_offset", "token_offset", "sent_requests", "sent_tokens"])
def test_columns_that_are_summed_stand_together(tmp_path, column):
    """Guards against a header that passes the check and whose sums run over the file's end."""
    good = header()
    place = good.columns[column]
    for offset in (good.size - 8 * place.shape[-1], layout.PAGE_BYTES):
        columns = good.columns | {column: place._replace(offset=offset)}
        page = encode_header(msgspec.structs.replace(good, columns=columns)).ljust(layout.PAGE_BYTES, b"\0")
        with pytest.raises(SegmentInvalid, match="column"):
            read_header(tmp_path, page, good.size, "g", True)


def test_find_groups_goes_on(group, using, monkeypatch):
    """Guards against one group that keeps a tool from all others."""
    using(LoneBoard(group))
    monkeypatch.setattr(Board, "coordinator_alive", lambda _self: 1 / 0)
    found = [f for f in find_groups() if f.group == group]
    assert [f.state for f in found] == ["unreadable"]
    assert files.segment_path(group).exists()
