"""Sockets between nodes when the other node goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dpshm

PEER = """
import os, sys, zmq
s = zmq.Context().socket(zmq.XPUB)
s.bind_to_random_port("tcp://127.0.0.1")
print(s.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
s.recv()
for _ in range(2000):
    s.send(b"x" * 1000)
sys.stdin.read()
"""
READER = """
import sys, time, zmq
from dpshm.net.context import context
from dpshm.net.cuts import notice_cuts
s = context().socket(zmq.SUB)
s.rcvhwm, s.linger = 1, 0
notice_cuts(s)
s.connect(sys.argv[1])
s.subscribe(b"")
assert s.poll(30_000)
print("came", flush=True)
sys.stdin.readline()
time.sleep(1)  # so long a heartbeat of libzmq's needed to end the process
assert s.recv(zmq.NOBLOCK)
print("read", flush=True)
"""


def test_a_peer_that_goes_does_not_end_a_process_that_did_not_read(using):
    """Guards against libzmq's abort, with its heartbeats, when a peer goes while its messages wait to be read."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PEER], **pipes) as peer:
        address = peer.stdout.readline().strip()
        with subprocess.Popen([sys.executable, "-c", READER, address], **pipes) as reader:
            assert reader.stdout.readline() == "came\n"
            peer.kill()
            assert reader.communicate("peer went\n", timeout=30)[0] == "read\n"
            assert reader.returncode == 0


def test_no_socket_has_heartbeats():
    """Guards against heartbeats of libzmq, which end a process: see `dpshm.net.cuts`."""
    found = [path for path in Path(dpshm.__file__).parent.rglob("*.py") if "heartbeat_" in path.read_text()]
    assert found == []
