"""The project's two exception classes. Each message names the place, the value and the remedy."""


class InputError(ValueError):
    """What the user gave cannot be used as it stands: a config, a file, a column, a model.

    Never retried: the same input fails the same way.
    """


class CorruptFileError(OSError):
    """A file does not match the manifest that vouches for it."""
