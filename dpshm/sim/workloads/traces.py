"""Recorded request arrivals, read from a file: when each request came and how many tokens it had.

`dpshm.sim.workloads.formats` has the formats that are known, and how their units are told. A file whose units
cannot be told is refused, and so is a line that is not what its format says: `TraceError` names the file, the
line and what is wrong.

What comes out is in order of time, the first request at 0 s, with at least one prompt token and one output
token each. A recorded output of no tokens counts as one, because the step that ends a prefill always yields a
token. Times are kept as they are: those of Mooncake come in steps of 3 s, about ten requests at each.

Reading stops where the replay does, so a demo of five seconds reads the first seconds of a file of a month.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dpshm.errors import DpshmError, SettingError
from dpshm.sim.workloads.compressed import DamagedError, open_plain
from dpshm.sim.workloads.formats import (
    KNOWN,
    MAX_TOKENS,
    TIME_UNITS,
    Format,
    Line,
    UnknownFormat,
    UnknownUnits,
    csv_format,
    json_format,
    other_json,
    told,
)

MAX_LINE_BYTES = 8 << 20
"""No honest line comes near: a prompt of MAX_TOKENS has 625,000 block ids of 16 tokens, about 5 MB."""
HEAD_BYTES = 1 << 16
"""So much of a JSON file that is no trace is looked at to say what it is."""
SAMPLE_LINES = 1000
"""So many lines tell the units of a file."""
SHOW_INTERVAL_S = 0.1


class TraceError(DpshmError):
    """A trace that cannot be read; the message names the file, the line and what to do."""


class Arrival(NamedTuple):
    """One request of a workload.

    Attributes:
        time_s: seconds since the first request of the trace.
        prompt_tokens: at least 1.
        output_tokens: at least 1.
        block_hashes: one id for each `Trace.block_tokens` tokens of the prompt; empty where the trace has none.
    """

    time_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()


class Trace(NamedTuple):
    """What was read.

    Attributes:
        arrivals: in order of time.
        block_tokens: prompt tokens that a block hash is for; 0 if there are none, or if that cannot be told.
        described: the format and its units, for people.
    """

    arrivals: list[Arrival]
    block_tokens: int
    described: str


class Units(NamedTuple):
    """What the user says of a trace's units.

    Attributes:
        time_unit: of its times, a key of `TIME_UNITS`; empty: as its format says.
        block_tokens: prompt tokens that a block hash is for; 0: as its format and its lines say.
    """

    time_unit: str = ""
    block_tokens: int = 0


OF_A_TRACE = "--time-unit and --block-tokens are of a trace: name it with --trace, or leave them out"

AS_TOLD = Units()
"""By the trace's fields and lines."""


def check_units(units: Units) -> None:
    """Raises `SettingError` if these cannot be units."""
    if units.time_unit not in ("", *TIME_UNITS):
        raise SettingError(f"there is no time unit {units.time_unit!r}: choose {', '.join(TIME_UNITS)}")
    if not 0 <= units.block_tokens <= MAX_TOKENS:
        raise SettingError(f"a hash cannot be for {units.block_tokens} tokens: choose 1 to {MAX_TOKENS}")


def read_trace(
    path: str | Path,
    units: Units = AS_TOLD,
    *,
    until_s: float = float("inf"),
    most: int | None = None,
    show: Callable[[int], None] = lambda _: None,
) -> Trace:
    """Reads a trace, up to the end or to where the replay ends.

    Args:
        path: of the file.
        units: what the user says of them.
        until_s: the first arrival at or after this time is the last that is read.
        most: so many arrivals at most.
        show: called now and then with how many have been read; may raise, to end it.

    Raises:
        TraceError: the file cannot be read, is empty, is no trace that is known, has units that cannot be told, or
            has a line that is not what its format says.
    """
    try:
        with open_plain(path) as file:
            return read_open(path, file, units, until_s=until_s, most=most, show=show)
    except DamagedError as e:
        raise TraceError(f"the trace {path} {e}") from None
    except OSError as e:
        raise TraceError(
            f"cannot read the trace {path}: {e.strerror}. Name a file with --trace, or leave the option out "
            "to use the built-in workload"
        ) from e


def read_open(
    path: str | Path,
    file: BinaryIO,
    units: Units = AS_TOLD,
    *,
    until_s: float = float("inf"),
    most: int | None = None,
    show: Callable[[int], None] = lambda _: None,
) -> Trace:
    """Reads an open file that is not compressed; else as `read_trace`."""
    check_units(units)
    try:
        found, lines = _recognised(path, file)
        parsed = _parsed(path, found, lines)
        sample = list(islice(parsed, SAMPLE_LINES))
        if not sample:
            raise TraceError(f"the trace {path} has a header and no requests: it looks cut off. Fetch it again")
        found = told(found, [line for _, line in sample], *units)
        arrivals = []
        next_s = time.monotonic() + SHOW_INTERVAL_S
        for arrival in _in_order(path, chain(sample, parsed), TIME_UNITS.get(found.time_unit, 1.0)):
            arrivals.append(arrival)
            if arrival.time_s >= until_s or len(arrivals) == most:
                break
            if not len(arrivals) % 256 and time.monotonic() >= next_s:
                next_s = time.monotonic() + SHOW_INTERVAL_S
                show(len(arrivals))
    except UnknownUnits as e:
        raise TraceError(f"the trace {path} {e}") from None
    except UnknownFormat as e:
        raise TraceError(f"{path} {e}. Traces that are known: {KNOWN}") from None
    return Trace(arrivals, found.block_tokens, _described(found))


def _in_order(path: str | Path, lines: Iterable[tuple[int, Line]], second: float) -> Iterator[Arrival]:
    """The arrivals, the first at 0 s; `second` is how long the file's unit of time is, in seconds."""
    began = previous = None
    for number, line in lines:
        if began is None or previous is None:
            began = previous = line.time
        if line.time < previous:
            raise TraceError(
                f"{path}, line {number}: is {(previous - line.time) * second:g} s earlier than the line before "
                "it. Sort the file by time"
            )
        previous = line.time
        yield Arrival((line.time - began) * second, line.prompt_tokens, max(line.output_tokens, 1), line.hashes)


def _described(found: Format) -> str:
    parts = [found.name or "trace", "dates" if found.dated else f"times in {found.time_unit}"]
    if found.block_tokens:
        parts.append(f"{found.block_tokens} tokens a hash")
    return ", ".join(parts)


def _recognised(path: str | Path, file: BinaryIO) -> tuple[Format, Iterator[tuple[int, bytes]]]:
    """The format, and the lines with requests.

    Raises:
        TraceError: the file is empty, or its first line is no line.
        UnknownFormat: it is no trace that is known.
    """
    lines = _lines(path, file)
    number, first = next(lines, (0, b""))
    if not number:
        raise TraceError(f"the trace {path} is empty. Traces that are known: {KNOWN}")
    if first.startswith((b"[", b"{")) and not (first.startswith(b"{") and first.endswith(b"}")):
        # One JSON value over the whole file, or a first line that was cut off.
        head = first[:HEAD_BYTES]
        for _, line in lines:
            if len(head) >= HEAD_BYTES:
                break
            head += line
        if known := other_json(head):
            raise UnknownFormat(known)
        if first.startswith(b"["):
            raise UnknownFormat("is one JSON array; a trace has one object a line: jq -c '.[]' makes that of it")
        if len(head) > len(first):
            raise UnknownFormat("is one JSON value over several lines; a trace has one object a line")
    if first.startswith(b"{"):
        return json_format(first), chain([(number, first)], lines)
    try:
        return csv_format(first), lines
    except UnknownFormat as e:
        raise UnknownFormat(f"{e}. {_shown(first)}") from None


def _parsed(path: str | Path, found: Format, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Line]]:
    for number, line in lines:
        try:
            yield number, found.parse(line)
        except ValueError as e:
            raise TraceError(f"{path}, line {number}: {e}. {_shown(line)}") from None


def _lines(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers, never more than one line in memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            if number == 1 and (known := other_json(line[:HEAD_BYTES])):
                raise UnknownFormat(known)
            raise TraceError(
                f"{path}, line {number}: is longer than {MAX_LINE_BYTES} bytes, so this is not a trace. Known are "
                f"{KNOWN}"
            )
        if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
            yield number, stripped


def _shown(line: bytes) -> str:
    """The start of a bad line, as one printable line."""
    text = ascii(line[:40].decode("utf-8", "replace"))
    return f"The line is {text}" if len(line) <= 40 else f"The line begins {text}"
