"""What front-ends of the laboratory know, at which time."""

from __future__ import annotations

from random import Random

import pytest

from dpshm.errors import SettingError
from dpshm.policies import View
from dpshm.sim.lab.information import NAMES, check_information, make_information
from dpshm.sim.lab.rank import Job, SimRank
from dpshm.sim.lab.view_model import Information
from dpshm.sim.step_cost import StepCost


class World:
    """Ranks and front-ends, two of each if not told otherwise, and what one of them sees."""

    def __init__(self, name: str, ranks: int = 2, frontends: int = 2) -> None:
        self.ranks = [SimRank(StepCost(), frontends) for _ in range(ranks)]
        self.own = [[0] * ranks for _ in range(frontends)]
        self.information: Information = make_information(name, self.ranks, self.own)

    def send(self, frontend: int, rank: int, tokens: int = 100) -> None:
        """A front-end sends a request."""
        job = Job(0.0, frontend, tokens, 5)
        job.rank = rank
        self.own[frontend][rank] += 1
        self.ranks[rank].send(job)
        self.information.sent(job)

    def step(self, rank: int, now_s: float) -> None:
        """A rank takes in what has come and begins a step."""
        self.ranks[rank].begin(now_s)
        self.information.published(rank, now_s)

    def seen(self, frontend: int, now_s: float) -> tuple[list[int], list[int]]:
        """Requests, and tokens, by rank."""
        while self.information.next_tick_s <= now_s:
            self.information.tick(self.information.next_tick_s)
        view: View = self.information.view(frontend, list(range(len(self.ranks))), now_s)
        work = view.work
        assert work is not None
        return list(view.requests), list(work.tokens)


@pytest.mark.parametrize(
    ("name", "mine_at_once", "others_at_once", "taken_in", "later"),
    [
        ("live", 1, 1, 1, 1),
        ("live-unbooked", 0, 0, 1, 1),
        ("broadcast", 2, 0, 2, 1),
        ("broadcast-keep", 1, 0, 1, 1),
        ("immediate", 1, 0, 1, 1),
        ("remote", 1, 1, 1, 1),
        ("nodes", 1, 1, 1, 1),
        ("scrape", 0, 0, 0, 0),
    ],
)
def test_when_a_request_is_known(name, mine_at_once, others_at_once, taken_in, later):
    """Guards against a model that knows more, or less, than what it stands for."""
    world = World(name)
    world.send(0, 1)
    assert world.seen(0, 0.01) == ([0, mine_at_once], [0, 100 * mine_at_once])
    assert world.seen(1, 0.01) == ([0, others_at_once], [0, 100 * others_at_once])
    world.step(1, 0.02)
    assert world.seen(0, 0.0201) == ([0, taken_in], [0, 100 * taken_in])
    assert world.seen(1, 0.15) == ([0, later], [0, 100 * later])
    assert world.seen(1, 1.05) == ([0, 1], [0, 100])


@pytest.mark.parametrize(("name", "others_at_once"), [("remote:50", 1), ("nodes:50", 0)])
def test_what_crosses_nodes_comes_late(name, others_at_once):
    """Guards against a study of several nodes in which a booking is known too early, erased, or counted twice."""
    world = World(name, ranks=16, frontends=4)
    world.information.view(3, list(range(16)), 0.0)
    world.send(3, 15)  # with `nodes`, from node 1 to a rank of its own
    world.send(3, 0)
    assert [world.seen(3, 0.01)[0][rank] for rank in (0, 15)] == [1, 1]
    assert [world.seen(0, 0.01)[0][rank] for rank in (0, 15)] == [others_at_once] * 2
    world.step(0, 0.02)
    world.step(15, 0.02)
    for now_s in (0.03, 0.049, 0.0501, 0.0699, 0.0701, 0.2):
        assert [world.seen(3, now_s)[0][rank] for rank in (0, 15)] == [1, 1], now_s
    assert [world.seen(0, 0.2)[0][rank] for rank in (0, 15)] == [1, 1]


@pytest.mark.parametrize("name", ["live", "nodes:50", "broadcast:50"])
@pytest.mark.parametrize("lockstep", [False, True])
def test_many_ranks_are_seen_as_few_are(monkeypatch, name, lockstep):
    """Guards against arrays that keep an old row, or a request in flight that they lack."""
    monkeypatch.setattr("dpshm.sim.lab.many_ranks.REFRESH_S", 0.0)
    few, many = World(name, 24, 6), World(name, 24, 6)
    few.information.lockstep = many.information.lockstep = lockstep
    random = Random(1)
    for turn in range(400):
        now_s, frontend, rank = turn * 0.01, random.randrange(6), random.randrange(24)
        tokens = random.randrange(1, 5000)
        seen = []
        for world, least in ((few, 100), (many, 16)):
            monkeypatch.setattr("dpshm.sim.lab.view_model.VECTOR_FROM", least)
            world.send(frontend, rank, tokens)
            sim = world.ranks[(rank + turn) % 24]
            if sim.busy_until_s >= 0:
                sim.end(now_s, now_s - sim.busy_until_s)
            world.step((rank + turn) % 24, now_s)
            sim.busy_until_s = now_s
            numbers = world.seen(frontend, now_s)
            view = world.information.view(frontend, list(range(24)), now_s)
            work = view.work
            seen.append(
                (numbers, view.running, work.step_end_ns, work.held_tokens, work.base_ns, work.chunk_tokens)
            )
        assert seen[0] == seen[1]
    assert work.learnt


def test_a_broadcast_of_a_lockstep_group_shows_the_last_step_that_ended():
    """Guards against a broadcast that knows more than vLLM's: it lacks what ranks received since the last step."""
    world = World("broadcast")
    world.information.lockstep = True
    for now_s in (0.02, 0.06):
        world.send(0, 1)
        world.information.step_ended()
        world.step(1, now_s)
    assert world.seen(1, 0.11)[0] == [0, 1]
    world.information.step_ended()
    assert world.seen(1, 0.21)[0] == [0, 2]


def test_what_is_in_flight_at_a_broadcast():
    """Guards against the two kinds of bumps being mixed up: vLLM's are overwritten, ours stay until received."""
    for name, seen in (("broadcast", 0), ("broadcast-keep", 1), ("live", 1)):
        world = World(name)
        world.send(0, 0)
        assert world.seen(0, 0.11)[0] == [seen, 0]


def test_an_interval_can_be_named():
    """Guards against an interval that is ignored."""
    world = World("broadcast:10")
    world.send(0, 0)
    world.step(0, 0.001)
    assert world.seen(1, 0.009)[0] == [0, 0]
    assert world.seen(1, 0.011)[0] == [1, 0]
    world = World("immediate:50")
    world.send(0, 0)
    world.step(0, 0.0)
    assert world.seen(1, 0.049)[0] == [0, 0]
    assert world.seen(1, 0.051)[0] == [1, 0]


PROMPT = Job(0.0, 0, 2000, 5, blocks=(1, 2, 3))


def cached(world: World, now_s: float, frontend: int = 0) -> list[int] | None:
    """What a front-end knows of the caches, for a prompt of three blocks."""
    return world.information.cached(Job(now_s, frontend, 2000, 5, blocks=PROMPT.blocks), now_s)


def send_prompt(world: World, frontend: int, rank: int, now_s: float) -> None:
    """A front-end looks up its prompt's blocks and sends it."""
    job = Job(now_s, frontend, 2000, 5, blocks=PROMPT.blocks)
    job.rank = rank
    world.information.cached(job, now_s)
    world.ranks[rank].send(job)
    world.information.sent(job)


@pytest.mark.parametrize(
    ("name", "at_once", "sent", "others"),
    [
        ("live-index", 1536, 0, 0),
        ("live-index:100", 0, 0, 0),
        ("live-index-sent", 1536, 1536, 1536),
        ("live-index-ahead", 1536, 1536, 1536),
    ],
)
def test_when_cached_blocks_are_known(name: str, at_once: int, sent: int, others: int):
    """Guards against an index that is older or newer than its name says."""
    world = World(name)
    send_prompt(world, 0, 1, 0.0)
    assert cached(world, 0.001) == [0, sent]
    assert cached(world, 0.001, frontend=1) == [0, others]
    world.step(1, 0.01)  # the step that computes it is planned
    assert cached(world, 0.011, frontend=1) == [0, at_once]
    assert cached(world, 0.111, frontend=1) == [0, 1536]


def test_other_views_know_no_caches():
    """Guards against a baseline that is given what it cannot have."""
    for name in ("live", "broadcast", "scrape"):
        assert cached(World(name), 0.0) is None
    world = World("live-index")
    assert world.information.cached(Job(0.0, 0, 2000, 5), 0.0) is None


@pytest.mark.parametrize(("name", "seconds"), [("live-index-ahead:50", 0.05), ("live-index-sent", 1.0)])
def test_what_was_sent_is_forgotten(name: str, seconds: float):
    """Guards against a memory of what was sent that outlives its use: the rank may have lost it."""
    world = World(name)
    send_prompt(world, 0, 1, 0.0)
    assert cached(world, seconds - 0.01) == [0, 1536]
    assert cached(world, seconds + 0.01) == [0, 0]


def test_what_was_sent_is_compared_as_front_ends_do():
    """Guards against a laboratory that knows more than the samples of a prompt tell."""
    world = World("live-index-sent")
    for blocks, known in ((tuple(range(50, 73)), 22), (tuple(range(50, 55)), 5), (tuple(range(49, 61)), 0)):
        job = Job(0.0, 0, 20_000, 5, blocks=blocks)
        job.rank = 1
        assert world.information.cached(Job(0.0, 1, 20_000, 5), 0.0) is None
        if known == 22:
            world.information.cached(job, 0.0)
            world.information.sent(job)
        assert world.information.cached(Job(0.0, 1, 20_000, 5, blocks=blocks), 0.001) == [0, known * 512]


@pytest.mark.parametrize("name", ["live-index", "live-index:10"])
def test_a_restarted_rank_has_nothing_cached(name: str):
    """Guards against entries of a process that is gone, and against an index that never hears of the new one."""
    world = World(name)
    world.information.published(1, 0.0)
    send_prompt(world, 0, 1, 0.0)
    world.step(1, 0.0)
    assert cached(world, 0.02) == [0, 1536]
    world.ranks[1] = SimRank(StepCost(), 2)
    world.information.published(1, 0.03)
    assert cached(world, 0.05) == [0, 0]
    send_prompt(world, 0, 1, 0.06)
    world.step(1, 0.06)
    assert cached(world, 0.08) == [0, 1536]


@pytest.mark.parametrize(
    "name", ["", "lively", "live:10", "broadcast:", "broadcast:0", "broadcast:-1", "scrape:nan"]
)
def test_a_name_that_is_none(name):
    """Guards against an information model that is taken for another in silence."""
    with pytest.raises(SettingError, match="no information model"):
        check_information(name)
    assert check_information("broadcast") == ("broadcast", 0.1)
    assert all(check_information(n) for n in NAMES)
