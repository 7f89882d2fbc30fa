"""Bookings heal: after any order of sends, losses and deaths the sums become right.

One board, its engines and its front-ends in one process, driven by hypothesis step by step; the watcher's rounds
are called by hand, so nothing waits. A request's message is in its engine's inbox until it is received; it may be
refused by the sender's socket, lost, or taken in; processes may be killed with messages in flight.

In half of the runs there are *ghosts* too: messages that arrive although their request was given up before (its
client left), or at a successor of the engine that they were sent to. No process can count these right at once, so
there only the end is checked: nothing may last.
"""

from __future__ import annotations

import itertools
import os
import platform

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dpshm import Engine, Frontend, NoEngineAvailable
from tests.support import HandWatch, LoneBoard

RANKS = 2
ROWS = 24
RESTARTS = ROWS - 6
_numbers = itertools.count()

indexes = st.integers(0, 1 << 16)


class Request:
    """One request, its booking and its message."""

    def __init__(self, route, frontend):
        self.route = route
        self.frontend = frontend
        self.row = frontend.index
        self.dp_rank = route.dp_rank
        self.tokens = route.prompt_tokens
        self.over = False  # its front-end has called done or cancel, or is gone


class Bookings(RuleBasedStateMachine):
    """The group; see the module."""

    def __init__(self):
        super().__init__()
        self.group = f"test{os.getpid()}-bookings-{next(_numbers)}"
        self.board = LoneBoard(self.group, engines=RANKS, frontends=ROWS, waves=False)
        self.board.segment.sockets_path.mkdir(0o700)  # for the prefix indexes
        self.watch = HandWatch(self.board)
        self.engines = [None] * RANKS
        self.frontends = []
        self.restarts = 0
        self.open = []  # requests that their front-ends still wait for
        self.inbox = [[] for _ in range(RANKS)]  # in flight
        self.received = [[] for _ in range(RANKS)]  # by the engine, and not published
        self.holding = [0] * RANKS  # requests that the engine has
        self.pick = 0
        self.ghosts = False

    @initialize(ghosts=st.booleans())
    def begin(self, ghosts):
        self.ghosts = ghosts
        for dp_rank in range(RANKS):
            self.start_engine(dp_rank)
        self.start_frontend("a")

    # Front-ends.

    def policy(self, view, request):
        assert view.in_flight == self.board.snapshot()["in_flight"].tolist()
        return view.ranks[self.pick % len(view.ranks)]

    @precondition(lambda self: len(self.frontends) < 3 and self.restarts < RESTARTS)
    @rule(owner=st.sampled_from("ab"))
    def start_frontend(self, owner):
        frontend = Frontend.attach(self.group, owner=owner, policy=self.policy)
        self.watch.after(0.05)
        if not self.ghosts:
            for dp_rank, inbox in enumerate(self.inbox):
                assert self.engines[dp_rank] is None or frontend.index not in {r.row for r in inbox}
        self.frontends.append(frontend)

    @precondition(lambda self: self.frontends)
    @rule(which=indexes, killed=st.booleans())
    def end_frontend(self, which, killed):
        frontend = self.frontends.pop(which % len(self.frontends))
        self.restarts += 1
        for request in self.open:
            request.over |= request.frontend is frontend
        self.open = [request for request in self.open if not request.over]
        if killed:
            frontend.board.close()  # the lock goes and nothing else happens, as with SIGKILL
        else:
            frontend.close()
        self.watch.after(0.05)

    # Requests.

    @precondition(lambda self: self.frontends)
    @rule(which=indexes, pick=indexes, tokens=st.integers(0, 50), pinned=st.booleans(), prompt=st.booleans())
    def route(self, which, pick, tokens, pinned, prompt):
        frontend = self.frontends[which % len(self.frontends)]
        self.pick = pick
        if self.ghosts:  # counts that no process can know at once are right at the next refresh, within 100 ms
            frontend._decisions.next_refresh_ns = 0
        try:
            dp_rank = pick % RANKS if pinned else None
            route = frontend.route(tokens, dp_rank=dp_rank, prompt=range(tokens) if prompt else None)
        except NoEngineAvailable:
            assert self.engines[pick % RANKS] is None if pinned else self.engines == [None] * RANKS
            return
        assert route.prompt_tokens + route.cached_tokens == tokens
        assert route.prompt_tokens >= min(1, tokens)
        request = Request(route, frontend)
        self.open.append(request)
        self.inbox[request.dp_rank].append(request)

    @precondition(lambda self: any(self.inbox))
    @rule(which=indexes, told=st.booleans())
    def lose(self, which, told):
        in_flight = [r for inbox in self.inbox for r in inbox if r.frontend in self.frontends and not r.over]
        if not in_flight:
            return
        request = in_flight[which % len(in_flight)]
        self.inbox[request.dp_rank].remove(request)
        if told:  # the socket refused it
            self.open.remove(request)
            request.over = True
            request.route.cancel()
            request.route.cancel()

    @precondition(lambda self: self.open)
    @rule(which=indexes, cancel=st.booleans())
    def end(self, which, cancel):
        request = self.open[which % len(self.open)]
        in_flight = request in self.inbox[request.dp_rank] or request in self.received[request.dp_rank]
        if in_flight and not self.ghosts:
            return
        self.open.remove(request)
        request.over = True
        if cancel and self.ghosts:
            request.route.cancel()  # although it was sent
        request.route.done()

    # Engines.

    @rule(dp_rank=st.integers(0, RANKS - 1), which=indexes, many=st.booleans())
    def receive(self, dp_rank, which, many):
        engine, inbox = self.engines[dp_rank], self.inbox[dp_rank]
        if engine is None or not inbox:
            return
        for _ in range(len(inbox) if many else 1):
            request = inbox.pop(which % len(inbox))
            engine.receive(request.row, request.tokens)
            self.received[dp_rank].append(request)

    @rule(dp_rank=st.integers(0, RANKS - 1), blocks=st.integers(0, 12))
    def change_cache(self, dp_rank, blocks):
        if self.engines[dp_rank] is not None:
            cache = self.engines[dp_rank].cache
            cache.clear()
            cache.insert(cache.hasher.fingerprints(range(4 * blocks)))

    @rule(dp_rank=st.integers(0, RANKS - 1))
    def publish(self, dp_rank):
        if self.engines[dp_rank] is not None:
            self.holding[dp_rank] += len(self.received[dp_rank])
            self.received[dp_rank].clear()
            self.engines[dp_rank].publish(waiting=self.holding[dp_rank], running=0)

    @rule(dp_rank=st.integers(0, RANKS - 1), killed=st.booleans())
    def end_engine(self, dp_rank, killed):
        engine, self.engines[dp_rank] = self.engines[dp_rank], None
        if engine is None:
            return
        self.received[dp_rank].clear()  # dies with it
        if killed:
            engine.socket.close()
            engine._output.close()
            engine.board.close()
        else:
            engine.close()
        self.watch.after(0.05)

    @rule(dp_rank=st.integers(0, RANKS - 1))
    def start_engine(self, dp_rank):
        if self.engines[dp_rank] is not None:
            return
        self.engines[dp_rank] = Engine.attach(self.group, dp_rank)
        assert self.engines[dp_rank].open_cache(64, block_tokens=4).has_index
        self.watch.after(0.05)
        self.received[dp_rank].clear()
        self.holding[dp_rank] = 0
        assert self.board.snapshot()[dp_rank]["in_flight"] == 0  # what its predecessor had not received is gone
        if not self.ghosts:
            self.inbox[dp_rank].clear()  # what was in flight went to a socket that is gone

    # What always holds.

    @invariant()
    def no_live_booking_is_missed(self):
        snapshot = self.board.snapshot()
        for frontend in self.frontends:
            assert frontend.snapshot()["in_flight"].tolist() == snapshot["in_flight"].tolist()
        for dp_rank in range(RANKS):
            in_flight, in_flight_tokens = snapshot[dp_rank]["in_flight"], snapshot[dp_rank]["in_flight_tokens"]
            # Received requests belong to the engine, even if no front-end waits; a killed engine cannot say.
            taken = len(self.received[dp_rank])
            most = sum(request.dp_rank == dp_rank for request in self.open) + taken
            assert in_flight <= most or self.engines[dp_rank] is None
            if self.ghosts:
                continue
            present = [
                request
                for request in self.inbox[dp_rank] + self.received[dp_rank]
                if not request.over and request.frontend in self.frontends
            ]
            assert in_flight >= len(present)
            assert in_flight_tokens >= sum(request.tokens for request in present)

    def teardown(self):
        try:
            self.everything_ends()
        finally:
            for handle in [*self.frontends, *self.engines, self.watch, self.board]:
                if handle is not None:
                    handle.close()

    def everything_ends(self):
        for dp_rank in range(RANKS):
            self.start_engine(dp_rank)
            self.receive(dp_rank, 0, True)
            self.publish(dp_rank)
        for request in self.open:
            request.route.done()
        snapshot = self.board.snapshot()
        assert snapshot["in_flight"].tolist() == [0] * RANKS
        assert snapshot["in_flight_tokens"].tolist() == [0] * RANKS
        assert snapshot["waiting"].tolist() == self.holding
        ranks = range(RANKS)
        routes = [f.route(7, dp_rank=dp_rank) for f in self.frontends for dp_rank in ranks]  # the next one counts
        assert self.board.snapshot()["in_flight"].tolist() == [len(self.frontends)] * RANKS
        assert self.board.snapshot()["in_flight_tokens"].tolist() == [7 * len(self.frontends)] * RANKS
        for route in routes:
            route.done()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="stores of one thread are seen in order on x86 alone")
class TestBookings(Bookings.TestCase):
    """Guards against counts that a lost, refused, late or doubled message, or a restart, leaves wrong for ever."""

    settings = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
