"""Call what belongs to an app without keeping it, and so the app: see hub/worker.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class LastResult(Generic[_T]):
    """Calls the function that a weak reference leads to, and returns its last result once the function is gone.

    `before` is returned if it is gone before the first call.
    """

    def __init__(self, reference: Callable[[], Callable[[], _T] | None], before: _T) -> None:
        self._reference = reference
        self._last = before

    def __call__(self) -> _T:
        if (function := self._reference()) is not None:
            self._last = function()
        return self._last
