"""Rows and bookings of several nodes on all their boards: what one tells and the others write, by hand."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import pytest
from msgspec import structs

from dpshm.board.words import DRAINED, RELAYED, REMOTE, unpack_load
from dpshm.coordinator.own_rows import OwnRows
from dpshm.coordinator.relayed_rows import RelayedRows
from dpshm.engine.row import EngineRow
from dpshm.engine.taking import initialise
from dpshm.errors import WireError
from dpshm.frontend.row import FrontendRow, lock_row
from dpshm.net.relay_wire import News, decode_news, encode_news, topic_of
from dpshm.net.wire import CARRIED, pack_words
from dpshm.rules.liveness import REMOTE_INTERVAL_NS, SILENT_INTERVALS, Verdict
from tests.support import LoneBoard, frontend_verdict, verdict

MS = 1_000_000
NODES = 3
TOKENS = 5


class Machine:
    """One node: its board, its relay without sockets, and a clock that differs from the others'."""

    def __init__(self, group, node, world):
        self.node, self.world = node, world
        self.board = LoneBoard(
            f"{group}-{node}", dp_size=NODES, frontends=NODES, nodes=NODES, node=node, waves=False
        )
        for rank in range(NODES):
            self.board.marks.set_engine(rank, verdict=Verdict.ABSENT)
        self.ahead_ns = 3_600_000_000_000 * node
        self.begin()

    def begin(self):
        """A relay begins: the first, or that of a coordinator that takes the board over."""
        self.own = OwnRows(self.board)
        self.others = RelayedRows(self.board, self.board.marks, self.now_ns)
        self.tells_all = True

    @property
    def now_ns(self):
        return self.world.now_ns + self.ahead_ns

    def engine(self):
        """An engine of the rank that has this node's number."""
        assert self.board.lock_engine(self.node)
        initialise(self.board, self.node)
        made = EngineRow(self.board, self.node)
        self.board.marks.set_engine(self.node, verdict=Verdict.ALIVE, remote=False)
        return made

    def frontend(self):
        """A front-end's row."""
        f = lock_row(self.board, b"api")
        self.board.marks.set_frontend(f, Verdict.ALIVE)
        row = FrontendRow(self.board, f)
        row.follow_late({rank: 0 for rank in range(NODES) if rank != self.node})
        return f, row

    def begin_at(self, number):
        """The counts of this board have other beginnings than those of other boards."""
        for f in range(NODES):
            for e in range(NODES):
                if self.node in (e, f):
                    for kind, count in (("requests", number + f), ("tokens", 10 * number + e)):
                        self.board.words[self.board.index(f"sent_{kind}", f, e)] = count
                        self.board.words[self.board.index(f"received_{kind}", e, f)] = count

    def tell(self, *, whole=False):
        """A message to all others."""
        if self.others.renumbered:
            self.own.renumbered(self.others.renumbered)
            self.others.renumbered.clear()
        whole, self.tells_all = whole or self.tells_all, False
        told = self.own.look(self.now_ns, slice(None) if whole else None)
        number = self.board.segment.header.board_number
        news = News(self.node, number, self.now_ns, 0, 0, False, told.boards, told.engines, told.frontends)
        return encode_news(news)

    def hear(self, frames):
        """A message from another one."""
        self.others.write(decode_news(frames), 0, self.now_ns)

    def requests(self):
        """By rank, what is outstanding as this board says."""
        return self.board.outstanding_requests(self.board.counted_frontends()).count().tolist()

    def tokens(self):
        """The same of tokens."""
        return self.board.outstanding_tokens(self.board.counted_frontends()).count().tolist()


class World:
    """Machines, and messages on their way between them, in order from each to each."""

    def __init__(self, group):
        self.group, self.now_ns = group, 1000 * MS
        self.machines = [Machine(group, node, self) for node in range(NODES)]
        self.on_their_way = {(a, b): deque() for a in range(NODES) for b in range(NODES) if a != b}

    def replace(self, node):
        """A machine starts anew, with another board."""
        self.machines[node].board.close()
        self.machines[node] = machine = Machine(self.group + "-anew", node, self)
        machine.begin_at(17)
        self.engines[node], self.frontends[node] = machine.engine(), machine.frontend()

    def close(self):
        """Removes the boards."""
        for machine in self.machines:
            machine.board.close()

    def tell(self, node, *, whole=False):
        """One machine tells all others; it comes later."""
        self.now_ns += MS
        frames = self.machines[node].tell(whole=whole)
        for to in range(NODES):
            if to != node:
                self.on_their_way[node, to].append(frames)

    def settle(self):
        """Everything is told twice and heard: the second time in numberings that all know."""
        for _ in range(3):
            for node in range(NODES):
                self.tell(node, whole=True)
            for (_, to), messages in self.on_their_way.items():
                while messages:
                    self.machines[to].hear(messages.popleft())


@pytest.fixture
def world(group):
    """The machines, each with an engine and a front-end, and all have heard of all."""
    made = World(group)
    for machine in made.machines:
        machine.begin_at(100 * (machine.node + 1))
    made.engines = [machine.engine() for machine in made.machines]
    made.frontends = [machine.frontend() for machine in made.machines]
    made.settle()
    yield made
    made.close()


def book(world, node, rank):
    """Books a request; returns its route."""
    route = SimpleNamespace(dp_rank=rank, prompt_tokens=TOKENS, booked_ns=0, open=False)
    world.frontends[node][1].book(route, 1)
    return route


def test_a_row_is_the_same_on_all_boards(world):
    """Guards against words that are not carried, and against times of another node's clock."""
    world.engines[1].publish(waiting=3, running=2, kv_cache_usage=0.5, prefill_backlog=40, step=7)
    world.engines[1].board.words[world.engines[1].board.index("beat", 1)] = world.machines[1].now_ns - 5 * MS
    world.tell(1)
    for machine in (world.machines[0], world.machines[2]):
        machine.hear(world.on_their_way[1, machine.node].popleft())
        row = machine.board.snapshot(machine.now_ns)[1]
        assert row[["waiting", "running", "requests", "prefill_backlog", "step"]].tolist() == (3, 2, 5, 40, 7)
        assert row["age_ns"] == 6 * MS
        assert machine.board.engine_mark[1] == Verdict.ALIVE | REMOTE | RELAYED


class Traffic:
    """Requests of all front-ends at all ranks, one thing at a time, at random."""

    def __init__(self, world, seed):
        self.world, self.rng = world, random.Random(seed)
        self.booked = [0] * NODES
        self.sent = {(a, b): deque() for a in range(NODES) for b in range(NODES)}  # on their way to the engine
        self.queue = [deque() for _ in range(NODES)]
        self.mine = [[0] * NODES for _ in range(NODES)]  # by node and rank: booked there, and not finished
        self.answered = deque()
        self.acts = (
            *(self.book, self.book, self.book, self.arrive, self.arrive, self.finish, self.finish, self.end),
            *(self.tell, self.tell, self.hear, self.hear),
        )

    def step(self):
        """One thing happens, if it can."""
        if self.rng.random() < 0.01:
            self.world.machines[self.rng.randrange(NODES)].begin()
        self.rng.choice(self.acts)(self.rng.randrange(NODES), self.rng.randrange(NODES))

    def book(self, node, rank):
        """A front-end books a request and sends it."""
        self.sent[node, rank].append(book(self.world, node, rank))
        self.booked[rank] += 1
        self.mine[node][rank] += 1

    def arrive(self, node, rank):
        """One arrives, and mostly the rank's row shows it."""
        if self.sent[node, rank]:
            self.queue[rank].append((node, self.sent[node, rank].popleft()))
            self.world.engines[rank].count_received(self.world.frontends[node][0], TOKENS)
            if self.rng.random() < 0.7:
                self.publish(rank)

    def finish(self, _, rank):
        """One is finished, and its answer is on its way."""
        if self.queue[rank]:
            node, route = self.queue[rank].popleft()
            self.mine[node][rank] -= 1
            self.world.engines[rank].finished(1)
            self.publish(rank)
            self.answered.append((node, route))

    def end(self, *_):
        """An answer is here."""
        if self.answered:
            node, route = self.answered.popleft()
            self.world.frontends[node][1].end(route)

    def tell(self, node, _):
        """A relay looks."""
        self.world.tell(node, whole=self.rng.random() < 0.1)

    def hear(self, a, b):
        """A message arrives, or is lost."""
        if a != b and self.world.on_their_way[a, b]:
            frames = self.world.on_their_way[a, b].popleft()
            if self.rng.random() < 0.8:
                self.world.machines[b].hear(frames)

    def publish(self, rank):
        """A rank's row shows its queue."""
        waiting = len(self.queue[rank])
        self.world.engines[rank].publish(waiting=waiting, running=0, prefill_backlog=TOKENS * waiting)

    def drain(self):
        """All that is on its way arrives, is finished and answered."""
        for node, rank in self.sent:
            while self.sent[node, rank]:
                self.arrive(node, rank)
        for rank in range(NODES):
            while self.queue[rank]:
                self.finish(None, rank)
        while self.answered:
            self.end()
        self.world.settle()

    def check(self):
        """The sums of each board are within what is true."""
        for machine in self.world.machines:
            finished = machine.board.requests_finished.tolist()
            counts, tokens = machine.requests(), machine.tokens()
            for rank in range(NODES):
                low, high = self.mine[machine.node][rank], self.booked[rank] - finished[rank]
                assert low <= counts[rank] <= high, (machine.node, rank)
                assert TOKENS * low <= tokens[rank] <= TOKENS * high, (machine.node, rank)


@pytest.mark.parametrize("seed", range(3))
def test_sums_hold_whatever_is_lost(world, seed):
    """Guards against a booking that is lost or counted twice at any moment, on any board.

    A board counts at least what its own front-ends have booked and no engine has finished, and at most what all
    have booked, less what the row that it has says is finished.
    """
    traffic = Traffic(world, seed)
    for _ in range(1000):
        traffic.step()
        traffic.check()
    traffic.drain()
    for machine in world.machines:
        assert (machine.requests(), machine.tokens()) == ([0] * NODES, [0] * NODES)
        began = 100 * (machine.node + 1)
        received = machine.board.received_requests[machine.node] - [began + f for f in range(NODES)]
        assert received.sum() == traffic.booked[machine.node]


def test_a_request_that_is_here_before_its_booking_counts_once(world):
    """Guards against a sum that misses such a request, or that counts it twice when the booking comes."""
    book(world, 0, 1)
    world.engines[1].count_received(world.frontends[0][0], TOKENS)
    assert (world.machines[1].requests()[1], world.machines[1].tokens()[1]) == (1, TOKENS)
    world.engines[1].publish(waiting=1, running=0, prefill_backlog=TOKENS)
    assert (world.machines[1].requests()[1], world.machines[1].tokens()[1]) == (1, TOKENS)
    counter = world.machines[1].board.outstanding_requests(world.machines[1].board.counted_frontends())
    world.tell(0)
    world.machines[1].hear(world.on_their_way[0, 1].popleft())
    assert counter.count()[1] == 1  # also of a counter that was made before it came


def test_a_silent_node_is_unknown_until_it_is_heard(world):
    """Guards against requests to a node that no one hears, and bookings of its front-ends that stay for ever."""
    book(world, 1, 0)
    world.tell(1)
    here = world.machines[0]
    here.hear(world.on_their_way[1, 0].popleft())
    assert here.requests()[0] == 1
    for _ in range(2 * SILENT_INTERVALS):
        world.now_ns += REMOTE_INTERVAL_NS
        here.others.listen(here.now_ns)
    assert [verdict(here.board, rank) for rank in range(NODES)] == [Verdict.ALIVE, *[Verdict.UNKNOWN] * 2]
    assert frontend_verdict(here.board, 1) == Verdict.UNKNOWN & 3
    assert here.requests()[0] == 0
    world.tell(1)
    here.hear(world.on_their_way[1, 0].popleft())
    assert verdict(here.board, 1) is Verdict.ALIVE
    assert here.requests()[0] == 1


def test_what_a_coordinator_that_takes_over_finds_is_unknown_if_it_is_old(world):
    """Guards against rows that a relay that starts again revives."""
    here = world.machines[0]
    world.now_ns += SILENT_INTERVALS * REMOTE_INTERVAL_NS
    here.begin()
    assert [verdict(here.board, rank) for rank in range(NODES)] == [Verdict.ALIVE, *[Verdict.UNKNOWN] * 2]


def test_only_the_newest_process_of_a_rank_is_heard(world):
    """Guards against a row that an older process, or a late message, brings back."""
    old = world.machines[1].tell(whole=True)
    board = world.machines[1].board
    board.unlock_engine(1)
    world.engines[1] = world.machines[1].engine()
    world.settle()
    here = world.machines[0]
    assert here.board.engine_incarnation[1] == 2
    for waiting in (8, 9):
        world.engines[1].publish(waiting=waiting, running=0)
        world.tell(1)
    here.hear(world.on_their_way[1, 0].pop())
    here.hear(world.on_their_way[1, 0].pop())
    here.hear(old)
    assert here.board.snapshot()[1]["waiting"] == 9
    assert here.board.engine_incarnation[1] == 2


def test_a_node_with_another_board_begins_another_numbering(world):
    """Guards against counts of a board that is gone, in either direction."""
    for node, rank in ((0, 1), (0, 1), (1, 2), (2, 1)):
        book(world, node, rank)
    world.settle()
    assert [machine.requests() for machine in world.machines] == [[0, 3, 1]] * NODES
    late = world.machines[0].tell(whole=True)  # in the numbering of the old board
    gone = world.machines[1].tell(whole=True)
    world.replace(1)
    world.settle()
    assert [machine.requests() for machine in world.machines] == [[0, 0, 0]] * NODES
    book(world, 0, 1)
    book(world, 1, 2)
    book(world, 1, 0)
    world.settle()
    assert [machine.requests() for machine in world.machines] == [[1, 1, 1]] * NODES
    world.machines[2].others = RelayedRows(world.machines[2].board, world.machines[2].board.marks, 0)
    world.machines[2].hear(late)  # to a relay that has not heard of a newer one
    world.machines[2].hear(world.machines[1].tell(whole=True))
    assert world.machines[2].requests()[1] == 1
    world.settle()
    assert [machine.requests() for machine in world.machines] == [[1, 1, 1]] * NODES
    world.engines[1].count_received(world.frontends[0][0], TOKENS)
    world.engines[1].publish(waiting=0, running=1)
    world.settle()
    assert [machine.board.snapshot()["in_flight"].tolist() for machine in world.machines] == [[1, 0, 1]] * NODES
    with pytest.raises(WireError, match="that another board replaced"):
        world.machines[0].hear(gone)


def test_a_drain_is_known_on_all_nodes(world):
    """Guards against front-ends of other nodes that go on choosing a drained rank."""
    world.machines[1].board.marks.set_engine(1, drained=True)
    world.settle()
    assert all(machine.board.engine_mark[1] & DRAINED for machine in world.machines)
    world.machines[1].board.marks.set_engine(1, drained=False)
    world.settle()
    assert not any(machine.board.engine_mark[1] & DRAINED for machine in world.machines)


def test_news_that_cannot_be_are_refused(world):
    """Guards against a node that has another one's number, and against rows that are not its own."""
    here, other = world.machines[0], world.machines[1]
    news = decode_news(other.tell(whole=True))
    with pytest.raises(WireError, match="needs a number of its own"):
        here.others.write(decode_news(here.tell(whole=True)), 0, here.now_ns)
    with pytest.raises(WireError, match="front-end row 1 is not one of node 2"):
        here.others.write(
            News(2, news.board, 0, 0, 0, boards=news.boards, frontends=news.frontends), 0, here.now_ns
        )
    assert here.board.lock_engine(1)
    here.board.marks.set_engine(1, verdict=Verdict.ALIVE, remote=False)
    world.now_ns += 1000 * MS
    with pytest.raises(WireError, match="rank 1 of node 1 is a process of this node, too"):
        here.hear(other.tell(whole=True))
    with pytest.raises(WireError, match="topic"):
        decode_news(topic_of(2) + encode_news(news)[2:])
    with pytest.raises(WireError, match="not a relay's message"):
        decode_news(topic_of(1) + b"\x93\x01\x02")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            {"words": pack_words([5] * (CARRIED - 1) + [-1])},
            "a row of node 1: not a row: cache_state is negative",
        ),
        ({"mark": 48}, "rank 1 of node 1 has the mark 48, which is no verdict"),
        ({"mark": DRAINED | RELAYED}, "rank 1 of node 1 has the mark 132"),
    ],
)
def test_a_row_that_cannot_be_is_refused_and_no_other(world, wrong, why):
    """Guards against a damaged row that is written, or that keeps the rows beside it from being written."""
    here, other = world.machines[0], world.machines[1]
    world.engines[1].publish(waiting=3, running=0)
    book(world, 1, 0)
    world.now_ns += MS
    news = decode_news(other.tell())
    before = [here.board.load[1], here.board.engine_mark[1]]
    damaged = structs.replace(news, engines=[structs.replace(news.engines[0], **wrong)])
    with pytest.raises(WireError, match=why):
        here.others.write(damaged, 0, here.now_ns)
    assert [here.board.load[1], here.board.engine_mark[1]] == before
    assert here.requests()[0] == 1  # the booking in the same news counts
    here.others.write(news, 0, here.now_ns)
    assert unpack_load(int(here.board.load[1]))[0] == 3


def test_damaged_news_do_no_harm(world):
    """Guards against a message that ends the relay, or writes a word that is not of its node."""
    rng, here = random.Random(0), world.machines[0]
    for _ in range(4):
        book(world, 1, 0)
    news = world.machines[1].tell(whole=True)
    untouched = [(here.board.index(name, row), name, row) for name, row in (("load", 0), ("frontend_pid", 0))]
    before = [here.board.words[at] for at, *_ in untouched]
    decoded = 0
    for _ in range(3000):
        damaged = bytearray(news)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(2, len(damaged))] = rng.randrange(256)  # its topic stays
        try:
            here.hear(bytes(damaged[: rng.randrange(len(news)) if rng.random() < 0.1 else None]))
            decoded += 1
        except WireError:
            pass
        here.requests()
    assert decoded > 100
    assert [here.board.words[at] for at, *_ in untouched] == before
    here.begin()
    world.settle()
    assert here.board.received_requests[0, 0] == 100


@pytest.fixture
def one(group, using):
    """The board of a node whose two ranks are marked alive; no process has had their rows."""
    return using(LoneBoard(group, nodes=2, waves=False))


def test_a_mark_may_come_before_the_incarnation(one):
    """Guards against a rank that other nodes never see: the watch had marked it before its row was begun."""
    own = OwnRows(one)
    assert own.look(1000 * MS).engines == []
    initialise(one, 1)
    assert [said.rank for said in own.look(2000 * MS).engines] == [1]
    initialise(one, 0)
    assert [said.rank for said in own.look(3000 * MS).engines] == [0, 1]
    one.words[one.index("revision")] += 1
    own.look(4000 * MS)
    assert own.look(5000 * MS).engines == []


def test_a_mark_may_change_while_rows_are_found(one, monkeypatch):
    """Guards against a relay that takes a mark for a column of a row, and fails or tells another row."""
    own, found = OwnRows(one), []
    find = own._find_rows

    def and_then():
        find()
        found.append(one.words[one.index("revision")])
        one.marks.set_engine(1, verdict=Verdict.STALLED)

    monkeypatch.setattr(own, "_find_rows", and_then)
    own.look(1000 * MS)
    monkeypatch.undo()
    initialise(one, 1)
    (said,) = own.look(2000 * MS).engines
    assert (said.rank, said.mark) == (1, Verdict.STALLED)
