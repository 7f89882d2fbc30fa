"""``python -m tests.fuzz.guided``: coverage-guided fuzzing of the readers of bytes that another process wrote.

Needs atheris (extra: fuzz). Each target runs in a process of its own, because libFuzzer ends its process. The exit
status is 1 if a target finds an input that raises another error than the allowed one.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

PATH = Path("/dev/shm/dpshm-g")


def make_targets() -> dict[str, Callable[[bytes], None]]:
    """By name: what is fed with bytes. Imported here, so that atheris can follow what it does."""
    import msgspec

    from dpshm.board import layout
    from dpshm.board.header import PREAMBLE, group_in, make_header, read_header
    from dpshm.errors import SegmentInvalid, WireError
    from dpshm.frontend import recorder
    from dpshm.net import wire

    addresses = dict.fromkeys(("stats_address", "engine_input_address", "engine_output_address"), "ipc://x")
    honest = make_header("g", 2, 2, **addresses, settings={})
    honest_blob = msgspec.json.encode(honest)

    def read_wire(data: bytes) -> None:
        for decode in (
            wire.decode_engine_message,
            wire.decode_frontend_message,
            wire.decode_start,
            wire.decode_state,
        ):
            with suppress(WireError):
                decode(data)

    def read_page(data: bytes) -> None:
        # Half of them are a damaged copy of a real one, and the checksum is right, or nothing would get past it.
        if data[:1] < b"\x80":
            at = int.from_bytes(data[1:3], "little") % len(honest_blob)
            data = honest_blob[:at] + data[3:] + honest_blob[at + len(data[3:]) :]
        blob = data[: layout.PAGE_BYTES - PREAMBLE.size]
        preamble = PREAMBLE.pack(
            layout.MAGIC, layout.VERSION_MAJOR, layout.VERSION_MINOR, len(blob), zlib.crc32(blob)
        )
        page = (preamble + blob).ljust(layout.PAGE_BYTES, b"\0")
        for readonly in (True, False):
            try:
                header = read_header(PATH, page, honest.size, "g", readonly)
            except SegmentInvalid:
                continue
            assert header.columns.keys() >= honest.columns.keys()
        group_in(page)
        with suppress(SegmentInvalid):
            read_header(PATH, data.ljust(layout.PAGE_BYTES, b"\0"), honest.size, "g", True)

    ring = recorder.RingHeader(version=recorder.VERSION, group="g", frontend=0, engines=2, slots=2, pid=1)
    slot = recorder.slot_bytes(ring.engines)

    def read_ring(data: bytes) -> None:
        # The bytes are the record in the second of two slots, of which the first is empty.
        record = data[: slot - 2 * layout.WORD_BYTES]
        second = struct.pack("<qq", 2, len(record)) + record
        body = struct.pack("<q", 2) + bytes(slot) + second.ljust(slot, b"\0")
        for number, found in recorder._records(ring, bytes(layout.PAGE_BYTES) + body):
            decision = recorder._as_decision(number, found)
            assert decision.choice in decision.view.ranks

    return {"wire": read_wire, "header": read_page, "trace": _trace_reader(), "ring": read_ring}


def _trace_reader() -> Callable[[bytes], None]:
    from dpshm.sim.workloads import traces

    def read_trace(data: bytes) -> None:
        try:
            arrivals = traces.read_open("trace", BytesIO(data)).arrivals
        except traces.TraceError:
            return
        assert all(a.prompt_tokens >= 1 and a.output_tokens >= 1 and a.time_s >= 0 for a in arrivals)

    return read_trace


SEEDS = {
    "trace": [
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n",
        b'{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n',
    ],
    "header": [b"\x01\x00\x00{}", b'\x81{"group":"g","size":4096}'],
    "ring": [
        bytes.fromhex(
            "9b0a0105c0029200019201029200009200009209099392010292920102920304929601010101010196010101010101"
        ),
        bytes.fromhex("9b0a01050702920001920102920000920000920909c0"),
    ],
}


def fuzz(target: str, runs: int, seed: int) -> None:
    """Runs one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["dpshm"]):
        targets = make_targets()
    with tempfile.TemporaryDirectory() as corpus:
        seeds = SEEDS.get(target)
        if seeds is None:
            from tests.fuzz.messages import GOLDEN

            seeds = GOLDEN
        for i, data in enumerate(seeds):
            (Path(corpus) / str(i)).write_bytes(data)
        arguments = [
            sys.argv[0],
            corpus,
            f"-runs={runs}",
            f"-seed={seed + 1}",
            "-max_len=4096",
            "-rss_limit_mb=1024",
        ]
        atheris.Setup([*arguments, "-timeout=10", f"-artifact_prefix={corpus}/"], targets[target])
        atheris.Fuzz()


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m tests.fuzz.guided", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200_000, help="inputs for each target (200000)")
    parser.add_argument("--target", choices=("wire", "header", "trace", "ring"), help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.target:
        fuzz(options.target, options.runs, options.seed)
    failed = 0
    for target in ("wire", "header", "trace", "ring"):
        arguments = ["--target", target, "--runs", str(options.runs), "--seed", str(options.seed)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", *arguments], capture_output=True, text=True, check=False
        )
        runs = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        if done.returncode or not runs:
            failed += 1
            sys.stdout.write(f"{target:8} FAILED\n{done.stdout[-3000:]}{done.stderr[-3000:]}\n")
        else:
            sys.stdout.write(
                f"{target:8} {runs[1]} inputs in {runs[2]} s, coverage {covered[-1] if covered else '?'}\n"
            )
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
