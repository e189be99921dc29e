"""The basic app in a process that others have changed, as the variable `SURROUNDINGS` says."""

from __future__ import annotations

import os

from tests.support.surroundings import AFTER, BEFORE

what = os.environ["SURROUNDINGS"]
if what in BEFORE:
    BEFORE[what]()

from tests.support.apps.basic import app  # noqa: E402

if what in AFTER:
    AFTER[what]()
__all__ = ["app"]
