"""The examples in docstrings do what they say."""

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import equigemma


def examples() -> Iterator[doctest.DocTest]:
    """Every docstring with an example to run, read from the source: decorators hide some."""
    root = Path(equigemma.__file__).parent
    parser = doctest.DocTestParser()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and re.search(r">>>(?!.*doctest: \+SKIP)", text):
                    name = f"{path.relative_to(root)}::{getattr(node, 'name', 'module')}"
                    line = getattr(node, "lineno", 0)
                    yield parser.get_doctest(text, {}, name, str(path), line)


EXAMPLES = list(examples())


def test_there_are_examples():
    assert len(EXAMPLES) > 3


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_example(example):
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    result = runner.run(example, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted > 0
