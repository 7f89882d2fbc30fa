"""``dpshm web``: a page that shows a group live."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from typing import Annotated

import typer

from dpshm.cli.options import GroupOption, interrupted
from dpshm.net.addresses import is_loopback
from dpshm.ops.groups import open_group
from dpshm.ops.web import Server

TOKEN_BYTES = 18


def web(
    group: GroupOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond loopback a token is required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free port.")] = 8765,
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="S", min=0.1, max=86_400, help="Between frames.")
    ] = 1.0,
) -> None:
    r"""Serve one self-contained page with a group's ranks, waves and events, live.

    Read-only. Beyond loopback every request needs a token: DPSHM_WEB_TOKEN, or else a random one, which is
    printed. The page is served without encryption: tunnel it, or put a proxy with TLS in front.

    \b
    Examples:
      dpshm web
      dpshm web --host 0.0.0.0 --port 9000
      ssh -L 8765:127.0.0.1:8765 node dpshm web     then open http://127.0.0.1:8765
    """
    with open_group(group) as board:
        name = board.segment.group
    token = os.environ.get("DPSHM_WEB_TOKEN") or (
        None if is_loopback(host) else secrets.token_urlsafe(TOKEN_BYTES)
    )
    server = Server(name, host=host, port=port, token=token, interval_s=interval)
    sys.stderr.write(f"dpshm: group {name} at {server.url} (Ctrl-C ends it)\n")
    sys.stderr.flush()
    serving = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    serving.start()
    try:
        while serving.is_alive():
            serving.join(1.0)  # Python does not see a signal that comes just before a wait until the wait is over
    except KeyboardInterrupt:
        interrupted()
    finally:
        server.shutdown()
        server.close()
