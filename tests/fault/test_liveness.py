"""Processes that die, stop and come back, as all other processes see them."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dpshm import Coordinator, Engine, Frontend, NoEngineAvailable, RowInUse
from dpshm.linux.processes import start_time
from dpshm.rules.liveness import Verdict
from tests.support import (
    Remote,
    RemoteError,
    frontend_verdict,
    gone,
    publish_forever,
    verdict,
    wait_until,
)


@pytest.fixture
def coordinator(group, using):
    """A coordinator of three ranks that calls an engine stalled after 0.3 s."""
    return using(Coordinator(group=group, dp_size=3, stall_timeout_s=0.3))


def attach(using, group, dp_rank):
    """An engine in a process of its own."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, dp_rank)", group=group, dp_rank=dp_rank)
    return remote


def chosen(frontend, count=9):
    """The ranks that a front-end chooses; empty if no rank may be chosen."""
    ranks = set()
    for _ in range(count):
        try:
            route = frontend.route()
        except NoEngineAvailable:
            return set()
        ranks.add(route.dp_rank)
        route.cancel()
    return ranks


def test_a_killed_engine_is_skipped(coordinator, group, using):
    """Guards against requests that go to an engine that is gone."""
    remotes = [attach(using, group, dp_rank) for dp_rank in range(3)]
    frontend = using(Frontend.attach(group))
    assert chosen(frontend) == {0, 1, 2}
    booked = [frontend.route(10, dp_rank=1) for _ in range(5)]
    remotes[1].kill()
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.DEAD)
    assert chosen(frontend) == {0, 2}
    with pytest.raises(NoEngineAvailable, match="engine 1"):
        frontend.route(dp_rank=1)
    for remote in (remotes[0], remotes[2]):
        remote.kill()
    wait_until(lambda: set(coordinator.board.snapshot()["state"].tolist()) == {"dead"})
    with pytest.raises(NoEngineAvailable, match="0 dead, 1 dead, 2 dead"):
        frontend.route()
    again = using(Engine.attach(group, 1))
    assert chosen(frontend) == {1}
    for route in booked:
        route.cancel()
    again.publish(waiting=0, running=0)
    assert frontend.snapshot()[1]["requests"] == 0


BALLAST = """
import mmap
ballast = mmap.mmap(-1, 512 << 20)
ballast.madvise(mmap.MADV_NOHUGEPAGE)  # page by page, which takes the kernel longer to free
for at in range(0, len(ballast), mmap.PAGESIZE):
    ballast[at] = 1
"""


@pytest.mark.slow
def test_a_killed_engine_is_skipped_before_its_memory_is_freed(coordinator, group, using):
    """Guards against requests that go to an engine until the kernel has freed its memory and drops its lock.

    On a busy machine the kernel may be done first, so several kills are tried. Without the promise, none shows it.
    """
    board = coordinator.board
    for _ in range(20):
        remote = using(Remote())
        remote.run(BALLAST)
        remote.run("engine = Engine.attach(group, 0)", group=group)
        wait_until(lambda: verdict(board, 0) is Verdict.ALIVE)
        os.kill(remote.pid, signal.SIGKILL)
        wait_until(lambda: verdict(board, 0) is Verdict.DEAD)
        held = board.engine_alive(0)
        Engine.attach(group, 0).close()  # waits for the kernel
        if held:
            return
    raise AssertionError("the lock was free before the rank was dead, each time")


def test_a_stopped_engine_is_skipped_until_it_moves(coordinator, group, using):
    """Guards against requests that wait for an engine which is wedged, and one that never gets any again."""
    remotes = [attach(using, group, dp_rank) for dp_rank in range(2)]
    frontend = using(Frontend.attach(group))
    for remote in remotes:
        publish_forever(remote, running=1)
    wait_until(lambda: coordinator.board.snapshot()["running"].tolist()[:2] == [1, 1])
    remotes[0].signal(signal.SIGSTOP)
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.STALLED)
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)
    wait_until(lambda: chosen(frontend) == {1})
    assert frontend.route(dp_rank=0).dp_rank == 0  # it may still be named
    with pytest.raises(RowInUse, match=str(remotes[0].pid)):  # and it still has its row
        Engine.attach(group, 0)
    remotes[0].signal(signal.SIGCONT)
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ALIVE)
    _booked = [frontend.route(dp_rank=1) for _ in range(3)]  # the other has as many as this one now, and some more
    wait_until(lambda: chosen(frontend) == {0})


def test_an_engine_wedged_in_a_step_is_skipped_until_it_moves(coordinator, group, using):
    """Guards against requests that go to an engine whose step hangs in a kernel or a collective: it does live."""
    remotes = [attach(using, group, dp_rank) for dp_rank in range(2)]
    frontend = using(Frontend.attach(group))
    for remote in remotes:
        remote.run("engine.publish(waiting=0, running=1)")
    publish_forever(remotes[1], running=1)
    remotes[0].begin("with engine.step(batch=1):\n    while not told(): time.sleep(0.01)")
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.STALLED)
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)  # a busy machine may hold it up for 0.3 s
    wait_until(lambda: chosen(frontend) == {1})
    remotes[0].run("engine.publish(waiting=0, running=0)")  # told: the step ends
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ALIVE)
    wait_until(lambda: 0 in chosen(frontend))


def test_a_pid_that_is_used_again_is_not_the_engine(coordinator, group, using):
    """Guards against a dead engine that looks alive, or whose death shows late, because its pid has a new owner.

    The kernel hands pids out in turn, so the row is made to look as it would: a live process's pid, and the start
    time of the one that is gone.
    """
    frontend = using(Frontend.attach(group))
    using(Engine.attach(group, 2))
    bystander = using(Remote())
    board = coordinator.board
    for _ in range(3):
        time.sleep(0.05)  # start times are in ticks of 10 ms
        remote = attach(using, group, 0)
        board.engine_pid[0] = bystander.pid
        assert board.engine_start_time[0] != start_time(bystander.pid)
        remote.kill()
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
        assert chosen(frontend) == {2}
        assert not gone(bystander.pid)
        wait_until(lambda: coordinator._watch._occupants["engine", 0].pidfd is None)


def test_a_stopped_engine_without_work_is_alive(coordinator, group, using):
    """Guards against idle engines being taken out, also while a request for it is in flight, or lost."""
    remote = attach(using, group, 0)
    frontend = using(Frontend.attach(group))
    remote.run("engine.publish(waiting=0, running=0)")
    remote.signal(signal.SIGSTOP)
    with pytest.raises(AssertionError, match="in vain"):
        wait_until(lambda: verdict(coordinator.board, 0) is not Verdict.ALIVE, 0.6)
    booked = frontend.route()
    with pytest.raises(AssertionError, match="in vain"):
        wait_until(lambda: verdict(coordinator.board, 0) is not Verdict.ALIVE, 0.6)
    assert chosen(frontend) == {0}
    booked.done()
    remote.signal(signal.SIGCONT)


def test_a_verdict_outlives_its_coordinator(group, using):
    """Guards against a takeover that sends requests to a hung rank again until the timeout is over once more."""
    keeper = using(Remote())
    keeper.run("coordinator = Coordinator(group=group, dp_size=2, stall_timeout_s=0.3)", group=group)
    remotes = [attach(using, group, dp_rank) for dp_rank in range(2)]
    frontend = using(Frontend.attach(group))
    for remote in remotes:
        publish_forever(remote, running=1)
    wait_until(lambda: frontend.snapshot()["running"].tolist() == [1, 1])
    remotes[0].signal(signal.SIGSTOP)
    wait_until(lambda: verdict(frontend.board, 0) is Verdict.STALLED)
    keeper.kill()
    wait_until(lambda: not frontend.board.is_watched())
    # On a busy machine the other rank may have stalled, too, when the coordinator was killed: it moves again.
    wait_until(lambda: chosen(frontend) == {1})
    again = using(Coordinator(group=group, dp_size=2, stall_timeout_s=3600))
    wait_until(again.board.is_watched)
    assert verdict(again.board, 0) is Verdict.STALLED
    wait_until(lambda: verdict(again.board, 1) is Verdict.ALIVE)
    assert chosen(frontend) == {1}
    remotes[0].signal(signal.SIGCONT)
    wait_until(lambda: verdict(again.board, 0) is Verdict.ALIVE)
    wait_until(lambda: 0 in chosen(frontend))


def test_a_stopped_engine_that_is_killed_is_dead(coordinator, group, using):
    """Guards against a stalled engine whose death no process notices, so that its rank cannot be restarted."""
    remote = attach(using, group, 0)
    publish_forever(remote, running=1)
    wait_until(lambda: coordinator.board.snapshot()[0]["running"] == 1)
    remote.signal(signal.SIGSTOP)
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.STALLED)
    remote.kill()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
    using(Engine.attach(group, 0))
    assert verdict(coordinator.board, 0) is Verdict.ALIVE


def test_a_killed_frontends_bookings_leave_the_sums(coordinator, group, using):
    """Guards against requests that died with their front-end and weigh on an engine for ever."""
    using(Engine.attach(group, 0))
    remotes = [using(Remote()) for _ in range(2)]
    for i, remote in enumerate(remotes):
        remote.run(
            "frontend = Frontend.attach(group, owner=owner)\nroutes = [frontend.route(10) for _ in range(5)]",
            group=group,
            owner=str(i),
        )
    observer = using(Frontend.attach(group))
    assert observer.snapshot()[0]["in_flight"] == 10
    index = remotes[0].eval("frontend.index")
    remotes[0].kill()
    wait_until(lambda: frontend_verdict(coordinator.board, index) is Verdict.DEAD)
    assert (observer.snapshot()[0]["in_flight"], observer.snapshot()[0]["in_flight_tokens"]) == (5, 50)
    remotes[1].run("frontend.close()")
    wait_until(lambda: observer.snapshot()[0]["in_flight"] == 0)


def test_a_stopped_frontends_bookings_stay(coordinator, group, using):
    """Guards against the bookings of a front-end that is merely slow: its requests are in flight."""
    using(Engine.attach(group, 0))
    remote = using(Remote())
    remote.run("frontend = Frontend.attach(group)\nroute = frontend.route()", group=group)
    remote.signal(signal.SIGSTOP)
    with pytest.raises(AssertionError, match="in vain"):
        wait_until(lambda: coordinator.board.snapshot()[0]["in_flight"] != 1, 0.6)
    remote.signal(signal.SIGCONT)


def test_a_forked_worker_that_outlives_its_engine(coordinator, group, using):
    """Guards against an engine kept alive by a worker that it forked: such a worker may hang for long."""
    remote = attach(using, group, 0)
    remote.run(
        """
if (child := os.fork()) == 0:
    if (grandchild := os.fork()) == 0:
        signal.pause()
    signal.pause()
    os._exit(0)
"""
    )
    child = remote.eval("child")
    try:
        remote.kill()
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
        assert not gone(child)
    finally:
        for pid in (*_children(child), child):
            os.kill(pid, signal.SIGKILL)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as f:
        return [int(p) for p in f.read().split()]


def test_a_worker_made_by_multiprocessing_does_not_keep_the_row(coordinator, group, using):
    """Guards against the default way in which servers make workers; children see the handle as forked."""
    remote = using(Remote())
    remote.run(
        """
import multiprocessing, threading
engine = Engine.attach(group, 0)

def work(connection):
    try:
        engine.publish(waiting=1, running=1)
    except HandleForked:
        connection.send(os.getpid())
    signal.pause()

multiprocessing.current_process()._config["daemon"] = False
ours, theirs = multiprocessing.Pipe()
worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True)
worker.start()
pid = ours.recv()
""",
        group=group,
    )
    pid = remote.eval("pid")
    try:
        remote.kill()
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_without_a_coordinator(group, using):
    """Guards against routing that needs a coordinator: dead ones are skipped, new ones found, bookings counted."""
    keeper = using(Remote())
    keeper.run("coordinator = Coordinator(group=group, dp_size=3)", group=group)
    remotes = [attach(using, group, dp_rank) for dp_rank in range(2)]
    frontend = using(Frontend.attach(group))
    other = using(Remote())
    other.run(
        "frontend = Frontend.attach(group)\nroutes = [frontend.route(dp_rank=0) for _ in range(4)]", group=group
    )
    keeper.kill()
    assert chosen(frontend) == {1}  # the other's bookings are seen
    remotes[1].kill()
    wait_until(lambda: chosen(frontend) == {0})
    third = attach(using, group, 2)
    wait_until(lambda: chosen(frontend) == {2})
    other.kill()
    wait_until(lambda: chosen(frontend) == {0, 2})
    coordinator = using(Coordinator(group=group, dp_size=3))
    assert coordinator.board.snapshot()["verdict"].tolist() == ["alive", "dead", "alive"]
    assert chosen(frontend) == {0, 2}
    third.kill()
    wait_until(lambda: chosen(frontend) == {0})


def test_the_dead_cannot_be_heard(coordinator, group, using):
    """Guards against tests of this module that cannot fail: a killed process has to be gone."""
    remote = attach(using, group, 0)
    remote.kill()
    assert gone(remote.pid)
    with pytest.raises((RemoteError, BrokenPipeError, ConnectionResetError)):
        remote.eval("1")
