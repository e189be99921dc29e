"""Who may listen to which channel. Takes and returns plain values: no request, no app."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase


def is_public(channel: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns of `SSE_CHANNELS` opens `channel` to everybody; upper and lower case differ."""
    return any(fnmatchcase(channel, pattern) for pattern in patterns)


def how_to_open(channel: str) -> str:
    """Return the line of configuration that opens `channel` and no other, for a developer to copy.

    The name comes from a URL, so that anybody chooses what stands in this line.
    """
    pattern = re.sub(r"([*?[])", r"[\1]", channel)
    literal = json.dumps(pattern, ensure_ascii=False) if pattern.isprintable() else repr(pattern)
    return f'app.config["SSE_CHANNELS"] = [{literal}]'
