"""Runs a study in the interpreter of the environment that has vLLM (``tests/e2e/vllm/environment.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from tests.e2e.vllm import environment

_IN_VLLM = "DPSHM_BENCH_IN_VLLM"


def run_in_vllm(study: str, argv: Sequence[str], **variables: str) -> int | None:
    """The exit status of the study there, 2 if there is no such environment; None: this process is there.

    Args:
        study: its name, for ``python -m bench``.
        argv: its arguments.
        variables: of its environment.
    """
    if os.environ.get(_IN_VLLM) == "1":
        return None
    if reason := environment.why_not():
        print(reason, file=sys.stderr)
        return 2
    variables |= {"PYTHONPATH": str(environment.ROOT), "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [str(environment.folder() / "bin" / "python"), "-m", "bench", study, *argv]
    return subprocess.run(command, env=os.environ | variables | {_IN_VLLM: "1"}, check=False).returncode
