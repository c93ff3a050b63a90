"""`config.json` of a Hugging Face folder to a `ModelConfig`, and back.

Every key is used, or checked against the only value that is supported, or has no effect on the
numbers; any other is refused by name. A key that is left out has the value that `transformers`
takes then. Releases before and after its version 5 name the rotary options differently: both forms
are read, and both are written.

**Source:** transformers `models/gemma/configuration_gemma.py`, `gemma2`, `gemma3`;
`configuration_utils.py` and `modeling_rope_utils.py` for the rotary options.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._layout import check_described, uniform
from equigemma.config import (
    AttentionConfig,
    Dense,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKV,
    RopeConfig,
)


KINDS = ("gemma", "gemma2", "gemma3_text", "gemma3")

# More layers than any model has, and few enough to describe one by one.
_MAX_LAYERS = 10_000
_ACTIVATION = "gelu_pytorch_tanh"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    "gemma2": {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}
_DEFAULTS["gemma3_text"] = _DEFAULTS["gemma2"] | {
    "vocab_size": 262_208,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
# Options of which one value is supported, written by some release or another.
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False, None),
}
# Notes on how a model was made, limits it was trained for, and how it is to be sampled or trained.
_WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attn_implementation bos_token_id
    cache_implementation chunk_size_feed_forward dtype eos_token_id id2label initializer_range
    is_decoder label2id max_position_embeddings model_type output_attentions output_hidden_states
    pad_token_id problem_type return_dict torch_dtype transformers_version unsloth_fixed
    unsloth_version use_cache
    """.split()
)
# What the model of images has to say, which is not read, and where it meets the text.
_WITHOUT_EFFECT_AROUND_TEXT = _WITHOUT_EFFECT | frozenset(
    """
    boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index
    mm_tokens_per_image vision_config
    """.split()
)


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """The config of the text model that a `config.json` describes.

    **Raises:** `CheckpointError` for an unknown kind of model, or an option that is not supported.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(
            f"its model_type is {_short(kind)}; the known ones are {', '.join(KINDS)}."
        )
    if kind == "gemma3":
        around = _Fields(data)
        text = around.table("text_config")
        around.expect_fixed()
        around.refuse_rest(_WITHOUT_EFFECT_AROUND_TEXT)
        data, kind = {"model_type": "gemma3_text"} | text, "gemma3_text"
        if data["model_type"] != kind:
            raise CheckpointError(f"its text_config.model_type is {_short(data['model_type'])}.")
    read = _Fields(data, _DEFAULTS[kind])
    try:
        config = _read(kind, read)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"its config.json describes no valid model. {error}") from error
    read.refuse_rest(_WITHOUT_EFFECT)
    return config


def write_config(config: ModelConfig, context_length: int | None = None) -> dict[str, Any]:
    """What a `config.json` says about a model: architecture only, no token ids and no dtype.

    **Raises:** `CheckpointError` if no kind of model that `transformers` knows is this one.
    """
    parts = uniform(config)
    attention = parts.attention
    kind = "gemma"
    if parts.first.post_norm is not None:
        kind = "gemma2" if attention.qk_norm is None else "gemma3_text"
    rope = (parts.global_ or attention).rope
    data: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": parts.hidden,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": parts.kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.final_norm.epsilon,
        "hidden_act" if kind == "gemma" else "hidden_activation": _ACTIVATION,
        "max_position_embeddings": context_length or _context_length(kind, rope),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    # The older names of the rotary options; those of transformers 5 follow below.
    data |= {"rope_theta": rope.theta, "rope_scaling": _scaling(rope)}
    data["rope_parameters"] = _rope_parameters(rope)
    if kind != "gemma":
        data |= {
            "query_pre_attn_scalar": _query_scalar(attention.query_scale),
            "sliding_window": parts.local.window if parts.local else 4096,
            "layer_types": [
                _LOCAL if layer.attention.window else _GLOBAL for layer in config.layers
            ],
            "final_logit_softcapping": config.final_softcap,
            "attn_logit_softcapping": attention.softcap,
        }
    if kind == "gemma3_text":
        nearby = parts.local.rope if parts.local else RopeConfig()
        data["rope_local_base_freq"] = nearby.theta
        data["rope_parameters"] = {
            _GLOBAL: _rope_parameters(rope),
            _LOCAL: _rope_parameters(nearby),
        }
    # Whether the description says it all is not argued but tried.
    check_described(config, read_config(data), kind)
    return data


_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


class _Fields:
    """The keys of an object, and which of them nobody has asked for yet."""

    def __init__(
        self, data: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, name: str = ""
    ):
        self._rest = dict(data)
        self._defaults = defaults or {}
        self._name = name

    def number(self, key: str, default: Any = None) -> float:
        value = self.take(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Beyond this whole numbers and floats part; no option comes near it.
        if not is_number or not abs(value) < 2**53:
            raise CheckpointError(f"its {self._name}{key} must be a number, got {_short(value)}.")
        return value

    def number_or_none(self, key: str) -> float | None:
        if self._rest.get(key, self._defaults.get(key)) is None:
            self._rest.pop(key, None)
            return None
        return float(self.number(key))

    def size(self, key: str) -> int:
        value = self.number(key)
        if value != int(value) or value < 1:
            raise CheckpointError(
                f"its {self._name}{key} must be a whole number from 1 up, got {value!r}."
            )
        return int(value)

    def table(self, key: str) -> dict[str, Any]:
        """The object of a key; none, or null, is an empty one."""
        value = self.take(key, {})
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise CheckpointError(f"its {self._name}{key} must be an object, got {_short(value)}.")
        return value

    def take(self, key: str, default: Any = None) -> Any:
        return self._rest.pop(key, self._defaults.get(key) if default is None else default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses any value that is there but those."""
        value = self._rest.pop(key, allowed[0])
        # 0 is False and 1 is True in Python, not in JSON.
        if not any(value == only and type(value) in _alike(only) for only in allowed):
            raise CheckpointError(
                f"its {self._name}{key} is {_short(value)}; only "
                f"{' and '.join(map(repr, allowed))} {'is' if len(allowed) == 1 else 'are'} "
                "supported here."
            )

    def expect_fixed(self) -> None:
        for key, allowed in _FIXED.items():
            self.expect(key, *allowed)

    def refuse_rest(self, without_effect: frozenset[str] = frozenset()) -> None:
        unknown = sorted(set(self._rest) - without_effect)
        if unknown:
            raise CheckpointError(
                "it has options that are not supported: "
                + ", ".join(f"{self._name}{key}" for key in unknown)
                + "."
            )


def _short(value: Any) -> str:
    """How a value looks, unless a message would drown in it."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case int() if abs(value) >= 2**53:
            return "a huge number"
        case _:
            text = repr(value)
            return text if len(text) < 100 else f"{text[:97]}..."


def _alike(value: Any) -> tuple[type, ...]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (int, float) if is_number else (type(value),)


def _read(kind: str, read: _Fields) -> ModelConfig:
    read.expect_fixed()
    if kind == "gemma":
        # The first releases said gelu and meant its tanh form; transformers reads it so too.
        read.expect("hidden_act", _ACTIVATION, "gelu")
        read.expect("hidden_activation", _ACTIVATION, None)
    else:
        read.expect("hidden_activation", _ACTIVATION)
        read.expect("hidden_act", _ACTIVATION)
    count = read.size("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise CheckpointError(f"its num_hidden_layers is {count}; no model has so many.")
    head_dim = read.size("head_dim")
    norm = NormConfig(epsilon=read.number("rms_norm_eps", 1e-6))
    ropes = _read_ropes(kind, read)
    block = LayerConfig(
        attention=AttentionConfig(
            heads=read.size("num_attention_heads"),
            head_dim=head_dim,
            kv=OwnKV(heads=read.size("num_key_value_heads")),
            rope=ropes[_GLOBAL],
            query_scale=head_dim**-0.5,
        ),
        ffw=Dense(hidden=read.size("intermediate_size")),
        pre_norm=norm,
    )
    layers, final_softcap = (block,) * count, None
    if kind != "gemma":
        final_softcap = read.number_or_none("final_logit_softcapping")
        layers = _read_layers(kind, read, block, ropes, count)
    return ModelConfig(
        vocab=read.size("vocab_size"),
        width=read.size("hidden_size"),
        layers=layers,
        final_norm=norm,
        final_softcap=final_softcap,
    )


def _read_layers(
    kind: str, read: _Fields, block: LayerConfig, ropes: Mapping[str, RopeConfig], count: int
) -> tuple[LayerConfig, ...]:
    scalar = read.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise CheckpointError(f"its query_pre_attn_scalar must be positive, got {scalar}.")
    softcap = read.number_or_none("attn_logit_softcapping")
    if kind == "gemma3_text" and softcap is not None:
        # transformers reads this option and never uses it.
        raise CheckpointError(f"its attn_logit_softcapping is {softcap}; only null is supported.")
    global_ = replace(
        block,
        attention=replace(
            block.attention,
            query_scale=scalar**-0.5,
            softcap=softcap,
            qk_norm=block.pre_norm if kind == "gemma3_text" else None,
        ),
        post_norm=block.pre_norm,
    )
    types = _read_layer_types(read, count, period=2 if kind == "gemma2" else 6)
    window = read.size("sliding_window") if _LOCAL in types else None
    read.take("sliding_window")
    local = replace(
        global_, attention=replace(global_.attention, window=window, rope=ropes[_LOCAL])
    )
    return tuple(local if here == _LOCAL else global_ for here in types)


def _read_layer_types(read: _Fields, count: int, period: int) -> list[str]:
    """Which layers are local: those listed, or all but the last of every period."""
    periods = [read.take(key) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
    types = read.take("layer_types")
    if types is None:
        period = next((given for given in periods if given is not None), period)
        if type(period) is not int or period < 1:
            raise CheckpointError(
                "its sliding_window_pattern must be a whole number from 1 up, got "
                f"{_short(period)}."
            )
        return [_LOCAL if (index + 1) % period else _GLOBAL for index in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise CheckpointError(f"its layer_types must be a list with an entry for each of {count}.")
    if unknown := [name for name in types if name not in (_LOCAL, _GLOBAL)]:
        raise CheckpointError(
            f"its layer_types name {_short(unknown[0])}; {_LOCAL!r} and {_GLOBAL!r} are supported."
        )
    return types


def _read_ropes(kind: str, read: _Fields) -> dict[str, RopeConfig]:
    """The rotary options of local and global layers, from the older keys, the newer, or both."""
    scaling = read.table("rope_scaling")
    theta = read.number_or_none("rope_theta")
    parameters = read.table("rope_parameters")
    if kind != "gemma3_text":
        rope = _read_rope(parameters, "rope_parameters.", theta, scaling, 10_000.0)
        return {_LOCAL: rope, _GLOBAL: rope}
    kinds = _Fields(parameters, name="rope_parameters.")
    far, near = kinds.table(_GLOBAL), kinds.table(_LOCAL)
    kinds.refuse_rest()
    local_theta = read.number_or_none("rope_local_base_freq")
    return {
        _GLOBAL: _read_rope(far, f"rope_parameters.{_GLOBAL}.", theta, scaling, 1_000_000.0),
        _LOCAL: _read_rope(near, f"rope_parameters.{_LOCAL}.", local_theta, {}, 10_000.0),
    }


def _read_rope(
    parameters: Mapping[str, Any],
    name: str,
    theta: float | None,
    scaling: Mapping[str, Any],
    default_theta: float,
) -> RopeConfig:
    """One set of rotary options; what the older and the newer keys both say must be the same."""
    old = dict(scaling) | ({} if theta is None else {"rope_theta": theta})
    both = {key for key in old.keys() & parameters.keys() if old[key] != parameters[key]}
    if both:
        key = min(both)
        raise CheckpointError(
            f"its {name}{key} is {_short(parameters[key])}, and an older key says "
            f"{_short(old[key])}."
        )
    read = _Fields(old | dict(parameters), name=name)
    named = [read.take(key) for key in ("rope_type", "type")]
    kinds = {kind if isinstance(kind, str) else _short(kind) for kind in named if kind is not None}
    kinds = kinds or {"default"}
    read.expect("partial_rotary_factor", 1.0)
    read.take("original_max_position_embeddings")
    theta = read.number("rope_theta", default_theta)
    factor = read.number("factor", 1.0)
    read.refuse_rest()
    if kinds == {"default"} and factor != 1.0 or kinds - {"default", "linear"} or len(kinds) > 1:
        raise CheckpointError(
            f"its {name}rope_type is {' and '.join(map(repr, sorted(kinds)))}, with a "
            f"factor of {factor}; only 'default' with 1.0 and 'linear' are supported."
        )
    return RopeConfig(theta=float(theta), scale=float(factor))


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    return None if rope.scale == 1.0 else {"rope_type": "linear", "factor": rope.scale}


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    return (_scaling(rope) or {"rope_type": "default"}) | {"rope_theta": rope.theta}


def _query_scalar(scale: float) -> int:
    """The whole number whose root the queries are divided by; a wrong one is noticed on reading."""
    return max(1, round(scale**-2))


def _context_length(kind: str, rope: RopeConfig) -> int:
    if kind != "gemma3_text":
        return 8192
    return 32_768 if rope.scale == 1.0 else 131_072
