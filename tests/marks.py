"""Marks of tests that `make check` leaves to `make test`."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_fast(values: Iterable[Any]) -> list[Any]:
    """Values of a parameter for which a test shows the same: the first one runs at every check, the others are slow."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
