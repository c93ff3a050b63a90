"""Training metrics as JSON lines: one object for each step or evaluation."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from equigemma._atomic_file import replace_text


class MetricsFile:
    """Adds a line at a time to a file; a context manager.

    Each line is with the operating system before the next step begins, so a process that is killed
    loses none.
    """

    def __init__(self, path: str | os.PathLike[str], *, after: int = 0):
        """Opens a file, from which lines of steps later than `after` are taken out.

        They are of a run that was killed after its last checkpoint, and come again.

        **Arguments:**

        - `path`: of the file, which is made if there is none.
        - `after`: the last step whose line stays.
        """
        self.path = Path(path)
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        replace_text(self.path, "".join(map(_line, kept)))
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Adds the line of a step."""
        self._file.write(_line({"step": step} | values))
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file, none if there is no file. One cut off by a kill is left out.

    **Arguments:** `path`: of a file that `MetricsFile` wrote.

    **Returns:** a dictionary for each line, in order.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
