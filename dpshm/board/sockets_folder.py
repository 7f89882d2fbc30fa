"""The folder of a group's ipc sockets: 0700, and locked by the coordinator whose sockets are in it.

A second bind on an ipc path silently takes it over, and the segment's lock alone cannot prevent that: its file
may be unlinked under a living group, and then the next coordinator makes another. So the folder has a lock of
its own (flock(2)), which the kernel drops with its holder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from dpshm.errors import SegmentError, SettingError

NAMES = ("frontends", "to-engines", "from-engines")
"""The ipc sockets."""


def take(folder: Path) -> int | None:
    """Makes the folder if need be and locks it. A descriptor that holds the lock, or None if another does.

    Raises:
        SegmentError: it cannot be made.
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
            raise SegmentError(
                f"cannot make {folder}: {e.strerror}. Set DPSHM_DIR to a folder on a tmpfs that you may write to"
            ) from e
        try:
            _check(folder)
            fd = _lock(folder)
        except FileNotFoundError:
            continue  # its last holder removed it just now
        except OSError:  # no descriptor left
            if made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        if fd is None or os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def remove(folder: Path) -> None:
    """Removes the folder of a dead group; one that a coordinator holds is left alone."""
    with suppress(OSError):
        fd = _lock(folder)
        if fd is not None:
            clear(folder)
            os.close(fd)


def clear(folder: Path) -> None:
    """Removes a folder whose lock is held, and what is in it."""
    for name in NAMES:  # by name: a process without a descriptor left cannot list a folder
        with suppress(OSError):
            (folder / name).unlink()
    try:
        folder.rmdir()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def _check(folder: Path) -> None:
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise SettingError(
            f"{folder} is not a folder that only uid {os.geteuid()} can enter "
            f"(mode {stat.filemode(info.st_mode)}, uid {info.st_uid}): remove it"
        )


def _lock(folder: Path) -> int | None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
