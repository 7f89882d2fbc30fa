"""The coordinator's marks."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.header import make_header
from dpshm.board.segment import Segment
from dpshm.board.words import DRAINED, ON_BEHALF, VERDICT_MASK, ChangeKind, unpack_change
from dpshm.coordinator.row import CoordinatorRow
from dpshm.rules.liveness import Verdict


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """A new board with 4 rows for engines and 3 for front-ends, in a folder of its own."""
    path = Path(tempfile.mkdtemp(prefix="dpt-", dir="/dev/shm"))
    monkeypatch.setenv("DPSHM_DIR", str(path))
    header = make_header(
        "g", 4, 3, settings={}, stats_address="", engine_input_address="", engine_output_address=""
    )
    with closing(Board(Segment.create(header))) as made:
        yield made
    shutil.rmtree(path)


def test_parts_of_a_mark_change_apart(board: Board):
    """Guards against a verdict that undrains a rank, and a drain that forgets its verdict."""
    marks = CoordinatorRow(board)
    marks.set_engine(2, verdict=Verdict.STALLED)
    marks.set_engine(2, drained=True)
    marks.set_engine(2, on_behalf=True)
    assert board.engine_mark.tolist() == [0, 0, Verdict.STALLED | DRAINED | ON_BEHALF, 0]
    marks.set_engine(2, verdict=Verdict.ALIVE)
    assert marks.engine(2) == Verdict.ALIVE | DRAINED | ON_BEHALF
    marks.set_engine(2, verdict=Verdict.ABSENT, drained=False)
    assert marks.engine(2) == ON_BEHALF
    assert marks.engine_verdict(2) is Verdict.ABSENT
    marks.set_engine(2)
    assert marks.engine(2) == ON_BEHALF
    marks.set_engine(2, on_behalf=False, verdict=Verdict.DEAD)
    assert marks.engine(2) == Verdict.DEAD
    assert marks.engine_verdict(2) is Verdict.DEAD
    marks.clear_engine(2)
    assert board.engine_mark.tolist() == [0] * 4


def test_front_ends_have_marks_of_their_own(board: Board):
    """Guards against a front-end's verdict that lands on an engine of the same number."""
    marks = CoordinatorRow(board)
    marks.set_frontend(2, Verdict.DEAD)
    assert board.frontend_mark.tolist() == [0, 0, Verdict.DEAD]
    assert board.engine_mark.tolist() == [0] * 4
    assert [marks.frontend_verdict(f) for f in range(3)] == [Verdict.ABSENT, Verdict.ABSENT, Verdict.DEAD]


class Slow(CoordinatorRow):
    """Marks whose reader lets the other threads run before it goes on."""

    def engine(self, dp_rank: int) -> int:
        """An engine's mark."""
        mark = super().engine(dp_rank)
        time.sleep(0)
        return mark


def test_threads_do_not_lose_each_others_part(board: Board):
    """Guards against an operator's drain that a verdict, set at the same moment, takes back."""
    marks = Slow(board)
    lost: list[str] = []
    start = threading.Barrier(3)

    def turn(part: str, mask: int, first: object, second: object) -> None:
        start.wait()
        for i in range(300):
            value = second if i % 2 else first
            marks.set_engine(1, **{part: value})
            for _ in range(3):  # time for another thread to take it back
                if bool(marks.engine(1) & mask) is not bool(value):
                    lost.append(part)

    threads = [
        threading.Thread(target=turn, args=("verdict", VERDICT_MASK, Verdict.ALIVE, Verdict.ABSENT)),
        threading.Thread(target=turn, args=("drained", DRAINED, True, False)),
        threading.Thread(target=turn, args=("on_behalf", ON_BEHALF, True, False)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []


def changes(board: Board) -> list[tuple[int, ...]]:
    """The records on the board, oldest first, less their revisions."""
    revision = int(board.words[board.index("revision")])
    first = max(1, revision - layout.CHANGES + 1)
    records = [unpack_change(int(board.change[r % layout.CHANGES])) for r in range(first, revision + 1)]
    assert [record.revision for record in records] == [r & 0xFFFF for r in range(first, revision + 1)]
    return [tuple(record[1:]) for record in records]


def test_every_change_is_recorded_once(board: Board):
    """Guards against a front-end that misses a change, and one that refreshes for nothing."""
    marks = CoordinatorRow(board)
    before = time.monotonic_ns()
    marks.begin_epoch()
    marks.set_dp_size(3)
    marks.set_engine(2, verdict=Verdict.ALIVE)
    marks.set_engine(2, verdict=Verdict.ALIVE, drained=False)  # nothing new
    marks.set_frontend(1, Verdict.DEAD)
    marks.set_frontend(1, Verdict.DEAD)  # nothing new
    marks.clear_engine(2)
    marks.clear_engine(2)  # nothing new
    marks.set_dp_size(2)
    marks.begin_epoch()
    assert changes(board) == [
        (ChangeKind.COORDINATOR, 0, 0, 1),
        (ChangeKind.DP_SIZE, 0, 0, 3),
        (ChangeKind.ENGINE, 2, 0, Verdict.ALIVE),
        (ChangeKind.FRONTEND, 1, 0, Verdict.DEAD),
        (ChangeKind.ENGINE, 2, Verdict.ALIVE, 0),
        (ChangeKind.DP_SIZE, 0, 3, 2),
        (ChangeKind.COORDINATOR, 0, 1, 2),
    ]
    times = board.change_time.tolist()[1:8]
    assert before <= times[0]
    assert times == sorted(times)
    assert board.dp_size == 2
    assert board.epoch[0] == 2


def test_the_records_go_round(board: Board):
    """Guards against a record beyond the ring, which would overwrite another word."""
    marks = CoordinatorRow(board)
    following = board.wake_bucket.tolist()
    for i in range(2 * layout.CHANGES + 5):
        marks.set_engine(i % 4, verdict=Verdict.ALIVE if i // 4 % 2 == 0 else Verdict.DEAD)
    assert len(changes(board)) == layout.CHANGES
    assert board.wake_bucket.tolist() == following
    assert (board.change_time > 0).all()
