"""The command line: kvcomp info | get | demo | generate | serve | plan | think | delethink.

Every error that a user can cause is one line on standard error and exit code 2; Ctrl-C and SIGTERM
exit with the shell's codes, 130 and 143.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console  # noqa: F401  (the commands', asked for here)
except ModuleNotFoundError as missing:
    print(
        f"kvcomp: error: the command line needs {missing.name}: pip install 'kvcomp[hf]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from kvcomp import __version__
from kvcomp.cli.delethink import delethink
from kvcomp.cli.generate import generate
from kvcomp.cli.get import get
from kvcomp.cli.output import Refused, say, say_aside, silence
from kvcomp.cli.plan import plan
from kvcomp.cli.serve import serve
from kvcomp.cli.show import demo, info
from kvcomp.cli.stopping import INTERRUPTED, Stopped, signals_raise
from kvcomp.cli.think import think

app = typer.Typer(
    add_completion=False,
    help="Kernels and methods that make long chains of thought cheap to decode.",
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    if asked:
        say(f"kvcomp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options that come before any command."""


for command in (info, get, demo, generate, plan, think, delethink):
    app.command()(command)
# What serve does not know is vLLM's.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)

# What typer raises for a bad command line. typer has its own copy of click from some version on,
# so the class is taken from where both have it: BadParameter, UsageError, ClickException.
UsageProblem: Any = typer.BadParameter.__mro__[2]

# Module -> the extra that brings it; the others are in [hf].
PROVIDERS = {"matplotlib": "bench", "openai": "delethink", "gguf": "gguf", "accelerate": "gguf"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if sys.stderr is None:  # closed; print would take standard output in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    if sys.stdout is None:
        return _fail("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # a model may say what the terminal cannot show
    try:
        with signals_raise():
            code = _run(args)
    except Stopped as stopped:
        code = stopped.exit_code
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        silence(sys.stdout)
        code = code or _refused(Refused("standard output", error))
    return code


def _run(args: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        return command.main(args, prog_name="kvcomp", standalone_mode=False) or 0
    except UsageProblem as error:
        return _fail(error.format_message())
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "kvcomp":
            raise
        extra = PROVIDERS.get(error.name, "hf")
        return _fail(f"this needs {error.name}: pip install 'kvcomp[{extra}]'")
    except typer.Abort:  # Ctrl-C, in versions of typer that do not turn it into an exit code
        return INTERRUPTED
    except Refused as error:
        return _refused(error)
    except (ValueError, TypeError, RuntimeError) as error:
        if not str(error).lower().startswith("kvcomp"):
            raise  # not one of ours but a bug, which needs its traceback
        return _fail(str(error))
    except OSError as error:
        if "--help" not in args:
            raise
        return _refused(Refused("standard output", error))


def _refused(error: Refused) -> int:
    return _fail(str(error)) if error.code == 2 else error.code


def _fail(message: str) -> int:
    text = " ".join(message.removeprefix("kvcomp.").removeprefix("kvcomp: ").split())
    try:
        say_aside(f"kvcomp: error: {text}")
    except Refused:  # nowhere left to say it
        silence(sys.stderr)
    return 2
