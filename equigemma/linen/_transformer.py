"""The shim: configuration that, given variables, behaves like DeepMind's model of the same name.

It holds no arrays. `apply` renames the variables to an Equinox model, runs it, and wraps what comes
out; what a Linen user may pass is understood here and nowhere else in the package.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import ismethod
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from equigemma import nn
from equigemma._typing import Array, Bool, Int
from equigemma.checkpoint._linen import from_params, to_params
from equigemma.config import ModelConfig
from equigemma.linen._bound import Bound
from equigemma.linen._cache import CacheDict, init_cache
from equigemma.linen._collections import DenyList, Filter, selects
from equigemma.linen._config import ShimConfig, ShimInfo
from equigemma.linen._forward import ShimOutput
from equigemma.linen._protocols import Cache, Images, Rngs
from equigemma.linen._sites import Site
from equigemma.linen._upstream import config_from_upstream


Capture = bool | Callable[[Site, str], bool]


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

    - `config`: a `ModelConfig`, or a `ShimConfig` around one.
    - `dtype`: of the parameters that `init` makes. `apply` goes by the parameters it gets.
    - `return_last_only`: whether `apply` returns logits for the last real token of each row only.
      None: each call may say.
    - `text_only`: whether to leave out the vision tower. By default it is there if the config has
      one, as Gemma 3 has from the 4B up; False raises if it has none.
    """

    config: ShimConfig
    dtype: jnp.dtype
    return_last_only: bool | None
    text_only: bool

    INFO = ShimInfo()

    def __init__(
        self,
        *,
        config: ModelConfig | ShimConfig | None = None,
        dtype: Any = jnp.bfloat16,
        return_last_only: bool | None = None,
        text_only: bool | None = None,
    ):
        name = type(self).__name__
        config = getattr(type(self), "config", None) if config is None else config
        if isinstance(config, ModelConfig):
            config = ShimConfig(config)
        if not isinstance(config, ShimConfig):
            raise TypeError(
                f"{name}(config=...) needs a ModelConfig, for example "
                f'equigemma.variants.get("gemma3-270m"), got {type(config).__name__}. '
                "Transformer.from_upstream reads DeepMind's configs."
            )
        if text_only is False and config.model.vision is None:
            raise ValueError(
                f"{name}(text_only=False) asks for a vision tower, which this model does not have. "
                "Leave text_only out to read and write text."
            )
        if text_only:
            config = replace(config, model=config.model.text_only())
        text_only = config.model.vision is None
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "dtype", jnp.dtype(dtype))
        object.__setattr__(self, "return_last_only", return_last_only)
        object.__setattr__(self, "text_only", text_only)

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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Random variables, `{"params": ...}` in DeepMind's tree.

        The arguments are those of `apply` without variables. They are checked, not computed with,
        unless intermediates are to be captured.

        **Raises:** what `apply` raises; `TypeError` if `rngs` holds no key for the parameters.
        """
        model = nn.Transformer(self.config.model, key=_params_key(rngs), dtype=self.dtype)
        variables: dict[str, Any] = {"params": to_params(model)}
        options: dict[str, Any] = {"method": method, **kwargs}
        made = dict(variables)
        if capture_intermediates:
            options |= {"capture_intermediates": capture_intermediates}
            made |= self.apply(variables, *args, **options)[1]
        else:
            jax.eval_shape(
                lambda variables: (self.apply(variables, *args, **options), None)[1], variables
            )
        return {
            name: value
            for name, value in made.items()
            if selects(mutable, name) or name == "intermediates"
        }

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
        - `attention_mask`: `bool[*B L S]`, which slots of the cache each token may look at, or
          without a cache which tokens. Windows of local layers are applied on top. By default all
          real tokens up to itself.
        - `return_last_only`: only the last real token of each row, so logits are `[*B V]`.
        - `return_hidden_states`: also what the logits are made from.
        - `rngs`: accepted and not used: nothing here is random.
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
        del rngs
        bound = Bound(self, _params(variables), _wanted(capture_intermediates))
        output = self._method(method, bound)(*args, **kwargs)
        if mutable is False and not capture_intermediates:
            return output
        updated = {name: value for name, value in variables.items() if selects(mutable, name)}
        if bound.intermediates:
            updated["intermediates"] = bound.intermediates
        return output, updated

    def bind(self, variables: Mapping[str, Any]) -> nn.Transformer:
        """The Equinox model around the arrays of `variables`, none of them copied."""
        return from_params(self.config.model, _params(variables))

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

        **Raises:** `TypeError`, always.
        """
        raise TypeError(
            f"{type(self).__name__} holds no parameters, so it cannot be called. Use "
            "model.apply(variables, tokens), or model.bind(variables) for an Equinox model to call."
        )

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


def to_variables(model: nn.Transformer) -> dict[str, Any]:
    """The arrays of an Equinox model as `{"params": ...}` in DeepMind's tree. None is copied."""
    return {"params": to_params(model)}


def from_variables(
    config: ModelConfig | ShimConfig, variables: Mapping[str, Any]
) -> nn.Transformer:
    """The Equinox model around the arrays of `variables`. None is copied.

    **Raises:** `CheckpointError` that lists every missing, extra or misshaped parameter.
    """
    return Transformer(config=config).bind(variables)


def _params(variables: Any) -> Mapping[str, Any]:
    if not isinstance(variables, Mapping):
        raise TypeError(
            '`variables` must be a mapping like {"params": ...}, as init returns it, got a '
            f"{type(variables).__name__}."
        )
    params = variables.get("params")
    if not isinstance(params, Mapping):
        raise ValueError(
            '`variables` must hold a tree of parameters at "params", it has '
            f"{', '.join(map(str, variables)) or 'nothing'}. To pass parameters alone, write "
            '{"params": params}.'
        )
    if "params" in params:
        raise ValueError('`variables` has "params" within "params"; pass {"params": params} once.')
    return params


def _params_key(rngs: Any) -> Any:
    key = rngs.get("params") if isinstance(rngs, Mapping) else rngs
    if isinstance(key, jax.Array) and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0)
        or (key.dtype == jnp.uint32 and key.ndim == 1)
    ):
        return key
    got = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else type(key).__name__
    raise TypeError(
        "`rngs` must be one random key, as jax.random.key(0) makes it, or a dict with one at "
        f'"params"; got {got}.'
    )


def _wanted(capture: Capture) -> Callable[[Site, str], bool] | None:
    if isinstance(capture, bool):
        return _calls if capture else None
    if callable(capture):
        return capture
    raise TypeError(
        "`capture_intermediates` must be a bool or a function (site, method name) -> bool; got "
        f"{type(capture).__name__}."
    )


def _calls(site: Site, method: str) -> bool:
    del site
    return method == "__call__"
