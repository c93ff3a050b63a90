"""Puts `RESULTS.md` together: `python benchmarks/results.py [FOLDER]`. Measures nothing.

Of each question, what its script measured last (`results/NAME.md`, which scripts write) and what
people noted about it (`notes/NAME.md`). Edit notes, never `RESULTS.md`.
"""

import sys
from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).parent


class Question(NamedTuple):
    """One section; `NAME.py` answers it."""

    name: str
    title: str
    before: float = 0
    """Minutes of a quiet machine with two cores, before the first round."""
    each: float = 0
    """Minutes of each round; 0: there are no rounds, and no `--runs`."""
    pythons: tuple[str, ...] = ()
    """Options that name the Python of another environment."""
    quick: tuple[str, ...] = ()
    """Arguments that make it small, to see that it works."""
    script: bool = True


_BOTH = ("gemma-python", "other-python")

QUESTIONS = (
    Question("limits", "Limits of this machine", 0, 0.2),
    Question("forms", "Formulations of a matrix-vector product", 0, 1),
    Question("decode", "Decode, batch 1", 4, 9, _BOTH, ("--depths", "16", "--new", "8")),
    Question(
        "batches", "Decode, batches", 4, 4, ("other-python",), ("--rows", "1", "2", "--new", "4")
    ),
    Question("prefill", "Prefill", 6, 9, _BOTH, ("--lengths", "64")),
    Question(
        "context",
        "Speed and memory against context length",
        6,
        19,
        _BOTH,
        ("--lengths", "32", "64", "--memory", "128", "--new", "8"),
    ),
    Question(
        "command_line",
        "Command line: time to the first token",
        1,
        1.5,
        ("other-python",),
        ("--tokens", "8"),
    ),
    Question(
        "quantization",
        "Quantization",
        12,
        1,
        quick=("--tokens", "256", "--forms", "float32", "int8"),
    ),
    Question(
        "training_step",
        "Full fine-tuning, one step",
        0,
        18,
        _BOTH,
        ("--shapes", "1x64", "--timed", "1"),
    ),
    Question(
        "linen_sampler",
        "Inside DeepMind's sampler",
        3,
        3,
        ("gemma-python", "gemma4-python"),
        ("--prompt", "16", "--new", "8"),
    ),
    Question(
        "stack",
        "Stacked layers",
        0,
        8,
        quick=("--timed", "1", "--width", "64", "--tokens", "64", "--work", "forward"),
    ),
    Question("imports", "Imports", 0.1, 0.1),
    Question("shape_checks", "Cost of shape checks", 0, 0.7),
    Question("loss_memory", "Memory of the loss", 1, quick=("--tokens", "256")),
    Question(
        "experts",
        "Mixture of experts, one decode step",
        2,
        quick=("--layers", "1", "--experts", "16", "--steps", "4"),
    ),
    Question("versions", "Decode on two versions of JAX", script=False),
    Question("killed", "Killed and resumed", script=False),
)


def joined(folder: Path = HERE) -> str:
    """All of `RESULTS.md`, of the results in `folder`."""
    return "\n".join(["# Results\n", *(_section(folder, question) for question in QUESTIONS)])


def _section(folder: Path, question: Question) -> str:
    measured = _read(folder / "results" / f"{question.name}.md")
    if question.script and not measured:
        measured = f"Not measured yet: `python benchmarks/{question.name}.py --write`.\n"
    parts = [f"## {question.title}\n", measured, _read(HERE / "notes" / f"{question.name}.md")]
    return "\n".join(filter(None, parts))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    from report import write

    target = Path(sys.argv[1]) if sys.argv[1:] else HERE
    write(target / "RESULTS.md", joined(target))
