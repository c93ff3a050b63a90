"""Kills a training run again and again, and shows that nothing of it is lost or changed.

    python tests/_support/kill_and_resume.py [--kills 20] [--steps 240] [--seed 0]

SIGKILL comes at random moments: while the program starts, computes, or writes a checkpoint. In the
end losses and weights must be, bit for bit, those of a run that nobody disturbed. The parent only
imports; each child is forked from it, so that no time goes into importing again.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

from equigemma import train


os.environ["JAX_PLATFORMS"] = "cpu"


def examples() -> list[train.Example]:
    """Texts of different lengths, so that packing and cutting are part of what must be restored."""
    rng = np.random.default_rng(7)
    sizes = rng.integers(2, 40, size=53)
    return [train.Example(rng.integers(0, 31, size), np.ones(size)) for size in sizes]


def learn(folder: Path, steps: int) -> None:
    """A whole run as a user would write it, from wherever the folder says that it stands."""
    import tiny

    layer = tiny.layer(window=tiny.WINDOW, qk_norm=True, post_norm=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    state = train.init(tiny.model(tiny.model_config(layer)), optimizer)
    step = train.make_step(train.next_token_loss, optimizer)
    with train.Checkpoints(folder / "checkpoints") as checkpoints:
        saved = checkpoints.restore(state) or train.Saved(state, train.DataState(), None)
        with open(folder / "begun", "a") as begun:
            print(int(saved.state.step), file=begun)
        batches = train.batches(examples(), length=23, rows=3, seed=5, start=saved.data_state)
        with train.MetricsFile(folder / "metrics.jsonl", after=int(saved.state.step)) as metrics:

            def report(done: train.Report) -> None:
                metrics.write(done.step, loss=done.loss, gradient_norm=done.gradient_norm)

            fitted = train.fit(
                step,
                saved.state,
                batches,
                steps=steps,
                checkpoints=checkpoints,
                save_every=3,
                data_state=saved.data_state,
                report=report,
            )
    if fitted.signal is None:
        leaves = jax.tree.leaves(fitted.state)
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
        (folder / "digest").write_text(digest.hexdigest())


def start(folder: Path, steps: int) -> int:
    """A child that learns; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        learn(folder, steps)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def finish(child: int) -> int:
    """Waits for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def is_saved(folder: Path) -> bool:
    """Whether a checkpoint is complete: it gets its number as a name then."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())


def disturb(folder: Path, steps: int, rng: random.Random, *, once_saved: bool) -> int | None:
    """One run that is killed; its last step, or None if it came to its end before that.

    With `once_saved` not before there is a checkpoint: on a slow machine none might ever be.
    """
    metrics = folder / "metrics.jsonl"
    child = start(folder, steps)
    if once_saved and not is_saved(folder):
        while not is_saved(folder) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.01)
    elif rng.random() < 0.2:
        time.sleep(rng.uniform(0, 2))
    else:
        # Until it has taken a step, and for a while from then on.
        begun = size(metrics)
        while size(metrics) <= begun and os.waitpid(child, os.WNOHANG) == (0, 0):
            begun = min(begun, size(metrics))
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return None
    code = finish(child)
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        sys.exit(f"A run that was begun again failed with code {code}.")
    lines = train.read_metrics(metrics)
    return lines[-1]["step"] if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder, "calm"), Path(folder, "disturbed")
        for path in (calm, disturbed):
            path.mkdir()
        if finish(start(calm, options.steps)):
            sys.exit("The run that nobody disturbs failed.")
        reached = [
            disturb(disturbed, options.steps, rng, once_saved=kill == options.kills - 1)
            for kill in range(options.kills)
        ]
        if None in reached:
            sys.exit(f"A run came to its end before it was killed, at {reached}: more --steps.")
        if finish(start(disturbed, options.steps)):
            sys.exit("The last run failed.")

        expected, curve = (train.read_metrics(path / "metrics.jsonl") for path in (calm, disturbed))
        assert len(expected) == options.steps
        assert curve == expected, "the loss curves differ"
        digests = [(path / "digest").read_text() for path in (calm, disturbed)]
        assert digests[0] == digests[1], "the last states differ"
        begun = [int(line) for line in (disturbed / "begun").read_text().split()]
        assert max(begun) > 0, "no run went on from a checkpoint"
    print(f"killed at steps {reached}, begun at {begun}")
    print(
        f"{options.kills} kills: losses of {options.steps} steps and the last state are "
        f"bit-identical, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
