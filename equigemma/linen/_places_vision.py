"""Modules of the vision tower, by the names of DeepMind's SigLIP."""

from collections.abc import Iterator

from equigemma import nn
from equigemma.linen import _values as values
from equigemma.linen._place import Place


ENCODER = "vision_encoder/siglip_encoder"


def vision_places(model: nn.Transformer) -> Iterator[Place]:
    """All modules of theirs that see; none if the model reads text only."""
    if model.vision is None:
        return
    config = model.vision.config
    pooled = values.of_input
    if config.side**2 != config.num_soft_tokens:
        flat = values.one_batch_axis(pooled, 2)
        yield Place("vision.norm", "vision_encoder/siglip_exit", flat)
    images = values.one_batch_axis(pooled, 3)
    yield Place("vision.norm", "vision_encoder", images)
    several = values.one_batch_axis(values.result, 3)
    yield Place("vision.norm", "embedder/mm_soft_embedding_norm", several)
    yield Place("vision.projection", "embedder/mm_input_projection", several)
    yield Place("vision.projection", "embedder", several, method="encode_vision")

    vectors = values.one_batch_axis(values.result, 2)
    entered = values.one_batch_axis(values.of_input, 2)
    yield Place("vision.tower.patches", f"{ENCODER}/embedding", values.grid)
    yield Place("vision.tower.layers.0", f"{ENCODER}/Dropout_0", entered)
    yield Place("vision.tower.final_norm", f"{ENCODER}/Transformer/encoder_norm", vectors)
    yield Place("vision.tower", f"{ENCODER}/Transformer", vectors)
    yield Place("vision.tower", ENCODER, vectors)
    for index in range(config.layers):
        yield from _layer(
            f"vision.tower.layers.{index}", f"{ENCODER}/Transformer/encoderblock_{index}"
        )


def _layer(source: str, scope: str) -> Iterator[Place]:
    vectors = values.one_batch_axis(values.result, 2)
    entered = values.one_batch_axis(values.of_input, 2)
    heads = values.one_batch_axis(values.result, 3)
    attention, mlp = f"{scope}/MultiHeadDotProductAttention_0", f"{scope}/MlpBlock_0"
    yield Place(f"{source}.attention_norm", f"{scope}/LayerNorm_0", vectors)
    for name in ("query", "key", "value"):
        yield Place(f"{source}.attention.{name}", f"{attention}/{name}", heads)
    yield Place(f"{source}.attention.output", f"{attention}/out", vectors)
    yield Place(f"{source}.attention", attention, vectors)
    # Their rates are 0, so a dropout returns what it is given.
    yield Place(f"{source}.attention", f"{scope}/Dropout_0", vectors)
    yield Place(f"{source}.ffw_norm", f"{scope}/LayerNorm_1", vectors)
    yield Place(f"{source}.up", f"{mlp}/Dense_0", vectors)
    yield Place(f"{source}.down", f"{mlp}/Dropout_0", entered)
    yield Place(f"{source}.down", f"{mlp}/Dense_1", vectors)
    yield Place(f"{source}.down", mlp, vectors)
    yield Place(f"{source}.down", f"{scope}/Dropout_1", vectors)
    yield Place(source, scope, vectors)
