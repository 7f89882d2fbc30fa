"""The file of a prefix index: its header, its size, how it is made and how it is opened.

`dpshm.board.prefix_index` has the map. A file appears under its name once it is complete, with room for all that
will be stored in it, and mode 0600.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

from dpshm.board.files import NO_SPACE, why_no_space
from dpshm.board.layout import PAGE_BYTES, WORD_BYTES
from dpshm.errors import SegmentError, SegmentInvalid, SegmentNoSpace
from dpshm.rules.prefix_hash import MAX_BLOCK_TOKENS

MAGIC = int.from_bytes(b"DPSHMPFX", "little") & ((1 << 63) - 1)
VERSION = 1
BUCKET_WORDS = 16
WORDS_A_BLOCK = 4
MAX_BLOCKS = 1 << 26
HEADER_WORDS = (
    "magic",
    "version",
    "incarnation",
    "buckets",
    "block_tokens",
    "identity",
    "inserted",
    "evicted",
    "dropped",
    "held",
    "recomputed_blocks",
)
AT = {name: i for i, name in enumerate(HEADER_WORDS)}
TABLE = PAGE_BYTES // WORD_BYTES
"""The first word of the table."""


def index_path(folder: Path, dp_rank: int) -> Path:
    """The index of a rank, in the folder of its group's sockets."""
    return folder / f"prefix-{dp_rank}"


def buckets_for(num_blocks: int) -> int:
    """How many buckets an index of that many blocks has: a power of two, at least 4 words a block."""
    words = max(BUCKET_WORDS, num_blocks * WORDS_A_BLOCK)
    return 1 << (-(-words // BUCKET_WORDS) - 1).bit_length()


def make_file(path: Path, buckets: int, what: str, **values: int) -> memoryview:
    """Makes an index with an empty table; returns its words.

    Args:
        path: one of that name is replaced; its readers keep the old one until they look again.
        buckets: of the table, a power of two.
        what: it is, for an error.
        values: words of the header.

    Raises:
        SegmentNoSpace: the file system is full.
        SegmentError: the file cannot be made.
    """
    size = PAGE_BYTES + buckets * BUCKET_WORDS * WORD_BYTES
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # With ftruncate alone a full tmpfs would kill the writer with SIGBUS later.
            os.posix_fallocate(fd, 0, size)
            words = memoryview(mmap.mmap(fd, size)).cast("Q")
        finally:
            os.close(fd)
        for name, value in {"version": VERSION, "buckets": buckets, **values, "magic": MAGIC}.items():
            words[AT[name]] = value
        # SYNC: publication. The name appears only now; rename(2) is a system call that orders the stores above.
        draft.replace(path)
    except BaseException as e:
        with suppress(OSError):
            draft.unlink()
        if not isinstance(e, OSError):
            raise
        if e.errno in NO_SPACE:
            raise SegmentNoSpace(why_no_space(path.parent, what, size)) from e
        raise SegmentError(f"cannot make the prefix index {path}: {e.strerror}") from e
    return words


def open_file(path: Path) -> memoryview:
    """Maps an index and checks it; returns its words. Nothing read from it is trusted afterwards.

    Raises:
        SegmentInvalid: it is not an index of this version, or not this user's.
        SegmentError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise SegmentError(f"cannot open the prefix index {path}: {e.strerror}") from e
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise SegmentInvalid(
                f"{path} is not a file that uid {os.geteuid()} alone may read (uid {info.st_uid}, mode "
                f"{stat.filemode(info.st_mode)}): it is not used. Remove it"
            )
        if info.st_size <= PAGE_BYTES:
            raise SegmentInvalid(f"{path} has {info.st_size} bytes: it is no prefix index. Remove it")
        words = memoryview(mmap.mmap(fd, info.st_size, access=mmap.ACCESS_READ)).cast("Q")
    except (OSError, ValueError) as e:  # no memory for it, or the file was cut meanwhile
        raise SegmentError(f"cannot map the prefix index {path}: {e}") from e
    finally:
        os.close(fd)
    buckets, block_tokens = int(words[AT["buckets"]]), int(words[AT["block_tokens"]])
    if words[AT["magic"]] != MAGIC or words[AT["version"]] != VERSION:
        raise SegmentInvalid(f"{path} is not a prefix index of version {VERSION}: use one dpshm for the group")
    if (
        buckets & (buckets - 1)
        or info.st_size != PAGE_BYTES + buckets * BUCKET_WORDS * WORD_BYTES
        or not 1 <= block_tokens <= MAX_BLOCK_TOKENS
    ):
        raise SegmentInvalid(
            f"{path} has {info.st_size} bytes and its header says {buckets} buckets and {block_tokens} "
            "tokens a block: remove it"
        )
    return words
