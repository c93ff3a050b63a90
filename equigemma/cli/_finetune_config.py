"""The options of `equigemma finetune`, checked before anything is read or written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equigemma.cli._choices import CheckpointFormat, StoredDType
from equigemma.cli._options import above_zero, at_least, fraction, seed
from equigemma.cli._shape import LENGTH
from equigemma.cli._tuning import AdapterConfig, AdapterKind, OptimConfig, Schedule


ComputeDType = Literal["bfloat16", "float32"]
BaseDType = Literal["none", "int8"]


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train, on what, and how; None: a default that depends on other options or the data.

    **Raises:** `ValueError` naming the option whose value makes no sense, alone or with others.
    """

    model: str
    data: Path
    out: Path
    lora: int
    lora_kind: AdapterKind
    quantize_base: BaseDType
    steps: int | None
    epochs: int
    learning_rate: float | None
    schedule: Schedule
    warmup: float
    weight_decay: float
    max_grad_norm: float
    length: int | None
    batch_tokens: int | None
    micro_batches: int
    validation_fraction: float
    evaluate_every: int | None
    save_every: int
    seed: int
    dtype: ComputeDType
    format: CheckpointFormat
    output_dtype: StoredDType

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _check_unless_none(at_least, name, getattr(self, name), least)
        for name in ("learning_rate", "max_grad_norm"):
            _check_unless_none(above_zero, name, getattr(self, name))
        for name in ("warmup", "validation_fraction"):
            fraction(name, getattr(self, name))
        seed(self.seed)
        if self.quantize_base != "none" and not self.lora:
            raise ValueError("--quantize-base needs --lora: quantized weights cannot be trained.")
        if self.output_dtype == "q8_0" and self.format != "gguf":
            raise ValueError(
                f"--output-dtype q8_0 is a dtype of .gguf files: give --format gguf as well, in "
                f"place of {self.format}."
            )
        if self.batch_tokens is not None:
            _check_rows(self.batch_tokens, self.length or LENGTH, self.micro_batches)

    @property
    def rows(self) -> int | None:
        """Rows of a batch, where they are asked for."""
        return None if self.batch_tokens is None else self.batch_tokens // (self.length or LENGTH)

    @property
    def output_path(self) -> Path:
        """Where the tuned model is saved."""
        return self.out / ("model.gguf" if self.format == "gguf" else "model")

    @property
    def adapters(self) -> AdapterConfig:
        """The adapters to train, if any."""
        return AdapterConfig(self.lora, self.lora_kind, self.quantize_base != "none", self.seed)

    def optim(self, steps: int) -> OptimConfig:
        """The optimizer of a run of so many steps."""
        return OptimConfig(
            steps,
            self.learning_rate or (2e-4 if self.lora else 2e-5),
            self.schedule,
            self.warmup,
            self.weight_decay,
            self.max_grad_norm,
            self.micro_batches,
        )

    def settings(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Options of these names as JSON has them, without those that are left to a default."""
        given = {name: getattr(self, name, None) for name in names}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in given.items()
            if value is not None
        }


_LEAST = {
    "lora": 0,
    "weight_decay": 0,
    "steps": 1,
    "epochs": 1,
    "micro_batches": 1,
    "evaluate_every": 1,
    "save_every": 1,
    "length": 2,
    "batch_tokens": 2,
}


def _check_unless_none(check: Any, name: str, value: float | None, *bounds: float) -> None:
    if value is not None:
        check(name, value, *bounds)


def _check_rows(batch_tokens: int, length: int, micro_batches: int) -> None:
    rows, rest = divmod(batch_tokens, length)
    if rest or not rows:
        raise ValueError(
            f"--batch-tokens must be a multiple of --length, got {batch_tokens} and {length}."
        )
    if rows % micro_batches:
        raise ValueError(
            f"--micro-batches must divide the {rows} rows of a batch, got {micro_batches}."
        )
