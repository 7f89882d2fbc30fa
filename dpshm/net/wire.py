"""The messages between engines, coordinator and front-ends: those of vLLM, byte for byte.

    engine -> coordinator       PUSH   array: engine_index, outputs, scheduler_stats (map or nil), timestamp,
                                       utility_output, finished_requests, wave_complete, start_wave, ...
                                       (trailing fields may be missing or new); from dpshm's engines on other
                                       nodes, far behind vLLM's fields, also their row of the board
    coordinator -> engines      XPUB   `READY`, or two frames: 0x02, (wave, exclude or nil)
    coordinator -> front-ends   XPUB   (counts or nil, wave, running); counts: one an engine,
                                       [waiting, running, kv_cache_usage], or [waiting, running] in 2025
    front-ends -> coordinator   XSUB   0x01 / 0x00 (subscribe, unsubscribe); (engine or nil, wave);
                                       ("SCALE_ELASTIC_EP", n)
    engine -> coordinator       SUB    0x01 / 0x00 (subscribe, unsubscribe), then the topic: empty (everything);
                                       engines with dpshm's own link also `dpshm-rank`, rank (2 bytes)
    operator -> coordinator     XSUB   ("DPSHM_DRAIN", rank), ("DPSHM_UNDRAIN", rank)
    front-end -> coordinator    XSUB   ("DPSHM_HEARD", 0, ranks): a little-endian number, a bit a rank

All payloads are msgpack. What does not decode strictly to these raises `WireError`; nothing is unpickled,
and nothing decoded here is used as an index before its reader has checked it. The encoders of our own
messages give the bytes that vLLM 0.32 gives (the vectors in ``tests/data``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpshm.board.layout import CARRIED_WORDS, MAX_ENGINES, MAX_FRONTENDS, WORD_BYTES
from dpshm.board.words import COUNT_MASK
from dpshm.errors import WireError
from dpshm.rules.waves import MAX_WAVE

READY: Final = b"READY"
START_FRAME: Final = b"\x02"
SUBSCRIBE: Final = b"\x01"
UNSUBSCRIBE: Final = b"\x00"
SCALE: Final = "SCALE_ELASTIC_EP"
DRAIN: Final = "DPSHM_DRAIN"
UNDRAIN: Final = "DPSHM_UNDRAIN"
HEARD: Final = "DPSHM_HEARD"
MAX_MESSAGE_BYTES: Final = 1 << 20
"""Larger messages are refused by the sockets: the largest honest one, 4096 engines' counts, is 80 KiB."""
MAX_UPSTREAM_BYTES: Final = 1 << 10
"""And so are these where XSUB peers speak: honest ones need 30 bytes, and with keys 300 for the handshake."""
MAX_TOPIC_BYTES: Final = 1 << 20
"""Of topics that peers subscribe to, all together, before it is called a flood: honest ones have the empty one."""

CARRIED: Final = len(CARRIED_WORDS)
CARRIED_BYTES: Final = CARRIED * WORD_BYTES
_TOP_BYTE: Final = WORD_BYTES - 1
_MAX_TOP_BYTE: Final = 127
_WORD: Final = np.dtype("<i8")
_NAME: Final = b"dpshm-rank"
ENGINE_LIMIT: Final = 1 << 16
"""Ranks are named by two bytes at most."""
ENGINE_IDENTITY_BYTES: Final = 2
_HEARD_BYTES: Final = MAX_ENGINES // 8

T = TypeVar("T")
Wave = Annotated[int, msgspec.Meta(ge=0, le=MAX_WAVE)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Receipts = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MASK)]
_EMPTY = msgspec.Raw(b"\x90")
_NIL = msgspec.Raw(b"\xc0")


def encode_name(dp_rank: int) -> bytes:
    """The topic by which an engine tells the coordinator whose connection this is. No message has it."""
    return _NAME + dp_rank.to_bytes(ENGINE_IDENTITY_BYTES, "little")


def decode_name(topic: bytes) -> int | None:
    """The rank that a topic names; None if it is another topic."""
    if len(topic) != len(_NAME) + ENGINE_IDENTITY_BYTES or not topic.startswith(_NAME):
        return None
    return int.from_bytes(topic[len(_NAME) :], "little")


class Counts(msgspec.Struct, array_like=True, frozen=True):
    """One rank's numbers; the releases of 2025 sent the first two alone."""

    waiting: Count
    running: Count
    kv_cache_usage: float = 0.0


class SchedulerStats(msgspec.Struct, frozen=True):
    """The part of an engine's statistics that a coordinator reads. A map: unknown keys are skipped."""

    num_running_reqs: Count = 0
    num_waiting_reqs: Count = 0
    step_counter: Count = 0
    current_wave: Wave = 0
    kv_cache_usage: float = 0.0


class Received(msgspec.Struct, array_like=True, frozen=True):
    """What an engine has received from one front-end since it started.

    Attributes:
        frontend: the front-end's row on the coordinator's board, or the name under which it took its row.
        requests: how many.
        tokens: prompt tokens, as the front-end booked them.
    """

    frontend: Annotated[int, msgspec.Meta(ge=0, lt=MAX_FRONTENDS)] | str
    requests: Receipts
    tokens: Receipts


class RemoteRow(msgspec.Struct, array_like=True, frozen=True):
    """An engine's whole row, for a board that it cannot write: the coordinator writes it there as it stands here.

    Each message is whole: of several, only the newest counts, and each may be lost.

    Attributes:
        process: a random number that the process drew: another number is another process.
        report: grows with each publication; a repeated one only says that the process lives.
        clock_ns: CLOCK_MONOTONIC of the sender when it published; the times among `words` are of that clock.
        here: false: the engine left in good order.
        words: the words of `layout.CARRIED_WORDS`, little-endian, 8 bytes each; see `unpack_words`.
        received: by front-end, encoded (`pack_received`), so that a reader need not decode what has not changed.
            A front-end that is missing has sent nothing.
    """

    process: Count
    report: Count
    clock_ns: Count
    here: bool
    words: Annotated[bytes, msgspec.Meta(min_length=CARRIED_BYTES, max_length=CARRIED_BYTES)]
    received: msgspec.Raw


class EngineMessage(msgspec.Struct, array_like=True, frozen=True):
    """What an engine sends. An array: missing trailing fields take their defaults, extra ones are skipped."""

    engine_index: Count
    outputs: msgspec.Raw = _EMPTY
    scheduler_stats: SchedulerStats | None = None
    timestamp: float = 0.0
    utility_output: msgspec.Raw = _NIL
    finished_requests: msgspec.Raw = _NIL
    wave_complete: Wave | None = None
    start_wave: Wave | None = None
    reserved_8: msgspec.Raw = _NIL
    reserved_9: msgspec.Raw = _NIL
    reserved_10: msgspec.Raw = _NIL
    reserved_11: msgspec.Raw = _NIL
    reserved_12: msgspec.Raw = _NIL
    reserved_13: msgspec.Raw = _NIL
    reserved_14: msgspec.Raw = _NIL
    reserved_15: msgspec.Raw = _NIL
    row: RemoteRow | None = None


class StartMessage(msgspec.Struct, array_like=True, frozen=True):
    """The second frame of a START: all engines but `exclude` are to run in `wave`."""

    wave: Wave
    exclude: int | None = None


class StateMessage(msgspec.Struct, array_like=True, frozen=True):
    """What front-ends hear: the counts by rank (nil: unchanged), the wave, and whether the ranks run."""

    counts: list[Counts] | None
    wave: Wave
    running: bool


class FirstRequestMessage(NamedTuple):
    """A front-end's notice of a request that it sent while it believed the ranks paused."""

    engine: int | None
    wave: int


class ScaleMessage(NamedTuple):
    """A front-end's request to change the number of ranks."""

    dp_size: int


class DrainMessage(NamedTuple):
    """An operator's request to take a rank out of routing, or to put it back. Not one of vLLM's messages."""

    dp_rank: int
    drained: bool


class HeardMessage(NamedTuple):
    """A front-end's word that it has live connections to these ranks. Not one of vLLM's messages."""

    dp_ranks: tuple[int, ...]


class _FromFrontend(msgspec.Struct, array_like=True, frozen=True):
    head: object  # an engine or SCALE; msgspec has no union of bytes and str
    number: Count
    ranks: object = None


_encoder = msgspec.msgpack.Encoder()
_RESERVED = (None,) * 8
_words = struct.Struct(f"<{CARRIED}q")
_engine = msgspec.msgpack.Decoder(EngineMessage)
_received = msgspec.msgpack.Decoder(Annotated[list[Received], msgspec.Meta(max_length=MAX_FRONTENDS)])
_start = msgspec.msgpack.Decoder(StartMessage)
_state = msgspec.msgpack.Decoder(StateMessage)
_from_frontend = msgspec.msgpack.Decoder(_FromFrontend)


def decode(decoder: msgspec.msgpack.Decoder[T], what: str, data: bytes) -> T:
    """A message; `what` names it for the error. Raises `WireError`."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, TypeError) as e:
        # TypeError: msgspec 0.19 puts a map as a key into a dict.
        raise WireError(f"not {what}: {e} ({len(data)} bytes)") from None


def decode_engine_message(data: bytes) -> EngineMessage:
    """An engine's message to the coordinator. Raises `WireError`."""
    return decode(_engine, "an engine's message", data)


def decode_frontend_message(data: bytes) -> FirstRequestMessage | ScaleMessage | DrainMessage | HeardMessage:
    """A front-end's message to the coordinator (subscriptions apart). Raises `WireError`."""
    message = decode(_from_frontend, "a front-end's message", data)
    match message.head:
        case None:
            return FirstRequestMessage(None, message.number)
        case int(engine) if type(engine) is int and 0 <= engine < ENGINE_LIMIT:
            return FirstRequestMessage(engine, message.number)
        case bytes(identity) if len(identity) == ENGINE_IDENTITY_BYTES:
            return FirstRequestMessage(int.from_bytes(identity, "little"), message.number)
        case str(word) if word == SCALE:
            return ScaleMessage(message.number)
        case str(word) if word in (DRAIN, UNDRAIN):
            return DrainMessage(message.number, word == DRAIN)
        case str(word) if (
            word == HEARD and isinstance(message.ranks, bytes) and len(message.ranks) <= _HEARD_BYTES
        ):
            bits = ((8 * at, byte) for at, byte in enumerate(message.ranks) if byte)
            return HeardMessage(tuple(first + i for first, byte in bits for i in range(8) if byte >> i & 1))
    raise WireError(f"not a front-end's message: {message.head!r:.40} names neither an engine nor {SCALE}")


def decode_start(data: bytes) -> StartMessage:
    """The second frame of a START. Raises `WireError`."""
    return decode(_start, "a START", data)


def decode_state(data: bytes) -> StateMessage:
    """What the coordinator published to front-ends. Raises `WireError`."""
    return decode(_state, "a state message", data)


def encode_wave_complete(engine_index: int, wave: int, *, timestamp: float = 0.0) -> bytes:
    """Rank 0's word that all ranks went idle at the end of `wave`."""
    return _encoder.encode((engine_index, (), None, timestamp, None, None, wave, None, None))


def encode_wave_started(engine_index: int, wave: int, *, timestamp: float = 0.0) -> bytes:
    """An engine's word that it runs in `wave`."""
    return _encoder.encode((engine_index, (), None, timestamp, None, None, None, wave, None))


def encode_report(engine_index: int, stats: SchedulerStats) -> bytes:
    """A report of an engine's queues, as a stock engine sends it."""
    return _encoder.encode((engine_index, (), stats, 0.0, None, None, None, None))


def encode_remote_row(engine_index: int, stats: SchedulerStats, row: RemoteRow) -> bytes:
    """A row for the coordinator. vLLM's own coordinator reads it as the report that a stock engine sends."""
    return _encoder.encode((engine_index, (), stats, 0.0, None, None, None, None, *_RESERVED, row))


def pack_words(words: Sequence[int]) -> bytes:
    """Words of a row, one for each of `layout.CARRIED_WORDS`."""
    return _words.pack(*words)


def unpack_words(packed: bytes) -> tuple[int, ...]:
    """The words of a row. Raises `WireError` if one is negative: no row has such."""
    words = _words.unpack(packed)
    if min(words) < 0:
        raise WireError(f"not a row: {CARRIED_WORDS[words.index(min(words))][0]} is negative")
    return words


def words_arrays(packed: Sequence[bytes]) -> NDArray[np.int64]:
    """The same of several rows: an array of its own, shape (rows, CARRIED). Raises `WireError` as that one."""
    words = bytearray().join(packed)
    if max(words[_TOP_BYTE::WORD_BYTES], default=0) > _MAX_TOP_BYTE:
        for row in packed:
            unpack_words(row)
    return np.frombuffer(words, _WORD).reshape(-1, CARRIED)


def pack_received(received: Sequence[Received]) -> msgspec.Raw:
    """What an engine has received, for a `RemoteRow`."""
    return msgspec.Raw(_encoder.encode(received))


def unpack_received(row: RemoteRow) -> list[Received]:
    """What an engine has received, by front-end. Raises `WireError`."""
    return decode(_received, "what an engine has received", bytes(row.received))


def encode_start(wave: int, exclude: int | None) -> list[bytes]:
    """The two frames of a START."""
    return [START_FRAME, _encoder.encode((wave, exclude))]


def encode_state(counts: Sequence[Sequence[float]] | None, wave: int, running: bool) -> bytes:
    """What the coordinator publishes to front-ends; `counts` holds two or three numbers a rank."""
    return _encoder.encode((counts, wave, running))


def encode_first_request(engine: int | None, wave: int) -> bytes:
    """A front-end's notice of a request that it sent while it believed the ranks paused."""
    return _encoder.encode((engine, wave))


def encode_scale(dp_size: int) -> bytes:
    """A request to change the number of ranks."""
    return _encoder.encode((SCALE, dp_size))


def encode_heard(dp_ranks: Sequence[int]) -> bytes:
    """A front-end's word that it has live connections to these ranks."""
    bits = sum(1 << e for e in set(dp_ranks))
    return _encoder.encode((HEARD, 0, bits.to_bytes((bits.bit_length() + 7) // 8, "little")))


def encode_drain(dp_rank: int, drained: bool) -> bytes:
    """A request to take a rank out of routing, or to put it back."""
    return _encoder.encode((DRAIN if drained else UNDRAIN, dp_rank))
