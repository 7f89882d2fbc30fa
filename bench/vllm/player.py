"""A load generator: a process that sends its share of the requests at their times, and notes what came back when.

Everything is made before the start, which all generators of a play are told. How late each request was sent is
part of the result: a generator that is late measures itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import NamedTuple

from bench.processes import Line, cpu_ns
from bench.vllm.prompts import Prompts
from dpshm.sim.workloads.traces import Arrival

STILL_HERE_S = 20.0
READ_LIMIT_BYTES = 1 << 20


class Answer(NamedTuple):
    """What became of one request. Times in seconds; None: it failed.

    Attributes:
        late_s: sent so much after its time.
        first_s: from sending until the first token.
        total_s: from sending until the end of the answer.
        output_tokens: asked for.
        ended_s: CLOCK_MONOTONIC.
        said: the status line or the error, if it failed.
    """

    late_s: float
    first_s: float | None
    total_s: float | None
    output_tokens: int
    ended_s: float
    said: str = ""


class Played(NamedTuple):
    """What one generator saw, and the share of a core that it used in percent."""

    answers: list[Answer]
    cpu_percent: float


def play(
    line: Line, port: int, seed: str, block_tokens: int, arrivals: list[tuple[int, Arrival]]
) -> tuple[list[tuple[float | int | str | None, ...]], float]:
    """Runs in a process of its own: says ready, is told when to start, returns the fields of a `Played`."""
    prompts = Prompts(seed, block_tokens)
    bodies = [prompts.body(number, arrival) for number, arrival in arrivals]
    start_s = line.ready()
    return asyncio.run(_play(line, port, start_s, [a for _, a in arrivals], bodies))


async def _play(
    line: Line, port: int, start_s: float, arrivals: list[Arrival], bodies: list[bytes]
) -> tuple[list[tuple[float | int | str | None, ...]], float]:
    async def still_here() -> None:
        while True:
            await asyncio.sleep(STILL_HERE_S)
            line.answer(None)

    cpu_before, began_s = cpu_ns(os.getpid()), time.monotonic()
    telling = asyncio.create_task(still_here())
    answers = await asyncio.gather(
        *(_request(port, start_s + a.time_s, a.output_tokens, b) for a, b in zip(arrivals, bodies, strict=True))
    )
    telling.cancel()
    used = (cpu_ns(os.getpid()) - cpu_before) / 1e9 / (time.monotonic() - began_s)
    return [tuple(answer) for answer in answers], 100 * used


async def _request(port: int, at_s: float, output_tokens: int, body: bytes) -> Answer:
    head = (
        f"POST /inference/v1/generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))
    sent = time.monotonic()
    first: float | None = None
    whole, status = False, b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_LIMIT_BYTES)
        writer.write(head)
        writer.write(body)
        status = await reader.readline()
        async for text in reader:
            if first is None and text.startswith(b"data: {"):
                first = time.monotonic()
            whole = whole or text.startswith(b"data: [DONE]")
        writer.close()
    except OSError as e:
        status = repr(e).encode()
    ended = time.monotonic()
    if first is None or not whole or b" 200 " not in status:
        return Answer(sent - at_s, None, None, output_tokens, ended, status.decode(errors="replace")[:80])
    return Answer(sent - at_s, first - sent, ended - sent, output_tokens, ended)
