"""Runs DeepMind's own tests with our models in place of theirs.

python tests/interop/upstream_tests.py CHECKOUT [arguments of pytest]

`CHECKOUT` is a clone of google-deepmind/gemma at the version that is installed, with `gemma` and
`equigemma` importable: `git clone --branch v4.0.1 https://github.com/google-deepmind/gemma`. Of its
tests, those run that make a whole model. Two of them sample from published weights, which are
fetched from the network; leave them out with `--deselect` or `-k "not e2e"`.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from gemma import gm

from equigemma import linen


TESTS = [
    "nn/_transformer_test.py",
    "nn/_transformer_like_test.py",
    "nn/gemma3n/_transformer_test.py",
    "nn/gemma4/_transformer_test.py",
    "text/_prefill_test.py",
    "text/_sampler_test.py",
    "tests/examples_test.py",
    "tests/sampler_e2e_test.py",
    "utils/_cache_helper_test.py",
]


def replace_models() -> list[str]:
    """Puts our classes where DeepMind's tests find theirs; returns the names of those replaced."""
    modules = [gm.nn, gm.testing]
    for name in ("gemma3n._gemma3n", "gemma4._gemma4"):
        found = sys.modules.get(f"gemma.gm.nn.{name}")
        modules += [found] if found else []
    replaced = []
    dummy = gm.testing.DummyGemma
    ours = type("DummyGemma", (linen.Transformer,), {"config": dummy.config})
    for module in modules:
        for name in [name for name in dir(linen) if name.startswith("Gemma")]:
            if hasattr(module, name):
                setattr(module, name, getattr(linen, name))
                replaced.append(f"{module.__name__}.{name}")
    gm.testing.DummyGemma = ours
    return [*replaced, "gm.testing.DummyGemma"]


def main(checkout: Path, *arguments: str) -> int:
    """Runs the tests; returns pytest's exit status."""
    folder = checkout / "gemma" / "gm"
    if not folder.is_dir():
        sys.exit(f"{checkout} has no gemma/gm: it must be a clone of google-deepmind/gemma.")
    for name in dir(gm.nn):  # Modules are imported when their first name is asked for.
        getattr(gm.nn, name)
    # Their tests import the examples as a part of the package, which the released one is without.
    examples = sys.modules["gemma.examples"] = ModuleType("gemma.examples")
    examples.__path__ = [str(checkout / "examples")]
    print("Replaced:", *replace_models(), sep="\n  ")
    paths = [str(folder / name) for name in TESTS if (folder / name).exists()]
    options = ["--import-mode=importlib", "--continue-on-collection-errors", "-q", "-ra"]
    return pytest.main([*options, f"--rootdir={checkout}", *paths, *arguments])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
