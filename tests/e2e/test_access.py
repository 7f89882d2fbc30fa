"""Read access to a board: its owner and root always have it, others if the settings allow it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpshm import Board, Coordinator, GroupInUse, SegmentInvalid, SettingError
from dpshm.board.files import segment_path, sockets_path
from dpshm.board.sweep import sweep
from tests.e2e.load import environment

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


# Becomes another user once everything is imported, which a first run as root sees to: that user may not be able
# to read this Python.
CODE = """
import contextlib, io, os, sys
from dpshm.cli import main
gid, *arguments = sys.argv[1:]
sys.argv = ["dpshm", "stat", "--schema"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
os.setgroups([])
os.setresgid(int(gid), int(gid), int(gid))
os.setresuid(65534, 65534, 65534)
sys.argv = arguments
main()
"""


def as_nobody(*arguments: str, gid: int = NOBODY) -> subprocess.CompletedProcess[str]:
    """Runs ``dpshm`` as another user."""
    return subprocess.run(
        [sys.executable, "-c", CODE, str(gid), "dpshm", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "file_group", "gid", "may"),
    [
        (0o600, None, NOBODY, False),
        (0o644, None, NOBODY, True),
        (0o640, str(NOBODY), NOBODY, True),
        (0o640, "0", NOBODY, False),
    ],
)
def test_another_user(group, using, mode, file_group, gid, may):
    """Guards against a sidecar that cannot look though it was let, and a stranger who can."""
    using(Coordinator(group=group, dp_size=1, file_mode=mode, file_group=file_group))
    done = as_nobody("stat", "-g", group, "--over", "0", "--json", gid=gid)
    assert (done.returncode == 0) is may, done.stderr
    if may:
        assert f'"group":"{group}"' in done.stdout
    else:
        assert f"cannot open {segment_path(group)}: Permission denied" in done.stderr


@needs_root
@pytest.mark.slow
def test_a_live_group_of_another_user_is_no_fault(group, using):
    """A user who may not look is told whose it is, and never to remove it."""
    using(Coordinator(group=group, dp_size=1))
    done = as_nobody("ls", "--json")
    (found,) = [one for one in map(json.loads, done.stdout.splitlines()) if one["group"] == group]
    assert (found["state"], found["detail"]) == ("private", f"of uid {os.geteuid()}, who alone may look")
    done = as_nobody("doctor", "--json")
    assert not [finding for finding in json.loads(done.stdout)["findings"] if finding["group"] == group]
    done = as_nobody("doctor")
    assert f"group   {group}: private, of uid {os.geteuid()}" in done.stdout
    assert "rm " not in done.stdout
    done = as_nobody("stat", "-g", group)
    assert f"belongs to uid {os.geteuid()}" in done.stderr
    assert "--mode 0640" in done.stderr


@needs_root
def test_a_dead_group_of_another_user_is_its_users_to_sweep(group):
    """Guards against advice that changes nothing: a sweep leaves the files of other users."""
    killed = (
        "import os, sys; from dpshm import Coordinator; c = Coordinator(group=sys.argv[1], dp_size=1); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", killed, group], env=environment(), check=True, timeout=60)
    os.chown(segment_path(group), NOBODY, NOBODY)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dpshm", "doctor", "--json"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        (finding,) = [one for one in json.loads(done.stdout)["findings"] if one["group"] == group]
        assert finding["fix"] == f"as uid {NOBODY}: dpshm doctor --sweep"
        assert f"of uid {NOBODY}" in finding["what"]
    finally:
        os.chown(segment_path(group), os.geteuid(), os.getegid())
        sweep(group)


@needs_root
@pytest.mark.slow
def test_who_may_look_may_not_steer(group, using):
    """Guards against a drain by a user with read access only."""
    coordinator = using(Coordinator(group=group, dp_size=2, file_mode=0o644))
    done = as_nobody("drain", "0", "-g", group, "--force", "--no-wait")
    assert done.returncode == 2
    assert "its sockets cannot be reached from here" in done.stderr
    assert not coordinator.board.engine_mark.any()


@pytest.mark.parametrize("mode", [0o666, 0o622, 0o755, 0o400, 0, 0o4600, -1])
def test_nobody_else_may_ever_write(group, mode: int):
    """Guards against a board that any user of the machine can scribble over."""
    with pytest.raises(SettingError, match="file_mode is"):
        Coordinator(group=group, dp_size=1, file_mode=mode)


FORCE = """
import ctypes, sys
from dpshm import Board
board = Board.attach(sys.argv[1])
at = board.load.__array_interface__["data"][0]
print("reads", ctypes.c_int64.from_address(at).value, flush=True)
ctypes.c_int64.from_address(at).value = 7  # past Python and numpy, as a bug in some library would
print("wrote")
"""


def test_who_looks_cannot_write(group, using):
    """Guards against a tool that damages what it looks at: by numpy, by a memoryview, or past both."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    before = np.array(coordinator.board.engine_mark)
    board = using(Board.attach(group))
    columns = [value for value in vars(board).values() if isinstance(value, np.ndarray)]
    assert len(columns) > 20
    for column in columns:
        assert not column.flags.writeable
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            column.setflags(write=True)
        with pytest.raises(ValueError, match="read-only"):
            column[...] = 1
    with pytest.raises(TypeError, match="read-only"):
        board.words[board.index("load")] = 1
    with pytest.raises(TypeError, match="read-only"):
        board.words.cast("B")[0] = 0
    maps = Path("/proc/self/maps").read_text().splitlines()  # what other tests left may be there, too
    (line,) = [x for x in maps if str(segment_path(group)) in x and " r--s " in x]
    assert line.split()[1] == "r--s"
    done = subprocess.run(
        [sys.executable, "-c", FORCE, group],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "reads 0\n"
    assert done.returncode == -signal.SIGSEGV
    assert coordinator.board.load[0] == 0
    assert (coordinator.board.engine_mark == before).all()


def test_a_folder_of_sockets_that_others_could_enter(group):
    """Guards against sockets in a folder that another user linked, or can put a socket into."""
    folder = sockets_path(group)
    folder.mkdir(mode=0o700)
    folder.chmod(0o770)
    with pytest.raises(SettingError, match=r"is not a folder that only uid \d+ can enter \(mode drwxrwx---"):
        Coordinator(group=group, dp_size=1)
    folder.rmdir()
    elsewhere = sockets_path(f"{group}b")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(SettingError, match=r"is not a folder .* \(mode l"):
        Coordinator(group=group, dp_size=1)
    assert list(elsewhere.iterdir()) == []
    folder.unlink()
    elsewhere.rmdir()


@needs_root
def test_a_folder_and_a_segment_of_another_user(group):
    """Guards against a group that another user prepared: who owns the folder could swap the sockets."""
    folder = sockets_path(group)
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(GroupInUse, match=f"belongs to uid {NOBODY} and this process is uid 0"):
        Coordinator(group=group, dp_size=1)
    folder.rmdir()
    with Coordinator(group=group, dp_size=1):
        os.chown(segment_path(group), NOBODY, NOBODY)
        with pytest.raises(SegmentInvalid, match=f"belongs to uid {NOBODY} and this process is uid 0"):
            Board.attach(group, readonly=False)
        os.chown(segment_path(group), 0, 0)
        segment_path(group).chmod(0o620)
        with pytest.raises(SegmentInvalid, match="may be written by others"):
            Board.attach(group, readonly=False)
        with pytest.raises((SegmentInvalid, GroupInUse)):
            Coordinator(group=group, dp_size=1)
