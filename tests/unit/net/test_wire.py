"""The messages: byte for byte those of vLLM, and strict with everything else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dpshm.errors import WireError
from dpshm.net import wire
from dpshm.net.wire import (
    Counts,
    DrainMessage,
    EngineMessage,
    FirstRequestMessage,
    HeardMessage,
    ScaleMessage,
    SchedulerStats,
    StartMessage,
    StateMessage,
)
from tests.stock_wire import encode_stats

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "wire-vllm-0.32.json").read_text())
pack = msgspec.msgpack.encode


def vectors(link: str) -> dict[str, bytes]:
    """The golden bytes of one link, by meaning."""
    return {v["meaning"]: bytes.fromhex(v["hex"]) for v in VECTORS[link]}


STATS_3 = SchedulerStats(
    num_running_reqs=7, num_waiting_reqs=5, step_counter=11, current_wave=2, kv_cache_usage=0.25
)
ENGINE = {
    "stats: engine_index 3, waiting 5, running 7, kv_cache_usage 0.25, step_counter 11, current_wave 2": (
        encode_stats(3, STATS_3, timestamp=1.5),
        (3, STATS_3, None, None),
    ),
    "stats: engine_index 0, all counts 0": (
        encode_stats(0, SchedulerStats(), timestamp=1.5),
        (0, SchedulerStats(), None, None),
    ),
    "wave_complete 4 from engine_index 0": (
        wire.encode_wave_complete(0, 4, timestamp=1.5),
        (0, None, 4, None),
    ),
    "start_wave 5 from engine_index 2": (wire.encode_wave_started(2, 5, timestamp=1.5), (2, None, None, 5)),
}


@pytest.mark.parametrize(("meaning", "data"), vectors("engine_to_coordinator").items())
def test_what_an_engine_sends(meaning: str, data: bytes):
    """Guards against misreading a stock engine, and against bytes that a stock coordinator misreads."""
    encoded, (engine, stats, wave_complete, start_wave) = ENGINE[meaning]
    assert encoded == data
    message = wire.decode_engine_message(data)
    assert (message.engine_index, message.scheduler_stats) == (engine, stats)
    assert (message.wave_complete, message.start_wave) == (wave_complete, start_wave)
    assert message.timestamp == 1.5
    assert bytes(message.outputs) == b"\x90"


def test_what_engines_hear():
    """Guards against a START that stock engines do not take, or take for another wave."""
    frames = {v["meaning"]: [bytes.fromhex(f) for f in v["frames"]] for v in VECTORS["coordinator_to_engine"]}
    assert frames == {
        "ready": [wire.READY],
        "start wave 5, exclude engine 2": wire.encode_start(5, 2),
        "start wave 5, exclude nobody": wire.encode_start(5, None),
    }
    assert wire.decode_start(frames["start wave 5, exclude engine 2"][1]) == StartMessage(5, 2)
    assert wire.decode_start(frames["start wave 5, exclude nobody"][1]) == StartMessage(5, None)
    assert wire.decode_start(pack([5])) == StartMessage(5, None)


STATES = {
    "counts of 2 engines [waiting, running, kv_cache_usage], wave 3, running": (
        ([[1, 2, 0.5], [0, 4, 0.0]], 3, True),
        StateMessage([Counts(1, 2, 0.5), Counts(0, 4, 0.0)], 3, True),
    ),
    "state change only: wave 4, paused": ((None, 4, False), StateMessage(None, 4, False)),
    "counts as the August 2025 release sent them, two numbers an engine": (
        ([[1, 2], [0, 4]], 3, True),
        StateMessage([Counts(1, 2), Counts(0, 4)], 3, True),
    ),
}


@pytest.mark.parametrize(("meaning", "data"), vectors("coordinator_to_frontend").items())
def test_what_front_ends_hear(meaning: str, data: bytes):
    """Guards against counts that stock front-ends of either release cannot read."""
    arguments, message = STATES[meaning]
    assert wire.encode_state(*arguments) == data
    assert wire.decode_state(data) == message
    counts, wave, running = arguments
    assert wire.encode_state(counts and [tuple(c) for c in counts], wave, running) == data


def test_what_front_ends_send():
    """Guards against misreading a stock front-end: subscriptions, first requests in both forms, scaling."""
    golden = vectors("frontend_to_coordinator")
    assert golden.pop("subscribe") == wire.SUBSCRIBE
    assert golden.pop("unsubscribe") == wire.UNSUBSCRIBE
    by_integer = golden.pop("first request while paused: engine 2 got it, stamped wave 3 (integer rank)")
    by_identity = golden.pop(
        "the same as 0.32.0 sends it: the engine named by its two-byte little-endian identity"
    )
    scale = golden.pop("elastic scale to 6 engines")
    assert golden == {}
    assert wire.encode_first_request(2, 3) == by_integer
    assert pack((b"\x02\x00", 3)) == by_identity
    assert wire.encode_scale(6) == scale
    assert wire.decode_frontend_message(by_integer) == FirstRequestMessage(2, 3)
    assert wire.decode_frontend_message(by_identity) == FirstRequestMessage(2, 3)
    assert wire.decode_frontend_message(scale) == ScaleMessage(6)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ((None, 0), FirstRequestMessage(None, 0)),
        ((0, 7), FirstRequestMessage(0, 7)),
        ((65535, 7), FirstRequestMessage(65535, 7)),
        ((b"\x00\x01", 7), FirstRequestMessage(256, 7)),
        ((b"\xff\xff", 7), FirstRequestMessage(65535, 7)),
        ((2, 3, "new field", {"more": 1}), FirstRequestMessage(2, 3)),
        (("SCALE_ELASTIC_EP", 0), ScaleMessage(0)),
        (("SCALE_ELASTIC_EP", 6, None), ScaleMessage(6)),
        (("DPSHM_DRAIN", 3), DrainMessage(3, True)),
        (("DPSHM_UNDRAIN", 3), DrainMessage(3, False)),
        (("DPSHM_HEARD", 0, b"\x05\x80"), HeardMessage((0, 2, 15))),
        (("DPSHM_HEARD", 0, b""), HeardMessage(())),
    ],
)
def test_front_end_messages_that_are_good(sent: tuple[object, ...], message: object):
    """Guards against refusing what other releases send: either name of an engine, new trailing fields."""
    decoded = wire.decode_frontend_message(pack(sent))
    assert decoded == message
    assert type(decoded) is type(message)


@pytest.mark.parametrize("drained", [True, False])
def test_our_own_messages_come_back(drained: bool):
    """Guards against encoders and decoders of our own messages that disagree."""
    assert wire.decode_frontend_message(wire.encode_first_request(None, 9)) == FirstRequestMessage(None, 9)
    ranks = (0, 7, 8, 4095)
    assert wire.decode_frontend_message(wire.encode_heard(ranks)) == HeardMessage(ranks)
    assert len(wire.encode_heard(range(4096))) < wire.MAX_UPSTREAM_BYTES
    assert wire.decode_frontend_message(wire.encode_drain(4095, drained)) == DrainMessage(4095, drained)


def test_fields_that_are_missing_or_new():
    """Guards against an engine of another release whose every message is dropped."""
    assert wire.decode_engine_message(pack((3,))) == EngineMessage(3)
    long = wire.decode_engine_message(pack((0, (), None, 1.5, None, None, 4, None, None, "new", [1], {"a": 2})))
    assert (long.wave_complete, long.start_wave) == (4, None)
    stats = {"num_running_reqs": 1, "kv_cache_usage": 1, "something_new": {"deep": [1, None]}}
    assert wire.decode_engine_message(pack((0, (), stats))).scheduler_stats == SchedulerStats(
        num_running_reqs=1, kv_cache_usage=1.0
    )
    outputs = [{"request_id": "x", "new_token_ids": [1, 2], "blob": b"\0" * 9}]
    assert bytes(wire.decode_engine_message(pack((0, outputs))).outputs) == pack(outputs)
    assert wire.decode_state(pack(([[1, 2, 0.5, "new"]], 3, True, "new"))).counts == [Counts(1, 2, 0.5)]


def nested(depth: int, kind: bytes = b"\x91") -> bytes:
    """Arrays, or maps, inside each other."""
    return kind * depth


def engine_message(**stats: object) -> bytes:
    """An engine's report with these fields."""
    return pack((0, (), stats))


BAD_ENGINE = {
    "nothing": b"",
    "no array": pack(5),
    "a map": pack({"engine_index": 0}),
    "no engine": pack(()),
    "trailing bytes": pack((0,)) + b"\0",
    "truncated": wire.encode_wave_complete(0, 4)[:-1],
    "engine is nil": pack((None,)),
    "engine is a bool": pack((True,)),
    "engine is a float": pack((1.0,)),
    "engine is negative": pack((-1,)),
    "engine is text": pack(("0",)),
    "engine is huge": pack((1 << 63,)),
    "stats are an array": pack((0, (), [1, 2])),
    "a count is a bool": engine_message(num_running_reqs=True),
    "a count is negative": engine_message(num_waiting_reqs=-1),
    "a count is a float": engine_message(num_waiting_reqs=2.0),
    "a count is huge": engine_message(step_counter=1 << 62),
    "usage is text": engine_message(kv_cache_usage="0.5"),
    "usage is nil": engine_message(kv_cache_usage=None),
    "wave_complete is a bool": pack((0, (), None, 0.0, None, None, True)),
    "wave_complete is negative": pack((0, (), None, 0.0, None, None, -1)),
    "start_wave is a float": pack((0, (), None, 0.0, None, None, None, 5.0)),
    "start_wave is text": pack((0, (), None, 0.0, None, None, None, "5")),
    "nested outputs": b"\x92\x00" + nested(100_000),
    "nested statistics": b"\x93\x00\x90\x81\xa1x" + nested(100_000),
    "nested new field": b"\x9a\x00\x90\xc0\x00\xc0\xc0\xc0\xc0\xc0" + nested(100_000, b"\x81\xa1a"),
    "an array of four thousand million": b"\xdd\xff\xff\xff\xff",
    "outputs of four thousand million": b"\x92\x00\xdd\xff\xff\xff\xff",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}
BAD_FRONTEND = {
    "nothing": b"",
    "no array": pack(5),
    "one item": pack((2,)),
    "engine is a bool": pack((True, 3)),
    "engine is negative": pack((-1, 3)),
    "engine is too large": pack((65536, 3)),
    "engine is a float": pack((2.0, 3)),
    "engine is an array": pack(([2], 3)),
    "engine is a map": pack(({}, 3)),
    "engine is a map of maps": bytes.fromhex("92818080") + b"\x03",
    "identity of no bytes": pack((b"", 3)),
    "identity of one byte": pack((b"\x02", 3)),
    "identity of three bytes": pack((b"\x02\x00\x00", 3)),
    "identity as text": pack(("\x02\x00", 3)),
    "another word": pack(("SCALE", 6)),
    "the word as bytes": pack((b"SCALE_ELASTIC_EP", 6)),
    "text that is not text": b"\x92\xa2\xff\xfe\x03",
    "an extension": b"\x92\xd4\x05\xfe\x03",
    "a time": b"\x92\xd6\xff\x00\x00\x00\x00\x03",
    "an impossible time": b"\x92\xc7\x0c\xff" + b"\0" * 4 + b"\x7f" + b"\xff" * 7 + b"\x03",
    "wave is nil": pack((2, None)),
    "wave is a bool": pack((2, True)),
    "wave is negative": pack((2, -1)),
    "wave is a float": pack((2, 3.0)),
    "wave is huge": pack((2, 1 << 62)),
    "scale to a float": pack(("SCALE_ELASTIC_EP", 6.0)),
    "drain a bool": pack(("DPSHM_DRAIN", True)),
    "nested arrays": b"\x92" + nested(100_000) + b"\x03",
    "nested maps": b"\x92" + nested(100_000, b"\x81\xc0") + b"\x03",
}
BAD_STATE = {
    "nothing": b"",
    "counts are a number": pack((3, 3, True)),
    "a rank has one number": pack(([[1]], 3, True)),
    "a rank is a number": pack(([1, 2], 3, True)),
    "a count is negative": pack(([[-1, 2]], 3, True)),
    "running is a number": pack((None, 3, 1)),
    "running is missing": pack((None, 3)),
    "wave is nil": pack((None, None, True)),
}
BAD_START = {
    "nothing": b"",
    "no wave": pack(()),
    "wave is nil": pack((None, 2)),
    "wave is negative": pack((-5, 2)),
    "exclude is a bool": pack((5, True)),
    "exclude is an identity": pack((5, b"\x02\x00")),
    "the ready message": wire.READY,
}
BAD: list[Any] = [
    pytest.param(decode, data, id=f"{decode.__name__}: {what}")
    for decode, cases in (
        (wire.decode_engine_message, BAD_ENGINE),
        (wire.decode_frontend_message, BAD_FRONTEND),
        (wire.decode_state, BAD_STATE),
        (wire.decode_start, BAD_START),
    )
    for what, data in cases.items()
]


@pytest.mark.parametrize(("decode", "data"), BAD)
def test_what_is_not_a_message(decode: Any, data: bytes):
    """Guards against a hostile or broken peer whose bytes are taken for a message, or end the thread."""
    with pytest.raises(WireError, match=r"^not ") as caught:
        decode(data)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # one traceback, not two
    assert len(str(caught.value)) < 400


def test_a_message_as_deep_as_the_stack_allows():
    """Guards against data that decodes and then fails where its error is put into words."""
    for depth in range(1, 1100, 3):
        for kind in (b"\x91", b"\x81\xc0"):
            with pytest.raises(WireError):
                wire.decode_frontend_message(b"\x92" + nested(depth, kind) + b"\xc0\x03")


def test_a_usage_that_is_not_a_number_passes():
    """Guards against dropping a stock engine's counts, which are good, with its odd usage; packing settles it."""
    stats = wire.decode_engine_message(engine_message(num_waiting_reqs=2, kv_cache_usage=math.nan)).scheduler_stats
    assert stats is not None
    assert stats.num_waiting_reqs == 2
    assert math.isnan(stats.kv_cache_usage)


def test_every_message_of_ours_is_small():
    """Guards against a limit of the sockets that drops honest messages of the largest group."""
    largest = wire.encode_state([(1 << 23, 1 << 24, 0.5)] * 4096, (1 << 31) - 1, True)
    assert len(largest) < wire.MAX_MESSAGE_BYTES // 2
