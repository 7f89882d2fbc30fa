"""The plugin's logger: a child of vLLM's, so that its lines look like vLLM's and obey its level."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.dpshm")


def adopt_core() -> None:
    """Sends what the core of dpshm logs in this process where vLLM's own lines go, unless it goes somewhere."""
    core, theirs = logging.getLogger("dpshm"), logging.getLogger("vllm")
    if not core.handlers and theirs.handlers:
        core.handlers = list(theirs.handlers)
        core.propagate = False
        core.setLevel(theirs.level)
