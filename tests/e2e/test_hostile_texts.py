"""Texts of a hostile board, as the commands print them to a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios

import pytest

from dpshm import Coordinator, Frontend
from dpshm.board import files, layout
from tests.e2e.load import environment

ESCAPE = b"\x1b]2;PWNED\x07\x1b]52;c;aGk=\x07\xc2\x9b31m\xe2\x80\xaefake"
HARMS = ("\x1b]2;", "\x1b]52;", "\x9b", "\u202e")
"""Title, clipboard, a control sequence that begins with one character, the order of letters."""


def on_a_terminal(*arguments: str) -> bytes:
    """What a command writes to a terminal of 140 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 140, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "dpshm", *arguments],
        env=environment(TERM="xterm-256color"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    written = b""
    if arguments[0] == "top":
        os.write(ours, b"\t")  # shows the table of front-ends, where it is live
    try:
        while select.select([ours], [], [], 30)[0]:
            try:
                written += os.read(ours, 65536)
            except OSError:  # the command has ended
                break
            if arguments[0] == "top" and "--once" not in arguments and b"PWNED" in written:
                break  # it is drawn, and would go on
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "shows"),
    [
        (("top",), True),
        (("top", "--once"), True),
        (("stat", "--over", "0"), True),
        (("stat", "--over", "0", "--json"), True),
        (("doctor",), False),
        (("doctor", "--json"), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_terminal_obeys_no_text_of_a_board(group, using, command, shows):
    """Guards against a name of a front-end or a folder that sets a terminal's title, clipboard or colours."""
    using(Coordinator(group=group, dp_size=1, waves=False))
    frontend = using(Frontend.attach(group))
    name = ESCAPE.ljust(layout.OWNER_BYTES, b"\0")
    for i in range(layout.OWNER_BYTES // 8):
        frontend.board.owner[0, i] = int.from_bytes(name[8 * i : 8 * i + 8], "little", signed=True)
    folder = os.fsencode(files.directory()) + b"/dpshm-" + ESCAPE + b".sockets"
    os.mkdir(folder)
    if os.geteuid() == 0:
        os.chown(folder, 65534, -1)  # of another user, whom no sweep helps
    try:
        written = on_a_terminal(*command, *(() if command[0] == "doctor" else ("-g", group)))
    finally:
        os.rmdir(folder)
    assert (b"PWNED" in written) is shows
    assert [harm for harm in HARMS if harm in written.decode()] == []
