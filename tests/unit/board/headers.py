"""Headers of small segments, and the environment of a child that imports this tree's dpshm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dpshm
from dpshm.board.header import Header, make_header

ADDRESSES = dict.fromkeys(("stats_address", "engine_input_address", "engine_output_address"), "ipc://x")
ENV = {**os.environ, "PYTHONPATH": str(Path(dpshm.__file__).parents[1])}


def header(group: str = "g", engines: int = 4, frontends: int = 3, **settings: Any) -> Header:
    """A header for a small segment."""
    return make_header(group, engines, frontends, **ADDRESSES, settings=settings)
