"""Any bytes: a decoder returns a message of its kind or raises `WireError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm.errors import WireError
from dpshm.net import wire
from tests.stock_wire import encode_stats

deterministic = settings(deadline=None, derandomize=True, max_examples=200)
DECODERS = (wire.decode_engine_message, wire.decode_frontend_message, wire.decode_start, wire.decode_state)
VECTORS = json.loads((Path(__file__).parents[1] / "data" / "wire-vllm-0.32.json").read_text())
GOLDEN = [
    bytes.fromhex(code)
    for link, vectors in VECTORS.items()
    if link != "vllm"
    for vector in vectors
    for code in vector.get("frames", [vector.get("hex")])
]

KEYS = st.one_of(st.text(max_size=4), st.integers(-(1 << 63), (1 << 64) - 1), st.binary(max_size=3), st.booleans())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.builds(msgspec.msgpack.Ext, st.integers(-128, 127).filter(lambda code: code != -1), st.binary(max_size=4)),
    st.sampled_from([wire.SCALE, wire.DRAIN, wire.UNDRAIN, b"\x02\x00"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)
STATS = st.dictionaries(
    st.sampled_from([*wire.SchedulerStats.__struct_fields__, "another"]), st.one_of(SCALARS, VALUES), max_size=4
)
COUNT = st.integers(0, (1 << 62) - 1)


def check(data: bytes) -> None:  # noqa: C901 - a case for each message
    """Every decoder gives what it promises, or `WireError`."""
    for decode in DECODERS:
        try:
            message = decode(data)
        except WireError as error:
            assert len(str(error)) < 1000  # noqa: PT017
            continue
        numbers: list[Any] = []
        match message:
            case wire.EngineMessage():
                numbers = [message.engine_index, message.wave_complete, message.start_wave]
                if (stats := message.scheduler_stats) is not None:
                    numbers += [stats.num_running_reqs, stats.num_waiting_reqs, stats.step_counter]
                    numbers.append(stats.current_wave)
                    assert type(stats.kv_cache_usage) is float
            case wire.FirstRequestMessage(engine, wave):
                assert engine is None or engine < wire.ENGINE_LIMIT
                numbers = [engine, wave]
            case wire.ScaleMessage(number) | wire.DrainMessage(number):
                numbers = [number]
            case wire.HeardMessage(ranks):
                numbers = [*ranks, 4095 - max((0, *ranks))]
            case wire.StartMessage():
                numbers = [message.wave]
                assert message.exclude is None or type(message.exclude) is int
            case wire.StateMessage():
                numbers = [message.wave]
                assert type(message.running) is bool
                for counts in message.counts or ():
                    numbers += [counts.waiting, counts.running]
                    assert type(counts.kv_cache_usage) is float
        assert all(n is None or (type(n) is int and 0 <= n < 1 << 62) for n in numbers)


@deterministic
@given(data=st.binary(max_size=64))
def test_random_bytes(data: bytes):
    """Guards against bytes that end the wave thread, or another process that decodes them."""
    check(data)


@pytest.mark.slow
@deterministic
@given(value=VALUES)
def test_any_value_that_is_msgpack(value: object):
    """Guards against well-formed messages of the wrong shape that raise something else."""
    check(msgspec.msgpack.encode(value))


@pytest.mark.slow
@deterministic
@given(items=st.lists(VALUES, max_size=10), stats=STATS, engine=SCALARS)
def test_arrays_that_are_almost_messages(items: list[object], stats: dict[str, object], engine: object):
    """Guards against a wrong value in one field of a message that is right in the others."""
    check(msgspec.msgpack.encode([engine, *items]))
    check(msgspec.msgpack.encode([0, (), stats, *items]))
    check(msgspec.msgpack.encode([engine, 3]))


@deterministic
@given(golden=st.sampled_from(GOLDEN), data=st.data())
def test_golden_messages_with_changed_bytes(golden: bytes, data: st.DataObject):
    """Guards against damage to a real message that passes for another one, with numbers out of range."""
    damaged = bytearray(golden)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(damaged))
    check(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


@pytest.mark.parametrize("golden", [g for g in GOLDEN if len(g) > 1], ids=lambda g: g.hex()[:16])
def test_a_message_that_is_cut_is_none(golden: bytes):
    """Guards against a part of a message that is taken for the whole."""
    for end in range(len(golden)):
        for decode in DECODERS:
            with pytest.raises(WireError):
                decode(golden[:end])


@deterministic
@given(
    engine=st.integers(0, 65535),
    wave=st.integers(0, 2**31 - 1),
    number=COUNT,
    usage=st.floats(allow_nan=False),
    running=st.booleans(),
)
def test_what_is_encoded_is_decoded(engine: int, wave: int, number: int, usage: float, running: bool):
    """Guards against a number that comes out of its message as another."""
    stats = wire.SchedulerStats(
        num_running_reqs=number,
        num_waiting_reqs=wave,
        step_counter=number,
        current_wave=wave,
        kv_cache_usage=usage,
    )
    report = wire.decode_engine_message(encode_stats(engine, stats, timestamp=usage))
    assert (report.engine_index, report.scheduler_stats, report.timestamp) == (engine, stats, usage)
    completed = wire.decode_engine_message(wire.encode_wave_complete(engine, wave))
    assert (completed.engine_index, completed.wave_complete, completed.start_wave) == (engine, wave, None)
    started = wire.decode_engine_message(wire.encode_wave_started(engine, wave))
    assert (started.engine_index, started.wave_complete, started.start_wave) == (engine, None, wave)
    assert wire.decode_start(wire.encode_start(wave, engine)[1]) == wire.StartMessage(wave, engine)
    assert wire.decode_frontend_message(wire.encode_first_request(engine, wave)) == (engine, wave)
    identity = msgspec.msgpack.encode((engine.to_bytes(2, "little"), wave))
    assert wire.decode_frontend_message(identity) == (engine, wave)
    assert wire.decode_frontend_message(wire.encode_scale(number)) == (number,)
    assert wire.decode_frontend_message(wire.encode_drain(number, running)) == (number, running)
    three = wire.decode_state(wire.encode_state([(number, wave, usage)] * 3, wave, running))
    assert three == wire.StateMessage([wire.Counts(number, wave, usage)] * 3, wave, running)
    two = wire.decode_state(wire.encode_state([(number, wave)], wave, running))
    assert two == wire.StateMessage([wire.Counts(number, wave, 0.0)], wave, running)
