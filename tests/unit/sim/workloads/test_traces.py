"""Reading traces: every format with its units, where reading stops, and every kind of damage."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm.errors import DpshmError, SettingError
from dpshm.sim.workloads.traces import MAX_LINE_BYTES, Arrival, TraceError, Units, read_trace
from tests.unit.sim.workloads.samples import REQUESTS, SAMPLES, TIMES_S, hashes, json_lines, table

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
    arrivals = read_trace(write(AZURE)).arrivals
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
    assert read_trace(write(data)).arrivals == [Arrival(0.0, 300, 7), Arrival(pytest.approx(1.0), 400, 9)]


def test_mooncake(write):
    """Guards against milliseconds taken for seconds, and against losing the block hashes."""
    assert read_trace(write(MOONCAKE)).arrivals == [
        Arrival(0.0, 600, 500, (0, 1)),
        Arrival(pytest.approx(3.001), 20, 3, (46,)),
    ]


def test_format_is_told_by_content_not_by_name(write):
    """Guards against trusting a suffix."""
    assert len(read_trace(write(MOONCAKE, "trace.csv")).arrivals) == 2
    assert len(read_trace(write(AZURE, "trace.jsonl")).arrivals) == 3


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_gives_the_same_arrivals(write, name):
    """Guards against seconds taken for milliseconds, and 16 tokens a hash for 512."""
    arrivals, block_tokens, described = read_trace(write(SAMPLES[name]))
    assert [a.time_s for a in arrivals] == pytest.approx(TIMES_S)
    assert [(a.prompt_tokens, a.output_tokens) for a in arrivals] == list(REQUESTS)
    block = {"Mooncake": 512, "Qwen-Bailian": 16, "vLLM timed": 16}.get(name, 0)
    assert block_tokens == block
    assert described.startswith(name.partition(" ")[0])
    assert [list(a.block_hashes) for a in arrivals] == (hashes(block) if block else [[]] * 4)


def test_failed_requests_of_burstgpt(write):
    """Guards against a public file of a million lines that is refused for its failed requests."""
    data = table("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", "{time},ChatGPT,0,0,0,x")
    assert [(a.prompt_tokens, a.output_tokens) for a in read_trace(write(data)).arrivals] == [(1, 1)] * 4


@pytest.mark.parametrize(
    ("data", "units", "described"),
    [
        (json_lines(16, 1000), Units("ms"), "trace, times in ms, 16 tokens a hash"),
        (json_lines(64, 1.0), Units("s"), "trace, times in s, 64 tokens a hash"),
        (json_lines(512, 1.0), Units("s"), "trace, times in s, 512 tokens a hash"),
        (json_lines(48, 1.0), Units("s", 48), "trace, times in s, 48 tokens a hash"),
        (table("timestamp,input_tokens,output_tokens", "{time},{i},{o}"), Units("s"), "trace, times in s"),
        (SAMPLES["Mooncake"], Units("us"), "Mooncake, times in us, 512 tokens a hash"),
    ],
)
def test_units_that_are_not_told(write, data, units, described):
    """Guards against other units that are taken for Mooncake's, and an option that changes nothing."""
    path = write(data)
    if units.time_unit != "us":
        with pytest.raises(TraceError, match="name it with --time-unit"):
            read_trace(path)
    trace = read_trace(path, units)
    assert trace.described == described
    last_s = {"us": 2e-3}.get(units.time_unit, 2.0)
    assert trace.arrivals[-1].time_s == pytest.approx(last_s)


def test_hashes_that_do_not_tell_their_size(write):
    """Guards against a size that is made up where the prompts contradict each other or their format."""
    some = b'{"timestamp": 0.5, "input_length": 521, "output_length": 1, "hash_ids": [1, 2, 3, 4, 5]}\n'
    other = b'{"timestamp": 0.75, "input_length": 100, "output_length": 1, "hash_ids": [1, 2, 3, 4, 5]}\n'
    assert read_trace(write(some + other), Units("s")).block_tokens == 0
    assert read_trace(write(some + other), Units("s", 24)).block_tokens == 24
    assert read_trace(write(some.replace(b"{", b'{"chat_id": 1, "parent_chat_id": -1, ', 1))).block_tokens == 0
    assert read_trace(write(some), Units("s")).block_tokens == 128


def prompts(*tokens: int, per_line_s: float = 1) -> bytes:
    """One request a second, in blocks of 16 tokens, as ``vllm bench serve`` reads them."""
    line = '{{"timestamp": {}, "input_length": {}, "output_length": 1, "hash_ids": {}}}'
    each = (line.format(i * per_line_s, count, [1] * -(-count // 16)) for i, count in enumerate(tokens))
    return "\n".join(each).encode()


def test_short_prompts_do_not_tell_their_size(write):
    """Prompts that fit in one block of either documented size are refused, not taken for Mooncake's."""
    path = write(prompts(10, 12, 9, 16))
    with pytest.raises(TraceError, match="name it with --time-unit"):
        read_trace(path)
    assert read_trace(path, Units("s")).described == "trace, times in s"
    assert read_trace(path, Units("s", 16)).block_tokens == 16


def test_a_few_long_prompts_tell_the_size(write):
    """Nearly all prompts fit both sizes here, and all of them fit 16."""
    tokens = [10] * 95 + [900] * 5
    with pytest.raises(TraceError, match="name it with --time-unit"):  # whole seconds, or milliseconds
        read_trace(write(prompts(*tokens)))
    trace = read_trace(write(prompts(*tokens, per_line_s=0.25)))
    assert trace.described == "vLLM's timed trace, times in s, 16 tokens a hash"
    assert trace.arrivals[-1].time_s == pytest.approx(99 / 4)


def test_fields_in_quotes(write):
    """A table whose fields an editor or a script has quoted is read, a comma within the quotes too."""
    quoted = (
        b'"TIMESTAMP", "Region, zone", "ContextTokens","GeneratedTokens"\n"2023-11-16T18:17:03Z","eu, 1","7","5"\n'
    )
    assert read_trace(write(quoted)).arrivals == [Arrival(0.0, 7, 5)]
    with pytest.raises(TraceError, match=r"line 3: 1 column"):
        read_trace(write(quoted + b'"2023-11-16T18:17:04Z,"\n'))


def test_only_full_blocks_have_hashes(write):
    """Guards against a size that is told only where the last block of a prompt, which is not full, has a hash."""
    lines = [
        f'{{"timestamp": {i}.5, "input_length": {tokens}, "output_length": 1, "hash_ids": {[1] * (tokens // 16)}}}'
        for i, tokens in enumerate((100, 233, 1000))
    ]
    assert read_trace(write("\n".join(lines).encode())).block_tokens == 16


def test_dates_have_no_unit(write):
    """Guards against an option that is ignored."""
    with pytest.raises(TraceError, match="leave --time-unit out"):
        read_trace(write(AZURE), Units("ms"))
    for wrong in (Units("min"), Units("s", -1)):
        with pytest.raises(SettingError, match="choose"):
            read_trace(write(MOONCAKE), wrong)


def every(unit: float, block: int, *, whole: bool = True, **more: object) -> bytes:
    """300 requests at two a second, with times in a unit that is so many to a second."""
    times = (unit * i / 2 for i in range(300))
    lines = (
        {**more, "timestamp": int(time) if whole else time + 0.25, "input_length": 7000, "output_length": 9}
        | {"hash_ids": list(range(-(-7000 // block)))}
        for time in times
    )
    return "\n".join(json.dumps(line) for line in lines).encode()


def at_two(header: str, line: str, unit: float) -> bytes:
    """The same as CSV, without hashes."""
    return "\n".join([header, *(line.format(unit * i / 2) for i in range(300))]).encode()


QWEN = {"chat_id": 1, "parent_chat_id": -1, "turn": 1}


@pytest.mark.parametrize(
    ("data", "unit", "rate"),
    [
        (every(1, 512), "s", "2007 requests a second"),  # as Mooncake's, in whole seconds
        (every(1e6, 512), "us", "one request in 500 s"),
        (every(1e3, 16, **QWEN), "ms", "one request in 500 s"),
        (every(1e3, 16, whole=False), "ms", "one request in 500 s"),  # as vLLM's, in ms with fractions
        (
            at_two("request_id,timestamp,input_tokens,output_tokens", "1,{},20,5", 1e3),
            "ms",
            "one request in 500 s",
        ),
        (
            at_two("Timestamp,Model,Request tokens,Response tokens", "{},GPT-4,20,5", 1e3),
            "ms",
            "one request in 500 s",
        ),
    ],
)
def test_a_unit_that_makes_no_sense_is_asked_for(write, data, unit, rate):
    """Times in another unit than the format's are not replayed 1,000 times too fast or too slow."""
    path = write(data)
    with pytest.raises(TraceError, match=f"has {rate}: say --time-unit") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)
    arrivals = read_trace(path, Units(unit)).arrivals
    assert len(arrivals) / arrivals[-1].time_s == pytest.approx(2, rel=0.01)


def test_columns_in_another_case_and_numbers_of_pandas(write):
    """A table that a script has written again is read: names in lower case, whole numbers with a point."""
    data = AZURE.replace(b"TIMESTAMP,ContextTokens", b"timestamp,contexttokens").replace(b",4808,", b",4808.0,")
    assert read_trace(write(data)).arrivals == read_trace(write(AZURE, "other")).arrivals


def test_no_hashes_is_none_or_an_empty_list(write):
    """A request whose hashes are null is one without hashes."""
    lines = MOONCAKE.replace(b"[0, 1]", b"null").replace(b"[46]", b"[]")
    assert [a.block_hashes for a in read_trace(write(lines), Units("ms")).arrivals] == [(), ()]


def tar(data: bytes) -> bytes:
    """A tar archive of one file."""
    archive, member = io.BytesIO(), tarfile.TarInfo("trace.csv")
    member.size = len(data)
    with tarfile.open(fileobj=archive, mode="w") as file:
        file.addfile(member, io.BytesIO(data))
    return archive.getvalue()


CHAT = b'[{"from": "human", "value": "\\"prompt\\": hi"}, {"from": "gpt", "value": "yes"}]'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[{"id": "QWJhYvA_0", "conversations": ' + CHAT + b"}]", "is ShareGPT"),
        (b'[\n  {\n    "id": "QWJhYvA_0",\n    "conversations": ' + CHAT + b"\n  }\n]\n", "is ShareGPT"),
        (b'{"id": "QWJhYvA_0", "conversations": ' + CHAT + b"}\n", "is ShareGPT"),
        (b'[{"id": "a", "conversations": ' + CHAT + b"}," + b" " * MAX_LINE_BYTES + b"]", "is ShareGPT"),
        (
            b'{"conversation_id": "a", "model": "vicuna", "conversation": [{"content": "hi"}], "turn": 1}',
            "is LMSYS",
        ),
        (b'{"conversation_hash": "a", "timestamp": "2023", "conversation": [{"content": "hi"}]}', "is WildChat"),
        (b'{"prompt": "hi", "prompt_tokens_count": 1, "output_tokens_count": 3}', "is a GuideLLM dataset"),
        (b'{"metadata": {"version": 1},\n "benchmarks": [{"requests": {}}]}', "is a GuideLLM report"),
        (
            b'{"session_id": "s1", "turns": [{"text": "hi"}, {"text": "and?", "delay": 1000}]}',
            "is AIPerf sessions",
        ),
        (b'{"session_id": "s1", "delay": 10, "input_length": 5, "output_length": 3}', "is AIPerf sessions"),
        (
            MOONCAKE + b'{"session_id": "s1", "delay": 10, "input_length": 5, "output_length": 3}',
            "3: is AIPerf sess",
        ),
        (b'{"custom_id": "1", "method": "POST", "url": "/v1", "body": {"messages": []}}', "is an OpenAI batch"),
        (
            b'{"request_id": 0, "type": "text", "input_length": 61, "output_length": 2370, "duration": 1}',
            "offline",
        ),
        (b'{"prompt": "hi"}\n', "is a dataset of prompts"),
        (b'{"a": 1, "b": [2]}\n', "JSON with the keys a, b, and no trace"),
        (b"[1, 2, 3]\n", "is one JSON array.*jq -c"),
        (b'{\n"a": 1\n}\n', "one JSON value over several lines"),
        (b"PK\x03\x04rest", "unzip"),
        (AZURE.replace(b",", b";"), "semicolons between its columns, where a trace has commas"),
        (AZURE.replace(b",", b"\t"), "tabs between its columns"),
        (tar(AZURE), "tar archive: unpack"),
        (gzip.compress(tar(AZURE)), "tar archive: unpack"),
        (AZURE.replace(b",8\r", b",8,8\r"), r"line 3: 4 column\(s\) where the header has 3\. The line"),
        (b"PAR1rest", "Parquet"),
        (MOONCAKE.decode().encode("utf-16"), "is text in UTF-16.*iconv"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html></html>\n", "a page of the web"),
    ],
)
def test_other_files_are_refused_by_name(write, data, says):
    """Guards against a good file of another kind that is called a trace that was cut off."""
    path = write(data)
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "cut off" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_stops_where_the_replay_does(write):
    """Guards against a file of a month that is read for a demo of five seconds."""
    path = write(SAMPLES["ServeGen"] + b"4,3.0,10,10\n" * 1000 + b"rubbish\n")
    assert [a.time_s for a in read_trace(path, until_s=1.0).arrivals] == [0, 0.5, 1.25]
    assert [a.time_s for a in read_trace(path, until_s=1.25).arrivals] == [0, 0.5, 1.25]
    assert len(read_trace(path, most=2).arrivals) == 2
    with pytest.raises(TraceError, match="line 1006"):
        read_trace(path)


def test_reading_is_shown_and_can_be_ended(write, monkeypatch):
    """Guards against a wait without a word, which no Ctrl-C ends."""
    path = write(SAMPLES["ServeGen"] + b"4,3.0,10,10\n" * 1000)
    monkeypatch.setattr("dpshm.sim.workloads.traces.SHOW_INTERVAL_S", 0.0)
    shown = []
    assert len(read_trace(path, show=shown.append).arrivals) == 1004
    assert shown == [256, 512, 768]

    def end(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_trace(path, show=end)


@pytest.mark.parametrize("name", ["qwen_bailian.jsonl", "mooncake_conversation_trace.jsonl", "AzureLLM*_code.csv"])
def test_recorded_files(name):
    """Guards against formats that fit what this suite writes and not what is out there."""
    shared = Path(__file__).parents[5] / "shared"
    path = next(iter([*shared.glob(f"traces/{name}"), *shared.glob(f"cases/field/{name}")]), None)
    if path is None:
        pytest.skip(f"no {name} beside the repository")
    arrivals, block_tokens, described = read_trace(path)
    rates = {"Qwen": (1.5, 3), "Moon": (3, 4), "Azur": (2, 3)}
    least, most = rates[described[:4]]
    assert least < len(arrivals) / arrivals[-1].time_s < most
    assert block_tokens == {"Qwen": 16, "Moon": 512, "Azur": 0}[described[:4]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (AZURE[:41], "no requests"),
        (b"hello world\n", "no format that is known"),
        (b"\x00\xff\x80" * 50, "no format that is known"),
        (b"\x1f\x8b\x08\x00rest", "gzip-compressed and damaged or cut off"),
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
        (MOONCAKE[:-20], r"line 2: not a request.*cut off"),
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
        arrivals = read_trace(path).arrivals
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
        arrivals = read_trace(path).arrivals
    except TraceError:
        return
    assert [a.time_s for a in arrivals] == sorted(a.time_s for a in arrivals)
