"""The file in which a group's processes take their locks: ``dpshm-GROUP.TOKEN.locks``, empty, mode 0600.

A process that may read a file can place read locks on it, and these keep every writer's lock out. The segment may
be readable for others (``file_mode``), so the locks are not on it. Only the owner may attach to a segment for
writing (`dpshm.board.files.check_owner`), so only the owner needs to open this file.

The header of the segment has the token. So a lock file belongs to one segment for ever, also if the segment's name
goes to another. Its creator locks it before it has a name, and it has a name as long as its segment has one. So a
segment without a lock file was damaged, and a free lock file without a segment is what a killed start left.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from dpshm.board import files
from dpshm.board.files import FILE_PREFIX, LOCKS_SUFFIX
from dpshm.errors import SegmentError, SegmentInvalid, SegmentNoSpace

_TOKEN = re.compile(r"[0-9a-f]{16}")


def path_beside(segment: Path, token: str) -> Path:
    """The lock file that belongs to a segment's file.

    Raises:
        SegmentInvalid: the token is none.
    """
    if not _TOKEN.fullmatch(token):
        raise SegmentInvalid(
            f"the header of {segment} names no lock file ({token!r:.40}): it is damaged, or of an older dpshm. If "
            "no process uses it, remove it"
        )
    return segment.with_name(f"{segment.name}.{token}{LOCKS_SUFFIX}")


def all_beside(segment: Path) -> list[Path]:
    """The lock files of all segments that had this path."""
    return [path for path in all_files() if segment_of(path) == segment]


def all_files() -> list[Path]:
    """Every lock file in the directory of segments, sorted."""
    named = re.compile(re.escape(FILE_PREFIX) + "(.+)[.]" + _TOKEN.pattern + re.escape(LOCKS_SUFFIX))
    found = [(path, named.fullmatch(path.name)) for path in files.directory().iterdir()]
    return sorted(path for path, match in found if match and files.names_group(match[1]))


def segment_of(path: Path) -> Path:
    """The segment's file to which a lock file belongs."""
    return path.with_suffix("").with_suffix("")


def create(folder: int, name: Path) -> int:
    """A descriptor of a new lock file without a name.

    Args:
        folder: a descriptor of the directory.
        name: the directory's path, for the error's text.

    Raises:
        SegmentNoSpace: the file system has no inode left.
        SegmentError: the file cannot be made.
    """
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as e:
        if e.errno in files.NO_SPACE:
            raise SegmentNoSpace(files.why_no_space(name, "a file of locks")) from e
        raise SegmentError(f"cannot make a lock file in {name}: {e.strerror}") from e
    os.fchmod(fd, 0o600)  # whatever the umask took
    return fd


def open_file(path: Path, *, readonly: bool = False) -> int:
    """A descriptor of a lock file.

    Args:
        path: the file.
        readonly: only to ask for the locks of others.

    Raises:
        FileNotFoundError: there is none.
        SegmentInvalid: it is no lock file, or another user could lock in it.
        SegmentError: it may not be opened.
    """
    try:
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | files.OPEN_FLAGS)
    except FileNotFoundError:
        raise
    except OSError as e:
        kind = SegmentInvalid if e.errno == errno.ELOOP else SegmentError
        raise kind(f"cannot open the lock file {path}: {e.strerror}") from e
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and not info.st_mode & 0o077 and (readonly or info.st_uid == os.geteuid()):
        return fd
    os.close(fd)
    raise SegmentInvalid(
        f"{path} is not a file that uid {os.geteuid()} alone may open ({stat.filemode(info.st_mode)}, uid "
        f"{info.st_uid}), so its locks prove nothing: end the group's processes, then remove it and its segment"
    )
