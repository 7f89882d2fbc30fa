"""``dpshm doctor`` on a node and on groups that are made unhealthy, one way after another."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.board.board import Board
from dpshm.board.files import segment_path, sockets_path
from dpshm.board.header import make_header
from dpshm.board.segment import Segment
from dpshm.version import version_word
from tests.e2e.load import environment, run
from tests.e2e.load import stat as stat_of
from tests.support import Remote, publish_forever, wait_until

ADDRESSES = ("stats_address", "engine_input_address", "engine_output_address")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch):
    """A directory of segments of its own, on the node's tmpfs."""
    folder = Path(tempfile.mkdtemp(prefix="dpt-", dir="/dev/shm"))
    monkeypatch.setenv("DPSHM_DIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def held():
    """`held(x)` gives `x` back and closes it when the test ends, before the directory goes."""
    with ExitStack() as stack:
        yield lambda x: stack.enter_context(closing(x))


def diagnose(*arguments: str, expect: int | None = None) -> dict[str, Any]:
    """What doctor finds, by the name of the check (the last of each)."""
    done = run("doctor", "--json", *arguments, expect=expect)
    assert done.stderr == ""
    assert done.returncode in (0, 1)
    diagnosis = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in diagnosis["findings"]}
    # This machine's own shared memory may be as small as a container's; that is not what is tested here.
    if found.get("space", {}).get("severity") == "warning":
        del found["space"]
    for finding in found.values():
        assert min(len(finding[part]) for part in ("what", "why", "fix")) > 10
    return found


@pytest.mark.slow
def test_a_healthy_node_has_nothing_to_mend(node, held):
    """Guards against a doctor who finds something in everybody."""
    coordinator = held(Coordinator(group="g", dp_size=2))
    for dp_rank in range(2):
        remote = held(Remote())
        remote.run(f"engine = Engine.attach('g', {dp_rank})")
        publish_forever(remote, waiting=1, running=1)  # doctor may take long to start, and does not like old news
    frontend = held(Frontend.attach("g"))
    for _ in range(5):
        frontend.route(10).done()
    wait_until(lambda: coordinator.board.snapshot()["running"].tolist() == [1, 1])
    dropped = coordinator.dropped
    assert diagnose() == {}
    assert coordinator.dropped == dropped  # nor does it upset the patient
    wait_until(lambda: coordinator.board.words[coordinator.board.index("ready")])
    assert not coordinator.board.engine_mark[0] & 8


@pytest.mark.slow
def test_one_group_is_judged_alone(node, held):
    """Guards against a health probe that fails for another group, for the node, or for nothing."""
    held(Coordinator(group="good", dp_size=1))
    held(Engine.attach("good", 0)).publish(waiting=0, running=0)
    held(Coordinator(group="ill", dp_size=1))  # no engine
    (node / "dpshm-bad").write_bytes(b"\0" * 8192)
    sockets_path("lost").mkdir(0o700)
    done = json.loads(run("doctor", "--json", "-g", "good").stdout)
    assert (done["groups"], done["findings"]) == (["good"], [])
    assert {f["group"] for f in json.loads(run("doctor", "--json", "-g", "ill", expect=1).stdout)["findings"]} == {
        "ill"
    }
    assert {"unreadable", "leftover", "no rank"} <= set(diagnose(expect=1))
    assert "no group 'none'" in run("doctor", "-g", "none", expect=2).stderr
    sockets_path("lost").rmdir()
    (node / "dpshm-bad").unlink()


@pytest.mark.slow
def test_leftovers_are_found_and_swept(node):
    """Guards against memory that dead groups keep, and against a sweep of a segment in use."""
    make = {"settings": {}, **dict.fromkeys(ADDRESSES, "")}
    Segment.create(make_header("gone", 2, 2, **make)).close()
    stray = sockets_path("lost")
    stray.mkdir(0o700)
    alive = Board(Segment.create(make_header("alive", 2, 2, **make)))
    found = diagnose("--no-sweep", expect=1)
    assert str(stray) in found["leftover"]["what"]
    done = json.loads(run("doctor", "--json", "--sweep", expect=None).stdout)
    assert sorted(done["swept"]) == sorted([str(segment_path("gone")), str(stray)])
    assert segment_path("alive").exists()
    assert not stray.exists()
    alive.close()
    assert "swept" in run("doctor", "--sweep").stdout
    assert list(node.iterdir()) == []


@pytest.mark.slow
def test_a_folder_whose_sockets_are_in_use_is_not_swept(node, held):
    """Guards against a sweep that cuts off a live group whose segment was unlinked."""
    held(Coordinator(group="g", dp_size=1))
    segment_path("g").unlink()
    found = diagnose("--sweep")
    assert "the socket folder" in found["leftover"]["what"]
    assert f"process {os.getpid()}" in found["unlinked"]["what"]
    assert len(list(sockets_path("g").iterdir())) == 3
    shutil.rmtree(sockets_path("g"))


@pytest.mark.slow
def test_a_segment_that_cannot_be_read(node):
    """Guards against a damaged board that is passed over in silence."""
    (node / "dpshm-bad").write_bytes(b"\0" * 8192)
    assert "the magic is" in diagnose(expect=1)["unreadable"]["what"]


@pytest.mark.slow
def test_a_coordinator_that_hangs(node, held):
    """Guards against sockets that accept connections and are thought to be served."""
    remote = held(Remote())
    remote.run(f"os.environ['DPSHM_DIR'] = {str(node)!r}\ncoordinator = Coordinator(group='g', dp_size=1)")
    engine = held(Engine.attach("g", 0))
    engine.publish(waiting=0, running=0)
    remote.signal(signal.SIGSTOP)
    wait_until(lambda: stat_of("g")["coordinator"]["state"] == "silent")
    found = diagnose(expect=1)
    assert f"kill -CONT {remote.pid}" in found["coordinator"]["fix"]
    assert "says nothing: its process is stopped or wedged" in found["sockets"]["what"]
    remote.kill()
    found = diagnose(expect=1)
    assert found["coordinator"]["what"] == "no coordinator lives"
    assert "sockets" not in found


@pytest.mark.slow
def test_ranks_that_are_out(node, held):
    """Guards against a dead, a stalled, an absent or a drained rank that is not named."""
    coordinator = held(Coordinator(group="g", dp_size=5, stall_timeout_s=0.2))
    for dp_rank in (0, 3):
        held(Engine.attach("g", dp_rank)).publish(waiting=0, running=0)
    remotes = [held(Remote()) for _ in range(2)]
    for dp_rank, remote in enumerate(remotes, 1):
        remote.run(f"os.environ['DPSHM_DIR'] = {str(node)!r}\nengine = Engine.attach('g', {dp_rank})")
    remotes[1].run("engine.publish(waiting=3, running=0)")
    remotes[0].kill()
    coordinator.drain(3)
    wait_until(lambda: [r["state"] for r in stat_of("g")["ranks"]][1:3] == ["dead", "stalled"])
    found = diagnose(expect=1)
    assert found["dead ranks"]["what"] == "rank 1: the process is gone"
    assert f"kill -CONT {remotes[1].pid}" in found["stalled ranks"]["fix"]
    assert found["absent ranks"]["what"].startswith("rank 4 of 5 never attached")
    assert found["drained ranks"]["fix"] == "dpshm undrain 3 --group g"
    assert found["drained ranks"]["severity"] == "note"


@pytest.mark.slow
def test_rows_that_do_not_add_up_and_versions_that_differ(node, held):
    """Guards against counts that mislead routing, and processes of different releases, unnoticed."""
    held(Coordinator(group="g", dp_size=1))
    engine, frontend = held(Engine.attach("g", 0)), held(Frontend.attach("g"))
    for _ in range(3):
        engine.receive(frontend.index, 10)  # a request that was never sent
    engine.publish(waiting=3, running=0)
    board = engine.board
    board.words[board.index("dummy_steps", 0)] = 7
    board.words[board.index("engine_version", 0)] = version_word("0.0.9")
    done = json.loads(run("doctor", "--json", expect=1).stdout)
    found = [f["what"] for f in done["findings"] if f["check"] == "counters"]
    assert "rank 0 counts 7 dummy steps of 0 steps" in found
    assert "rank 0 received 3 requests more than front-end 0 sent" in found
    assert "0.0.9: rank 0" in diagnose()["versions"]["what"]


@pytest.mark.slow
def test_a_lock_that_a_child_keeps(node, held):
    """Guards against a dead engine that looks alive because a child that it forked has its descriptor."""
    held(Coordinator(group="g", dp_size=1))
    remote = held(Remote())
    # A child that dpshm's fork hook cannot reach, as one forked by a library in C.
    remote.run(f"os.environ['DPSHM_DIR'] = {str(node)!r}\nengine = Engine.attach('g', 0)")
    remote.run("import subprocess; fd = engine.board.segment.locks.fd; os.set_inheritable(fd, True)")
    child = remote.eval("subprocess.Popen(['sleep', '60'], pass_fds=[fd]).pid")
    remote.kill()
    try:
        assert "fuser" in diagnose(expect=1)["lock"]["fix"]
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_stale_beat(node, held):
    """Guards against a rank that hangs for less than the stall timeout and gets requests meanwhile."""
    held(Coordinator(group="g", dp_size=1, stall_timeout_s=3600))
    engine = held(Engine.attach("g", 0))
    engine.publish(waiting=2, running=0)
    engine.board.beat[0] -= 30_000_000_000
    found = diagnose(expect=1)["stale beats"]["what"]
    assert int(re.search(r"has 2 requests and last published (\d+) s ago", found)[1]) >= 30


def in_namespaces(script: str, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script in new namespaces; skips the test where this machine does not allow that."""
    if subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"unshare {' '.join(flags)} is not allowed here")
    return subprocess.run(
        ["unshare", *flags, "sh", "-c", script],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "check", "severity", "words"),
    [
        ("size=64m", "space", "warning", "--shm-size"),
        ("size=64k", "space", "error", "remount,size=1G"),
        ("size=64m,ro", "directory", "error", "mount -t tmpfs"),
    ],
)
def test_a_containers_shared_memory(options: str, check: str, severity: str, words: str, tmp_path: Path):
    """Guards against the small /dev/shm of a container that is blamed on dpshm later."""
    script = f"mount -t tmpfs -o {options} none {tmp_path} && {sys.executable} -m dpshm doctor --json"
    done = in_namespaces(script, "-m", DPSHM_DIR=str(tmp_path))
    found = {f["check"]: f for f in json.loads(done.stdout)["findings"]}
    assert found[check]["severity"] == severity
    assert words in found[check]["fix"]


@pytest.mark.slow
def test_without_proc(tmp_path: Path):
    """A chroot without /proc is named by the coordinator, with the status of an unusable place, and by doctor."""
    dpshm = f"{sys.executable} -m dpshm"
    script = (
        f"umount -l /proc && {{ {dpshm} coordinator -g no-proc --dp-size 1; echo $?; {dpshm} doctor --json; }}"
    )
    done = in_namespaces(script, "-m", DPSHM_DIR=str(tmp_path))
    status, found = done.stdout.splitlines()
    assert (status, "/proc is not mounted here. mount -t proc" in done.stderr) == ("4", True), done.stderr
    assert "Traceback" not in done.stderr
    assert "proc" in {finding["check"] for finding in json.loads(found)["findings"]}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("split", [True, False])
def test_a_group_in_a_container_of_its_own(node, held, split):
    """Two halves of a deployment in two /dev/shm do not see each other. One that is whole is no fault."""
    script = f"""
    mount -t tmpfs none {node} && exec {sys.executable} -c '
import time
from dpshm import Coordinator
with Coordinator(group="g", dp_size=1):
    print("up", flush=True)
    time.sleep(60)
'"""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare -m is not allowed here")
    if split:
        held(Coordinator(group="g", dp_size=1))
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], env=environment(DPSHM_DIR=str(node)), stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout.readline() == b"up\n"
            found = diagnose(expect=int(split))
        finally:
            other.kill()
    assert found["other tmpfs"]["what"].endswith(f"process {other.pid}")
    assert found["other tmpfs"]["severity"] == ("warning" if split else "note")
    assert ("--ipc=host" if split else f"nsenter -t {other.pid} -m dpshm doctor") in found["other tmpfs"]["fix"]


@pytest.mark.slow
def test_another_pid_namespace_is_only_noted(node, held):
    """Guards against a container setup that works and is called broken."""
    held(Coordinator(group="g", dp_size=1))
    held(Engine.attach("g", 0)).publish(waiting=0, running=0)
    script = f"{sys.executable} -m dpshm doctor --json"
    done = in_namespaces(script, "-p", "-f", DPSHM_DIR=str(node))
    found = {f["check"]: f["severity"] for f in json.loads(done.stdout)["findings"]}
    found.pop("space", None)
    assert found == {"pid namespace": "note"}


@pytest.mark.slow
def test_what_people_read(node, held):
    """Guards against findings without their three parts, and a count that is wrong."""
    held(Coordinator(group="g", dp_size=1))
    held(Engine.attach("g", 0)).publish(waiting=0, running=0)
    (node / "dpshm-bad").write_bytes(b"\0" * 4096)
    text = run("doctor", expect=1).stdout
    assert "group   g: alive, 1 ranks, coordinator pid" in text
    assert "ERROR   bad: " in text
    assert "        fix: fuser" in text
    assert run("doctor", "-g", "nobody", expect=2).stderr.startswith("dpshm: error: no group 'nobody'")
