"""dpshm's ZMQ context: one a process, made where it is first needed, so never before a fork that needs it.

Not ``zmq.Context.instance()``: the program that we are part of may end that one.
"""

from __future__ import annotations

import os
from typing import TypeAlias

import zmq

from dpshm.linux.descriptors import check_spare

Socket: TypeAlias = "zmq.Socket[bytes]"

_contexts: dict[int, zmq.Context[Socket]] = {}


def context() -> zmq.Context[Socket]:
    """The context of this process; a forked child gets its own and leaves its parent's alone."""
    pid = os.getpid()
    # setdefault is one step: two first callers at once get the same one, and the spare is closed unused.
    if pid not in _contexts:
        check_spare()
        spare: zmq.Context[Socket] = zmq.Context()
        if _contexts.setdefault(pid, spare) is not spare:
            spare.term()
    return _contexts[pid]
