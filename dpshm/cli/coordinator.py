"""``dpshm coordinator``: runs one in the foreground."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dpshm.errors import AddressInUse, DpshmError, GroupInUse, SegmentError, SettingError, TooManyFiles
from dpshm.service.logs import set_up
from dpshm.service.serve import CoordinatorFailed, octal, read_config, serve, settings_of_live_group

EXIT_FAILED, EXIT_SETTING, EXIT_IN_USE, EXIT_MEMORY = 1, 2, 3, 4


class Balancing(StrEnum):
    """What balances the load."""

    INTERNAL = "internal"
    HYBRID = "hybrid"
    EXTERNAL = "external"


class LogFormat(StrEnum):
    """The format of the log."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The lowest level that the log contains."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def coordinator(
    group: Annotated[
        str | None, typer.Option("--group", "-g", metavar="NAME", help="The deployment's name on this node.")
    ] = None,
    dp_size: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    dp_size_local: Annotated[
        int | None, typer.Option(help="Data-parallel ranks on this node. Default: all.")
    ] = None,
    balancing: Annotated[
        Balancing | None,
        typer.Option(help="What balances the load: the front-ends, those of each node, or an outside balancer."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="ADDRESSES", help="Follow the coordinator of another node: its addresses."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address that tcp sockets are bound to.")] = None,
    nodes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Nodes whose front-ends choose among the ranks of all. 1: no relay."),
    ] = None,
    node: Annotated[int | None, typer.Option(metavar="K", help="The number of this one; 0 is the head.")] = None,
    curve_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keys (dpshm keygen) that peers need on a tcp socket."),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Allow tcp without keys beyond loopback: any host can connect."),
    ] = None,
    waves: Annotated[
        bool | None, typer.Option("--waves/--no-waves", help="Whether ranks run in lockstep.")
    ] = None,
    max_engines: Annotated[int | None, typer.Option(help="Rows for engines: dp_size can grow up to it.")] = None,
    max_frontends: Annotated[int | None, typer.Option(help="Rows for front-ends.")] = None,
    stall_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Silence after which a rank is stalled; longer than the longest step. 0: never."
        ),
    ] = None,
    ready_timeout: Annotated[
        float | None, typer.Option(metavar="S", help="Time for all engines to attach. 0: no limit.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="OCTAL", help="Permissions of the board: 0600, or 0640 or 0644 to let others read."),
    ] = None,
    file_group: Annotated[
        str | None, typer.Option(metavar="NAME", help="The group of users that --mode 0640 lets read.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port for Prometheus metrics. 0: any port.")] = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address for the metrics. Default: 127.0.0.1.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML file of settings, named as in the documentation. Options override it."
        ),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Format of the log on stderr.")] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="Lowest level to log. debug logs each wave.")
    ] = LogLevel.INFO,
) -> None:
    r"""Run a group's coordinator in the foreground, for systemd and containers.

    If engines and front-ends of the group are alive, it takes their board over. Then it needs no setting but the
    group: it keeps the settings of the group's last coordinator, except those that you give. SIGTERM ends it and
    leaves the board for the next coordinator. Ctrl-C ends the group and removes the board. With systemd's
    Type=notify it tells systemd when it is ready.

    \b
    Exit status:
      0  ended by SIGTERM or Ctrl-C
      1  a thread of it failed, a port is in use, or no file descriptor is left:
         restart it
      2  a setting is wrong: restarting does not help
      3  the group has a coordinator already
      4  no room for the board, or its directory cannot be used

    \b
    Examples:
      dpshm coordinator --group prod --dp-size 8 --metrics-port 9400
      dpshm coordinator --group prod                  take a live board over
      dpshm coordinator --config /etc/dpshm.toml --log-format json
      dpshm coordinator --group prod --dp-size 8 --mode 0640 --file-group monitoring
    """
    set_up(log_format.value, log_level.value)
    given: dict[str, Any] = {
        "group": group,
        "dp_size": dp_size,
        "dp_size_local": dp_size_local,
        "balancing": balancing.value if balancing else None,
        "head": head,
        "nodes": nodes,
        "node": node,
        "host": host,
        "curve_dir": curve_dir,
        "insecure": insecure,
        "waves": waves,
        "max_engines": max_engines,
        "max_frontends": max_frontends,
        "stall_timeout_s": stall_timeout,
        "ready_timeout_s": ready_timeout,
        "file_mode": octal(mode) if mode is not None else None,
        "file_group": file_group,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
    }
    try:
        settings = read_config(config) if config else {}
        settings |= {name: value for name, value in given.items() if value is not None}
        if isinstance(settings.get("group"), str):
            settings = settings_of_live_group(settings["group"]) | settings
        for name in ("group", "dp_size"):
            if name not in settings:
                raise SettingError(
                    f"{name} is needed: --{name.replace('_', '-')}, or {name} = ... in --config FILE"
                    + (
                        ""
                        if name == "group"
                        else f" (group {settings['group']!r} has no live board here to read it from)"
                    )
                )
        serve(settings)
    except CoordinatorFailed as e:
        sys.stderr.write(f"dpshm: error: {e}\n")
        raise typer.Exit(EXIT_FAILED) from None
    except DpshmError as e:
        sys.stderr.write(f"dpshm: error: {e}\n")
        raise typer.Exit(_status(e)) from None


def _status(error: DpshmError) -> int:
    if isinstance(error, AddressInUse | TooManyFiles):  # these pass
        return EXIT_FAILED
    if isinstance(error, GroupInUse):
        return EXIT_IN_USE
    return EXIT_MEMORY if isinstance(error, SegmentError) else EXIT_SETTING
