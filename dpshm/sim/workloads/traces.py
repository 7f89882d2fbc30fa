"""Recorded request arrivals, read from a file: when each request came and how many tokens it had.

Two formats are known, and told apart by the first line that is not blank:

- the Azure LLM inference traces (Azure Public Dataset, 2023; Patel et al., "Splitwise", ISCA 2024): CSV
  with a header, ``TIMESTAMP,ContextTokens,GeneratedTokens``;
- the Mooncake traces (kvcache-ai, FAST '25; Qin et al., "Mooncake", FAST 2025): JSON lines with
  ``timestamp`` in ms, ``input_length``, ``output_length`` and ``hash_ids``, one id for each block of 512
  prompt tokens, where equal leading ids mean a shared prefix. Its times come in steps of 3 s, about ten
  requests at each; they are kept as they are.

A trace is read as a whole or not at all: a line that is not what its format says raises `TraceError`,
which names the file, the line and what is wrong. What comes out is in order of time, the first request at
0 s, with at least one prompt token and one output token each. A recorded output of no tokens counts as
one, because the step that ends a prefill always yields a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import msgspec

from dpshm.errors import DpshmError

MAX_TOKENS = 10_000_000
"""More in one request is taken for damage: it is ten times the longest context sold today."""
MAX_LINE_BYTES = 1 << 20
"""No honest line comes near: a prompt of MAX_TOKENS has 20,000 block ids, about 200 KB."""

FORMATS = (
    "the Azure CSV (first line 'TIMESTAMP,ContextTokens,GeneratedTokens') and the Mooncake JSON lines "
    "('timestamp', 'input_length', 'output_length', 'hash_ids')"
)
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(DpshmError):
    """A trace that cannot be read; the message names the file, the line and what to do."""


class Arrival(NamedTuple):
    """One request of a workload.

    Attributes:
        time_s: seconds since the first request of the trace.
        prompt_tokens: at least 1.
        output_tokens: at least 1.
        block_hashes: one id for each 512 tokens of the prompt, where the trace has them; else empty.
    """

    time_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()


_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
_TokensOrNone = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _MooncakeLine(msgspec.Struct, frozen=True):
    """What a line of a Mooncake trace must hold; other keys are skipped."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Tokens
    output_length: _TokensOrNone
    hash_ids: tuple[int, ...] = ()


_mooncake_decoder = msgspec.json.Decoder(_MooncakeLine)


def read_trace(path: str | Path) -> list[Arrival]:
    """All arrivals of a trace, in order of time.

    Raises:
        TraceError: the file cannot be read, is empty, or has a line that is not what its format says.
    """
    try:
        with open(path, "rb") as file:
            return list(_arrivals(path, file))
    except OSError as e:
        raise TraceError(
            f"cannot read the trace {path}: {e.strerror}. Name a file with --trace, or leave the option out "
            "to use the built-in workload"
        ) from e


def _arrivals(path: str | Path, file: BinaryIO) -> Iterator[Arrival]:
    lines = _lines(path, file)
    number, first = next(lines, (0, b""))
    if not number:
        raise TraceError(f"the trace {path} is empty. Known formats: {FORMATS}")
    parse: Callable[[bytes], Arrival]
    if first.startswith(b"{"):
        parse = _parse_mooncake
        lines = _chain(number, first, lines)
    elif first.startswith(b"\x1f\x8b"):
        raise TraceError(f"the trace {path} is gzip-compressed: unpack it first (gunzip)")
    else:
        parse = _azure_parser(path, first)
    began = previous = None
    for number, line in lines:
        try:
            time_s, prompt_tokens, output_tokens, block_hashes = parse(line)
        except ValueError as e:
            raise TraceError(f"{path}, line {number}: {e}. {_shown(line)}") from None
        if began is None or previous is None:
            began = previous = time_s
        if time_s < previous:
            raise TraceError(
                f"{path}, line {number}: is {previous - time_s:g} s earlier than the line before it. Sort the "
                "file by time"
            )
        previous = time_s
        yield Arrival(time_s - began, prompt_tokens, max(output_tokens, 1), block_hashes)
    if began is None:
        raise TraceError(f"the trace {path} has a header and no requests: it looks cut off. Fetch it again")


def _lines(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers, never more than one line in memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise TraceError(
                f"{path}, line {number}: is longer than {MAX_LINE_BYTES} bytes, so this is not a trace. Known "
                f"formats: {FORMATS}"
            )
        if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
            yield number, stripped


def _chain(number: int, line: bytes, rest: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield number, line
    yield from rest


def _shown(line: bytes) -> str:
    """The start of a bad line, as one printable line."""
    text = ascii(line[:40].decode("utf-8", "replace"))
    return f"The line is {text}" if len(line) <= 40 else f"The line begins {text}"


def _parse_mooncake(line: bytes) -> Arrival:
    try:
        found = _mooncake_decoder.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise ValueError(f"not a Mooncake request ({e}); a file that was cut off ends so") from None
    return Arrival(found.timestamp / 1000, found.input_length, found.output_length, found.hash_ids)


def _azure_parser(path: str | Path, header: bytes) -> Callable[[bytes], Arrival]:
    """What reads the lines under that header, wherever its three columns stand."""
    names = [name.strip() for name in header.decode("utf-8", "replace").split(",")]
    if not set(_AZURE_COLUMNS) <= set(names):
        raise TraceError(f"the trace {path} has neither known format. Known are {FORMATS}. {_shown(header)}")
    at_time, at_prompt, at_output = (names.index(name) for name in _AZURE_COLUMNS)

    def parse(line: bytes) -> Arrival:
        fields = line.decode("utf-8", "replace").split(",")
        if len(fields) != len(names):
            raise ValueError(
                f"{len(fields)} column(s) where the header has {len(names)}; a file that was cut off ends so"
            )
        return Arrival(
            _seconds(fields[at_time]),
            _tokens("ContextTokens", fields[at_prompt], 1),
            _tokens("GeneratedTokens", fields[at_output], 0),
        )

    return parse


def _seconds(text: str) -> float:
    try:
        # Digits past the microsecond are dropped; a time without a zone is taken as UTC.
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"TIMESTAMP {text[:40]!r} is no time like 2023-11-16 18:17:03.9799600") from None


def _tokens(name: str, text: str, least: int) -> int:
    digits = text.strip()
    # At most 8 digits: int() of a very long number is slow, or an error of its own.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 8) or not least <= int(digits) <= MAX_TOKENS:
        raise ValueError(f"{name} {text[:40]!r} is no whole number from {least} to {MAX_TOKENS}")
    return int(digits)
