"""The demo's coordinator: a `dpshm.Coordinator` in a child process of the demo."""

from __future__ import annotations

import logging
import sys

import zmq

from dpshm.errors import DpshmError
from dpshm.linux.processes import set_title
from dpshm.service.coordinator import Coordinator
from dpshm.sim.demo.child import Lifeline, read_line, write_line
from dpshm.sim.demo.messages import CoordinatorSettings, Ready


def main() -> None:
    """The coordinator's process."""
    settings = read_line(CoordinatorSettings)
    lifeline = Lifeline(settings.parent_pid)
    set_title("dpshm:coord")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    poller = zmq.Poller()
    lifeline.register(poller)
    try:
        with Coordinator(
            group=settings.group,
            dp_size=settings.dp_size,
            waves=settings.waves,
            stall_timeout_s=settings.stall_timeout_s,
        ):
            write_line(Ready())
            while not lifeline.ended():
                poller.poll()
    except DpshmError as e:
        sys.exit(str(e))
