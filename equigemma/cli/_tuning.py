"""The parts of `equigemma finetune`: optimizer, adapters, loss, and the files it writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from equigemma._atomic_file import replace_text
from equigemma.cli._shared import load


if TYPE_CHECKING:
    from equigemma import train

Schedule = Literal["cosine", "linear", "constant"]
AdapterKind = Literal["lora", "rslora", "dora"]

SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 2, 16, 48


class OptimConfig(NamedTuple):
    """The optimizer, its learning-rate schedule and gradient accumulation."""

    steps: int
    learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    max_grad_norm: float
    micro_batches: int

    @property
    def rate(self) -> Any:
        """The learning rate as a function of the updates made."""
        import optax

        rising = round(self.warmup * self.steps)
        falling = max(self.steps - rising, 1)
        rest = {
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, falling),
            "linear": lambda: optax.linear_schedule(self.learning_rate, 0.0, falling),
            "constant": lambda: optax.constant_schedule(self.learning_rate),
        }[self.schedule]()
        # The first step learns too: the rise begins above 0.
        rise = optax.linear_schedule(
            self.learning_rate / (rising + 1), self.learning_rate, max(rising, 1)
        )
        return optax.join_schedules([rise, rest], [rising])

    @property
    def optimizer(self) -> Any:
        """AdamW at that rate."""
        import optax

        return optax.adamw(self.rate, weight_decay=self.weight_decay)


class AdapterConfig(NamedTuple):
    """The adapters that are trained; rank 0: none, all weights are."""

    rank: int
    kind: AdapterKind
    quantize_base: bool
    seed: int

    def model(self, weights: Any) -> Any:
        """The model to train, from the one that was loaded."""
        import jax

        from equigemma import lora, quantize

        if not self.rank:
            return weights
        options = {"rank": self.rank, "key": jax.random.key(self.seed)}
        if self.kind == "rslora":
            # alpha / sqrt(rank) with an alpha that gives the usual strength at rank 8.
            options |= {"scaling": "alpha/sqrt(rank)", "alpha": 8**0.5}
        adapted = lora.add(weights, kind="dora" if self.kind == "dora" else "lora", **options)
        return quantize.int8(adapted) if self.quantize_base else adapted

    def trainable(self, model: Any) -> Any:
        """As `train.init` takes it."""
        import equinox as eqx

        from equigemma import lora

        return lora.trainable(model) if self.rank else eqx.is_inexact_array


def init_or_restore(
    weights: Any, plan: OptimConfig, adapters: AdapterConfig, checkpoints: Any, out: Path
) -> tuple["train.Saved", Any]:
    """The state that was saved last, or the first, and the optimizer."""
    import equinox as eqx
    import jax

    from equigemma import train

    optimizer, size = plan.optimizer, sum(leaf.size for leaf in jax.tree.leaves(weights))
    model = adapters.model(weights)
    trainable = adapters.trainable(model)
    trained, frozen = eqx.partition(model, trainable)
    shapes = eqx.filter_eval_shape(train.init, trained, optimizer)
    like = train.State(shapes.model, frozen, shapes.optimizer, shapes.step)
    saved = checkpoints.restore(like)
    if saved is None:
        # The model is written with two bytes for each number, or four.
        train.check_disk_space(out, like, reserved=4 * size)
        first = train.init(model, optimizer, trainable=trainable)
        saved = train.Saved(first, train.DataState(), None)
    return saved, optimizer


def loss(dtype: str, model: Any, batch: Any) -> Any:
    """The training objective, in this compute dtype."""
    from equigemma import train

    has_images = isinstance(batch, train.ImageBatch)
    objective = train.image_loss if has_images else train.next_token_loss
    return objective(model, batch, compute_dtype=dtype, remat="nothing")


def write_adapters(model: Any, name: str, out: Path, console: Any) -> None:
    """Writes adapters to a folder of their own, where PEFT's files can hold them."""
    from equigemma import peft

    try:
        peft.save(model, out / "adapter", base=name)
        console.print(f"The adapters are in {out / 'adapter'}.")
    except (ImportError, ValueError) as error:
        console.print(f"[yellow]No adapter files: {escape(str(error))}[/]")


def merge_adapters(model: Any, name: str, adapters: AdapterConfig) -> Any:
    """The model with its adapters merged; quantized base weights are loaded again in bfloat16."""
    from equigemma import lora

    if not adapters.rank:
        return model
    if adapters.quantize_base:
        model = lora.transfer(model, load(name, "bfloat16")[0])
    return lora.merge(model)


def write_samples(
    model: Any, tokenizer: Any, step: int, examples: Sequence[Any], out: Path, console: Any
) -> None:
    """Generates from a few prompts; replaces earlier lines of this step."""
    import jax
    import jax.numpy as jnp

    import equigemma as eg

    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    path = out / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] != step]
    for example in examples[:SAMPLES]:
        prompt = _prompt(example)
        tokens, soft_tokens = _with_images(model, prompt, example)
        options = {"max_new_tokens": SAMPLE_TOKENS, "stop_tokens": tokenizer.special.stop}
        row = eg.sampling.generate(model, tokens, soft_tokens=soft_tokens, **options).tokens
        start, text = tokenizer.decode(prompt), tokenizer.decode(row[row >= 0])
        kept.append(json.dumps({"step": step, "prompt": start, "text": text}))
        console.print(f"[dim]{escape(start)}[/]{escape(text)}\n")
    replace_text(path, "".join(f"{line}\n" for line in kept))


def _prompt(example: Any) -> Sequence[int]:
    """What comes before the first trained token, or the beginning where all are trained on."""
    given = next(at for at, weight in enumerate(example.weights[1:], 1) if weight)
    return example.tokens[: given if given > 1 else PROMPT_TOKENS]


def _with_images(model: Any, prompt: Sequence[int], example: Any) -> tuple[Any, Any]:
    """The prompt as the model reads it, and the soft tokens in it."""
    import jax.numpy as jnp

    from equigemma.nn import insert_image_tokens
    from equigemma.text import encode_image

    tokens = jnp.asarray(prompt, jnp.int32)
    if not example.images:
        return tokens, None
    vision = model.vision.config
    seen = example.images[: sum(index == vision.start for index in prompt)]
    if not seen:
        return tokens, None
    soft_tokens = jnp.stack([encode_image(model.vision, image) for image in seen])
    return insert_image_tokens(tokens, vision, len(seen)), soft_tokens


def escape(text: str) -> str:
    """Text that `rich` prints as it is."""
    return text.replace("[", r"\[")
