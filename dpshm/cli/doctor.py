"""``dpshm doctor``: checks this node and the groups on it."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from dpshm.board.board import Board
from dpshm.cli.options import GroupOption
from dpshm.errors import DpshmError
from dpshm.ops.doctor.finding import Finding
from dpshm.ops.doctor.group import check_group
from dpshm.ops.doctor.node import check_directory, check_leftovers, check_logind, check_processes, sweep_leftovers
from dpshm.ops.groups import Found, elsewhere, find_groups, summary_of

EXIT_FOUND = 1
SIGNS = {"error": "ERROR  ", "warning": "WARNING", "note": "note   "}


class Diagnosis(msgspec.Struct):
    """The groups that were checked, and the findings.

    Attributes:
        groups: their names.
        findings: the worst first.
        swept: paths that were removed.
        remote: by group that has any, the ranks that are on other nodes.
    """

    groups: list[str]
    findings: list[Finding]
    swept: list[str]
    remote: dict[str, list[int]]


def doctor(
    group: GroupOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    sweep: Annotated[
        bool | None, typer.Option("--sweep/--no-sweep", help="Remove what dead groups left. Default: ask.")
    ] = None,
) -> None:
    r"""Check this node and the groups on it; say what is wrong, why it matters, and the command that mends it.

    With --group it judges that group alone, and nothing of the node: a health probe. Changes nothing without
    --sweep, which removes what dead groups left, and nothing that a process has locked. An @ before a
    rank's number says that it is on another node, and is mended there.

    \b
    Exit status:
      0  nothing is wrong; there may be notes
      1  there is an error or a warning
      2  there is no such group

    \b
    Examples:
      dpshm doctor
      dpshm doctor --json | jq -r '.findings[] | "\(.severity) \(.what)"'
      dpshm doctor --sweep
      dpshm doctor --group prod || alert
    """
    found = find_groups()
    if group is not None:
        Board.attach(group, any_owner=True).close()  # or says why not
        found = [f for f in found if f.group == group]
    alone = group is not None
    findings = examine(found, alone=alone)
    swept: list[str] = []
    if any(f.check == "leftover" for f in findings) and (sweep or (sweep is None and not as_json and _ask())):
        swept = sweep_leftovers(found)
        findings = examine([f for f in find_groups() if group is None or f.group == group], alone=alone)
    remote = {f.group: ranks for f in found if (ranks := summary_of(f).remote)}
    if as_json:
        typer.echo(msgspec.json.encode(Diagnosis([f.group for f in found], findings, swept, remote)).decode())
    else:
        typer.echo(as_text(found, findings, swept, remote))
    if any(f.severity != "note" for f in findings):
        raise typer.Exit(EXIT_FOUND)


def examine(found: list[Found], *, alone: bool = False) -> list[Finding]:
    """All checks, the worst first.

    Args:
        found: the groups.
        alone: judge these groups, and not the node.
    """
    names = {group.group for group in found}
    findings = [*check_leftovers(found), *check_processes()]
    if alone:
        findings = [finding for finding in findings if finding.group in names]
    else:
        findings += [*check_directory(), *check_logind()]
    for group in found:
        if group.state in ("alive", "orphaned"):
            try:
                with Board.attach(group.group, any_owner=True) as board:
                    findings += check_group(board)
            except DpshmError:
                continue  # it ended while we looked
            except Exception as e:  # one group must not keep the doctor from the others
                findings.append(
                    Finding(
                        severity="error",
                        check="unreadable",
                        group=group.group,
                        what=f"the board cannot be examined: {e!r}",
                        why="its words are damaged, or this version has a fault",
                        fix="stop the group's processes, and start the group again",
                    )
                )
    return sorted(findings, key=lambda f: (list(SIGNS).index(f.severity), f.group or ""))


def _ask() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and typer.confirm("Dead groups left something. Sweep it?")


def as_text(
    found: list[Found], findings: list[Finding], swept: list[str], remote: dict[str, list[int]] | None = None
) -> str:
    """For people. Each rank on another node has an `@` before its number."""
    away = {group: elsewhere(ranks) for group, ranks in (remote or {}).items()}
    lines = [f"swept   {path}" for path in swept]
    for one in found:
        if one.state != "dead":  # those are a finding
            lines.append(
                f"group   {one.group}: {one.state}"
                + (f", {one.detail}{away.get(one.group, '')}" if one.state != "unreadable" else "")
            )
    for finding in findings:
        of = f"{finding.group}: " if finding.group else ""
        lines += ["", f"{SIGNS[finding.severity]} {of}{finding.what}"]
        lines += [f"        why: {finding.why}", f"        fix: {finding.fix}"]
    bad = sum(f.severity != "note" for f in findings)
    lines += ["", f"{bad} thing{'s' * (bad != 1)} to mend" if bad else "nothing is wrong"]
    return "\n".join(lines)
