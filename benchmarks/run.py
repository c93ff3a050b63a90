"""Answers all questions, or some, one after the other, and writes `RESULTS.md` and the plots.

    python benchmarks/run.py [NAME ...] [--runs N] [--gemma-python PATH] [--gemma4-python PATH]
        [--other-python PATH] [--quick] [--into FOLDER]

Each is a process of its own; if one fails, the results say so and the next one goes on. A peer that
is not installed is left out, and the results say that too. `--quick` is one round of the smallest
sizes, to see that everything works; what it finds goes to `build/benchmarks` and not into the
results.
"""

import argparse
import datetime
import subprocess
import sys
import time
from pathlib import Path

from processes import ROOT
from report import HERE, write
from results import QUESTIONS, Question, joined


NOT_FINISHED = "Not finished: "


def arguments_of(question: Question, options: argparse.Namespace) -> list[str]:
    runs = 1 if options.quick else options.runs
    arguments = list(question.quick) if options.quick else []
    if question.each and runs is not None:
        arguments += ["--runs", str(runs)]
    for name in question.pythons:
        if path := getattr(options, name.replace("-", "_")):
            arguments += [f"--{name}", path]
    return arguments


def answered(question: Question, arguments: list[str], folder: Path) -> str:
    """Empty, or why there is no answer."""
    command = [sys.executable, str(HERE / f"{question.name}.py"), *arguments]
    process = subprocess.Popen(
        [*command, "--write", str(folder)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    last = ""
    for line in process.stderr:
        sys.stderr.write(line)
        last = line.strip() or last
    return "" if process.wait() == 0 else last or f"exit status {process.returncode}"


def note_failure(question: Question, reason: str, folder: Path) -> None:
    """Into its results, below what it or an earlier run had found."""
    path = folder / "results" / f"{question.name}.md"
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = found.partition(f"\n{NOT_FINISHED}")[0]
    day = datetime.date.today().isoformat()
    reason = reason.replace(str(ROOT), ".").replace(str(Path.home()), "~")
    write(path, f"{kept}\n{NOT_FINISHED}{question.name}.py on {day}, {reason}\n")


def main() -> None:
    names = [question.name for question in QUESTIONS if question.script]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--runs", type=int, help="rounds, where there are rounds")
    parser.add_argument(
        "--gemma-python",
        metavar="PATH",
        help="the Python of an environment of tests/interop/requirements.txt",
    )
    parser.add_argument(
        "--gemma4-python",
        metavar="PATH",
        help="the Python of an environment of tests/interop/requirements-gemma4.txt",
    )
    parser.add_argument(
        "--other-python",
        metavar="PATH",
        help="the Python of an environment with another version of JAX",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    folder = options.into or (ROOT / "build" / "benchmarks" if options.quick else HERE)
    chosen = [one for one in QUESTIONS if one.script and one.name in (options.names or names)]

    started = time.monotonic()
    failed = []
    for index, question in enumerate(chosen, 1):
        arguments = arguments_of(question, options)
        elapsed = (time.monotonic() - started) / 60
        print(
            f"\n=== {index}/{len(chosen)} {question.name}: {question.title}. "
            f"After {elapsed:.0f} min{_expected(question, options)}. ===",
            file=sys.stderr,
            flush=True,
        )
        if reason := answered(question, arguments, folder):
            failed.append(question.name)
            note_failure(question, reason, folder)
        write(folder / "RESULTS.md", joined(folder))
    if (folder / "results" / "context.json").exists():
        from plots import draw

        draw(folder)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.0f} min; written to {folder / 'RESULTS.md'}", file=sys.stderr)
    if failed:
        raise SystemExit(f"Not finished: {', '.join(failed)}")


def _expected(question: Question, options: argparse.Namespace) -> str:
    if options.quick:
        return ""
    runs = f"{question.each:g} a round" if question.each else ""
    first = f"{question.before:g} at first" if question.before else ""
    return f"; expected, min: {', '.join(filter(None, [first, runs]))}"


if __name__ == "__main__":
    main()
