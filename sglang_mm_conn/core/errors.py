"""Owns the errors of this package. Every message names what is wrong and the wrong value."""


class ConnError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingError(ConnError, ValueError):
    """A setting has a value outside its allowed range."""


class ProtocolError(ConnError):
    """A peer broke the protocol."""


class IllegalTransition(ConnError):
    """A transition is not in the table of its state machine."""


class AllocatorError(ConnError):
    """A call requested blocks that are not free or named blocks of another owner, or the records are inconsistent."""


class MemoryUnavailable(ConnError):
    """Memory for the pool could not be reserved or attached."""


class DataPathUnavailable(ConnError):
    """A data path cannot be used between these two processes."""


class WriterSlotTaken(DataPathUnavailable):
    """The writer slot of a shared segment is locked: by another encoder process, or for good by the segment's owner."""


class DataPathError(ConnError):
    """A data call failed.

    ``in_doubt`` is True if bytes may still land after the call has returned. This error is then no proof that either
    side may reuse its memory.
    """

    def __init__(self, message: str, *, in_doubt: bool) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class TransferFailed(ConnError):
    """A room ended in Failed. ``code`` is the HTTP status for the client."""

    def __init__(self, room: str, reason: str, code: int) -> None:
        super().__init__(f"transfer of room {room} failed: {reason}")
        self.room = room
        self.reason = reason
        self.code = code
