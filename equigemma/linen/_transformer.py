"""The shim: configuration that, given variables, behaves like DeepMind's model of the same name.

It holds no arrays. `apply` renames the variables to an Equinox model, runs it, and wraps what comes
out; what a Linen user may pass is understood here and nowhere else in the package.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import ismethod
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp

from equigemma import nn
from equigemma._typing import Array, Bool, Int
from equigemma.checkpoint.gemma import config_from_upstream, from_params, to_params
from equigemma.config import ModelConfig
from equigemma.linen._arguments import Capture, config_of, wanted_by
from equigemma.linen._bound import Bound
from equigemma.linen._cache import CacheDict, init_cache
from equigemma.linen._collections import DenyList, Filter, selects
from equigemma.linen._config import ShimConfig
from equigemma.linen._forward import ShimOutput
from equigemma.linen._info import ShimInfo
from equigemma.linen._protocols import Cache, Images, Rngs, TransformerConfig
from equigemma.linen._tabulate import tabulate
from equigemma.linen._variables import params_key, params_of


REQUIRED = "__KEY_REQUIRED__"
"""The word by which `kauldron` tells a key that must be given from one that may be left out."""


@dataclass(frozen=True, init=False)
class Transformer:
    """A model as configuration: hashable, equal by value, and apart from its variables.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> from equigemma import linen
    >>> model = linen.Gemma3_270M(dtype=jnp.bfloat16)
    >>> tokens = jnp.array([[2, 818, 5279]])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)  # shapes, no memory
    >>> jax.eval_shape(model.apply, variables, tokens).logits.shape
    (1, 3, 262144)

    ```

    **Fields:**

    - `config`: a `ModelConfig`, a `ShimConfig` around one, or a `TransformerConfig` of DeepMind's.
    - `dtype`: of the parameters that `init` makes. `apply` goes by the parameters it gets.
    - `return_last_only`: whether `apply` returns logits for the last real token of each row only.
      None: each call may say.
    - `text_only`: whether to leave out the vision tower. By default it is there if the config has
      one, as Gemma 3 has from the 4B up; False raises if it has none.
    - `logits_dtype`: of the logits. None: that of the parameters, as in DeepMind's models. They are
      computed in float32, and `jnp.float32` returns them so.
    - `tokens`, `images`, `positions`, `attention_mask`: where a trainer finds these inputs, like
      `"batch.tokens"`. `apply` does not read them.
    - `name`: not read either.
    """

    config: ShimConfig
    dtype: jnp.dtype
    return_last_only: bool | None
    text_only: bool | None = field(compare=False)  # `config` says as much
    logits_dtype: jnp.dtype | None
    tokens: Any
    images: Any
    positions: Any
    attention_mask: Any
    name: str | None

    INFO = ShimInfo()

    def __init__(
        self,
        *,
        config: ModelConfig | TransformerConfig | Mapping[str, Any] | None = None,
        dtype: Any = jnp.bfloat16,
        return_last_only: bool | None = None,
        text_only: bool | None = None,
        logits_dtype: Any = None,
        tokens: Any = REQUIRED,
        images: Any = None,
        positions: Any = None,
        attention_mask: Any = None,
        name: str | None = None,
    ):
        config = getattr(type(self), "config", None) if config is None else config
        fields = {
            "config": config_of(type(self).__name__, config, text_only),
            "dtype": jnp.dtype(dtype),
            "return_last_only": return_last_only,
            "text_only": text_only,
            "logits_dtype": None if logits_dtype is None else jnp.dtype(logits_dtype),
            "tokens": tokens,
            "images": images,
            "positions": positions,
            "attention_mask": attention_mask,
            "name": name,
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_upstream(cls, config: Any, *, text_only: bool = True, **fields: Any) -> "Transformer":
        """The model that a config of DeepMind's package describes.

        **Arguments:** `config`: a `TransformerConfig` of theirs, or a mapping of its fields with
        enumerations by name. With `text_only` its vision encoder is left out; without, it must be
        the one of Gemma 3. `fields`: the other fields of this class.

        **Raises:** `ValueError` that names every field which is unknown, missing, or not supported.
        """
        read = config_from_upstream(config, text_only=text_only)
        return cls(config=read, text_only=text_only, **fields)

    def init(
        self,
        rngs: Rngs,
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: Filter = DenyList("intermediates"),
        capture_intermediates: Capture = False,
        is_training_property: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Random variables, `{"params": ...}` in DeepMind's tree.

        The arguments are those of `apply` without variables. They are checked, not computed with,
        unless intermediates are to be captured.

        **Raises:** what `apply` raises; `TypeError` if `rngs` holds no key for the parameters.
        """
        del is_training_property
        variables: dict[str, Any] = {"params": to_params(self._fresh(rngs))}
        options: dict[str, Any] = {"method": method, **kwargs}
        if capture_intermediates:
            options |= {"capture_intermediates": capture_intermediates}
            return _made(variables, mutable, self.apply(variables, *args, **options)[1])
        jax.eval_shape(
            lambda variables: (self.apply(variables, *args, **options), None)[1], variables
        )
        return _made(variables, mutable)

    def init_with_output(
        self,
        rngs: Rngs,
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: Filter = DenyList("intermediates"),
        capture_intermediates: Capture = False,
        is_training_property: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """What `apply` returns with random variables, and those variables.

        **Arguments:** those of `apply` without variables.

        **Raises:** as `init`.
        """
        del is_training_property
        variables: dict[str, Any] = {"params": to_params(self._fresh(rngs))}
        output, collected = self.apply(
            variables,
            *args,
            method=method,
            mutable=[],
            capture_intermediates=capture_intermediates,
            **kwargs,
        )
        return output, _made(variables, mutable, collected)

    @overload
    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: Int[Array, "*B L"],
        *,
        images: Images | None = None,
        cache: Cache | None = None,
        positions: Int[Array, "*B L"] | None = None,
        attention_mask: Bool[Array, "*B L S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
        rngs: Rngs | None = None,
        method: None = None,
        mutable: Literal[False] = False,
        capture_intermediates: Literal[False] = False,
        is_training_property: bool | None = None,
    ) -> ShimOutput: ...

    @overload
    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Rngs | None = None,
        method: Callable[..., Any] | str | None = None,
        mutable: Filter = False,
        capture_intermediates: Capture = False,
        is_training_property: bool | None = None,
        **kwargs: Any,
    ) -> Any: ...

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Rngs | None = None,
        method: Callable[..., Any] | str | None = None,
        mutable: Filter = False,
        capture_intermediates: Capture = False,
        is_training_property: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A forward pass with these variables, or another method.

        It is compiled, once for each set of shapes and options.

        **Arguments:**

        - `variables`: any mapping with DeepMind's tree at `"params"`, of any float dtype.
        - `tokens`: `int[*B L]`. Id 0 is padding, if positions or mask follow from the tokens.
        - `images`: `uint8[*B I height width 3]` or one for each row. Each `<start_of_image>` among
          the tokens of a row is one of them. Positions, mask and cache are then of the tokens with
          those of images among them: a newline before, and soft tokens, the end, and a newline
          after each. Of these there are no logits and hidden states.
        - `cache`: from `init_cache`. The L tokens go into the slots after `end_index`.
        - `positions`: `int[*B L]`, by default real tokens counted from 0.
        - `attention_mask`: `bool[*B L S]`, which slots of the cache each token attends to, or
          without a cache which tokens. Windows of local layers are applied on top. By default all
          real tokens up to itself.
        - `return_last_only`: only the last real token of each row, so logits are `[*B V]`.
        - `return_hidden_states`: also what the logits are made from.
        - `rngs`, `is_training_property`: accepted and not used: nothing here is random, nor
          different in training.
        - `method`: another method, by name (`"init_cache"`, `"embedder.encode"`,
          `"embedder.decode"`), or as a function of the bound model, which has these methods too,
          and of the other arguments.
        - `mutable`: if not False, the result is `(output, collections)`, with those selected.
        - `capture_intermediates`: True for the result of every module, or a function of a site,
          which has `name`, `path` and `module`, and of a method's name. The result is
          `(output, collections)`, with DeepMind's names in `collections["intermediates"]`. Pass the
          same function again to avoid compiling again.

        **Raises:** `TypeError` or `ValueError` on inputs that do not fit; `CheckpointError`, a
        `ValueError`, that lists missing, extra and misshaped parameters.
        """
        del rngs, is_training_property
        bound = Bound(self, params_of(variables), wanted_by(capture_intermediates))
        output = self._method(method, bound)(*args, **kwargs)
        if mutable is False and not capture_intermediates:
            return output
        updated = {name: value for name, value in variables.items() if selects(mutable, name)}
        if bound.intermediates:
            updated["intermediates"] = bound.intermediates
        return output, updated

    def bind(self, variables: Mapping[str, Any]) -> nn.Transformer:
        """The Equinox model around the arrays of `variables`, none of them copied."""
        return from_params(self.config.model, params_of(variables))

    def init_cache(
        self,
        *,
        batch_size: int,
        dtype: Any,
        cache_length: int,
        sharding: Any = None,
    ) -> CacheDict:
        """An empty cache for `batch_size` rows of up to `cache_length` tokens.

        **Arguments:** `dtype`: of keys and values, usually that of the parameters. `sharding`:
        None, one `jax.sharding.Sharding`, or a tree of them with the cache's structure.

        **Raises:** `ValueError` if a size is below 1.
        """
        return init_cache(
            self.config.model,
            batch_size=batch_size,
            dtype=dtype,
            cache_length=cache_length,
            sharding=sharding,
        )

    def __call__(
        self,
        tokens: Int[Array, "*B L"],
        *,
        images: Images | None = None,
        positions: Int[Array, "*B L"] | None = None,
        cache: Cache | None = None,
        attention_mask: Bool[Array, "*B L S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
    ) -> ShimOutput:
        """Says how to call a model that holds no variables.

        **Arguments:** `tokens`, `images`, `positions`, `cache`, `attention_mask`,
        `return_last_only`, `return_hidden_states`: what `apply` takes.

        **Returns:** nothing: it always raises.

        **Raises:** `TypeError`, always.
        """
        raise TypeError(
            f"{type(self).__name__} holds no parameters, so it cannot be called. Use "
            "model.apply(variables, tokens), or model.bind(variables) for an Equinox model to "
            "call; within a Linen module, hold the parameters there and call model.apply."
        )

    @property
    def scope(self) -> Any:
        """What a wrapper of Linen modules looks for; the error says what takes its place.

        **Raises:** `AttributeError`, always.
        """
        raise AttributeError(
            f"{type(self).__name__} is not a Linen module, so wrappers that replace Linen modules "
            "(gm.nn.LoRA, QuantizationAwareWrapper, IntWrapper) cannot wrap it: use equigemma.lora "
            "for adapters and equigemma.quantize for int8 and int4 weights, on "
            "model.bind(variables)."
        )

    def clone(self, *, parent: None = None, **updates: Any) -> Self:
        """A copy with other fields.

        **Arguments:** `updates`: fields of this class. `parent`: accepted as None.
        """
        del parent
        return replace(self, **updates)

    def copy(self, *, parent: None = None, name: str | None = None, **updates: Any) -> Self:
        """A copy with other fields and another name, or none.

        **Arguments:** as `clone`.
        """
        return self.clone(parent=parent, name=name, **updates)

    def tabulate(
        self,
        rngs: Rngs,
        *args: Any,
        depth: int | None = None,
        console_kwargs: Any = None,
        table_kwargs: Any = None,
        column_kwargs: Any = None,
        **kwargs: Any,
    ) -> str:
        """A table of the parameters that `init` makes. Nothing is computed.

        **Arguments:** `rngs`, `args` and `kwargs`: those of `init`. `depth`: modules further down
        are counted with those above them. Of those that shape Linen's table, none is used.

        **Raises:** as `init`.
        """
        del console_kwargs, table_kwargs, column_kwargs
        shapes = jax.eval_shape(lambda: self.init(rngs, *args, **kwargs))
        return tabulate(shapes["params"], depth)

    def __kontext_keys__(self) -> dict[str, Any]:
        """Which inputs a trainer passes to `apply`, and where it finds them; None: not passed."""
        names = ("tokens", "images", "positions", "attention_mask")
        return {name: getattr(self, name) for name in names}

    def _fresh(self, rngs: Any) -> nn.Transformer:
        return nn.Transformer(self.config.model, key=params_key(rngs), dtype=self.dtype)

    def _method(self, method: Callable[..., Any] | str | None, bound: Bound) -> Callable[..., Any]:
        if ismethod(method) and isinstance(method.__self__, Transformer):
            method = method.__func__
        name = "__call__" if method is None else method
        if callable(method):
            name = getattr(method, "__name__", "")
            if getattr(Transformer, name, None) is not method:
                return partial(method, bound)
        target: Any = bound
        for part in str(name).split("."):
            target = getattr(target, part, None)
        if not callable(target):
            raise ValueError(
                "`method` must be '__call__', 'init_cache', 'embedder.encode', 'embedder.decode', "
                f"or a function of the bound model; got {method!r}."
            )
        return target


def _made(
    variables: dict[str, Any], mutable: Filter, intermediates: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What an initialisation returns: the selected collections, and what was captured."""
    return {name: value for name, value in variables.items() if selects(mutable, name)} | dict(
        intermediates or {}
    )
