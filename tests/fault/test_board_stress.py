"""Several processes on one board whose every word can be checked: no word is torn, lost or set back.

A writer's load is a function of one counter: waiting is the counter, running twice it, the KV-cache usage the
counter modulo its range. So a reader can tell a whole word from one made of two halves, and a newer one from an
older. Writers are killed in the middle of it, again and again.
"""

from __future__ import annotations

import random
import signal
import time

import pytest

from dpshm import Coordinator, Frontend
from dpshm.board.words import unpack_load
from dpshm.rules.liveness import Verdict
from tests.support import Remote, verdict, wait_until

pytestmark = pytest.mark.slow

RANKS = 3
KV_ONE = (1 << 16) - 1
PERIOD = 1 << 22  # what waiting can count up to, and running twice

WRITE = """
engine = Engine.attach(group, dp_rank)
counter = 0
def write():
    global counter
    counter += 1
    with engine.step(prefill_tokens=3, batch=2):
        engine.receive(dp_rank, prompt_tokens=7)
    engine.finished()
    engine.publish(waiting=counter % PERIOD, running=2 * (counter % PERIOD), prefill_backlog=3 * counter,
                   kv_cache_usage=counter % KV_ONE / KV_ONE, step=counter)
"""

READ = """
from dpshm.board.words import unpack_load
board = Board.attach(group)
# What only grows within an incarnation, and in which order one publish stores it.
GROWING = ("engine_incarnation", "steps", "prompt_tokens", "generation_tokens", "progress", "requests_finished",
           "beat")
counts = {"reads": 0, "torn": 0, "backwards": 0}
last = [dict.fromkeys((*GROWING, "load", "received", "balance"), 0) for _ in range(RANKS)]

def look(e):
    seen = last[e]
    counts["reads"] += 1
    before = int(board.engine_incarnation[e])
    received = int(board.received_requests[e, e])
    word = int(board.load[e])
    waiting, running, _ = unpack_load(word)
    balance = int(board.request_offset[e])  # those in the load, less those received: twice the counter
    whole = running == 2 * waiting and word & 0xFFFF == waiting % KV_ONE and balance % 2 == 0 <= balance
    values = {name: int(getattr(board, name)[e]) for name in GROWING}
    if int(board.engine_incarnation[e]) != before or before != seen["engine_incarnation"]:
        last[e] = {**values, "engine_incarnation": before, "load": 0, "received": 0, "balance": 0}
        counts["torn"] += not whole  # a word is whole at any time
        return
    counts["torn"] += not whole
    values |= {"load": waiting, "received": received, "balance": balance}
    if e == RANKS - 1:  # a successor may be clearing the row: it stores its incarnation last
        counts["backwards"] += sum(0 != value < seen[name] for name, value in values.items())
    else:
        counts["backwards"] += sum(value < seen[name] for name, value in values.items())
    last[e] = values
"""


def start(using, code, **values):
    """A process that has run some code and knows the numbers of this module."""
    remote = using(Remote())
    remote.run(code, RANKS=RANKS, PERIOD=PERIOD, KV_ONE=KV_ONE, **values)
    return remote


def check(counts):
    """What a reader has counted is all right."""
    assert counts["torn"] == 0
    assert counts["backwards"] == 0


def test_writers_readers_and_a_writer_that_is_killed(group, using):
    """Guards against torn words, reports that are lost or go back, and rows that a killed writer spoils."""
    rng = random.Random(7)
    coordinator = using(Coordinator(group=group, dp_size=RANKS))
    board = coordinator.board
    readers = [start(using, READ, group=group) for _ in range(2)]
    for reader in readers:
        reader.begin("while not told():\n    for e in range(RANKS): look(e)")
    steady = [start(using, WRITE, group=group, dp_rank=dp_rank) for dp_rank in range(RANKS - 1)]
    for writer in steady:
        writer.begin("while not told(): write()")

    last = RANKS - 1
    for incarnation in range(1, 7):
        writer = start(using, WRITE, group=group, dp_rank=last)
        assert board.engine_incarnation[last] == incarnation
        assert verdict(board, last) is Verdict.ALIVE
        assert board.steps[last] == 0
        writer.begin("while True: write()")
        wait_until(lambda: board.steps[last] > 0)
        time.sleep(rng.random() * 0.05)
        writer.kill()
        # Whatever it was in the middle of, what is there is what it stored, word by word.
        waiting, running, _ = unpack_load(int(board.load[last]))
        assert running == 2 * waiting
        assert int(board.load[last]) & KV_ONE == waiting % KV_ONE
        steps = int(board.steps[last])
        assert waiting <= steps <= waiting + 1
        assert steps - 1 <= board.prompt_tokens[last] // 3 <= steps
        assert board.received_requests[last, last] in (waiting, waiting + 1)
        assert board.request_offset[last] in (2 * waiting, 2 * (waiting - 1))
        wait_until(lambda: verdict(board, last) is Verdict.DEAD)

    for writer in steady:
        written = writer.eval("counter")
        e = writer.eval("dp_rank")
        row = board.snapshot()[e]
        assert (row["waiting"], row["running"]) == (written % PERIOD, 2 * (written % PERIOD))
        assert (row["steps"], row["step"], row["requests_finished"]) == (written, written, written)
        assert (row["prompt_tokens"], row["generation_tokens"]) == (3 * written, 2 * written)
        assert (board.received_requests[e, e], board.received_tokens[e, e]) == (written, 7 * written)
        assert written > 100
    for reader in readers:
        counts = reader.eval("counts")
        check(counts)
        assert counts["reads"] > 1000


def test_bookings_of_several_processes_come_out_even(group, using, tmp_path):
    """Guards against requests that processes lose or double between them: at the end every sum is exactly zero.

    Front-ends send real datagrams to engines; one engine and one front-end are killed on the way, with messages
    in their sockets. What the killed front-end sent leaves the sums with it.
    """
    engine_code = """
import socket
engine = Engine.attach(group, dp_rank)
inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
try:
    os.unlink(path)
except FileNotFoundError:
    pass
inbox.bind(path)
inbox.settimeout(0.01)
holding = 0
def serve():
    global holding
    try:
        index, tokens = map(int, inbox.recv(100).split())
    except TimeoutError:
        return
    engine.receive(index, tokens)
    holding += 1
    if holding % 3 == 0:
        engine.publish(waiting=holding, running=0)
"""
    frontend_code = """
import random, socket
rng = random.Random(owner)
frontend = Frontend.attach(group, owner=owner)
outbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
outbox.settimeout(2.0)
opened, tally = [], {"sent": 0, "refused": 0, "none": 0}
def work():
    try:
        route = frontend.route(rng.randrange(100))
    except NoEngineAvailable:
        tally["none"] += 1
        return
    try:
        outbox.sendto(f"{frontend.index} {route.prompt_tokens}".encode(), paths[route.dp_rank])
    except OSError:
        tally["refused"] += 1
        route.cancel()
        return
    tally["sent"] += 1
    opened.append(route)
    if len(opened) > 20:
        opened.pop(rng.randrange(len(opened))).done()
"""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    board = coordinator.board
    paths = [str(tmp_path / str(dp_rank)) for dp_rank in range(2)]

    def start_engine(dp_rank):
        remote = start(using, engine_code, group=group, dp_rank=dp_rank, path=paths[dp_rank])
        remote.begin("while not told(): serve()")
        return remote

    engines = [start_engine(dp_rank) for dp_rank in range(2)]
    frontends = [start(using, frontend_code, group=group, owner=f"api-{i}", paths=paths) for i in range(3)]
    for frontend in frontends:
        frontend.begin("while not told(): work()")

    def received():
        return int(board.received_requests.sum())

    wait_until(lambda: received() > 500)
    for _ in range(2):
        engines[1].kill()
        engines[1] = start_engine(1)
        before = received()
        wait_until(lambda before=before: received() > before + 500)
    frontends[2].kill()
    before = received()
    wait_until(lambda: received() > before + 500)

    tallies = [frontend.eval("tally") for frontend in frontends[:2]]
    assert all(tally["sent"] > 100 for tally in tallies)
    for remote in engines:  # each takes in what its socket still holds, and publishes it
        remote.run("inbox.settimeout(0.0)")
        remote.run(
            """
while True:
    try:
        serve()
    except BlockingIOError:
        break
engine.publish(waiting=holding, running=0)
"""
        )
    for remote in frontends[:2]:
        remote.run("for route in opened: route.done()")
    wait_until(lambda: board.snapshot()["in_flight"].tolist() == [0, 0])
    assert board.snapshot()["in_flight_tokens"].tolist() == [0, 0]
    assert board.snapshot()["waiting"].tolist() == [remote.eval("holding") for remote in engines]
    with Frontend.attach(group) as frontend:
        _booked = frontend.route(9, dp_rank=0)
        assert frontend.snapshot()[0]["in_flight_tokens"] == 9


def test_a_front_end_that_is_killed_while_it_routes(group, using):
    """Guards against a front-end's death in the middle of a booking that leaves its row, or a sum, unusable."""
    rng = random.Random(11)
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    board = coordinator.board
    engine = start(using, "engine = Engine.attach(group, 0)", group=group)
    other = start(using, "engine = Engine.attach(group, 1)", group=group)
    for _ in range(6):
        remote = start(using, "frontend = Frontend.attach(group, owner='api')", group=group)
        index = remote.eval("frontend.index")
        remote.begin("while True:\n    route = frontend.route(10)\n    route.done()")
        wait_until(lambda index=index: board.routed[index] > 0)
        time.sleep(rng.random() * 0.03)
        remote.kill()
        assert board.sent_requests[index].min() >= 0
        assert board.sent_requests[index].max() <= 1
        wait_until(lambda: board.snapshot()["in_flight"].tolist() == [0, 0])
    for remote in (engine, other):
        remote.signal(signal.SIGKILL)
    assert board.frontends_used() <= 7
