"""Tests of `dpshm.vllm.prompts`: a client of vLLM's shape finds what an engine of vLLM's shape has cached."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from dpshm import Engine
from dpshm.frontend import sent_prompts
from dpshm.vllm import hooks, metrics
from dpshm.vllm.block_hashes import chain_is_right, identity_of
from dpshm.vllm.client_link import LINK
from dpshm.vllm.known_hashes import KnownHashes
from dpshm.vllm.options import Options
from dpshm.vllm.prompts import PromptHasher, RequestPrompt, _Way
from tests.unit.vllm.fake_cache import BLOCK_TOKENS, BlockPool, hash_function, kv_cache_manager
from tests.unit.vllm.fake_client import DPLBAsyncMPClient, add, finish, hooked, raising
from tests.unit.vllm.fake_core import EngineCoreProc, Request, RequestType, send


class Pair:
    """One API server and one engine, rank 0, on a real board: requests go from one to the other."""

    def __init__(self, address, eagle=False, **options):
        hooks.install(Options(**options))
        self.client = DPLBAsyncMPClient(address)
        self.core = EngineCoreProc(address, inputs=[self.client.address])
        self.core.scheduler.kv_cache_manager = manager = kv_cache_manager(BlockPool(num_gpu_blocks=400))
        manager.coordinator.single_type_managers[0].use_eagle = eagle
        self.requests = {}

    @property
    def link(self):
        """The client's link, once there is one."""
        return vars(self.client)[LINK]

    def route(self, request):
        """The client books a request for rank 0 and sends it; the engine does not have it yet."""
        request.data_parallel_rank = 0
        self.requests[request.request_id] = request
        add(self.client, request)
        (route,) = self.link._routes[request.request_id]
        return route

    def arrive(self, request_id):
        """The engine gets it."""
        send(self.core, self.requests[request_id], client_index=0)
        self.core._process_input_queue()

    def serve(self, request):
        """One request from its booking to its end; what was expected to be cached."""
        route = self.route(request)
        self.arrive(request.request_id)
        while request.request_id in self.core.scheduler.requests:
            self.core.turn()
        finish(self.client, request.request_id)
        assert request.prefill_stats is not None
        return route.cached_tokens, request.prefill_stats.num_cached_tokens


@pytest.fixture
def pair(vllm, coordinator, monkeypatch):
    """`pair(body)` runs a test's body with an API server and an engine."""
    monkeypatch.setattr(metrics, "install", lambda: None)

    def start(body, **options):
        made = Pair(coordinator.stats_publish_address, **options)
        try:
            made.core.body = lambda: body(made)
            made.core.run_busy_loop()
        finally:
            if (link := vars(made.client).get(LINK)) is not None:
                link.close()
            made.client.close()

    return start


def exact(board):
    """Whether the tokens sent are the tokens received, of all pairs."""
    return (board.sent_tokens[:, :2] == board.received_tokens[:2, :].T).all()


@pytest.mark.parametrize("eagle", [False, True])
def test_the_match_is_the_hit(pair, board, eagle):
    """Guards against hashes that differ between the two sides, and a last block that is expected to be cached."""
    rng = random.Random(1)

    def body(pair):
        prompts = [[rng.randrange(100) for _ in range(20)]]
        pairs = []
        for i in range(60):
            tokens = rng.choice(prompts)[: rng.randrange(1, 60)] + [rng.randrange(100)] * rng.randrange(4)
            prompts.append(tokens + [rng.randrange(100) for _ in range(rng.randrange(12))])
            pairs.append(pair.serve(Request(f"r{i}", tokens=prompts[-1], max_tokens=1)))
            assert exact(board)
        assert [ours for ours, _ in pairs] == [theirs for _, theirs in pairs]
        assert sum(theirs > 0 for _, theirs in pairs) > 30

    pair(body, eagle=eagle)


def test_what_differs_beside_the_tokens_keeps_prompts_apart(pair):
    """Guards against a hit on blocks of another adapter, or of another tenant."""

    def body(pair):
        kinds = [(None, None), ("lora", None), (None, "salt"), ("lora", "salt")]
        for n, wanted in ((0, 0), (1, 36)):
            for adapter, salt in kinds:
                request = Request(f"{n}{adapter}{salt}", prompt=40, max_tokens=1)
                request.lora_request = adapter and SimpleNamespace(lora_name=adapter)
                request.cache_salt = salt
                assert pair.serve(request) == (wanted, wanted)

    pair(body)


def test_sums_are_exact_with_hits_aborts_and_refusals(pair, board):
    """Guards against a hit that stays in the sums: the engine must subtract what the front-end booked."""
    rng = random.Random(2)

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        for i in range(40):
            request = Request(f"r{i}", prompt=rng.randrange(1, 100), max_tokens=1)
            pair.route(request)
            if i % 8 == 3:  # the cache changes while the request is in flight
                assert pair.core.scheduler.kv_cache_manager.block_pool.reset_prefix_cache()
            if i % 4 == 0:  # the input thread refuses it
                request.client_index = 0
                pair.core._handle_request_preproc_error(request)
                pair.core._process_input_queue()
            else:
                pair.arrive(request.request_id)
                if i % 4 == 1:
                    pair.core.input_queue.put((RequestType.ABORT, [request.request_id]))
                for _ in range(3):
                    pair.core.turn()
            assert exact(board)
            backlog = int(board.snapshot()[0]["prefill_backlog"])
            assert backlog == sum(
                r.num_prompt_tokens - r.num_computed_tokens for r in pair.core.scheduler.requests.values()
            )
            finish(pair.client, request.request_id)
        assert int(board.received_tokens.sum()) < int(board.received_requests.sum()) * 50

    pair(body)


def test_a_booking_that_is_cancelled_takes_back_what_was_booked(pair, board):
    """Guards against a send that fails and takes back the whole prompt, when a part of it was booked."""

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        pair.client.on_send = raising
        request = Request("lost", prompt=64, rank=0)
        with pytest.raises(ZeroDivisionError):
            add(pair.client, request)
        assert exact(board)

    pair(body)


def test_expected_hits_are_no_backlog(pair, board):
    """Guards against a sum that jumps up by the hit when the request arrives."""

    def body(pair):
        pair.serve(Request("first", prompt=200, max_tokens=1))
        snapshots = []
        pair.route(Request("again", prompt=204, max_tokens=1))
        snapshots.append(board.snapshot()[0])
        pair.arrive("again")
        snapshots.append(board.snapshot()[0])
        assert [int(s["in_flight_tokens"]) for s in snapshots] == [4, 0]
        assert [int(s["prefill_backlog"]) for s in snapshots] == [4, 4]  # with what is in flight

    pair(body)


def counted(pair):
    """A list that gets an item for each hash of a block that the API server makes from now on."""
    link, made = pair.link, []
    stock = link._prompts._function

    def function(data):
        made.append(data)
        return stock(data)

    link._prompts._function = function
    link._prompts._ways.clear()
    pair.serve(Request("finds out how hashes are made", tokens=[8, 9], max_tokens=1))
    made.clear()
    return made


def test_a_prompt_is_hashed_as_far_as_an_engine_has_it(pair):
    """Guards against an API server that hashes 12,000 tokens, milliseconds, to find that no rank has them."""

    def body(pair):
        pair.serve(Request("first", tokens=[1] * 80, max_tokens=1))
        made = counted(pair)
        prompts = ([2] * 4000, [1] * 80 + [2] * 4000, [1] * 20 + [3] * 4000)
        for i, (tokens, hit, most) in enumerate(zip(prompts, (0, 80, 20), (1, 41, 11), strict=True)):
            made.clear()
            assert pair.route(Request(f"r{i}", tokens=tokens)).cached_tokens == hit
            assert 1 <= len(made) <= most

    pair(body)


def test_a_prompt_that_goes_on_is_hashed_from_where_it_goes_on(pair):
    """Guards against the whole history of a conversation that is hashed at each turn."""

    def body(pair):
        tokens = [i % 90 for i in range(400)]
        assert pair.serve(Request("first", tokens=tokens, max_tokens=1)) == (0, 0)
        made = counted(pair)
        assert pair.serve(Request("second", tokens=tokens, max_tokens=1)) == (396, 396)
        assert len(made) == 99
        made.clear()
        longer = [*tokens, *range(40)]
        assert pair.serve(Request("third", tokens=longer, max_tokens=1)) == (400, 400)
        assert len(made) <= 10
        made.clear()
        assert pair.serve(Request("fourth", tokens=longer, max_tokens=1)) == (436, 436)
        assert len(made) <= 10
        # Equal tokens with another salt are another chain.
        salted = Request("fifth", tokens=tokens, max_tokens=1)
        salted.cache_salt = "tenant"
        assert pair.serve(salted) == (0, 0)
        salted = Request("sixth", tokens=longer, max_tokens=1)
        salted.cache_salt = "tenant"
        assert pair.serve(salted) == (400, 400)

    pair(body)


def test_a_long_prompt_is_hashed_step_by_step(pair, monkeypatch):
    """Guards against an API server whose event loop stands still while it hashes a prompt of a million tokens."""
    monkeypatch.setattr("dpshm.vllm.prompts.MOST_NEW", 50)

    def body(pair):
        tokens = [i % 90 for i in range(1000)]
        pair.serve(Request("first", tokens=tokens, max_tokens=1))
        made = counted(pair)
        found = []
        for i in range(7):
            made.clear()
            prompt = pair.link._prompts.prompt(Request(f"r{i}", tokens=tokens), 1000)
            found.append(pair.link._frontend.cached(prompt)[0] // BLOCK_TOKENS)
            assert len(made) <= 50
        assert found == [50, 100, 150, 200, 249, 249, 249]

    pair(body)


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_hashes_are_those_of_vllms_hasher(vllm, make_client, salt, monkeypatch):
    """Guards against hashes made without vLLM's hasher that differ from it, or that are used where they would."""
    request = Request("a", tokens=list(range(100)))
    request.cache_salt = salt
    made = []
    for right in (True, False):
        prompts = PromptHasher(make_client())
        monkeypatch.setattr("dpshm.vllm.prompts.chain_is_right", lambda *_, right=right: right)
        way = prompts.of_index(BLOCK_TOKENS, identity_of(1, BLOCK_TOKENS, BLOCK_TOKENS, prompts._first), 1)
        assert (way.plain is not None) == right
        prompts._ways[7] = way
        blocks = RequestPrompt(prompts, request, 100).fingerprints(BLOCK_TOKENS, 7, 1)
        made.append([blocks.item(i) for i in (3, 1, 11, 23)])
    assert made[0] == made[1]


def test_a_release_that_hashes_blocks_in_another_way_is_found_out():
    """Guards against hashes of blocks that no engine has, because a release adds something to each."""
    first = hash_function(b"first")
    assert not chain_is_right(hash_function, first, lambda request: [b"x"] * request.num_tokens)
    assert not chain_is_right(hash_function, first, lambda request: [])


def test_multimodal_prompts_are_hashed_at_once(vllm, make_client):
    """Guards against releases whose hasher continues a chain wrongly in the middle of multimodal inputs."""
    client = make_client()
    request = Request("a", prompt=100)
    place = SimpleNamespace(offset=4, length=9)
    request.mm_features = [SimpleNamespace(identifier="image", mm_position=place)]
    calls = []

    def hasher(blocks):
        calls.append((len(blocks.block_hashes), blocks.num_tokens))
        return [hash_function(i) for i in range(blocks.num_tokens // BLOCK_TOKENS)]

    prompts = PromptHasher(client)
    reducer = SimpleNamespace(fingerprint=lambda digest: digest)
    prompts._ways[7] = _Way(hasher, 1, reducer, KnownHashes())
    blocks = RequestPrompt(prompts, request, 100).fingerprints(BLOCK_TOKENS, 7, 1)
    assert [blocks.item(i) for i in range(len(blocks))] == [hash_function(i) for i in range(24)]
    assert calls == [(0, 96)]
    again = RequestPrompt(prompts, request, 100).fingerprints(BLOCK_TOKENS, 7, 1)
    assert again.item(23) == hash_function(23)
    assert calls == [(0, 96)]
    place.offset = 8
    RequestPrompt(prompts, request, 100).fingerprints(BLOCK_TOKENS, 7, 1).item(0)
    assert calls == [(0, 96)] * 2


@pytest.mark.parametrize("wrong", [-1, 1 << 32, 1 << 70, None, 0.5, "7"])
def test_a_prompt_that_cannot_be_read_is_routed_by_load(pair, log, wrong):
    """Guards against a request that raises, and one client's prompt that ends the look-ups of all others."""

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        assert pair.route(Request("a", tokens=[wrong] * 64)).cached_tokens == 0
        assert log("a prompt could not be hashed") == 0
        assert pair.route(Request("b", prompt=64)).cached_tokens == 60
        assert hooked(pair.client)

    pair(body)


def test_requests_that_do_not_read_the_cache(pair):
    """Guards against a hit that is expected where vLLM computes the whole prompt: logprobs of the prompt, say."""

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        request = Request("a", prompt=64)
        request.sampling_params = SimpleNamespace(skip_reading_prefix_cache=True)
        assert pair.route(request).cached_tokens == 0
        embeds = Request("b")
        embeds.prompt_token_ids, embeds.prompt_embeds = None, [0.0] * 64
        assert pair.route(embeds).cached_tokens == 0

    pair(body)


def test_later_parts_of_a_streamed_input_are_booked_in_full(pair, board):
    """Guards against a part that is looked up as if it were a prompt, and that the engine subtracts as another."""

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        pair.route(Request("stream", prompt=64, max_tokens=9))
        pair.arrive("stream")
        part = Request("stream", prompt=64)
        add(pair.client, part)
        assert [route.cached_tokens for route in pair.link._routes["stream"]] == [60, 0]
        send(pair.core, part, client_index=0)
        pair.core._process_input_queue()
        assert exact(board)

    pair(body)


@pytest.mark.parametrize("release", ["0.32", "0.28"])
def test_random_seeds_are_said_once(vllm, make_client, log, monkeypatch, release):
    """Guards against matches of hashes that each process makes with a seed of its own."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    del vllm.hashes.NONE_HASH
    vllm.hashes.init_none_hash = raising
    vllm.hashes.resolve_none_hash_seed = lambda _: random.random()
    if release == "0.28":
        del vllm.hashes.resolve_none_hash_seed
    client = make_client()
    add(client, Request("a"), Request("b"))
    assert log("does not see what engines have cached: the seed of sha256 is random") == 1
    assert hooked(client)
    assert vars(client)[LINK]._frontend._decisions.prefixes.said


@pytest.mark.parametrize("release", ["0.32", "0.28"])
def test_a_seed_that_all_processes_share_is_set(vllm, make_client, log, monkeypatch, release):
    """Guards against an API server that cannot hash because vLLM has not set its seed there."""
    del vllm.hashes.NONE_HASH
    vllm.hashes.init_none_hash = lambda function: setattr(vllm.hashes, "NONE_HASH", function(b"seed"))
    if release == "0.28":
        del vllm.hashes.resolve_none_hash_seed
        monkeypatch.setenv("PYTHONHASHSEED", "7")
    add(make_client(), Request("a"))
    assert hash_function(b"seed") == vllm.hashes.NONE_HASH
    assert log("does not see") == 0


def test_an_engine_with_another_seed_is_said_once(pair, vllm, log):
    """Guards against a front-end that looks for hashes which no engine has, and does not say so."""

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        vllm.hashes.NONE_HASH = b"\1" * 32
        pair.link._prompts = PromptHasher(pair.client)
        assert pair.serve(Request("a", prompt=64, max_tokens=1)) == (0, 60)
        assert pair.serve(Request("b", prompt=64, max_tokens=1)) == (0, 60)
        assert log("cannot make the block hashes of an engine") == 1

    pair(body)


def test_a_hasher_that_fails_ends_the_lookups_and_not_the_routing(pair, vllm, log, monkeypatch):
    """Guards against a request that is lost, or an API server that leaves the board, for want of a hash."""
    minute = sent_prompts._VALID * np.uint64(60)  # the machine may be held up for the usual second
    monkeypatch.setattr(sent_prompts, "_VALID", minute)

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        pair.link._prompts._ways.clear()
        pair.link._prompts._make = lambda *_: raising
        # The same prompt was sent a moment before, which is known without the hash that failed.
        for name, expected in (("a", 60), ("b", 0), ("c", 0)):
            assert pair.serve(Request(name, prompt=64, max_tokens=1)) == (expected, 60)
        assert log("a prompt could not be hashed") == 1
        assert hooked(pair.client)

    pair(body)


def test_without_prefix_caching_there_is_no_table_and_no_lookup(vllm, make_client, board, log):
    """Guards against work for a cache that no engine has."""
    client = make_client()
    client.vllm_config.cache_config.enable_prefix_caching = False
    add(client, Request("a"))
    assert not list(board.segment.sockets_path.glob("booked-*"))
    assert vars(client)[LINK]._prompt(Request("b")) is None
    assert log("does not see") == 0


def test_shadow_tells_what_vllm_gave_away(pair, log, group, using):
    """Guards against a comparison that does not tell what the cache would have saved."""

    def body(pair):
        pair.serve(Request("first", prompt=64, max_tokens=1))
        using(Engine.attach(group, 1))
        add(pair.client, Request("a", prompt=64))  # vLLM takes the last rank
        assert log("Prompt tokens cached there: vLLM 0, dpshm 60; vLLM's choices gave 60 away") == 1

    pair(body, mode="shadow", shadow_log_s=0.0)
