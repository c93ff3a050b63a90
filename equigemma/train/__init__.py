"""Fine-tuning as pure functions over pytrees: losses, steps, data."""

from equigemma.train._batch import Batch as Batch
from equigemma.train._batch import Example as Example
from equigemma.train._batch import cut as cut
from equigemma.train._batch import pack as pack
from equigemma.train._checkpoints import Checkpoints as Checkpoints
from equigemma.train._checkpoints import Saved as Saved
from equigemma.train._checkpoints import check_room as check_room
from equigemma.train._cross_entropy import cross_entropy as cross_entropy
from equigemma.train._feed import Place as Place
from equigemma.train._feed import count_batches as count_batches
from equigemma.train._feed import feed as feed
from equigemma.train._feed import split as split
from equigemma.train._loop import Fitted as Fitted
from equigemma.train._loop import NotFinite as NotFinite
from equigemma.train._loop import Report as Report
from equigemma.train._loop import fit as fit
from equigemma.train._loop import make_evaluate as make_evaluate
from equigemma.train._metrics import MetricsFile as MetricsFile
from equigemma.train._metrics import read_metrics as read_metrics
from equigemma.train._step import Loss as Loss
from equigemma.train._step import Metrics as Metrics
from equigemma.train._step import State as State
from equigemma.train._step import init as init
from equigemma.train._step import make_step as make_step
from equigemma.train._step import merge as merge
from equigemma.train._step import next_token_loss as next_token_loss
