"""DeepMind's classes by name: each a config with its tokenizer and published weights."""

from equigemma import variants
from equigemma.checkpoint.gemma._config_vision import seeing
from equigemma.config import SigLIPConfig
from equigemma.linen._config import ShimConfig
from equigemma.linen._info import ShimInfo
from equigemma.linen._transformer import Transformer


_PUBLISHED = "gs://gemma-data/checkpoints"
# DeepMind's package gives its Gemma 3n the vision encoder of Gemma 3, not the one that Gemma 3n was
# trained with. Without parameters for a tower, the model reads text only.
_TOWER = SigLIPConfig()


class Gemma2_2B(Transformer):
    """Gemma 2, 2B."""

    config = ShimConfig(variants.get("gemma2-2b"))
    INFO = ShimInfo(tokenizer_version=2, default_ckpt=f"{_PUBLISHED}/gemma2-2b-it")


class Gemma2_9B(Transformer):
    """Gemma 2, 9B."""

    config = ShimConfig(variants.get("gemma2-9b"))
    INFO = ShimInfo(tokenizer_version=2, default_ckpt=f"{_PUBLISHED}/gemma2-9b-it")


class Gemma2_27B(Transformer):
    """Gemma 2, 27B."""

    config = ShimConfig(variants.get("gemma2-27b"))
    INFO = ShimInfo(tokenizer_version=2, default_ckpt=f"{_PUBLISHED}/gemma2-27b-it")


class Gemma3_270M(Transformer):
    """Gemma 3, 270M."""

    config = ShimConfig(variants.get("gemma3-270m"))
    INFO = ShimInfo(tokenizer_version=3)


class Gemma3_1B(Transformer):
    """Gemma 3, 1B."""

    config = ShimConfig(variants.get("gemma3-1b"))
    INFO = ShimInfo(tokenizer_version=3)


class Gemma3_4B(Transformer):
    """Gemma 3, 4B."""

    config = ShimConfig(variants.get("gemma3-4b"))
    INFO = ShimInfo(tokenizer_version=3)


class Gemma3_12B(Transformer):
    """Gemma 3, 12B."""

    config = ShimConfig(variants.get("gemma3-12b"))
    INFO = ShimInfo(tokenizer_version=3)


class Gemma3_27B(Transformer):
    """Gemma 3, 27B."""

    config = ShimConfig(variants.get("gemma3-27b"))
    INFO = ShimInfo(tokenizer_version=3)


class Gemma3n_E2B(Transformer):
    """Gemma 3n, E2B."""

    config = ShimConfig(seeing(variants.get("gemma3n-e2b"), _TOWER))
    INFO = ShimInfo(tokenizer_version="3n")


class Gemma3n_E4B(Transformer):
    """Gemma 3n, E4B."""

    config = ShimConfig(seeing(variants.get("gemma3n-e4b"), _TOWER))
    INFO = ShimInfo(tokenizer_version="3n")


class Gemma4_E2B(Transformer):
    """Gemma 4, E2B."""

    config = ShimConfig(variants.get("gemma4-e2b"))
    INFO = ShimInfo(tokenizer_version=4)


class Gemma4_E4B(Transformer):
    """Gemma 4, E4B."""

    config = ShimConfig(variants.get("gemma4-e4b"))
    INFO = ShimInfo(tokenizer_version=4)


class Gemma4_31B(Transformer):
    """Gemma 4, 31B."""

    config = ShimConfig(variants.get("gemma4-31b"))
    INFO = ShimInfo(tokenizer_version=4)


class Gemma4_26B_A4B(Transformer):
    """Gemma 4, 26B of which 4B are active."""

    config = ShimConfig(variants.get("gemma4-26b-a4b"))
    INFO = ShimInfo(tokenizer_version=4)
