"""The loop, checkpoints and metrics: interrupted in every way, a run goes on as if it were not."""

import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from equigemma import train
from equigemma.train import _checkpoints


pytest.importorskip("orbax.checkpoint", reason="checkpoints are the extra `orbax`")

MODEL = tiny.model(tiny.model_config(tiny.layer(qk_norm=True)))
OPTIMIZER = optax.adamw(1e-2)
STEPS = 7


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def step():
    return train.make_step(train.next_token_loss, OPTIMIZER)


def first_state(optimizer=OPTIMIZER) -> train.State:
    return train.init(jax.tree.map(jnp.copy, MODEL), optimizer)


def examples() -> list[train.Example]:
    rng = np.random.default_rng(3)
    return [train.Example(rng.integers(0, tiny.VOCAB, n), np.ones(n)) for n in (9, 4, 13, 7, 2, 11)]


def batches(start=train.DataState()):
    return train.batches(examples(), length=11, rows=2, seed=2, start=start)


class Losses(list):
    """Collects what `fit` reports; does something else at one step."""

    def __init__(self, at: int = 0, action=None):
        self.at, self.action = at, action or (lambda: None)

    def __call__(self, report: train.Report) -> None:
        self.append((report.step, report.loss, report.gradient_norm))
        if report.step == self.at:
            self.action()


def run(step, folder: Path, losses: Losses, steps: int = STEPS) -> train.Fitted:
    """From wherever the folder says that the run stands."""
    with train.Checkpoints(folder) as checkpoints:
        saved = checkpoints.restore(first_state()) or train.Saved(
            first_state(), train.DataState(), None
        )
        return train.fit(
            step,
            saved.state,
            batches(saved.data_state),
            steps=steps,
            checkpoints=checkpoints,
            save_every=2,
            data_state=saved.data_state,
            report=losses,
        )


@pytest.fixture(scope="module")
def undisturbed(step, tmp_path_factory):
    losses = Losses()
    return run(step, tmp_path_factory.mktemp("calm"), losses), losses


def assert_same_state(one: train.State, other: train.State):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def test_fit_takes_the_steps_that_a_plain_loop_takes(step, undisturbed):
    state, expected = first_state(), []
    upcoming = batches()
    for number in range(STEPS):
        batch, data_state = next(upcoming)
        state, metrics = step(state, batch)
        expected.append((number + 1, float(metrics.loss), float(metrics.gradient_norm)))
    fitted, losses = undisturbed
    assert losses == expected
    assert fitted.data_state == data_state
    assert fitted.signal is None
    assert_same_state(fitted.state, state)


@pytest.mark.parametrize("at", [3, 4])
def test_after_an_error_a_run_goes_on_from_its_last_checkpoint(step, undisturbed, tmp_path, at):
    class Broken(Exception):
        pass

    def breaks():
        raise Broken

    with pytest.raises(Broken):
        run(step, tmp_path, Losses(at, breaks))
    rest = Losses()
    fitted = run(step, tmp_path, rest)
    begun = at - 1 - (at - 1) % 2
    assert rest == undisturbed[1][begun:]
    assert_same_state(fitted.state, undisturbed[0].state)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_with_its_state_saved(step, undisturbed, tmp_path, kind):
    handler = signal.getsignal(kind)
    losses = Losses(3, lambda: signal.raise_signal(kind))
    fitted = run(step, tmp_path, losses)
    assert fitted.signal == kind
    assert signal.getsignal(kind) == handler
    rest = Losses()
    last = run(step, tmp_path, rest)
    assert [*losses, *rest] == undisturbed[1]
    assert_same_state(last.state, undisturbed[0].state)


def test_a_finished_run_takes_no_more_steps(step, undisturbed, tmp_path):
    run(step, tmp_path, Losses())
    again = Losses()
    assert_same_state(run(step, tmp_path, again).state, undisturbed[0].state)
    assert again == []


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(step, tmp_path):
    broken = 3

    def with_one_broken():
        for number, (batch, data_state) in enumerate(batches(), start=1):
            if number == broken:
                batch = eqx.tree_at(lambda b: b.weights, batch, batch.weights * jnp.nan)
            yield batch, data_state

    good = first_state()
    upcoming = batches()
    for _ in range(broken - 1):
        batch, data_state = next(upcoming)
        good, _ = step(good, batch)
    with train.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(train.NonFiniteLossError, match="Step 3: the loss is nan"):
            train.fit(step, first_state(), with_one_broken(), steps=9, checkpoints=checkpoints)
        saved = checkpoints.restore(first_state())
    assert saved is not None
    assert int(saved.state.step) == broken - 1
    assert saved.data_state == data_state
    assert_same_state(saved.state, good)


@pytest.mark.slow
def test_an_update_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    """From the third step on the learning rate is not a number; with another one it goes on."""
    broken, mended = (
        optax.adamw(
            optax.join_schedules([optax.constant_schedule(rate) for rate in (1e-2, last)], [2])
        )
        for last in (jnp.nan, 1e-2)
    )
    step = train.make_step(train.next_token_loss, broken)
    good = first_state(broken)
    upcoming = batches()
    for _ in range(2):
        batch, data_state = next(upcoming)
        good, _ = step(good, batch)
    with train.Checkpoints(tmp_path) as checkpoints:
        message = "Step 3: the updated weights are not finite.*The state before it is kept"
        with pytest.raises(train.NonFiniteLossError, match=message):
            train.fit(step, first_state(broken), batches(), steps=9, checkpoints=checkpoints)
        saved = checkpoints.restore(first_state(mended))
    assert saved is not None and int(saved.state.step) == 2 and saved.data_state == data_state
    assert_same_state(saved.state, good)
    losses = Losses()
    step = train.make_step(train.next_token_loss, mended)
    train.fit(step, saved.state, batches(saved.data_state), steps=4, report=losses)
    assert [number for number, *_ in losses] == [3, 4]
    assert np.isfinite(losses).all()


def test_a_checkpoint_of_a_state_that_was_used_up_is_refused(step, tmp_path):
    state = first_state()
    step(state, next(batches())[0])
    with train.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="A step has taken over the arrays of this state"):
            checkpoints.save(state, train.DataState())
    with pytest.raises(ValueError, match="save_every must be at least 1 step, got 0"):
        train.fit(step, first_state(), batches(), steps=1, save_every=0)


def test_keys_are_kept_wherever_they_are(tmp_path):
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1))
    state = train.init(MODEL, noisy)
    key = jax.random.key(11)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, train.DataState(2, 5), key)
        checkpoints.wait()
        saved = checkpoints.restore(jax.eval_shape(lambda: state))
    assert saved is not None and saved.key is not None
    assert saved.data_state == train.DataState(2, 5)
    assert jax.random.bits(saved.key) == jax.random.bits(key)
    for left, right in zip(jax.tree.leaves(saved.state), jax.tree.leaves(state), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


def test_the_frozen_part_is_not_written(tmp_path):
    chosen = eqx.tree_at(lambda m: m.final_norm.scale, jax.tree.map(lambda _: False, MODEL), True)
    state = train.init(MODEL, optax.sgd(0.1), trainable=chosen)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, train.DataState())
        checkpoints.wait()
        saved = checkpoints.restore(state)
    assert saved is not None
    assert saved.state.frozen is state.frozen
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written < sum(leaf.nbytes for leaf in jax.tree.leaves(MODEL))


def test_a_checkpoint_of_something_else_is_refused_with_names(tmp_path):
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first_state(), train.DataState())
        checkpoints.wait()
        names = r"another model or optimizer:\n(.*\n)?.*mu.*expected nothing"
        with pytest.raises(ValueError, match=names):
            checkpoints.restore(first_state(optax.sgd(0.1)))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/run: nothing can be written there"):
        train.Checkpoints(tmp_path / "file" / "run")


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    shapes = eqx.filter_eval_shape(train.init, MODEL, OPTIMIZER)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    monkeypatch.setattr(_checkpoints.shutil, "disk_usage", lambda _: usage(0, 0, 3 * size))
    train.check_disk_space(tmp_path, shapes)
    with pytest.raises(OSError, match="Choose a folder on a larger disk"):
        train.check_disk_space(tmp_path, shapes, reserved=1)


def test_without_orbax_the_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "equigemma\[orbax\]"'):
        train.Checkpoints(tmp_path)


def test_metrics_of_steps_that_come_again_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with train.MetricsFile(path) as metrics:
        for number in range(1, 5):
            metrics.write(number, loss=number / 3)
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    with train.MetricsFile(path, after=2) as metrics:
        metrics.write(3, loss=1.0)
    lines = train.read_metrics(path)
    assert lines == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]
    assert train.read_metrics(tmp_path / "none") == []


def test_evaluation_is_the_mean_over_all_targets():
    validation = list(train.pack(examples(), length=11, rows=2))
    value = train.make_evaluate(train.next_token_loss)(MODEL, iter(validation))
    sums = [jax.jit(train.next_token_loss)(MODEL, batch) for batch in validation]
    expected = sum(float(total) for total, _ in sums) / sum(float(weight) for _, weight in sums)
    assert value == expected


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit():
    script = Path(tiny.__file__).with_name("kill_and_resume.py")
    command = [sys.executable, script, "--kills", "2", "--steps", "30"]
    environment = {"PYTHONPATH": str(script.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    assert "2 kills: losses of 30 steps and the last state are bit-identical" in result.stdout
