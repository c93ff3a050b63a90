"""The commands and what they share: one line for an error, and a clean end on Ctrl-C."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer
from rich.console import Console

from equigemma.cli import _chat, _convert, _finetune, _generate, _info, _score
from equigemma.cli._interrupt import heard


app = typer.Typer(
    name="equigemma",
    help="The Gemma family of language models, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")


def _command(run: Callable[P, None]) -> Callable[P, None]:
    """`run` as a command that says in one sentence what is wrong, without a traceback."""

    @wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with heard():
                run(*args, **kwargs)
        except ModuleNotFoundError:
            # A missing extra comes as an ImportError with our own sentence; this is a defect.
            raise
        except (ValueError, ImportError, OSError) as error:
            Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {_plain(error)}")
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            Console(stderr=True).print("[bold red]Error:[/] This takes more memory than there is.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise typer.Exit(130) from None

    return app.command()(guarded)


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


_command(_chat.chat)
_command(_convert.convert)
_command(_finetune.finetune)
_command(_generate.generate)
_command(_info.info)
_command(_score.score)
