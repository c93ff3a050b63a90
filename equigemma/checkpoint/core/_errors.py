"""The one error of this package's readers and writers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A file or tree of weights is not what it should be; the message says what to do."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Says in errors which file they are about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
