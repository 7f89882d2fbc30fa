"""One writer and several readers of a prefix index, in processes of their own: no word is ever torn or invented.

The two halves of each fingerprint are equal but for a mask, so a word that was made of two shows. Some
fingerprints are held all the time, the others come and go.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dpshm.board.prefix_index import PrefixIndexReader, PrefixIndexWriter, index_path
from tests.support import Remote, wait_until

pytestmark = pytest.mark.slow

SHARED = """
import random
from pathlib import Path
import numpy as np
from dpshm.board.prefix_index import PrefixIndexReader, PrefixIndexWriter, index_path

MASK = 0x5A5A5A5A
random.seed(1)
numbers = random.sample(range(1, 1 << 32), 4000)
known = [n | (n ^ MASK) << 32 for n in numbers]
prompt, held, moving = np.array(known[:1000], np.uint64), known[1000:2000], known[2000:]
path = index_path(Path(folder), 0)
"""

WRITE = """
writer = PrefixIndexWriter.create(path, num_blocks=4000, block_tokens=16, identity=1, incarnation=1)
writer.insert(prompt)
writer.insert(held)
rounds = 0
def write():
    global rounds
    part = random.sample(moving, 300)
    writer.insert(part)
    writer.evict(part[::-1])
    if rounds % 4 == 0:  # the end of the prompt leaves the cache and comes back
        writer.evict(prompt[:499:-1])
        writer.insert(prompt[500:])
    rounds += 1
"""

READ = """
reader = PrefixIndexReader.open(path)
allowed = set(known)
counts = {"looks": 0, "torn": 0, "lost": 0, "matches": set()}
def read():
    counts["looks"] += 1
    table = np.frombuffer(reader._words, np.uint64)[512:]
    for word in table.tolist():
        if word and (word not in allowed or word >> 32 != word & 0xFFFFFFFF ^ MASK):
            counts["torn"] += 1
    counts["lost"] += sum(not reader.has(word) for word in held)
    length = reader.match(prompt)
    counts["matches"].add(length)
    counts["lost"] += length < 500
"""


def test_a_writer_and_three_readers(tmp_path: Path, using):
    """Guards against half a word, a block that is lost while others come and go, and a match of nonsense."""
    writer = using(Remote())
    writer.run(SHARED + WRITE, folder=str(tmp_path))
    readers = [using(Remote()) for _ in range(3)]
    for reader in readers:
        reader.run(SHARED + READ, folder=str(tmp_path))
    writer.begin("while not told(): write()")
    for reader in readers:
        reader.begin("while not told() or counts['looks'] < 200: read()")
    wait_until(lambda: all(reader.eval("counts['looks']") >= 200 for reader in readers))
    assert writer.eval("rounds") > 0
    for reader in readers:
        assert reader.eval("counts['torn']") == 0
        assert reader.eval("counts['lost']") == 0
        assert reader.eval("max(counts['matches'])") <= 1000


def test_a_writer_that_is_killed_leaves_whole_words(tmp_path: Path, using):
    """Guards against an index that harms its readers when its engine dies in the middle of a store."""
    for _ in range(3):
        writer = using(Remote())
        writer.run(SHARED + WRITE, folder=str(tmp_path))
        reader = PrefixIndexReader.open(index_path(tmp_path, 0))
        writer.begin("while not told(): write()")
        wait_until(lambda reader=reader: reader.counters()["evicted"] > 600)
        writer.kill()
        before = reader.counters()
        assert before["inserted"] >= before["evicted"]
        successor = PrefixIndexWriter.create(
            index_path(tmp_path, 0), num_blocks=4000, block_tokens=16, identity=1, incarnation=2
        )
        assert reader.counters() == before  # it keeps what it has mapped
        fresh = PrefixIndexReader.open(index_path(tmp_path, 0))
        assert (fresh.incarnation, fresh.counters()["held"], len(successor)) == (2, 0, 0)
