"""`dpshm.unseen`: what is on its way, gathered word by word."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from dpshm.board import Board, count_unseen
from dpshm.policies import VECTOR_FROM
from dpshm.segment import Segment, make_header
from dpshm.unseen import Unseen

ADDRESSES = dict.fromkeys(("stats_address", "engine_input_address", "engine_output_address"), "ipc://x")


@pytest.fixture
def new_board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Board]]:
    """Makes boards with room for so many engines and front-ends, in a folder of its own."""
    path = Path(tempfile.mkdtemp(prefix="dpt-", dir="/dev/shm"))
    monkeypatch.setenv("DPSHM_DIR", str(path))
    with ExitStack() as stack:

        def make(engines: int, frontends: int) -> Board:
            header = make_header("g", engines, frontends, **ADDRESSES, settings={})
            return stack.enter_context(Board(Segment.create(header)))

        yield make
    shutil.rmtree(path)


@pytest.mark.parametrize("engines", [1, 8, VECTOR_FROM - 1, VECTOR_FROM, 70])
@pytest.mark.parametrize("frontends", [[], [0], [2, 5], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("what", ["requests", "tokens"])
def test_it_is_the_sum_over_the_front_ends_that_count(
    new_board: Callable[[int, int], Board], engines: int, frontends: list[int], what: str
) -> None:
    """Guards against a wrong word in the gather: each has its own number, and some differences are negative."""
    board = new_board(engines, 7)
    random = Random(engines)
    sent, received = f"sent_{what}", f"received_{what}"
    for e in range(engines):
        for f in range(7):
            board.words[board.index(sent, f, e)] = random.randrange(1000)
            board.words[board.index(received, e, f)] = random.randrange(1000)
    expected = count_unseen(getattr(board, sent), getattr(board, received), frontends, engines)
    assert Unseen(board, sent, received, frontends, engines).count().tolist() == expected.tolist()


@pytest.mark.parametrize("engines", [2, VECTOR_FROM])
def test_each_count_is_of_its_instant(new_board: Callable[[int, int], Board], engines: int) -> None:
    """Guards against a buffer that the next count writes over, or that keeps what the last one found."""
    board = new_board(engines, 2)
    unseen = Unseen(board, "sent_requests", "received_requests", [0, 1], engines)
    board.sent_requests[1, 0] = 3
    first = unseen.count()
    board.received_requests[0, 1] = 3
    second = unseen.count()
    assert first.tolist() == [3] + [0] * (engines - 1)
    assert second.tolist() == [0] * engines


@pytest.mark.parametrize("engines", [2, VECTOR_FROM])
def test_scribbled_words_raise_nothing(new_board: Callable[[int, int], Board], engines: int) -> None:
    """Guards against an overflow that would end a front-end's decision: shared memory is not trusted."""
    board = new_board(engines, 2)
    board.sent_requests[:, 0] = (1 << 63) - 1
    board.received_requests[0, :] = -(1 << 63)
    assert len(Unseen(board, "sent_requests", "received_requests", [0, 1], engines).count()) == engines
