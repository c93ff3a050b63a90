"""DeepMind's classes by name: each a config with its tokenizer and published weights."""

from equigemma import variants
from equigemma.checkpoint.gemma import seeing
from equigemma.config import SigLIPConfig
from equigemma.linen._config import ShimConfig
from equigemma.linen._info import ShimInfo
from equigemma.linen._transformer import Transformer


_PUBLISHED = "gs://gemma-data/checkpoints"


def _published(
    name: str, variant: str, tokenizer: int | str, checkpoint: str | None = None
) -> type[Transformer]:
    """The class called `name`: a `Transformer` whose config is that of a variant.

    DeepMind's package gives its Gemma 3n the vision encoder of Gemma 3, not the one that Gemma 3n
    was trained with. Without parameters for a tower, the model reads text only.
    """
    config = variants.get(variant)
    if tokenizer == "3n":
        config = seeing(config, SigLIPConfig())
    fields = {
        "__doc__": f"{name.replace('_', ', ', 1).replace('_', ' ').replace('Gemma', 'Gemma ')}.",
        "__module__": __name__,
        "config": ShimConfig(config),
        "INFO": ShimInfo(tokenizer_version=tokenizer, default_ckpt=checkpoint),
    }
    return type(name, (Transformer,), fields)


Gemma2_2B = _published("Gemma2_2B", "gemma2-2b", 2, _PUBLISHED + "/gemma2-2b-it")
Gemma2_9B = _published("Gemma2_9B", "gemma2-9b", 2, _PUBLISHED + "/gemma2-9b-it")
Gemma2_27B = _published("Gemma2_27B", "gemma2-27b", 2, _PUBLISHED + "/gemma2-27b-it")
Gemma3_270M = _published("Gemma3_270M", "gemma3-270m", 3)
Gemma3_1B = _published("Gemma3_1B", "gemma3-1b", 3)
Gemma3_4B = _published("Gemma3_4B", "gemma3-4b", 3)
Gemma3_12B = _published("Gemma3_12B", "gemma3-12b", 3)
Gemma3_27B = _published("Gemma3_27B", "gemma3-27b", 3)
Gemma3n_E2B = _published("Gemma3n_E2B", "gemma3n-e2b", "3n")
Gemma3n_E4B = _published("Gemma3n_E4B", "gemma3n-e4b", "3n")
Gemma4_E2B = _published("Gemma4_E2B", "gemma4-e2b", 4)
Gemma4_E4B = _published("Gemma4_E4B", "gemma4-e4b", 4)
Gemma4_31B = _published("Gemma4_31B", "gemma4-31b", 4)
Gemma4_26B_A4B = _published("Gemma4_26B_A4B", "gemma4-26b-a4b", 4)
