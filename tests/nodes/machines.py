"""Machines that are machines: each with a network, mounts and a /dev/shm of its own, and cables between them.

A `Node` is a process in namespaces of its own. Other processes (`tests.support.Remote`) join it. Nothing of one
node's /dev/shm is seen on another; what passes between them passes over tcp, through a veth pair that a test may
cut and mend.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import pytest

from tests.support import Remote

T = TypeVar("T")

RAY = "/tmp/ray"
"""Where Ray keeps its sockets and logs: of each node, too."""
_OWN_MOUNTS = "mount --make-rprivate /"
_SETUP = (
    f"{_OWN_MOUNTS} && mount -t tmpfs -o size={{shm_mb}}m none /dev/shm && mkdir -p {RAY} "
    f"&& mount -t tmpfs none {RAY} && ip link set lo up && echo up && exec sleep infinity"
)
_JOIN = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x200) == 0, ctypes.get_errno()  # CLONE_FS: else a process with threads may not join mounts
for kind in ("net", "mnt"):
    fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
    assert libc.setns(fd, 0) == 0, (kind, ctypes.get_errno())
    os.close(fd)
os.environ.pop("DPSHM_DIR", None)
"""


@cache
def why_not() -> str | None:
    """Why this machine allows no nodes; None if it does."""
    try:
        tried = subprocess.run(
            [
                "unshare",
                "-n",
                "-m",
                "sh",
                "-c",
                "mount --make-rprivate / && ip link add name va type veth peer name vb",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as e:
        return f"unshare cannot be run: {e.strerror}"
    return f"no namespaces or no veth here: {tried.stderr.strip()}" if tried.returncode else None


needs_nodes = pytest.mark.skipif(
    os.geteuid() != 0 or why_not() is not None, reason=f"nodes need root: {why_not()}"
)
"""Skips where the machine allows no nodes, and says why."""


class Node:
    """A machine. Close it after all that runs on it.

    Args:
        shm_mb: the size of its /dev/shm.
    """

    def __init__(self, shm_mb: int = 96) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "-n", "-m", "sh", "-c", _SETUP.format(shm_mb=shm_mb)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n", "a node did not start"
        self.pid = self._holder.pid

    def process(self) -> Remote:
        """A process on this node."""
        remote = Remote()
        remote.run(_JOIN, pid=self.pid)
        return remote

    def command(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command on this node."""
        return subprocess.run([*self.within, *command], capture_output=True, text=True, check=True, **options)

    @property
    def within(self) -> list[str]:
        """The beginning of a command that runs the rest of it on this node."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m"]

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function in a thread that is on this node's network; its threads and sockets are, too."""

        def on_the_network() -> T:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
            try:
                assert libc.setns(fd, 0) == 0, os.strerror(ctypes.get_errno())
            finally:
                os.close(fd)
            return function()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(on_the_network).result()

    def close(self) -> None:
        """Ends it."""
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Cable:
    """A veth pair between two nodes: 10.77.`number`.1 on the first, .2 on the second."""

    def __init__(self, first: Node, second: Node, number: int = 0) -> None:
        self._ends = first, second
        self._name = f"eth{number}"
        self.addresses = f"10.77.{number}.1", f"10.77.{number}.2"
        add = ["ip", "link", "add", self._name, "netns", str(first.pid), "type", "veth"]
        subprocess.run([*add, "peer", "name", self._name, "netns", str(second.pid)], check=True)
        for node, address in zip(self._ends, self.addresses, strict=True):
            node.command("ip", "addr", "add", f"{address}/24", "dev", self._name)
            node.command("ip", "link", "set", self._name, "up")

    def cut(self) -> None:
        """Nothing passes any more, and no end is told."""
        self._ends[1].command("ip", "link", "set", self._name, "down")

    def mend(self) -> None:
        """It passes again."""
        self._ends[1].command("ip", "link", "set", self._name, "up")


def two_nodes(using: Callable[[Any], Any], shm_mb: int = 96) -> tuple[Node, Node, Cable]:
    """Two nodes and a cable."""
    first, second = using(Node(shm_mb)), using(Node(shm_mb))
    return first, second, Cable(first, second)
