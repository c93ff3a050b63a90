"""The documentation site: its code runs, and every public name has a place in the API reference."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jax
import pytest
from test_readme import python_blocks

import equigemma


DOCS = Path(__file__).parent.parent / "docs"
API = sorted((DOCS / "api").glob("*.md"))
# Their blocks start from models and tokens that a reader brings; no test here runs them.
FRAGMENTS = {"linen.md", "look_inside.md"}
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.name not in FRAGMENTS and python_blocks(page.read_text(encoding="utf-8"))
]


def entries(page: Path) -> list[str]:
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)


def exported(module: ModuleType) -> set[str]:
    """Names that a module exports: in `__all__`, or said twice in `from ... import a as a`."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    return {a for a, b in re.findall(r"^from \S+ import (\w+) as (\w+)$", source, re.M) if a == b}


def packages() -> list[ModuleType]:
    root = Path(equigemma.__file__).parent
    names = [path.parent.name for path in sorted(root.glob("[!_]*/__init__.py"))]
    return [equigemma, *(import_module(f"equigemma.{name}") for name in names if name != "cli")]


def test_every_public_name_has_a_page():
    documented = {entry for page in API for entry in entries(page)}
    missing = [
        f"{module.__name__}.{name}"
        for module in packages()
        for name in sorted(exported(module))
        if not isinstance(getattr(module, name), ModuleType)
        and f"{module.__name__}.{name}" not in documented
    ]
    assert not missing, f"add to docs/api: {missing}"


@pytest.mark.parametrize("page", API, ids=lambda page: page.stem)
def test_the_reference_names_what_there_is(page: Path):
    found = entries(page)
    assert found and len(found) == len(set(found))
    for entry in found:
        module, name = entry.rsplit(".", 1)
        assert hasattr(import_module(module), name), f"{entry} is not there any more"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path):
    names: dict[str, object] = {"__name__": page.stem}
    # As a reader has it: optax' own AdamW needs it.
    with jax.numpy_dtype_promotion("standard"):
        for block in python_blocks(page.read_text(encoding="utf-8")):
            exec(compile(block, str(page), "exec"), names)
