"""A folder for the segments of one test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of our own on the tmpfs, in which all segments of a test lie."""
    path = Path(tempfile.mkdtemp(prefix="dpt-", dir="/dev/shm"))
    monkeypatch.setenv("DPSHM_DIR", str(path))
    yield path
    shutil.rmtree(path)
