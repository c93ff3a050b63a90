"""What every script takes, and where what it finds goes.

A script says what it finds as it comes. With `--write` that becomes `results/NAME.md`, of which
`results.py` makes `RESULTS.md`.
"""

import argparse
import datetime
import shlex
import sys
from pathlib import Path

from machine import describe_machine


HERE = Path(__file__).parent
_PATHS = ("--gemma-python", "--gemma4-python", "--other-python", "--pythons", "--before")


def parser_of(doc: str | None, *, runs: int | None = None) -> argparse.ArgumentParser:
    """Options that scripts share: `--write`, and `--runs` if `runs`, its default, is given."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if runs is not None:
        parser.add_argument("--runs", type=int, default=runs, help=f"rounds, by default {runs}")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=HERE,
        metavar="FOLDER",
        help="keep what is found for RESULTS.md, here or in another folder",
    )
    return parser


class Report:
    """Text that is shown at once, and kept if the user wants that."""

    def __init__(self, options: argparse.Namespace, *packages: str, versions: str = ""):
        """Begins with the day, the machine, versions of `packages`, and the command."""
        self._target = options.write and options.write / "results" / f"{_script().stem}.md"
        self._text, self._has_table = "", False
        day = datetime.date.today().isoformat()
        described = "; ".join(filter(None, [describe_machine(*packages), versions]))
        self.say(f"{described}. {day}, `{command()}`, {_median(options)}:\n")

    def say(self, text: str) -> None:
        """A paragraph or a table.

        What was found so far is kept from the first table on, should the rest fail; before it, what
        an earlier run had found.
        """
        print(text, flush=True)
        self._text += text.rstrip("\n") + "\n\n"
        self._has_table = self._has_table or text.startswith("|")
        if self._target and self._has_table:
            write(self._target, self._text.rstrip("\n") + "\n")


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def command() -> str:
    """What the user typed, without what says where things are on this machine."""
    words, hidden = [], ""
    for word in (part for word in sys.argv[1:] for part in word.split("=", 1)):
        if word.startswith("--"):
            hidden = word if word in ("--write", *_PATHS) else ""
            words += [] if hidden == "--write" else [word]
        elif hidden in _PATHS:
            words.append("PATH")
        elif not hidden:
            words.append(shlex.quote(word))
    return " ".join(["python", f"benchmarks/{_script().name}", *words])


def _median(options: argparse.Namespace) -> str:
    runs = getattr(options, "runs", None)
    if runs is None:
        return "one run"
    return "one round" if runs == 1 else f"median (range) of {runs} rounds"


def _script() -> Path:
    return Path(sys.argv[0])
