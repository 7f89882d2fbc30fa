"""Faults in a live server: Python imports this file first in each process that has its folder on the path.

After ``FAULT_AFTER`` calls what an engine publishes raises, and what an API server routes with: as if dpshm had
a bug there. With ``FAULT_ATTACH`` no API server gets a row. Only for tests that start a server with this folder in
``PYTHONPATH``.
"""

import os
from itertools import count
from typing import Any

from dpshm.frontend.handle import Frontend
from dpshm.vllm.backlog import PrefillBacklog


def _fail_after(owner: Any, name: str, calls: int) -> None:
    stock, numbers = getattr(owner, name), count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) >= calls:
            raise RuntimeError(f"a fault in {name}, as the test ordered")
        return stock(*args, **kwargs)

    setattr(owner, name, wrapped)


if "FAULT_AFTER" in os.environ:
    _calls = int(os.environ["FAULT_AFTER"])
    _fail_after(PrefillBacklog, "update", _calls)
    _fail_after(Frontend, "route", _calls)
if "FAULT_ATTACH" in os.environ:
    _fail_after(Frontend, "attach", 0)
