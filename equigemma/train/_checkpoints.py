"""A folder of training states: whatever happens to a process, the next one goes on from there.

For finished models see `equigemma.save`: what is kept here only a run of the same kind can read.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer, described
from equigemma._typing import PRNGKeyArray
from equigemma.train._batches import DataState
from equigemma.train._step import State, check_state, check_usable


class Saved(NamedTuple):
    """A restored checkpoint; the frozen part of the model is not in it."""

    state: State
    data_state: DataState
    key: PRNGKeyArray | None


class Checkpoints:
    """States in a folder, the newest `keep` of them; a context manager.

    A state is written in the background, to a folder of another name that is renamed when all is on
    disk: a process that is killed at any moment leaves the states before. A state can be
    donated to the next step at once: JAX keeps buffers that are still being read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
        """Opens a folder, which is made if there is none.

        **Arguments:**

        - `folder`: where checkpoints are, and will be.
        - `keep`: how many of the newest are kept.

        **Raises:** `ImportError` if `orbax-checkpoint` is not installed; `OSError` if nothing can
        be written into the folder.
        """
        try:
            # Orbax tells of every file it opens.
            logging.getLogger("absl").setLevel(logging.WARNING)
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "Checkpoints of training need the package orbax-checkpoint, which is not "
                'installed: pip install "equigemma[orbax]".'
            ) from error
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"`folder` must be a path, got {described(folder)}.")
        keep = as_integer("keep", keep, least=1)
        self.folder = Path(folder).expanduser().absolute()
        check_writable(self.folder)
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data_state": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: State, data_state: DataState, key: PRNGKeyArray | None = None) -> None:
        """Begins to write a state. Returns as soon as the one before is on disk.

        A state with as many steps as one that is there already is not written again.

        **Raises:** `OSError` if this or the state before cannot be written; `ValueError` if a step
        has taken over the state.
        """
        check_usable(state)
        if not isinstance(data_state, DataState):
            raise TypeError(
                f"`data_state` must be the train.DataState that came with the last batch, got "
                f"{described(data_state)}."
            )
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        trainable = _trainable_state(state)
        self._guard(
            self._manager.save,
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardSave(_named(trainable, key)),
                data_state=self._ocp.args.JsonSave(
                    {"data_state": data_state._asdict(), "keys": _implementations(trainable, key)}
                ),
            ),
        )

    def wait(self) -> None:
        """Returns when all states are on disk.

        **Raises:** `OSError` if one cannot be written.
        """
        self._guard(self._manager.wait_until_finished)

    def restore(self, like: State) -> Saved | None:
        """The newest state, or None if there is none.

        **Arguments:** `like`: a state of the same tree, of which only `frozen` is taken over;
        arrays may be `jax.ShapeDtypeStruct`.

        **Raises:** `ValueError` if what was saved is of another model or optimizer; `TypeError`
        for what is no state.
        """
        check_state("like", like)
        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = jax.eval_shape(_named, _trainable_state(like), None)
        there: Any = self._manager.item_metadata(step)["state"]
        if "key" in there:
            wanted["key"] = jax.ShapeDtypeStruct(there["key"].shape, there["key"].dtype)
        differences = _differences(wanted, there)
        if differences:
            raise ValueError(
                f"{self.folder}: the checkpoint of step {step} is of another model or optimizer:\n"
                + "\n".join(differences[:10])
            )
        restored: Any = self._manager.restore(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardRestore(wanted),
                data_state=self._ocp.args.JsonRestore(),
            ),
        )
        arrays, keys = restored.state, restored.data_state["keys"]

        def take(name: str, leaf: Any) -> Any:
            # Taken out one by one, so that only one array is there twice.
            data = _placed_like(leaf, arrays.pop(name))
            return jax.random.wrap_key_data(data, impl=keys[name]) if name in keys else data

        model, optimizer, count = jax.tree_util.tree_map_with_path(
            lambda path, leaf: take(jax.tree_util.keystr(path), leaf), _trainable_state(like)
        )
        key = take("key", None) if "key" in arrays else None
        data_state = DataState(**restored.data_state["data_state"])
        return Saved(State(model, like.frozen, optimizer, count), data_state, key)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def _guard(self, action: Any, *arguments: Any, **options: Any) -> None:
        try:
            action(*arguments, **options)
        except (ValueError, OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"{self.folder}: a checkpoint cannot be written ({free / 1e9:.1f} GB are free); "
                f"the ones before are kept. {str(error).splitlines()[0][:200]}"
            ) from error


def check_writable(folder: Path) -> None:
    """Makes a folder if there is none, and writes a file into it to see that it can.

    **Arguments:** `folder`: to be written to.

    **Raises:** `OSError` if that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(
            f"{folder}: nothing can be written there ({error.strerror}). Choose another folder."
        ) from None


def check_disk_space(folder: Path, state: State, *, keep: int = 2, reserved: int = 0) -> None:
    """Refuses to begin what would fill the disk.

    **Arguments:**

    - `folder`: on the disk in question; it must exist.
    - `state`: may have shapes in place of arrays.
    - `keep`: as in `Checkpoints`, which for a moment holds one more.
    - `reserved`: bytes of what else is to be written.

    **Raises:** `OSError` if there is less room than that.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_trainable_state(state)))
    needed = (keep + 1) * size + reserved
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {free / 1e9:.1f} GB are free, but checkpoints and the model need up to "
            f"{needed / 1e9:.1f} GB. Choose a folder on a larger disk."
        )


def _trainable_state(state: State) -> tuple[Any, Any, Any]:
    return state.model, state.optimizer, state.step


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(trainable_state: Any, key: PRNGKeyArray | None) -> dict[str, Any]:
    """Everything that changes, by its path: files whose names say what they hold."""
    named = {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable_state)
    }
    return named if key is None else named | {"key": jax.random.key_data(key)}


def _implementations(trainable_state: Any, key: PRNGKeyArray | None) -> dict[str, str]:
    """Which generator each key is for, by its path: their numbers alone do not say."""
    found = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable_state)
        if _is_key(leaf)
    }
    found = found if key is None else found | {"key": key}
    return {name: str(jax.random.key_impl(leaf)) for name, leaf in found.items()}


def _placed_like(leaf: Any, data: Any) -> Any:
    """The data on the device, or devices, that `leaf` is tied to; tied to none if it is not.

    An array that is tied to its device makes another program, to be compiled anew.
    """
    if isinstance(leaf, jax.Array) and leaf.committed and not _is_key(leaf):
        return jax.device_put(data, leaf.sharding)
    return jnp.array(np.asarray(data))


def _differences(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    differences = []
    for name in sorted({*wanted, *there}):
        ours, theirs = (_shape(tree.get(name)) for tree in (wanted, there))
        if ours != theirs:
            differences.append(f"{name}: expected {ours}, the checkpoint has {theirs}")
    return differences


def _shape(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
