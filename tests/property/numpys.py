"""Whether numpy, and Python's memoryview, move an aligned 64-bit word in one access: two processes on one word.

One process stores words whose halves are equal, as fast as it can; the other loads them in every way in which
dpshm does, and compares the halves. A word with different halves, or that is zero, was torn.

And whether a sum over rows loads the first row first, which `dpshm.board.outstanding` needs: the other process
books a request and ends it, again and again, so a sum that loads the booking before the end is below zero.

Nothing else than numpy is imported, so the command can ask every line of numpy that dpshm supports, each in a
virtual environment of its own that is thrown away:

    python -m tests.property.numpys                   # all lines: some minutes, from the package index
    python -m tests.property.numpys 1.26 2.3          # these
    python tests/property/numpys.py --here            # the numpy of this interpreter
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LINES = ("1.26", "2.0", "2.1", "2.2", "2.3", "2.4", "2.5")
"""Every line of numpy that ``numpy>=1.26`` allows and that this was run with."""
BOTH_HALVES = (1 << 32) + 1
MOST = 1 << 31
AT = 8  # the word, in the middle of a cache line
WORDS = 16


class Counts(NamedTuple):
    """What a reader saw: loads, words with different halves, and how often a word differed from the last."""

    reads: int
    torn: int
    different: int


def _by_memoryview(memory: mmap.mmap) -> Callable[[int], None]:
    words = memoryview(memory).cast("q")

    def store(value: int) -> None:
        words[AT] = value

    return store


def _by_numpy(memory: mmap.mmap) -> Callable[[int], None]:
    words = np.ndarray((WORDS,), np.int64, memory)

    def store(value: int) -> None:
        words[AT] = value

    return store


def _by_strided_numpy(memory: mmap.mmap) -> Callable[[int], None]:
    column = np.ndarray((2, 1), np.int64, memory, AT * 8, strides=(32, 8))

    def store(value: int) -> None:
        column[0, 0] = value

    return store


def _by_struct(memory: mmap.mmap) -> Callable[[int], None]:
    def store(value: int) -> None:
        struct.pack_into("<q", memory, AT * 8, value)

    return store


STORES = {"memoryview": _by_memoryview, "numpy item": _by_numpy, "numpy strided item": _by_strided_numpy}
TORN_STORE = "struct.pack_into"
_ALL_STORES = {**STORES, TORN_STORE: _by_struct}


def _loads(memory: mmap.mmap) -> dict[str, Callable[[], int]]:
    words = np.ndarray((WORDS,), np.int64, memory)
    view = memoryview(memory).cast("q")
    matrix = np.ndarray((2, 4), np.int64, memory, AT * 8, strides=(32, 8))
    indices, copied = np.full(8, AT, np.intp), np.empty(8, np.int64)
    rows, one = [0], np.ones(1, np.int64)
    tables = np.ndarray((2, 1, 4), np.int64, memory, AT * 8, strides=(32, 32, 8))
    rows_apart = np.ndarray((3, 2), np.int64, memory, AT * 8, strides=(8, 32))
    assigned = np.empty((3, 2), np.int64)

    def take() -> int:
        words.take(indices, 0, copied, "clip")
        return int(copied[5])

    def assign() -> int:
        assigned[:] = rows_apart
        return int(assigned[0, 0])

    return {
        "memoryview": lambda: view[AT],
        "numpy item": lambda: int(words[AT]),
        "tolist": lambda: words[: AT + 1].tolist()[AT],
        "tolist of rows": lambda: matrix.tolist()[0][0],
        "take": take,
        "fancy index": lambda: int(matrix[rows, :1][0, 0]),
        "ufunc": lambda: int(np.positive(words[: AT + 1])[AT]),
        "strided ufunc": lambda: int((matrix[:, 0] - 0)[0]),
        "sum": lambda: int(np.add.reduce(matrix[:1], 0)[0]),
        "product": lambda: int(one.dot(matrix[:1])[0]),
        "sum of two tables": lambda: int(np.add.reduce(tables, axis=1)[0, 0]),
        "product of two tables": lambda: int(one.dot(tables)[0, 0]),
        "tolist of columns": lambda: rows_apart.tolist()[0][0],
        "strided assignment": assign,
    }


LOADS = tuple(_loads(mmap.mmap(-1, WORDS * 8)))


def stress(store: str, *, seconds: float, until_torn: bool = False) -> dict[str, Counts]:
    """Stores in another process and loads here.

    Args:
        store: one of `STORES`, or `TORN_STORE`.
        seconds: for how long, at least; it goes on until each way of loading has seen the word change.
        until_torn: goes on until a torn word was seen, too.

    Returns:
        By way of loading, what it saw.
    """
    with tempfile.TemporaryFile() as file:
        file.truncate(WORDS * 8)
        memory = mmap.mmap(file.fileno(), WORDS * 8)
        command = [sys.executable, __file__, "--store", store, "--fd", str(file.fileno())]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[file.fileno()])
        try:
            return _read(memory, writer, seconds, until_torn)
        finally:
            writer.kill()
            writer.communicate()


def _read(
    memory: mmap.mmap, writer: subprocess.Popen[bytes], seconds: float, until_torn: bool
) -> dict[str, Counts]:
    loads = _loads(memory)
    while not loads["memoryview"]() and writer.poll() is None:
        time.sleep(0.01)  # it has not begun
    seen = dict.fromkeys(loads, (0, 0, 0))
    last = dict.fromkeys(loads, 0)
    now = time.monotonic()
    end, patience = now + seconds, now + 60
    while now < patience:
        for how, load in loads.items():
            reads, torn, different = seen[how]
            before = last[how]
            for _ in range(200):
                word = load()
                torn += word >> 32 != word & 0xFFFFFFFF or not word
                different += word != before
                before = word
            last[how] = before
            seen[how] = (reads + 200, torn, different)
        now = time.monotonic()
        enough = all(reads > 1000 and different > 10 for reads, _, different in seen.values())
        if now >= end and enough and not (until_torn and not any(torn for _, torn, _ in seen.values())):
            break
        if writer.poll() is not None:
            raise RuntimeError(f"the writer ended with exit status {writer.returncode}")
    return {how: Counts(*counts) for how, counts in seen.items()}


def _write(store: str, fd: int) -> None:
    """The writer: until its parent is gone."""
    put = _ALL_STORES[store](mmap.mmap(fd, WORDS * 8))
    parent = os.getppid()
    value = 0
    while os.getppid() == parent:
        for _ in range(10_000):
            value = value % (MOST - 1) + 1
            put(value * BOTH_HALVES)


class Below(NamedTuple):
    """What sums a reader saw, and how many were below zero with the balance in the first row, and in the last."""

    reads: int
    first: int
    last: int


TABLE_ROWS = 4097
TABLE_COLUMNS = {"product": 8, "sum": 64, "product of two tables": 8, "sum of two tables": 64}
SUMS = tuple(TABLE_COLUMNS)
ENOUGH = 20  # sums below zero, for none with the balance in the first row to mean something
_BOOK = "book and end"


def _table(memory: mmap.mmap, how: str) -> np.ndarray:
    """As the board's with 4096 front-ends, the most: the balances, and then what each front-end sent.

    Two tables are two views of the one.
    """
    shape = (TABLE_ROWS, TABLE_COLUMNS[how])
    if how.endswith("two tables"):
        return np.ndarray((2, *shape), np.int64, memory, strides=(0, 8 * 64, 8))
    return np.ndarray(shape, np.int64, memory, strides=(8 * 64, 8))


def stress_order(*, seconds: float) -> dict[str, Below]:
    """Books and ends requests in another process, and adds up here as `dpshm.board.outstanding` does.

    Of rank 0 the balance is the first row, as on the board. Of rank 1 it is the last.

    Args:
        seconds: for how long, at least; until `ENOUGH` sums of rank 1 were below zero, or a minute.

    Returns:
        By way of adding up, what it saw.
    """
    with tempfile.TemporaryFile() as file:
        file.truncate(TABLE_ROWS * 8 * 64)
        memory = mmap.mmap(file.fileno(), TABLE_ROWS * 8 * 64)
        command = [sys.executable, __file__, "--store", _BOOK, "--fd", str(file.fileno())]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[file.fileno()])
        try:
            return _add_up(memory, seconds)
        finally:
            writer.kill()
            writer.communicate()


def _add_up(memory: mmap.mmap, seconds: float) -> dict[str, Below]:
    ones = np.ones(TABLE_ROWS, np.int64)
    product, summed, products, sums_of_two = (_table(memory, how) for how in SUMS)
    ways: dict[str, Callable[[], Any]] = {
        "product": lambda: ones.dot(product),
        "sum": lambda: np.add.reduce(summed, 0),
        "product of two tables": lambda: ones.dot(products)[1],
        "sum of two tables": lambda: np.add.reduce(sums_of_two, axis=1)[1],
    }
    seen = dict.fromkeys(ways, Below(0, 0, 0))
    now = time.monotonic()
    end, patience = now + seconds, now + 60
    while now < patience:
        for how, total in ways.items():
            sums = [total()[:2].tolist() for _ in range(20)]
            reads, first, last = seen[how]
            seen[how] = Below(reads + 20, first + sum(s[0] < 0 for s in sums), last + sum(s[1] < 0 for s in sums))
        now = time.monotonic()
        if now >= end and all(below.last >= ENOUGH for below in seen.values()):
            break
    return seen


def _book(fd: int) -> None:
    """The writer: books a request in one row and ends it in another, until its parent is gone."""
    words = memoryview(mmap.mmap(fd, TABLE_ROWS * 8 * 64)).cast("q")
    parent, last = os.getppid(), (TABLE_ROWS - 1) * 64
    value = 0
    while os.getppid() == parent:
        for _ in range(10_000):
            value += 1
            words[last] = value
            words[0] = -value
            words[1] = value
            words[last + 1] = -value


def here(seconds: float) -> bool:
    """Prints what the numpy of this interpreter does; whether no word was torn where none may be."""
    fine = True
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}", flush=True)
    for store in (*STORES, TORN_STORE):
        seen = stress(store, seconds=seconds, until_torn=store == TORN_STORE)
        torn = sum(counts.torn for counts in seen.values())
        fine &= (torn == 0) != (store == TORN_STORE)
        ways = ", ".join(f"{how} {counts.torn}" for how, counts in seen.items())
        reads = sum(counts.reads for counts in seen.values())
        print(f"  stored by {store}: {torn} torn of {reads:,} loads ({ways})", flush=True)
    for how, sums in stress_order(seconds=seconds).items():
        fine &= sums.first == 0 and sums.last > 0
        print(
            f"  {how}: {sums.first} below zero of {sums.reads:,} sums with the balance in the first row, "
            f"{sums.last} with it in the last",
            flush=True,
        )
    return fine


def main() -> int:
    """Asks each line of numpy in an environment of its own; 1 if any tears a word."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("lines", nargs="*", default=LINES, help=f"lines of numpy; default {' '.join(LINES)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each way of storing")
    parser.add_argument("--python", default=sys.executable, help="makes the environments; 2.5 needs 3.12 or newer")
    parser.add_argument("--here", action="store_true", help="the numpy of this interpreter alone")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.store:
        if options.store == _BOOK:
            _book(options.fd)
        else:
            _write(options.store, options.fd)
        return 0
    if options.here:
        return int(not here(options.seconds))
    failed: list[str] = []
    skipped: list[str] = []
    for line in options.lines:
        with tempfile.TemporaryDirectory() as folder:
            python = str(Path(folder, "bin", "python"))
            print(f"numpy {line}: making an environment", flush=True)
            subprocess.run([options.python, "-m", "venv", folder], check=True)
            install = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", f"numpy=={line}.*"]
            installed = subprocess.run(install, capture_output=True, text=True, check=False)
            if installed.returncode:
                skipped.append(line)
                print(f"  not tried: {installed.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            ask = [python, __file__, "--here", "--seconds", str(options.seconds)]
            if subprocess.run(ask, check=False).returncode:
                failed.append(line)
    if skipped:
        print(f"not tried with {options.python}: {', '.join(skipped)}")
    print(
        f"not as it must be: {', '.join(failed)}"
        if failed
        else "all as it must be: torn by struct.pack_into alone"
    )
    return int(bool(failed) or len(skipped) == len(options.lines))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
