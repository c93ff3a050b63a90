"""Runs of `equigemma finetune` in folders of their own."""

import jax
import pytest
from typer.testing import CliRunner

from equigemma.cli._app import app


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    folder = jax.config.jax_compilation_cache_dir
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_compilation_cache_dir", folder)


def run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])
