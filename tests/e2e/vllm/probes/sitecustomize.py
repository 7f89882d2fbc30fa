"""What an API server expects of each request, and what the engine reports: a line each in a file of the process.

Python imports this file first in each process that has its folder on the path. ``PROBE_FOLDER`` gets a file for
each API server, with lines ``expected ID TOKENS`` and ``reported ID TOKENS``. Only for tests that start a
server with this folder in ``PYTHONPATH``.
"""

import os
from pathlib import Path
from typing import Any

from dpshm.frontend.route import Route
from dpshm.vllm import hooks
from dpshm.vllm.booking_link import BookingLink

if "PROBE_FOLDER" in os.environ:
    _note, _processor = BookingLink._note, vars(hooks)["outputs_processor"]

    def _write(what: str, request_id: str, tokens: int) -> None:
        with (Path(os.environ["PROBE_FOLDER"]) / str(os.getpid())).open("a") as file:
            file.write(f"{what} {request_id} {tokens}\n")

    def note(link: Any, request: Any, route: Any) -> Any:
        """Writes what is booked as cached."""
        if isinstance(route, Route):  # in the plugin's dry run it is a stand-in
            _write("expected", request.request_id, route.cached_tokens)
        return _note(link, request, route)

    def outputs_processor(stock: Any) -> Any:
        """Writes what engines report to this API server."""
        process = _processor(stock)

        async def process_engine_outputs(client: Any, outputs: Any) -> None:
            for output in outputs.outputs:
                if output.prefill_stats is not None:
                    _write("reported", output.request_id, output.prefill_stats.num_cached_tokens)
            await process(client, outputs)

        return process_engine_outputs

    for owner, name, method in ((BookingLink, "_note", note), (hooks, "outputs_processor", outputs_processor)):
        setattr(owner, name, method)
