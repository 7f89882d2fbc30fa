"""``python -m tests.e2e.vllm.forked serve ...``: vLLM's command; its processes are forked where vLLM spawns them.

A spawned process imports all of vLLM again, ten seconds of a core each. On a busy machine of two cores the tests
with ``DPSHM_TEST_FORK=1`` start their servers in this way. vLLM itself forks where the start method is left to it,
but for API servers, which it always spawns.

Several API servers share their metrics through a folder. prometheus-client looks for it when it is imported, which
is before vLLM makes one. So there is one from the start, in the working directory.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any


def fork() -> None:
    """From now on this process forks where it would spawn."""
    stock: Any = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return stock("fork" if method == "spawn" else method)

    multiprocessing.get_context = get_context


def main() -> None:
    """Runs vLLM's command."""
    fork()
    folder = Path("metrics").absolute()
    folder.mkdir(exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
