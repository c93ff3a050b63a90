"""Who may import whom, read from the source: an import in the wrong direction fails here."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import equigemma


ROOT = Path(equigemma.__file__).parent
CORE = {"beartype", "equinox", "jax", "jaxtyping", "numpy", "optax", "wadler_lindig"}

# The parts below `equigemma` and what each may import besides `_typing` and itself.
EVERYTHING = None
MAY_IMPORT: dict[str, set[str] | None] = {
    "_typing": {"_type_errors"},
    "_type_errors": {"_arguments"},
    "_config_fields": {"_arguments"},
    "_arguments": set(),
    "_line_errors": set(),
    "_json_records": set(),
    "_text_file": set(),
    "_atomic_file": set(),
    "_encoder_config": set(),
    "_cache_dir": set(),
    "_trim_malloc": set(),
    "_kernels": {"_cache_dir"},
    "_wav": set(),
    "audio": {"_wav"},
    "config": {"_arguments", "_config_fields", "_encoder_config"},
    "variants": {"config"},
    "nn": {"_arguments", "_kernels", "config"},
    # What works on models; none of these knows another.
    "_describe": {"config", "nn"},
    "interpret": {"_arguments", "_kernels", "config", "nn"},
    "lora": {"_arguments", "_kernels", "config", "nn"},
    "peft": {"_kernels", "config", "nn", "lora", "checkpoint"},
    "_prepare": {"_kernels", "config", "nn"},
    "quantize": {"_kernels", "config", "nn", "_prepare"},
    "sampling": {"_arguments", "_kernels", "_trim_malloc", "config", "nn"},
    "sharding": {"_arguments", "_kernels", "lora", "nn", "_prepare", "quantize"},
    "_stack": {"nn"},
    "train": {"_arguments", "_atomic_file", "_kernels", "_trim_malloc", "config", "nn"},
    # Files and words.
    "tokenizers": {"_arguments"},
    "checkpoint": {
        "_arguments",
        "_kernels",
        "config",
        "embedding",
        "nn",
        "_prepare",
        "quantize",
        "variants",
        "tokenizers",
        "_cache_dir",
        "_trim_malloc",
    },
    "images": set(),
    "video": {"images"},
    "preprocessing": {"audio", "config", "images", "nn", "video"},
    "embedding": {"_arguments", "config", "nn", "tokenizers"},
    "_detokenizer": {"tokenizers"},
    "text": {"_detokenizer", "_arguments", "config", "images", "nn", "sampling", "tokenizers"},
    "_score": {"_arguments", "nn", "tokenizers"},
    "chat": {"_arguments", "images", "nn", "sampling", "text", "tokenizers"},
    "data": {
        "_arguments",
        "_line_errors",
        "_json_records",
        "_text_file",
        "chat",
        "config",
        "tokenizers",
        "train",
    },
    # What stands on top.
    "linen": {"_kernels", "config", "nn", "variants", "interpret", "checkpoint"},
    "cli": EVERYTHING,
    "__main__": {"cli"},
    "": EVERYTHING,
}

# Within `nn`: a file imports only from steps below its own, and parts from each other.
NN_LEAVES = {"_cache", "_einsum", "_mask", "_norm", "_rope", "_stream"}
NN_TOP = ["_block", "_altup_block", "_stack", "_layers", "_transformer"]

# Modules that import an optional library when they are imported; others reach them from within
# a function only.
LAZY = re.compile(r"equigemma\.(cli\._\w+|chat\._(language|sandbox|program))")


def module_name(path: Path) -> str:
    parts = ["equigemma", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of the modules that are imported."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute in this package"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported: functions are not entered."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            if not _for_type_checkers(node):
                yield from on_import(node)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def part_of(name: str) -> str:
    """`equigemma.nn._rope` is of `nn`."""
    return (name.split(".") + [""])[1]


def docstrings(tree: ast.AST) -> set[int]:
    """Lines on which docstrings start, those below a field too."""
    return {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


@pytest.mark.parametrize("name", MODULES)
def test_parts_import_only_what_they_may(name):
    part = part_of(name)
    assert part in MAY_IMPORT, f"say in this file what {part} may import"
    allowed = MAY_IMPORT[part]
    if allowed is EVERYTHING:
        return
    others = {
        other
        for other in imported(ast.walk(TREES[name]))
        if other.split(".")[0] == "equigemma" and part_of(other) not in {part, "_typing", *allowed}
    }
    assert not others, f"{name} must not import {others}"


def test_the_shim_takes_from_checkpoint_what_is_deepminds():
    for name in MODULES:
        if part_of(name) == "linen":
            taken = {
                other for other in imported(ast.walk(TREES[name])) if part_of(other) == "checkpoint"
            }
            assert taken <= {"equigemma.checkpoint.gemma"}, name


# Private modules that another part may reach into: few, and each for one purpose.
THROUGH_THE_WALL = {
    ("checkpoint", "quantize._int8_groups"),
    ("checkpoint", "tokenizers._huggingface"),
    ("checkpoint", "tokenizers._sentencepiece_model"),
    ("checkpoint", "tokenizers._tokenizer_json"),
    ("cli", "checkpoint._convert"),
    ("cli", "checkpoint._save"),
    ("embedding", "nn._summary"),
    ("linen", "nn._vision"),
    ("lora", "nn._embed"),
    ("peft", "checkpoint.hf._rules"),
    ("peft", "lora._adapters"),
    ("peft", "lora._tree"),
    ("quantize", "nn._embed"),
    ("sampling", "nn._vision"),
    ("sharding", "lora._adapters"),
    ("text", "sampling._ahead"),
}


def test_other_parts_are_entered_by_their_doors():
    """A part imports what the package of another shows, not what is in its private modules."""
    found = set()
    for name in MODULES:
        part = part_of(name)
        for other in imported(ast.walk(TREES[name])):
            path = other.split(".")
            if path[0] == "equigemma" and len(path) > 2 and path[1] not in {part, "_kernels"}:
                if any(module.startswith("_") for module in path[2:]):
                    found.add((part, ".".join(path[1:])))
    assert found <= THROUGH_THE_WALL, found - THROUGH_THE_WALL
    assert THROUGH_THE_WALL <= found, "no longer needed"


def test_checkpoint_formats_do_not_import_each_other():
    """Only the top level of `checkpoint`, and embedding models, which come in two formats, do."""
    rooms = {"core", "gguf", "hf", "gemma", "native"}
    wrong = []
    for name in MODULES:
        path = name.split(".")
        if path[:2] != ["equigemma", "checkpoint"] or len(path) < 4 or path[2] not in rooms:
            continue
        for other in imported(ast.walk(TREES[name])):
            room = (other.split(".") + [""] * 3)[2]
            if other.startswith("equigemma.checkpoint.") and room in rooms - {path[2], "core"}:
                wrong.append((name, other))
    assert not wrong


def test_nn_is_built_from_leaves_to_transformer():
    def step(file: str) -> int:
        if file in NN_TOP:
            return 2 + NN_TOP.index(file)
        return -1 if file == "_init" else 0 if file in NN_LEAVES else 1

    edges = [
        (name.split(".")[2], other.split(".")[2])
        for name in MODULES
        for other in imported(ast.walk(TREES[name]))
        if name.startswith("equigemma.nn.") and other.startswith("equigemma.nn.")
    ]
    assert ("_transformer", "_block") in edges
    wrong = [
        (file, other)
        for file, other in edges
        if step(other) > step(file) or (step(other) == step(file) and step(file) != 1)
    ]
    assert not wrong


def test_no_circle_of_imports():
    graph = {
        name: {other for other in imported(on_import(TREES[name])) if other in MODULES}
        for name in MODULES
    }
    # Take away what needs nothing that is left; a circle never gets there.
    while free := [name for name, needs in graph.items() if not needs & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) != "_kernels"])
def test_formulations_for_a_compiler_are_in_kernels(name):
    text = MODULES[name].read_text(encoding="utf-8")
    words = r"platform_dependent|optimization_barrier|with_layout_constraint|\bXLA\b"
    assert re.findall(words, text) == []


@pytest.mark.parametrize("name", MODULES)
def test_optional_libraries_are_imported_where_they_are_used(name):
    outside = {
        other
        for other in imported(on_import(TREES[name]))
        if other.split(".")[0] not in sys.stdlib_module_names | CORE | {"equigemma"}
    }
    lazy = {other for other in imported(on_import(TREES[name])) if LAZY.fullmatch(other)}
    assert LAZY.fullmatch(name) or not outside | lazy


@pytest.mark.parametrize("name", MODULES)
def test_nothing_of_flax(name):
    tree = TREES[name]
    words = {word for other in imported(ast.walk(tree)) for word in other.split(".")}
    words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {
        node.value.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert "flax" not in words


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) == "variants"])
def test_variants_are_tables(name):
    branches = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.If | ast.IfExp)]
    assert not branches


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) == "nn"])
def test_nn_knows_no_model_by_name(name):
    skip = docstrings(TREES[name])
    with MODULES[name].open("rb") as file:
        named = [
            token.line.strip()
            for token in tokenize.tokenize(file.readline)
            if token.start[0] not in skip and re.search(r"gemma[-_ ]?\d", token.string, re.I)
        ]
    assert not named


def test_importing_the_package_loads_the_core_alone():
    script = f"""
import sys
import {", ".join(sorted(CORE))}, jax.numpy
before = set(sys.modules)
import equigemma
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new - set(sys.stdlib_module_names) - {CORE | {"equigemma"}}))
"""
    # Any warning on the way is an error.
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*equigemma._PARTS, *equigemma._NAMES])
def test_names_that_wait_for_their_first_use(name):
    assert name in dir(equigemma)
    found = getattr(equigemma, name)
    assert found is getattr(equigemma, name)
    assert part_of(getattr(found, "__module__", found.__name__)) in {
        name,
        equigemma._NAMES.get(name),
    }


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'generated'"):
        equigemma.generated
