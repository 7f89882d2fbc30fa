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


def as_nobody(*arguments: str, gid: int = NOBODY) -> subprocess.CompletedProcess[str]:
    """Runs ``dpshm`` as another user."""
    return subprocess.run(
        [sys.executable, "-m", "dpshm", *arguments],
        env=environment(),
        cwd="/",
        user=NOBODY,
        group=gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(autouse=True)
def _reachable() -> None:
    """Another user must be able to read this checkout and its interpreter."""
    if os.geteuid() == 0 and as_nobody("--version").returncode:
        pytest.skip("another user cannot run this Python from here")


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
def test_another_user(group, using, mode: int, file_group: str | None, gid: int, may: bool):
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
