"""The commands, and what they share: one line for an error, an end without one on Ctrl-C."""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

from equigemma.cli import _chat, _convert, _finetune, _generate, _info, _score
from equigemma.cli._interrupt import reraise_sigint


app = typer.Typer(
    name="equigemma",
    help="The Gemma family of language models, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"equigemma {version('equigemma')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """The Gemma family of language models, in JAX."""


def _command(run: Callable[P, None]) -> Callable[P, None]:
    """`run` as a command that says in one sentence what is wrong, without a traceback."""

    @wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with reraise_sigint():
                run(*args, **kwargs)
            # What is still held back meets a closed pipe here, where it can be told apart.
            sys.stdout.flush()
        except BrokenPipeError:
            _leave_pipe()
            raise typer.Exit(_BROKEN_PIPE) from None
        except ModuleNotFoundError:
            # A missing extra comes as an ImportError with our own sentence; this is a defect.
            raise
        except (ValueError, ImportError, OSError) as error:
            _console().print(f"[bold red]Error:[/] {_plain(error)}")
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            _console().print("[bold red]Error:[/] This takes more memory than there is.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise typer.Exit(130) from None

    return app.command()(guarded)


def _console() -> Console:
    # A terminal breaks lines by itself; in a file or a pipe a sentence is one line.
    return Console(stderr=True, highlight=False, soft_wrap=True)


# As a shell reports a process that SIGPIPE has ended, which Python does not let happen.
_BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)


def _leave_pipe() -> None:
    """Lets the interpreter flush what nobody reads any more into nothing, without a message."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


_command(_chat.chat)
_command(_convert.convert)
_command(_finetune.finetune)
_command(_generate.generate)
_command(_info.info)
_command(_score.score)
