"""The ``polypseg`` command, and how every command and script reports an error."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from polypseg.errors import PolypSegError

app = typer.Typer(
    help="Polyp segmentation whose behaviour on other hospitals' data is known. Not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Find, fetch and check datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def run_app(command: typer.Typer) -> None:
    """Run a command; a PolypSegError becomes one line on stderr and its exit code: 2 for usage, 1 for failure."""
    try:
        command(standalone_mode=True)
    except PolypSegError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run_script(function: Callable[..., Any]) -> None:
    """Run a script's ``main`` with its arguments taken from the command line."""
    script = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    script.command()(function)
    run_app(script)


def main() -> None:
    """Entry point."""
    run_app(app)
