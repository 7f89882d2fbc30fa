"""What front-ends know of caches, with real engines: matches, bookings, and ranks without an index."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from array import array

import numpy as np
import pytest

from dpshm import Coordinator, Engine, Frontend, HandleClosed, NoEngineAvailable, SettingError
from dpshm.board.prefix_file import index_path
from dpshm.board.sent_table import sent_path
from dpshm.frontend.prefix_reader import PrefixReader
from dpshm.frontend.sent_prompts import REMEMBERED_NS
from dpshm.rules.liveness import Verdict
from dpshm.rules.prefix_hash import Prompt
from tests.support import LoneBoard, Remote, wait_until

PROMPT = np.arange(1000, 1100)
BLOCK = 16


@pytest.fixture
def board(group, using):
    """A board with a folder for sockets, and two ranks."""
    board = using(LoneBoard(group, dp_size=2, waves=False))
    board.segment.sockets_path.mkdir(0o700)
    return board


@pytest.fixture
def engines(board, group, using):
    """Two engines with an index each."""
    found = [using(Engine.attach(group, rank)) for rank in range(2)]
    for engine in found:
        assert engine.open_cache(100, block_tokens=BLOCK).has_index
    return found


def insert(engine: Engine, tokens: object) -> None:
    """The engine has computed these tokens."""
    engine.cache.insert(engine.cache.hasher.fingerprints(tokens))


def test_a_request_goes_where_its_prefix_is(engines, group, using):
    """Guards against ties that rotate: a prompt would be computed on every rank in turn."""
    frontend = using(Frontend.attach(group))
    insert(engines[1], PROMPT)
    for _ in range(3):
        route = frontend.route(prompt=PROMPT)
        assert (route.dp_rank, route.prompt_tokens, route.cached_tokens) == (1, 100 - 96, 96)
        route.done()
    assert frontend.choose(prompt=PROMPT) == 1
    engines[1].cache.clear()
    frontend._decisions.prefixes._sent.forget(1, time.monotonic_ns() + REMEMBERED_NS)  # instead of a second
    assert {frontend.choose(prompt=PROMPT) for _ in range(2)} == {0, 1}


def test_a_front_end_tells_what_each_rank_has(engines, group, board, using):
    """Guards against a question that books, or that counts the last token, which is always computed."""
    frontend = using(Frontend.attach(group))
    insert(engines[0], PROMPT[:32])
    insert(engines[1], PROMPT[:96])
    assert frontend.cached(PROMPT) == [32, 96]
    assert frontend.cached(Prompt(PROMPT[:96])) == [32, 95]
    assert not board.snapshot()["requests"].any()
    with pytest.raises(SettingError, match="token ids"):
        frontend.cached("text")


def test_what_is_cached_is_not_booked(engines, group, board, using):
    """Guards against a hit that stays in the sums, because the two sides count other numbers."""
    frontend = using(Frontend.attach(group))
    insert(engines[0], PROMPT[:32])
    route = frontend.route(prompt=PROMPT, dp_rank=0)
    assert (route.prompt_tokens, route.cached_tokens) == (68, 32)
    assert board.snapshot()["in_flight_tokens"].tolist() == [68, 0]
    engines[0].receive(frontend.index, route.prompt_tokens)
    engines[0].publish(waiting=1, running=0, prefill_backlog=68)
    assert board.snapshot()[["in_flight_tokens", "prefill_backlog"]].tolist() == [(0, 68), (0, 0)]
    engines[0].publish(waiting=0, running=1)
    engines[0].publish(waiting=0, running=0)
    route.done()
    assert board.snapshot()[["requests", "prefill_backlog"]].tolist() == [(0, 0), (0, 0)]


def test_a_whole_prompt_in_the_cache_costs_one_token(engines, group, using):
    """Guards against a booking of nothing: an engine computes at least the last token."""
    frontend = using(Frontend.attach(group))
    insert(engines[0], PROMPT[:64])
    route = frontend.route(prompt=PROMPT[:64], dp_rank=0)
    assert (route.prompt_tokens, route.cached_tokens) == (1, 63)
    empty = frontend.route(prompt=[], dp_rank=0)
    assert (empty.prompt_tokens, empty.cached_tokens) == (0, 0)


def test_policies_see_what_each_rank_has(engines, group, using):
    """Guards against a policy that is told of one rank what is true of another."""
    seen = []

    def policy(view, request):
        seen.append((request.prompt_tokens, request.cached))
        return 0

    frontend = using(Frontend.attach(group, policy=policy))
    insert(engines[0], PROMPT[:16])
    insert(engines[1], PROMPT[:80])
    routes = [frontend.route(prompt=PROMPT), frontend.route(150, prompt=PROMPT), frontend.route(100)]
    # What went to rank 0 the first time is about to be cached there.
    assert seen == [(100, [16, 80]), (150, [96, 80]), (100, None)]
    assert len(routes) == 3


def test_least_work_counts_what_has_to_be_computed(engines, group, board, using):
    """Guards against a long queue that is chosen for a short prefix, and a long prefix that is given away."""
    board.step_model[:2, 3:6] = (8_000_000, 200_000, 40_000)  # as both have learnt it
    frontend = using(Frontend.attach(group, policy="least_work"))
    insert(engines[0], PROMPT)
    assert frontend.choose(prompt=PROMPT) == 0
    engines[0].publish(waiting=1, running=0, prefill_backlog=100_000)
    assert frontend.choose(prompt=PROMPT) == 1


def test_a_guess_never_changes_what_is_found(engines, board):
    """Guards against a conversation of which a rank seems to hold what it held at the turn before."""
    rng, prefixes = random.Random(5), PrefixReader(board, 0)
    prefixes.refresh(time.monotonic_ns(), 0)
    talks = [rng.choices(range(1000), k=200) for _ in range(3)]
    for turn in range(200):
        prompt = rng.choice(talks)
        prompt += rng.choices(range(1000), k=rng.randrange(20))
        for engine in engines:
            if rng.random() < 0.4:
                engine.cache.clear()
                insert(engine, prompt[: rng.randrange(len(prompt))])
        without = prefixes.look_up(Prompt(prompt), len(prompt)).cached
        assert prefixes.look_up(Prompt(prompt), len(prompt), turn).cached == without


def test_salts_keep_prompts_apart(engines, group, using):
    """Guards against a hit on blocks that another adapter computed."""
    frontend = using(Frontend.attach(group))
    hasher = engines[0].cache.hasher
    engines[0].cache.insert(hasher.fingerprints(PROMPT, hasher.start("lora-a")))
    assert frontend.route(prompt=Prompt(PROMPT, "lora-a"), dp_rank=0).cached_tokens == 96
    assert frontend.route(prompt=Prompt(PROMPT, "lora-b"), dp_rank=0).cached_tokens == 0
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0


def test_ranks_with_other_block_sizes(group, board, using):
    """Guards against fingerprints of one block size that are looked up in an index of another."""
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    engines[0].open_cache(100, block_tokens=8)
    engines[1].open_cache(100, block_tokens=32)
    for engine in engines:
        insert(engine, PROMPT)
    frontend = using(Frontend.attach(group))
    assert [frontend.route(prompt=PROMPT, dp_rank=rank).cached_tokens for rank in (0, 1)] == [96, 96]


def test_blocks_that_are_computed_again_are_booked(group, board, using):
    """Guards against speculative decoding that finds one block less than its index has, and a sum that jumps."""
    engine = using(Engine.attach(group, 0))
    engine.open_cache(100, block_tokens=BLOCK, recomputed_blocks=1)
    insert(engine, PROMPT[:32])
    frontend = using(Frontend.attach(group))
    assert frontend.cached(PROMPT) == [16, 0]
    assert frontend.cached(PROMPT[:16]) == [0, 0]
    assert [frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens for _ in range(2)] == [16, 80]
    with pytest.raises(SettingError, match="recomputed_blocks"):
        engine.open_cache(100, recomputed_blocks=-1)


def test_an_index_of_another_hash_is_left_alone(group, board, using):
    """Guards against fingerprints of unlike hashes that are compared."""
    engine = using(Engine.attach(group, 0))
    cache = engine.open_cache(100, block_tokens=16, identity=7)
    cache.insert(cache.hasher.fingerprints(PROMPT))
    frontend = using(Frontend.attach(group))
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0


def test_a_new_index_is_found(engines, group, using):
    """Guards against a front-end that reads the index of a rank's last life for ever."""
    frontend = using(Frontend.attach(group))
    insert(engines[0], PROMPT)
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 96
    engines[0].open_cache(200, block_tokens=BLOCK)
    frontend._decisions.next_refresh_ns = 0  # instead of a tenth of a second
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0
    insert(engines[0], PROMPT[:48])
    assert frontend.cached(PROMPT)[0] == 48


def test_a_cache_that_was_replaced_changes_nothing(engines, group, board, using):
    """Guards against an engine that goes on with its first cache, and hides or falsifies the second."""
    first, second = engines[0].cache, engines[0].open_cache(200, block_tokens=BLOCK)
    assert engines[0].cache is second
    insert(engines[0], PROMPT)
    second.show(blocks_in_use=9)
    words = board.cache_state[0].tolist()
    calls = (
        *(lambda: first.insert([5]), lambda: first.evict([5]), first.clear),
        *(lambda: first.found(1), lambda: first.show(blocks_in_use=3)),
    )
    for call in calls:
        with pytest.raises(HandleClosed, match=r"use engine\.cache"):
            call()
    first.close()
    assert board.cache_state[0].tolist() == words
    assert using(Frontend.attach(group)).cached(PROMPT)[0] == 96


def test_a_new_cache_is_empty_and_its_engine_counts_on(engines, board):
    """Guards against a cache that seems full when it is made, and a counter that falls while its engine lives."""
    insert(engines[0], PROMPT)
    engines[0].cache.found(10)
    engines[0].cache.show(blocks_in_use=9)
    cache = engines[0].open_cache(200)
    shown = board.snapshot()[0]
    assert (shown["blocks_in_use"], shown["indexed_blocks"], shown["cached_tokens"]) == (0, 0, 10)
    cache.found(1)
    assert board.snapshot()[0]["cached_tokens"] == 11


def test_a_front_end_without_memory_for_an_index_routes(board, group, using):
    """Guards against requests that fail because their front-end may map no more memory."""
    engine, remote = using(Engine.attach(group, 0)), using(Remote())
    remote.run("frontend = Frontend.attach(group); frontend.route(prompt=range(100)).done()", group=group)
    assert engine.open_cache(1 << 20).has_index  # 32 MiB
    insert(engine, PROMPT)
    code = (
        "import resource\nused = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))\n"
        "frontend._decisions.next_refresh_ns = 0\n"
        "route = frontend.route(prompt=range(1000, 1100))"
    )
    remote.run(code)
    assert remote.eval("(route.cached_tokens, route.prompt_tokens)") == (0, 100)


def test_a_rank_that_leaves_takes_its_index_along(engines, group, board, using):
    """Guards against hits on a rank that has just started, with an empty cache."""
    frontend = using(Frontend.attach(group))
    insert(engines[0], PROMPT)
    engines[0].close()
    assert board.cache_state[0].tolist()[0] == 0
    again = using(Engine.attach(group, 0))
    frontend._decisions.next_refresh_ns = 0
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0
    again.open_cache(100)
    insert(again, PROMPT[:16])
    frontend._decisions.next_refresh_ns = 0
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 16


KINDS = {
    "list": PROMPT.tolist(),
    "generator": (token for token in PROMPT.tolist()),
    "int32": PROMPT.astype(np.int32),
    "uint16": PROMPT.astype(np.uint16),
    "big endian": PROMPT.astype(">u8"),
    "every second one": np.repeat(PROMPT, 2)[::2],
    "buffer": memoryview(PROMPT.astype(np.uint32)),
    "array": array("Q", PROMPT.tolist()),
    "Prompt": Prompt(PROMPT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_of_any_kind_are_one_prompt(engines, group, using, kind):
    """Guards against a prompt that is not found because its ids have another width, order or stride."""
    insert(engines[1], PROMPT)
    route = using(Frontend.attach(group)).route(prompt=KINDS[kind])
    assert (route.dp_rank, route.cached_tokens) == (1, 96)


@pytest.mark.parametrize(
    ("told", "cached", "booked"), [(0, 96, 4), (1, 0, 1), (50, 49, 1), (100, 96, 4), (900, 96, 804)]
)
def test_a_length_that_is_not_the_prompts(engines, group, board, using, told, cached, booked):
    """Guards against a booking below one token, or a hit beyond what was told."""
    insert(engines[0], PROMPT)
    frontend = using(Frontend.attach(group))
    route = frontend.route(prompt_tokens=told, prompt=PROMPT, dp_rank=0)
    assert route.cached_tokens == cached
    assert board.snapshot()["in_flight_tokens"].tolist() == [booked, 0]
    route.done()


@pytest.mark.parametrize("prompt", [None, [], PROMPT[:5], PROMPT])
def test_a_negative_length_is_refused(engines, group, board, using, prompt):
    """Guards against a wrong number that is booked as 0."""
    frontend = using(Frontend.attach(group))
    for call in (frontend.route, frontend.choose):
        with pytest.raises(SettingError, match="prompt_tokens is -1"):
            call(-1, prompt=prompt)
    assert board.snapshot()["requests"].tolist() == [0, 0]


def test_a_prompt_of_less_than_a_block(engines, group, board, using):
    """Guards against a prompt without a fingerprint that raises, or that matches."""
    insert(engines[0], PROMPT)
    frontend = using(Frontend.attach(group))
    for count in (0, 1, BLOCK - 1):
        route = frontend.route(prompt=PROMPT[:count])
        assert (route.cached_tokens, route.prompt_tokens) == (0, count)
        route.done()


def test_an_engine_that_restarts_with_another_block_size(engines, group, using):
    """Guards against fingerprints of the old size that are looked up in the new index."""
    frontend = using(Frontend.attach(group))
    insert(engines[0], PROMPT)
    assert frontend.cached(PROMPT) == [96, 0]
    engines[0].close()
    again = using(Engine.attach(group, 0))
    again.open_cache(100, block_tokens=10)
    insert(again, PROMPT)
    insert(engines[1], PROMPT[:64])
    frontend._decisions.next_refresh_ns = 0
    assert frontend.cached(PROMPT) == [99, 64]


def test_a_scribbled_index_costs_hits_and_nothing_else(engines, group, board, using):
    """Guards against a word of the file, damaged after it was checked, that is used as a place or a size."""
    insert(engines[0], PROMPT)
    frontend = using(Frontend.attach(group))
    assert frontend.cached(PROMPT) == [96, 0]
    path = index_path(board.segment.sockets_path, 0)
    rng = random.Random(3)
    for word in (0, 0xFF, None):
        with open(path, "r+b") as file:
            size = path.stat().st_size
            file.write(rng.randbytes(size) if word is None else bytes([word]) * size)
        assert frontend.cached(PROMPT) == [0, 0]
        route = frontend.route(prompt=PROMPT)
        assert route.cached_tokens in {0, 96}  # what was just sent counts
        route.done()
    insert(engines[0], PROMPT[:16])  # nor does it stop the engine
    engines[0].cache.clear()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user: root alone may")
def test_the_index_of_another_user_is_left_alone(engines, group, board, using, caplog):
    """Guards against a file that another user put in the index's place."""
    insert(engines[0], PROMPT)
    os.chown(index_path(board.segment.sockets_path, 0), 12_345, -1)
    frontend = using(Frontend.attach(group))
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0
    assert "uid 12345" in caplog.text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda engine: engine.open_cache(0), "num_blocks is 0"),
        (lambda engine: engine.open_cache(10, 0), "block_tokens is 0"),
        (lambda engine: engine.open_cache(10, identity=-1), "identity is -1"),
        (lambda engine: engine.open_cache(10, identity=1 << 63), "identity is 9223372036854775808"),
        (lambda engine: engine.open_cache(10, recomputed_blocks=1 << 70), "recomputed_blocks is"),
        (lambda engine: engine.open_cache(10, identity=1.0), "float"),
        (lambda engine: engine.cache.insert(b"12345678"), "bytes holds none"),
        (lambda engine: engine.cache.show(blocks_in_use=-1), "blocks_in_use is -1: the cache has 100 blocks"),
        (lambda engine: engine.cache.show(blocks_in_use=101), "blocks_in_use is 101"),
        (lambda engine: engine.cache.found(-1), "cached_tokens is -1"),
    ],
)
def test_what_cannot_be_changes_nothing(engines, group, board, using, call, says):
    """Guards against a call that raises and leaves another index, a draft of one, or a count that is wrong."""
    insert(engines[0], PROMPT)
    engines[0].cache.found(7)
    engines[0].cache.show(blocks_in_use=5)
    files, words = sorted(board.segment.sockets_path.iterdir()), board.cache_state[0].tolist()
    with pytest.raises((SettingError, TypeError), match=says):
        call(engines[0])
    assert sorted(board.segment.sockets_path.iterdir()) == files
    assert board.cache_state[0].tolist() == words
    assert using(Frontend.attach(group)).cached(PROMPT) == [96, 0]


@pytest.mark.parametrize("prompt", [[1, -1], ["a"], "text", np.array([0.5]), [[1]], 7, [1 << 32], b"text" * 16])
def test_a_prompt_of_something_else_is_refused(engines, group, board, using, prompt):
    """Guards against a request that is booked and raises."""
    frontend = using(Frontend.attach(group))
    with pytest.raises(SettingError, match="token ids"):
        frontend.route(prompt=prompt)
    assert board.snapshot()["requests"].tolist() == [0, 0]


def test_without_room_there_is_no_index(group, using, caplog, monkeypatch):
    """Guards against an engine that does not start because its index does not fit."""
    board = using(LoneBoard(group, dp_size=1, waves=False))  # has no folder of sockets
    engine = using(Engine.attach(group, 0))
    with caplog.at_level(logging.WARNING):
        cache = engine.open_cache(100)
    assert not cache.has_index
    assert "rank 0 has no prefix index" in caplog.text
    cache.insert([1])
    cache.evict([1])
    cache.clear()
    cache.show(blocks_in_use=5)
    cache.found(3)
    assert board.cache_state[0].tolist() == [0, 16, 100, 5, 3, 0, 0]
    frontend = using(Frontend.attach(group))
    assert frontend.route(prompt=PROMPT).cached_tokens == 0


def test_a_lost_index_is_no_index(engines, group, board, using, caplog):
    """Guards against front-ends that fail when the folder of the sockets is removed."""
    shutil.rmtree(board.segment.sockets_path)
    with caplog.at_level(logging.WARNING):
        frontend = using(Frontend.attach(group))
        assert frontend.route(prompt=PROMPT).cached_tokens == 0
    assert "the prefix index of rank 0 is not used" in caplog.text


def test_a_damaged_index_is_no_index(engines, group, board, using, caplog):
    """Guards against an index that ends a front-end."""
    insert(engines[0], PROMPT)
    path = index_path(board.segment.sockets_path, 0)
    path.write_bytes(path.read_bytes()[:5000])
    frontend = using(Frontend.attach(group))
    assert frontend.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0


def test_no_engine_books_nothing(group, board, using):
    """Guards against a prompt that is counted although there is no rank for it."""
    board.mark(range(2), Verdict.DEAD)
    frontend = using(Frontend.attach(group, policy="least_work"))
    with pytest.raises(NoEngineAvailable):
        frontend.route(prompt=PROMPT)
    assert board.snapshot()["requests"].tolist() == [0, 0]


def test_across_processes_and_a_killed_engine(group, using):
    """Guards against an index that only its own process can read, or that outlives the engine's caches."""
    using(Coordinator(group=group, dp_size=1, waves=False))
    remote = using(Remote())
    code = (
        "import numpy as np\nengine = Engine.attach(group, 0); engine.open_cache(100)\n"
        "engine.cache.insert(engine.cache.hasher.fingerprints(np.arange(1000, 1100)))"
    )
    remote.run(code, group=group)
    frontend = using(Frontend.attach(group))
    assert frontend.route(prompt=PROMPT).cached_tokens == 96
    remote.kill()
    wait_until(lambda: frontend.snapshot()[0]["verdict"] == "dead")
    again = using(Remote())
    again.run("engine = Engine.attach(group, 0); engine.open_cache(100)", group=group)
    wait_until(lambda: frontend.snapshot()[0]["verdict"] == "alive")
    wait_until(lambda: frontend.route(prompt=PROMPT).cached_tokens == 0)


def test_a_burst_on_one_new_prompt_stays_together(engines, group, board, using):
    """Guards against a fan-out whose context is computed on every rank, because no index shows it yet."""
    board.step_model[:2, 3:6] = (8_000_000, 200_000, 40_000)  # as both have learnt it
    frontend = using(Frontend.attach(group))
    engines[1].publish(waiting=1, running=0, prefill_backlog=3000)  # so the first one goes to rank 0
    context = np.arange(4000)
    routes = [frontend.route(prompt=np.concatenate((context, [own] * 20))) for own in range(6)]
    assert {route.dp_rank for route in routes} == {0}
    assert [route.cached_tokens for route in routes] == [0] + [3840] * 5  # of 4000: a sampled block's end
    assert frontend.cached(context) == [0, 0]  # it is expected there, and not there yet
    # The engine subtracts what was booked, so nothing stays in the sums.
    for route in routes:
        engines[0].receive(frontend.index, route.prompt_tokens)
    for engine in engines:
        engine.publish(waiting=0, running=0, prefill_backlog=0)
    for route in routes:
        route.done()
    assert board.snapshot()["requests"].tolist() == [0, 0]
    assert board.outstanding_tokens([frontend.index]).count().tolist() == [0, 0]


def test_a_burst_over_several_front_ends_stays_together(engines, group, board, using):
    """Guards against a context that each front-end sends to another rank, because it knows its own requests."""
    board.step_model[:2, 3:6] = (8_000_000, 200_000, 40_000)  # as both have learnt it
    frontends = [using(Frontend.attach(group)) for _ in range(4)]
    engines[1].publish(waiting=1, running=0, prefill_backlog=5000)  # so the first one goes to rank 0
    context = np.arange(4000)
    routes = [frontends[own % 4].route(prompt=np.concatenate((context, [own] * 20))) for own in range(8)]
    assert {route.dp_rank for route in routes} == {0}
    assert [route.cached_tokens for route in routes] == [0] + [3840] * 7
    for own, route in enumerate(routes):
        engines[0].receive(frontends[own % 4].index, route.prompt_tokens)
    for engine in engines:
        engine.publish(waiting=0, running=0, prefill_backlog=0)
    for route in routes:
        route.done()
    assert board.snapshot()["requests"].tolist() == [0, 0]
    assert board.outstanding_tokens([f.index for f in frontends]).count().tolist() == [0, 0]


def test_what_a_killed_front_end_sent_counts_no_longer_than_a_second(engines, group, board, using):
    """Guards against a prefix that is expected for ever because the process that sent it is gone."""
    remote = using(Remote())
    code = (
        "import numpy as np\nfrontend = Frontend.attach(group)\n"
        "frontend.route(prompt=np.arange(1000, 1100), dp_rank=1)\nsent_ns = time.monotonic_ns()"
    )
    remote.run(code, group=group)
    now_ns = remote.eval("sent_ns")
    frontend = using(Frontend.attach(group))
    assert frontend.index == 1
    frontend.choose()
    seen = frontend._decisions.prefixes.look_up(Prompt(PROMPT), 100, now_ns).cached
    remote.kill()
    assert seen == [0, 96]
    assert frontend._decisions.prefixes.look_up(Prompt(PROMPT), 100, now_ns).cached == seen
    assert frontend._decisions.prefixes.look_up(Prompt(PROMPT), 100, now_ns + REMEMBERED_NS).cached == [0, 0]


def test_what_was_sent_to_a_rank_that_restarted_does_not_count(engines, group, using):
    """Guards against a hit on what the rank's last life was sent."""
    one, other = (using(Frontend.attach(group)) for _ in range(2))
    one.route(prompt=PROMPT, dp_rank=0)
    assert other.route(prompt=PROMPT, dp_rank=0).cached_tokens == 96
    engines[0].open_cache(100, block_tokens=BLOCK)
    for frontend in (one, other):
        frontend._decisions.next_refresh_ns = 0  # instead of a tenth of a second
        assert frontend.choose(prompt=PROMPT) in {0, 1}
        assert frontend._decisions.prefixes.look_up(Prompt(PROMPT), 100, time.monotonic_ns()).cached == [0, 0]


def test_without_room_a_front_end_knows_what_it_sent_itself(engines, group, board, using, caplog):
    """Guards against a front-end that does not start, or ends, because the table has no room or is damaged."""
    path = sent_path(board.segment.sockets_path)
    path.write_bytes(b"0" * 5000)
    path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        one, other = (using(Frontend.attach(group)) for _ in range(2))
        for frontend in (one, other):
            frontend.choose()
    assert caplog.text.count("does not see which prompts the others have just sent") == 2
    assert "5000 bytes" in caplog.text
    assert [one.route(prompt=PROMPT, dp_rank=0).cached_tokens for _ in range(2)] == [0, 96]
    assert other.route(prompt=PROMPT, dp_rank=0).cached_tokens == 0


def test_the_table_is_private(engines, group, board, using):
    """Guards against a person who may read the board and learns which prompts were sent."""
    using(Frontend.attach(group)).choose()
    assert sent_path(board.segment.sockets_path).stat().st_mode & 0o777 == 0o600


def test_a_front_end_that_gives_no_prompts_says_so_once(engines, group, using, caplog):
    """Guards against requests that share a prefix and are computed on every rank, for want of an argument."""
    silent, speaking = (using(Frontend.attach(group)) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        for number in range(130):
            for frontend, prompt in ((silent, None), (speaking, PROMPT if number == 50 else None)):
                frontend._decisions.next_refresh_ns = 0  # instead of a tenth of a second
                frontend.route(10, prompt=prompt).done()
    assert caplog.text.count("requests without a prompt, and the ranks have prefix indexes") == 1
    assert "front-end 0 has routed 100 requests" in caplog.text
    silent.close()
    caplog.clear()
    again = using(Frontend.attach(group))  # of the same name, so in the same row
    assert again.index == 0
    again.route(10).done()
    assert "without a prompt" not in caplog.text
