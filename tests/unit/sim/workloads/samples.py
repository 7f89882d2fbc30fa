"""One file of each trace format, made here from its documented form: the same four requests in the units of each.

They come at `TIMES_S` after the first, with the prompts and outputs of `REQUESTS`. The first three prompts begin
alike where a format has hashes.
"""

from __future__ import annotations

import json

TIMES_S = (0.0, 0.5, 1.25, 2.0)
REQUESTS = ((1500, 20), (1100, 5), (2048, 7), (600, 11))


def hashes(block_tokens: int) -> list[list[int]]:
    """Block ids of the prompts: the first 1,024 tokens of the first three are the same."""
    found = []
    for i, (prompt, _) in enumerate(REQUESTS):
        count = -(-prompt // block_tokens)
        shared = 1024 // block_tokens if i < 3 else 0
        own = 10_000 * (i + 1)
        found.append([*range(shared), *range(own, own + count - shared)])
    return found


def json_lines(block_tokens: int, per_second: float, start: float = 0.0, **more: list[object]) -> bytes:
    """JSON lines with ``timestamp``, ``input_length``, ``output_length`` and ``hash_ids``."""
    lines = []
    for i, (time_s, (prompt, output), ids) in enumerate(zip(TIMES_S, REQUESTS, hashes(block_tokens), strict=True)):
        time = start + time_s * per_second
        line = {key: values[i] for key, values in more.items()}
        line |= {"timestamp": int(time) if per_second == 1000 else time, "input_length": prompt}
        lines.append(json.dumps(line | {"output_length": output, "hash_ids": ids}))
    return ("\n".join(lines) + "\n").encode()


def table(header: str, row: str, time: str = "{:g}") -> bytes:
    """CSV: `row` has ``time``, ``i``, ``o``, ``t`` (their sum) and ``n`` (a number)."""
    lines = [
        row.format(time=time.format(time_s), i=prompt, o=output, t=prompt + output, n=n)
        for n, (time_s, (prompt, output)) in enumerate(zip(TIMES_S, REQUESTS, strict=True))
    ]
    return "\n".join([header, *lines, ""]).encode()


SAMPLES = {
    "Azure 2023": (
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:17:03.9000000,1500,20\r\n2023-11-16 18:17:04.4000000,1100,5\r\n"
        b"2023-11-16 18:17:05.1500000,2048,7\r\n2023-11-16 18:17:05.9000000,600,11"
    ),
    "Azure 2024": (
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
        b"2024-05-10 00:00:00.900000+00:00,1500,20\n2024-05-10 00:00:01.400000+00:00,1100,5\n"
        b"2024-05-10 00:00:02.150000+00:00,2048,7\n2024-05-10 00:00:02.900000+00:00,600,11\n"
    ),
    "BurstGPT": table(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "{time},ChatGPT,{i},{o},{t},Conversation log",
    ),
    "BurstGPT v2": table(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "{time},1722ac82-{n},43,GPT-4,{i},{o},{t},API log",
    ),
    "ServeGen": table("request_id,timestamp,input_tokens,output_tokens", "{n},{time},{i},{o}"),
    "Mooncake": json_lines(512, 1000, 3000),
    "Qwen-Bailian": json_lines(
        16, 1.0, 61.114, chat_id=[1, 2, 3, 4], parent_chat_id=[-1, 1, 2, -1], turn=[1, 2, 3, 1], type=["text"] * 4
    ),
    "vLLM timed": json_lines(16, 1.0),
}
