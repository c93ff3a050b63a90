"""The command `equigemma`. `_app` is imported on use only: the terminal is an optional extra."""

import sys


def main() -> None:
    """Runs the command line; ends the process with exit code 2 on bad input, 130 on Ctrl-C."""
    try:
        from equigemma.cli._app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(
            f"The command line needs the package {error.name}, which is not installed: "
            'pip install "equigemma[cli]".'
        )
    except KeyboardInterrupt:
        sys.exit(130)
    app()
