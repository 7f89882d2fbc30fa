"""The formats of traces: known by their fields, never by a file's name.

The table of formats is in ``sim/README.md``. Mooncake's traces and those of ``vllm bench serve --dataset-name
timed_trace`` have the same fields and other units. The number of hashes of a prompt tells how many tokens a hash
is for, and that tells them apart (`tokens_per_hash`). Where it does not, or where the unit would give the requests
a rate that no such file has, nothing is guessed: `UnknownUnits` names the option that says it.

Sources: Azure Public Dataset (Patel et al., "Splitwise", ISCA 2024; Stojkovic et al., "DynamoLLM", HPCA 2025);
Wang et al., "BurstGPT", 2024; Xiang et al., "ServeGen", NSDI 2026; Qwen-Bailian usage traces (Alibaba, 2025); Qin
et al., "Mooncake", FAST 2025; vLLM 0.32.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Annotated, NamedTuple

import msgspec

MAX_TOKENS = 10_000_000
"""More in one request is taken for damage: it is ten times the longest context sold today."""

KNOWN = (
    "Azure 2023 and 2024, BurstGPT, ServeGen (CSV), Mooncake, Qwen-Bailian, vLLM's timed traces (JSON lines); "
    "each may be compressed (gzip, bzip2, xz, zstd)"
)
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


class Line(NamedTuple):
    """What one line says, in the units of its file.

    Attributes:
        time: in the file's unit; seconds if it is a date.
        prompt_tokens: at least 1.
        output_tokens: at least 0.
        hashes: one id for each block of the prompt; empty where the file has none.
    """

    time: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()


class Format(NamedTuple):
    """How a file is read.

    Attributes:
        name: what people call it; empty if only its fields are known, not where it is from.
        parse: reads a line; raises ValueError.
        time_unit: of its times, a key of `TIME_UNITS`; empty if its fields do not tell.
        block_tokens: prompt tokens that a hash is for; 0 if its fields do not tell.
        dated: its times are dates, so they have no unit.
    """

    name: str
    parse: Callable[[bytes], Line]
    time_unit: str = ""
    block_tokens: int = 0
    dated: bool = False


class UnknownUnits(Exception):
    """The units of a file cannot be told; the message names the option that says them."""


class UnknownFormat(Exception):
    """It is no trace that is known; the message says what it is, if that is known."""


_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
_TokensOrNone = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _JsonLine(msgspec.Struct, frozen=True):
    """What a line must hold; other keys are skipped."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Tokens
    output_length: _TokensOrNone
    hash_ids: tuple[int, ...] | None = ()


_json_decoder = msgspec.json.Decoder(_JsonLine)
_KEY = re.compile(rb'"(\w{1,64})"\s*:')
_TRACE_KEYS = {"timestamp", "input_length", "output_length"}

_OTHER_JSON: tuple[tuple[str, set[str], str], ...] = (
    ("ShareGPT", {"conversations"}, "conversations without times"),
    ("WildChat", {"conversation", "conversation_hash"}, "conversations, not arrivals with token counts"),
    ("LMSYS-Chat", {"conversation"}, "conversations without times"),
    ("AIPerf sessions", {"turns"}, "conversations whose turns follow one another, without arrival times"),
    ("AIPerf sessions", {"session_id", "delay"}, "turns that follow one another, without arrival times"),
    ("a GuideLLM report", {"benchmarks"}, "results of a benchmark"),
    ("a GuideLLM dataset", {"prompt_tokens_count"}, "prompts without times"),
    ("a GuideLLM dataset", {"output_tokens_count"}, "prompts without times"),
    ("an OpenAI batch", {"custom_id", "body"}, "requests without times"),
    ("ServeGen's offline traces", {"request_id", "input_length"}, "requests without times"),
    ("an AIBrix workload", {"timestamp", "requests"}, "lists of prompts"),
    ("a dataset of prompts", {"prompt"}, "prompts without times (GuideLLM, vLLM's custom dataset and others)"),
    ("a dataset of prompts", {"text_input"}, "prompts as text, without their lengths in tokens"),
    ("a dataset of prompts", {"messages"}, "prompts as text, without their lengths in tokens"),
    ("a dataset of prompts", {"text"}, "prompts as text, without their lengths in tokens"),
)


def other_json(head: bytes) -> str:
    """What a JSON file is that is no trace, for people, by the keys at its start; empty if that is not known."""
    keys = {match.decode() for match in _KEY.findall(head)}
    for name, needed, holds in _OTHER_JSON:
        if needed <= keys:
            return f"is {name}: {holds}"
    return ""


def json_format(first: bytes) -> Format:
    """The format of a file whose first line is this JSON object.

    Raises:
        UnknownFormat: it is not one.
    """
    keys = {match.decode() for match in _KEY.findall(first)}
    if not keys >= _TRACE_KEYS:
        if known := other_json(first):
            raise UnknownFormat(known)
        if "timestamp" not in keys:
            raise UnknownFormat(f"is JSON with {_listed(keys)}, and no trace that is known")
        # A trace with a field that is missing or misspelt: the parser names it.
    if {"chat_id", "parent_chat_id"} <= keys:
        return Format("Qwen-Bailian", _parse_json, "s", 16)
    return Format("", _parse_json)


def _listed(keys: set[str]) -> str:
    return "the keys " + ", ".join(sorted(keys)[:6]) if keys else "no keys"


def _parse_json(line: bytes) -> Line:
    try:
        found = _json_decoder.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        if known := other_json(line) if line.endswith(b"}") and b'"timestamp"' not in line else "":
            raise ValueError(f"{known}, where a request with a time should be") from None
        ends = "; a file that was cut off ends so" if not line.endswith(b"}") else ""
        raise ValueError(f"not a request of a trace ({e}){ends}") from None
    return Line(found.timestamp, found.input_length, found.output_length, found.hash_ids or ())


class _Columns(NamedTuple):
    name: str
    needed: tuple[str, ...]
    time: str
    prompt: str
    output: str
    time_unit: str
    least_prompt: int = 1
    dated: bool = False


_CSV = (
    _Columns("Azure", (), "TIMESTAMP", "ContextTokens", "GeneratedTokens", "", dated=True),
    # A failed request has 0 response tokens, and may have 0 request tokens.
    _Columns("BurstGPT", (), "Timestamp", "Request tokens", "Response tokens", "s", 0),
    _Columns("ServeGen", ("request_id",), "timestamp", "input_tokens", "output_tokens", "s"),
    _Columns("", (), "timestamp", "input_tokens", "output_tokens", ""),
    _Columns("", (), "timestamp", "input_length", "output_length", ""),
)


_TAR_AT = 257
"""Where the first block of a tar archive says that it is one."""
_SEPARATORS = {b";": "semicolons", b"\t": "tabs", b"|": "bars"}


def csv_format(header: bytes) -> Format:
    """The format of a file with this header, wherever its columns stand and in upper or lower case.

    Raises:
        UnknownFormat: it is not one.
    """
    names = [name.strip().lower() for name in _fields(header)]
    for columns in _CSV:
        needed = (*columns.needed, columns.time, columns.prompt, columns.output)
        if {name.lower() for name in needed} <= set(names):
            return Format(columns.name, _csv_parser(columns, names), columns.time_unit, dated=columns.dated)
    if header[_TAR_AT:].startswith(b"ustar"):
        raise UnknownFormat("is a tar archive: unpack it first, with tar -x")
    for separator, name in _SEPARATORS.items():
        if separator in header and b"," not in header:
            raise UnknownFormat(
                f"has {name} between its columns, where a trace has commas: write it again with commas"
            )
    raise UnknownFormat("has no format that is known")


def _csv_parser(columns: _Columns, names: list[str]) -> Callable[[bytes], Line]:
    at_time, at_prompt, at_output = (
        names.index(name.lower()) for name in (columns.time, columns.prompt, columns.output)
    )

    def parse(line: bytes) -> Line:
        fields = _fields(line)
        if len(fields) != len(names):
            ends = "; a file that was cut off ends so" if len(fields) < len(names) else ""
            raise ValueError(f"{len(fields)} column(s) where the header has {len(names)}{ends}")
        return Line(
            _date(columns.time, fields[at_time]) if columns.dated else _number(columns.time, fields[at_time]),
            max(1, _tokens(columns.prompt, fields[at_prompt], columns.least_prompt)),
            _tokens(columns.output, fields[at_output], 0),
        )

    return parse


def _fields(line: bytes) -> list[str]:
    text = line.decode("utf-8", "replace")
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], skipinitialspace=True))
    except csv.Error:
        return text.split(",")  # no quotes of CSV: what reads the fields says what is wrong


def _date(name: str, text: str) -> float:
    try:
        # Digits past the microsecond are dropped; a time without a zone is taken as UTC.
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{name} {text[:40]!r} is no time like 2023-11-16 18:17:03.9799600") from None


def _number(name: str, text: str) -> float:
    try:
        number = float(text) if len(text) <= 40 and "_" not in text else -1.0
    except ValueError:
        number = -1.0
    if not (isfinite(number) and number >= 0):
        raise ValueError(f"{name} {text[:40]!r} is no number of 0 or more")
    return number


def _tokens(name: str, text: str, least: int) -> int:
    digits = text.strip().removesuffix(".0")  # as pandas writes whole numbers of a column with gaps
    # At most 8 digits: int() of a very long number is slow, or an error of its own.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 8) or not least <= int(digits) <= MAX_TOKENS:
        raise ValueError(f"{name} {text[:40]!r} is no whole number from {least} to {MAX_TOKENS}")
    return int(digits)


DOCUMENTED_BLOCKS = (512, 16)
"""Of the formats that are known."""
ENOUGH = 0.9
"""So many of the prompts must have the number of hashes that a block size gives. Prompts with images may not."""


def tokens_per_hash(lines: Sequence[Line]) -> int:
    """How many prompt tokens a hash is for; 0 if the lines do not tell.

    A prompt of L tokens in blocks of b has ceil(L / b) hashes, or floor(L / b) if only full blocks have one. The
    documented size that gives the numbers of the most prompts, and of nearly all, is taken. Where two sizes give
    as many, as with prompts of at most 16 tokens, the lines do not tell. If no documented size does, each line
    allows an interval of sizes, and the size is what all of them allow: the one power of two, else the one whole
    number.

    Args:
        lines: those with hashes count.
    """
    counts = [(line.prompt_tokens, len(line.hashes)) for line in lines if line.hashes]
    if not counts:
        return 0
    fitting = {block: _fitting(block, counts) for block in DOCUMENTED_BLOCKS}
    if (most_fit := max(fitting.values())) >= ENOUGH * len(counts):
        best = [block for block, fit in fitting.items() if fit == most_fit]
        return best[0] if len(best) == 1 else 0
    # ceil(L / b) = n means L / n <= b < L / (n - 1); floor(L / b) = n means L / (n + 1) < b <= L / n.
    up_to_down = (
        (max(-(-t // n) for t, n in counts), min(-(-t // (n - 1)) - 1 if n > 1 else t * 2 for t, n in counts)),
        (max(t // (n + 1) + 1 for t, n in counts), min(t // n for t, n in counts)),
    )
    for least, most in up_to_down:
        powers = [power for power in (1 << k for k in range(24)) if least <= power <= most]
        if len(powers) == 1:
            return powers[0]
        if least == most:
            return least
    return 0


def _fitting(block: int, counts: Sequence[tuple[int, int]]) -> int:
    """How many prompts have the number of hashes that this size gives."""
    up = sum(-(-tokens // block) == hashes for tokens, hashes in counts)
    down = sum(tokens // block == hashes for tokens, hashes in counts)
    return max(up, down)


MOST_PER_S, LEAST_PER_S = 500.0, 0.005
"""Between these rates a unit is believed. The documented traces have 2 to 7 requests a second."""


def _doubt(found: Format, sample: Sequence[Line]) -> str:
    """Why the unit of this format cannot be that of these lines, for people; empty if it can."""
    span_s = (sample[-1].time - sample[0].time) * TIME_UNITS[found.time_unit]
    if span_s <= 0:
        return ""
    rate = (len(sample) - 1) / span_s
    if LEAST_PER_S <= rate <= MOST_PER_S:
        return ""
    came = f"{rate:.0f} requests a second" if rate >= 1 else f"one request in {1 / rate:.0f} s"
    return (
        f"looks like {found.name}, whose times are in {found.time_unit}, but then it has {came}: say --time-unit "
        f"{found.time_unit} if that is so, or name the unit that its times have ({', '.join(TIME_UNITS)})"
    )


def told(found: Format, sample: Sequence[Line], time_unit: str = "", block_tokens: int = 0) -> Format:
    """The format with its units, from its fields, a sample of its lines, and what the user says.

    A format without hashes, or whose block size is not known, has 0 `block_tokens`.

    Args:
        found: as its fields tell.
        sample: its first lines.
        time_unit: of the user; empty if nothing was said.
        block_tokens: of the user; 0 if nothing was said.

    Raises:
        UnknownUnits: the unit of its times cannot be told, or makes no sense, or the user gives dates a unit.
    """
    if found.dated:
        if time_unit:
            raise UnknownUnits("has dates for times, which have no unit: leave --time-unit out")
        return found
    block = block_tokens or tokens_per_hash(sample)
    if found.block_tokens and not block_tokens and block != found.block_tokens:
        block = 0  # its fields say one size and its hashes another
    name, unit = found.name, found.time_unit
    whole = all(line.time.is_integer() for line in sample)
    if not name and block == 512 and whole:
        name, unit = "Mooncake", "ms"
    elif not name and block == 16 and not whole:
        name, unit = "vLLM's timed trace", "s"
    if not (unit := time_unit or unit):
        raise UnknownUnits(
            "does not say the unit of its times, and its fields are those of several formats: name it with "
            "--time-unit s or --time-unit ms"
        )
    found = found._replace(name=name, time_unit=unit, block_tokens=block if any(x.hashes for x in sample) else 0)
    if not time_unit and (doubt := _doubt(found, sample)):
        raise UnknownUnits(doubt)
    return found
