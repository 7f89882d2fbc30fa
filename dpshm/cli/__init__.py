"""The ``dpshm`` command: one file a subcommand.

To add one, write ``dpshm/cli/NAME.py`` with a function ``NAME`` whose parameters are typer options, and put the
name into `COMMANDS`; its docstring is the help. An error that dpshm raises on purpose becomes one line on stderr
and exit status 2. Any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module

from dpshm import __version__
from dpshm.errors import DpshmError

COMMANDS = (
    *("demo", "simulate", "replay"),
    *(
        "ls",
        "scale",
        "coordinator",
        "top",
        "stat",
        "events",
        "drain",
        "undrain",
        "doctor",
        "dashboard",
        "web",
        "feed",
        "keygen",
    ),
)
_MODULES = {"undrain": "drain"}
"""The module of a command that shares another's."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs the command line."""
    try:
        _run()
    except KeyboardInterrupt:  # while it imports: commands have handlers of their own
        raise SystemExit(EXIT_INTERRUPTED) from None


def load_command(name: str) -> Callable[..., None]:
    """The function of a subcommand."""
    module = import_module(f"dpshm.cli.{_MODULES.get(name, name)}")
    command: Callable[..., None] = getattr(module, name)
    return command


def _run() -> None:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as e:
        sys.stderr.write(f"dpshm: error: {e}. Install the command line with: pip install 'dpshm[cli]'\n")
        raise SystemExit(EXIT_USAGE) from None

    # A stream that was closed before the start: what is written to it is lost, and raises nothing.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # Plain text throughout: it can be grepped, and looks the same in a log.
    app = typer.Typer(
        name="dpshm",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"dpshm {__version__}")
            raise typer.Exit

    @app.callback()
    def top(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        """Data-parallel coordinator for LLM inference: load in shared memory, request waves over ZMQ."""

    asked = sys.argv[1:2]
    for name in asked if asked and asked[0] in COMMANDS else COMMANDS:  # the others would be loaded in vain
        command = load_command(name)
        # A raw docstring holds the characters \b where click wants a backspace, "do not fill this paragraph".
        app.command(name, help=(inspect.getdoc(command) or "").replace(r"\b", "\b"))(command)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except DpshmError as e:
        sys.stderr.write(f"dpshm: error: {e}\n")
        raise SystemExit(EXIT_USAGE) from None
    except OSError as e:
        # Without this the flush at exit would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):  # there the reader of our output is gone, and asked for no more
            sys.stderr.write(f"dpshm: error: {e.strerror or e}{f': {e.filename}' if e.filename else ''}\n")
        raise SystemExit(1) from None
