"""``dpshm ls``: the groups of this node, one line each."""

from __future__ import annotations

import msgspec
import typer

from dpshm.board.files import directory
from dpshm.cli.options import JsonOption
from dpshm.ops.groups import Summary, elsewhere, summaries


def ls(as_json: JsonOption = False) -> None:
    r"""List the groups of this node: state, ranks, requests and coordinator of each.

    A group is alive; orphaned (no coordinator); dead (no process is attached); private (another user's, who does
    not let this one look); or unreadable. Of ranks on other nodes the numbers are told, with an @.

    \b
    Examples:
      dpshm ls
      dpshm ls --json | jq -r 'select(.state == "orphaned") | .group'
    """
    found = summaries()
    if as_json:
        for one in found:
            typer.echo(msgspec.json.encode(one).decode())
    else:
        typer.echo(as_text(found))


def as_text(found: list[Summary]) -> str:
    """For people."""
    if not found:
        return f"no group is in {directory()}"
    rows = [("GROUP", "STATE", "REQUESTS", "COORDINATOR", "RANKS")]
    for one in found:
        pid = f"pid {one.coordinator_pid}" if one.coordinator_pid else "none"
        if not one.ranks:
            rows.append((one.group, one.state, "-", "-", one.detail))
        else:
            states = ", ".join(f"{n} {state}" for state, n in one.ranks.items())
            ranks = f"{one.dp_size}: {states}{elsewhere(one.remote)}"
            rows.append((one.group, one.state, str(one.requests), pid, ranks))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows)
