"""The documentation site: its code runs, and every public name has a place in the API reference."""

import inspect
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import chat_models
import jax
import numpy as np
import pytest
import tiny
from test_readme import python_blocks

import equigemma
from equigemma import checkpoint
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.hf._config import KINDS, read_config
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.checkpoint.hf._unsupported import UNSUPPORTED


DOCS = Path(__file__).parent.parent / "docs"
API = sorted((DOCS / "api").glob("*.md"))
# It needs DeepMind's package and Flax; tests/interop runs what it shows.
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.name != "linen.md" and python_blocks(page.read_text(encoding="utf-8"))
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
    names += ["interpret.graph", "interpret.sae"]
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


def described() -> dict[str, Callable[..., Any]]:
    """Public functions, and `__init__` and `__call__` of public classes that describe them."""
    found = {}
    for entry in sorted({entry for page in API for entry in entries(page)}):
        module, name = entry.rsplit(".", 1)
        thing = getattr(import_module(module), name)
        if not inspect.isclass(thing):
            found[entry] = inspect.unwrap(thing)
            continue
        for method in ("__init__", "__call__"):
            function = inspect.unwrap(getattr(thing, method))
            if method in vars(thing) and inspect.isfunction(function) and own_docstring(function):
                found[f"{entry}.{method}"] = function
    return {entry: it for entry, it in found.items() if inspect.isfunction(it)}


def own_docstring(function: Callable[..., Any]) -> str:
    """Not one that it inherits; empty for an `__init__` that a dataclass made."""
    generated = function.__code__.co_filename == "<string>"
    return "" if generated else inspect.cleandoc(function.__doc__ or "")


def section(docstring: str) -> str:
    """The section on arguments."""
    after = docstring.partition("**Arguments:**")[2]
    return re.split(r"\*\*(?:Returns|Yields|Raises|Source):\*\*", after)[0]


def named(docstring: str) -> set[str]:
    """What the section on arguments has in backticks: `x`, `*x`."""
    return set(re.findall(r"`\*{0,2}(\w+)`", section(docstring)))


DESCRIBED = described()


def unsaid(function: Callable[..., Any]) -> list[str]:
    """What the docstring leaves out: arguments, and what is returned."""
    docstring, signature = own_docstring(function), inspect.signature(function)
    words = named(docstring)
    # "The others are those of `generate`": arguments that its docstring names.
    for other in re.findall(r"\bthose\s+of\s+`(?:\w+\.)*(\w+)`", section(docstring)):
        for entry, described in DESCRIBED.items():
            if entry.removesuffix(".__call__").endswith(f".{other}"):
                words |= named(own_docstring(described)) & {
                    *inspect.signature(described).parameters
                }
    left_out = [name for name in signature.parameters if name != "self" and name not in words]
    silent = signature.return_annotation in (None, "None", inspect.Signature.empty)
    if not silent and not re.search(r"\*\*(Returns|Yields):\*\*", docstring):
        left_out.append("**Returns:**")
    return left_out


@pytest.mark.parametrize("entry", DESCRIBED)
def test_a_function_is_described(entry: str):
    """Each argument is named, and what is returned; a function without a docstring fails, too."""
    left_out = unsaid(DESCRIBED[entry])
    assert not left_out, f"the docstring of {entry} does not say: {', '.join(left_out)}"


def test_what_a_docstring_leaves_out():
    def silent(x: int, *rest: int):
        pass

    def brief(x: int, y: int) -> int:
        """Adds `x`.

        **Arguments:** `y`: a number.
        """
        return x + y

    def borrowing(model: Any, sampler: Any, x: int) -> None:
        """**Arguments:** `x`: a number; the others are those of `generate`."""

    def wrongly(model: Any, samplers: Any) -> None:
        """**Arguments:** those of `generate`."""

    assert unsaid(silent) == ["x", "rest"]
    assert unsaid(brief) == ["x", "**Returns:**"]
    assert unsaid(borrowing) == []
    assert unsaid(wrongly) == ["samplers"]
    assert {"equigemma.sampling.prefill", "equigemma.Transformer.__call__"} <= DESCRIBED.keys()


def load(
    source: str, *, dtype: Any = jax.numpy.bfloat16, transform: Callable[[Any], Any] = lambda x: x
):
    """`equigemma.load`, with a tiny model of random weights for one that a reader downloads."""
    if Path(source).exists():
        return checkpoint.load(source, dtype=dtype, transform=transform)
    model = chat_models.model()
    model = jax.tree.map(lambda x: x.astype(dtype) if hasattr(x, "dtype") else x, model)
    return transform(model), chat_models.tokenizer()


def given_to_look_inside() -> dict[str, Any]:
    """A model, tokens of two prompts, and folders of transcoders as Gemma Scope has them."""
    model = tiny.model(tiny.GEMMA2)
    folders = []
    for layer in range(len(model.layers)):
        rng = np.random.default_rng(layer)
        shapes = dict(W_enc=(tiny.WIDTH, 11), W_dec=(11, tiny.WIDTH), b_enc=11, threshold=11)
        shapes["b_dec"] = tiny.WIDTH
        weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        folder = Path("gemma-scope-2b-pt-transcoders", f"layer_{layer}", "width_16k", "average_l0")
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **weights)
        folders.append(folder)
    tokens, other = tiny.tokens(1, 5), tiny.tokens(1, 5, seed=1)
    return {"model": model, "tokens": tokens, "other": other, "folders": folders}


# What a page says a reader has.
GIVEN = {"look_inside": given_to_look_inside}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(equigemma, "load", load)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem} | GIVEN.get(page.stem, dict)()
    # As a reader has it: optax' own AdamW needs it.
    with jax.numpy_dtype_promotion("standard"):
        for block in python_blocks(page.read_text(encoding="utf-8")):
            exec(compile(block, str(page), "exec"), names)


# The tables of "Load any Gemma".


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading."""
    text = (DOCS / "guides" / "load_any_gemma.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", section, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([\w.-]+)`", cell)


def published(variant: str) -> equigemma.ModelConfig:
    """The variant; transformers caps the logits of Gemma 3n, DeepMind's package does not."""
    config = equigemma.variants.get(variant)
    return replace(config, final_softcap=30.0) if variant.startswith("gemma3n") else config


def config_json(variant: str, kind: str) -> dict:
    """A `config.json` of a variant as a model of this kind is published."""
    data = write_config(published(variant))
    if kind in ("gemma3n", "gemma4", "gemma4_unified"):
        inner = data | {"model_type": f"{kind}_text"}
        if kind == "gemma4_unified":
            # Keys of mixtures of experts and per-layer inputs are not of this kind.
            keys = ("enable_moe_block", "vocab_size_per_layer_input", "hidden_size_per_layer_input")
            inner = {key: value for key, value in inner.items() if key not in keys}
        return {"model_type": kind, "text_config": inner}
    return data


LOADED = [(quoted(kind)[0], quoted(name)) for _, kind, name in rows("What loads")]


@pytest.mark.parametrize("kind, names", [row for row in LOADED if row[1]])
def test_a_row_of_what_loads(kind: str, names: list[str]):
    (name,) = names
    data = config_json(name, kind)
    assert data["model_type"] == kind
    expected = published(name)
    read = read_config(data)
    assert len(read.layers) == len(expected.layers) and read.width == expected.width
    assert write_config(read) == write_config(expected)


def test_what_loads_is_complete():
    text = (DOCS / "guides" / "load_any_gemma.md").read_text(encoding="utf-8")
    below = quoted(text.split("The text models of the last three kinds alone are")[1].split(";")[0])
    assert {kind for kind, _ in LOADED} | set(below) == set(KINDS)
    assert [name for _, names in LOADED for name in names] == [*equigemma.variants.names()]


def test_what_is_refused_is_complete():
    refused = [kind for row in rows("What is refused") for kind in quoted(row[1])]
    assert sorted(refused) == sorted(UNSUPPORTED)
    for kind in refused:
        with pytest.raises(CheckpointError, match=re.escape(UNSUPPORTED[kind])):
            read_config({"model_type": kind})


RESULTS = DOCS.parent / "benchmarks" / "RESULTS.md"


def test_the_tables_of_performance_are_among_the_results():
    """The site's build puts them there, by their heading."""
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    headings = re.findall(r"<!-- results: (.+?) -->", text)
    assert headings
    for heading in headings:
        section = RESULTS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
        assert "\n|" in section.split("\n## ")[0], heading


def test_the_version_to_cite():
    file = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    page = (DOCS / "citation.md").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", file, re.M) == [equigemma.__version__]
    assert re.findall(r"version = {(\S+)}", page) == [equigemma.__version__]


# The first column of the glossary: classes with a field, and functions.
WORDS = re.findall(
    r"^\| [^|`]*`(\w+)\.(\w+)\b", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.M
)


@pytest.mark.parametrize("owner, name", WORDS)
def test_a_word_of_the_glossary(owner: str, name: str):
    places = {"eg": equigemma} | {module.__name__.split(".")[-1]: module for module in packages()}
    place = places.get(owner) or getattr(equigemma.config, owner, None)
    place = place or getattr(equigemma, owner)
    assert hasattr(place, name) or name in getattr(place, "__dataclass_fields__", {})


PICTURES = runpy.run_path(str(DOCS / "pictures.py"))


@pytest.mark.parametrize("name", PICTURES["PICTURES"])
def test_a_picture_shows_what_there_is(name: str):
    content = (DOCS / "pictures" / name).read_bytes()
    assert PICTURES["description"](name).encode() in content, "run: python docs/pictures.py"


def test_what_the_pictures_are_drawn_from():
    layers = PICTURES["layers"]()["Gemma 4 E2B"]
    assert layers[20][1] == 13 and layers[14] == [None, 14]
    imports = PICTURES["imports"]()
    assert imports["nn"] == ["_kernels", "config"] and "nn" in imports["sampling"]
