"""A group's named segment: created whole, attached with checks, locked by its users, swept when they are gone.

The segment is filled and locked as a file without a name and linked into place as the last act, so no process
finds half a segment, and a creator that is killed on the way leaves nothing.

Two rules keep the lifetime of the locks equal to the lifetime of the process (`dpshm.board.locks`): a forked child
closes its copy of the descriptor (`dpshm.linux.forks`), and the memory map stands on a descriptor of its own
(``mmap`` keeps a duplicate, and a duplicate would keep the lock).

``multiprocessing.shared_memory`` is not used: its resource tracker unlinks segments under living users (cpython
gh-82300) or within a second of its creator's death, and a board has to outlive its coordinator.

Nothing read from the segment is trusted (rule 6): geometry is checked here, once, and kept in Python.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

from dpshm.board import files, layout
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
    SettingError,
)
from dpshm.linux.forks import PrivateFd, give_up, give_up_sockets

FOREIGN_BYTES = 16 << 20
"""The largest file of another user that tools read: ten times the board of 64 engines and 256 front-ends."""


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
        self._folder: PrivateFd | None = None
        self._locks = Locks(file.fd)
        self.words: memoryview = memoryview(b"")
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
            file = PrivateFd(lambda: files.reserve(folder, path.parent, header.size))
            segment = cls(header.group, path, file, readonly=False)
            try:
                os.pwrite(segment.fileno(), first_page, 0)
                files.set_access(path, segment.fileno(), file_mode, file_gid)
                segment.locks.lock(coordinator_byte(header.columns))
                segment._map_and_check()
                # SYNC: publication. The name appears only now, after all stores above, and link(2) is a
                # system call that orders them: a process that opens the name finds a whole header and a held lock.
                nameless = f"/proc/self/fd/{segment.fileno()}"
                os.link(nameless, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
            except BaseException:
                segment.close()
                raise
        finally:
            os.close(folder)
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
            known = ", ".join(files.groups()) or "none"
            raise SegmentNotFound(
                f"no group {group!r} on this node (looked for {path}; groups here: {known}). Start its "
                "coordinator first; in a container, share the host's or the coordinator's /dev/shm"
            ) from None
        segment = cls(group, path, file, readonly=readonly)
        try:
            files.check_owner(path, file.fd, any_owner=any_owner and readonly)
            segment._map_and_check()
        except BaseException:
            segment.close()
            raise
        return segment

    def _map_and_check(self) -> None:
        size = os.fstat(self.fileno()).st_size
        if size < layout.PAGE_BYTES or size % layout.PAGE_BYTES:
            raise SegmentInvalid(
                f"{self.path} has {size} bytes, a board has a multiple of {layout.PAGE_BYTES}: it was "
                "truncated or is not a board. Stop its users and remove it"
            )
        # A second open, so that the duplicate which mmap keeps carries no lock of ours.
        access = mmap.ACCESS_READ if self.readonly else mmap.ACCESS_WRITE
        map_fd = os.open(
            f"/proc/self/fd/{self.fileno()}", (os.O_RDONLY if self.readonly else os.O_RDWR) | os.O_CLOEXEC
        )
        try:
            page = os.pread(map_fd, layout.PAGE_BYTES, 0)
            self.header = read_header(self.path, page, size, self.group, self.readonly)
            if self.is_ours:
                self.words = memoryview(mmap.mmap(map_fd, size, access=access)).cast("q")
            else:
                self._copy(size)
            if (
                not self.readonly
            ):  # this process speaks in the group, and its children must not keep its connections
                h = self.header
                give_up_sockets(self, (h.stats_address, h.engine_input_address, h.engine_output_address))
        finally:
            os.close(map_fd)

    def _copy(self, size: int) -> None:
        """Reads another user's file. A map of it would end this process (SIGBUS) when that user truncates it."""
        if size > FOREIGN_BYTES:
            raise SegmentInvalid(
                f"{self.path} is another user's and has {size} bytes; of those, tools read at most {FOREIGN_BYTES}"
            )
        self.words = memoryview(bytearray(size)).cast("q")
        self.refresh()

    def refresh(self) -> None:
        """Reads another user's file again. The words of an own segment are always the present ones."""
        if not self.is_ours:
            os.preadv(self.fileno(), [self.words], 0)  # what was cut off keeps its last values

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
        """False once the file is unlinked: attached handles keep working, a new attach fails."""
        return os.fstat(self.fileno()).st_nlink > 0

    @property
    def locks(self) -> Locks:
        """The locks of this handle. Raises `HandleError` if the segment is closed."""
        self.fileno()
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
        """The descriptor that carries the locks. Raises `HandleError` if the segment is closed."""
        if self._file.fd < 0:
            raise self.why_unusable()
        return self._file.fd

    def unlink(self) -> None:
        """Removes the file, if its name still names this segment, and the folder of its sockets."""
        try:
            same = os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self.fileno()))
        except FileNotFoundError:
            return
        if same:
            # The folder first: while the name is there, no other process can create the group.
            if self._folder is not None:
                files.clear_sockets_folder(self.sockets_path)
            else:
                files.remove_sockets_folder(self.sockets_path)
            self.path.unlink(missing_ok=True)

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
        if self._folder is not None:
            self._folder.close()

    def _close_in_child(self) -> None:
        if self.usable:
            self.usable, self._forked = False, True


def sweep(group: str) -> bool:
    """Removes the files of a dead group. True if there were any and they are gone.

    Only locks decide: a pid that cannot be seen may live in another container that shares this directory.
    """
    path = files.segment_path(group)
    try:
        file = PrivateFd(lambda: files.open_segment(path, readonly=False))
    except FileNotFoundError:
        return False
    segment = Segment(group, path, file, readonly=False)
    try:
        files.check_owner(path, file.fd)
        if not segment.locks.lock_all():
            return False
        segment.unlink()
        return True
    finally:
        segment.close()


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
    return removed


def _is_board(path: Path) -> bool:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        return file.read(len(layout.MAGIC)) == layout.MAGIC
