"""How every command ends: a PolypSegError becomes one line on stderr and an exit code."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from polypseg.errors import PolypSegError, missing_package


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
