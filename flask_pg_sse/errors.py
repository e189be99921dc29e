"""Every error that the package raises, and the builtin exception that also catches it.

    PgSSEError
    +-- ConfigurationError (ValueError)        a config key has a wrong value
    |   +-- DatabaseNotConfigured              no PostgreSQL URL was found at first use
    +-- InvalidChannel (ValueError)            a channel name is not legal
    +-- InvalidEvent (ValueError)              an event does not fit the format of Server-Sent Events
    |   +-- PayloadTooLarge                    an event does not fit one NOTIFY (.size, .limit)
    +-- DatabaseUnavailable (ConnectionError)  PostgreSQL, or Redis, did not answer, or refused
    |   +-- PermissionDenied (PermissionError) the database role lacks a right
    +-- EventLogMissing (RuntimeError)         an event log is needed here, and there is none that can be used

A message says what failed, why, and what to do about it. No message contains a password.
"""

from __future__ import annotations

# The end of each message that says that there is no PostgreSQL.
IN_TESTS = "In tests without PostgreSQL use flask_pg_sse.testing.capture(app)."


class PgSSEError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(PgSSEError, ValueError):
    """A config key has a value that cannot be used."""


class DatabaseNotConfigured(ConfigurationError):
    """No database is configured, or the configured one is not PostgreSQL."""


class InvalidChannel(PgSSEError, ValueError):
    """A channel name is not legal: no stream can listen to it, and `notify()` cannot send to it."""


class InvalidEvent(PgSSEError, ValueError):
    """An event cannot be sent as a Server-Sent Event."""


class PayloadTooLarge(InvalidEvent):
    """An event does not fit the payload of one NOTIFY.

    `size` is the length of its data in bytes. `limit` is how many bytes of data would have fitted. `remedy` is the part
    of the message that says how such an event can be sent all the same.
    """

    def __init__(
        self,
        channel: str,
        size: int,
        limit: int,
        remedy: str = "Install the event log (flask sse init), which carries any size",
    ) -> None:
        super().__init__(
            f"The event for channel {channel!r} has {size} bytes of data, and one NOTIFY of PostgreSQL has room for "
            f"{limit} besides the event's name, id and comment. {remedy}; or send less: for example an id, with which "
            "the page fetches the rest."
        )
        self.size = size
        self.limit = limit


class DatabaseUnavailable(PgSSEError, ConnectionError):
    """PostgreSQL, or Redis, could not be reached in time, refused the call, or ended the connection during it."""


class PermissionDenied(DatabaseUnavailable, PermissionError):
    """The app's database role lacks a right. The message names the role and the remedy.

    It is a `DatabaseUnavailable` too, because streams wait in the same way until the right is granted.
    """


class EventLogMissing(PgSSEError, RuntimeError):
    """The event log cannot be used, and the configuration requires one, or the app uses one on other connections."""
