"""Write the package's log to stderr where nobody has configured logging, as Flask does for the log of an app.

Python would write the bare messages of warnings, without time, level and logger. These lines look like gunicorn's own.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)  # any of the package's
_PACKAGE = logging.getLogger(__name__.partition(".")[0])

_DISABLED = (
    "The log of %s is disabled: logging.config was called after the package was imported, without "
    "disable_existing_loggers=False. Its warnings and errors are lost. Set that to False."
)


class _Console(logging.StreamHandler[Any]):
    """Writes a record unless another handler gets it. Logging may be configured at any time later."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        line = "%(asctime)s [%(process)d] [%(levelname)s] %(name)s: %(message)s"
        self.setFormatter(logging.Formatter(line, "[%Y-%m-%d %H:%M:%S %z]"))

    @property
    def stream(self) -> Any:
        return sys.stderr  # which may be replaced at any time

    def filter(self, record: logging.LogRecord) -> Any:
        return not _is_handled(record.name) and super().filter(record)


def _is_handled(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if not all(isinstance(handler, _Console) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def install() -> None:
    """Have the package's log written, if it is written nowhere else."""
    if not any(isinstance(handler, _Console) for handler in _PACKAGE.handlers):
        _PACKAGE.addHandler(_Console())


def check() -> None:
    """Say so, on the root logger, if the package's log is disabled, which a `dictConfig()` does by default."""
    if logger.disabled:
        logging.getLogger().warning(_DISABLED, _PACKAGE.name)
