"""Compressed files: told by their bytes, and every way in which one can be damaged."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma

import pytest

from dpshm.sim.workloads.compressed import DamagedError, open_plain
from dpshm.sim.workloads.traces import TraceError, read_trace
from tests.unit.sim.workloads.samples import SAMPLES, TIMES_S

TEXT = b"".join(b"line %d\n" % i for i in range(50_000))


def zstd():
    """A library that compresses with zstd, or None."""
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_every_kind(tmp_path, compress):
    """Guards against a kind that only its suffix tells, and against one that is read as it lies there."""
    path = tmp_path / "trace.csv"
    path.write_bytes(compress(TEXT))
    with open_plain(path) as file:
        assert file.readline(100) == b"line 0\n"
        assert file.read() == TEXT[7:]
    path.write_bytes(compress(SAMPLES["Qwen-Bailian"]))
    assert [a.time_s for a in read_trace(path).arrivals] == pytest.approx(TIMES_S)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_damage_is_named(tmp_path, compress):
    """Guards against a traceback of the library, and against a file that is cut off and taken for whole."""
    path = tmp_path / "trace"
    whole = compress(TEXT)
    scribbled = bytearray(whole)
    scribbled[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    for data in (whole[: len(whole) // 2], whole[:-1], bytes(scribbled), whole[:6]):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="damaged or cut off"), open_plain(path) as file:
            file.read()
        with pytest.raises(TraceError, match=str(path)):
            read_trace(path)


def test_zstd(tmp_path):
    """Guards against zstd that is not read where it could be, or is called rubbish where it cannot."""
    path = tmp_path / "trace"
    if (library := zstd()) is None:
        path.write_bytes(b"\x28\xb5\x2f\xfd rest")
        with pytest.raises(TraceError, match=r"pip install zstandard, or unpack it \(unzstd\)"):
            read_trace(path)
        return
    path.write_bytes(library.compress(SAMPLES["Mooncake"]))
    assert [a.time_s for a in read_trace(path).arrivals] == pytest.approx(TIMES_S)
    path.write_bytes(library.compress(TEXT)[:-9])
    with pytest.raises(TraceError, match="damaged or cut off"):
        read_trace(path)
