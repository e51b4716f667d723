"""How every command ends: a PolypSegError becomes one line on stderr and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from polypseg.errors import PolypSegError


@contextmanager
def reported() -> Iterator[None]:
    """Turn a PolypSegError into its line and exit code (2 for usage, 1 for failure), Ctrl-C into 130."""
    try:
        yield
    except PolypSegError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
