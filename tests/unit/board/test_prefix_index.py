"""The prefix index: what one engine writes and many front-ends read, in real files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import SegmentError, SegmentInvalid, SettingError
from dpshm.board.layout import PAGE_BYTES
from dpshm.board.prefix_file import BUCKET_WORDS, WORDS_A_BLOCK, buckets_for, index_path
from dpshm.board.prefix_index import PrefixIndexReader, PrefixIndexWriter

MAX = (1 << 64) - 1


def make(folder: Path, num_blocks: int = 64, *, incarnation: int = 1) -> PrefixIndexWriter:
    """An empty index in a folder."""
    return PrefixIndexWriter.create(
        index_path(folder, 0), num_blocks=num_blocks, block_tokens=16, identity=77, incarnation=incarnation
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stands for the folder of a group's sockets."""
    return tmp_path


def words(*numbers: int) -> np.ndarray:
    """Fingerprints as a hasher gives them."""
    return np.array(numbers, np.uint64)


def test_a_reader_finds_what_is_held(folder: Path):
    """Guards against an index that forgets, or remembers what has left the cache."""
    writer = make(folder)
    reader = PrefixIndexReader.open(index_path(folder, 0))
    assert (reader.incarnation, reader.block_tokens, reader.identity) == (1, 16, 77)
    writer.insert(words(5, MAX, 1 << 63))
    assert [reader.has(n) for n in (5, MAX, 1 << 63, 6)] == [True, True, True, False]
    writer.evict([5])
    assert not reader.has(5)
    assert reader.counters() == {"inserted": 3, "evicted": 1, "dropped": 0, "held": 2}
    writer.clear()
    assert not reader.has(MAX)
    assert reader.counters() == {"inserted": 3, "evicted": 3, "dropped": 0, "held": 0}
    writer.insert([MAX])
    assert reader.has(MAX)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("insert"), st.lists(st.integers(1, 40), max_size=5)),
            st.tuples(st.just("evict"), st.lists(st.integers(1, 40), max_size=5)),
            st.tuples(st.just("clear"), st.just([])),
        ),
        max_size=40,
    )
)
@settings(deadline=None)
def test_the_index_is_the_multiset_of_blocks(tmp_path_factory: pytest.TempPathFactory, moves):
    """Guards against a block that several requests hold and that is lost with the first of them."""
    folder = tmp_path_factory.mktemp("index")
    writer = make(folder, 40)
    reader = PrefixIndexReader.open(index_path(folder, 0))
    held: Counter[int] = Counter()
    for kind, blocks in moves:
        if kind == "insert":
            writer.insert([b << 3 for b in blocks])
            held.update(blocks)
        elif kind == "evict":
            writer.evict([b << 3 for b in blocks])
            for block in blocks:
                held[block] = max(0, held[block] - 1)
        else:
            writer.clear()
            held.clear()
        assert [b for b in range(41) if b and reader.has(b << 3)] == sorted(b for b in held if held[b])
        assert len(writer) == sum(n > 0 for n in held.values())
    counters = reader.counters()
    assert counters["inserted"] - counters["evicted"] == sum(held.values())


@given(st.integers(0, 600), st.integers(0, 600), st.integers(0, 700))
@settings(deadline=None, max_examples=60)
def test_a_match_is_the_longest_leading_run(
    tmp_path_factory: pytest.TempPathFactory, length: int, cached: int, near: int
):
    """Guards against a match that is off by one at either end of a gallop or a bisection."""
    folder = tmp_path_factory.mktemp("index")
    prompt = np.random.default_rng(length).integers(1, MAX, length, np.uint64)
    writer = make(folder, 1000)
    writer.insert(prompt[:cached])
    reader = PrefixIndexReader.open(index_path(folder, 0))
    assert reader.match(prompt) == min(cached, length)
    assert reader.match(prompt, near) == min(cached, length)
    assert reader.match(prompt[:0], near) == 0


class _OnDemand:
    """Fingerprints that are made as far as a lookup asks."""

    def __init__(self, fingerprints: np.ndarray) -> None:
        self._fingerprints = fingerprints
        self.made = self.asked = 0

    def __len__(self) -> int:
        return len(self._fingerprints)

    def item(self, index: int, /) -> int:
        """Makes all up to this one."""
        self.made = max(self.made, index + 1)
        self.asked += 1
        return int(self._fingerprints[index])


@pytest.mark.parametrize("cached", [0, 1, 2, 3, 30, 63, 64, 200, 255, 256])
def test_a_lookup_asks_for_little_more_than_it_matches(folder: Path, cached: int):
    """Guards against a front-end that hashes the whole of a long prompt of which no rank has anything."""
    prompt = np.random.default_rng(3).integers(1, MAX, 256, np.uint64)
    writer = make(folder, 300)
    writer.insert(prompt[:cached])
    reader = PrefixIndexReader.open(index_path(folder, 0))
    on_demand = _OnDemand(prompt)
    assert reader.match(on_demand) == cached
    assert on_demand.made <= min(256, 2 * cached + 1)
    again = _OnDemand(prompt)
    assert reader.match(again, cached) == cached
    assert again.asked <= 2
    assert again.made <= cached + 1
    for near in range(0, cached, 5):
        other = _OnDemand(prompt)
        assert reader.match(other, near) == cached
        assert other.made <= min(256, 2 * cached + 1)


def test_a_match_across_a_gap_ends_at_a_held_block(folder: Path):
    """Guards against a match that counts a missing block as cached at its very end."""
    rng = np.random.default_rng(2)
    writer = make(folder, 1000)
    reader = PrefixIndexReader.open(index_path(folder, 0))
    for _ in range(100):
        prompt = rng.integers(1, MAX, 200, np.uint64)
        held = rng.random(200) < 0.7
        writer.insert(prompt[held])
        found = reader.match(prompt, near=int(rng.integers(0, 250)))
        assert found == 0 or held[found - 1]
        assert found == 200 or not held[found]
        writer.clear()


def test_full_buckets_are_counted_and_do_no_harm(folder: Path):
    """Guards against an overflow that overwrites another bucket, or that an eviction does not undo."""
    writer = make(folder, 64)
    buckets = buckets_for(64)
    reader = PrefixIndexReader.open(index_path(folder, 0))
    same = [1 + i * buckets * 2 for i in range(BUCKET_WORDS + 3)]
    neighbour = 2
    writer.insert([neighbour, *same])
    assert writer.dropped == reader.counters()["dropped"] == 3
    assert [reader.has(n) for n in same] == [True] * BUCKET_WORDS + [False] * 3
    writer.evict([same[0], same[-1]])
    writer.insert([same[-1]])
    assert reader.has(same[-1])
    writer.evict(same)
    assert [n for n in (neighbour, *same) if reader.has(n)] == [neighbour]
    assert len(writer) == 1


def test_a_cache_of_a_million_tokens_fits(folder: Path):
    """Guards against a table that drops blocks which the cache has room for."""
    blocks = 62_500
    writer = make(folder, blocks)
    writer.insert(np.random.default_rng(3).integers(1, MAX, blocks, np.uint64))
    assert writer.dropped == 0
    size = index_path(folder, 0).stat().st_size
    assert blocks * WORDS_A_BLOCK * 8 <= size <= 2 * blocks * WORDS_A_BLOCK * 8 + PAGE_BYTES
    assert size == PAGE_BYTES + (2 << 20)  # 2 MiB, as the documentation says


@pytest.mark.parametrize("wrong", [[0], [1, -1], [1, 1 << 64], ["a"], [1.5], [None]])
@pytest.mark.parametrize("call", ["insert", "evict"])
def test_what_is_no_fingerprint_changes_nothing(folder: Path, call: str, wrong: list[object]):
    """Guards against a call that raises half way through, and an empty word that counts as a block."""
    writer = make(folder)
    writer.insert([1, 2])
    before = writer._words.tolist()
    with pytest.raises(SettingError, match="fingerprints are integers"):
        getattr(writer, call)([1, *wrong])
    assert writer._words.tolist() == before


@pytest.mark.parametrize(
    "wrong",
    [
        *(5, "ab", bytes(range(1, 9)), bytearray(range(1, 9)), np.array([True, True])),
        *(np.ones((2, 2), np.uint64), np.array([1.0]), np.array(1, np.uint64), np.array([1, None])),
    ],
    ids=repr,
)
@pytest.mark.parametrize("call", ["insert", "evict"])
def test_what_holds_no_fingerprints_changes_nothing(folder: Path, call: str, wrong: object):
    """Guards against numbers that are made of other things, and are in the index for ever."""
    writer = make(folder)
    writer.insert([1, 2])
    before = writer._words.tolist()
    with pytest.raises(SettingError, match="fingerprints are integers"):
        getattr(writer, call)(wrong)
    assert writer._words.tolist() == before


def test_only_the_owner_may_read(folder: Path):
    """Guards against an index that tells other users which prompts were seen, whatever the umask."""
    before = os.umask(0)
    try:
        make(folder)
    finally:
        os.umask(before)
    path = index_path(folder, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(SegmentInvalid, match="alone may read"):
        PrefixIndexReader.open(path)


def test_a_new_incarnation_replaces_the_file(folder: Path):
    """Guards against a reader whose memory changes its size under it, and a new one that finds old blocks."""
    old = make(folder, 64)
    old.insert([9])
    reader = PrefixIndexReader.open(index_path(folder, 0))
    new = make(folder, 1000, incarnation=2)
    assert reader.has(9)
    fresh = PrefixIndexReader.open(index_path(folder, 0))
    assert fresh.incarnation == 2
    assert not fresh.has(9)
    new.insert([9])
    assert fresh.has(9)
    assert [p.name for p in folder.iterdir()] == ["prefix-0"]


@pytest.mark.parametrize("num_blocks", [0, -1, 1 << 27])
def test_a_size_out_of_range_is_refused(folder: Path, num_blocks: int):
    """Guards against an index of nothing, and one that fills the node's memory."""
    with pytest.raises(SettingError, match="num_blocks is"):
        make(folder, num_blocks)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_gone(folder: Path):
    """Guards against an engine that ends because the sockets' folder was removed."""
    with pytest.raises(SegmentError, match="cannot make the prefix index"):
        make(folder / "gone")


def test_a_full_tmpfs_says_so_and_is_left_empty(tmp_path: Path):
    """Guards against an engine that dies of SIGBUS later, and a draft that stays."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    code = (
        "import os, sys; from pathlib import Path; from dpshm import SegmentNoSpace\n"
        "from dpshm.board.prefix_file import index_path\nfrom dpshm.board.prefix_index import PrefixIndexWriter\n"
        f"path = index_path(Path({str(tmp_path)!r}), 0)\n"
        "try: PrefixIndexWriter.create(path, num_blocks=62_500, block_tokens=16, identity=1, incarnation=1)\n"
        "except SegmentNoSpace as e: print(e)\n"
        f"print(os.listdir({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "has 64 KiB free and a prefix index of 62500 blocks needs 2052 KiB" in done.stdout
    assert done.stdout.endswith("[]\n")


def damage(path: Path, at: int, value: int) -> None:
    """Stores a word of the file."""
    with path.open("r+b") as file:
        file.seek(at * 8)
        file.write(value.to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        *((0, 1, "version 1"), (1, 2, "version 1"), (3, 3, "buckets"), (3, 1 << 40, "buckets")),
        *((3, 0, "buckets"), (4, 0, "0 tokens a block"), (4, 4097, "4097 tokens a block")),
    ],
)
def test_a_damaged_header_is_refused(folder: Path, at: int, value: int, says: str):
    """Guards against a reader that runs past the end of the file, and blocks that no hasher makes."""
    make(folder)
    path = index_path(folder, 0)
    damage(path, at, value)
    with pytest.raises(SegmentInvalid, match=says):
        PrefixIndexReader.open(path)


def test_what_is_no_index_is_refused(folder: Path):
    """Guards against following a link, waiting for a pipe, and mapping an empty file."""
    path = index_path(folder, 0)
    path.touch(0o600)
    with pytest.raises(SegmentInvalid, match="no prefix index"):
        PrefixIndexReader.open(path)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(SegmentInvalid, match="not a file"):
        PrefixIndexReader.open(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(SegmentError, match="cannot open"):
        PrefixIndexReader.open(path)
