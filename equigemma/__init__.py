"""The Gemma family of language models as plain Equinox pytrees."""

from equigemma import sampling as sampling
from equigemma import variants as variants
from equigemma.chat import Chat as Chat
from equigemma.checkpoint import load as load
from equigemma.checkpoint import save as save
from equigemma.config import ModelConfig as ModelConfig
from equigemma.describe import describe as describe
from equigemma.nn import Cache as Cache
from equigemma.nn import Output as Output
from equigemma.nn import Transformer as Transformer
from equigemma.nn import init_cache as init_cache
from equigemma.prepare import prepare as prepare
from equigemma.score import score as score
from equigemma.text import generate as generate
from equigemma.text import stream as stream
