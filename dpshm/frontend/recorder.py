"""The decision recorder keeps the newest decisions of one front-end in a ring in shared memory.

A ring is a mapped file, usually on a tmpfs. Its first page is a header, like a segment's: magic, version, the
length of a JSON object, and that object (`RingHeader`). Then come

    word 0 of the second page               how many decisions were ever recorded
    slots, each on an 8-byte boundary       number, length in bytes, then a msgpack array (`_Record`)

Decision n (from 1) is in slot (n - 1) % slots and holds everything that its policy saw. So `read` rebuilds the
view exactly, and ``dpshm replay`` asks another policy about it.

One process writes, and any process may read at any time. The writer clears a slot's number before it fills the
slot, and stores the number last. The reader checks it, so it never takes half a record for a whole one.
"""

from __future__ import annotations

import logging
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from dpshm.board.files import sockets_path
from dpshm.board.header import printable
from dpshm.board.layout import MODEL_WORDS, PAGE_BYTES, STEP_MODEL_WORDS, STEP_WORDS, WORD_BYTES
from dpshm.errors import SettingError
from dpshm.policies import Request, View
from dpshm.policies.columns import ListColumns, ListWork, columns_of

logger = logging.getLogger(__name__)

MAGIC = b"DPSHMREC"
VERSION = 3
RING_BYTES = 4 << 20
"""The most that a ring takes, unless one record needs more: eight front-ends fit into a container's 64 MiB."""
MAX_SLOTS = 16_384
_PREAMBLE = struct.Struct("<8sII")
_MAX_RING_BYTES = 1 << 32


class RingHeader(msgspec.Struct, frozen=True):
    """The fixed facts of a ring; its records have room for `engines` engines."""

    version: int
    group: str
    frontend: int
    engines: int
    slots: int
    pid: int


_Word: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class _Record(msgspec.Struct, array_like=True, gc=False):
    time_ns: _Word
    choice: _Word
    prompt_tokens: _Word
    key: _Word | None
    num_frontends: _Word
    ranks: list[_Word]
    load: list[_Word]
    requests: list[_Word]
    own: list[_Word]
    beats: list[_Word]
    work: tuple[list[_Word], list[list[_Word]], list[list[_Word]], bool] | None
    cached: list[_Word] | None
    weights: list[float] | None


class Decision(NamedTuple):
    """One decision.

    Attributes:
        number: from 1, in the order of the front-end's decisions.
        time_ns: the time of the decision on CLOCK_MONOTONIC.
        view: the view that the policy saw.
        request: the request that it decided.
        choice: the rank that it chose. `route` then booked the request there (`choose` books none).
        age_ns: age of each rank's newest report; -1 for a rank without a report.
    """

    number: int
    time_ns: int
    view: View
    request: Request
    choice: int
    age_ns: list[int]


def default_path(group: str, frontend: int) -> Path:
    """The path of a front-end's ring in the folder of its group's sockets; it is removed with the group."""
    return sockets_path(group) / f"decisions-{frontend}"


def slot_bytes(engines: int) -> int:
    """Bytes for any record of `engines` engines: a number takes at most 9 bytes, an array's head at most 5."""
    numbers = 7 + engines * (5 + 2 + len(STEP_MODEL_WORDS) + 1 + 1)
    size = 2 * WORD_BYTES + 9 * numbers + 5 * (engines + 12)
    return -(-size // WORD_BYTES) * WORD_BYTES


class Recorder:
    """The writer of one front-end's ring. Call it under the front-end's lock.

    Attributes:
        path: the file.
        header: of the present ring.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, header: RingHeader) -> None:
        self.path = path
        self.header = header
        self._recording = True
        self._bytes = memoryview(mapped)
        self._words = self._bytes.cast("q")
        self._slots = header.slots
        self._size = slot_bytes(header.engines)
        self._written = 0
        self._encode = msgspec.msgpack.Encoder().encode
        # Models change every 100 ms at most and are most of a record's words, so they are encoded once.
        self._models: Any = None
        self._encoded_models = msgspec.Raw()

    @classmethod
    def create(cls, path: Path, *, engines: int, group: str, frontend: int, slots: int | None = None) -> Recorder:
        """Makes a ring; replaces an older ring, or an empty file, of that name.

        Args:
            path: the file.
            engines: ranks that there are. If there are more later, the ring is made anew and begins empty.
            group: the group's name.
            frontend: the front-end's index.
            slots: decisions that it holds; default: what `RING_BYTES` hold, at most `MAX_SLOTS`.

        Raises:
            SettingError: the file cannot be made, or another file has its name.
        """
        engines = max(1, engines)
        if slots is None:
            slots = max(1, min(MAX_SLOTS, (RING_BYTES - PAGE_BYTES - WORD_BYTES) // slot_bytes(engines)))
        if slots < 1:
            raise SettingError(f"a ring of {slots} slots holds no decision: choose 1 or more")
        header = RingHeader(VERSION, group, frontend, engines, slots, os.getpid())
        _check_replaceable(path)
        mapped = cls._make(path, header)
        logger.info(
            "front-end %d of group %r records its newest %d decisions in %s, %d KiB",
            *(frontend, group, slots, path, _ring_bytes(header) // 1024),
        )
        return cls(path, mapped, header)

    @staticmethod
    def _make(path: Path, header: RingHeader) -> mmap.mmap:
        blob = msgspec.json.encode(header)
        size = _ring_bytes(header)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if path == default_path(header.group, header.frontend):
                path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                # With ftruncate alone a full tmpfs would kill the front-end with SIGBUS later.
                os.posix_fallocate(fd, 0, size)
                os.pwrite(fd, _PREAMBLE.pack(MAGIC, VERSION, len(blob)) + blob, 0)
                mapped = mmap.mmap(fd, size)
            finally:
                os.close(fd)
            draft.replace(path)
        except OSError as e:
            with suppress(OSError):
                draft.unlink()
            raise SettingError(
                f"cannot make the decision ring {path} of {size // 1024} KiB: {e.strerror}. Name another file"
            ) from e
        return mapped

    def _grow(self, engines: int) -> bool:
        """Makes a ring with room for more ranks; false if it cannot be made, and then nothing more is recorded."""
        header = self.header
        self.close()
        try:
            grown = Recorder.create(self.path, engines=engines, group=header.group, frontend=header.frontend)
        except SettingError as e:
            logger.warning("no decision is recorded any more: %s", e)
            return False
        self.__dict__.update(vars(grown))
        return True

    def record(self, now_ns: int, view: View, request: Request, choice: int, beats: list[int]) -> None:
        """Stores one decision over the oldest one."""
        columns = view.columns
        if len(columns.own) > self.header.engines and not (self._recording and self._grow(len(columns.own))):
            self._recording = False
            return
        work: Any = columns.work
        rows: Any = None
        weights = None if columns.weights is None else list(map(float, columns.weights))
        if isinstance(columns, ListColumns):
            ranks, load, requests = columns.ranks, columns.load, columns.requests
        else:
            ranks, load, requests = columns.ranks.tolist(), columns.load.tolist(), columns.requests.tolist()
        if work is not None:
            few = isinstance(work, ListWork)
            if work.models is not self._models:
                self._models = work.models
                self._encoded_models = msgspec.Raw(self._encode(work.models if few else work.models.tolist()))
            tokens, steps = (work.tokens, work.steps) if few else (work.tokens.tolist(), work.steps.tolist())
            rows = (tokens, list(zip(*steps, strict=True)), self._encoded_models, work.lockstep)
        data = self._encode(
            (
                *(now_ns, choice, request.prompt_tokens, request.key, columns.num_frontends),
                *(ranks, load, requests, columns.own, beats, rows, request.cached, weights),
            )
        )
        number, words = self._written, self._words
        start = PAGE_BYTES + WORD_BYTES + number % self._slots * self._size
        at = start // WORD_BYTES
        # SYNC: partner of `_records`: the slot has no number while it is filled; the number is stored last.
        words[at] = 0
        words[at + 1] = len(data)
        self._bytes[start + 16 : start + 16 + len(data)] = data
        words[at] = words[PAGE_BYTES // WORD_BYTES] = self._written = number + 1

    def close(self) -> None:
        """Ends the recording; the file stays."""
        self._words.release()
        self._bytes.release()


def read(path: Path) -> tuple[RingHeader, list[Decision]]:
    """A ring's header and its decisions, the oldest first.

    Raises:
        SettingError: the file cannot be read, or is no ring of this version.
    """
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a device may have no end
            raise SettingError(f"{path} is no file, and so no decision ring")
        if found.st_size > _MAX_RING_BYTES:
            raise SettingError(f"{path} has more than {_MAX_RING_BYTES} bytes: it is no decision ring")
        data = path.read_bytes()
    except OSError as e:
        raise SettingError(f"cannot read the decision ring {path}: {e.strerror}") from e
    header = _check(path, data)
    return header, [_as_decision(number, record) for number, record in _records(header, data)]


def _check_replaceable(path: Path) -> None:
    """Raises `SettingError` if a file has that name and is no ring: a device, or what somebody wants to keep."""
    try:
        if not path.name:
            raise SettingError(f"{str(path)!r} names no file for the decision ring")
        found = path.lstat()
        ours = stat.S_ISREG(found.st_mode)
        if ours and found.st_size:
            with path.open("rb") as file:
                ours = file.read(len(MAGIC)) == MAGIC
    except FileNotFoundError:
        return
    except OSError as e:
        raise SettingError(f"cannot make the decision ring {path}: {e.strerror}. Name another file") from e
    if not ours:
        raise SettingError(
            f"cannot make the decision ring {path}: something else has that name, and would be lost. Name another "
            "file"
        )


def _ring_bytes(header: RingHeader) -> int:
    return PAGE_BYTES + WORD_BYTES + header.slots * slot_bytes(header.engines)


def _check(path: Path, data: bytes) -> RingHeader:
    if len(data) < PAGE_BYTES or data[:8] != MAGIC:
        raise SettingError(
            f"{path} is no decision ring: it does not start with {MAGIC!r}. A front-end that is attached with "
            "record=True writes one"
        )
    _, version, length = _PREAMBLE.unpack_from(data)
    if version != VERSION:
        raise SettingError(f"{path} is a decision ring of version {version}, and this dpshm reads {VERSION}")
    try:
        header = msgspec.json.decode(data[_PREAMBLE.size : _PREAMBLE.size + length], type=RingHeader)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise SettingError(f"{path}: the header cannot be read ({e}): the file is damaged") from None
    if header.slots < 1 or header.engines < 1 or len(data) != _ring_bytes(header):
        raise SettingError(
            f"{path} has {len(data)} bytes and its header says {_ring_bytes(header)}: the file is cut off"
        )
    return msgspec.structs.replace(header, group=printable(header.group))  # the file may be another user's


def _records(header: RingHeader, data: bytes) -> Iterator[tuple[int, _Record]]:
    """The complete records with their numbers, the oldest first."""
    size, decoder = slot_bytes(header.engines), msgspec.msgpack.Decoder(_Record)
    written = int.from_bytes(data[PAGE_BYTES : PAGE_BYTES + WORD_BYTES], "little")
    for number in range(max(0, written - header.slots) + 1, written + 1):
        start = PAGE_BYTES + WORD_BYTES + (number - 1) % header.slots * size
        found, length = struct.unpack_from("<qq", data, start)
        # SYNC: partner of `Recorder.record`: a slot that was being filled when `data` was read has no number, or
        # one that does not fit, or bytes of two records, which do not decode or do not agree in their lengths.
        if found != number or not 0 < length <= size - 2 * WORD_BYTES:
            continue
        try:
            record = decoder.decode(data[start + 16 : start + 16 + length])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            continue
        if _is_whole(record):
            yield number, record


def _is_whole(record: _Record) -> bool:
    n = len(record.load)
    rows: list[Any] = [record.requests, record.own, record.beats, *(record.work or ())[:3]]
    rows += [row for row in (record.cached, record.weights) if row is not None]
    if any(len(row) != n for row in rows) or not record.ranks:
        return False
    if record.work and not (
        all(len(step) == len(STEP_WORDS) for step in record.work[1])
        and all(len(model) == len(MODEL_WORDS) for model in record.work[2])
    ):
        return False
    if not all(0 < weight < inf for weight in record.weights or ()):
        return False
    return record.choice in record.ranks and all(0 <= r < n for r in record.ranks)


def _as_decision(number: int, record: _Record) -> Decision:
    work = None
    if record.work is not None:
        tokens, rows, models, lockstep = record.work
        steps = [list(column) for column in zip(*rows, strict=True)]
        work = ListWork(tokens, steps, models, record.time_ns, lockstep)
    counts = record.ranks, record.load, record.requests, record.own
    seen = ListColumns(*counts, record.num_frontends, work, record.weights)
    view = View(columns_of(seen))  # in the form in which the front-end had it
    age_ns = [max(0, record.time_ns - beat) if beat else -1 for beat in record.beats]
    request = Request(record.prompt_tokens, record.key, record.cached)
    return Decision(number, record.time_ns, view, request, record.choice, age_ns)
