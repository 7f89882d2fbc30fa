"""A group's named segment: created whole, attached with checks, locked by its users.

The segment is filled as a file without a name and linked into place as the last act, when its lock file has a name
and is locked. So no process finds half a segment. A creator that is killed on the way leaves at most a lock file,
which the next start removes (`dpshm.board.sweep`).

The lifetime of the locks is that of the process (`dpshm.board.locks`): a forked child closes its copy of the lock
file's descriptor (`dpshm.linux.forks`).

``multiprocessing.shared_memory`` is not used: its resource tracker unlinks segments under living users (cpython
gh-82300) or within a second of its creator's death, and a board has to outlive its coordinator.

Nothing read from the segment is trusted (rule 6): geometry is checked here, once, and kept in Python.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from dpshm.board import files, layout, lock_file
from dpshm.board.header import Header, encode_header, read_header
from dpshm.board.layout import Layout
from dpshm.board.locks import Locks, coordinator_byte
from dpshm.errors import (
    HandleClosed,
    HandleError,
    HandleForked,
    SegmentError,
    SegmentInvalid,
    SegmentNotFound,
)
from dpshm.linux.forks import PrivateFd, give_up, give_up_sockets
from dpshm.linux.waits import deadline

FOREIGN_BYTES = 16 << 20
"""The largest file of another user that tools read: ten times the board of 64 engines and 256 front-ends."""

_WAIT_INTERVAL_S = 0.02
"""Between two looks for a group that is not there."""


class Segment:
    """One open segment of a group: its words, its header and its locks.

    Attributes:
        group: the group's name.
        header: the checked header.
        words: the whole segment as int64 items; writable unless attached read-only.
        usable: false once closed, and in a child of the process that opened it.
    """

    def __init__(self, group: str, path: Path, file: PrivateFd, *, readonly: bool) -> None:
        self.group = group
        self.path = path
        self.readonly = readonly
        self.usable = True
        self._forked = False
        # A handle that is dropped without a close gives its locks back too: these close themselves.
        self._file = file
        self._lock_file: PrivateFd | None = None
        self._folder: PrivateFd | None = None
        self.words: memoryview = memoryview(b"")
        self._copied: memoryview | None = None  # the words, if they are another user's
        self.header: Header
        give_up(self, Segment._close_in_child)

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
        path = files.segment_path(header.group)
        first_page = encode_header(header)
        folder = files.open_directory(path.parent)
        try:
            file = PrivateFd(lambda: files.reserve(folder, path.parent, header.size, "the board"))
            segment = cls(header.group, path, file, readonly=False)
            try:
                os.pwrite(segment.fileno(), first_page, 0)
                files.set_access(path, segment.fileno(), file_mode, file_gid)
                segment.map_and_check()
                segment._hold_locks(PrivateFd(partial(lock_file.create, folder, path.parent)))
                segment.locks.lock(coordinator_byte(header.columns))
                files.link(folder, segment.locks.fd, segment.locks_path.name)
                # SYNC: publication. The name appears only now, after all stores above, and link(2) is a
                # system call that orders them: a process that opens the name finds a whole header and a held lock.
                files.link(folder, segment.fileno(), path.name)
            except BaseException:
                segment.unlink_locks()
                segment.close()
                raise
        finally:
            os.close(folder)
        return segment

    @classmethod
    def nameless(cls, header: Header) -> Segment:
        """Makes a segment that no other process can open: for a row that is carried to a board elsewhere."""

        def reserved() -> int:
            fd = os.memfd_create("dpshm-row", os.MFD_CLOEXEC)
            os.ftruncate(fd, header.size)
            return fd

        segment = cls(header.group, files.segment_path(header.group), PrivateFd(reserved), readonly=False)
        try:
            os.pwrite(segment.fileno(), encode_header(header), 0)
            segment.map_and_check()
        except BaseException:
            segment.close()
            raise
        return segment

    @classmethod
    def attach(cls, group: str, *, readonly: bool = False, any_owner: bool = False) -> Segment:
        """Opens the segment of a group, and checks its owner and its header.

        Args:
            group: the group's name.
            readonly: never to write to it.
            any_owner: read it also if it is another user's. That user can store any number in it and truncate it,
                so `words` are a copy then, as new as the last `refresh`. Only for tools, and with `readonly`.

        Raises:
            SegmentNotFound: there is none.
            SegmentInvalid: it is not one that this version can use.
            SegmentError: it may not be opened.
        """
        path = files.segment_path(group)
        try:
            file = PrivateFd(lambda: files.open_segment(path, readonly=readonly))
        except FileNotFoundError:
            raise _not_found(path, group) from None
        segment = cls(group, path, file, readonly=readonly)
        try:
            files.check_owner(path, file.fd, any_owner=any_owner and readonly)
            segment.map_and_check()
            segment.open_locks()
        except BaseException:
            segment.close()
            raise
        return segment

    @classmethod
    def attach_within(cls, group: str, timeout_s: float) -> Segment:
        """Opens the segment of a group to write to it, and waits for the group if it is not there.

        A segment that no process uses is that of a dead group. It is opened only when the time is up.

        Args:
            group: the group's name.
            timeout_s: how long to wait; 0: not at all.

        Raises:
            SegmentNotFound: there was no such group within that time.
            SegmentInvalid: it is not one that this version can use.
            SegmentError: it may not be opened.
            SettingError: `timeout_s` is no number.
        """
        until_s = deadline(timeout_s)
        while True:
            late = time.monotonic() >= until_s
            try:
                segment = cls.attach(group)
            except SegmentNotFound:
                if late:
                    raise
            else:
                if late or segment.locks.is_shared():
                    return segment
                segment.close()
            time.sleep(_WAIT_INTERVAL_S)

    def open_locks(self) -> None:
        """Opens the lock file. A reader that may not open it goes without: see `has_locks`.

        Raises:
            SegmentNotFound: the segment was removed just now.
            SegmentInvalid: the lock file is gone, or another user could lock in it.
        """
        path = self.locks_path
        try:
            self._hold_locks(PrivateFd(partial(lock_file.open_file, path, readonly=self.readonly)))
        except (FileNotFoundError, SegmentError) as e:
            if self.readonly:
                return
            if isinstance(e, SegmentError):
                raise
            if not self.linked:  # the segment
                raise _not_found(self.path, self.group) from None
            raise SegmentInvalid(
                f"the lock file {path} was removed, so nothing tells which processes use group {self.group!r}: "
                f"end them, and remove {self.path}"
            ) from None

    def _hold_locks(self, opened: PrivateFd) -> None:
        self._lock_file, self._locks = opened, Locks(opened.fd)

    @property
    def locks_path(self) -> Path:
        """The lock file."""
        return lock_file.path_beside(self.path, self.header.lock_token)

    def map_and_check(self) -> None:
        """Maps the file and reads its header. Raises `SegmentInvalid` if this version cannot use it."""
        size = os.fstat(self.fileno()).st_size
        if size < layout.PAGE_BYTES or size % layout.PAGE_BYTES:
            raise SegmentInvalid(
                f"{self.path} has {size} bytes, a board has a multiple of {layout.PAGE_BYTES}: it was "
                "truncated or is not a board. Stop its users and remove it"
            )
        access = mmap.ACCESS_READ if self.readonly else mmap.ACCESS_WRITE
        page = os.pread(self.fileno(), layout.PAGE_BYTES, 0)
        self.header = h = read_header(self.path, page, size, self.group, self.readonly)
        if self.is_ours:
            self.words = memoryview(mmap.mmap(self.fileno(), size, access=access)).cast("q")
        else:
            self._copy(size)
        if not self.readonly:  # this process speaks in the group, and its children must not keep its connections
            give_up_sockets(self, (h.stats_address, h.engine_input_address, h.engine_output_address))

    def _copy(self, size: int) -> None:
        """Reads another user's file. A map of it would end this process (SIGBUS) when that user truncates it."""
        if size > FOREIGN_BYTES:
            raise SegmentInvalid(
                f"{self.path} is another user's and has {size} bytes; of those, tools read at most {FOREIGN_BYTES}"
            )
        self.words = self._copied = memoryview(bytearray(size)).cast("q")
        self.refresh()

    def refresh(self) -> None:
        """Reads another user's file again. The words of an own segment are always the present ones."""
        if self._copied is not None:
            os.preadv(self.fileno(), [self._copied], 0)  # what was cut off keeps its last values

    @property
    def is_ours(self) -> bool:
        """Whether this process's user owns the file."""
        return os.fstat(self.fileno()).st_uid == os.geteuid()

    @property
    def layout(self) -> Layout:
        """The map of this segment as its header gives it, checked."""
        h = self.header
        return Layout(h.engines, h.frontends, h.columns, h.size)

    @property
    def sockets_path(self) -> Path:
        """The folder of its group's ipc sockets."""
        return files.sockets_beside(self.path)

    @property
    def linked(self) -> bool:
        """False once the file or its lock file is unlinked, or if it never had a name.

        Attached handles keep working, a new attach fails.
        """
        both = [self.fileno()] if self._lock_file is None else [self.fileno(), self._lock_file.fd]
        return all(os.fstat(fd).st_nlink > 0 for fd in both)

    @property
    def has_locks(self) -> bool:
        """Whether this handle can ask for locks. A reader of another user's group cannot: only marks tell it."""
        return self._lock_file is not None

    @property
    def locks(self) -> Locks:
        """The locks of this handle. Raises `HandleError` if the segment is closed, or has no locks."""
        self.fileno()
        if self._lock_file is None:
            raise HandleError(f"this process may not open the lock file of group {self.group!r}")
        return self._locks

    def keep_sockets(self, folder: PrivateFd) -> None:
        """Holds the lock on the sockets' folder for as long as this segment is open.

        Args:
            folder: from `dpshm.board.files.lock_sockets_folder`; closed with the segment.
        """
        self._folder = folder

    def restore_sockets(self) -> bool:
        """Makes the sockets' folder again if it was removed, and holds its lock. False if another process does.

        Raises:
            SegmentError: the folder cannot be made.
            SettingError: something else is in its place.
        """
        held = self._folder
        if held is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.sockets_path, follow_symlinks=False), os.fstat(held.fd)):
                    return True
        folder = files.lock_sockets_folder(self.sockets_path)
        if folder is None:
            return False
        self._folder = folder
        if held is not None:
            held.close()
        return True

    def fileno(self) -> int:
        """A descriptor of the segment's file. Raises `HandleError` if the segment is closed."""
        if self._file.fd < 0:
            raise self.why_unusable()
        return self._file.fd

    def unlink(self) -> None:
        """Removes its lock file and, if its name still names this segment, the file and the sockets' folder."""
        same = False
        with suppress(FileNotFoundError):
            same = os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self.fileno()))
        if same:
            # The folder first: while the name is there, no other process can create the group.
            if self._folder is not None:
                files.clear_sockets_folder(self.sockets_path)
            else:
                files.remove_sockets_folder(self.sockets_path)
            self.path.unlink(missing_ok=True)
        self.unlink_locks()  # last: a segment that has a name has a lock file

    def unlink_locks(self) -> None:
        """Removes the lock file. No other segment has one of its name."""
        if self._lock_file is not None:
            self.locks_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Drops the locks. The memory goes with the last reference to it.

        It is not unmapped here: numpy releases its hold on a buffer as soon as it has the address, so an array, or
        another thread, may still read it.
        """
        self.usable = False
        self._close()

    def why_unusable(self) -> HandleError:
        """The error to raise when a handle on this segment is used although it is not usable."""
        if self._forked:
            return HandleForked(
                f"this handle on group {self.group!r} belongs to the parent process; attach after the fork"
            )
        return HandleClosed(f"this handle on group {self.group!r} is closed")

    def _close(self) -> None:
        give_up_sockets(self, ())
        self._file.close()
        if self._lock_file is not None:
            self._lock_file.close()
        if self._folder is not None:
            self._folder.close()

    def _close_in_child(self) -> None:
        if self.usable:
            self.usable, self._forked = False, True


def _not_found(path: Path, group: str) -> SegmentNotFound:
    known = ", ".join(files.groups()) or "none"
    return SegmentNotFound(
        f"no group {group!r} on this node (looked for {path}; groups here: {known}). Start its "
        "coordinator first; in a container, share the host's or the coordinator's /dev/shm"
    )
