"""The command line: kvcomp info | get | demo | generate | plan | trace.

Every error that a user can cause is one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

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
from kvcomp.cli.generate import generate
from kvcomp.cli.get import get
from kvcomp.cli.plan import plan
from kvcomp.cli.show import demo, info
from kvcomp.cli.trace import trace

app = typer.Typer(
    add_completion=False,
    help="Kernels and methods that make long chains of thought cheap to decode.",
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    if asked:
        print(f"kvcomp {__version__}")
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
    """What is asked before any command."""


for command in (info, get, demo, generate, plan, trace):
    app.command()(command)

# What typer raises for a bad command line. typer has its own copy of click from some version on,
# so the class is taken from where both have it: BadParameter, UsageError, ClickException.
UsageProblem = typer.BadParameter.__mro__[2]

# Module -> the extra that brings it; the others are in [hf].
PROVIDERS = {"matplotlib": "bench", "openai": "trace", "gguf": "gguf", "accelerate": "gguf"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
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
        return 130
    except (ValueError, TypeError, RuntimeError) as error:
        if not str(error).lower().startswith("kvcomp"):
            raise  # not one of ours but a bug, which needs its traceback
        return _fail(str(error).removeprefix("kvcomp.").removeprefix("kvcomp: "))


def _fail(message: str) -> int:
    print("kvcomp: error:", " ".join(message.split()), file=sys.stderr)
    return 2
