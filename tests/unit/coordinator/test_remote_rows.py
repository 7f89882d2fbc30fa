"""Tests of `dpshm.coordinator.remote_rows`: messages of engines on other nodes, on a real board, by hand."""

from __future__ import annotations

import random
import time

import msgspec
import pytest

from dpshm import Engine, Frontend, WireError
from dpshm.board.layout import CARRIED_WORDS, MAX_FRONTENDS
from dpshm.board.words import COUNT_MASK, pack_load
from dpshm.coordinator.holders import LOCK_TEST_NS
from dpshm.coordinator.remote_rows import RemoteRows
from dpshm.frontend.row import LATE_NS
from dpshm.net import wire
from dpshm.rules.liveness import Verdict
from tests.support import LoneBoard

MS = 1_000_000


@pytest.fixture
def board(group, using):
    """A board of two ranks that no coordinator writes."""
    return using(LoneBoard(group))


@pytest.fixture
def remote(board):
    """What a coordinator does with messages, on that board."""
    return RemoteRows(board, board.marks)


def message(report=1, *, process=7, waiting=0, running=0, here=True, clock_ns=1000 * MS, received=(), **words):
    """A row that says so much."""
    values = dict.fromkeys(CARRIED_WORDS, 0)
    values["load", 0] = pack_load(waiting, running, 0.5)
    values["engine_pid", 0] = 4711
    for name, value in words.items():
        values[name, 0] = value
    counts = [wire.Received(*of_one) for of_one in received]
    words = wire.pack_words(tuple(values.values()))
    return wire.RemoteRow(process, report, clock_ns, here, words, wire.pack_received(counts))


def shown(board, *names):
    """Some figures of rank 1."""
    row = board.snapshot()[1]
    return tuple(int(row[name]) for name in names)


def test_a_row_says_what_the_engine_says(board, remote):
    """Guards against words that arrive in another column."""
    remote.report(1, message(waiting=3, running=4, prefill_backlog=90, requests_finished=12), 5000 * MS)
    row = board.snapshot(5000 * MS)[1]
    assert (row["waiting"], row["running"], row["requests"]) == (3, 4, 7)
    assert (row["prefill_backlog"], row["requests_finished"], row["pid"]) == (90, 12, 4711)
    assert (row["verdict"], row["incarnation"], row["age_ns"]) == ("alive", 1, 0)
    assert board.marks.is_remote(1)
    assert board.engine_present(1)
    assert not board.engine_alive(1)


@pytest.mark.parametrize("name", ["api", None])
def test_a_report_never_erases_a_booking(board, remote, group, using, name):
    """Guards against reports that count everything sent as received, as a stock engine's did (vllm#48027)."""
    frontend = using(Frontend.attach(group, owner="api"))
    who = name or frontend.index
    remote.report(1, message(1), 0)
    routes = [frontend.route(10, dp_rank=1) for _ in range(5)]
    remote.report(1, message(2), 0)  # made before the first of them arrived
    assert shown(board, "requests", "in_flight", "in_flight_tokens") == (5, 5, 50)
    remote.report(1, message(3, waiting=2, prefill_backlog=20, received=[(who, 2, 20)]), 0)
    assert shown(board, "requests", "in_flight", "in_flight_tokens") == (5, 3, 30)
    remote.report(1, message(4, running=5, received=[(who, 5, 50)]), 0)
    assert shown(board, "requests", "in_flight", "in_flight_tokens") == (5, 0, 0)
    for route in routes:
        route.done()
    remote.report(1, message(5, received=[(who, 5, 50)]), 0)
    assert shown(board, "requests", "in_flight", "in_flight_tokens") == (0, 0, 0)
    assert int(board.sent_requests[frontend.index, 1]) == int(board.received_requests[1, frontend.index]) == 5


def test_an_answer_may_come_before_the_row(board, remote, group, using):
    """Guards against a booking that is lost because the answer to another request overtook the row."""
    frontend = using(Frontend.attach(group, owner="api"))
    remote.report(1, message(1), 0)
    first, second = [frontend.route(10, dp_rank=1) for _ in range(2)]
    first.done()
    assert shown(board, "requests") == (2,)  # the row does not show yet that it ended
    remote.report(1, message(2, running=1, requests_finished=1, received=[("api", 2, 20)]), 0)
    assert shown(board, "requests", "in_flight") == (1, 0)
    second.done()
    remote.report(1, message(3, received=[("api", 2, 20)]), 0)
    assert shown(board, "requests", "in_flight", "in_flight_tokens") == (0, 0, 0)


def test_a_lost_request_heals_at_a_late_rank(board, remote, group, using):
    """Guards against a phantom that stays for ever, because requests that ended lately count as unfinished."""
    frontend = using(Frontend.attach(group, owner="api"))
    remote.report(1, message(1), time.monotonic_ns())
    for route in [frontend.route(10, dp_rank=1) for _ in range(3)]:
        route.done()  # none of them arrived
    for _ in range(2):
        remote.report(1, message(1), time.monotonic_ns() + LATE_NS)
        board.marks.begin_epoch()  # front-ends refresh
        frontend.choose()
    assert shown(board, "requests", "in_flight_tokens") == (0, 0)


def test_any_message_may_be_lost_or_come_twice(board, remote, group, using):
    """Guards against counts that add up what messages say, instead of what the newest says."""
    frontends = [using(Frontend.attach(group, owner=f"api-{i}")) for i in range(3)]
    rng, received, tokens, open_routes = random.Random(5), [0] * 3, [0] * 3, []
    arrived: list[int] = []
    remote.report(1, message(0), 0)
    for report in range(1, 401):
        f = rng.randrange(3)
        open_routes.append((f, frontends[f].route(7, dp_rank=1)))
        while len(open_routes) > len(arrived) and rng.random() < 0.5:
            f = open_routes[len(arrived)][0]
            arrived.append(f)
            received[f] += 1
            tokens[f] += 7
        says = message(
            report,
            waiting=len(arrived),
            prefill_backlog=7 * len(arrived),
            received=[(f"api-{f}", received[f], tokens[f]) for f in range(3) if received[f]],
        )
        for _ in range(rng.choice((0, 1, 1, 2))):
            remote.report(1, says, 0)
            assert shown(board, "requests", "in_flight") == (len(open_routes), len(open_routes) - len(arrived))


def test_an_older_message_changes_nothing(board, remote):
    """Guards against a message of a connection that was replaced, which comes after a newer one."""
    remote.report(1, message(5, running=5), 0)
    remote.report(1, message(4, running=9), 0)
    assert shown(board, "running") == (5,)


def test_a_repeated_message_says_only_that_the_process_lives(board, remote):
    """Guards against an engine that hangs in a step and looks alive, because its carrier repeats its last row."""
    remote.report(1, message(5, running=5, step_start=990 * MS), 100 * MS)
    before = board.engine_signs(1)
    remote.report(1, message(5, running=5, step_start=990 * MS), 350 * MS)
    assert board.engine_signs(1) == before
    assert int(board.remote_state[1, 0]) == 350 * MS


def test_times_are_of_the_receivers_clock(board, remote):
    """Guards against ages that compare the clocks of two machines, one of which started a year later."""
    remote.report(1, message(clock_ns=10**17, step_start=10**17 - 30 * MS), 500 * MS)
    row = board.snapshot(600 * MS)[1]
    assert (row["age_ns"], row["step_age_ns"]) == (100 * MS, 130 * MS)


def test_a_new_process_begins_with_nothing_outstanding(board, remote, group, using):
    """Guards against requests of a rank's dead process that stay booked at the next one."""
    frontend = using(Frontend.attach(group, owner="api"))
    remote.report(1, message(1), 0)
    lost = [frontend.route(10, dp_rank=1) for _ in range(4)]
    remote.report(1, message(2, waiting=3, received=[("api", 3, 30)]), 0)
    assert shown(board, "requests", "in_flight", "incarnation") == (4, 1, 1)
    remote.report(1, message(1, process=8), 0)
    assert shown(board, "requests", "in_flight", "incarnation") == (0, 0, 2)
    route = frontend.route(10, dp_rank=1)
    assert shown(board, "requests", "in_flight") == (1, 1)
    remote.report(1, message(2, process=8, running=1, received=[("api", 1, 10)]), 0)
    assert shown(board, "requests", "in_flight") == (1, 0)
    for ended in (route, *lost):
        ended.done()
    remote.report(1, message(3, process=8, received=[("api", 1, 10)]), 0)
    assert shown(board, "requests", "in_flight") == (0, 0)


def test_a_process_that_was_replaced_is_never_heard_again(board, remote):
    """Guards against a late message that revives the row of a dead process."""
    remote.report(1, message(9, process=7, running=9), 0)
    remote.report(1, message(1, process=8, running=2), 0)
    remote.report(1, message(10, process=7, running=9), 0)
    assert shown(board, "running", "incarnation") == (2, 2)


def test_a_coordinator_that_takes_over_keeps_what_is_in_flight(board, remote, group, using):
    """Guards against a takeover that takes bookings in flight for received, or the reverse."""
    frontend = using(Frontend.attach(group, owner="api"))
    remote.report(1, message(1), 0)
    routes = [frontend.route(10, dp_rank=1) for _ in range(4)]
    remote.report(1, message(2, waiting=1, prefill_backlog=10, received=[("api", 1, 10)]), 0)
    successor = RemoteRows(board, board.marks)
    routes += [frontend.route(10, dp_rank=1) for _ in range(2)]
    successor.report(1, message(7, waiting=3, prefill_backlog=30, received=[("api", 3, 30)]), 0)
    assert shown(board, "requests", "in_flight", "in_flight_tokens", "incarnation") == (6, 3, 30, 1)
    successor.report(1, message(8, waiting=6, prefill_backlog=60, received=[("api", 6, 60)]), 0)
    assert shown(board, "requests", "in_flight", "in_flight_tokens") == (6, 0, 0)


def test_a_frontend_that_restarts_begins_at_zero(board, remote, group, using):
    """Guards against a row's next holder that inherits the counts of the one before."""
    first = Frontend.attach(group, owner="a")
    remote.report(1, message(1), 0)
    _booked = first.route(10, dp_rank=1)
    remote.report(1, message(2, running=1, received=[("a", 1, 10)]), 0)
    first.close()
    second = using(Frontend.attach(group, owner="b"))
    assert second.index == first.index
    _again = second.route(10, dp_rank=1)
    assert shown(board, "requests", "in_flight") == (2, 1)
    remote.report(1, message(3, running=2, received=[("a", 1, 10), ("b", 1, 10)]), 0)
    assert shown(board, "requests", "in_flight") == (2, 0)


def test_an_engine_that_left_is_absent(board, remote):
    """Guards against a rank called unknown, with a warning, because it was told to end."""
    remote.report(1, message(1, running=2), 0)
    remote.report(1, message(2, running=2, here=False), 0)
    assert board.marks.engine_verdict(1) is Verdict.ABSENT
    assert shown(board, "requests", "pid") == (0, 0)
    remote.report(1, message(1, process=9), 0)
    assert board.marks.engine_verdict(1) is Verdict.ALIVE


def test_an_unknown_rank_comes_back_with_its_next_word(board, remote):
    """Guards against a rank that stays out of routing after its link was repaired."""
    remote.report(1, message(1), 0)
    board.mark([1], Verdict.UNKNOWN)
    assert not board.engine_present(1)
    remote.report(1, message(1), 0)  # a repeated one is enough
    assert board.marks.engine_verdict(1) is Verdict.ALIVE


def test_a_rank_of_this_node_is_not_written_from_afar(board, remote, group, using):
    """Guards against two writers of one row, of which one is on another node by a wrong rank number."""
    engine = using(Engine.attach(group, 1))
    engine.publish(waiting=0, running=1)
    with pytest.raises(WireError, match="a process of this node is that rank"):
        remote.report(1, message(1, running=9), 0)
    assert shown(board, "running") == (1,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"words": wire.pack_words([5] * (wire.CARRIED - 1) + [-1])},
        {"received": msgspec.Raw(b"\x93\x01\x02\x03")},
        {"received": msgspec.Raw(msgspec.msgpack.encode([("a", -1, 0)]))},
        {"received": msgspec.Raw(msgspec.msgpack.encode([("a", COUNT_MASK + 1, 0)]))},
        {"received": msgspec.Raw(msgspec.msgpack.encode([("a", 1, 1)] * (MAX_FRONTENDS + 1)))},
    ],
    ids=["negative word", "no list", "negative count", "count too large", "too many front-ends"],
)
def test_a_message_that_is_none_changes_nothing(board, remote, wrong):
    """Guards against a hostile message of which a part is stored before the rest is found to be wrong."""
    remote.report(1, message(1, running=3, received=[("a", 1, 1)]), 0)
    before = bytes(board.words.cast("B"))
    fields = {name: getattr(message(2, running=4), name) for name in wire.RemoteRow.__struct_fields__}
    hostile = wire.RemoteRow(**fields | wrong)
    with pytest.raises(WireError):
        remote.report(1, hostile, 0)
    assert bytes(board.words.cast("B")) == before
    with pytest.raises(WireError):  # also if it would be the first of a new process
        remote.report(1, wire.RemoteRow(**fields | wrong | {"process": 8}), 0)
    assert bytes(board.words.cast("B")) == before


def test_words_that_another_process_overwrote_come_back(board, remote, group):
    """Guards against a coordinator that stores only what has changed since, and takes the rest to be there."""
    remote.report(1, message(1, running=3, requests_finished=12), 0)
    board.marks.set_engine(1, verdict=Verdict.UNKNOWN, remote=False)
    Engine.attach(group, 1).close()
    later = 2 * LOCK_TEST_NS
    remote.report(1, message(2, process=8, running=3, requests_finished=12), later)
    assert shown(board, "running", "requests", "requests_finished", "pid") == (3, 3, 12, 4711)


@pytest.mark.parametrize("count", [0, 1, COUNT_MASK])
def test_false_counts_stay_in_bounds(board, remote, group, using, count):
    """Guards against numbers that overflow a word, or a sum over rows (rule 6)."""
    frontend = using(Frontend.attach(group, owner="a"))
    remote.report(1, message(1, received=[("a", 0, 0), (3, COUNT_MASK, COUNT_MASK)]), 0)
    remote.report(1, message(2, received=[("a", count, count), ("nobody", 5, 5), (4000, 9, 9)]), 0)
    remote.report(1, message(3, received=[("a", 0, 0)]), 0)
    _booked = frontend.route(3, dp_rank=1)
    assert shown(board, "requests")[0] >= 0
    assert (board.received_requests[1] <= COUNT_MASK).all()
    assert (board.received_requests[1] >= 0).all()
