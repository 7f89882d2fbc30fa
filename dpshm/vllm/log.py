"""The plugin's logger: a child of vLLM's, so that its lines look like vLLM's and obey its level."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.dpshm")


def adopt_core() -> None:
    """Sends the log lines of dpshm's core to vLLM's handlers, unless dpshm's logger has handlers of its own."""
    core, theirs = logging.getLogger("dpshm"), logging.getLogger("vllm")
    if not core.handlers and theirs.handlers:
        core.handlers = list(theirs.handlers)
        core.propagate = False
        core.setLevel(theirs.level)
