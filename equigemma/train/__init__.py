"""Fine-tuning as pure functions over pytrees: losses, steps, data."""

from equigemma.train._batch import Batch as Batch
from equigemma.train._batch import Example as Example
from equigemma.train._batch import pack as pack
from equigemma.train._cross_entropy import cross_entropy as cross_entropy
from equigemma.train._step import Loss as Loss
from equigemma.train._step import Metrics as Metrics
from equigemma.train._step import State as State
from equigemma.train._step import init as init
from equigemma.train._step import make_step as make_step
from equigemma.train._step import merge as merge
from equigemma.train._step import next_token_loss as next_token_loss
