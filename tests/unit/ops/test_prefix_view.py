"""What tools tell of the ranks' prefix caches."""

from __future__ import annotations

import pytest

from dpshm import Board, Coordinator, Engine
from dpshm.board.prefix_file import index_path
from dpshm.ops.doctor.group import check_group
from dpshm.ops.metrics import BoardCollector
from dpshm.ops.read_frame import read_frame
from dpshm.ops.screen.table import rank_columns
from dpshm.ops.screen.text import Glyphs
from dpshm.ops.watcher import with_rates


@pytest.fixture
def engines(group, using):
    """Two ranks of a dense group."""
    using(Coordinator(group=group, dp_size=2, waves=False))
    return [using(Engine.attach(group, rank)) for rank in range(2)]


def findings(board: Board) -> list[str]:
    """What the doctor says of the prefix indexes."""
    return [finding.what for finding in check_group(board) if finding.check == "prefix index"]


def test_frames_and_metrics_tell_how_full_a_cache_is(group, using, engines):
    """Guards against a cache that operators cannot see, and a share that counts the time before the window."""
    cache = engines[1].open_cache(100, block_tokens=8)
    cache.insert(cache.hasher.fingerprints(range(80)))
    cache.found(1000)
    cache.show(blocks_in_use=12)
    board = using(Board.attach(group))
    before = read_frame(board)
    cache.found(30)
    with engines[1].step(prefill_tokens=10, batch=1, held_tokens=90):
        pass
    engines[1].publish(waiting=0, running=1)
    frame = with_rates(before, read_frame(board))
    none, rank = frame.ranks
    assert (rank.has_index, rank.block_tokens, rank.num_blocks, rank.blocks_in_use) == (True, 8, 100, 12)
    assert (rank.held_tokens, rank.cached_tokens, rank.indexed_blocks, rank.dropped_blocks) == (90, 1030, 10, 0)
    assert rank.cached_share == 0.75
    columns = {column.title: column for column in rank_columns(Glyphs())}
    assert [columns[title].cell(rank) for title in ("hit", "index")] == ["75%", "10%"]
    assert [columns[title].cell(none) for title in ("hit", "index")] == ["-", "-"]
    assert (rank.index_fill, none.index_fill) == (0.1, None)
    assert (none.has_index, none.num_blocks, none.cached_share) == (False, 0, None)
    samples = {
        (sample.name, sample.labels.get("dp_rank")): sample.value
        for family in BoardCollector(board).collect()
        for sample in family.samples
    }
    assert samples["dpshm_rank_cached_tokens_total", "1"] == 1030
    assert samples["dpshm_rank_indexed_blocks", "1"] == 10
    assert samples["dpshm_rank_index_fill_ratio", "1"] == 0.1
    assert ("dpshm_rank_index_fill_ratio", "0") not in samples
    assert samples["dpshm_rank_kv_blocks", "0"] == 0


def test_the_doctor_finds_indexes_that_disagree_or_are_gone(group, using, engines):
    """Guards against hits that never come because two ranks hash in different ways, and a lost file."""
    board = using(Board.attach(group))
    assert findings(board) == []
    engines[0].open_cache(100, block_tokens=16)
    engines[1].open_cache(100, block_tokens=16)
    assert findings(board) == []
    engines[1].open_cache(100, block_tokens=32)
    (found,) = findings(board)
    assert "16 tokens a block: rank 0; 32 tokens a block: rank 1" in found
    index_path(board.segment.sockets_path, 1).unlink()
    (found,) = findings(board)
    assert found.startswith("rank 1: the file of the prefix index is gone")
