"""Reading traces: both formats, and every kind of damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm.errors import DpshmError
from dpshm.sim.workloads.traces import MAX_LINE_BYTES, Arrival, TraceError, read_trace

AZURE = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:17:03.9799600,4808,10\r\n"
    b"2023-11-16 18:17:04.0319600,3180,8\r\n"
    b"2023-11-16 18:18:03.9799600,110,0"
)
MOONCAKE = (
    b'{"timestamp": 3000, "input_length": 600, "output_length": 500, "hash_ids": [0, 1]}\n'
    b'{"timestamp": 6001, "input_length": 20, "output_length": 3, "hash_ids": [46]}\n'
)


@pytest.fixture
def write(tmp_path):
    """Writes a trace file."""

    def write(data: bytes, name: str = "trace") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def test_azure(write):
    """Guards against a wrong time zone, dropped digits, Windows line ends and a last line without an end."""
    arrivals = read_trace(write(AZURE))
    assert [(a.prompt_tokens, a.output_tokens) for a in arrivals] == [(4808, 10), (3180, 8), (110, 1)]
    assert [a.time_s for a in arrivals] == pytest.approx([0, 0.052, 60], abs=1e-5)


def test_azure_with_zone_byte_order_mark_and_more_columns(write):
    """Guards against refusing the 2024 files, which carry a zone, or a file that an editor has touched."""
    data = (
        b"\xef\xbb\xbfGeneratedTokens,TIMESTAMP,Region,ContextTokens\n"
        b"7,2024-05-10 00:00:00.009930+00:00,eu,300\n"
        b"\n"
        b"9,2024-05-10 02:00:01.009930+02:00,us,400\n"
    )
    assert read_trace(write(data)) == [Arrival(0.0, 300, 7), Arrival(pytest.approx(1.0), 400, 9)]


def test_mooncake(write):
    """Guards against milliseconds taken for seconds, and against losing the block hashes."""
    assert read_trace(write(MOONCAKE)) == [
        Arrival(0.0, 600, 500, (0, 1)),
        Arrival(pytest.approx(3.001), 20, 3, (46,)),
    ]


def test_format_is_told_by_content_not_by_name(write):
    """Guards against trusting a suffix."""
    assert len(read_trace(write(MOONCAKE, "trace.csv"))) == 2
    assert len(read_trace(write(AZURE, "trace.jsonl"))) == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (AZURE[:41], "no requests"),
        (b"hello world\n", "neither known format"),
        (b"\x00\xff\x80" * 50, "neither known format"),
        (b"\x1f\x8b\x08\x00rest", "gunzip"),
        (AZURE[:-6], r"line 4: 1 column.*cut off"),
        (AZURE.replace(b"3180", b"-3"), r"line 3: ContextTokens '-3'"),
        (AZURE.replace(b"3180", b"0"), r"line 3: ContextTokens '0'"),
        (AZURE.replace(b"3180", b"3_1"), r"line 3: ContextTokens '3_1'"),
        (AZURE.replace(b"3180", "٣".encode()), r"line 3: ContextTokens"),
        (AZURE.replace(b"3180", b"9" * 5000), r"line 3: ContextTokens '9+' is no whole number"),
        (AZURE.replace(b"3180", b"10000001"), r"line 3: ContextTokens"),
        (AZURE.replace(b"18:17:04", b"18:77:04"), r"line 3: TIMESTAMP"),
        (AZURE.replace(b"2023-11-16 18:17:04.0319600", b""), r"line 3: TIMESTAMP ''"),
        (AZURE.replace(b"18:18:03", b"18:16:03"), r"line 4: is 60.052 s earlier"),
        (AZURE.replace(b",8\r", b",8,8\r"), r"line 3: 4 column"),
        (MOONCAKE[:-20], r"line 2: not a Mooncake request.*cut off"),
        (MOONCAKE.replace(b"20,", b'"20",'), r"line 2:.*input_length"),
        (MOONCAKE.replace(b"20,", b"0,"), r"line 2:.*input_length"),
        (MOONCAKE.replace(b"input_length", b"inputs"), r"line 1:.*input_length"),
        (MOONCAKE.replace(b"6001", b"NaN"), r"line 2"),
        (MOONCAKE.replace(b"6001", b"1e999"), r"line 2"),
        (MOONCAKE.replace(b"6001", b"2999"), r"line 2: is 0.001 s earlier"),
        (MOONCAKE + b"{" * 5000 + b"\n", r"line 3"),
        (b"a" * (MAX_LINE_BYTES + 1), "longer than"),
    ],
)
def test_damage_is_named_with_its_place(write, data, says):
    """Guards against silent wrong arrivals, and against an error that does not say where and what."""
    path = write(data)
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_missing_file_and_directory(tmp_path):
    """Guards against a bare OSError for the commonest mistake."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(TraceError, match="cannot read"):
            read_trace(path)


def test_error_is_a_dpshm_error():
    """Guards against an error that the command line would show as a traceback."""
    assert issubclass(TraceError, DpshmError)


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=400), st.binary(max_size=200).map(lambda b: AZURE + b"\n" + b)))
def test_arbitrary_bytes_raise_only_trace_error(tmp_path_factory, data):
    """Guards against any other exception, whatever the file holds."""
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    try:
        arrivals = read_trace(path)
    except TraceError:
        return
    assert all(a.prompt_tokens >= 1 and a.output_tokens >= 1 and a.time_s >= 0 for a in arrivals)


@settings(max_examples=300)
@given(data=st.data(), source=st.sampled_from([AZURE, MOONCAKE]))
def test_damaged_traces_raise_only_trace_error(tmp_path_factory, data, source):
    """Guards against the same in files that are nearly right: some bytes overwritten, the end cut off."""
    damaged = bytearray(source)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        arrivals = read_trace(path)
    except TraceError:
        return
    assert [a.time_s for a in arrivals] == sorted(a.time_s for a in arrivals)
