"""The exceptions of monoblock.

Messages state what was expected, what was found and what to do. The classes derive from the built-in exceptions that
users of transformers already catch: `ValueError` for invalid values, `OSError` for files and the network.
"""


class UnsupportedConfig(ValueError):
    """A config has an unsupported value; the message names the field and the value."""


class CheckpointError(ValueError):
    """A checkpoint is invalid or does not fit: damaged file, wrong shape, missing, unread or unexpected keys."""


class MissingKeys(CheckpointError):
    """The model needs tensors that the checkpoint does not hold."""


class UnexpectedKeys(CheckpointError):
    """The checkpoint holds tensors whose names the family's key map does not know."""


class UnreadKeys(CheckpointError):
    """The checkpoint holds tensors with known names that this model does not use."""


class ShapeMismatch(CheckpointError):
    """A tensor's shape differs from what the config implies."""


class HubError(OSError):
    """A model's files are missing, forbidden or unreachable, or a download failed."""


class FieldError(ValueError):
    """A field's value is not of its declared type; `field` is its name."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field
