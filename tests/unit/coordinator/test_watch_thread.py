"""Tests of `dpshm.coordinator.watch_thread`: rounds at times of the test's choosing, over real rows, locks and
processes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import dpshm
from dpshm import Board, Coordinator, Engine, Frontend, NoEngineAvailable, RowInUse
from dpshm.board import files
from dpshm.engine import taking
from dpshm.rules.liveness import Verdict
from tests.support import HandWatch, LoneBoard, Remote, count_fds, frontend_verdict, verdict, wait_until


@pytest.fixture
def board(group, using):
    """A board of two ranks without a coordinator."""
    return using(LoneBoard(group, watched=False))


@pytest.fixture
def watch(board, using):
    """A watch over it."""
    return using(HandWatch(board))


@pytest.fixture
def engine(board, group, using):
    """Rank 0."""
    return using(Engine.attach(group, 0))


def test_absent_alive_absent(board, watch, group):
    """Guards against a verdict on a row that no process has, or that its process gave up."""
    assert watch.after(0) is Verdict.ABSENT
    engine, frontend = Engine.attach(group, 0), Frontend.attach(group)
    assert watch.after(0.05) is Verdict.ALIVE
    assert frontend_verdict(board, 0) is Verdict.ALIVE
    engine.close()
    frontend.close()
    assert watch.after(0.05) is Verdict.ABSENT
    assert frontend_verdict(board, 0) is Verdict.ABSENT


def test_the_killed_are_dead_and_their_successors_alive(board, watch, group, using):
    """Guards against a verdict that outlives the process it is on."""
    for _ in range(2):
        remote = using(Remote())
        remote.run("engine, frontend = Engine.attach(group, 0), Frontend.attach(group, owner='a')", group=group)
        assert watch.after(0.05) is Verdict.ALIVE
        remote.kill()
        assert watch.after(0.05) is Verdict.DEAD
        assert frontend_verdict(board, 0) is Verdict.DEAD
    with Engine.attach(group, 0):
        assert watch.after(0.05) is Verdict.ALIVE


def test_a_row_that_is_locked_and_not_filled_is_absent(board, watch, group, using):
    """Guards against an engine that is chosen before it has said who it is."""
    half = using(Board.attach(group, readonly=False))
    assert half.lock_engine(0)
    assert watch.after(0.05) is Verdict.ABSENT


def test_an_engine_with_work_that_does_not_move_is_stalled(watch, engine):
    """Guards against requests that go on being sent to an engine that is wedged."""
    engine.publish(waiting=1, running=0)
    assert watch.after(0) is Verdict.ALIVE
    assert watch.after(59) is Verdict.ALIVE
    assert watch.after(120) is Verdict.STALLED
    engine.publish(waiting=1, running=0)
    assert watch.after(0.05) is Verdict.ALIVE
    assert watch.after(59) is Verdict.ALIVE


@pytest.mark.parametrize("work", ["waiting", "step", "running"])
def test_what_counts_as_work(watch, engine, work):
    """Guards against an engine that hangs in a step, or between two steps, and is not noticed."""
    if work == "running":
        engine.publish(waiting=0, running=5)
    elif work == "step":
        engine.step().__enter__()
        engine.publish(waiting=0, running=0)
    else:
        engine.publish(waiting=1, running=0)
    watch.after(0)
    for _ in range(3):
        watch.after(59)
    assert watch.after(0.05) is Verdict.STALLED


def test_an_idle_engine_is_not_stalled(watch, engine):
    """Guards against engines that are taken out of routing because they have no work."""
    engine.publish(waiting=0, running=0)
    for _ in range(5):
        assert watch.after(600) is Verdict.ALIVE


def test_a_lost_request_excludes_no_rank(watch, engine, group, using):
    """Guards against an idle rank that is out of routing until the Route of a lost request is ended."""
    frontend = using(Frontend.attach(group))
    engine.publish(waiting=0, running=0)
    watch.after(0)
    _lost = frontend.route(dp_rank=0)
    for _ in range(5):
        assert watch.after(600) is Verdict.ALIVE


def test_an_engine_is_not_stalled_the_moment_it_gets_work(watch, engine):
    """Guards against every engine of a quiet group being taken out by its first request.

    Its beat is old when a step begins, because it was idle. It has to have had work for the timeout.
    """
    engine.publish(waiting=0, running=0)
    for _ in range(10):
        watch.after(60)
    engine.step().__enter__()
    assert watch.after(0.05) is Verdict.ALIVE
    watch.after(1)
    assert watch.after(30) is Verdict.ALIVE
    for _ in range(3):
        watch.after(59)
    assert watch.after(0.05) is Verdict.STALLED


def test_the_timeout_counts_from_the_work(watch, engine):
    """Guards against an engine that was idle for almost the timeout, and is stalled within its first request."""
    engine.publish(waiting=0, running=0)
    watch.after(0)
    watch.after(59.97)
    engine.step().__enter__()
    assert watch.after(0.05) is Verdict.ALIVE
    assert watch.after(1) is Verdict.ALIVE  # work is looked for once a second
    assert watch.after(59) is Verdict.ALIVE
    assert watch.after(1.05) is Verdict.STALLED


def test_an_engine_that_makes_no_progress_is_stuck(watch, board, engine, caplog):
    """Guards against requests that are sent to an engine whose loop turns and which admits none of them."""
    watch.after(0)
    for second in range(59):
        engine.publish(waiting=26 + second, running=0)  # requests go on coming
        assert watch.after(1) is Verdict.ALIVE
    for _ in range(2):
        engine.publish(waiting=90, running=0)
        watch.after(1)
    assert verdict(board, 0) is Verdict.STUCK
    assert board.snapshot()[0]["state"] == "stuck"
    assert [m for m in caplog.messages if "stuck" in m and "90 waiting, 0 running" in m]
    engine.publish(waiting=89, running=1)
    assert watch.after(0.05) is Verdict.ALIVE


def test_an_engine_that_computes_is_not_stuck(watch, engine):
    """Guards against a verdict on a full engine: nothing ends and nothing is admitted while it generates."""
    for _ in range(100):
        with engine.step(batch=8):
            pass
        engine.publish(waiting=5, running=8)
        assert watch.after(10) is Verdict.ALIVE


def test_an_engine_that_counts_nothing_is_not_stuck_with_a_batch(watch, engine):
    """Guards against a verdict on an engine whose row cannot show that it computes."""
    for _ in range(100):
        engine.publish(waiting=5, running=8)
        assert watch.after(10) is Verdict.ALIVE


def test_an_engine_that_moves_again_has_its_time(watch, engine):
    """Guards against an engine that was stopped, and is stuck at the moment in which it goes on."""
    engine.publish(waiting=1, running=0)
    watch.after(0)
    assert watch.after(120) is Verdict.STALLED
    for _ in range(59):
        engine.publish(waiting=1, running=0)
        assert watch.after(1) is Verdict.ALIVE


@pytest.mark.parametrize("found", [Verdict.STALLED, Verdict.STUCK])
def test_a_verdict_outlives_the_watch_that_gave_it(board, watch, engine, group, using, found):
    """Guards against a restart of the coordinator that sends requests to a hung rank for a minute."""
    frontend = using(Frontend.attach(group))
    engine.publish(waiting=3, running=0)
    watch.after(0)
    for _ in range(2):
        if found is Verdict.STUCK:
            engine.publish(waiting=3, running=0)
        watch.after(60)
    assert verdict(board, 0) is found
    assert frontend.snapshot()["verdict"].tolist() == [found.name.lower(), "absent"]  # no coordinator lives
    with pytest.raises(NoEngineAvailable, match=f"0 {found.name.lower()}"):
        frontend.route()
    second = using(HandWatch(board))
    assert second.after(0) is found
    engine.publish(waiting=0, running=3)
    assert board.engine_verdicts(watched=False) == [Verdict.ALIVE, Verdict.ABSENT]
    assert second.after(0.05) is Verdict.ALIVE


def test_a_successor_that_started_while_no_watch_was_there_is_alive(board, watch, group, using):
    """Guards against a verdict that a new process inherits from the one that hung."""
    first = Engine.attach(group, 0)
    first.publish(waiting=3, running=0)
    watch.after(0)
    assert watch.after(120) is Verdict.STALLED
    first.close()
    using(Engine.attach(group, 0)).publish(waiting=3, running=0)
    assert using(HandWatch(board)).after(0) is Verdict.ALIVE


def test_a_paused_engine_is_not_stalled(watch, engine):
    """Guards against an engine that its user paused and the watch takes out."""
    engine.publish(waiting=3, running=0)
    engine.pause()
    for _ in range(3):
        assert watch.after(600) is Verdict.ALIVE
    engine.resume(has_work=True)
    for _ in range(3):
        watch.after(600)
    assert watch.after(0.05) is Verdict.STALLED


def test_zero_means_never(board, engine, using):
    """Guards against a timeout of zero that takes every engine out at once."""
    watch = using(HandWatch(board, 0))
    engine.publish(waiting=3, running=0)
    for _ in range(3):
        assert watch.after(6000) is Verdict.ALIVE


def test_a_successor_has_its_own_time(watch, board, group, using):
    """Guards against a restarted engine that is stalled from its first moment, for its predecessor's stillness."""
    first = Engine.attach(group, 0)
    first.publish(waiting=1, running=0)
    watch.after(0)
    watch.after(120)
    assert verdict(board, 0) is Verdict.STALLED
    first.close()
    second = using(Engine.attach(group, 0))
    second.publish(waiting=1, running=0)
    board.beat[0] = 0
    assert watch.after(0.05) is Verdict.ALIVE
    assert watch.after(59) is Verdict.ALIVE


def test_a_drained_engine_stays_drained(board, watch, engine):
    """Guards against a verdict that takes the operator's mark away, as both are in one word."""
    board.marks.set_engine(0, drained=True)
    engine.publish(waiting=1, running=0)
    for seconds in (0, 120, 120):
        watch.after(seconds)
        assert board.snapshot()[0]["drained"]
    assert verdict(board, 0) is Verdict.STALLED


def test_stock_engines_get_no_verdict(board, watch):
    """Guards against a stock engine, which has no lock, that is called dead."""
    board.marks.set_engine(0, verdict=Verdict.ALIVE, on_behalf=True)
    assert watch.after(600) is Verdict.ALIVE
    assert board.snapshot()[0]["stock"]


def test_a_report_that_comes_amid_a_judgement_counts(board, watch, monkeypatch):
    """Guards against a stock engine that is absent until its next report: the watch had not seen its first."""
    assert watch.after(0) is Verdict.ABSENT
    follow = watch._follow

    def report_first(key, *process):
        if key == ("engine", 0):
            board.marks.set_engine(0, verdict=Verdict.ALIVE, on_behalf=True)
        return follow(key, *process)

    with monkeypatch.context() as amid:
        amid.setattr(watch, "_follow", report_first)
        assert watch.after(60) is Verdict.ALIVE
    assert watch.after(60) is Verdict.ALIVE
    assert board.snapshot()["stock"].tolist() == [True, False]


@pytest.mark.parametrize("drained", [False, True])
def test_a_drain_amid_a_judgement_delays_no_verdict(board, watch, group, using, monkeypatch, drained):
    """Guards against a death that shows a round later because an operator drained the rank at that moment."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    assert watch.after(0) is Verdict.ALIVE
    remote.kill()
    follow = watch._follow
    monkeypatch.setattr(
        watch, "_follow", lambda *of_one: board.marks.set_engine(0, drained=drained) and follow(*of_one)
    )
    assert watch.after(0.05) is Verdict.DEAD
    assert board.snapshot()[0]["drained"] == drained


def test_an_engine_that_takes_over_from_its_messages_is_no_news(board, watch, engine, caplog):
    """Guards against a line that says "is alive, was alive": a stock engine reported before, and now has a row."""
    caplog.set_level("INFO")
    board.marks.set_engine(0, verdict=Verdict.ALIVE, on_behalf=True)
    assert watch.after(0.05) is Verdict.ALIVE
    assert not board.snapshot()[0]["stock"]
    assert "was alive" not in caplog.text


def test_a_scribbled_row_ends_nothing(board, watch, engine):
    """Guards against trust in shared memory: no number of it may raise, or be used as an index."""
    for name in ("engine_state", "beat", "step_start", "engine_pid", "engine_start_time", "engine_incarnation"):
        for value in (-1, -(1 << 63), (1 << 63) - 1):
            board.words[board.index(name, 0)] = value
            assert watch.after(600) is not Verdict.DEAD
    board.words[board.index("dp_size")] = 1 << 40
    watch.after(0.05)
    board.words[board.index("dp_size")] = -5
    watch.after(0.05)


def test_an_unlinked_segment_is_told_once(board, watch, caplog):
    """Guards against a removed board file that is not reported, or that fills the log."""
    files.segment_path(board.segment.group).unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            watch.after(0.05)
    assert [r.levelname for r in caplog.records if "unlinked" in r.message] == ["WARNING"]


def test_verdicts_are_logged_once(board, watch, group, using, caplog):
    """Guards against an engine's death that is not in the log, or in it twenty times a second."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    watch.after(0)
    remote.kill()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            watch.after(0.05)
    assert [r.message for r in caplog.records] == [f"engine 0 (pid {remote.pid}) is dead, was alive"]


# The thread itself.


def test_a_death_is_noticed(group, using):
    """Guards against a watch that never looks."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    remotes = [using(Remote()) for _ in range(2)]
    remotes[0].run("engine = Engine.attach(group, 0)", group=group)
    remotes[1].run("frontend = Frontend.attach(group)", group=group)
    wait_until(lambda: frontend_verdict(coordinator.board, 0) is Verdict.ALIVE)
    for remote in remotes:
        remote.kill()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
    wait_until(lambda: frontend_verdict(coordinator.board, 0) is Verdict.DEAD)


def test_a_round_that_fails_is_not_the_last(group, using, caplog, monkeypatch):
    """Guards against one error that ends the watch."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    watch = coordinator._watch
    real, failed = watch._judge_engine, threading.Event()

    def fails_once(*arguments):
        if not failed.is_set():
            failed.set()
            raise ZeroDivisionError
        real(*arguments)

    monkeypatch.setattr(watch, "_judge_engine", fails_once)
    wait_until(failed.is_set)
    using(Engine.attach(group, 0))
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ALIVE)
    assert any("liveness scan failed" in r.message for r in caplog.records)


def test_pidfds_are_closed(board, watch, group, using):
    """Guards against a descriptor for each process that ever took a row."""

    def live_and_die():
        remote = Remote()
        remote.run("engine, frontend = Engine.attach(group, 0), Frontend.attach(group, owner='a')", group=group)
        watch.after(0.05)
        watched = sum(o.pidfd is not None for o in watch._occupants.values())
        remote.close()
        watch.after(0.05)
        return watched

    assert live_and_die() == 2
    before = count_fds()
    for _ in range(5):
        live_and_die()
    assert count_fds() <= before


KEEPER = """
import os, subprocess, sys
from dpshm import Engine, Frontend
engine, frontend = Engine.attach(sys.argv[1], 0), Frontend.attach(sys.argv[1])
fds = [handle.board.segment.locks.fd for handle in (engine, frontend)]
# A child that dpshm's fork hook cannot reach: it keeps the locks as a process does whose memory is being freed.
print(subprocess.Popen(["sleep", "600"], pass_fds=fds, stdout=subprocess.DEVNULL).pid, flush=True)
input()
"""


@pytest.fixture
def ended(board, watch, group):
    """A process that has ended and holds its rows' locks still, not yet reaped, and what ends them."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPER, group],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(dpshm.__file__).parents[1])},
    )
    with process:
        keeper = int(process.stdout.readline())
        assert watch.after(0.05) is Verdict.ALIVE
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert board.engine_alive(0)  # as far as the lock tells
        assert board.frontend_alive(0)
        yield process, keeper
        with suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)


def test_a_process_that_exits_is_dead_before_its_lock_is_free(board, watch, ended):
    """Guards against requests that go to an engine for as long as the kernel frees its memory."""
    assert watch.after(0.05) is Verdict.DEAD
    assert frontend_verdict(board, 0) is Verdict.DEAD
    assert board.engine_alive(0)
    ended[0].wait()
    assert watch.after(0.05) is Verdict.DEAD  # also when it is gone, and nothing shows that it exits


def test_without_a_watch_a_front_end_sees_that_an_engine_exits(board, ended):
    """Guards against routing to a rank that is gone, while no coordinator lives."""
    assert board.engine_verdicts(watched=False)[0] is Verdict.DEAD
    assert board.engine_alive(0)


def test_a_successor_waits_until_the_kernel_is_done(board, watch, ended, group, monkeypatch):
    """Guards against a restart that fails because its predecessor's memory is still being freed."""
    process, keeper = ended
    monkeypatch.setattr(taking, "EXIT_TIMEOUT_S", 0.1)
    with pytest.raises(RowInUse, match=rf"ending its last process \({process.pid}\) for 0.1 s"):
        Engine.attach(group, 0)
    monkeypatch.setattr(taking, "EXIT_TIMEOUT_S", 60.0)
    threading.Timer(0.2, os.kill, (keeper, signal.SIGKILL)).start()
    with Engine.attach(group, 0):
        assert watch.after(0.05) is Verdict.ALIVE


def test_a_lock_that_is_held_for_a_process_that_is_gone_is_not_waited_for(ended, group):
    """Guards against a wait for a process that has ended, and whose child keeps the lock."""
    process, _ = ended
    process.wait()
    with pytest.raises(RowInUse, match=f"is taken by the live process {process.pid}"):
        Engine.attach(group, 0)


def told_of(fd: int | None) -> str:
    """The process or thread that a pidfd is of; empty if it was closed just now."""
    with suppress(FileNotFoundError):
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
        return dict(line.split(":\t", 1) for line in info.splitlines()).get("Pid", "")
    return ""


def test_a_thread_that_ends_is_no_end(group, using):
    """Guards against an engine that is dead, or not followed any more, because a thread of it has ended."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    remote = using(Remote())
    remote.run("go = threading.Event()\nthread = threading.Thread(target=go.wait)\nthread.start()")
    remote.run("engine = Engine.attach(group, 0)", group=group)
    wait_until(lambda: coordinator._watch._occupants["engine", 0].pidfd)
    thread = told_of(coordinator._watch._occupants["engine", 0].pidfd)
    if thread == str(remote.pid):
        pytest.skip("this kernel has no pidfds of threads (Linux 6.9)")
    assert thread == str(remote.eval("thread.native_id"))
    remote.run("go.set()\nthread.join()")
    wait_until(lambda: told_of(coordinator._watch._occupants["engine", 0].pidfd) not in ("", "-1", thread))
    assert verdict(coordinator.board, 0) is Verdict.ALIVE


def test_a_rank_that_went_and_came_is_followed(group, using):
    """Guards against a rank whose death shows late because its number was used before the group shrank."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    remote = Remote()
    remote.run("engine = Engine.attach(group, 1)", group=group)
    wait_until(lambda: coordinator._watch._occupants.get(("engine", 1)))
    remote.close()
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.DEAD)
    coordinator.scale(1)
    coordinator.scale(2)
    with Engine.attach(group, 1):
        wait_until(lambda: coordinator._watch._occupants[("engine", 1)].pidfd is not None)
