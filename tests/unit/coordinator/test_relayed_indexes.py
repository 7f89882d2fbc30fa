"""Prefix indexes of one node on another: what one relay tells and the other writes, with losses."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from dpshm.board import prefix_copy
from dpshm.board.layout import CACHE_WORDS
from dpshm.board.prefix_file import BUCKET_WORDS, buckets_for, index_path
from dpshm.board.prefix_index import PrefixIndexReader
from dpshm.coordinator import own_indexes
from dpshm.coordinator.own_indexes import LOOK_NS, WORDS_A_LOOK, OwnIndexes, in_messages
from dpshm.coordinator.relayed_indexes import RelayedIndexes
from dpshm.engine.cache import EngineCache
from dpshm.errors import WireError
from dpshm.net.relay_wire import IndexNews, News, decode_news, encode_news
from dpshm.rules.liveness import REMOTE_INTERVAL_NS
from tests.support import LoneBoard

RANK, BLOCKS = 1, 1000
BOARD = 77


class Pair:
    """An engine's index on one node, and another node's copy of it."""

    def __init__(self, group, using):
        self.here, self.there = (using(LoneBoard(f"{group}-{n}", dp_size=2, waves=False)) for n in "ab")
        for board in (self.here, self.there):
            board.segment.sockets_path.mkdir(0o700)
        self.now_ns = 10 * REMOTE_INTERVAL_NS
        self.tells, self.hears = OwnIndexes(self.here), RelayedIndexes(self.there)
        self.rng = random.Random(1)
        self.held: set[int] = set()
        self.open()

    def open(self, number=1):
        """The engine begins an index."""
        self.cache = EngineCache(self.here, RANK, BLOCKS, 16, number=number)
        self.held.clear()

    def churn(self, number):
        """Blocks enter and leave the cache."""
        new = {self.rng.randrange(1, 1 << 64) for _ in range(number)}
        old = set(self.rng.sample(sorted(self.held), max(0, len(self.held) + number - BLOCKS)))
        self.cache.evict(old)
        self.cache.insert(new)
        self.held = self.held - old | new

    def tell(self, *, due=False):
        """Messages, as they come."""
        self.now_ns += REMOTE_INTERVAL_NS if due else LOOK_NS
        return self.tells.look([0, RANK], self.now_ns, due=due)

    def hear(self, told):
        """They come; what is asked for goes back."""
        for message in in_messages(told):
            heard = decode_news(encode_news(News(1, BOARD, 1, 0, 0, indexes=message)))
            for index in heard.indexes:
                self.hears.write(heard, index, self.now_ns)
        for wanted in self.hears.wanted:
            self.tells.want(wanted)
        self.hears.wanted.clear()

    def settle(self):
        """Until nothing is told and nothing is asked for."""
        for _ in range(20):
            self.hear(self.tell(due=True))

    def copied(self):
        """The words of the copy, as a front-end of that node finds it."""
        shown = int(self.there.cache_state[RANK, CACHE_WORDS.index("index_incarnation")])
        reader = PrefixIndexReader.open(index_path(self.there.segment.sockets_path, RANK))
        assert reader.incarnation == shown
        return set(reader.table.tolist()) - {0}


@pytest.fixture
def pair(group, using):
    """An index with some blocks, and a copy that has heard of it."""
    made = Pair(group, using)
    made.churn(BLOCKS)
    made.settle()
    return made


def test_a_copy_is_an_index_as_the_engines(pair):
    """Guards against a copy in which front-ends find other blocks, or with another kind of block."""
    assert pair.copied() == pair.held
    reader = PrefixIndexReader.open(index_path(pair.there.segment.sockets_path, RANK))
    hasher = pair.cache.hasher
    assert (reader.block_tokens, reader.identity, reader.buckets) == (16, hasher.identity, buckets_for(BLOCKS))
    assert all(reader.has(block) for block in pair.held)


def test_changes_follow_without_a_pass(pair):
    """Guards against a copy that is told anew whenever something changes: a few words are what it costs."""
    for _ in range(5):
        pair.churn(50)
        told = pair.tell()
        assert sum(len(index.part.places) for index in told) <= 100
        assert all(index.begin == index.end for index in told)
        pair.hear(told)
    assert pair.copied() == pair.held
    assert pair.tell() == pair.tell() == []


@pytest.mark.parametrize("slice_words", [512, prefix_copy.SLICE_WORDS])
def test_what_was_lost_is_told_again(pair, monkeypatch, slice_words):
    """Guards against blocks that are missing, or stay for ever, after a message is lost."""
    monkeypatch.setattr(prefix_copy, "SLICE_WORDS", slice_words)
    for _ in range(100):
        pair.churn(pair.rng.randrange(200))
        pair.hear([index for index in pair.tell(due=pair.rng.random() < 0.2) if pair.rng.random() < 0.7])
    pair.settle()
    assert pair.copied() == pair.held


def test_one_that_is_lost_alone_and_last_is_missed(pair):
    """Guards against a loss that is noticed only when something else changes."""
    pair.churn(50)
    assert pair.tell()
    assert pair.copied() != pair.held
    pair.settle()
    assert pair.copied() == pair.held


def test_a_relay_that_joins_gets_all(pair):
    """Guards against a node that began later, or began again, and knows nothing of what was there before."""
    pair.hears = RelayedIndexes(pair.there)
    pair.churn(10)
    pair.settle()
    assert pair.copied() == pair.held


def test_a_relay_that_tells_begins_again(pair):
    """Guards against a copy that keeps what went while no relay told of it."""
    pair.churn(100)
    pair.tells = OwnIndexes(pair.here)
    pair.churn(100)
    pair.settle()
    assert pair.copied() == pair.held


def test_an_engine_makes_another_index_or_has_none(pair):
    """Guards against blocks of an index that is gone."""
    pair.open(number=2)
    pair.churn(20)
    pair.settle()
    assert pair.copied() == pair.held
    pair.cache.close()
    pair.settle()
    assert pair.there.cache_state[RANK, 0] == 0


def test_the_bandwidth_is_bounded(group, using):
    """Guards against a node that fills the link: what is too much comes later."""
    pair = Pair(group, using)
    pair.cache = EngineCache(pair.here, RANK, 50_000, 16, number=2)
    pair.held = {pair.rng.randrange(1, 1 << 64) for _ in range(20_000)}
    pair.cache.insert(pair.held)
    told = pair.tell()
    looks = 0
    while told:
        assert sum(len(index.part.places) for index in told) <= WORDS_A_LOOK
        assert max(len(index.part.places) for index in told) <= own_indexes.WORDS_A_MESSAGE
        pair.hear(told)
        told, looks = pair.tell(), looks + 1
    assert looks >= 20_000 / WORDS_A_LOOK
    assert pair.copied() == pair.held


@pytest.mark.parametrize(
    "wrong",
    [
        {"header": (16, 1, 3, 0)},
        {"header": (16, 1, 0, 0)},
        {"header": (0, 1, 4, 0)},
        {"header": (16, 1, 1 << 30, 0)},
        {"places": b"\0\0\0"},
        {"places": b"\0" * 4, "words": b"\0" * 4},
    ],
)
def test_messages_that_are_none(wrong):
    """Guards against sizes that no index has."""
    index = IndexNews(**{"rank": 1, "index": 5, "pass_": 1, "number": 1, "header": (16, 1, 4, 0)} | wrong)
    with pytest.raises(WireError):
        decode_news(encode_news(News(1, BOARD, 1, 0, 0, indexes=[index])))


@pytest.mark.parametrize(
    ("begin", "end", "place"),
    [(0, 0, 4 * BUCKET_WORDS), (0, 4 * BUCKET_WORDS + 1, 0), (8, 16, 7), (8, 16, 16)],
)
def test_places_that_the_table_has_not(pair, begin, end, place):
    """Guards against a message that writes beside the table."""
    places, words = np.array([place], "<u4").tobytes(), np.array([9], "<u8").tobytes()
    index = IndexNews(RANK, 5, 1, 1, (16, 1, 4, 0), begin, end, places, words)
    with pytest.raises(WireError, match="table has 64 words"):
        pair.hears.write(SimpleNamespace(board=BOARD), index, pair.now_ns)
    assert pair.copied() == set()
