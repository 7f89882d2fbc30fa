"""dpshm coordinates the data-parallel ranks of an LLM inference deployment on one node.

Engines store their load in shared memory, front-ends read it when they choose an engine, and a ZMQ thread
runs the request waves, publishing only when their state changes.
"""

from dpshm.board.board import Board
from dpshm.board.events import Event
from dpshm.board.snapshot import Snapshot
from dpshm.engine.handle import Engine
from dpshm.errors import (
    AddressInUse,
    CapacityExceeded,
    DpshmError,
    GroupInUse,
    HandleClosed,
    HandleError,
    HandleForked,
    NoEngineAvailable,
    Overloaded,
    RowInUse,
    SegmentError,
    SegmentInvalid,
    SegmentNoSpace,
    SegmentNotFound,
    SettingError,
    StartupTimeout,
    TooManyFiles,
    WireError,
    WrongThread,
)
from dpshm.frontend.handle import Frontend
from dpshm.frontend.health import Health
from dpshm.frontend.route import Route
from dpshm.rules.liveness import State
from dpshm.service.coordinator import Coordinator
from dpshm.service.coordinator_process import CoordinatorProcess
from dpshm.version import __version__

__all__ = [
    "AddressInUse",
    "Board",
    "CapacityExceeded",
    "Coordinator",
    "CoordinatorProcess",
    "DpshmError",
    "Engine",
    "Event",
    "Frontend",
    "GroupInUse",
    "HandleClosed",
    "HandleError",
    "HandleForked",
    "Health",
    "NoEngineAvailable",
    "Overloaded",
    "Route",
    "RowInUse",
    "SegmentError",
    "SegmentInvalid",
    "SegmentNoSpace",
    "SegmentNotFound",
    "SettingError",
    "Snapshot",
    "StartupTimeout",
    "State",
    "TooManyFiles",
    "WireError",
    "WrongThread",
    "__version__",
]
