"""What stands between the app and the browser."""

from __future__ import annotations

from .setup import Check

CHECKS: dict[str, Check] = {}
