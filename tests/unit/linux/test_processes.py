"""What the kernel says about processes; every process here is a real one."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dpshm
from dpshm.linux import processes
from dpshm.linux.processes import Life
from tests.support import count_fds

PACKAGE_ROOT = Path(dpshm.__file__).parents[1]
TIMEOUT_S = 60


@contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code` and has said one line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


IDLE = "print('ready', flush=True); input()"


def readable(fd: int, timeout_s: float) -> bool:
    """Whether a descriptor becomes readable."""
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_start_time_tells_a_process_from_its_successor():
    """Guards against a field off by one: the value must be the process's, and grow with later processes."""
    with child(IDLE) as first, child(IDLE) as second:
        assert 0 < processes.start_time(first.pid) <= processes.start_time(second.pid)
        assert processes.start_time(os.getpid()) <= processes.start_time(first.pid)
        pid = first.pid
    assert processes.start_time(pid) == 0  # gone and reaped


@pytest.mark.parametrize("name", ["a) R 1 2", ") ) )", "(((", "x y z"])
def test_start_time_of_a_process_with_an_awkward_name(name: str):
    """Guards against splitting /proc/PID/stat at the wrong parenthesis."""
    code = f"from dpshm.linux import processes; processes.set_title({name!r}); {IDLE}"
    with child(IDLE) as before, child(code) as renamed, child(IDLE) as after:
        assert Path(f"/proc/{renamed.pid}/comm").read_text().rstrip("\n") == name[:15]
        assert (
            processes.start_time(before.pid)
            <= processes.start_time(renamed.pid)
            <= processes.start_time(after.pid)
        )


def test_set_title_cuts_in_the_middle_of_a_character():
    """Guards against an exception, or a title that runs over, for names that are not ASCII."""
    with child(f"from dpshm.linux import processes; processes.set_title('dpshm-' + 'é' * 20); {IDLE}") as renamed:
        comm = Path(f"/proc/{renamed.pid}/comm").read_bytes().rstrip(b"\n")
    assert comm.startswith("dpshm-é".encode())
    assert len(comm) <= processes.COMM_BYTES


def test_the_life_of_a_process():
    """Guards against an end that is seen too late, or in a process that lives, or in another of the same pid."""
    with child(IDLE) as process:
        pid, started = process.pid, processes.start_time(process.pid)
        assert processes.life_of(pid, started) is Life.LIVES
        assert processes.life_of(pid, started + 1) is Life.GONE
        process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
        assert processes.life_of(pid, started) is Life.EXITS
        assert processes.life_of(pid, started + 1) is Life.GONE
    assert processes.life_of(pid, started) is Life.GONE
    assert [processes.life_of(bad, 1) for bad in (0, -1, 1 << 40, -(1 << 63))] == [Life.GONE] * 4
    assert processes.life_of(pid, 0) is Life.GONE


FIRST_THREAD_ENDS = """
import ctypes, os, threading, time
def work():
    while open(f"/proc/{os.getpid()}/stat").read().rsplit(")")[1].split()[0] != "Z":
        time.sleep(0.001)
    print("ready", flush=True)
    time.sleep(60)
threading.Thread(target=work).start()
ctypes.CDLL(None)["pthread_exit"](None)
"""


def test_a_process_whose_first_thread_ended_lives():
    """Guards against a process that is called dead because its first thread alone has ended."""
    with child(FIRST_THREAD_ENDS) as process:
        started = processes.start_time(process.pid)
        assert processes.life_of(process.pid, started) is Life.LIVES
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.life_of(process.pid, started) is Life.EXITS


CRASHES = """
import mmap, os, resource, signal, threading
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
memory = mmap.mmap(-1, 64 << 20)
memory.write(os.urandom(1 << 20) * 64)
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
input()
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_process_of_which_a_core_dump_is_written_does_not_live(tmp_path, monkeypatch):
    """Guards against a crashed engine that is routed to for as long as its memory is written to a disk.

    On a busy machine the dump may be written before this test looks, so several are tried.
    """
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(20):
        with child(CRASHES) as process:
            started = processes.start_time(process.pid)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            while (life := processes.life_of(process.pid, started)) is not Life.GONE:
                exits = processes._flags_and_start(f"/proc/{process.pid}/stat")[0] & processes.PF_EXITING
                seen.add((life, bool(exits)))
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    break
            status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if status is None or status.si_code != os.CLD_DUMPED:
            pytest.skip("this machine writes no core dumps")
        if (Life.EXITS, False) in seen:  # ended, and it does not exit yet
            return
    raise AssertionError(f"never seen while its core dump was written: {seen}")


def test_a_process_that_cannot_read_calls_no_other_dead():
    """Guards against an observer without a descriptor left, for which all others are dead."""
    code = (
        "import os, resource; from dpshm.linux import processes; pid = os.getppid(); "
        "started = processes.start_time(pid); resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "
        "life = processes.life_of(pid, started); os.write(1, b'ready\\n' + life.name.encode() + b'\\n'); input()"
    )
    with child(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "UNKNOWN\n"


TWO_THREADS = f"import threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); {IDLE}"


@pytest.mark.parametrize("code", [IDLE, TWO_THREADS], ids=["one thread", "two threads"])
def test_a_pidfd_of_a_thread_tells_of_the_processs_end(code):
    """Guards against a process of one thread without a pidfd, and against one that never tells."""
    with child(code) as process:
        started = processes.start_time(process.pid)
        before = count_fds()
        fd = processes.open_pidfd(process.pid, started, thread=True)
        assert fd is not None
        assert not readable(fd, 0)
        process.kill()
        assert readable(fd, TIMEOUT_S)
        os.close(fd)
        assert count_fds() <= before


def test_a_pidfd_of_a_thread_tells_of_that_thread():
    """Guards against waiting for the last thread, which frees the memory first."""
    code = (
        "import threading; go = threading.Event(); threading.Thread(target=go.wait, daemon=True).start(); "
        "print('ready', flush=True); input(); go.set(); input()"
    )
    with child(code) as process:
        fd = processes.open_pidfd(process.pid, processes.start_time(process.pid), thread=True)
        assert fd is not None
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
        if f"Pid:\t{process.pid}\n" in info:
            pytest.skip("this kernel has no pidfds of threads (Linux 6.9)")
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert readable(fd, TIMEOUT_S)
        assert processes.life_of(process.pid, processes.start_time(process.pid)) is Life.LIVES
        os.close(fd)


def test_a_pidfd_is_readable_once_its_process_is_gone():
    """Guards against a descriptor of the wrong process, or one that never tells."""
    with child(IDLE) as process:
        fd = processes.open_pidfd(process.pid, processes.start_time(process.pid))
        assert fd is not None
        assert not os.get_inheritable(fd)
        assert not readable(fd, 0)
        process.kill()
        assert readable(fd, TIMEOUT_S)
        os.close(fd)


def test_no_pidfd_for_another_process_of_the_same_pid():
    """Guards against watching another process that got a dead one's pid."""
    with child(IDLE) as process:
        assert processes.open_pidfd(process.pid, processes.start_time(process.pid) + 1) is None
        pid, started = process.pid, processes.start_time(process.pid)
    before = count_fds()
    assert processes.open_pidfd(pid, started) is None  # gone
    assert [processes.open_pidfd(bad, 1) for bad in (0, -1, 1 << 22, 1 << 40, -(1 << 63))] == [None] * 5
    assert count_fds() <= before


def test_a_childs_descriptor_tells_of_its_parents_end():
    """Guards against a daemon that outlives a server which was killed."""
    grandchild = (
        "import os, select, sys; from dpshm.linux import processes; "
        "fd = processes.parent_pidfd(int(sys.argv[1])); "
        "print('ready', flush=True); select.select([fd], [], []); print('gone', flush=True)"
    )
    middle = (
        "import os, subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]); time.sleep(600)"
    )
    with child(middle, grandchild) as process:
        assert not readable(process.stdout.fileno(), 0.05)
        process.kill()
        assert process.stdout.readline() == "gone\n"


def test_a_parent_that_is_gone_already_is_told_at_once():
    """Guards against a child that was re-parented before it looked, and then waits for ever."""
    with child(IDLE) as gone:
        pid = gone.pid
    for not_our_parent in (os.getpid(), pid):
        fd = processes.parent_pidfd(not_our_parent)
        assert readable(fd, 0)
        os.close(fd)
    fd = processes.parent_pidfd(os.getppid())
    assert not readable(fd, 0)
    os.close(fd)


def test_namespaces_and_boot_have_names():
    """Guards against comparing 0 with 0, which would make two unknown namespaces the same."""
    assert processes.namespace_inode("pid") == os.stat("/proc/self/ns/pid").st_ino > 0
    assert processes.namespace_inode("no such kind") == 0
    assert processes.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip() != ""


def test_a_tag_is_of_one_process():
    """Guards against two names for one process, and one name for two: each container's first process has pid 1."""
    own = processes.tag(os.getpid())
    assert own == processes.tag(os.getpid())
    assert re.fullmatch(rf"{os.getpid()}-[0-9a-f]{{6}}", own)
    with child(IDLE) as process:
        assert processes.tag(process.pid).partition("-")[2] != own.partition("-")[2]


def test_first_processes_of_two_pid_namespaces_have_two_tags():
    """Guards against two containers that share /dev/shm and give their groups the same name."""
    code = "import os; from dpshm.linux import processes; print(os.getpid(), processes.tag(os.getpid()))"
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    done = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        for _ in range(2)
    ]
    if any(one.returncode for one in done):
        pytest.skip(f"pid namespaces cannot be made here: {done[0].stderr.strip()}")
    (pid_1, tag_1), (pid_2, tag_2) = (one.stdout.split() for one in done)
    assert pid_1 == pid_2 == "1"
    assert tag_1 != tag_2
