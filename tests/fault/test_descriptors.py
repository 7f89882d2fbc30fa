"""Processes that run out of descriptors (RLIMIT_NOFILE): failed calls say so, and the rest goes on."""

from __future__ import annotations

import signal
import socket
import urllib.request
from contextlib import ExitStack, closing

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.net.keys import make_keys
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import TIMEOUT_S, Remote, leftovers, polled, publish_forever, verdict, wait_until

pytestmark = pytest.mark.slow

HOARD = """
import gc, resource
def hoard(free):
    '''Leaves the process so many descriptors.'''
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
    return taken
def let_go(taken):
    while taken:
        os.close(taken.pop())
def count():
    gc.collect()
    threads = sum(t.name.startswith("dpshm") for t in threading.enumerate())
    return len(os.listdir("/proc/self/fd")), threads
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
"""
ATTEMPT = """
taken = hoard(free)
error = handle = None
try:
    handle = make()
except Exception as e:
    error = f"{type(e).__name__}: {e}"
let_go(taken)
if handle is not None:
    handle.close()
    handle = None
"""
MAKERS = {
    "Coordinator": "Coordinator(group=group, dp_size=1)",
    "Engine": "Engine.attach(group, 0)",
    "Frontend": "Frontend.attach(group)",
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("what", MAKERS)
def test_a_start_without_descriptors(group, using, what, warm):
    """Guards against a start that fails without a reason, or by half: with each number of descriptors too few.

    libzmq ends the process (abort) where it has none for its threads; a process that has a context (`warm`) gets
    past that point, and fails further on.
    """
    coordinator = using(Coordinator(group=group, dp_size=1)) if what != "Coordinator" else None
    with_context = "import zmq\nfrom dpshm.net.context import context\ncontext().socket(zmq.PUSH).close()"
    prepare = f"{HOARD}\n{with_context if warm else ''}\nmake = lambda: {MAKERS[what]}"
    free, error = 0, ""
    while error is not None:
        with closing(Remote()) as remote:
            remote.run(prepare, group=group)
            before, threads = remote.eval("count()")
            remote.run(ATTEMPT, free=free)
            error = remote.eval("error")
            if error is not None:
                assert error.startswith("TooManyFiles: "), (free, error)
                assert "raise the limit" in error
                # ZMQ closes in its own thread; a context, once it is made, stays.
                wait_until(lambda r=remote, most=before + (0 if warm else 8): r.eval("count()")[0] <= most)
                assert remote.eval("count()")[1] == threads, free
                if coordinator is None:
                    assert leftovers(group) == [], free
                else:
                    board = coordinator.board
                    assert not board.engine_alive(0)
                    assert not board.frontend_alive(0)
                    assert board.engine_pid[0] == board.frontend_pid[0] == 0
        free += 1
        assert free < 40
    assert free > 3  # it has failed a few times


def test_a_coordinator_that_runs_out_of_descriptors(group, using):
    """Guards against a coordinator that a leak elsewhere in its process ends: it judges on, and recovers.

    What it cannot do is take a new connection in: there libzmq ends the process (`dpshm.linux.descriptors`).
    """
    remote = using(Remote())
    remote.run(f"{HOARD}\ncoordinator = Coordinator(group=group, dp_size=3, stall_timeout_s=0.3)", group=group)
    engines = [using(Remote()) for _ in range(3)]
    for e in range(2):
        engines[e].run("engine = Engine.attach(group, e)", group=group, e=e)
    frontend = using(Frontend.attach(group))
    board = frontend.board
    publish_forever(engines[0], running=1)
    _booked = frontend.route(dp_rank=0)
    wait_until(lambda: board.phase is Phase.RUNNING)

    remote.run("taken = hoard(0)")
    engines[2].run("from dpshm.engine.row import EngineRow\nengine = EngineRow.attach(group, 2)", group=group)
    wait_until(lambda: verdict(board, 2) is Verdict.ALIVE)
    for e in (1, 2):  # of the second it has a pidfd, of the third it has none
        engines[e].kill()
        wait_until(lambda e=e: verdict(board, e) is Verdict.DEAD)
    engines[0].signal(signal.SIGSTOP)
    wait_until(lambda: verdict(board, 0) is Verdict.STALLED)
    engines[0].signal(signal.SIGCONT)
    wait_until(lambda: verdict(board, 0) is Verdict.ALIVE)
    assert remote.eval("coordinator.is_healthy()")

    remote.run("let_go(taken)")
    again = [using(Engine.attach(group, e)) for e in (1, 2)]
    for engine in again:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)
    remote.run("coordinator.drain(1)")
    assert {frontend.route().dp_rank for _ in range(9)} <= {0, 2}
    remote.run("coordinator.close()")


def test_a_coordinators_own_process_has_all_it_may_have(group, using):
    """Guards against a coordinator of many ranks that the usual soft limit of 1024 descriptors ends."""
    parent = using(Remote())
    parent.run(
        "import resource\nhard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, hard), hard))\n"
        "process = CoordinatorProcess(group=group, dp_size=1)",
        group=group,
    )
    limits = parent.eval("resource.prlimit(process.proc.pid, resource.RLIMIT_NOFILE)")
    assert limits[0] == limits[1] == parent.eval("hard")
    assert parent.eval("resource.getrlimit(resource.RLIMIT_NOFILE)[0]") == min(200, limits[1])
    parent.run("process.close()")


def test_a_frontend_that_runs_out_of_descriptors(group, using):
    """Guards against requests that fail because there is no descriptor for the socket of the first wake-up."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    engine = using(Engine.attach(group, 0))
    remote = using(Remote())
    remote.run(f"{HOARD}\nfrontend = Frontend.attach(group)\ntaken = hoard(0)", group=group)
    remote.run("routes = [frontend.route(10) for _ in range(5)]")
    assert coordinator.board.snapshot()["in_flight"].tolist() == [5]
    assert not engine.poll(20)
    remote.run("let_go(taken)\nroutes.append(frontend.route(10))")
    wait_until(lambda: engine.poll(10))


def test_idle_connections_leave_a_coordinator_its_descriptors(group, using):
    """Guards against strangers at the metrics port: libzmq aborts if no descriptor is left for an engine."""
    server = using(Remote())
    server.run(
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "coordinator = Coordinator(group=group, dp_size=2, metrics_port=0)",
        group=group,
    )
    address = server.eval("coordinator.metrics_address")
    engines = [using(Engine.attach(group, 0))]
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(closing(socket.create_connection(address, timeout=TIMEOUT_S)))
        engines.append(using(Engine.attach(group, 1)))
        wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
        with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=TIMEOUT_S) as answer:
            assert b"dpshm_coordinator_up" in answer.read()
    server.run("coordinator.close()")


@pytest.mark.parametrize("with_keys", [True, False])
def test_strangers_at_a_tcp_port_leave_a_coordinator_its_descriptors(group, using, tmp_path, with_keys):
    """Guards against peers without keys, or that say nothing, which end the coordinator of all others."""
    keys = str(tmp_path / "keys") if with_keys else None
    if keys is not None:
        make_keys(keys)
    server = using(Remote())
    server.run(
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "coordinator = Coordinator(group=group, dp_size=2, balancing='hybrid', curve_dir=keys)\n"
        "address = coordinator.stats_publish_address",
        group=group,
        keys=keys,
    )
    host, _, port = server.eval("address").removeprefix("tcp://").rpartition(":")
    engines = [using(Engine.attach(group, 0, curve_dir=keys))]
    frontend = using(Frontend.attach(group, curve_dir=keys))
    with ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=TIMEOUT_S)))
        engines.append(using(Engine.attach(group, 1, curve_dir=keys)))
        wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
        wait_until(lambda: server.eval("len(os.listdir('/proc/self/fd'))") < 150)
        frontend.wake()  # the first message of this front-end: it connects now
        wait_until(lambda: polled(engines))
        wait_until(lambda: server.eval("coordinator.board.phase.name") == "RUNNING")
    server.run("coordinator.close()")
