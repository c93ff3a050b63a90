"""Saving is all or nothing: a process killed at any moment leaves the old checkpoint or the new."""

import hashlib
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import formats
import jax
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.core import _files
from equigemma.checkpoint.core._files import new_file, new_folder


for _module in ("gguf", "safetensors", "orbax.checkpoint"):
    pytest.importorskip(_module, reason='needs pip install "equigemma[test]"')


SAVE_FOREVER = """
    import sys
    import formats
    import equigemma as eg

    path, format = sys.argv[1:]
    config = formats.CONFIGS["gemma1 mqa"]
    models = [formats.model(config, seed=seed) for seed in (1, 2)]
    print("ready", flush=True)
    for turn in range(10**9):
        eg.save(
            models[turn % 2], path, tokenizer=formats.tokenizer(), format=format, shard_bytes=20_000
        )
        print(turn, flush=True)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("format", "kills"), [("huggingface", 4), ("gguf", 4), ("orbax", 3)], ids=lambda value: value
)
def test_a_kill_leaves_the_old_or_the_new(format, kills, tmp_path):
    path = tmp_path / ("x.gguf" if format == "gguf" else "x")
    config = formats.CONFIGS["gemma1 mqa"]
    written = [formats.model(config, seed=seed) for seed in (1, 2)]
    wanted = [fingerprint(model) for model in written]
    eg.save(written[0], path, tokenizer=formats.tokenizer(), format=format)
    waits = random.Random(0)
    seen = set()
    for kill in range(kills):
        with writer(path, format) as process:
            assert process.stdout.readline() == "ready\n"
            process.stdout.readline()
            # A turn takes some hundredths of a second: kills are spread over a few.
            time.sleep(0.15 * (kill + waits.random()) / kills)
            process.kill()
        model, tokenizer = eg.load(path, dtype="float32")
        assert tokenizer.encode("hello") == formats.tokenizer().encode("hello")
        seen.add(wanted.index(fingerprint(model)))
    assert seen <= {0, 1}
    # What was left half done is hidden, and never in the way of the next.
    eg.save(written[1], path, tokenizer=formats.tokenizer(), format=format)
    assert fingerprint(eg.load(path, dtype="float32")[0]) == wanted[1]
    names = [entry.name for entry in tmp_path.iterdir() if entry != path]
    assert all(name.startswith(".x") and ".partial" in name for name in names), names


def writer(path: Path, format: str) -> subprocess.Popen[str]:
    """A process that saves two models in turn, as fast as it can."""
    paths = [str(Path(tiny.__file__).parent), str(Path(eg.__file__).parents[1])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(path), format],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def fingerprint(model: eg.Transformer) -> str:
    # A zero loses its sign where 1 is added and taken off again.
    leaves = [(np.asarray(leaf) + 0.0).tobytes() for leaf in jax.tree.leaves(model)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "by two renames"])
def test_a_folder_takes_the_place_of_another(exchange, tmp_path, monkeypatch):
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_bytes(b"old")

    def write(fails: bool) -> None:
        with new_folder(target, lambda path: True) as partial:
            (partial / "new").write_bytes(b"new")
            if fails:
                raise Interrupted

    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda first, second: False)
    with pytest.raises(Interrupted):
        write(fails=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "old"]
    write(fails=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    target = tmp_path / "x.gguf"
    target.write_bytes(b"old")
    with pytest.raises(Interrupted), new_file(target) as partial:
        partial.write_bytes(b"half")
        raise Interrupted
    assert target.read_bytes() == b"old" and [*tmp_path.iterdir()] == [target]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "x"
    model = formats.model(formats.CONFIGS["gemma1 mqa"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="x cannot be written: No space left on device"):
        eg.save(model, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_link_goes_on_pointing_where_it_did(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    model = formats.model(formats.CONFIGS["gemma1 mqa"])
    eg.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/config.json").is_file()
