"""Checks of one node: its shared memory, leftovers of dead groups, containers that do not share memory."""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dpshm.board import files, layout
from dpshm.board.files import FILE_PREFIX, SOCKETS_SUFFIX, directory, segment_path
from dpshm.board.header import group_in
from dpshm.board.sweep import sweep, sweep_lock_files
from dpshm.errors import SegmentError
from dpshm.ops.doctor.finding import Finding, some_of
from dpshm.ops.groups import Found

DOCKER_SHM_BYTES = 64 << 20
GROUP_INODES = 6
"""Files, folders and sockets that a coordinator makes."""


class Opened(NamedTuple):
    """A segment that a process is attached to.

    Attributes:
        group: the name in its header.
        folder: the folder where the process opened it, in the process's own mount namespace.
        device: the device number of its file system.
        linked: whether the file still has a name.
    """

    pid: int
    group: str
    folder: str
    device: int
    linked: bool


def check_directory() -> Iterator[Finding]:
    """The directory of segments."""
    if not os.path.exists("/proc/self/fd"):
        yield Finding(
            severity="error",
            check="proc",
            what="/proc is not mounted here",
            why="no coordinator can start here, and ages and processes cannot be seen",
            fix="mount -t proc proc /proc    (in a chroot or a container without it)",
        )
    path = directory()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        yield Finding(
            severity="error",
            check="directory",
            what=f"{path} is not a directory that uid {os.geteuid()} may write to",
            why="no board can be created here, and none can be found",
            fix=f"mount -t tmpfs -o mode=1777 tmpfs {path}    (or set DPSHM_DIR to a folder on a tmpfs)",
        )
        return
    kind = _filesystem(path)
    if kind not in ("tmpfs", "ramfs", "hugetlbfs", None):
        yield Finding(
            severity="warning",
            check="directory",
            what=f"{path} is on {kind}, not on a tmpfs",
            why="the kernel writes the board to a disk all the time, and stores may wait for it",
            fix="set DPSHM_DIR to a folder on a tmpfs, such as /dev/shm",
        )
    space = os.statvfs(path)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    needed = layout.make_layout(layout.DEFAULT_ENGINES, layout.DEFAULT_FRONTENDS).size
    if free < needed:
        yield Finding(
            severity="error",
            check="space",
            what=f"{path} has {free >> 10} KiB free of {total >> 10}, and a board needs {needed >> 10}",
            why="no coordinator can start, and other programs that use shared memory die with SIGBUS",
            fix=f"mount -o remount,size=1G {path}    (containers: --shm-size=1g, or an emptyDir of medium Memory)",
        )
    elif space.f_files and space.f_favail < GROUP_INODES:
        yield Finding(
            severity="error",
            check="space",
            what=f"{path} has {space.f_favail or 'no'} inode{'s' * (space.f_favail > 1)} left of {space.f_files}",
            why=f"each file and socket needs one: a coordinator {GROUP_INODES}, an engine or front-end one more",
            fix=f"remove files in {path}, or mount -o remount,nr_inodes=1M {path}",
        )
    elif kind == "tmpfs" and total <= DOCKER_SHM_BYTES:
        yield Finding(
            severity="warning",
            check="space",
            what=f"{path} has {total >> 20 or '<1'} MiB in all: a container's default",
            why="enough for dpshm, but NCCL and PyTorch put their buffers there as well and fail",
            fix="docker run --shm-size=16g    (Kubernetes: an emptyDir of medium Memory, mounted there)",
        )


def check_leftovers(found: list[Found]) -> Iterator[Finding]:
    """Finds segments and socket folders that no process uses, and segments that cannot be read."""
    dead: defaultdict[int | None, list[str]] = defaultdict(list)
    for group in found:
        if group.state == "dead":
            dead[files.owner_of(segment_path(group.group))].append(group.group)
    for owner, groups in dead.items():
        foreign = owner not in (None, os.geteuid())
        yield Finding(
            severity="warning",
            check="leftover",
            group=groups[0] if len(groups) == 1 else None,
            what=f"segments in {directory()} remain of groups"
            + (f" of uid {owner}" if foreign else "")
            + f" that no process uses: {some_of(groups)}",
            why="they take memory until the next start of a coordinator of that user removes them",
            fix=f"as uid {owner}: dpshm doctor --sweep" if foreign else "dpshm doctor --sweep",
        )
    for group in found:
        if group.state == "unreadable":
            yield Finding(
                severity="error",
                check="unreadable",
                group=group.group,
                what=group.detail,
                why="nothing can attach to it; if its processes still run, they run unseen",
                fix=f"fuser {segment_path(group.group)}    (no output: rm it; else use one dpshm version for all)",
            )
    for folder in files.stray_sockets_folders():
        owner = folder.stat().st_uid
        if owner != os.geteuid():
            yield Finding(
                severity="warning",
                check="leftover",
                group=_group_of(folder),
                what=f"the socket folder {folder} of uid {owner} is there and its segment is not",
                why="no other user can start a group of that name; that user's group may still live",
                fix=f"as uid {owner}: dpshm doctor --sweep    (or use another group name)",
            )
            continue
        yield Finding(
            severity="warning",
            check="leftover",
            group=_group_of(folder),
            what=f"the socket folder {folder} is there and its segment is not",
            why="left by a dead group, or the segment was unlinked under a live one",
            fix="dpshm doctor --sweep    (leaves it if a coordinator still listens)",
        )


def sweep_leftovers(found: list[Found]) -> list[str]:
    """Removes the leftovers that `check_leftovers` finds, if no process uses them; returns what was removed."""
    removed = []
    for group in found:
        if group.state == "dead":
            with suppress(SegmentError):
                if sweep(group.group):
                    removed.append(str(segment_path(group.group)))
    for folder in files.stray_sockets_folders():
        files.remove_sockets_folder(folder)  # not if a coordinator holds it
        if not folder.exists():
            removed.append(str(folder))
    removed += map(str, sweep_lock_files())
    return removed


def check_processes() -> Iterator[Finding]:
    """Finds processes whose segment has lost its name, and processes with another tmpfs at the same path."""
    unlinked: dict[str, list[int]] = defaultdict(list)
    elsewhere: dict[str, list[Opened]] = defaultdict(list)
    with suppress(OSError):
        device, here = directory().stat().st_dev, os.path.realpath(directory())
        for opened in opened_segments():
            if opened.folder == here and opened.device != device:
                elsewhere[opened.group].append(opened)
            elif opened.folder == here and not opened.linked:
                unlinked[opened.group].append(opened.pid)
    for group, pids in unlinked.items():
        yield Finding(
            severity="error",
            check="unlinked",
            group=group,
            what=f"the segment was unlinked, and in use by {_pids(pids)}",
            why="routing among them goes on, but no process can attach or restart, and no tool sees them",
            fix="restart the group; find what cleans the folder: systemd's RemoveIPC, tmpfiles.d, a clean-up job",
        )
    for group, theirs in elsewhere.items():
        pids = [opened.pid for opened in theirs]
        if segment_path(group).exists() or len({opened.device for opened in theirs}) > 1:
            yield Finding(
                severity="warning",
                check="other tmpfs",
                group=group,
                what=f"a group of that name is in another {directory()} than this one, too: {_pids(pids)}",
                why="a container has a /dev/shm of its own: processes that do not share it form other groups",
                fix="docker run --ipc=host, or --ipc=container:NAME for the whole group; Kubernetes: one emptyDir",
            )
        else:
            yield Finding(
                severity="note",
                check="other tmpfs",
                group=group,
                what=f"the group is in another {directory()} than this one: {_pids(pids)}",
                why="a container has a /dev/shm of its own, and no more than that is seen of it from here",
                fix=f"nsenter -t {pids[0]} -m dpshm doctor    (nothing is wrong, unless some of it runs here)",
            )


def opened_segments() -> list[Opened]:
    """Every segment that a visible process is attached to. Root sees all processes, other users their own."""
    found: set[Opened] = set()
    for process in os.scandir("/proc"):
        if process.name.isdecimal():
            with suppress(OSError):
                ours = [link.path for link in os.scandir(f"/proc/{process.name}/fd") if _may_be_ours(link.path)]
                # Without a lock it has only mapped the segment: a reader, or a handle that was closed.
                if any("\nlock:" in _fdinfo(link) for link in ours):
                    opened = (_opened(int(process.name), link) for link in ours)
                    found.update(segment for segment in opened if segment is not None)
    return sorted(found)


def _may_be_ours(link: str) -> bool:
    # What a creator made without a name is listed so even since it has one.
    return Path(os.readlink(link)).name.startswith((FILE_PREFIX, "#"))


def _fdinfo(link: str) -> str:
    return Path(link.replace("/fd/", "/fdinfo/")).read_text(encoding="ascii")


def _opened(pid: int, link: str) -> Opened | None:
    """The segment behind a descriptor that may write to it; None for other files and for readers."""
    flags = re.search(r"(?m)^flags:\s*([0-7]+)$", _fdinfo(link))
    if flags is None or int(flags[1], 8) & os.O_ACCMODE != os.O_RDWR:
        return None
    target = Path(os.readlink(link).removesuffix(" (deleted)"))
    fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        group = group_in(os.pread(fd, layout.PAGE_BYTES, 0)) if stat.S_ISREG(info.st_mode) else None
    finally:
        os.close(fd)
    return Opened(pid, group, str(target.parent), info.st_dev, info.st_nlink > 0) if group else None


def check_logind() -> Iterator[Finding]:
    """Whether logging out unlinks this user's shared memory: systemd's default for ordinary users."""
    uid = os.geteuid()
    if (
        uid < 1000
        or not Path("/run/systemd/system").is_dir()
        or Path("/var/lib/systemd/linger", _user(uid)).exists()
    ):
        return
    settings = [Path("/etc/systemd/logind.conf"), *Path("/etc/systemd/logind.conf.d").glob("*.conf")]
    for path in settings:
        with suppress(OSError):
            if re.search(r"(?mi)^\s*RemoveIPC\s*=\s*(no|false|0|off)\s*$", path.read_text(encoding="utf-8")):
                return
    yield Finding(
        severity="warning",
        check="RemoveIPC",
        what=f"systemd unlinks what uid {uid} has in /dev/shm when its last session ends",
        why="a group that was started from a login goes on, but no process can attach to it any more",
        fix=f"loginctl enable-linger {_user(uid)}    (or RemoveIPC=no in /etc/systemd/logind.conf)",
    )


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _filesystem(path: Path) -> str | None:
    """The type of the file system that a directory is on; None if /proc does not tell."""
    best, kind = "", None
    with suppress(OSError, ValueError, IndexError):
        real = os.path.realpath(path)
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            at = fields.split()[4]
            inside = real == at or real.startswith(at.rstrip("/") + "/")
            if inside and len(at) >= len(best):
                best, kind = at, rest.split()[0]
    return kind


def _group_of(folder: Path) -> str:
    return folder.name.removeprefix(FILE_PREFIX).removesuffix(SOCKETS_SUFFIX)


def _pids(pids: list[int]) -> str:
    return ("process " if len(pids) == 1 else "processes ") + ", ".join(map(str, sorted(pids)))
