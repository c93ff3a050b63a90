"""The lines of a conversation: typed, with a history, or read from standard input."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def lines(console: Console) -> Iterator[Iterator[str]]:
    """Lines that a person types, with a history, or those of standard input."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Bytes that are no text are an error of their line, not of the conversation.
            sys.stdin.reconfigure(errors="surrogateescape")
        yield iter(sys.stdin)
        return
    console.print("/help names the commands, Ctrl-D ends.", style="dim")
    with _history():
        yield _typed()


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Earlier lines come back with the arrow keys, where there is a readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    from equigemma._cache_dir import user_cache_dir

    path = user_cache_dir() / "chat_history"
    readline.set_history_length(1000)
    # A history that cannot be read or written is no reason not to talk.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            # Made first, so that nobody else can ever read it.
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(partial)
            os.replace(partial, path)
