"""Child processes: orders, answers, and their end, in either order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpshm.sim.demo.child import Lifeline
from dpshm.sim.demo.children import Children
from dpshm.sim.demo.messages import BroadcastSettings, Go, Ready, new_prefix
from tests.support import gone, wait_until

PACKAGE_ROOT = str(Path(__file__).resolve().parents[4])


def wait_ready(children: Children, count: int) -> None:
    """Waits for so many `Ready`."""
    while count:
        count -= sum(isinstance(answer, Ready) for _, answer in children.read(1.0))
        assert not any(child.ended for child in children.all), [c.obituary() for c in children.all]


def start(children: Children):
    """A child that waits for its end."""
    child = children.start("one", "dpshm.sim.demo.broadcast")
    child.tell(BroadcastSettings(os.getpid(), new_prefix(), 1))
    return child


def test_all_end_with_the_context():
    """Guards against a process that outlives the demo: one at work, one that never got its orders."""
    with Children() as children:
        start(children)
        wait_ready(children, 1)
        children.start("two", "dpshm.sim.demo.broadcast")
        pids = [child._process.pid for child in children.all]
    assert all(map(gone, pids))


def test_a_stopped_child_is_killed(monkeypatch):
    """Guards against waiting for ever for a child that does not hear."""
    monkeypatch.setattr("dpshm.sim.demo.children.STOP_TIMEOUT_S", 0.1)
    with Children() as children:
        child = start(children)
        wait_ready(children, 1)
        os.kill(child._process.pid, signal.SIGSTOP)
    assert gone(child._process.pid)


def test_obituary_says_how_and_why():
    """Guards against "it ended", with the reason in a pipe that is never read."""
    with Children() as children:
        killed = start(children)
        wait_ready(children, 1)
        confused = children.start("two", "dpshm.sim.demo.broadcast")
        confused.tell(Go(1))
        os.kill(killed._process.pid, signal.SIGKILL)
        while not (killed.ended and confused.ended):
            children.read(1.0)
        assert killed.obituary() == "one was killed by signal 9"
        assert "two ended with exit status 1; it said: msgspec.ValidationError" in confused.obituary()
        confused.tell(Go(1))  # must not raise


def test_a_child_that_is_buried_leaves_nothing():
    """A demo that runs for hours with --chaos keeps no zombie and no pipe of the processes that it killed."""
    with Children() as children:
        start(children)
        wait_ready(children, 1)
        before = len(os.listdir("/proc/self/fd"))
        child = start(children)
        wait_ready(children, 1)
        child.signal(signal.SIGKILL)
        while not child.ended:
            children.read(1.0)
        children.bury(child)
        assert len(os.listdir("/proc/self/fd")) <= before
        assert not Path(f"/proc/{child.pid}").exists()
        assert child not in children.all
        child.terminate()  # must not raise


ORPHANS = """
import os, sys, time
from dpshm.sim.demo.children import Children
from dpshm.sim.demo.messages import BroadcastSettings, Ready, new_prefix
with Children() as children:
    child = children.start("one", "dpshm.sim.demo.broadcast")
    child.tell(BroadcastSettings(os.getpid(), new_prefix(), 1))
    while not children.read(1.0):
        pass
    print(child._process.pid, flush=True)
    time.sleep(60)
"""


def test_children_end_when_their_parent_is_killed():
    """Guards against orphans of a demo that was killed with SIGKILL."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS], env={**os.environ, "PYTHONPATH": PACKAGE_ROOT}, stdout=subprocess.PIPE
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid))


@pytest.fixture
def signal_state():
    """Puts the handlers of this process back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for s, handler in before.items():
        signal.signal(s, handler)


def test_lifeline(signal_state):
    """Guards against a child that misses the signal, or takes another process for its parent."""
    lifeline = Lifeline(os.getppid())
    assert not lifeline.ended()
    os.kill(os.getpid(), signal.SIGTERM)
    assert lifeline.ended()
    assert Lifeline(os.getpid()).ended()
