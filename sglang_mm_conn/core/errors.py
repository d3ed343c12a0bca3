"""The errors of this package; every message names what was wrong and the value that was."""


class ConnError(Exception):
    """Base of every error this package raises on purpose."""


class SettingError(ConnError, ValueError):
    """A setting has a value outside its allowed range."""


class ProtocolError(ConnError):
    """A peer sent something that the protocol does not allow."""


class IllegalTransition(ConnError):
    """A state machine was asked for a transition that its table does not allow."""


class AllocatorError(ConnError):
    """Blocks were taken, freed or quarantined by somebody who does not hold them."""


class MemoryUnavailable(ConnError):
    """Memory for the pool could not be reserved or attached."""


class DataPathUnavailable(ConnError):
    """A data path cannot be used between these two processes."""


class WriterSlotTaken(DataPathUnavailable):
    """The byte that a writer of a shared segment locks is locked: by another writer, or for good by the owner."""


class DataPathError(ConnError):
    """A data call failed.

    ``in_doubt`` is True where bytes may still land after the call has returned: then neither end may reuse the
    memory on the strength of this error alone.
    """

    def __init__(self, message: str, *, in_doubt: bool) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class TransferFailed(ConnError):
    """A room ended in Failed. ``code`` is the HTTP status that a client should see."""

    def __init__(self, room: str, reason: str, code: int) -> None:
        super().__init__(f"transfer of room {room} failed: {reason}")
        self.room = room
        self.reason = reason
        self.code = code
