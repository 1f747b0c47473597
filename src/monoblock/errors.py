"""The errors that monoblock raises on purpose.

Each message says what was expected, what came and what to do. They derive from the built-in classes that
users of the hub's libraries already catch: `ValueError` for a bad value, `OSError` for a file or a network.
"""


class UnsupportedConfig(ValueError):
    """A config asks for something that this library cannot honour; the message names the field and value."""


class CheckpointError(ValueError):
    """A checkpoint's content does not fit: bad file, wrong shape, missing, unread or unmatched keys."""


class MissingKeys(CheckpointError):
    """The model needs tensors that the checkpoint does not hold."""


class UnexpectedKeys(CheckpointError):
    """The checkpoint holds tensors whose names the family's key map does not know."""


class UnreadKeys(CheckpointError):
    """The checkpoint holds tensors whose names are known, but which this model has no place for."""


class ShapeMismatch(CheckpointError):
    """A tensor's shape differs from what the config implies."""


class HubError(OSError):
    """A model's files cannot be had: not there, not allowed, not reachable, or cut off."""


class FieldError(ValueError):
    """A field's value is not of the type that it is declared with; `field` is its name."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field
