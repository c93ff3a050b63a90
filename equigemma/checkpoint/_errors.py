"""The one error of this package's readers and writers."""


class CheckpointError(ValueError):
    """A file or tree of weights is not what it should be; the message says what to do."""
