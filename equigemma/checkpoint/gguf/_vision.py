"""The vision tower of a Gemma 3 as llama.cpp has it: a file of its own beside that of the text.

Which file goes with which, what its metadata say, and what its tensors are called. How files are
read and written is in `_read.py` and `_write.py`.

**Source:** llama.cpp `tools/mtmd/clip.cpp` for what is read, `clip-impl.h` for the names;
`conversion/base.py` (`MmprojModel`) and `conversion/gemma.py` (`Gemma3VisionModel`) for what is
written.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isqrt, prod
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import short
from equigemma.checkpoint.core._keymap import Rule
from equigemma.checkpoint.core._layout import check_described, split_layout
from equigemma.checkpoint.core._tower_rules import TowerNames, tower_rules
from equigemma.checkpoint.gguf._container import Tensor
from equigemma.checkpoint.gguf._options import Limits, Options
from equigemma.checkpoint.gguf._split import whole_name
from equigemma.config import ModelConfig, SigLIPConfig


CLIP, PROJECTOR = "clip", "gemma3"
TEXT = "gemma3"
"""The architecture of the text models that have such a tower."""
START, END, NEWLINE = "<start_of_image>", "<end_of_image>", "\n\n"
"""Tokens around an image, which the vocabulary of the text model has."""

_MARK = "mmproj"
_AWAY = "Move it away, or load with text_only=True."
# Patches of each side that are averaged, unless a file says otherwise.
_AVERAGED = 4
# What images are shifted and scaled by: colours from 0 to 1 become −1 to 1.
_HALVES = [0.5, 0.5, 0.5]
_FIXED = {
    "has_vision_encoder": True,
    "has_audio_encoder": False,
    "has_text_encoder": False,
    "has_llava_projector": False,
    "use_gelu": True,
    "use_silu": False,
    "vision.image_mean": _HALVES,
    "vision.image_std": _HALVES,
}
_LAYER = "v.blk.{i}."
_NAMES = TowerNames(
    patches="v.patch_embd",
    positions="v.position_embd",
    attention_norm=f"{_LAYER}ln1",
    query=f"{_LAYER}attn_q",
    key=f"{_LAYER}attn_k",
    value=f"{_LAYER}attn_v",
    output=f"{_LAYER}attn_out",
    ffw_norm=f"{_LAYER}ln2",
    up=f"{_LAYER}ffn_up",
    down=f"{_LAYER}ffn_down",
    final_norm="v.post_ln",
    norm="mm.soft_emb_norm",
    projection="mm.input_projection.weight",
)


def tower_path(text: Path) -> Path:
    """Where the tower of the model in `text` is written."""
    return text.with_name(f"{_MARK}-{whole_name(text.name)}")


def is_tower(path: Path) -> bool:
    """Whether a file holds a tower, by its name."""
    return _MARK in path.name.lower()


def tower_beside(text: Path) -> Path | None:
    """The tower of the model in `text`: the one named after it, or the only one of no other model.

    **Raises:** `CheckpointError` if there are several.
    """
    if is_tower(text):
        return None
    if tower_path(text).is_file():
        return tower_path(text)
    files = [path for path in sorted(text.parent.iterdir()) if path.suffix.lower() == ".gguf"]
    taken = {tower_path(path) for path in files if not is_tower(path)}
    found = [path for path in files if is_tower(path) and path not in taken]
    if len(found) > 1:
        raise CheckpointError(
            f"several vision towers lie beside it: {', '.join(path.name for path in found)}. Name "
            "one with vision=, or load with text_only=True."
        )
    return found[0] if found else None


def read_vision(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], text: ModelConfig, tokens: list[str]
) -> ModelConfig:
    """The text model with the tower that a file describes. `tokens`: its vocabulary.

    **Raises:** `CheckpointError` if it is no such tower, or that of another model.
    """
    if (architecture := metadata.get("general.architecture")) != CLIP:
        raise CheckpointError(
            f"its architecture is {architecture!r}, and that of a vision tower is {CLIP!r}. {_AWAY}"
        )
    options = Options(metadata, CLIP)
    kinds = [options.optional(key, None) for key in ("projector_type", "vision.projector_type")]
    if PROJECTOR not in kinds:
        kind = next((kind for kind in kinds if kind is not None), None)
        raise CheckpointError(
            f"its clip.projector_type is {short(kind)}; only {PROJECTOR!r}, that of Gemma 3, is "
            f"read. {_AWAY}"
        )
    if (width := options.size("vision.projection_dim")) != text.width:
        raise CheckpointError(
            f"it is the vision tower of a text model of width {width}, and this one has a width of "
            f"{text.width}. {_AWAY}"
        )
    for key, only in _FIXED.items():
        options.expect(key, only)
    return text.with_vision(_read_tower(options, tensors, tokens))


def _read_tower(options: Options, tensors: Mapping[str, Tensor], tokens: list[str]) -> SigLIPConfig:
    pixels, patch = (options.size(f"vision.{side}_size") for side in ("image", "patch"))
    width = options.size("vision.embedding_length")
    hidden = options.size("vision.feed_forward_length")
    layers = options.size("vision.block_count")
    averaged = options.size("vision.projector.scale_factor", _AVERAGED)
    sizes = [prod(tensor.shape) for tensor in tensors.values()]
    side = pixels // patch
    limits = Limits(len(sizes), max(sizes, default=0))
    limits.check(layers, (side**2 * width, 3 * patch**2 * width, width**2, width * hidden))
    if side % averaged:
        raise CheckpointError(
            f"its clip.vision.projector.scale_factor is {averaged}, which does not divide the "
            f"{side} patches of a side."
        )
    heads = options.size("vision.attention.head_count")
    epsilon = options.number("vision.attention.layer_norm_epsilon")
    options.refuse_rest()
    start, end, newline = _around(tokens, _AWAY)
    try:
        return SigLIPConfig(
            pixels=pixels,
            patch=patch,
            width=width,
            layers=layers,
            heads=heads,
            hidden=hidden,
            epsilon=epsilon,
            num_soft_tokens=(side // averaged) ** 2,
            start=start,
            end=end,
            newline=newline,
        )
    except ValueError as error:
        raise CheckpointError(f"its metadata describe no valid tower. {error}") from error


def _around(tokens: Sequence[str], advice: str) -> list[int]:
    places = {token: index for index, token in enumerate(tokens)}
    if missing := [token for token in (START, END, NEWLINE) if token not in places]:
        raise CheckpointError(
            f"the vocabulary of the text model lacks {' and '.join(map(repr, missing))}, which "
            f"stand around an image. {advice}"
        )
    return [places[token] for token in (START, END, NEWLINE)]


def describe_vision(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], tokens: list[str]
) -> dict[str, Any]:
    """The metadata of the tower of `config`. `shapes`: of the file's tensors.

    **Raises:** `CheckpointError` if llama.cpp would take it for another one, or the vocabulary has
    no images.
    """
    vision = config.vision
    assert vision is not None
    _around(tokens, "Give the tokenizer of a Gemma 3 that takes images.")
    told: dict[str, Any] = {
        "projector_type": PROJECTOR,
        "has_vision_encoder": True,
        "use_gelu": True,
        "vision.projection_dim": config.width,
        "vision.image_size": vision.pixels,
        "vision.patch_size": vision.patch,
        "vision.embedding_length": vision.width,
        "vision.feed_forward_length": vision.hidden,
        "vision.block_count": vision.layers,
        "vision.attention.head_count": vision.heads,
        "vision.attention.layer_norm_epsilon": vision.epsilon,
        "vision.image_mean": _HALVES,
        "vision.image_std": _HALVES,
    }
    if (averaged := vision.side // isqrt(vision.num_soft_tokens)) != _AVERAGED:
        told["vision.projector.scale_factor"] = averaged
    metadata = {f"{CLIP}.{key}": value for key, value in told.items()}
    # Whether the description says it all is not argued but tried.
    around = {"general.architecture": CLIP}
    tensors = {key: Tensor(key, 0, shape, 0, 1, 4) for key, shape in shapes.items()}
    text = split_layout(config).text_only()
    described = read_vision(metadata | around, tensors, text, tokens)
    check_described(config, described, f"{TEXT} with a vision tower")
    return metadata


def vision_rules(config: SigLIPConfig, tensors: Iterable[Tensor] = ()) -> tuple[Rule, ...]:
    """Names for the leaves of a tower, in a file with these tensors or one that is to be written.

    Older files have the names of the first and the second half of a feed-forward the wrong way
    round. llama.cpp tells by what the second one takes; where that is the same for both, it takes
    them for the older ones.
    """
    names = _NAMES
    down = _NAMES.down.format(i=0) + ".weight"
    takes = next((tensor.shape[-1] for tensor in tensors if tensor.name == down), config.hidden)
    if takes == config.width:
        names = names._replace(up=names.down, down=names.up)
    # llama.cpp does not add 1 to the scale itself.
    return tuple(tower_rules(names, offset=1.0))
