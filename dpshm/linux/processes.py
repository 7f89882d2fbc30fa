"""Facts that the kernel knows about processes (start time, namespaces, pidfds), and a process's name and signals.

A pid alone does not name a process for long; a pid and the start time (in clock ticks since boot, field 22 of
``/proc/PID/stat``, see proc(5)) do, within one pid namespace. A pidfd (pidfd_open(2)) becomes readable
when its process ends, also if this process is not the parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from hashlib import blake2s
from pathlib import Path

PR_SET_NAME = 15  # prctl(2)
COMM_BYTES = 15


def start_time(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0 if it is gone or cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        # The second field is the command in parentheses and may hold anything, also ")".
        return int(stat[stat.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


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


def open_pidfd(pid: int, started: int) -> int | None:
    """A pidfd of the process with that pid and start time; None if there is no such process any more."""
    if pid <= 0 or started <= 0:
        return None
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return None
    # Checked after the open: from here on the pidfd cannot come to mean another process.
    if start_time(pid) != started:
        os.close(fd)
        return None
    return fd


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
