"""What `equigemma finetune` learns from and tests with, and how it becomes batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self


if TYPE_CHECKING:
    from equigemma import train
    from equigemma.config import SigLIPConfig


@dataclass(frozen=True)
class Lessons:
    """Pieces of text, some of them with images."""

    learned: "list[train.Example]"
    tested: "list[train.Example]"
    length: int
    rows: int
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
        held_out: float,
        length: int,
        rows: int,
        seed: int,
    ) -> Self:
        """**Raises:** `ValueError` naming bad lines, images that cannot be read among them."""
        from equigemma import train
        from equigemma.data import read

        vision = model.config.vision
        examples = read(data, tokenizer, vision=vision, length=length)
        learned, tested = train.split(examples, held_out, length=length, seed=seed)
        seen = vision if any(example.images for example in examples) else None
        return cls(learned, tested, length, rows, seed, seen)

    @property
    def prompts(self) -> "list[train.Example]":
        """What samples begin with."""
        return self.tested or self.learned

    def count(self, epochs: int) -> int:
        """Batches of so many times all that is learned."""
        from equigemma import train

        return train.count_batches(self.learned, epochs=epochs, seed=self.seed, **self._shape)

    def feed(self, start: "train.Place") -> Iterator[Any]:
        """Batches to learn from, without end."""
        from equigemma import train
        from equigemma.images import as_rgb

        options = self._shape | {"seed": self.seed, "start": start, "read": as_rgb}
        return train.feed(self.learned, **options)

    def tests(self) -> Iterator[Any]:
        """Batches to test with; none if nothing is held out."""
        from equigemma import train
        from equigemma.images import as_rgb

        return train.pack(self.tested, **self._shape, read=as_rgb)

    @property
    def _shape(self) -> dict[str, Any]:
        return {"length": self.length, "rows": self.rows, "vision": self.vision}
