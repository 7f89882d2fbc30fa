"""A tmpfs without an inode left, and another user's files: what is said, with which exit status, by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpshm import Coordinator, GroupInUse
from dpshm.board import files
from tests.e2e.load import environment


def with_inodes(folder: Path, inodes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command whose directory of segments is a tmpfs of so many inodes, its root one of them."""
    mount = f"mount -t tmpfs -o size=8m,nr_inodes={inodes} none {folder}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"', *command],
        env=environment(DPSHM_DIR=str(folder)),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("inodes", range(1, 7))
def test_a_coordinator_without_an_inode(tmp_path, inodes):
    """Guards against a start that asks for memory, or for another address, where files are too many."""
    command = (sys.executable, "-m", "dpshm", "coordinator", "--group", "g", "--dp-size", "1")
    done = with_inodes(tmp_path, inodes, *command)
    assert done.returncode == 4, done.stderr
    assert f"has no inode left of {inodes}" in done.stderr
    assert "nr_inodes" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_without_an_inode(tmp_path):
    """Guards against a bare OSError of a doorbell."""
    code = (
        "from dpshm import Coordinator, Engine, SegmentNoSpace\n"
        "with Coordinator(group='g', dp_size=1):\n"
        "    try: Engine.attach('g', 0)\n"
        "    except SegmentNoSpace as e: print(e)\n"
    )
    done = with_inodes(tmp_path, 7, sys.executable, "-c", code)
    assert "has no inode left of 7" in done.stdout, done.stderr


def test_a_prefix_index_and_latencies_without_an_inode(tmp_path):
    """Guards against advice to free memory where files are too many. Requests go on."""
    code = (
        "from dpshm import Coordinator, Engine, Frontend\n"
        "with Coordinator(group='g', dp_size=1), Engine.attach('g', 0) as engine:\n"
        "    frontend = Frontend.attach('g')\n"
        "    print(engine.open_cache(100).has_index)\n"
        "    route = frontend.route()\n"
        "    route.first_token()\n"
        "    route.done(output_tokens=3)\n"
        "    frontend.close()\n"
    )
    done = with_inodes(tmp_path, 8, sys.executable, "-c", code)
    assert done.stdout == "False\n", done.stderr
    assert "no prefix index" in done.stderr
    assert done.stderr.count("has no inode left of 8") == 2, done.stderr


@pytest.mark.parametrize("inodes", [1, 2, 6, 7])
def test_doctor_finds_that_no_inode_is_left(tmp_path, inodes):
    """Guards against a doctor that finds room, where no coordinator can start."""
    done = with_inodes(tmp_path, inodes, sys.executable, "-m", "dpshm", "doctor", "--json")
    left = {1: "no inode", 2: "1 inode"}.get(inodes, f"{inodes - 1} inodes")
    found = [finding["what"] for finding in json.loads(done.stdout)["findings"] if finding["check"] == "space"]
    if inodes == 7:  # enough for the coordinator
        assert not any("inode" in what for what in found)
    else:
        assert found == [f"{tmp_path} has {left} left of {inodes}"], done.stderr
        assert done.returncode == 1


def test_another_users_sockets_are_not_to_be_removed(group):
    """Guards against a message that tells to remove the sockets of a live group."""
    folder = files.sockets_path(group)
    folder.mkdir(0o700)
    try:
        os.chown(folder, os.geteuid() + 1, -1)
        with pytest.raises(GroupInUse, match=rf"uid {os.geteuid() + 1} .*another group name") as caught:
            Coordinator(group=group, dp_size=1)
        assert "remove it" not in str(caught.value)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    finally:
        folder.rmdir()
