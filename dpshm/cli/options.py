"""Options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dpshm.board.files import groups
from dpshm.errors import SettingError
from dpshm.ops.screen.text import Glyphs

EXIT_INTERRUPTED = 130


def _complete(incomplete: str) -> list[str]:
    return [name for name in groups() if name.startswith(incomplete)]


GroupOption = Annotated[
    str | None,
    typer.Option(
        "--group",
        "-g",
        metavar="NAME",
        autocompletion=_complete,
        help="The group; not needed when only one lives on this node.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
AsciiOption = Annotated[bool, typer.Option("--ascii", help="Use no blocks and signs, for terminals without them.")]
TimeUnitOption = Annotated[
    str,
    typer.Option(metavar="UNIT", help="Unit of the trace's times if its fields do not tell it: s, ms, us or ns."),
]


def glyphs(ascii_only: bool, encoding: str | None) -> Glyphs:
    """The characters that may be printed: blocks, where the encoding has them."""
    return Glyphs(not ascii_only and (encoding or "").lower().replace("-", "") == "utf8")


def one_of_two(workload: object, trace: Path | None) -> None:
    """Refuses a built-in workload beside a trace: one of the two would be left out in silence.

    Raises:
        SettingError: both are given.
    """
    if workload is not None and trace is not None:
        raise SettingError("--workload is played without a trace: leave --workload or --trace out")


def interrupted() -> NoReturn:
    """Ends a command that Ctrl-C ended."""
    raise typer.Exit(EXIT_INTERRUPTED) from None
