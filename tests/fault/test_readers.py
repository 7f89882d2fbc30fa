"""Another user who may only read the board, and who does what the kernel lets a reader do."""

from __future__ import annotations

import os

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.board import lock_file
from dpshm.board.files import segment_path
from dpshm.board.sweep import sweep
from dpshm.rules.liveness import Verdict
from tests.fault.test_liveness import attach, chosen
from tests.support import Remote, verdict, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

BECOME_NOBODY = """
import fcntl, os, struct
from dpshm.board.board import Board
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""
LOCK_ALL = """
fds = [os.open(segment, os.O_RDONLY)]
for fd in fds:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_RDLCK, 0, 0, 0, 0))
refused = []
for path, flags in [(segment, os.O_RDWR), (locks, os.O_RDONLY), (locks, os.O_RDWR)]:
    try:
        os.open(path, flags)
    except PermissionError:
        refused.append((path, flags))
"""


def reader_of(group: str, using) -> Remote:
    """A process of another user that holds a read lock on every byte of the board."""
    reader = using(Remote())
    (locks,) = map(str, lock_file.all_beside(segment_path(group)))
    reader.run(BECOME_NOBODY)
    reader.run(LOCK_ALL, segment=str(segment_path(group)), locks=locks)
    assert reader.eval("refused") == [
        (str(segment_path(group)), os.O_RDWR),
        (locks, os.O_RDONLY),
        (locks, os.O_RDWR),
    ]
    return reader


def test_a_reader_that_locks_all_it_may_open_is_in_no_ones_way(group, using):
    """Guards against a monitoring user whose locks refuse rows and takeovers, and make the dead look alive."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=3, file_mode=0o644)", group=group)
    reader_of(group, using)
    engines = [attach(using, group, rank) for rank in range(3)]
    frontend = using(Frontend.attach(group, exclusive=True))
    assert chosen(frontend) == {0, 1, 2}
    assert frontend._decision_lock is not None
    assert frontend._decision_lock.missed == 0

    engines[0].kill()
    wait_until(lambda: verdict(frontend.board, 0) is Verdict.DEAD)
    assert chosen(frontend) == {1, 2}
    first.kill()
    engines[1].kill()
    wait_until(lambda: chosen(frontend) == {2})  # front-ends ask the locks themselves
    assert not frontend.board.coordinator_alive()

    second = Coordinator(group=group, dp_size=3, file_mode=0o644)
    assert second.board.epoch[0] == 2
    Engine.attach(group, 0).close()
    frontend.close()
    second.close()


def test_what_is_dead_is_swept_past_a_reader(group, using):
    """Guards against a reader that keeps a dead group for ever."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=1, file_mode=0o644)", group=group)
    reader_of(group, using)
    first.kill()
    assert sweep(group)


def test_a_reader_without_locks_knows_the_living_and_the_dead(group, using):
    """Guards against a tool of another user for which all are dead, or alive for ever."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=3, file_mode=0o644)", group=group)
    engines = [attach(using, group, rank) for rank in range(2)]
    reader = using(Remote())
    reader.run(BECOME_NOBODY)
    reader.run(
        "board = Board.attach(group, any_owner=True)\n"
        "def look():\n"
        "    board.segment.refresh()\n"
        "    return [verdict.name for verdict in board.engine_verdicts()]",
        group=group,
    )
    assert not reader.eval("board.segment.has_locks")
    wait_until(lambda: reader.eval("look()") == ["ALIVE", "ALIVE", "ABSENT"])
    assert reader.eval("(board.coordinator_alive(), board.is_used())") == (True, True)
    first.kill()
    engines[0].kill()
    wait_until(lambda: reader.eval("look()") == ["DEAD", "ALIVE", "ABSENT"])
    wait_until(lambda: reader.eval("(look(), board.coordinator_alive(), board.is_used())")[1:] == (False, True))
    engines[1].kill()
    wait_until(lambda: reader.eval("look()") == ["DEAD", "DEAD", "ABSENT"])
    assert not reader.eval("board.is_used()")
    assert sweep(group)
