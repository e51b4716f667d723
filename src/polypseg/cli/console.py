"""How every command and script ends, and how tables are printed."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from polypseg.errors import PolypSegError, missing_package

if TYPE_CHECKING:
    import typer
    from rich.table import Table as RichTable

    from polypseg.tables import Table


@contextmanager
def reported() -> Iterator[None]:
    """Turn a PolypSegError into its line and exit code (2 for usage, 1 for failure), Ctrl-C into 130.

    So is a package that is not installed: its line says how to install it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor the screen
    try:
        yield
    except PolypSegError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except ModuleNotFoundError as error:  # a light installation brings only what segmenting frames needs
        if (error.name or "").startswith("polypseg"):
            raise
        explained = missing_package(error)
        print(f"error: {explained}", file=sys.stderr)
        raise SystemExit(explained.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run_app(command: "typer.Typer") -> None:
    """Run a command; a PolypSegError becomes one line on stderr and its exit code: 2 for usage, 1 for failure."""
    with reported():
        command(standalone_mode=True)


def run_script(function: Callable[..., Any]) -> None:
    """Run a function as a script of its own, its arguments taken from the command line."""
    import typer

    script = typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    script.command()(function)
    run_app(script)


def print_table(table: "Table", *, wide: bool = True) -> None:
    """Print a table without cutting any cell: names and addresses are there to be copied.

    Unless ``wide``, on a terminal that is too narrow the optional columns are dropped, the last first, which the
    line below the table says; what is still too wide is folded.
    """
    from rich.console import Console

    console = Console()
    whole = wide or not console.is_terminal
    dropped = [] if whole else _columns_to_drop(table, console)
    shown = table.without(dropped).rich(no_wrap=whole)
    if whole:
        console.width = max(console.width, _width(shown, console))
    else:
        for column in shown.columns:
            column.overflow = "fold"
    console.print(shown, soft_wrap=whole)
    if dropped:
        print(f"columns left out on this narrow screen: {', '.join(dropped)}; --wide shows them")


def _width(table: "RichTable", console: Any) -> int:
    return int(console.measure(table, options=console.options.update(width=1000)).maximum)


def _columns_to_drop(table: "Table", console: Any) -> list[str]:
    """Headings of the optional columns without which a table fits, as few as do."""
    dropped: list[str] = []
    for column in reversed([column for column in table.columns if column.optional]):
        if _width(table.without(dropped).rich(), console) <= console.width:
            break
        dropped.insert(0, column.title)
    return dropped


def print_json(content: Any) -> None:
    """Print what a program reads: JSON, indented, nothing else."""
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))
