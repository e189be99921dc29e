"""Every error the package raises, and the builtin kind it can be caught as.

    PgSSEError
    +-- ConfigurationError (ValueError)        a config key has a wrong value
    |   +-- DatabaseNotConfigured              no PostgreSQL URL was found at first use
    +-- InvalidChannel (ValueError)            a channel name that can never exist
    +-- InvalidEvent (ValueError)              an event that Server-Sent Events cannot carry
    |   +-- PayloadTooLarge                    it does not fit one NOTIFY (.size, .limit)
    +-- DatabaseUnavailable (ConnectionError)  PostgreSQL did not answer, or refused
    +-- EventLogMissing (RuntimeError)         SSE_EVENT_LOG is true, and the database has no event log

A message says what failed, why, and what to do about it; none holds a password.
"""

from __future__ import annotations


class PgSSEError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(PgSSEError, ValueError):
    """A configuration key has a value that cannot be used."""


class DatabaseNotConfigured(ConfigurationError):
    """No PostgreSQL database is configured, or what is configured is another engine."""


class InvalidChannel(PgSSEError, ValueError):
    """A channel name that no stream can listen to and no notify can reach."""


class InvalidEvent(PgSSEError, ValueError):
    """An event that cannot be sent as a Server-Sent Event."""


class PayloadTooLarge(InvalidEvent):
    """An event that does not fit PostgreSQL's NOTIFY payload.

    `size` is the length of its data in bytes, `limit` how many bytes of data there is room for.
    """

    def __init__(self, channel: str, size: int, limit: int) -> None:
        super().__init__(
            f"The event for channel {channel!r} has {size} bytes of data, and one NOTIFY of PostgreSQL has room for "
            f"{limit} beside the event's name, id and comment. Install the event log (flask sse init), which carries "
            "any size, or send less: an id, say, with which the page fetches the rest."
        )
        self.size = size
        self.limit = limit


class DatabaseUnavailable(PgSSEError, ConnectionError):
    """PostgreSQL could not be reached in time, or ended or refused the call."""


class EventLogMissing(PgSSEError, RuntimeError):
    """The event log is required by the configuration, and the database has none that can be used."""
