"""How do speed and memory change with the length of the context, here and elsewhere?

    python benchmarks/context.py [--runs 3] [--lengths 512 2048 4096 8192] [--new 32]
        [--memory 16384 32768] [--gemma-python PATH] [--write]
        [--sides ours "ours in 8 bits" transformers gemma "llama.cpp in 8 bits"]

Each side behind a prompt of each length, in processes of their own, by turns: tokens per second as
`decode.py` measures them, and the most memory that the process held from its start, loading
the weights included, to the end of a first generation. At the lengths of `--memory` ours are
measured in memory only. All sides that can compute in float32 must give the same tokens in it at
the shortest length.

With `--write` every figure is kept in `results/context.json` too, of which `plots.py` draws
`speed.png` and `memory.png`.
"""

import json
from pathlib import Path

import limits
from decode import check_tokens, runner
from files import files_for
from peers import PACKAGES, SIDES, add_sides, installed
from plots import draw
from processes import by_turns
from report import parser_of, write
from tables import Rounds, column, ratios, spread, table


def main() -> None:
    parser = parser_of(__doc__, runs=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096, 8192])
    parser.add_argument("--memory", type=int, nargs="*", default=[16_384, 32_768])
    parser.add_argument("--new", type=int, default=32)
    add_sides(parser, [side for side in SIDES if not side.startswith("eg.")])
    options = parser.parse_args()
    sides, report = installed(options, *PACKAGES)
    kept: list[dict] = []

    with files_for(sides) as (files, _):
        run = runner(files, options)
        check_tokens(run, sides, options.lengths[0], 8)
        report.say(f"{options.new} new tokens; the same 8 in float32.\n")
        for length in options.lengths:
            rounds = by_turns(
                options.runs,
                [*sides, limits.NAME],
                lambda side: run(side, length, options.new),
            )
            kept += raw(rounds, length)
            report.say(_table(rounds, sides, length))
            _keep(options.write, kept)
        ours = [side for side in sides if side.startswith("ours")]
        for length in options.memory:
            rounds = by_turns(1, ours, lambda side: run(side, length, options.new, pairs=0))
            kept += raw(rounds, length)
            report.say(_table(rounds, ours, length))
            _keep(options.write, kept)
    if options.write:
        report.say("![Tokens per second](speed.png)\n\n![Peak memory](memory.png)\n")


def raw(rounds: Rounds, length: int) -> list[dict]:
    """Every figure by itself, for those who want to draw them otherwise."""
    return [
        {"length": length, "round": turn, "side": side}
        | {name: value for name, value in found.items() if name not in ("tokens", "resumed")}
        for turn, each in enumerate(rounds)
        for side, found in each.items()
    ]


def _table(rounds: Rounds, sides: list[str], length: int) -> str:
    ours = sides[0]

    def row(side: str) -> list[str]:
        speed = of_ours = "-"
        if "seconds" in rounds[0][side]:
            seconds = column(rounds, side, "seconds")
            speed = spread(1 / each for each in seconds)
            of_ours = spread(ratios(seconds, column(rounds, ours, "seconds")))
        memory = [spread(column(rounds, side, figure)) for figure in ("peak", "loading")]
        return [f"{length:,}", side, speed, of_ours, *memory]

    head = ["after", "side", "tokens/s", f"speed of {ours}", "peak memory, GB", "of loading, GB"]
    return table(head, map(row, sides))


def _keep(folder: Path | None, kept: list[dict]) -> None:
    if folder:
        write(folder / "results" / "context.json", json.dumps(kept, indent=1) + "\n")
        draw(folder)


if __name__ == "__main__":
    main()
