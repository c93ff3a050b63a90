"""Training and validation data of `equigemma finetune`, and how they become batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from equigemma.cli import _shape
from equigemma.cli._shape import Shape


if TYPE_CHECKING:
    from equigemma import train
    from equigemma.config import SigLIPConfig


@dataclass(frozen=True)
class FinetuneData:
    """Training and validation examples, and the shape of their batches."""

    train_examples: "list[train.Example]"
    eval_examples: "list[train.Example]"
    shape: Shape
    seed: int
    vision: "SigLIPConfig | None"
    """Of a model that reads images, if there are any."""

    @classmethod
    def read(
        cls,
        data: Path,
        model: Any,
        tokenizer: Any,
        *,
        validation_fraction: float,
        length: int | None = None,
        rows: int | None = None,
        micro_batches: int = 1,
        seed: int,
    ) -> Self:
        """**Arguments:** `length`, `rows`: of the batches; None: as the data fills them.

        **Raises:** `ValueError` naming bad lines, images that cannot be read among them, or for
        token ids that the model does not have.
        """
        from equigemma import train
        from equigemma.data import read

        vision, limit = model.config.vision, length or _shape.LENGTH
        examples = read(data, tokenizer, vision=vision, length=limit)
        train.check_vocabulary(examples, model.config.vocab)
        train_examples, eval_examples = train.split(
            examples, validation_fraction, length=limit, seed=seed
        )
        seen = vision if any(example.images for example in examples) else None
        if rows is None:
            options = {"length": length, "micro_batches": micro_batches}
            shape = _shape.chosen(train_examples, seed=seed, vision=seen, **options)
        else:
            shape = _shape.measured(train_examples, Shape(limit, rows), seed, seen)
        return cls(train_examples, eval_examples, shape, seed, seen)

    @property
    def prompts(self) -> "list[train.Example]":
        """Examples whose prompts the samples continue."""
        return self.eval_examples or self.train_examples

    def count(self, epochs: int) -> int:
        """Batches of so many epochs."""
        from equigemma import train

        return train.count_batches(self.train_examples, epochs=epochs, seed=self.seed, **self._rows)

    def train_batches(self, start: "train.DataState") -> Iterator[Any]:
        """Training batches, without end."""
        from equigemma import train
        from equigemma.images import as_rgb

        options = self._rows | {"seed": self.seed, "start": start, "read": as_rgb}
        return train.batches(self.train_examples, **options)

    def eval_batches(self) -> Iterator[Any]:
        """Validation batches; none if there is no validation set."""
        from equigemma import train
        from equigemma.images import as_rgb

        return train.pack(self.eval_examples, **self._rows, read=as_rgb)

    @property
    def _rows(self) -> dict[str, Any]:
        return {"length": self.shape.length, "rows": self.shape.rows, "vision": self.vision}
