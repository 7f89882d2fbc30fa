"""Removes what dead groups of this user have left: segments, lock files, sockets' folders.

Only locks decide which group is dead: a pid that cannot be seen may live in another container that shares the
directory. Where the locks cannot be asked, a group counts as alive.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

from dpshm.board import files, layout, lock_file
from dpshm.board.files import FILE_PREFIX
from dpshm.board.locks import Locks
from dpshm.board.segment import Segment
from dpshm.errors import SegmentError, SegmentInvalid, SegmentNotFound, SettingError
from dpshm.linux.forks import PrivateFd


def sweep(group: str) -> bool:
    """Removes the files of a dead group. True if there were any and they are gone."""
    path = files.segment_path(group)
    try:
        file = PrivateFd(lambda: files.open_segment(path, readonly=False))
    except FileNotFoundError:
        return False
    with closing(Segment(group, path, file, readonly=False)) as segment:
        files.check_owner(path, file.fd)
        try:
            segment.map_and_check()
        except SegmentInvalid:
            return _sweep_damaged(path, file.fd)
        try:
            segment.open_locks()
        except (SegmentInvalid, SegmentNotFound):
            return False  # nothing tells whether a process uses it
        if not segment.locks.lock_all():
            return False
        segment.unlink()
        return True


def _sweep_damaged(path: Path, fd: int) -> bool:
    """Removes a file whose header does not tell its lock file, unless a lock file of its group may be in use."""
    with ExitStack() as held:
        found = lock_file.all_beside(path)
        for locks in found:
            try:
                opened = held.enter_context(closing(PrivateFd(partial(lock_file.open_file, locks))))
            except (FileNotFoundError, SegmentError):
                return False
            if not Locks(opened.fd).lock_all():
                return False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                files.remove_sockets_folder(files.sockets_beside(path))
                path.unlink()
                for locks in found:
                    locks.unlink(missing_ok=True)
                return True
    return False


def sweep_dead() -> list[str]:
    """Removes what dead groups of this user have left in the directory; returns the groups' names.

    A group's name may be one that never comes again, so that no later start of the group removes it. A file that
    is no board, or another user's, is left alone, and so is every group of which one process lives.
    """
    removed = []
    for group in files.groups():
        with suppress(SegmentError, SettingError, OSError):
            path = files.segment_path(group)
            if path.stat(follow_symlinks=False).st_uid == os.geteuid() and _is_board(path) and sweep(group):
                removed.append(group)
    with suppress(OSError):
        for folder in files.stray_sockets_folders():
            if folder.stat(follow_symlinks=False).st_uid == os.geteuid():
                files.remove_sockets_folder(folder)
    sweep_lock_files()
    return removed


def sweep_lock_files() -> list[Path]:
    """Removes lock files of this user that no segment names; returns them. A start that was killed leaves one."""
    removed = []
    with suppress(OSError):
        for path in lock_file.all_files():
            with suppress(SegmentError, OSError), closing(PrivateFd(partial(lock_file.open_file, path))) as opened:
                # A start locks its lock file before that has a name. What is free is not one of a start.
                if Locks(opened.fd).lock_all() and not _has_segment(path):
                    path.unlink()
                    removed.append(path)
    return removed


def _has_segment(locks: Path) -> bool:
    """Whether a segment names this lock file; true if it cannot be told."""
    path = lock_file.segment_of(locks)
    try:
        with closing(Segment.attach(path.name.removeprefix(FILE_PREFIX), readonly=True)) as segment:
            return lock_file.path_beside(path, segment.header.lock_token) == locks
    except SegmentNotFound:
        return False
    except (SegmentError, SettingError):
        return os.path.lexists(path)


def _is_board(path: Path) -> bool:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        return file.read(len(layout.MAGIC)) == layout.MAGIC
