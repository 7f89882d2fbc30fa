"""Tests of `dpshm.board.latency`: what a front-end counts is what a reader sums, across deaths and growth."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.board import files
from dpshm.board.latency import (
    BUCKETS,
    LIMITS_S,
    PER_TOKEN,
    QUEUE,
    TTFT,
    LatencyWriter,
    file_bytes,
    latency_path,
    read_latencies,
)
from dpshm.errors import SegmentNoSpace
from tests.support import LoneBoard


@pytest.fixture
def board(group, using):
    """A board of two ranks with a folder for its sockets."""
    board = using(LoneBoard(group, engines=64))
    folder = files.sockets_path(group)
    folder.mkdir(mode=0o700)
    yield board
    files.clear_sockets_folder(folder)


def take_row(board, frontend):
    """Marks a front-end's row as taken once."""
    board.words[board.index("frontend_incarnation", frontend)] = 1


def test_times_are_counted_in_the_bucket_that_holds_them(board, group):
    """Guards against a time that is counted under a limit below it, or whose sum is another's."""
    writer = LatencyWriter(latency_path(files.sockets_path(group), 0), 2)
    take_row(board, 0)
    times_ns = [0, 1_000_000, 1_000_001, 1_600_000, 630_000_000_000, 630_000_000_001, -5]
    for took_ns in times_ns:
        writer.observe(1, QUEUE, took_ns)
    found = read_latencies(board)
    histogram = found[1, QUEUE].tolist()
    assert histogram[:3] == [3, 2, 0]
    assert histogram[BUCKETS - 2 : BUCKETS] == [1, 1]
    assert histogram[BUCKETS] == sum(times_ns) + 5
    found[1, QUEUE] = 0
    assert not found.any()


def test_the_limits_are_log_spaced():
    """Guards against limits that are out of order, which would lose counts for Prometheus."""
    ratios = np.array(LIMITS_S[1:]) / np.array(LIMITS_S[:-1])
    assert len(LIMITS_S) == 30
    assert ratios.min() > 1.5
    assert ratios.max() < 1.7


def test_the_next_holder_of_a_row_goes_on_counting(board, group):
    """Guards against counters that fall when a front-end dies and starts again."""
    path = latency_path(files.sockets_path(group), 0)
    take_row(board, 0)
    LatencyWriter(path, 2).observe(0, TTFT, 5)
    LatencyWriter(path, 2).observe(0, TTFT, 7)
    assert read_latencies(board)[0, TTFT].tolist()[:1] == [2]
    assert read_latencies(board)[0, TTFT, BUCKETS] == 12


@pytest.mark.parametrize("through", ["the writer", "routes"])
def test_each_time_counts_in_its_bucket_whatever_came_before(board, group, using, through):
    """Guards against a bucket that is remembered for the next time, and taken though the time is another's."""
    limits = [round(limit * 1e9) for limit in LIMITS_S]
    rng = random.Random(1)
    near = [limit + more for limit in limits for more in (-1, 0, 1)]
    times = [rng.choice([rng.choice(near), rng.randrange(1 << 31), 0, 17_000_000, 1 << 44]) for _ in range(600)]
    expected = np.zeros((2, BUCKETS + 1), np.int64)
    if through == "the writer":
        times += [-5, 3]
        take_row(board, 0)
        writer = LatencyWriter(latency_path(files.sockets_path(group), 0), 2)
        for i, took_ns in enumerate(times):
            writer.observe(i % 2, PER_TOKEN, took_ns)
    else:
        frontend = using(Frontend.attach(group))
        exact = []
        for i, took_ns in enumerate(times):
            route = frontend.route(dp_rank=i % 2)
            route.first_token()
            # Not near a limit, and so many tokens that the time until `done` looks at the clock does not count.
            between = 1 << 44 if took_ns > 1 << 43 else took_ns // 1_000_000 * 1_000_000 + 450_000
            route.first_token_ns = time.monotonic_ns() - between * 100_000
            route.done(100_001)
            exact.append(between)
        times = exact
    for i, took_ns in enumerate(times):
        expected[i % 2, np.searchsorted(limits, took_ns)] += 1
        expected[i % 2, BUCKETS] += max(0, took_ns)
    found = read_latencies(board)[:, PER_TOKEN]
    assert found[:, :BUCKETS].tolist() == expected[:, :BUCKETS].tolist()
    slack = 0 if through == "the writer" else len(times) * 50_000
    assert (abs(found[:, BUCKETS] - expected[:, BUCKETS]) <= slack).all()


def test_front_ends_are_summed(board, group):
    """Guards against a rank whose figures are one front-end's."""
    for frontend in range(3):
        take_row(board, frontend)
        LatencyWriter(latency_path(files.sockets_path(group), frontend), 2).observe(1, PER_TOKEN, 100)
    assert read_latencies(board)[1, PER_TOKEN, 0] == 3


def test_a_file_is_made_for_the_ranks_that_there_are(board, group):
    """Guards against memory for ranks that the board has room for and the group has not, and for lost counts."""
    path = latency_path(files.sockets_path(group), 0)
    take_row(board, 0)
    writer = LatencyWriter(path, 2)
    writer.observe(1, TTFT, 1)
    assert path.stat().st_size == file_bytes(2)
    board.words[board.index("dp_size")] = 5
    writer.observe(4, TTFT, 1)  # the group grew
    writer.observe(1, TTFT, 1)
    assert path.stat().st_size == file_bytes(5)
    assert read_latencies(board)[:, TTFT, 0].tolist() == [0, 2, 0, 0, 1]
    LatencyWriter(path, 2).observe(4, TTFT, 1)  # a longer file is not cut
    assert read_latencies(board)[4, TTFT, 0] == 2


@pytest.mark.parametrize("content", [b"x" * 6272, b"DPSHMLAT" + b"\x09" + b"\0" * 7, b"y"])
def test_a_file_of_another_version_is_replaced_and_never_read(board, group, content):
    """Guards against counts that are made of bytes which mean something else."""
    path = latency_path(files.sockets_path(group), 0)
    take_row(board, 0)
    path.write_bytes(content)
    assert not read_latencies(board).any()
    LatencyWriter(path, 2).observe(0, TTFT, 3)
    assert read_latencies(board)[0, TTFT, BUCKETS] == 3


def test_scribbled_words_stay_within_bounds(board, group):
    """Guards against a damaged file that ends its readers, or makes a sum negative (rule 6)."""
    path = latency_path(files.sockets_path(group), 0)
    take_row(board, 0)
    writer = LatencyWriter(path, 2)
    for at in range(16, len(writer.words)):
        writer.words[at] = -1 if at % 2 else (1 << 63) - 1
    found = read_latencies(board)
    assert found.min() >= 0
    LatencyWriter(path, 2).observe(0, TTFT, 3)
    path.write_bytes(path.read_bytes()[:1001])  # cut, in the middle of a word
    assert read_latencies(board) is not None


def test_without_room_nothing_is_counted_and_the_error_says_so(board, group, monkeypatch):
    """Guards against a full tmpfs that kills a front-end."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SegmentNoSpace, match="a file of latencies needs 1 KiB"):
        LatencyWriter(latency_path(files.sockets_path(group), 0), 2)


def test_a_group_without_its_folder_has_no_latencies(group, using):
    """Guards against a tool that fails because the folder of a group's sockets is gone or closed."""
    assert read_latencies(using(LoneBoard(group, engines=2))) is None


def test_counts_survive_a_front_end_that_is_replaced(group, using):
    """Guards against counters that fall across a restart, on a real board with a coordinator."""
    board = using(Coordinator(group=group, dp_size=1, waves=False)).board
    using(Engine.attach(group, 0))
    for _ in range(2):
        with Frontend.attach(group, owner="api") as frontend:
            route = frontend.route(dp_rank=0)
            route.first_token(0.25)
            route.first_token(9.0)  # counts nothing: it was said before
            route.done(3)
            route.first_token()  # after the end
    counts = read_latencies(board)[0, :, :BUCKETS].sum(axis=1)
    assert counts.tolist() == [2, 2, 2]
    assert (files.sockets_path(group) / "latency-0").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, np.float16, np.float32])
def test_numbers_of_numpy_end_the_request(group, using, kind):
    """A queue time or a number of tokens of any of numpy's types is counted whole, and the booking ends."""
    board = using(Coordinator(group=group, dp_size=1, waves=False)).board
    using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    route = frontend.route(dp_rank=0)
    route.first_token(kind(1))
    route.done(100 if issubclass(kind, np.floating) else kind(100))
    assert int(board.snapshot()["requests"][0]) == 0
    found = read_latencies(board)[0]
    assert found[:, :BUCKETS].sum(axis=1).tolist() == [1, 1, 1]
    assert found[QUEUE, BUCKETS] == 10**9


@pytest.mark.parametrize("wrong", [2.5, np.float64(20), float("nan"), "20", None, [20]])
def test_a_number_of_tokens_that_is_none_is_refused_before_anything_is_counted(group, using, wrong):
    """Guards against a time that is half counted, and a booking that is ended by halves."""
    board = using(Coordinator(group=group, dp_size=1, waves=False)).board
    using(Engine.attach(group, 0))
    route = using(Frontend.attach(group)).route(dp_rank=0)
    with pytest.raises((TypeError, ValueError)):
        route.first_token("soon")
    assert not route.first_token_ns
    route.first_token()
    before = read_latencies(board).tolist()
    with pytest.raises(TypeError):
        route.done(wrong)
    assert read_latencies(board).tolist() == before
    assert (route.open, int(board.snapshot()["requests"][0])) == (True, 1)
    route.done(20)
    assert int(board.snapshot()["requests"][0]) == 0
