"""The order of loads and stores under x86-64 and Arm, with the programs that the real functions run.

The documentation says (`dpshm.board.outstanding`): on x86-64 no decision misses a request; on Arm a single one
may, and the next one is right. Here is why, and that it is exactly so.
"""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest

from dpshm import Board, Engine, Frontend
from dpshm.board.outstanding import Outstanding
from tests.property import numpys
from tests.property.memory_order import (
    LOAD,
    RELAXED,
    STORE,
    TSO,
    Access,
    RecordingWords,
    judge_corrections,
    judge_reads,
    judge_settling,
    recording,
)
from tests.support import LoneBoard

BOOKING: list[Access] = [(STORE, "sent")]
PUBLISHING: list[Access] = [(STORE, "balance")]
READING: list[Access] = [(LOAD, "balance"), (LOAD, "sent[0]"), (LOAD, "sent[1]")]
RECEIVING: list[Access] = [(STORE, "tokens"), (STORE, "requests")]
CORRECTING: list[Access] = [(LOAD, "received"), (LOAD, "sent")]
SETTLING: list[Access] = [(LOAD, "requests"), (LOAD, "tokens")]


class Recorder:
    """Names the words of a board and lists the accesses to them."""

    COLUMNS = (
        *("request_offset", "token_offset", "sent_requests", "sent_tokens"),
        *("received_requests", "received_tokens", "load", "prefill_backlog"),
    )

    def __init__(self, board: Board) -> None:
        self.accesses: list[tuple[str, int]] = []
        self.origin = np.frombuffer(board.words, np.int64).__array_interface__["data"][0]
        self.names = {
            board.index(name, row, item): name
            for name in self.COLUMNS
            for row in range(getattr(board, name).shape[0])
            for item in range((*getattr(board, name).shape, 1)[1])
        }

    def tell(self, kind: str, at: int) -> None:
        self.accesses.append((kind, at))

    def column(self, array: np.ndarray) -> np.ndarray:
        return recording(array, self.origin, self.tell)

    def program(self, names: dict[str, str]) -> list[Access]:
        """The accesses to these columns, each column once, by the names of the model."""
        found = [(kind, self.names.get(at, "")) for kind, at in self.accesses]
        return list(dict.fromkeys((kind, names[name]) for kind, name in found if name in names))


@pytest.fixture
def watched(group, using) -> SimpleNamespace:
    """One engine, two front-ends, and a recorder of what they do to the board."""
    board = using(LoneBoard(group, engines=1, frontends=2, dp_size=1, waves=False))
    engine = using(Engine.attach(group, 0))
    frontends = [using(Frontend.attach(group, owner=owner)) for owner in "ab"]
    for frontend in frontends:
        frontend._decisions.reader.refresh()
    return SimpleNamespace(board=board, engine=engine, frontends=frontends)


@pytest.mark.parametrize(
    ("balance", "sent"), [("request_offset", "sent_requests"), ("token_offset", "sent_tokens")]
)
def test_the_model_reads_and_books_as_the_code_does(watched: SimpleNamespace, balance: str, sent: str):
    """Guards against a proof about another program: stores or loads that were moved since."""
    engine, frontend = watched.engine, watched.frontends[0]
    names = {balance: "balance", sent: "sent"}
    recorder = Recorder(watched.board)
    engine._words = RecordingWords(engine._words, recorder.tell)
    frontend._row._words = RecordingWords(frontend._row._words, recorder.tell)
    engine.receive(0, 10)
    assert recorder.program(names) == []  # to take a request in changes nothing that a decision reads
    engine.publish(waiting=1, running=0, prefill_backlog=10)
    assert recorder.program(names) == PUBLISHING
    recorder.accesses.clear()
    _booked = frontend.route(10)
    assert recorder.program(names) == BOOKING

    # A decision is one call of numpy over this table: its first row is the balances, the others what was sent.
    requests, tokens = watched.board.outstanding_requests([0, 1]), watched.board.outstanding_tokens([0, 1])
    table = (requests if balance == "request_offset" else tokens)._table
    named = [{recorder.names[at] for at in row} for row in recorder.column(table).positions().tolist()]
    assert [names[name] for row in named for name in row] == ["balance", "sent", "sent"]
    # One by work is one call over both tables.
    tables = recorder.column(watched.board.outstanding_work([0, 1], 1)._tables).positions()[:, :, 0].tolist()
    assert [names[recorder.names[at]] for row in tables for at in row if recorder.names[at] in names] == [
        *("balance", "sent", "sent"),
    ]


@pytest.mark.parametrize("of", ["requests", "tokens"])
def test_the_model_corrects_as_the_code_does(watched: SimpleNamespace, of: str):
    """Guards against a correction that is worked out in another order than the model's."""
    recorder = Recorder(watched.board)
    outstanding = getattr(watched.board, f"outstanding_{of}")([0, 1])
    table, received = recorder.column(outstanding._table), getattr(watched.board, f"received_{of}")
    Outstanding(table, recorder.column(received[:1, :2]), [0, 1])
    assert recorder.program({f"received_{of}": "received", f"sent_{of}": "sent"}) == CORRECTING


def test_the_model_receives_and_settles_as_the_code_does(watched: SimpleNamespace):
    """Guards against a front-end that takes a count of tokens to be complete which is not."""
    engine, frontend = watched.engine, watched.frontends[0]
    names = {"received_requests": "requests", "received_tokens": "tokens"}
    recorder = Recorder(watched.board)
    route = frontend.route(10)
    engine._words = RecordingWords(engine._words, recorder.tell)
    engine.receive(0, 10)
    assert recorder.program(names) == RECEIVING
    recorder.accesses.clear()
    frontend._row._words = RecordingWords(frontend._row._words, recorder.tell)
    route.done()
    assert recorder.program(names) == SETTLING
    assert watched.board.sent_tokens[0, 0] == watched.board.received_tokens[0, 0] == 10


@pytest.mark.parametrize("own", [False, True], ids=["another's", "its own"])
def test_on_x86_no_read_misses_a_request(own: bool, record_property: pytest.RecordProperty):
    """Guards against an order of stores and loads in which a request that was sent is nowhere for an instant.

    A front-end's own booking may still wait in its store buffer: it sees it there.
    """
    reads = judge_reads(BOOKING, PUBLISHING, READING, TSO, own=own)
    record_property("explored", f"memory order, {TSO}, {'own' if own else 'other'} reader: {reads}")
    assert (reads.missed, reads.beyond, reads.later) == (0, 0, 0)
    assert reads.executions > 20


@pytest.mark.slow
def test_a_balance_that_is_loaded_late_hides_requests():
    """Guards against a model in which the order makes no difference: the balance before all that was sent."""
    missed = {}
    for reading in permutations(READING):
        reads = judge_reads(BOOKING, PUBLISHING, list(reading), TSO)
        missed[reading] = reads.missed
        assert (reads.beyond, reads.later) == (0, 0)
    assert {reading for reading, requests in missed.items() if requests == 0} == {
        reading for reading in missed if reading[0] == READING[0]
    }


@pytest.mark.slow
def test_without_any_order_a_read_may_miss_and_the_next_is_right(record_property: pytest.RecordProperty):
    """Guards against a claim for Arm that is too strong, or too weak: nothing accumulates."""
    reads = judge_reads(BOOKING, PUBLISHING, READING, RELAXED)
    record_property("explored", f"memory order, {RELAXED}: {reads}")
    assert reads.missed > 0
    assert reads.later == 0


def test_a_correction_is_right_on_x86_and_not_without_order():
    """Guards against a live front-end whose row seems to hold less than its engine received."""
    received = [(STORE, "received")]
    assert judge_corrections(received, CORRECTING, TSO) == 0
    assert judge_corrections(received, CORRECTING[::-1], TSO) == 1
    assert judge_corrections(received, CORRECTING, RELAXED) == 1


def test_settling_finds_all_tokens_on_x86_and_not_without_order():
    """Guards against tokens that a front-end forgets because it has seen its requests received."""
    assert not judge_settling(RECEIVING, SETTLING, TSO)
    assert judge_settling(RECEIVING[::-1], SETTLING, TSO)
    assert judge_settling(RECEIVING, SETTLING[::-1], TSO)
    assert judge_settling(RECEIVING, SETTLING, RELAXED)


@pytest.mark.slow
@pytest.mark.parametrize("store", numpys.STORES)
def test_an_access_is_one_access(store: str, record_property: pytest.RecordProperty):
    """Guards against a numpy, or a Python, that stores or loads a word in two halves."""
    seen = numpys.stress(store, seconds=1.0)
    reads = sum(counts.reads for counts in seen.values())
    record_property("explored", f"numpy {np.__version__}, stored by {store}: {reads:,} loads, none torn")
    assert {how: counts.torn for how, counts in seen.items()} == dict.fromkeys(numpys.LOADS, 0)
    assert all(counts.reads > 1000 and counts.different > 10 for counts in seen.values())


@pytest.mark.slow
def test_the_stress_finds_a_store_that_is_not_one():
    """Guards against a stress that cannot fail: `struct.pack_into` clears the word before it writes."""
    seen = numpys.stress(numpys.TORN_STORE, seconds=1.0, until_torn=True)
    assert sum(counts.torn for counts in seen.values()) > 0


@pytest.mark.slow
def test_a_sum_loads_the_balance_first(record_property: pytest.RecordProperty):
    """Guards against a numpy that sums rows in another order: with the balance in the last row it must show."""
    seen = numpys.stress_order(seconds=1.0)
    record_property("explored", f"numpy {np.__version__}, sums below zero: {seen}")
    assert {how: sums.first for how, sums in seen.items()} == dict.fromkeys(numpys.SUMS, 0)
    assert all(sums.last >= numpys.ENOUGH for sums in seen.values())
