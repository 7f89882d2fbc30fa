"""A file that may be compressed, opened as the bytes that are in it: gzip, bzip2, xz and zstd.

The first bytes of the file tell, not its name. What ends early or is damaged raises `DamagedError`, whatever the
library behind it raises. zstd needs Python 3.14 or the package ``zstandard``.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

_UTF_16 = "text in UTF-16: convert it, with iconv -f UTF-16 -t UTF-8"
_OTHERS = {
    b"PK\x03\x04": "a zip archive: unzip it first",
    b"PAR1": "a Parquet file: convert it to CSV or JSON lines first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"\x04\x22\x4d\x18": "lz4-compressed: unpack it first, with unlz4",
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"version ": "a pointer of Git LFS and not the file itself: fetch that with git lfs pull",
    b"<!DOCTYP": "a page of the web, not a trace: fetch the file itself",
    b"<!doctyp": "a page of the web, not a trace: fetch the file itself",
}
"""By the first bytes of a file."""


class DamagedError(Exception):
    """The file cannot be decompressed; the message says why, and what to do."""


def _open_zstd(file: BinaryIO) -> Any:
    for name in ("compression.zstd", "zstandard"):
        try:
            return import_module(name).open(file, "rb")
        except ImportError:
            continue
    raise DamagedError(
        "is zstd-compressed, and this Python cannot read that: pip install zstandard, or unpack it (unzstd)"
    )


_OPENERS: dict[bytes, tuple[str, Any]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zstd", _open_zstd),
}


@contextmanager
def open_plain(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes in a file, decompressed while they are read.

    Raises:
        OSError: it cannot be opened or read.
        DamagedError: it is compressed, and cut off, damaged, or of a kind that is not known here.
    """
    with open(path, "rb") as file:
        head = file.peek(8)[:8]
        for magic, said in _OTHERS.items():
            if head.startswith(magic):
                raise DamagedError(f"is {said}")
        name, opener = next((found for magic, found in _OPENERS.items() if head.startswith(magic)), ("", None))
        if opener is None:
            yield file
            return
        with opener(file) as plain:
            yield io.BufferedReader(_Checked(plain, name), 1 << 16)


class _Checked(io.RawIOBase):
    """Turns what a decompressor raises into `DamagedError`."""

    def __init__(self, plain: Any, name: str) -> None:
        self._plain, self._name = plain, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._plain.read(len(buffer))
        except OSError as e:
            if e.errno:  # of the disk; a decompressor's has no number
                raise
            raise self._damaged(e) from None
        except Exception as e:  # zlib, lzma and each library of zstd have classes of their own
            raise self._damaged(e) from None
        buffer[: len(data)] = data
        return len(data)

    def _damaged(self, error: Exception) -> DamagedError:
        return DamagedError(f"is {self._name}-compressed and damaged or cut off ({error}): fetch it again")
