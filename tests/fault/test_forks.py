"""Processes that fork workers, which outlive them: no worker holds a lock of its dead parent."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.board.sweep import sweep
from tests.support import Remote, polled, wait_until

FORK = """
def fork():
    if (pid := os.fork()) == 0:
        signal.pause()
    return pid
"""


@pytest.fixture
def killed_at_the_end():
    """A list of processes that are killed when the test ends."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def held_locks(pid: int) -> list[str]:
    """The locks that descriptors of a process hold."""
    infos = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/fdinfo").iterdir()]
    return [line for info in infos for line in info.splitlines() if line.startswith("lock:")]


@pytest.mark.parametrize("remote_ranks", [0, 1])
def test_a_worker_outlives_its_coordinator(group, using, killed_at_the_end, remote_ranks):
    """Guards against a worker that holds its dead coordinator's ports and connections: over ipc engines never hear
    that it is gone, over tcp its successor cannot bind.
    """
    options = {"group": group, "dp_size": 2}
    if remote_ranks:
        options |= {"balancing": "hybrid", "dp_size_local": 1}
    parent = using(Remote())
    parent.run(f"{FORK}\ncoordinator = Coordinator(**options)", options=options)
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
    killed_at_the_end.append(parent.eval("fork()"))
    parent.kill()
    for engine in engines:
        engine.ready = False
    successor = using(Coordinator(**options))
    assert successor.board.epoch[0] == 2
    # An engine that has connected again has heard READY again.
    wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
    frontend = using(Frontend.attach(group))
    route = frontend.route(dp_rank=0, wake=False)
    engines[0].receive(frontend.index, 0, route.wave)
    wait_until(lambda: polled(engines))
    route.done()


def test_a_worker_outlives_its_engine_and_its_front_end(group, using, killed_at_the_end):
    """Guards against a worker's copies of connections, which count as ranks that are there."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    parent = using(Remote())
    parent.run(
        f"{FORK}\nengine = Engine.attach(group, 0)\nfrontend = Frontend.attach(group)\n"
        "frontend.wake()\nworker = fork()",
        group=group,
    )
    worker = parent.eval("worker")
    killed_at_the_end.append(worker)
    wait_until(lambda: parent.eval("engine.poll(10) or engine.ready"))
    parent.kill()
    folder = str(coordinator.board.segment.sockets_path)
    held = [line for line in Path(f"/proc/{worker}/net/unix").read_text().splitlines() if folder in line]
    inodes = {line.split()[6] for line in held}

    def kept() -> set[str]:
        links = [os.readlink(path) for path in Path(f"/proc/{worker}/fd").iterdir()]
        return inodes & {link.removeprefix("socket:[").rstrip("]") for link in links}

    wait_until(lambda: not kept())  # the parent has heard of the worker before that one has run
    assert held_locks(worker) == []
    using(Engine.attach(group, 0))


def test_forks_while_other_threads_attach_and_start(group, using, killed_at_the_end):
    """Guards against the one fork in many that gets a lock or a port before it is known that children close it."""
    parent = using(Remote())
    parent.run(
        f"""{FORK}
import warnings
warnings.simplefilter("ignore")  # a fork with threads, which is what this is about
workers, ended = [], threading.Event()

def fork_often():
    while not ended.is_set() and len(workers) < 150:
        workers.append(fork())
        time.sleep(0.002)

thread = threading.Thread(target=fork_often)
thread.start()
while thread.is_alive():
    with Coordinator(group=group, dp_size=2, balancing="hybrid", dp_size_local=1):
        engine, frontend = Engine.attach(group, 0), Frontend.attach(group)
        frontend.close()
        engine.close()
thread.join()
coordinator = Coordinator(group=group, dp_size=2, balancing="hybrid", dp_size_local=1)
engine = Engine.attach(group, 1)
workers.append(fork())
""",
        group=group,
    )
    workers = parent.eval("workers")
    killed_at_the_end.extend(workers)
    engine = using(Engine.attach(group, 0))  # so that the next coordinator has to bind the same ports
    parent.kill()
    assert [held_locks(pid) for pid in workers] == [[] for _ in workers]
    with Coordinator(group=group, dp_size=2, balancing="hybrid", dp_size_local=1) as successor:
        assert successor.board.epoch[0] == 2
        assert not successor.board.engine_alive(1)
        engine.close()
    assert not sweep(group)
