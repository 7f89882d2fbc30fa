"""A simpler shared-memory board: one file, a msgpack slot for each engine, one ``flock`` over the whole file.

Writers take the lock exclusively, readers shared, so a reader sees all slots of one instant. Each waits for the
other, also while the kernel runs another process on the core of the lock's holder.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.baselines import Middle, Spec

SLOT_BYTES = 64
_encoder = msgspec.msgpack.Encoder()


class Slot(msgspec.Struct, array_like=True):
    """What an engine stores."""

    waiting: int = 0
    running: int = 0
    kv_cache_usage: float = 0.0
    stored_s: float = 0.0


_decoder = msgspec.msgpack.Decoder(Slot)


def _pack(slot: Slot) -> bytes:
    data = _encoder.encode(slot)
    return (bytes([len(data)]) + data).ljust(SLOT_BYTES, b"\0")


def _unpack(data: bytes) -> Slot:
    return _decoder.decode(data[1 : 1 + data[0]])


class Flock:
    """The file."""

    def __init__(self, dp_size: int, num_frontends: int) -> None:
        shm = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(prefix="bench-flock-", dir=shm if shm.is_dir() else None)
        path = Path(self._folder.name) / "board"
        path.write_bytes(_pack(Slot()) * dp_size)
        self.spec = Spec("flock", dp_size, num_frontends, str(path))
        self.pids: list[int] = []

    def close(self) -> None:
        """Removes it."""
        self._folder.cleanup()


def start(dp_size: int, num_frontends: int) -> Middle:
    """A new file."""
    return Flock(dp_size, num_frontends)


class _Mapped:
    def __init__(self, spec: Spec) -> None:
        self._fd = os.open(spec.where, os.O_RDWR)
        self._map = mmap.mmap(self._fd, 0)

    def close(self) -> None:
        """Leaves."""
        self._map.close()
        os.close(self._fd)


class FlockEngine(_Mapped):
    """An engine's end."""

    def __init__(self, spec: Spec, dp_rank: int) -> None:
        super().__init__(spec)
        self._at = slice(dp_rank * SLOT_BYTES, (dp_rank + 1) * SLOT_BYTES)

    def publish(self, waiting: int, running: int) -> None:
        data = _pack(Slot(waiting, running, 0.0, time.monotonic()))
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._map[self._at] = data
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class FlockFrontend(_Mapped):
    """A front-end's end. It counts its own requests until they end, and does not see those of others."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__(spec)
        self._slots = [slice(e * SLOT_BYTES, (e + 1) * SLOT_BYTES) for e in range(spec.dp_size)]
        self.index = self._turn = index
        self._own = [0] * spec.dp_size

    def known(self) -> list[bytes]:
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        data = self._map[:]
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return [data[slot] for slot in self._slots]

    def waiting(self, item: Any) -> int:
        return _unpack(item).waiting

    def wait(self, timeout_ms: int) -> None:
        if timeout_ms:
            time.sleep(timeout_ms / 1e3)

    def sockets(self) -> list[Any]:
        return []

    def beliefs(self) -> tuple[list[int], list[int]]:
        reported = [slot.waiting + slot.running for slot in map(_unpack, self.known())]
        return reported, [max(there, own) for there, own in zip(reported, self._own, strict=True)]

    def choose(self) -> int:
        n = len(self._slots)
        self._turn += 1
        _, scores = self.beliefs()
        rank = min(((self._turn + i) % n for i in range(n)), key=scores.__getitem__)
        self._own[rank] += 1
        return rank

    def finished(self, dp_rank: int) -> None:
        self._own[dp_rank] -= 1


def engine_end(spec: Spec, dp_rank: int) -> FlockEngine:
    """Opens the file to write a slot."""
    return FlockEngine(spec, dp_rank)


def frontend_end(spec: Spec, index: int) -> FlockFrontend:
    """Opens the file to read it."""
    return FlockFrontend(spec, index)
