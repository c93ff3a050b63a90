"""A Linen view of the models, without Flax: DeepMind's trees and ours are one value.

`linen.Gemma3_270M()` and its siblings satisfy `TransformerLike`, so what drives the models of
`gemma.gm.nn` drives them: its `Sampler` and `ChatSampler`, with its parameters. `to_variables` and
`from_variables` lead from one view to the other.
"""

from equigemma.linen._collections import DenyList as DenyList
from equigemma.linen._config import ShimConfig as ShimConfig
from equigemma.linen._forward import ShimOutput as ShimOutput
from equigemma.linen._info import AttentionType as AttentionType
from equigemma.linen._info import ShimInfo as ShimInfo
from equigemma.linen._info import ShimInput as ShimInput
from equigemma.linen._info import ShimTower as ShimTower
from equigemma.linen._info import ShimVision as ShimVision
from equigemma.linen._info import SpecialTokens as SpecialTokens
from equigemma.linen._models import Gemma2_2B as Gemma2_2B
from equigemma.linen._models import Gemma2_9B as Gemma2_9B
from equigemma.linen._models import Gemma2_27B as Gemma2_27B
from equigemma.linen._models import Gemma3_1B as Gemma3_1B
from equigemma.linen._models import Gemma3_4B as Gemma3_4B
from equigemma.linen._models import Gemma3_12B as Gemma3_12B
from equigemma.linen._models import Gemma3_27B as Gemma3_27B
from equigemma.linen._models import Gemma3_270M as Gemma3_270M
from equigemma.linen._models import Gemma3n_E2B as Gemma3n_E2B
from equigemma.linen._models import Gemma3n_E4B as Gemma3n_E4B
from equigemma.linen._models import Gemma4_26B_A4B as Gemma4_26B_A4B
from equigemma.linen._models import Gemma4_31B as Gemma4_31B
from equigemma.linen._models import Gemma4_E2B as Gemma4_E2B
from equigemma.linen._models import Gemma4_E4B as Gemma4_E4B
from equigemma.linen._protocols import InputConfig as InputConfig
from equigemma.linen._protocols import ModelInfo as ModelInfo
from equigemma.linen._protocols import Output as Output
from equigemma.linen._protocols import TransformerConfig as TransformerConfig
from equigemma.linen._protocols import TransformerLike as TransformerLike
from equigemma.linen._sites import Site as Site
from equigemma.linen._transformer import Transformer as Transformer
from equigemma.linen._variables import from_variables as from_variables
from equigemma.linen._variables import to_variables as to_variables
