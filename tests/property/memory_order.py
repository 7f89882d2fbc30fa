"""Every order in which memory may show the board's words: a model of the machine, and the real programs.

What a decision reads is a difference of counts that several threads store (`dpshm.board.outstanding`). In which
order each thread touches them is not written down here: `test_memory_order` records it from the real functions,
as a list of (kind, word). The model runs such programs in every interleaving that a machine allows:

    TSO       x86-64: a store waits in its thread's buffer, in order, and reaches memory later; a load of the
              thread finds its own newest store there; nothing else is out of order
    RELAXED   Arm without fences: accesses of one thread to different words come in any order, unless one
              stores what the other has loaded; single words are whole, and all threads see one memory

Three questions are asked of all executions:

`judge_reads`: two front-ends book a request each and send it; the engine takes in what has come, publishes,
receives the rest, finishes its requests, publishes; a reader adds up. Does the read count every request that was
booked in memory when it began and is not finished when it ends? How far may it go beyond, and is the next read
right?

`judge_corrections`: may an `Outstanding` that is made meanwhile believe that more was received than sent?

`judge_settling`: may a front-end that sees all its requests received take a count of tokens that is not complete?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

TSO, RELAXED = "x86-TSO", "relaxed"
LOAD, STORE = "load", "store"

Access = tuple[str, str]  # LOAD or STORE, and the word: the column's name, or name[front-end]


# The programs, recorded.


class RecordingWords:
    """Stands in for ``board.words`` and tells of each access; the words are the real ones."""

    def __init__(self, words: memoryview, tell: Callable[[str, int], None]) -> None:
        self._words, self._tell = words, tell

    def __getitem__(self, at: int | slice) -> Any:
        for word in range(*at.indices(len(self._words))) if isinstance(at, slice) else (at,):
            self._tell(LOAD, word)  # every word of a slice: its reader copies the slice
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._tell(STORE, at)
        self._words[at] = value


class RecordingColumn(np.ndarray):
    """A column of the board that tells when its items are copied out of it, and which."""

    tell: Callable[[str, int], None]
    origin: int

    def __array_finalize__(self, parent: Any) -> None:
        self.tell = getattr(parent, "tell", lambda *_: None)
        self.origin = getattr(parent, "origin", 0)

    def __getitem__(self, key: Any) -> Any:
        got = super().__getitem__(key)
        if isinstance(got, RecordingColumn) and np.shares_memory(got, self):
            return got  # a view: nothing was loaded
        positions = np.ndarray.__getitem__(self.positions(), key)
        self.tell_all(positions)
        return np.asarray(got) if isinstance(got, np.ndarray) else got

    def tolist(self) -> Any:
        """Copies all items."""
        self.tell_all(self.positions())
        return np.asarray(self).tolist()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        for item in inputs:
            if isinstance(item, RecordingColumn):
                item.tell_all(item.positions())
        return getattr(ufunc, method)(*(np.asarray(item) for item in inputs), **kwargs)

    def positions(self) -> np.ndarray:
        """By item, which word of the segment it is."""
        first = (self.__array_interface__["data"][0] - self.origin) // 8
        out = np.full(self.shape, first)
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            shape = [1] * self.ndim
            shape[axis] = size
            out = out + (np.arange(size) * (stride // 8)).reshape(shape)
        return out

    def tell_all(self, positions: Any) -> None:
        """Tells of a load of each."""
        for at in np.ravel(positions):
            self.tell(LOAD, int(at))


def recording(column: np.ndarray, origin: int, tell: Callable[[str, int], None]) -> RecordingColumn:
    """The same memory as a column that tells."""
    view = column.view(RecordingColumn)
    view.tell, view.origin = tell, origin
    return view


# The machine.


class Op(NamedTuple):
    """One access of a thread.

    Attributes:
        kind: LOAD or STORE.
        word: which.
        register: where a load puts what it found.
        value: what a store stores, given the registers; its value must not depend on others than `needs`.
        needs: registers that it needs.
    """

    kind: str
    word: str
    register: str = ""
    value: Callable[[dict[str, int]], int] = lambda registers: 0
    needs: tuple[str, ...] = ()


class Thread(NamedTuple):
    """A program as it runs: which accesses are done, what it has loaded, what waits in its store buffer."""

    done: int = 0
    registers: tuple[tuple[str, int], ...] = ()
    buffer: tuple[tuple[str, int], ...] = ()


class Machine(NamedTuple):
    """All of it."""

    memory: tuple[tuple[str, int], ...]
    threads: tuple[Thread, ...]
    notes: tuple[tuple[str, int], ...] = ()


Programs = tuple[tuple[Op, ...], ...]
Note = Callable[[int, Op, dict[str, int], dict[str, int]], dict[str, int]]


def executions(programs: Programs, order: str, note: Note) -> Iterator[Machine]:
    """Every final state, once.

    Args:
        programs: of each thread.
        order: TSO or RELAXED.
        note: called when an access takes place, with the thread, the access, memory and the notes so far; gives
            what to note. (Buffered stores take place when they reach memory.)
    """
    words = sorted({op.word for program in programs for op in program})
    start = Machine(tuple((w, 0) for w in words), tuple(Thread() for _ in programs))
    seen = {start}
    todo = [start]
    while todo:
        machine = todo.pop()
        following = list(_steps(machine, programs, order, note))
        if not following:
            yield machine
        for new in following:
            if new not in seen:
                seen.add(new)
                todo.append(new)


def _steps(machine: Machine, programs: Programs, order: str, note: Note) -> Iterator[Machine]:
    memory = dict(machine.memory)
    for t, (thread, program) in enumerate(zip(machine.threads, programs, strict=True)):
        if thread.buffer:
            (word, value), *rest = thread.buffer
            after = {**memory, word: value}
            noted = {**dict(machine.notes), **note(t, Op(STORE, word), after, dict(machine.notes))}
            yield _with(machine, t, thread._replace(buffer=tuple(rest)), after, noted)
        for at in _ready(thread, program, order):
            op = program[at]
            registers = dict(thread.registers)
            done = thread.done | 1 << at
            if op.kind == LOAD:
                own = [value for word, value in thread.buffer if word == op.word]
                registers[op.register] = own[-1] if own else memory[op.word]
                noted = {**dict(machine.notes), **note(t, op, memory, dict(machine.notes))}
                yield _with(machine, t, Thread(done, _items(registers), thread.buffer), memory, noted)
            elif order == TSO:
                buffer = (*thread.buffer, (op.word, op.value(registers)))
                yield _with(machine, t, Thread(done, thread.registers, buffer), memory, dict(machine.notes))
            else:
                after = {**memory, op.word: op.value(registers)}
                noted = {**dict(machine.notes), **note(t, op, after, dict(machine.notes))}
                yield _with(machine, t, Thread(done, thread.registers), after, noted)


def _ready(thread: Thread, program: tuple[Op, ...], order: str) -> Iterator[int]:
    """Which accesses may take place next."""
    have = {name for name, _ in thread.registers}
    for at, op in enumerate(program):
        if thread.done >> at & 1:
            continue
        earlier = [o for k, o in enumerate(program[:at]) if not thread.done >> k & 1]
        free = order == RELAXED and not any(o.word == op.word for o in earlier) and have.issuperset(op.needs)
        if free or not earlier:
            yield at


def _with(machine: Machine, t: int, thread: Thread, memory: dict[str, int], notes: dict[str, int]) -> Machine:
    threads = (*machine.threads[:t], thread, *machine.threads[t + 1 :])
    return Machine(_items(memory), threads, _items(notes))


def _items(of: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(of.items()))


# The questions.

Memory = dict[str, int]
FRONTENDS = range(2)


class Reads(NamedTuple):
    """What all executions show of a read.

    Attributes:
        executions: how many different ends there are.
        missed: the most requests by which it fell short of those booked at its start and unfinished at its end.
        beyond: the most by which it exceeded those booked at its end and unfinished at its start.
        later: how far a read after all is quiet is off; 0 means exact.
    """

    executions: int
    missed: int
    beyond: int
    later: int


def judge_reads(
    booking: list[Access], publishing: list[Access], reading: list[Access], order: str, *, own: bool = False
) -> Reads:
    """Runs two front-ends, an engine and a reader.

    Args:
        booking: how a front-end books; its word is ``sent``.
        publishing: how an engine publishes; its word is ``balance``.
        reading: how a reader adds up; words are ``balance`` and, by front-end, ``sent[0]``, ``sent[1]``.
        order: TSO or RELAXED.
        own: the reader is the first front-end itself, after its booking.
    """
    frontends = [
        (*(_stored(f"{word}[{f}]") for kind, word in booking if kind == STORE), _stored(f"message[{f}]"))
        for f in FRONTENDS
    ]
    reader = tuple(Op(LOAD, word, word) for _, word in reading)
    engine = _engine(publishing)
    threads: Programs = (frontends[0] + reader, frontends[1], engine) if own else (*frontends, engine, reader)
    reads = 0 if own else 3

    def booked(memory: Memory) -> int:
        """By front-end a bit. Its own bookings a front-end knows of before memory does."""
        return sum(1 << f for f in FRONTENDS if memory[f"sent[{f}]"] or (own and f == 0))

    def note(t: int, op: Op, memory: Memory, notes: Memory) -> Memory:
        if t != reads or op.kind != LOAD:
            return {}
        start = {} if "start" in notes else {"start": booked(memory), "finished at start": memory["balance"]}
        return start | {"end": booked(memory), "finished": memory["balance"]}

    ends = missed = beyond = later = 0
    for machine in executions(threads, order, note):
        ends += 1
        notes, memory = dict(machine.notes), dict(machine.memory)
        counted = _counted(dict(machine.threads[reads].registers))
        missed = max(missed, (notes["start"] & ~notes["finished"]).bit_count() - counted)
        beyond = max(beyond, counted - (notes["end"] & ~notes["finished at start"]).bit_count())
        later = max(later, abs(_counted(memory) - (booked(memory) & ~memory["balance"]).bit_count()))
    return Reads(ends, missed, beyond, later)


def _counted(words: Memory) -> int:
    """A balance is stored as a set of those finished, a bit each, so that who judges knows which they are."""
    return sum(words[f"sent[{f}]"] for f in FRONTENDS) - words["balance"].bit_count()


def _stored(word: str) -> Op:
    return Op(STORE, word, value=lambda _: 1)


def _engine(publishing: list[Access]) -> tuple[Op, ...]:
    """Receives some requests and publishes; receives the rest, finishes its requests, and publishes again."""
    first = tuple(f"taken first from {f}" for f in FRONTENDS)

    def finished(registers: Memory) -> int:
        return sum(registers[name] << f for f, name in enumerate(first))

    takes = [
        tuple(Op(LOAD, f"message[{f}]", f"taken {turn} from {f}") for f in FRONTENDS) for turn in ("first", "then")
    ]
    stores = [word for kind, word in publishing if kind == STORE]
    none_yet = tuple(Op(STORE, word, needs=first) for word in stores)
    some = tuple(Op(STORE, word, value=finished, needs=first) for word in stores)
    return (*takes[0], *none_yet, *takes[1], *some)


def judge_corrections(receiving: list[Access], correcting: list[Access], order: str) -> int:
    """By how much more a front-end's row may seem received than sent.

    Args:
        receiving: how an engine counts what it takes in; its word is ``received``.
        correcting: how an `Outstanding` is made; words are ``received`` and ``sent``.
        order: TSO or RELAXED.
    """
    programs: Programs = (
        (_stored("sent"), _stored("message")),
        (Op(LOAD, "message", "taken"), *(_passed_on(word) for kind, word in receiving if kind == STORE)),
        tuple(Op(LOAD, word, word) for _, word in correcting),
    )
    ends = [dict(machine.threads[2].registers) for machine in executions(programs, order, _no_note)]
    return max(words["received"] - words["sent"] for words in ends)


def judge_settling(receiving: list[Access], settling: list[Access], order: str) -> bool:
    """Whether a front-end may see its request received and its tokens not.

    Args:
        receiving: how an engine counts what it takes in; words are ``tokens`` and ``requests``.
        settling: what `FrontendRow.settle` loads; the same words.
        order: TSO or RELAXED.
    """
    programs: Programs = (
        (
            _stored("message"),
            *(Op(LOAD, word, word) for kind, word in settling if kind == LOAD),
        ),
        (Op(LOAD, "message", "taken"), *(_passed_on(word) for kind, word in receiving if kind == STORE)),
    )
    ends = [dict(machine.threads[0].registers) for machine in executions(programs, order, _no_note)]
    return any(words["requests"] > words["tokens"] for words in ends)


def _passed_on(word: str) -> Op:
    return Op(STORE, word, value=lambda registers: registers["taken"], needs=("taken",))


def _no_note(t: int, op: Op, memory: Memory, notes: Memory) -> Memory:
    return {}
