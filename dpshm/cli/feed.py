"""``dpshm feed``: publishes a group's loads for routers outside."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from dpshm.cli.options import GroupOption
from dpshm.linux.signals import handling
from dpshm.ops.feed import Feed
from dpshm.ops.groups import open_group


def feed(
    group: GroupOption = None,
    address: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to publish: tcp://HOST:PORT, or ipc://PATH.")
    ] = "tcp://127.0.0.1:5560",
    rate: Annotated[float, typer.Option(min=0.01, max=1000.0, help="Messages a second.")] = 20.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow tcp beyond loopback: all who reach it may read the loads.")
    ] = False,
) -> None:
    r"""Publish a group's loads on a ZMQ PUB socket, as JSON, for gateways and schedulers that are no front-ends.

    Read-only. Each message has two frames: the topic "dpshm/loads/1 GROUP", and the loads. `dpshm web` answers the
    same at /loads.

    \b
    Examples:
      dpshm feed
      dpshm feed --address ipc:///run/dpshm/loads --rate 100
    """
    with closing(Feed(open_group(group), address, insecure=insecure)) as made:
        sys.stderr.write(f"dpshm: publishing at {made.address}, {rate:g} times a second (Ctrl-C ends it)\n")
        sys.stderr.flush()
        with handling(lambda _: made.stop()):
            made.run(rate)
