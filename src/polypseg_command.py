"""Entry point of the ``polypseg`` command; ``segment`` with plain options goes the shortest way to a first mask."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    plain = read_plain_segment(words[1:]) if words[:1] == ["segment"] else None
    if plain is None:
        from polypseg.cli.console import reported

        with reported():  # of a Ctrl-C too, in the second that this takes
            from polypseg.cli.app import main as run

        run()
    else:
        _segment(plain)


def read_plain_segment(words: Sequence[str]) -> dict[str, Any] | None:
    """The options of ``polypseg segment``, read by argparse; None for anything that the full command should judge.

    The full command (``polypseg.cli.predict.segment``) has the same options and more, all help and all complaints; it
    imports four times as much, which a person with one photo would wait for.
    """
    import argparse
    from pathlib import Path

    class Quiet(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Quiet(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--output", type=Path, default=argparse.SUPPRESS)
    for name, kind in (("--model", str), ("--runtime", str), ("--threshold", float), ("--min-area", int)):
        parser.add_argument(name, type=kind, default=argparse.SUPPRESS)
    for name in ("--save-probability", "--overwrite"):
        parser.add_argument(name, action="store_true", default=argparse.SUPPRESS)
    try:
        found, unknown = parser.parse_known_args(list(words))
    except (argparse.ArgumentError, ValueError):
        return None
    return None if unknown else vars(found)


def _segment(options: dict[str, Any]) -> None:
    """Segment and print, with errors as every command reports them."""
    from polypseg.cli.console import reported

    with reported():
        from polypseg.inference.segment import run_segment

        print("\n".join(run_segment(**options)))


if __name__ == "__main__":
    main()
