"""Lockstep: what ranks agree on, with real processes where order between them matters."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from random import Random

import pytest

from dpshm.errors import SettingError
from dpshm.sim.demo.lockstep import AGREEMENT_INTERVAL, Agreement, Lockstep, create_memory


@pytest.fixture
def memory():
    """Makes shared words for so many ranks."""
    descriptors = []

    def make(num_ranks: int) -> int:
        descriptors.append(create_memory(num_ranks))
        return descriptors[-1]

    yield make
    for fd in descriptors:
        os.close(fd)


def never() -> bool:
    """A wait without an interrupt."""
    return False


def play(fd: int, num_ranks: int, rounds: int, plan) -> list[list[Agreement]]:
    """What each rank saw in each round; `plan(rank, round)` gives what it enters with."""
    seen: list[list[Agreement]] = [[] for _ in range(num_ranks)]

    def rank_main(rank: int) -> None:
        lockstep = Lockstep(fd, rank, num_ranks)
        for r in range(1, rounds + 1):
            has_work, seconds = plan(rank, r)
            agreement = lockstep.enter(has_work=has_work, seconds=seconds, interrupted=never)
            assert agreement is not None
            seen[rank].append(agreement)
        lockstep.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(num_ranks)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return seen


def test_a_rank_alone():
    """Guards against a group of one that waits for ever."""
    fd = create_memory(1)
    lockstep = Lockstep(fd, 0, 1)
    os.close(fd)  # the map holds the memory
    for r in range(1, 2 * AGREEMENT_INTERVAL + 1):
        agreement = lockstep.enter(has_work=False, seconds=0.5, interrupted=never)
        assert agreement == Agreement(0.5, r % AGREEMENT_INTERVAL == 0)


def test_every_step_lasts_as_long_as_the_slowest_ranks(memory):
    """Guards against ranks that drift apart, or that see each other's values of another round."""
    durations = [[Random(100 * rank + r).randrange(10_000) / 1e6 for r in range(200)] for rank in range(3)]
    seen = play(memory(3), 3, 199, lambda rank, r: (True, durations[rank][r]))
    for r in range(1, 200):
        expected = Agreement(pytest.approx(max(d[r] for d in durations)), all_idle=False)
        assert [s[r - 1] for s in seen] == [expected] * 3


def test_idle_is_agreed_only_in_a_round_of_agreement_and_by_all(memory):
    """Guards against one rank pausing while another steps on."""
    last_work = AGREEMENT_INTERVAL + 1
    seen = play(memory(3), 3, 2 * AGREEMENT_INTERVAL, lambda rank, r: (rank == 1 and r <= last_work, 0.0))
    for s in seen:
        assert [a.all_idle for a in s] == [
            r == 2 * AGREEMENT_INTERVAL for r in range(1, 2 * AGREEMENT_INTERVAL + 1)
        ]


def test_waiting_can_be_interrupted(memory):
    """Guards against a rank that cannot end because another never comes."""
    answers = iter([False, False, True])
    lockstep = Lockstep(memory(2), 0, 2)
    assert lockstep.enter(has_work=True, seconds=0.0, interrupted=lambda: next(answers)) is None


def test_long_steps_and_late_rounds_stay_whole(memory):
    """Guards against fields of the word that run into each other."""
    fd = memory(2)
    ranks = [Lockstep(fd, rank, 2) for rank in range(2)]
    for lockstep in ranks:
        lockstep.round = (1 << 31) + AGREEMENT_INTERVAL - 1
    seen: list[Agreement | None] = []
    other = threading.Thread(
        target=lambda: seen.append(ranks[1].enter(has_work=False, seconds=1e9, interrupted=never))
    )
    other.start()
    seen.append(ranks[0].enter(has_work=False, seconds=-1.0, interrupted=never))
    other.join()
    assert seen == [Agreement(((1 << 30) - 1) / 1e6, all_idle=True)] * 2


def test_wrong_rank_or_memory(memory):
    """Guards against a rank that writes past its words."""
    fd = memory(2)
    for rank in (-1, 2):
        with pytest.raises(SettingError, match="rank"):
            Lockstep(fd, rank, 2)
    with pytest.raises(SettingError, match="does not hold"):
        Lockstep(fd, 0, 3)


RANK = """
import sys
from dpshm.sim.demo.lockstep import Lockstep
fd, rank, num_ranks, rounds = map(int, sys.argv[1:])
lockstep = Lockstep(fd, rank, num_ranks)
for r in range(1, rounds + 1):
    seconds = ((r * 7919 + rank * 104729) % 10007) / 1e6
    agreement = lockstep.enter(has_work=False, seconds=seconds, interrupted=lambda: False)
    longest = max(((r * 7919 + i * 104729) % 10007) for i in range(num_ranks)) / 1e6
    assert agreement.seconds == longest, (r, agreement, longest)
    assert agreement.all_idle == (r % 32 == 0), (r, agreement)
"""


def test_processes_agree(memory):
    """Guards against torn or stale words between processes, and against memory that is not inherited."""
    fd = memory(3)
    children = [
        subprocess.Popen([sys.executable, "-c", RANK, str(fd), str(rank), "3", "2000"], pass_fds=(fd,))
        for rank in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
