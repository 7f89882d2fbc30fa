"""The files of a group: the segment ``dpshm-GROUP`` and, beside it, the folder of its ipc sockets.

Both lie in one directory on a tmpfs: ``DPSHM_DIR``, or ``/dev/shm``. The segment's file is filled without a name
and linked into place as the last act, so no process ever finds half a segment. `dpshm.board.lock_file`
is about the third file beside them.

The sockets' folder has mode 0700, and the coordinator whose sockets are in it holds a lock of its own on it
(flock(2)). A second bind on an ipc path silently replaces the first. The lock on the segment cannot prevent that:
if the segment's file is unlinked under a living group, the next coordinator creates another file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from dpshm.errors import GroupInUse, SegmentError, SegmentInvalid, SegmentNoSpace, SettingError
from dpshm.linux.forks import PrivateFd

FILE_PREFIX = "dpshm-"
SOCKETS_SUFFIX = ".sockets"
LOCKS_SUFFIX = ".locks"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
SOCKET_NAMES = ("frontends", "to-engines", "from-engines")
"""The ipc sockets in the folder."""
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,47}")
OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a FIFO must not wait


def directory() -> Path:
    """Where segments live: ``DPSHM_DIR``, else ``/dev/shm``."""
    return Path(os.environ.get("DPSHM_DIR") or "/dev/shm")


def segment_path(group: str) -> Path:
    """The file of a group's segment.

    Raises:
        SettingError: the name cannot name a group.
    """
    if not names_group(group):
        raise SettingError(
            f"{group!r} cannot name a group: use 1 to 48 letters, digits, '.', '_' or '-', "
            f"the first a letter, digit or '_', and do not end in {SOCKETS_SUFFIX!r} or {LOCKS_SUFFIX!r}"
        )
    return directory() / (FILE_PREFIX + group)


def names_group(name: str) -> bool:
    """Whether a group may have this name."""
    text = isinstance(name, str)  # a caller may give anything
    return text and bool(_GROUP_NAME.fullmatch(name)) and not name.endswith((SOCKETS_SUFFIX, LOCKS_SUFFIX))


def sockets_path(group: str) -> Path:
    """The folder of a group's ipc sockets."""
    return sockets_beside(segment_path(group))


def sockets_beside(path: Path) -> Path:
    """The folder of ipc sockets that belongs to a segment's file."""
    return path.with_name(path.name + SOCKETS_SUFFIX)


def groups() -> list[str]:
    """The names of the groups whose segment files are on this node, alive or not, sorted."""
    names = []
    with suppress(OSError):
        for entry in os.scandir(directory()):
            name = entry.name.removeprefix(FILE_PREFIX)
            if name == entry.name or not names_group(name):
                continue
            if entry.is_file(follow_symlinks=False):
                names.append(name)
    return sorted(names)


def stray_sockets_folders() -> list[Path]:
    """The sockets' folders without their segment. A coordinator that is starting has one, and holds its lock."""
    folders = directory().glob(f"{FILE_PREFIX}*{SOCKETS_SUFFIX}")
    segments = {folder: folder.with_name(folder.name.removesuffix(SOCKETS_SUFFIX)) for folder in folders}
    # Any user may make a folder here: a name that names no group may hold what a terminal obeys.
    ours = (folder for folder, path in segments.items() if names_group(path.name.removeprefix(FILE_PREFIX)))
    return sorted(folder for folder in ours if folder.is_dir() and not segments[folder].exists())


# The segment's file.


def open_segment(path: Path, *, readonly: bool) -> int:
    """A descriptor of a segment's file.

    Raises:
        FileNotFoundError: there is none.
        SegmentInvalid: it is a symbolic link.
        SegmentError: it may not be opened.
    """
    try:
        return os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | OPEN_FLAGS)
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise SegmentInvalid(f"{path} is a symbolic link; dpshm does not follow it. Remove it") from None
        owner = owner_of(path)
        if e.errno == errno.EACCES and owner not in (None, os.geteuid()):
            raise SegmentError(
                f"cannot open {path}: {e.strerror}. It belongs to uid {owner}: look as that user or as root, or "
                "start its coordinator with --mode 0640 --file-group NAME"
            ) from e
        raise SegmentError(f"cannot open {path}: {e.strerror}") from e


def owner_of(path: Path) -> int | None:
    """The user to whom a file belongs; None if it is gone."""
    try:
        return path.stat(follow_symlinks=False).st_uid
    except OSError:
        return None


def check_owner(path: Path, fd: int, *, any_owner: bool = False) -> None:
    """Checks that a file is a regular one that only this user can change.

    Args:
        path: the file, for the error's text.
        fd: a descriptor of it.
        any_owner: another user's file will do, for a tool that was told to read it.

    Raises:
        SegmentInvalid: it is not.
    """
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise SegmentInvalid(f"{path} is not a regular file; remove it")
    if any_owner:
        return
    if info.st_mode & 0o022:
        raise SegmentInvalid(
            f"{path} may be written by others ({stat.filemode(info.st_mode)}): end its group, remove it"
        )
    if info.st_uid != os.geteuid():
        raise SegmentInvalid(
            f"{path} belongs to uid {info.st_uid} and this process is uid {os.geteuid()}: "
            "run as that user, or use another group name"
        )


def open_directory(path: Path) -> int:
    """A descriptor of the directory in which segments live.

    Raises:
        SegmentError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise SegmentError(
            f"cannot use {path} for shared memory: {e.strerror}. Set DPSHM_DIR to a folder on a tmpfs"
        ) from e


def reserve(folder: int, name: Path, size: int, what: str) -> int:
    """A descriptor of a new file without a name, every page of it reserved.

    Args:
        folder: a descriptor of the directory.
        name: the directory's path, for the error's text.
        size: bytes.
        what: it is, for the error's text.

    Raises:
        SegmentNoSpace: the file system is full or too small.
        SegmentError: the file cannot be made.
    """
    fd = -1
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
        # With ftruncate alone a tmpfs that fills up would kill a writer with SIGBUS later.
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        if e.errno in NO_SPACE:
            raise SegmentNoSpace(why_no_space(name, what, size)) from e
        raise SegmentError(f"cannot create a segment in {name}: {e.strerror}") from e
    return fd


def link(folder: int, fd: int, name: str) -> None:
    """Gives a file without a name one. Raises FileExistsError if there is a file of that name.

    Raises:
        SegmentError: /proc is not mounted, as in a bare chroot.
    """
    try:
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    except FileNotFoundError as e:
        if os.path.exists("/proc/self/fd"):
            raise
        raise SegmentError(f"cannot make {name}: /proc is not mounted here. mount -t proc proc /proc") from e


def why_no_space(folder: Path, what: str, size: int = mmap.PAGESIZE) -> str:
    """What a file system has too little of, for an error: inodes (one for each file, folder and socket), or bytes.

    Args:
        folder: a folder on it.
        what: has no room.
        size: bytes that it needs.
    """
    free = os.statvfs(folder)
    if free.f_files and not free.f_favail:
        return (
            f"{folder} has no inode left of {free.f_files}, and a group needs one for each file and socket: "
            "remove files there, allow more (mount -o remount,nr_inodes=N), or set DPSHM_DIR to another tmpfs"
        )
    return (
        f"{folder} has {free.f_bavail * free.f_frsize // 1024} KiB free and {what} needs {size // 1024} KiB: "
        "free some, enlarge it (containers: --shm-size, or an emptyDir of medium Memory), lower the "
        "capacities, or set DPSHM_DIR to another tmpfs"
    )


def set_access(path: Path, fd: int, mode: int, gid: int) -> None:
    """Sets a board's group and permissions: before it has a name, or at a takeover. A gid of -1 leaves its group.

    Raises:
        SegmentError: the process may not.
    """
    try:
        if gid >= 0:
            os.fchown(fd, -1, gid)  # first: chown may clear mode bits
        os.fchmod(fd, mode)  # fchmod ignores the umask
    except OSError as e:
        raise SegmentError(
            f"cannot give {path} mode 0o{mode:o} and gid {gid}: {e.strerror}. Only root, or a member of "
            "that group, may give a file to a group"
        ) from e


# The folder of the ipc sockets.


def lock_sockets_folder(folder: Path) -> PrivateFd | None:
    """Makes the folder if it is missing, and locks it.

    Returns:
        A descriptor that holds the lock, and which forked children close; None if another process holds it.

    Raises:
        SegmentNoSpace: the file system has no inode left.
        SegmentError: the folder cannot be made.
        GroupInUse: it is another user's.
        SettingError: something else is in its place, or others may enter it.
    """
    while True:
        made = False
        try:
            folder.mkdir(mode=0o700)
            made = True
        except FileExistsError:
            pass
        except OSError as e:
            if e.errno in NO_SPACE:
                raise SegmentNoSpace(why_no_space(folder.parent, "a folder")) from e
            raise SegmentError(
                f"cannot make {folder}: {e.strerror}. Set DPSHM_DIR to a folder on a tmpfs that you may write to"
            ) from e
        try:
            _check_sockets_folder(folder)
            fd = _try_flock(folder)
        except FileNotFoundError:
            continue  # its last holder removed it just now
        except OSError:  # no descriptor left
            if made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        if fd is None or os.fstat(fd.fd).st_nlink:
            return fd
        fd.close()  # it was removed before it was locked


def remove_sockets_folder(folder: Path) -> None:
    """Removes the folder of a dead group. Does nothing to a folder that a coordinator holds."""
    with suppress(OSError):
        fd = _try_flock(folder)
        if fd is not None:
            clear_sockets_folder(folder)
            fd.close()


def clear_sockets_folder(folder: Path) -> None:
    """Removes a folder, whose lock the caller holds, with all that is in it."""
    for name in SOCKET_NAMES:  # by name: a process without a descriptor left cannot list a folder
        with suppress(OSError):
            (folder / name).unlink()
    try:
        folder.rmdir()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def _check_sockets_folder(folder: Path) -> None:
    info = folder.lstat()
    if info.st_uid != os.geteuid():
        raise GroupInUse(
            f"{folder} belongs to uid {info.st_uid} and this process is uid {os.geteuid()}: that user may have a "
            "live group of this name. Use another group name; if the group is dead, that user removes it with "
            "dpshm doctor --sweep"
        )
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise SettingError(
            f"{folder} is not a folder that only uid {os.geteuid()} can enter "
            f"(mode {stat.filemode(info.st_mode)}, uid {info.st_uid}): remove it"
        )


def _try_flock(folder: Path) -> PrivateFd | None:
    fd = PrivateFd(lambda: os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        fcntl.flock(fd.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fd.close()
        return None
    return fd
