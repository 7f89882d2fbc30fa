"""Who may look at a board: its owner and root always, others if they are let."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dpshm import Coordinator, SettingError
from dpshm.segment import segment_path
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
def test_another_user(group, using, mode, file_group, gid, may):  # noqa: PLR0917 - pytest names them
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
def test_who_may_look_may_not_steer(group, using):
    """Guards against a drain by somebody who was only let look."""
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
