"""A group's named segment: created whole, attached with checks, locked by its users, swept when they are gone.

A segment is a file ``dpshm-GROUP`` on a tmpfs (``/dev/shm``, or ``DPSHM_DIR``), beside it the 0700 folder
``dpshm-GROUP.sockets``. It is filled and locked as a file without a name and linked into place as the last
act, so nobody ever finds half a segment, and a creator killed on the way leaves nothing.

Who lives is told by locks. Each user of the segment holds an open-file-description lock (fcntl(2),
F_OFD_SETLK) on one byte, the first of its row; the kernel drops it with the last descriptor, however the
process ends, and across pid namespaces. Two things keep "the last descriptor" equal to "the process":
a forked child closes its copy, and the memory map stands on a descriptor of its own (``mmap`` keeps a
duplicate, and a duplicate would keep the lock). A segment is dead when one lock over all of it is granted.

Not used: ``multiprocessing.shared_memory``, whose resource tracker unlinks segments under living users
(cpython gh-82300) or within a second of its creator's death; a board has to outlive its coordinator.

Nothing read from the segment is trusted: geometry is checked here, once, and kept in Python.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import struct
import weakref
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from dpshm.board import layout, sockets_folder
from dpshm.board.layout import Column, Layout
from dpshm.errors import (
    HandleClosed,
    HandleError,
    HandleForked,
    SegmentError,
    SegmentInvalid,
    SegmentNoSpace,
    SegmentNotFound,
    SettingError,
)
from dpshm.linux import processes

FILE_PREFIX = "dpshm-"
SOCKETS_SUFFIX = ".sockets"
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,47}")
_PREAMBLE = struct.Struct("<8sHHII")
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in its place must not make us wait
_FLOCK = "@hhqqi0q"  # struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks)


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What never changes while a segment lives; JSON in its first page.

    The addresses are those of the ZMQ sockets: whoever finds the board finds them, and a coordinator that
    takes the board over binds them again.
    """

    group: str
    size: int
    engines: int  # capacity
    frontends: int  # capacity
    stats_address: str  # front-ends
    engine_input_address: str  # coordinator to engines
    engine_output_address: str  # engines to coordinator
    settings: dict[str, bool | int | float | str | None]  # of the coordinator: mode, waves, ...
    creator_pid: int
    creator_start_time: int
    boot_id: str
    pid_namespace: int
    time_namespace: int
    columns: dict[str, Column]

    @property
    def waves(self) -> bool:
        """Whether the group's ranks run in lockstep."""
        return bool(self.settings.get("waves", True))


def directory() -> Path:
    """Where segments live: ``DPSHM_DIR``, else ``/dev/shm``."""
    return Path(os.environ.get("DPSHM_DIR") or "/dev/shm")


def segment_path(group: str) -> Path:
    """The file of a group's segment.

    Raises:
        SettingError: the name cannot name a group.
    """
    if not _names_group(group):
        raise SettingError(
            f"{group!r} cannot name a group: use 1 to 48 letters, digits, '.', '_' or '-', "
            f"the first a letter, digit or '_', and do not end in {SOCKETS_SUFFIX!r}"
        )
    return directory() / (FILE_PREFIX + group)


def _names_group(name: str) -> bool:
    return _GROUP_NAME.fullmatch(name) is not None and not name.endswith(SOCKETS_SUFFIX)


def sockets_path(group: str) -> Path:
    """The folder of a group's ipc sockets."""
    return _sockets_beside(segment_path(group))


def _sockets_beside(path: Path) -> Path:
    return path.with_name(path.name + SOCKETS_SUFFIX)


def groups() -> list[str]:
    """The names of the groups whose segment files are on this node, alive or not, sorted."""
    names = []
    with suppress(OSError):
        for entry in os.scandir(directory()):
            name = entry.name.removeprefix(FILE_PREFIX)
            if name == entry.name or not _names_group(name):
                continue
            if entry.is_file(follow_symlinks=False):
                names.append(name)
    return sorted(names)


class Segment:
    """One open segment of a group: its words, its header, its locks.

    Attributes:
        group: the group's name.
        header: the checked header.
        words: the whole segment as int64 items; writable unless attached read-only.
        usable: false once closed, and in a child of the process that opened it.
    """

    def __init__(self, group: str, path: Path, fd: int, *, readonly: bool) -> None:
        self.group = group
        self.path = path
        self.readonly = readonly
        self.usable = True
        self._forked = False
        self._held: set[int] = set()
        self._open_fds = [fd]
        # A handle that is dropped without a close gives its locks back too.
        self._finalizer = weakref.finalize(self, _close_all, self._open_fds)
        self._fd = fd
        self.words: memoryview = memoryview(b"")
        self.header: Header
        _open_segments.add(self)

    @classmethod
    def create(cls, header: Header, *, file_mode: int = 0o600, file_gid: int = -1) -> Segment:
        """Makes a segment, all zeros but its header, holding the lock on the coordinator's byte.

        Args:
            header: what to write into its first page.
            file_mode: permissions of the file.
            file_gid: the file's group; -1 leaves it the process's.

        Raises:
            FileExistsError: there is a segment of that group already.
            SegmentNoSpace: the file system is full or too small.
            SegmentError: the directory cannot be used.
        """
        path = segment_path(header.group)
        blob = msgspec.json.encode(header)
        preamble = _PREAMBLE.pack(
            layout.MAGIC, layout.VERSION_MAJOR, layout.VERSION_MINOR, len(blob), zlib.crc32(blob)
        )
        if len(preamble) + len(blob) > layout.PAGE_BYTES:
            raise SegmentError(
                f"the header of group {header.group!r} needs {len(preamble) + len(blob)} bytes and has "
                f"{layout.PAGE_BYTES}: use shorter addresses (a shorter DPSHM_DIR)"
            )
        folder = _open_directory(path.parent)
        try:
            segment = cls(header.group, path, _reserve(folder, path.parent, header.size), readonly=False)
            try:
                os.pwrite(segment.fileno(), preamble + blob, 0)
                _set_access(segment, file_mode, file_gid)
                segment.lock(coordinator_byte(header.columns))
                segment._map_and_check()
                # SYNC: publication. The name appears only now, after all stores above, and link(2) is a
                # system call that orders them: whoever opens the name finds a whole header, and a held lock.
                nameless = f"/proc/self/fd/{segment.fileno()}"
                os.link(nameless, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
            except BaseException:
                segment.close()
                raise
        finally:
            os.close(folder)
        return segment

    @classmethod
    def attach(cls, group: str, *, readonly: bool = False) -> Segment:
        """Opens the segment of a group and checks its header.

        Raises:
            SegmentNotFound: there is none.
            SegmentInvalid: it is not one that this version can use.
            SegmentError: it may not be opened.
        """
        path = segment_path(group)
        flags = os.O_RDONLY if readonly else os.O_RDWR
        try:
            fd = os.open(path, flags | _OPEN_FLAGS)
        except FileNotFoundError:
            known = ", ".join(groups()) or "none"
            raise SegmentNotFound(
                f"no group {group!r} on this node (looked for {path}; groups here: {known}). Start its "
                "coordinator first; in a container, share the host's or the coordinator's /dev/shm"
            ) from None
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise SegmentInvalid(f"{path} is a symbolic link; dpshm does not follow it. Remove it") from None
            raise SegmentError(f"cannot open {path}: {e.strerror}") from e
        segment = cls(group, path, fd, readonly=readonly)
        try:
            segment._check_file()
            segment._map_and_check()
        except BaseException:
            segment.close()
            raise
        return segment

    def _check_file(self) -> None:
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise SegmentInvalid(f"{self.path} is not a regular file; remove it")
        if not self.readonly and info.st_mode & 0o022:
            raise SegmentInvalid(
                f"{self.path} may be written by others ({stat.filemode(info.st_mode)}): end its group, remove it"
            )
        if not self.readonly and info.st_uid != os.geteuid():
            raise SegmentInvalid(
                f"{self.path} belongs to uid {info.st_uid} and this process is uid {os.geteuid()}: "
                "run as that user, or use another group name"
            )

    def _map_and_check(self) -> None:
        size = os.fstat(self._fd).st_size
        if size < layout.PAGE_BYTES or size % layout.PAGE_BYTES:
            raise SegmentInvalid(
                f"{self.path} has {size} bytes, a board has a multiple of {layout.PAGE_BYTES}: it was "
                "truncated or is not a board. Stop its users and remove it"
            )
        # A second open, so that the duplicate which mmap keeps carries no lock of ours.
        access = mmap.ACCESS_READ if self.readonly else mmap.ACCESS_WRITE
        map_fd = os.open(f"/proc/self/fd/{self._fd}", (os.O_RDONLY if self.readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            page = os.pread(map_fd, layout.PAGE_BYTES, 0)
            self.header = _read_header(self.path, page, size, self.group, self.readonly)
            self.words = memoryview(mmap.mmap(map_fd, size, access=access)).cast("q")
        finally:
            os.close(map_fd)

    @property
    def layout(self) -> Layout:
        """The map of this segment as its header gives it, checked."""
        h = self.header
        return Layout(h.engines, h.frontends, h.columns, h.size)

    @property
    def sockets_path(self) -> Path:
        """The folder of its group's ipc sockets."""
        return _sockets_beside(self.path)

    @property
    def linked(self) -> bool:
        """False once somebody has unlinked the file: who is attached goes on, a new attach fails."""
        return os.fstat(self.fileno()).st_nlink > 0

    def keep_sockets(self, fd: int) -> None:
        """Holds the lock on the sockets' folder for as long as this segment is open, and not in forked children.

        Args:
            fd: from `dpshm.board.sockets_folder.take`; closed with the segment.
        """
        self._open_fds.append(fd)

    def fileno(self) -> int:
        """The descriptor that carries the locks. Raises `HandleError` if the segment is closed."""
        if self._fd < 0:
            raise self.why_unusable()
        return self._fd

    def lock(self, byte: int, length: int = 1) -> bool:
        """Takes the lock on a byte, or on all bytes from it on with `length` 0; false if another holds any."""
        try:
            fcntl.fcntl(self.fileno(), fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte, length))
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        if length == 1:
            self._held.add(byte)
        return True

    def unlock(self, byte: int) -> None:
        """Gives the lock on a byte back."""
        fcntl.fcntl(self.fileno(), fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte, 1))
        self._held.discard(byte)

    def is_locked(self, byte: int) -> bool:
        """Whether any handle, this one included, holds the lock on a byte."""
        return self.each_locked((byte,))[0]

    def each_locked(self, in_bytes: Iterable[int]) -> list[bool]:
        """`is_locked` of each of these bytes."""
        fd, held = self.fileno(), self._held
        return [byte in held or _others_hold(fd, byte, 1) for byte in in_bytes]

    def is_shared(self) -> bool:
        """Whether any other handle holds a lock on any byte."""
        return _others_hold(self.fileno(), 0, 0)

    def lock_all(self) -> bool:
        """Takes the lock on every byte at once: granted only if nobody else is attached for writing."""
        return self.lock(0, 0)

    def unlink(self) -> None:
        """Removes the file, if the name still means this segment, and the folder of its sockets."""
        try:
            same = os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._fd))
        except FileNotFoundError:
            return
        if same:
            # The folder first: while the name is there nobody else can create the group.
            if len(self._open_fds) > 1:  # it is ours
                sockets_folder.clear(self.sockets_path)
            else:
                sockets_folder.remove(self.sockets_path)
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Drops the locks. The memory goes with the last reference to it.

        It is not unmapped here: numpy gives its hold on a buffer back as soon as it has the address, so
        nothing would tell of an array, or of another thread, that still looks at it.
        """
        _open_segments.discard(self)
        self.usable = False
        self._finalizer()
        self._fd = -1

    def why_unusable(self) -> HandleError:
        """The error to raise when a handle on this segment is used although it is not usable."""
        if self._forked:
            return HandleForked(
                f"this handle on group {self.group!r} belongs to the parent process; attach after the fork"
            )
        return HandleClosed(f"this handle on group {self.group!r} is closed")

    def _after_fork_in_child(self) -> None:
        # The child's copy of the descriptor would keep the lock, and a dead parent would look alive.
        self.usable, self._forked = False, True
        self._finalizer()
        self._fd = -1


_open_segments: weakref.WeakSet[Segment] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for segment in list(_open_segments):
        segment._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def coordinator_byte(columns: dict[str, Column]) -> int:
    """The byte whose lock says that a coordinator lives: the first of its row."""
    return columns["control"].offset


def engine_byte(columns: dict[str, Column], dp_rank: int) -> int:
    """The byte whose lock says that an engine lives: the first of its row."""
    return _first_byte(columns["engine_state"], dp_rank)


def frontend_byte(columns: dict[str, Column], index: int) -> int:
    """The byte whose lock says that a front-end lives: the first of its row."""
    return _first_byte(columns["frontend_beat"], index)


def _first_byte(column: Column, row: int) -> int:
    return column.offset + row * column.strides[0]  # not ROW_BYTES: a newer version's rows may be wider


def make_header(group: str, engines: int, frontends: int, **fields: Any) -> Header:
    """A header for a new segment of this process."""
    plan = layout.make_layout(engines, frontends)
    return Header(
        group=group,
        size=plan.size,
        engines=engines,
        frontends=frontends,
        creator_pid=os.getpid(),
        creator_start_time=processes.start_time(os.getpid()),
        boot_id=processes.boot_id(),
        pid_namespace=processes.namespace_inode("pid"),
        time_namespace=processes.namespace_inode("time"),
        columns=plan.columns,
        **fields,
    )


def sweep(group: str) -> bool:
    """Removes what a dead group left. True if there was something and it is gone.

    Only locks decide: a pid that cannot be seen may live in another container that shares this directory.
    """
    path = segment_path(group)
    try:
        fd = os.open(path, os.O_RDWR | _OPEN_FLAGS)
    except FileNotFoundError:
        return False
    except OSError as e:
        raise SegmentError(f"cannot open {path}: {e.strerror}") from e
    segment = Segment(group, path, fd, readonly=False)
    try:
        segment._check_file()
        if not segment.lock_all():
            return False
        segment.unlink()
        return True
    finally:
        segment.close()


def _close_all(fds: list[int]) -> None:
    while fds:
        with suppress(OSError):
            os.close(fds.pop())


@cache
def _flock(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


def _others_hold(fd: int, start: int, length: int) -> bool:
    # The kernel leaves out what this very descriptor holds; its answer begins with the kind of lock in the way.
    return fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))[:2] != _UNLOCKED


_UNLOCKED = struct.pack("h", fcntl.F_UNLCK)


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise SegmentError(
            f"cannot use {path} for shared memory: {e.strerror}. Set DPSHM_DIR to a folder on a tmpfs"
        ) from e


def _reserve(folder: int, name: Path, size: int) -> int:
    """A descriptor of a nameless file of that size, every page of it reserved."""
    fd = -1
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
        # With ftruncate alone a tmpfs that fills up would kill a writer with SIGBUS later.
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            raise SegmentNoSpace(_no_space(name, size)) from e
        raise SegmentError(f"cannot create a segment in {name}: {e.strerror}") from e
    return fd


def _set_access(segment: Segment, mode: int, gid: int) -> None:
    """Lets others read. Done while the file has no name; the group first, since chown may clear mode bits."""
    try:
        if gid >= 0:
            os.fchown(segment.fileno(), -1, gid)
        os.fchmod(segment.fileno(), mode)  # as told, whatever the umask
    except OSError as e:
        raise SegmentError(
            f"cannot give {segment.path} mode 0o{mode:o} and gid {gid}: {e.strerror}. Only root, or a member of "
            "that group, may give a file to a group"
        ) from e


def _no_space(folder: Path, size: int) -> str:
    free = os.statvfs(folder)
    return (
        f"{folder} has {free.f_bavail * free.f_frsize // 1024} KiB free and the board needs {size // 1024} KiB: "
        "free some, enlarge it (containers: --shm-size, or an emptyDir of medium Memory), lower the "
        "capacities, or set DPSHM_DIR to another tmpfs"
    )


def group_in(page: bytes) -> str | None:
    """The group that a segment's first page names; None if it is not one's, of any version."""
    if len(page) < _PREAMBLE.size or not page.startswith(layout.MAGIC):
        return None
    length = _PREAMBLE.unpack_from(page)[3]
    try:
        group = msgspec.json.decode(page[_PREAMBLE.size : _PREAMBLE.size + length])["group"]
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return group if isinstance(group, str) else None


def _read_header(path: Path, page: bytes, size: int, group: str, readonly: bool) -> Header:
    magic, major, minor, length, crc = _PREAMBLE.unpack_from(page)

    def refuse(what: str, found: object, expected: object) -> SegmentInvalid:
        return SegmentInvalid(
            f"{path}: {what} is {found}, expected {expected}. If nobody uses the group any more, remove the file"
        )

    if magic != layout.MAGIC:
        raise refuse("the magic", magic, layout.MAGIC)
    found, ours = f"{major}.{minor}", f"{layout.VERSION_MAJOR}.{layout.VERSION_MINOR}"
    if major != layout.VERSION_MAJOR or (
        minor < layout.VERSION_MINOR if readonly else minor != layout.VERSION_MINOR
    ):
        raise refuse("the layout version", found, f"{ours} (use one dpshm version for the whole group)")
    if length > len(page) - _PREAMBLE.size:
        raise refuse("the header's length", length, f"at most {len(page) - _PREAMBLE.size}")
    blob = page[_PREAMBLE.size : _PREAMBLE.size + length]
    if zlib.crc32(blob) != crc:
        raise refuse("the header's checksum", hex(zlib.crc32(blob)), hex(crc))
    try:
        header = msgspec.json.decode(blob, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise refuse("the header", str(e), "a header of this version") from None
    if header.size != size:
        raise refuse("the file's size", size, header.size)
    if header.group != group:
        raise refuse("the group's name", repr(header.group), repr(group))
    _check_columns(header, refuse, exact=not readonly)
    return header


def _check_columns(header: Header, refuse: Any, *, exact: bool) -> None:
    if not 1 <= header.engines <= layout.MAX_ENGINES or not 1 <= header.frontends <= layout.MAX_FRONTENDS:
        raise refuse(
            "the capacity",
            f"{header.engines} engines, {header.frontends} front-ends",
            f"1 to {layout.MAX_ENGINES} and 1 to {layout.MAX_FRONTENDS}",
        )
    ours = layout.make_layout(header.engines, header.frontends).columns
    if exact and header.columns != ours:
        raise refuse("the column table", "another", "that of this version")
    for name, mine in ours.items():
        column = header.columns.get(name)
        if column is None:
            raise refuse(f"column {name!r}", "missing", "present")
        end = column.offset + layout.WORD_BYTES
        end += sum((n - 1) * step for n, step in zip(column.shape, column.strides, strict=False))
        numbers = (column.offset, *column.strides)
        if (
            column.shape != mine.shape
            or len(column.strides) != len(column.shape)
            or any(n < 0 or n % layout.WORD_BYTES for n in numbers)
            or end > header.size
        ):
            raise refuse(f"column {name!r}", column, mine)
