"""Tests of `dpshm.service.coordinator_process`: the coordinator's own process, and the handle on it."""

from __future__ import annotations

import inspect
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

import pytest

import dpshm
from dpshm import (
    Board,
    Coordinator,
    CoordinatorProcess,
    Engine,
    Frontend,
    GroupInUse,
    SegmentError,
    SettingError,
    StartupTimeout,
)
from dpshm.board.sweep import sweep
from dpshm.rules.waves import Phase
from tests.support import Remote, RemoteError, count_fds, count_threads, gone, leftovers, polled, wait_until

ROOT = Path(dpshm.__file__).parent.parent


def ended(process, timeout_s=30.0):
    """Whether a monitor that waits for a process's sentinel sees it end."""
    return connection.wait([process.proc.sentinel], timeout_s) == [process.proc.sentinel]


def test_it_coordinates(group, using):
    """Guards against a process that reports addresses and does nothing."""
    process = using(CoordinatorProcess(group=group, dp_size=2))
    header = using(Board.attach(group)).segment.header
    assert process.get_stats_publish_address() == process.stats_publish_address == header.stats_address
    assert process.get_engine_socket_addresses() == (header.engine_input_address, header.engine_output_address)
    assert header.creator_pid == process.proc.pid != os.getpid()
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    using(Frontend.attach(group)).route(dp_rank=1)
    wait_until(lambda: polled(engines))
    wait_until(lambda: engines[0].board.phase is Phase.RUNNING)


def test_it_has_the_methods_of_a_coordinator(group, using):
    """Guards against a program that cannot do with its coordinator's process what it did with the threads."""
    process = using(CoordinatorProcess(group=group, dp_size=2, max_engines=4))
    board = using(Board.attach(group))
    assert wait_until(process.is_healthy)
    with pytest.raises(StartupTimeout, match=r"ranks without a row: \[0, 1\]"):
        process.wait_ready(0.05)
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    process.wait_ready()
    process.drain(1)
    assert board.snapshot()["drained"].tolist() == [False, True]
    process.undrain(1)
    assert board.snapshot()["drained"].tolist() == [False, False]
    with pytest.raises(SettingError, match=r"ranks \[0, 1\] are not drained"):
        process.scale(3)  # these are in lockstep
    process.scale(3, force=True)
    assert board.dp_size == 3
    for wrong in (lambda: process.scale(5), lambda: process.drain(3), lambda: process.undrain(-1)):
        with pytest.raises(SettingError):
            wrong()
    process.proc.kill()
    process.proc.join()
    assert not process.is_healthy()
    for engine in engines:
        engine.close()
    process.close()


def test_it_has_every_method_of_the_threads():
    """Guards against a method that only one of the two has."""
    methods = {name for name, _ in inspect.getmembers(Coordinator, inspect.isfunction) if not name.startswith("_")}
    ours = {name for name, _ in inspect.getmembers(CoordinatorProcess, inspect.isfunction)}
    assert methods - ours == {"hand_over"}


def test_a_coordinator_that_ends_ends_the_wait(group, using):
    """Guards against a server that waits for ranks of a coordinator which is gone."""
    process = using(CoordinatorProcess(group=group, dp_size=1, ready_timeout_s=0.2))
    with pytest.raises(StartupTimeout, match=r"not ready in .* ranks without a row: \[0\]"):
        process.wait_ready()


def test_the_handle_is_what_a_monitor_wants(group):
    """Guards against a server that cannot watch its coordinator: it has to end when the coordinator does."""
    process = CoordinatorProcess(group=group, dp_size=1)
    proc = process.proc
    assert proc.is_alive()
    assert proc.exitcode is None
    assert (group in proc.name, str(proc.pid) in repr(proc)) == (True, True)
    proc.join(timeout=0.01)
    assert connection.wait([proc.sentinel], timeout=0.01) == []
    proc.terminate()
    assert ended(process)
    proc.join()
    assert (proc.is_alive(), proc.exitcode) == (False, 0)
    assert leftovers(group) == []
    process.close()


@pytest.mark.parametrize("how", ["close", "shutdown", "with", "dropped"])
def test_every_way_to_end_it(group, how):
    """Guards against a child or a board that stays behind, and a second end that raises."""
    process = CoordinatorProcess(group=group, dp_size=1)
    pid = process.proc.pid
    if how == "with":
        with process:
            pass
    elif how == "shutdown":
        process.shutdown(timeout=60.0)
    elif how == "close":
        process.close()
    if how == "dropped":
        del process
    else:
        process.close()
        process.shutdown(timeout=60.0)
        assert process.proc.exitcode == 0
    assert gone(pid)
    assert leftovers(group) == []


def test_a_child_that_does_not_end_is_killed(group):
    """Guards against a server whose shutdown hangs on a stopped coordinator."""
    process = CoordinatorProcess(group=group, dp_size=1)
    os.kill(process.proc.pid, signal.SIGSTOP)
    process.shutdown(timeout=0.2)
    assert process.proc.exitcode == -signal.SIGKILL
    assert leftovers(group) == []


def test_an_end_that_a_signal_handler_breaks_off_can_be_done_again(group):
    """A shutdown that a signal handler ends by an exception leaves a process that the next one ends."""

    def out(*_: object) -> None:
        raise InterruptedError

    def end() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        process.shutdown(math.inf)

    process = CoordinatorProcess(group=group, dp_size=1)
    os.kill(process.proc.pid, signal.SIGSTOP)
    before = signal.signal(signal.SIGALRM, out)
    try:
        with pytest.raises(InterruptedError):
            end()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.proc.is_alive()
    with pytest.raises(SettingError, match="timeout is nan"):
        process.shutdown(math.nan)
    process.shutdown(0)
    assert not process.proc.is_alive()
    assert leftovers(group) == []


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_what_a_killed_one_left_is_removed(group, using, used, detached):
    """The end of a handle removes the board of a process that was killed, unless an engine still serves on it."""
    process = CoordinatorProcess(group=group, dp_size=1, detached=detached)
    engine = using(Engine.attach(group, 0)) if used else None
    process.proc.kill()
    process.proc.join()
    process.close()
    if engine is not None:
        assert f"dpshm-{group}" in map(os.path.basename, leftovers(group))
        using(Coordinator(group=group, dp_size=1)).close()  # the next one takes the board over
        engine.close()
    assert leftovers(group) == []


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit"])
def test_it_ends_with_its_parent(group, using, how):
    """Guards against a coordinator that lives on when its server was killed, and a board that stays behind."""
    parent = using(Remote())
    parent.run("process = CoordinatorProcess(group=group, dp_size=1)", group=group)
    child = parent.eval("process.proc.pid")
    with Engine.attach(group, 0):
        if how == "exit":
            parent.begin("os._exit(0)")
        else:
            parent.signal(getattr(signal, how))
        wait_until(lambda: gone(child))
        assert leftovers(group) == []


def test_one_that_hands_over_outlives_its_parent_as_long_as_its_group(group, using):
    """Guards against requests that hang because the launcher was killed, and a coordinator that stays for ever."""
    parent = using(Remote())
    parent.run("process = CoordinatorProcess(group=group, dp_size=2, hands_over=True)", group=group)
    child = parent.eval("process.proc.pid")
    engine, board = Engine.attach(group, 0), using(Board.attach(group))
    parent.kill()
    for _ in range(8):  # its watch goes on for longer than it takes to notice that the parent is gone
        beat = int(board.coordinator_beat[0])
        wait_until(lambda beat=beat: int(board.coordinator_beat[0]) != beat)
    assert not gone(child)
    Engine.attach(group, 1).close()  # a living coordinator has marked it alive
    engine.close()
    wait_until(lambda: gone(child))
    assert leftovers(group) == []


def test_a_sigterm_leaves_a_board_that_is_in_use_only_to_one_that_hands_over(group, using):
    """Guards against a SIGTERM to the coordinator alone that takes the board from under the group."""
    for hands_over in (True, False):
        with CoordinatorProcess(group=group, dp_size=1, hands_over=hands_over) as process, Engine.attach(group, 0):
            os.kill(process.proc.pid, signal.SIGTERM)
            process.proc.join()
            assert process.proc.exitcode == 0
            assert (leftovers(group) != []) == hands_over
        sweep(group)


def test_it_ends_though_a_sibling_lives_on(group, using):
    """Guards against a coordinator that waits on a pipe, which other children of its parent hold open too."""
    parent = using(Remote())
    parent.run(
        """
process = CoordinatorProcess(group=group, dp_size=1)
if (sibling := os.fork()) == 0:
    signal.pause()
    os._exit(0)
""",
        group=group,
    )
    child, sibling = parent.eval("(process.proc.pid, sibling)")
    try:
        parent.kill()
        wait_until(lambda: gone(child))
        assert not gone(sibling)
        assert leftovers(group) == []
    finally:
        os.kill(sibling, signal.SIGKILL)


def test_a_terminal_interrupt_is_left_to_the_parent(group, using):
    """Guards against Ctrl-C, which goes to every process of the terminal, ending the coordinator first."""
    process = using(CoordinatorProcess(group=group, dp_size=1))
    os.kill(process.proc.pid, signal.SIGINT)
    with Engine.attach(group, 0) as engine:
        engine.receive(None)
        wait_until(lambda: engine.board.phase is Phase.RUNNING)
    assert process.proc.is_alive()


def test_errors_keep_their_type(group, using, monkeypatch):
    """Guards against an error in the child that shows as a mere exit status."""
    owner = using(CoordinatorProcess(group=group, dp_size=1))
    with pytest.raises(GroupInUse, match=f"pid {owner.proc.pid}"):
        CoordinatorProcess(group=group, dp_size=1)
    with pytest.raises(SettingError, match="dp_size is 0"):
        CoordinatorProcess(group=group, dp_size=0)
    with pytest.raises(SettingError, match="cannot name a group"):
        CoordinatorProcess(group="a/b", dp_size=1)
    monkeypatch.setenv("DPSHM_DIR", "/nowhere")
    with pytest.raises(SegmentError, match="/nowhere"):
        CoordinatorProcess(group=group, dp_size=1)


def test_the_start_has_a_deadline(group):
    """Guards against a launcher that waits for ever, and a child that comes up after it was given up."""
    with pytest.raises(StartupTimeout, match=r"pid \d+\) did not report its addresses within 0\.001 s") as caught:
        CoordinatorProcess(group=group, dp_size=1, start_timeout_s=0.001)
    pid = int(str(caught.value).split("pid ")[1].split(")")[0])
    assert gone(pid)
    assert leftovers(group) == []


def test_a_child_that_dies_before_it_reports(group, monkeypatch):
    """Guards against a wait for a child that is gone already."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StartupTimeout, match="exit status 1"):
        CoordinatorProcess(group=group, dp_size=1)


def test_a_python_that_does_not_exist(group, monkeypatch):
    """Guards against descriptors that a failed start leaves open."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = count_fds()
    with pytest.raises(FileNotFoundError):
        CoordinatorProcess(group=group, dp_size=1)
    assert count_fds() <= before


@pytest.mark.slow
def test_nothing_is_left_open(group):
    """Guards against descriptors, threads and processes that pile up over restarts."""

    def cycle():
        CoordinatorProcess(group=group, dp_size=1).close()
        with pytest.raises(StartupTimeout):
            CoordinatorProcess(group=group, dp_size=1, start_timeout_s=0.0)

    cycle()
    before, threads = count_fds(), count_threads()
    for _ in range(3):
        cycle()
    assert count_fds() <= before
    assert count_threads() <= threads


def test_a_parent_with_many_descriptors(group):
    """Guards against select(2), which fails from descriptor 1024 on; an API server has more than that."""
    low, high = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
    opened = [low, high]
    try:
        while opened[-1] < 1100:
            opened.append(os.dup(low))
    except OSError:
        pytest.skip("this user may not open as many")
    else:
        with CoordinatorProcess(group=group, dp_size=1) as process:
            assert process.proc.is_alive()
    finally:
        for fd in opened:
            os.close(fd)


def test_a_forked_copy_does_nothing(group, using):
    """Guards against a forked worker whose exit, or whose shutdown, ends its parent's coordinator."""
    parent = using(Remote())
    parent.run(
        """
process = CoordinatorProcess(group=group, dp_size=1)
if (child := os.fork()) == 0:
    import atexit
    signal.alarm(60)
    process.shutdown()
    del process
    atexit._run_exitfuncs()
    os._exit(0)
status = os.waitpid(child, 0)[1]
""",
        group=group,
    )
    assert parent.eval("status") == 0
    assert parent.eval("process.proc.is_alive()")
    parent.run(
        """
process.proc._popen._waitpid_lock.acquire()  # as if a thread of the parent were asking for the exit status
if (child := os.fork()) == 0:
    signal.alarm(60)
    process.shutdown(timeout=0.1)
    os._exit(0)
process.proc._popen._waitpid_lock.release()
status = os.waitpid(child, 0)[1]
time.sleep(0.2)
"""
    )
    assert parent.eval("process.proc.exitcode") is None
    parent.run("process.close()")
    assert leftovers(group) == []


def test_the_parents_folder_stands_in_for_nothing(group, tmp_path):
    """Guards against a child that imports whatever lies in the folder in which a server was started."""
    for name in ("msgspec.py", "zmq.py", "logging.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    code = f"""
import sys
sys.path[:] = [{str(ROOT)!r}] + [p for p in sys.path if p]
from dpshm import CoordinatorProcess
with CoordinatorProcess(group={group!r}, dp_size=1) as process:
    print(process.proc.is_alive())
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_child_is_light(group, using):
    """Guards against a child that imports the server again: the parent's main module is none of its business."""
    process = using(CoordinatorProcess(group=group, dp_size=1))
    maps = Path(f"/proc/{process.proc.pid}/maps").read_text(encoding="utf-8")
    assert "/zmq/backend/" in maps
    assert "_pytest" not in maps
    assert "rpds" not in maps
    command = Path(f"/proc/{process.proc.pid}/comm").read_text(encoding="utf-8").strip()
    assert command.startswith("dpshm-coord")


def test_an_interface_like_the_one_it_replaces():
    """Guards against a handle that a launcher written for vLLM's coordinator cannot use."""
    assert list(inspect.signature(CoordinatorProcess.shutdown).parameters) == ["self", "timeout"]
    for name in ("get_stats_publish_address", "get_engine_socket_addresses", "close"):
        assert list(inspect.signature(getattr(CoordinatorProcess, name)).parameters) == ["self"]


def test_a_remote_error_is_not_swallowed(using):
    """Guards against tests of this module that cannot fail: what is raised in a child process has to arrive."""
    with pytest.raises(RemoteError, match="SettingError"):
        using(Remote()).run("CoordinatorProcess(group='a', dp_size=-1)")


def test_a_detached_one_removes_the_board_when_its_starter_is_killed_with_its_children(group, using):
    """Guards against a board that stays: a server that ends kills its engines and all that they have started."""
    starter = using(Remote())
    starter.run("process = CoordinatorProcess(group=group, dp_size=1, detached=True)", group=group)
    pid = starter.eval("process.proc.pid")
    assert starter.eval("process.proc.is_alive()")
    assert starter.eval("process.engine_addresses")
    assert _children(starter.pid) == []
    assert _told_of(group) == [pid]
    assert Board.attach(group).coordinator_pid[0] == pid
    starter.kill()
    wait_until(lambda: gone(pid))
    assert leftovers(group) == []


@pytest.mark.parametrize("how", ["close", "kill"])
def test_a_detached_one_ends_when_it_is_asked(group, using, how):
    """Guards against a handle that cannot end what is not its child, or that leaves a zombie."""
    before = _children(os.getpid())
    process = CoordinatorProcess(group=group, dp_size=1, detached=True)
    pid = process.proc.pid
    if how == "kill":
        process.proc.kill()
        process.proc.join(60)
        assert process.proc.exitcode == 0
        sweep(group)
    process.close()
    assert not process.proc.is_alive()
    wait_until(lambda: gone(pid))
    assert set(_children(os.getpid())) <= set(before)  # what ended before may be reaped now


def test_a_detached_one_that_does_not_start_in_time_ends(group):
    """Guards against a coordinator that nobody has a handle of, and an error that is not told."""
    with pytest.raises(SettingError):
        CoordinatorProcess(group=group, dp_size=0, detached=True)
    with pytest.raises(StartupTimeout, match="did not report its addresses within"):
        CoordinatorProcess(group=group, dp_size=1, start_timeout_s=0.001, detached=True)
    wait_until(lambda: leftovers(group) == [] and not _told_of(group))


def _children(pid):
    """The children of a process, zombies too."""
    found = []
    for entry in _processes():
        with suppress(OSError):
            _state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == pid:
                found.append(int(entry.name))
    return found


def _told_of(group):
    """The processes whose command names a group, as a coordinator's does; one that has ended has no command."""
    found = []
    for entry in _processes():
        with suppress(OSError):
            if group.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _processes():
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
