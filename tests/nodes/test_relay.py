"""Relays between the boards of two nodes: `dpshm.coordinator.relay`."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from dpshm.net.keys import make_keys
from tests.nodes.machines import needs_nodes
from tests.nodes.relayed import RANKS, Relayed, node_of
from tests.nodes.traffic import TOKENS
from tests.support import RemoteError, wait_until

pytestmark = [needs_nodes, pytest.mark.slow]
ALL = list(range(RANKS))


def test_rows_and_bookings_are_on_both_boards(using):
    """Guards against a board that lacks the load, or the bookings, of another node."""
    made = Relayed(using)
    made.engines[3].run("engine.publish(waiting=2, running=5, prefill_backlog=70, kv_cache_usage=0.5)")
    wait_until(lambda: made.column(0, "running")[3] == 5)
    assert made.column(0, "prefill_backlog")[3] == 70
    made.frontends[0].run("routes = [frontend.route(10, dp_rank=rank, wake=False) for rank in (1, 2, 2)]")
    made.frontends[3].run("routes = [frontend.route(7, dp_rank=rank, wake=False) for rank in (0, 2)]")
    for node in range(2):
        wait_until(lambda: made.column(node, "in_flight") == [1, 1, 3, 0])  # noqa: B023 - called in this turn
        wait_until(lambda: made.column(node, "in_flight_tokens") == [7, 10, 27, 0])  # noqa: B023
    # Each front-end counts the bookings of the other node: the rank with the least is chosen by both.
    assert {made.frontends[n].eval("frontend.choose(1)") for n in range(4)} <= {0, 1}
    made.engines[2].run(
        "for f, tokens in ((0, 10), (0, 10), (3, 7)): engine.receive(f, tokens)\n"
        "engine.publish(waiting=3, running=0, prefill_backlog=27)"
    )
    for node in range(2):
        wait_until(lambda: made.column(node, "in_flight") == [1, 1, 0, 0])  # noqa: B023
        assert made.column(node, "requests") == [1, 1, 3, 7]
    for number, node in enumerate(made.nodes):

        def told(*command, node=node):
            # `doctor` ends with 1 if it finds something, here or elsewhere on this machine.
            run = [*node.within, sys.executable, "-m", "dpshm", *command]
            done = subprocess.run(run, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
            return done.stdout

        stat = json.loads(told("stat", "--json", "--group", "nodes"))
        assert [rank["requests"] for rank in stat["ranks"]] == [1, 1, 3, 7]
        away = [2, 3] if number == 0 else [0, 1]
        sign = f"on other nodes: @{away[0]} @{away[1]}"
        assert [json.loads(line)["remote"] for line in told("ls", "--json").splitlines()] == [away]
        assert sign in told("ls")
        assert json.loads(told("doctor", "--json"))["remote"] == {"nodes": away}
        assert sign in told("doctor")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_prompt_goes_to_the_rank_of_the_other_node_that_holds_it(using, rank):
    """Guards against prompts that are computed again on each node, and a node that joins and knows nothing."""
    made = Relayed(using)
    here, other = node_of(rank), 1 - node_of(rank)
    made.engines[rank].run(
        "import numpy as np\nengine.open_cache(1000, block_tokens=16)\nprompt = np.arange(1000)\n"
        "engine.cache.insert(engine.cache.hasher.fingerprints(prompt))"
    )
    asker = made.frontends[2 * other]
    asker.run("import numpy as np")

    def chosen(begin: int = 0) -> set[int]:
        """Where a prompt would go; ties are drawn."""
        ranks: set[int] = asker.eval(
            "{frontend.choose(prompt=np.arange(begin, begin + 1000)) for _ in range(16)}", begin=begin
        )
        return ranks

    wait_until(lambda: chosen() == {rank})
    # It follows what enters and leaves, also past a relay that begins again on either side.
    for begin, node in ((5000, here), (10_000, other)):
        made.restart(node)
        made.engines[rank].run(
            "engine.cache.evict(engine.cache.hasher.fingerprints(prompt))\nprompt = prompt + 5000\n"
            "engine.cache.insert(engine.cache.hasher.fingerprints(prompt))"
        )
        wait_until(lambda: chosen(begin) == {rank})  # noqa: B023 - called in this turn
        wait_until(lambda: len(chosen(begin - 5000)) > 1)  # noqa: B023
    asker.run("with frontend.route(prompt=np.arange(10_000, 11_000), wake=False) as route: pass")
    assert asker.eval("(route.dp_rank, route.prompt_tokens, route.cached_tokens)") == (rank, 8, 992)
    made.engines[rank].kill()
    made.start_engine(rank)
    wait_until(lambda: made.states(other)[rank] == "idle")
    wait_until(lambda: len(chosen(10_000)) > 1)


def test_a_cut_link_makes_the_other_node_unknown_until_it_is_mended(using):
    """Guards against requests to ranks behind a cut cable, and against a node that stops because of it."""
    made = Relayed(using)
    made.frontends[0].run("route = frontend.route(10, dp_rank=3, wake=False)")
    wait_until(lambda: made.column(1, "in_flight") == [0, 0, 0, 1])
    made.cable.cut()
    wait_until(lambda: made.states(0) == ["idle", "idle", "unknown", "unknown"])
    wait_until(lambda: made.states(1) == ["unknown", "unknown", "idle", "idle"])
    assert {made.frontends[0].eval("frontend.choose()") for _ in range(4)} == {0, 1}
    assert {made.frontends[3].eval("frontend.choose()") for _ in range(4)} == {2, 3}
    wait_until(lambda: made.column(1, "in_flight") == [0] * 4)  # the bookings of a silent node do not count
    made.cable.mend()
    for node in range(2):
        wait_until(lambda: made.states(node) == ["idle"] * RANKS)  # noqa: B023 - called in this turn
        wait_until(lambda: made.column(node, "in_flight") == [0, 0, 0, 1])  # noqa: B023


def test_a_rank_and_a_front_end_of_the_other_node_die_and_return(using):
    """Guards against dead ranks and lost bookings that the other node keeps, and against old rows that return."""
    made = Relayed(using)
    made.frontends[3].run("route = frontend.route(10, dp_rank=1, wake=False)")
    made.engines[2].run("engine.publish(waiting=4, running=0)")
    wait_until(lambda: made.column(0, "requests") == [0, 1, 4, 0])
    made.engines[2].kill()
    wait_until(lambda: made.states(0)[2] == "dead")
    made.frontends[3].kill()
    wait_until(lambda: made.column(0, "requests")[1] == 0)
    made.start_engine(2)
    for node in range(2):
        wait_until(lambda: made.states(node) == ["idle"] * RANKS)  # noqa: B023 - called in this turn
        wait_until(lambda: made.column(node, "incarnation")[2] == 2)  # noqa: B023
        wait_until(lambda: made.column(node, "requests") == [0] * RANKS)  # noqa: B023


def test_a_rank_moves_to_the_other_node(using):
    """Guards against counts of a rank's old board that make bookings at its new one wrong."""
    made = Relayed(using)
    made.frontends[0].run("routes = [frontend.route(10, dp_rank=3, wake=False) for _ in range(5)]")
    wait_until(lambda: made.column(1, "in_flight")[3] == 5)
    made.engines[3].run("for _ in range(4): engine.receive(0, 10)\nengine.publish(waiting=4, running=0)")
    wait_until(lambda: made.column(0, "in_flight")[3] == 1)
    made.engines[3].kill()
    engine = made.start_engine(3, node=0)
    for node in range(2):
        wait_until(lambda: (made.states(node)[3], made.column(node, "requests")[3]) == ("idle", 0))  # noqa: B023
    made.frontends[3].run("routes = [frontend.route(7, dp_rank=3, wake=False) for _ in range(2)]")
    row = made.frontends[3].eval("frontend.index")
    for node in range(2):
        wait_until(lambda: made.column(node, "in_flight")[3] == 2)  # noqa: B023
    engine.run(f"for _ in range(2): engine.receive({row}, 7)\nengine.publish(waiting=2, running=0)")
    for node in range(2):
        wait_until(lambda: (made.column(node, "requests")[3], made.column(node, "in_flight")[3]) == (2, 0))  # noqa: B023


@pytest.mark.parametrize("node", [0, 1])
def test_a_coordinator_is_killed_and_replaced(using, node):
    """Guards against a relay that brings back what is old, or forgets what is in flight, when it starts again."""
    made = Relayed(using)
    made.frontends[0].run("routes = [frontend.route(10, dp_rank=2, wake=False) for _ in range(3)]")
    made.frontends[2].run("routes = [frontend.route(10, dp_rank=1, wake=False) for _ in range(2)]")
    for at in range(2):
        wait_until(lambda: made.column(at, "in_flight") == [0, 2, 3, 0])  # noqa: B023 - called in this turn
    made.coordinators[node].kill()
    wait_until(lambda: "unknown" in made.states(1 - node))
    made.engines[2 * (1 - node)].run("engine.publish(waiting=6, running=0)")  # while no relay hears it
    made.coordinators[node] = using(made.nodes[node].process())
    made.start(node)
    queued = [0, 0, 6, 0] if node == 0 else [6, 0, 0, 0]
    for at in range(2):
        wait_until(lambda: made.states(at).count("unknown") == 0)  # noqa: B023
        wait_until(lambda: made.column(at, "in_flight") == [0, 2, 3, 0])  # noqa: B023
        wait_until(lambda: made.column(at, "waiting") == queued)  # noqa: B023


def test_a_node_starts_anew_with_another_board(using):
    """Guards against counts of a board that is gone: another one begins at 0."""
    made = Relayed(using)
    made.frontends[0].run("routes = [frontend.route(10, dp_rank=2, wake=False) for _ in range(3)]")
    made.engines[2].run("for _ in range(2): engine.receive(0, 10)\nengine.publish(waiting=2, running=0)")
    made.frontends[2].run("routes = [frontend.route(10, dp_rank=1, wake=False) for _ in range(2)]")
    wait_until(lambda: made.column(0, "in_flight") == [0, 2, 1, 0])
    for process in (made.engines[2], made.engines[3], made.frontends[2], made.frontends[3]):
        process.kill()
    made.restart(1)
    made.engines[2], made.engines[3] = made.start_engine(2), made.start_engine(3)
    for node in range(2):
        wait_until(lambda: made.states(node) == ["idle"] * RANKS)  # noqa: B023 - called in this turn
        wait_until(lambda: made.column(node, "requests") == [0] * RANKS)  # noqa: B023
    made.frontends[1].run("routes = [frontend.route(10, dp_rank=3, wake=False) for _ in range(2)]")
    row = made.frontends[1].eval("frontend.index")
    for node in range(2):
        wait_until(lambda: made.column(node, "in_flight") == [0, 0, 0, 2])  # noqa: B023
    made.engines[3].run(f"engine.receive({row}, 10)\nengine.publish(waiting=0, running=1)")
    for node in range(2):
        wait_until(lambda: made.column(node, "in_flight") == [0, 0, 0, 1])  # noqa: B023
        assert made.column(node, "requests") == [0, 0, 0, 2]


def test_the_books_balance_whatever_happens_to_the_relays(using):
    """Guards against a booking that is lost or counted twice, with delay, stalls, cuts and relays killed."""
    made = Relayed(using, delay_s=0.010, lost=0.02)
    made.begin(4000)
    cut = 0
    for turn in range(4):
        time.sleep(0.4)
        cut += wait_until(lambda: made.link.eval("link.cut()"))  # a busy machine connects late
        if turn in (1, 2):
            made.restart(turn - 1)
    told = made.finish()
    assert cut >= 4
    assert [of.sent for of in told] == [4000] * 4
    assert all(min(of.ranks) > 0 for of in told)
    assert sum(of.checked for of in told) > 50
    assert [of.wrong for of in told] == [[]] * 4
    wait_until(made.at_rest)
    for node in range(2):
        assert made.received(ALL, node) == (16_000, 16_000 * TOKENS)


def test_a_front_end_knows_how_old_news_are(using):
    """Guards against a draw that never happens: half of a round trip is measured, and policies see it."""
    made = Relayed(using, delay_s=0.010)
    look = "seen = []\nfrontend._decisions._given = lambda view, _: seen.append(view.ages_ns) or view.ranks[0]"
    for number, ranks in ((0, (2, 3)), (3, (0, 1))):
        made.frontends[number].run(look)

        def ages(frontend=made.frontends[number]):
            return frontend.eval("frontend.choose() in range(4) and seen[-1]")

        wait_until(lambda: all(ages()[rank] >= 10_000_000 for rank in ranks))  # noqa: B023 - called in this turn
        assert [rank for rank, age in enumerate(ages()) if age == 0] == [r for r in range(4) if r not in ranks]


def test_relays_with_keys(using, tmp_path, monkeypatch):
    """Guards against a relay that lets in every peer, or none, where the sockets ask for keys."""
    make_keys(tmp_path)
    monkeypatch.setenv("DPSHM_CURVE_DIR", str(tmp_path))
    made = Relayed(using, curve_dir=str(tmp_path), insecure=False)
    made.frontends[0].run("route = frontend.route(10, dp_rank=3, wake=False)")
    wait_until(lambda: made.column(1, "in_flight") == [0, 0, 0, 1])
    stranger = using(made.nodes[1].process())
    head = made.coordinators[0].eval("coordinator.head_addresses")
    stranger.run(
        "coordinator = Coordinator(group='other', dp_size=4, nodes=2, node=1, head=head, waves=False)", head=head
    )
    wait_until(lambda: made.coordinators[0].eval("coordinator.dropped.get('peer refused', 0)") > 0)
    assert made.states(0) == ["idle"] * RANKS


def test_the_head_scales_all_boards(using):
    """Guards against boards of one group that have different numbers of ranks."""
    made = Relayed(using)
    made.coordinators[0].run("coordinator.scale(6)")
    wait_until(lambda: made.coordinators[1].eval("coordinator.board.dp_size") == 6)
    made.engines.append(made.start_engine(5, node=1))
    wait_until(lambda: made.states(0)[5] == "idle")
    with pytest.raises(RemoteError, match="is of another node: run `dpshm drain 5`"):
        made.coordinators[0].run("coordinator.drain(5)")
    made.coordinators[1].run("coordinator.drain(5)")
    wait_until(lambda: made.states(0)[5] == "drained")
