"""Which of many cases are in the default run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def but_one_slow(values: Iterable[str]) -> list[Any]:
    """Return the cases of a parameter, of which all but the first are slow."""
    first, *rest = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]
