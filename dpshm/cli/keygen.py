"""``dpshm keygen``: makes the keys of a group whose sockets are tcp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dpshm.cli.options import JsonOption
from dpshm.net.keys import ENVIRONMENT, make_keys, server_keys


class Made(msgspec.Struct):
    """The keys that were made.

    Attributes:
        folder: the folder that holds them.
        files: the names of all files.
        server_key: the server's public key; it identifies a group's keys.
    """

    folder: str
    files: list[str]
    server_key: str


def keygen(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    as_json: JsonOption = False,
) -> None:
    r"""Make the keys of a group whose sockets are tcp: only peers with these keys can connect.

    Two CURVE pairs: the server's and the clients'. Existing keys are never overwritten. Engines, front-ends and
    tools need a copy of the folder, less server.key_secret.

    \b
    Examples:
      dpshm keygen /etc/dpshm/keys
      dpshm coordinator --group prod --dp-size 16 --dp-size-local 8 --balancing hybrid \
                        --host 10.0.0.1 --curve-dir /etc/dpshm/keys
      DPSHM_CURVE_DIR=/etc/dpshm/keys python -m my_server
    """
    files = make_keys(folder)
    made = Made(str(folder), [str(file) for file in files], server_keys(folder).public.decode())
    if as_json:
        typer.echo(msgspec.json.encode(made).decode())
        return
    typer.echo(
        f"{folder}: two pairs of keys, server key {made.server_key}\n"
        f"  coordinator               --curve-dir {folder}\n"
        f"  engines, front-ends       {ENVIRONMENT}={folder}, or attach(curve_dir=...)\n"
        "  other machines            copy it there, less server.key_secret"
    )
