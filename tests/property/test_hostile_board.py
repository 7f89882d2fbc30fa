"""Any content of a segment: an attach works or raises a `DpshmError`, and attached processes go on."""

from __future__ import annotations

import logging
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.board import layout
from dpshm.board.events import EventReader
from dpshm.board.header import PREAMBLE
from dpshm.board.words import MAX_WORD
from dpshm.errors import DpshmError, NoEngineAvailable, SettingError
from dpshm.ops.groups import find_groups
from dpshm.ops.metrics import BoardCollector
from dpshm.ops.read_frame import read_frame
from dpshm.policies import NAMES
from tests.support import HandWatch, LoneBoard, wait_until

thorough = settings(deadline=None, derandomize=True, max_examples=150)
EDGES = (
    0,
    1,
    -1,
    3,
    7,
    8,
    255,
    1 << 31,
    1 << 48,
    1 << 61,
    1 << 62,
    MAX_WORD - 1,
    MAX_WORD,
    -MAX_WORD - 1,
)
WORDS = st.one_of(
    st.sampled_from(EDGES),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 64), 1 << 64), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


def use(group: str) -> None:
    """Attaches in every way that there is and does what each is for; only a `DpshmError` may stop it."""
    ways: list[Callable[[], None]] = [
        lambda: _look(group),
        lambda: _publish(group),
        lambda: _route(group),
        find_groups,
    ]
    for way in ways:
        with suppress(DpshmError):
            way()


def _look(group: str) -> None:
    with Board.attach(group) as board:
        assert len(board.snapshot(time.monotonic_ns())) == board.dp_size
        msgspec.json.encode(read_frame(board))
        list(BoardCollector(board).collect())
        EventReader(board).read()


def _publish(group: str) -> None:
    with Engine.attach(group, 0) as engine:
        engine.receive(0, 10, 3)
        engine.publish(waiting=1, running=0)
        engine.poll()


def _route(group: str) -> None:
    for policy in NAMES:
        with suppress(DpshmError), Frontend.attach(group, policy=policy) as frontend:
            frontend.snapshot()
            frontend.route(10).done()
            frontend.route(10, dp_rank=0).cancel()


def put(path: Path, page: bytes) -> None:
    """Writes a segment's first page."""
    with path.open("r+b") as f:
        f.write(page)


def header_of(page: bytes) -> dict:
    """The fields of a first page."""
    length = int.from_bytes(page[12:16], "little")
    return msgspec.json.decode(page[20 : 20 + length])


def page_of(fields: object) -> bytes:
    """A first page whose checksum is right."""
    blob = msgspec.json.encode(fields)[: layout.PAGE_BYTES - 20]
    preamble = PREAMBLE.pack(layout.MAGIC, layout.VERSION_MAJOR, layout.VERSION_MINOR, len(blob), zlib.crc32(blob))
    return (preamble + blob).ljust(layout.PAGE_BYTES, b"\0")


@pytest.mark.slow
def test_any_bytes_in_the_first_page(group, using):
    """Guards against a damaged header that crashes, hangs or swells a process that attaches."""
    board = using(LoneBoard(group))
    path = board.segment.path
    page = path.read_bytes()[: layout.PAGE_BYTES]

    @thorough
    @given(at=st.integers(0, 1200), data=st.binary(min_size=1, max_size=40))
    def scribble(at, data):
        put(path, page[:at] + data + page[at + len(data) :])
        use(group)

    scribble()
    put(path, page)
    use(group)


@pytest.mark.slow
def test_any_value_in_the_header(group, using):
    """Guards against a header with the right checksum and a number in it that is used unchecked."""
    board = using(LoneBoard(group))
    path = board.segment.path
    page = path.read_bytes()[: layout.PAGE_BYTES]
    fields = header_of(page)
    columns = sorted(fields["columns"])

    @thorough
    @given(data=st.data())
    def change(data):
        changed = msgspec.json.decode(msgspec.json.encode(fields))
        where = data.draw(st.sampled_from(["field", "column", "offset", "shape", "strides", "settings"]))
        value = data.draw(JSON)
        if where == "field":
            changed[data.draw(st.sampled_from(sorted(fields)))] = value
        elif where == "settings":
            changed["settings"][data.draw(st.sampled_from(["waves", "balancing", "curve_server_key"]))] = value
        elif where == "column":
            changed["columns"][data.draw(st.sampled_from(columns))] = value
        else:
            place = ("offset", "shape", "strides").index(where)
            number = data.draw(st.integers(-(1 << 63), 1 << 63))
            changed["columns"][data.draw(st.sampled_from(columns))][place] = number if place == 0 else [number]
        put(path, page_of(changed))
        use(group)

    change()
    put(path, page)
    use(group)


@pytest.mark.slow
def test_any_row_at_attach(group, using):
    """Guards against rows left by a crashed or hostile writer to which no process can attach any more."""
    board = using(LoneBoard(group))
    rng = np.random.default_rng(1)
    rows = np.asarray(board.words)[layout.PAGE_BYTES // 8 :]
    for _ in range(40):
        rows[:] = rng.integers(-(1 << 63), (1 << 63) - 1, len(rows), np.int64)
        use(group)
    for word in (-1, MAX_WORD, -MAX_WORD - 1, 1):
        rows[:] = word
        use(group)


class InUse:
    """A group at work, whose every reader and writer can be made to look at the board once."""

    def __init__(self, group, using):
        self.coordinator = using(Coordinator(group=group, dp_size=2))
        self.engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
        self.frontends = [using(Frontend.attach(group, policy=policy)) for policy in NAMES]
        self.board = self.coordinator.board
        self.columns = self.board.segment.header.columns
        self.words = np.asarray(self.board.words)

    def column(self, name):
        """All words of a column."""
        offset, shape, strides = self.columns[name]
        return np.ndarray(shape, np.int64, self.board.words.cast("B"), offset, strides=strides)

    def work(self):
        """Runs every process's normal work; only a front-end may find that no engine is available."""
        wave, now_ns = self.coordinator._wave, time.monotonic_ns()
        self.coordinator._watch.mailbox.notify()
        wait_until(lambda: self.board.coordinator_beat[0] >= now_ns)
        wave.mailbox.call(lambda: wave.waves.scan(now_ns))
        wave.mailbox.call(lambda: wave.publisher.publish_counts(now_ns, wave.waves.state, wave.stock.counts()))
        for frontend in self.frontends:
            with suppress(NoEngineAvailable):
                frontend.route(10).done()
            with suppress(NoEngineAvailable, SettingError):  # there may be no such rank any more
                frontend.route(10, dp_rank=1).cancel()
            frontend.snapshot()
        for engine in self.engines:
            engine.receive(0, 5, 1)
            engine.publish(waiting=1, running=1)
            with engine.step(10, 1):
                engine.poll()
            engine.publish(waiting=0, running=0)
        msgspec.json.encode(read_frame(self.board))
        list(BoardCollector(self.board).collect())
        EventReader(self.board).read()


@pytest.fixture
def at_work(group, using, caplog):
    """A group at work; fails if one of the coordinator's threads ended, or had an error of its own."""
    made = InUse(group, using)
    yield made
    assert made.coordinator.is_healthy()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.slow
@pytest.mark.parametrize("word", EDGES)
def test_each_column_full_of_one_word_while_in_use(at_work, word):
    """Guards against a word of the board that ends its reader: routing, tools, the coordinator's threads."""
    failed = {}
    for name in sorted(at_work.columns):
        before = at_work.column(name).copy()
        at_work.column(name)[...] = word
        try:
            at_work.work()
        except Exception as e:
            failed[name] = traceback.format_exception(e)[-2:]
        at_work.column(name)[...] = before
    assert failed == {}


@pytest.mark.slow
def test_any_words_while_in_use(at_work):
    """Guards against words that do harm together."""
    columns = at_work.columns

    @thorough
    @given(
        words=st.lists(
            st.tuples(st.sampled_from(sorted(columns)), st.integers(0, 5), st.integers(0, 7), WORDS), min_size=1
        )
    )
    def scribble(words):
        for name, row, item, word in words:
            shape = columns[name].shape
            at = (row % shape[0], item % shape[1] if len(shape) > 1 else 0)
            at_work.board.words[at_work.board.index(name, *at)] = word
        at_work.work()

    scribble()


@pytest.mark.slow
def test_any_word_under_the_watch(group, using):
    """Guards against a pid, a start time or a beat that the watch thread cannot judge."""
    board = using(LoneBoard(group))
    watch = using(HandWatch(board))

    @thorough
    @given(
        words=st.lists(
            st.tuples(st.sampled_from(sorted((*layout.ENGINE_WORDS, *layout.FRONTEND_WORDS))), WORDS), min_size=1
        )
    )
    def scribble(words):
        for name, word in words:
            board.words[board.index(name, 0)] = word
        watch.after(1.0)

    scribble()
