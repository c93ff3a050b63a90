"""Sampling options, the same for all commands that generate text."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer

from equigemma.cli import _options


MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="Maximum number of tokens to generate.")
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", help="Sampling temperature; 0 is greedy decoding."),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Sample from the K most probable tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Nucleus sampling: from the fewest tokens whose probabilities add up to P.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", help="Sample from tokens at least P times as probable as the most probable one."
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Penalty for tokens seen before; 1 is no penalty."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the text before this string; may be given several times."),
]
Seed = Annotated[int, typer.Option("--seed", help="Sampling seed.")]


class Sampling(NamedTuple):
    """How the next token is chosen, and where the text ends."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: Sequence[str]
    seed: int

    def check(self) -> None:
        """Refuses what makes no sense, before a model is loaded.

        **Raises:** `ValueError`.
        """
        _options.at_least("max_new_tokens", self.max_new_tokens, 1)
        _options.at_least("temperature", self.temperature, 0)
        if self.top_k is not None:
            _options.at_least("top_k", self.top_k, 1)
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None:
                _options.probability(name, value)
        for name in ("top_k", "top_p", "min_p"):
            if self._asdict()[name] is not None and not self.temperature:
                raise ValueError(
                    f"{_options.option(name)} has no effect on greedy decoding: give a "
                    "--temperature above 0, such as 1."
                )
        if self.repetition_penalty is not None:
            _options.above_zero("repetition_penalty", self.repetition_penalty)
        if not all(self.stop):
            raise ValueError("--stop needs at least one character, got an empty string.")
        for string in self.stop:
            _options.text("--stop", string)
        _options.seed(self.seed)

    @property
    def arguments(self) -> dict[str, Any]:
        """As `generate`, `stream` and `Chat.send` take them, but for the seed."""
        from equigemma import sampling

        return {
            "max_new_tokens": self.max_new_tokens,
            "sampler": sampling.make_sampler(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            ),
            "stop_strings": tuple(self.stop),
        }
