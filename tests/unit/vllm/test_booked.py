"""Tests of `dpshm.vllm.booked`: what an API server tells an engine of a request."""

from __future__ import annotations

import stat

import pytest

from dpshm import Frontend
from dpshm.vllm.booked import MAX_TOKENS, SLOTS, BookedReader, BookedWriter


@pytest.fixture
def told(board, frontend):
    """A front-end's table."""
    writer = BookedWriter(board, frontend.index)
    yield writer
    writer.close()


def test_an_engine_finds_what_was_told_last(board, frontend, told):
    """Guards against a hit that an engine does not find, or finds for another request."""
    engine = BookedReader(board)
    assert engine.cached_tokens(frontend.index, "a") == 0
    told.tell("a", 4096)
    told.tell("b", MAX_TOKENS + 5)
    assert engine.cached_tokens(frontend.index, "a") == 4096
    assert engine.cached_tokens(frontend.index, "b") == MAX_TOKENS
    assert engine.cached_tokens(frontend.index, "c") == 0
    told.tell("a", 0)  # the next part of a streamed input
    assert engine.cached_tokens(frontend.index, "a") == 0


def test_a_table_that_is_full_of_others_tells_nothing_wrong(board, frontend, told):
    """Guards against a request that is taken for another in the same place of the table."""
    engine = BookedReader(board)
    told.tell("first", 7)
    for i in range(8 * SLOTS):
        told.tell(f"r{i}", 1 + i % 1000)
    assert engine.cached_tokens(frontend.index, "first") == 0
    newest = [engine.cached_tokens(frontend.index, f"r{i}") for i in range(8 * SLOTS - 100, 8 * SLOTS)]
    assert sum(n == 1 + i % 1000 for i, n in enumerate(newest, 8 * SLOTS - 100)) > 95


def test_a_front_end_without_a_table_books_in_full(board, frontend):
    """Guards against an engine that fails at an API server without a prefix cache."""
    assert BookedReader(board).cached_tokens(frontend.index, "a") == 0


def test_the_next_process_in_a_row_has_a_table_of_its_own(board, frontend, group, using, told):
    """Guards against an engine that goes on reading the table of an API server that died."""
    engine = BookedReader(board)
    told.tell("a", 5)
    assert engine.cached_tokens(frontend.index, "a") == 5
    index, owner = frontend.index, frontend.owner
    frontend.close()
    successor = using(Frontend.attach(group, owner=owner))
    assert successor.index == index
    assert engine.cached_tokens(index, "a") == 0
    writer = BookedWriter(board, index)
    writer.tell("a", 9)
    assert BookedReader(board).cached_tokens(index, "a") == 9
    writer.close()


def test_only_the_owner_may_read_and_it_goes_with_its_api_server(board, frontend):
    """Guards against outsiders that read which request ids are served, and against tables that pile up."""
    writer = BookedWriter(board, frontend.index)
    (path,) = board.segment.sockets_path.glob("booked-*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    writer.close()
    assert not list(board.segment.sockets_path.glob("*booked-*"))


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_damaged_table_is_left_alone(board, frontend, told, log, content):
    """Guards against an engine that dies of a file which something cut off."""
    (path,) = board.segment.sockets_path.glob("booked-*")
    path.unlink()
    path.write_bytes(content)
    engine = BookedReader(board)
    for _ in range(2):
        assert engine.cached_tokens(frontend.index, "a") == 0
    assert log("is not used") == 1
