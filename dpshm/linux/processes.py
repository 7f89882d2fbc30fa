"""Facts that the kernel knows about processes (start, end, namespaces, pidfds), and a process's name and signals.

A pid alone does not name a process for long; a pid and the start time (in clock ticks since boot, field 22 of
``/proc/PID/stat``, see proc(5)) do, within one pid namespace. A pidfd (pidfd_open(2)) becomes readable
when its process ends, also if this process is not the parent.

The kernel ends a process in this order: it writes a core dump, if one is wanted, for which the other threads
wait; each thread gets the flag ``PF_EXITING``; the last thread frees the memory; files are closed, which drops the
locks; the process is gone. With gigabytes of memory, seconds lie between the first and the last. A thread that is
not the last one ends early, and a pidfd of that thread (``PIDFD_THREAD``, Linux 6.9 and later) tells of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from contextlib import suppress
from enum import Enum
from hashlib import blake2s
from pathlib import Path

PR_SET_NAME = 15  # prctl(2)
COMM_BYTES = 15
PF_EXITING = 0x4  # include/linux/sched.h
PF_POSTCOREDUMP = 0x8
PF_DUMPCORE = 0x200
_ENDS = PF_EXITING | PF_POSTCOREDUMP | PF_DUMPCORE
"""A thread with one of these runs no code of its program any more: it exits, or a core dump is written first."""
PIDFD_THREAD = os.O_EXCL  # pidfd_open(2)


class Life(Enum):
    """Where a process is between its start and its end."""

    LIVES = "lives"
    EXITS = "exits"
    """The kernel ends each of its threads: none of them runs code of the program any more."""
    GONE = "gone"
    """There is none of that pid and start time: it has ended, or /proc is that of another pid namespace."""
    UNKNOWN = "unknown"
    """/proc cannot be read: this process may have no descriptor left."""


def start_time(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0 if it is gone or cannot be seen."""
    try:
        return _flags_and_start(f"/proc/{pid}/stat")[1]
    except OSError:
        return 0


def life_of(pid: int, started: int) -> Life:
    """Whether the process with that pid and start time lives. At its end each of its threads is looked at.

    A process whose first thread has ended alone, while others run, lives.
    """
    try:
        flags, start = _flags_and_start(f"/proc/{pid}/stat")  # the flags are the first thread's
        if start != started or not start:
            return Life.GONE
        if not flags & _ENDS:
            return Life.LIVES
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                if not _flags_and_start(f"/proc/{pid}/task/{thread}/stat")[0] & _ENDS:
                    return Life.LIVES
    except (FileNotFoundError, ProcessLookupError):
        return Life.GONE
    except OSError:
        return Life.UNKNOWN
    return Life.EXITS


def _flags_and_start(path: str) -> tuple[int, int]:
    """A thread's flags and start time, from its ``stat``; zeros if that is not what the kernel writes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stat = os.read(fd, 4096)
    finally:
        os.close(fd)
    try:
        # The second field is the command in parentheses and may hold anything, also ")".
        fields = stat[stat.rindex(b")") + 2 :].split(maxsplit=20)
        return int(fields[6]), int(fields[19])
    except (ValueError, IndexError):
        return 0, 0


def namespace_inode(kind: str) -> int:
    """The inode that names this process's namespace of a kind ("pid", "time"); 0 if unknown."""
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


def boot_id() -> str:
    """This boot of the machine, as the kernel names it; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def tag(pid: int) -> str:
    """A short name of a process that no other process shares: its pid, and six digits of what tells it apart.

    The first process of every container has pid 1. What differs is the pid namespace, when the process started,
    and as a rule the host's name. The same process always gets the same tag.
    """
    try:
        namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        namespace = 0
    facts = f"{boot_id()} {socket.gethostname()} {namespace} {start_time(pid)}"
    return f"{pid}-{blake2s(facts.encode(), digest_size=3).hexdigest()}"


def open_pidfd(pid: int, started: int, *, thread: bool = False) -> int | None:
    """A pidfd of the process with that pid and start time; None if there is no such process any more.

    Args:
        pid: the process.
        started: its start time.
        thread: a pidfd of one of its threads, where there is one and the kernel can give it (Linux 6.9). It is
            readable when that thread ends, for a process that is killed as a rule long before all of it has ended.
    """
    if pid <= 0 or started <= 0:
        return None
    fd = _thread_pidfd(pid) if thread else None
    try:
        fd = os.pidfd_open(pid) if fd is None else fd
    except (OSError, OverflowError):
        return None
    # Checked after the open: from here on the pidfd cannot come to mean another process.
    if start_time(pid) != started:
        os.close(fd)
        return None
    return fd


def _thread_pidfd(pid: int) -> int | None:
    """A pidfd of the oldest thread of a process but the first, whose pidfd would wait for all threads."""
    try:
        thread = min(int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid)
        fd = os.pidfd_open(thread, PIDFD_THREAD)
    except (OSError, ValueError, OverflowError):
        return None
    if os.path.exists(f"/proc/{pid}/task/{thread}"):
        return fd
    os.close(fd)
    return None


def parent_pidfd(parent_pid: int) -> int:
    """A descriptor that is readable once the parent is gone, readable at once if it already is.

    Args:
        parent_pid: what the parent said its pid is; a child that was re-parented meanwhile sees another.
    """
    try:
        fd = os.pidfd_open(parent_pid)
    except OSError:
        fd = -1
    if fd >= 0 and os.getppid() == parent_pid:
        return fd
    if fd >= 0:
        os.close(fd)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    os.close(write_end)
    return read_end


def set_title(title: str) -> None:
    """Names this process for ``ps`` and ``top``: its first 15 bytes, or all where setproctitle is installed."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        name = ctypes.create_string_buffer(title.encode()[:COMM_BYTES])
        ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)
    else:
        setproctitle(title)


def ignore_interrupts() -> None:
    """Leaves Ctrl-C to the parent, which ends its children in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
