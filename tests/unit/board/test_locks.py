"""A segment's locks in one process; see test_board.py for locks across processes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from dpshm.board.locks import coordinator_byte, engine_byte, frontend_byte
from dpshm.board.segment import Segment
from dpshm.board.sweep import sweep
from tests.unit.board.headers import header


def test_one_lock_a_row(folder: Path):
    """Guards against two rows that share a lock, which would make one process's death another's."""
    with closing(Segment.create(header())) as ours, closing(Segment.attach("g")) as theirs:
        c = ours.header.columns
        rows = [
            coordinator_byte(c),
            *(engine_byte(c, e) for e in range(4)),
            *(frontend_byte(c, f) for f in range(3)),
        ]
        assert len(set(rows)) == 8
        assert [theirs.locks.is_locked(row) for row in rows] == [True] + [
            False
        ] * 7  # create holds the coordinator's
        for row in rows[1:]:
            assert theirs.locks.lock(row)
        assert not any(ours.locks.lock(row) for row in rows[1:])
        for segment in (ours, theirs):  # a segment's own locks count too
            assert all(segment.locks.is_locked(row) for row in rows)
        theirs.locks.unlock(rows[3])
        for segment in (ours, theirs):
            assert [segment.locks.is_locked(row) for row in rows] == [
                True,
                True,
                True,
                False,
                True,
                True,
                True,
                True,
            ]
        assert ours.locks.lock(rows[3])
        assert all(segment.locks.is_locked(rows[3]) for segment in (ours, theirs))


def test_a_lock_on_everything_needs_everybody_gone(folder: Path):
    """Guards against sweeping a group in which one single row is still held."""
    with closing(Segment.create(header())) as made:
        other = Segment.attach("g")
        assert other.locks.is_shared()
        assert not made.locks.is_shared()  # its own locks do not count here
        assert not other.locks.lock_all()
        made.locks.unlock(coordinator_byte(made.header.columns))
        assert not other.locks.is_shared()
        made.locks.lock(frontend_byte(made.header.columns, 2))
        assert not other.locks.lock_all()
        made.locks.unlock(frontend_byte(made.header.columns, 2))
        assert other.locks.lock_all()
        assert made.locks.is_locked(engine_byte(made.header.columns, 1))
        assert made.locks.is_shared()
        other.close()
        assert not made.locks.is_shared()


def test_a_reader_sees_locks_and_holds_none(folder: Path):
    """Guards against a tool that keeps a dead group from being swept."""
    made = Segment.create(header())
    with closing(Segment.attach("g", readonly=True)) as reader:
        assert reader.locks.is_locked(coordinator_byte(reader.header.columns))
        assert reader.locks.is_shared()
        made.close()
        assert not reader.locks.is_locked(coordinator_byte(reader.header.columns))
        assert not reader.locks.is_shared()
        assert sweep("g")
        assert not reader.linked
