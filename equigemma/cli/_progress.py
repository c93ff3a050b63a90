"""Progress of `equigemma finetune`: a bar, metrics in a file, evaluation every so many steps."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equigemma.cli._finetune_data import FinetuneData
from equigemma.cli._tuning import OptimConfig


if TYPE_CHECKING:
    from equigemma import train


class ProgressLogger:
    """Logs each step, and evaluates every so many steps."""

    def __init__(
        self,
        plan: OptimConfig,
        data_set: FinetuneData,
        evaluate: Callable[[Any, Any], float],
        metrics: "train.MetricsFile",
        bar: Progress,
        *,
        every: int | None,
    ):
        self._plan, self._data_set, self._evaluate = plan, data_set, evaluate
        self._metrics, self._bar, self._task = metrics, bar, bar.task_ids[0]
        self._every = every or max(plan.steps // 10, 1)
        self._clock = time.perf_counter()
        self._padding: dict[Any, float] = {}

    def measured(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, of each of which the padding is noted: steps report in the same order."""
        for batch, data_state in batches:
            self._padding[data_state] = float((np.asarray(batch.positions) < 0).mean())
            yield batch, data_state

    def begin(self, state: "train.State", count: int) -> None:
        """Before the first step of this run; `count` were made before."""
        if count == 0:
            self._test(state, 0)
        self._clock = time.perf_counter()

    def report(self, now: "train.Report") -> None:
        """After a step."""
        seconds = time.perf_counter() - self._clock
        padding = self._padding.pop(now.data_state)
        self._metrics.write(
            now.step,
            loss=now.loss,
            targets=now.weight,
            padding=padding,
            gradient_norm=now.gradient_norm,
            learning_rate=float(self._plan.rate(now.step - 1)),
            seconds=seconds,
        )
        shape = self._data_set.shape
        tokens = shape.rows * shape.length * (1 - padding)
        speed = f"{tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, completed=now.step, loss=f"loss {now.loss:.4f}", speed=speed)
        if now.step % self._every == 0 or now.step == self._plan.steps:
            self._test(now.state, now.step)
        self._clock = time.perf_counter()

    def _test(self, state: "train.State", step: int) -> None:
        from equigemma import train

        if self._data_set.eval_examples:
            value = self._evaluate(train.merge(state), self._data_set.eval_batches())
            self._metrics.write(step, validation_loss=value)
            self._bar.update(self._task, validation=f"validation {value:.4f}")


def bar_of(console: Console, steps: int, done: int) -> Progress:
    """A bar with one task, the steps."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[validation]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
    )
    bar.add_task("steps", total=steps, completed=done, loss="", validation="", speed="")
    return bar
