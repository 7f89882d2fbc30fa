"""The table of prompts that were just sent: which prefixes are about to be cached, in shared memory.

Front-ends share it (`dpshm.frontend.sent_prompts` reads and writes it). It is a file ``sent`` in the folder of the
group's sockets, which the first front-end makes that sees a rank with a prefix index. Like the indexes it tells a
reader who knows a prompt whether it was seen: only the owner may enter the folder, and the file has mode 0600. It
goes with the group.

    offset 0     magic, version, rows                                                            one page
    offset 4096  stamps[row, slot]: when and where a prompt was sent, 0: no prompt               8 bytes each
    then         samples[row, slot, 128]: fingerprints of its sampled blocks, 0: it is shorter   1024 bytes a slot

A row belongs to the front-end with that row of the board, which alone writes there. Its 32 slots hold the prompts
that it sent last. A stamp has the rank in its low 16 bits, and CLOCK_MONOTONIC in units of 2**20 ns above them.
A prompt counts for `REMEMBERED_NS` from its stamp, so what a dead front-end left ends by itself, and so does a
damaged stamp.

SYNC: one writer a row, any number of readers, no lock. The writer clears the stamp, stores the samples, then the
stamp; a reader loads the stamp, the samples, and the stamp again, and takes the samples only if it has not
changed. On x86-64 it thus never takes the samples of one prompt for those of another. On Arm it may see the stores
in another order: its expectation of what a rank will have cached is then wrong once. That costs the computation of
a prefix and never changes an answer.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dpshm.board import files
from dpshm.board.layout import PAGE_BYTES, WORD_BYTES
from dpshm.errors import SegmentError, SegmentInvalid
from dpshm.rules.prefix_samples import SAMPLES

MAGIC = int.from_bytes(b"DPSHMSNT", "little") & ((1 << 63) - 1)
VERSION = 1
SLOTS = 32
MAX_ROWS = 128
"""Front-ends with a higher row share nothing. A table takes at most 4.2 MiB; for 64 front-ends it takes 2.1."""
RANK_BITS = 16
TICK_SHIFT = 20
_HEADER = (MAGIC, VERSION)


def sent_path(folder: Path) -> Path:
    """The table, in the folder of its group's sockets."""
    return folder / "sent"


def stamp_of(dp_rank: int, now_ns: int) -> int:
    """The stamp of a prompt that was sent to a rank at a time."""
    return now_ns >> TICK_SHIFT << RANK_BITS | dp_rank


class SentTable:
    """The table, mapped.

    Attributes:
        stamps: shape (rows, SLOTS), dtype uint64.
        samples: shape (rows, SLOTS, SAMPLES), dtype uint64.
    """

    def __init__(self, words: NDArray[np.uint64], rows: int) -> None:
        end = rows * SLOTS
        self.stamps = words[:end].reshape(rows, SLOTS)
        self.samples = words[end:].reshape(rows, SLOTS, SAMPLES)

    @classmethod
    def private(cls, rows: int = 1) -> Self:
        """A table that only this process sees."""
        return cls(np.zeros(_words(rows), np.uint64), rows)

    @classmethod
    def open(cls, path: Path, frontends: int) -> Self:
        """Maps the group's table; makes it if there is none.

        Args:
            path: from `sent_path`.
            frontends: rows of the board. The table has as many, at most `MAX_ROWS`.

        Raises:
            SegmentNoSpace: the file system is full.
            SegmentInvalid: the file is no table of this version for so many front-ends, or not this user's.
            SegmentError: it cannot be made or opened.
        """
        rows = min(frontends, MAX_ROWS)
        try:
            fd = _open(path, rows)
        except OSError as e:
            raise SegmentError(f"cannot use the table {path}: {e.strerror}") from e
        try:
            info, size = os.fstat(fd), _size(rows)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
                raise SegmentInvalid(
                    f"{path} is not a file that uid {os.geteuid()} alone may use (uid {info.st_uid}, mode "
                    f"{stat.filemode(info.st_mode)}): remove it"
                )
            if info.st_size != size:
                raise SegmentInvalid(f"{path} has {info.st_size} bytes and should have {size}: remove it")
            words = np.frombuffer(mmap.mmap(fd, size), np.uint64)
        except (OSError, ValueError) as e:  # no memory for it, or the file was cut meanwhile
            raise SegmentError(f"cannot map the table {path}: {e}") from e
        finally:
            os.close(fd)
        if tuple(words[:3].tolist()) != (*_HEADER, rows):
            raise SegmentInvalid(f"{path} is not a table of version {VERSION}: use one dpshm for the group")
        return cls(words[PAGE_BYTES // WORD_BYTES :], rows)


def _words(rows: int) -> int:
    return rows * SLOTS * (1 + SAMPLES)


def _size(rows: int) -> int:
    return PAGE_BYTES + _words(rows) * WORD_BYTES


def _open(path: Path, rows: int) -> int:
    """A descriptor of the file. Of several front-ends that make it at once, the first one's is used by all."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        pass
    folder = files.open_directory(path.parent)
    try:
        fd = files.reserve(folder, path.parent, _size(rows), "the table of prompts just sent")
        try:
            os.pwrite(fd, np.array((*_HEADER, rows), np.uint64).tobytes(), 0)
            # SYNC: publication. The name appears only now; link(2) is a system call that orders the stores above.
            files.link(folder, fd, path.name)
        except FileExistsError:
            os.close(fd)
            return os.open(path, flags)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(folder)
