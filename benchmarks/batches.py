"""How fast are batches decoded, here and elsewhere?

    python benchmarks/batches.py [--runs 5] [--rows 1 8 32] [--prompt 64] [--new 64]
        [--other-python PATH] [--sides ours "ours in 8 bits" "ours in 4 bits" transformers]
        [--write]

The real Gemma 3 270M in bfloat16, greedy, no token stops a row. Prompts are different parts of the
source of Python's own modules: row r has between half of `--prompt` tokens and all of them. A
figure is tokens per second of all rows, rows x (N - 1) / (T(N) - T(1)), T(N) being the faster of
two generations of N new tokens after compiling. Every run is a process of its own, sides by turns.
`--other-python` names the Python of an environment with another version of JAX: sides of ours run
there too.

Before any time is taken, all sides must give the same tokens in float32. The share of the limit is
that of the nearer one, measured in every round: reading all weights once per step, or twice as many
operations as they have numbers for each row, against the rates of `limits.py`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import limits
from files import EIGHT_BITS, files_for, prompt
from peers import OTHER, PACKAGES, add_sides, installed, python_of
from processes import answer, by_turns, in_a_process
from report import parser_of
from tables import column, ratios, spread, table


OURS = {"ours": None, "ours in 8 bits": "int8", "ours in 4 bits": "int4"}
Generate = Callable[[int], list[list[int]]]


def prompts(files: Path, rows: int, length: int) -> list[list[int]]:
    """Parts of a text that do not overlap."""
    ids = prompt(files, rows * length)
    lengths = [length - 5 * row % (length // 2) for row in range(rows)]
    return [ids[row * length :][:size] for row, size in enumerate(lengths)]


def ours(files: Path, texts: list[list[int]], dtype: str, kind: str | None) -> tuple[Generate, int]:
    import jax
    import numpy as np

    import equigemma as eg

    if kind == "int8":
        model, _ = eg.load(files / EIGHT_BITS)
    else:
        model, _ = eg.load(files / dtype, dtype=dtype)
        model = eg.prepare(model) if kind is None else eg.quantize.int4(model)
    longest = max(map(len, texts))
    tokens = np.array([ids + [-1] * (longest - len(ids)) for ids in texts])

    def generate(count: int) -> list[list[int]]:
        return eg.sampling.generate(model, tokens, max_new_tokens=count).tokens.tolist()

    return generate, sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def transformers(files: Path, texts: list[list[int]], dtype: str) -> tuple[Generate, int]:
    """Rows are padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files / dtype, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in texts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in texts])

    def generate(count: int) -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(
                tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return found[:, longest:].tolist()

    return generate, sum(each.nbytes for each in model.parameters())


def measure(files: str, side: str, rows: int, length: int, new: int, dtype: str) -> dict:
    """Tokens of all rows, seconds of one step, and bytes of the weights."""
    folder = Path(files)
    texts = prompts(folder, rows, length)
    if side in OURS:
        generate, weights = ours(folder, texts, dtype, OURS[side])
    else:
        generate, weights = transformers(folder, texts, dtype)
    tokens = generate(new)
    generate(1)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate(count)
        return time.perf_counter() - started

    times = [(seconds(new), seconds(1)) for _ in range(2)]
    long, short = (min(column) for column in zip(*times, strict=True))
    return {"tokens": tokens, "seconds": (long - short) / (new - 1), "weights": weights}


def main() -> None:
    parser = parser_of(__doc__, runs=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    add_sides(parser, [*OURS, "transformers"])
    options = parser.parse_args()
    sides, report = installed(options, *PACKAGES[:-1])

    with files_for([*sides, "ours"]) as (files, parameters):

        def run(side: str, rows: int, dtype: str = "bfloat16") -> dict:
            if side == limits.NAME:
                return in_a_process("limits.py")
            sizes = {"rows": rows, "length": options.prompt, "new": options.new}
            return in_a_process(
                "batches.py",
                python=python_of(side, options),
                files=str(files),
                side=side.removesuffix(OTHER),
                dtype=dtype,
                **sizes,
            )

        check_tokens(lambda side: run(side, options.rows[0] + 1, "float32"), sides)
        for rows in options.rows:
            rounds = by_turns(options.runs, [*sides, limits.NAME], lambda side: run(side, rows))
            report.say(table_of(rounds, sides, rows, sum(parameters)))


def check_tokens(run: Callable[[str], dict], sides: list[str]) -> None:
    """Ends the script if the sides do not give the same tokens in float32."""
    floats = [side for side in sides if " bits" not in side]
    (found,) = by_turns(1, floats, run)
    if len({str(each["tokens"]) for each in found.values()}) > 1:
        raise SystemExit(f"The tokens differ in float32: {found}")


def table_of(rounds: list[dict], sides: list[str], rows: int, parameters: int) -> str:
    """One line per side: tokens of all rows per second, and what it is compared with."""
    seconds = {side: column(rounds, side, "seconds") for side in sides}

    def nearer(side: str) -> list[float]:
        """The time of a step at the limits, as a share of the time that it took, in %."""
        shares = []
        for found, taken in zip(rounds, seconds[side], strict=True):
            most = found[limits.NAME]
            reading = found[side]["weights"] / most["bytes"]
            multiplying = 2 * parameters * rows / most["operations"]
            shares.append(100 * max(reading, multiplying) / taken)
        return shares

    def line(side: str) -> list[str]:
        over = [spread(ratios(seconds[peer], seconds[side])) for peer in peers]
        speeds = spread(rows / each for each in seconds[side])
        return [str(rows), side, speeds, *over, f"{spread(nearer(side))} %"]

    peers = [side for side in ("transformers", "ours") if side in sides]
    head = ["rows", "side", "tokens/s", *(f"times {peer}" for peer in peers), "of the nearer limit"]
    return table(head, map(line, sides))


if __name__ == "__main__":
    answer(measure)
    main()
