"""A short run of `fuzz_files.py`: damaged files load or are refused, and do nothing else."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


pytest.importorskip("gguf", reason='needs pip install "equigemma[test]"')
pytest.importorskip("safetensors", reason='needs pip install "equigemma[test]"')
if sys.platform != "linux":
    pytest.skip("looks at its own process in the way of Linux", allow_module_level=True)

import fuzz_files  # noqa: E402


pytestmark = pytest.mark.slow

CODE = compile("1 + 1", "none", "exec")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> fuzz_files.Bases:
    bases = fuzz_files.Bases(tmp_path_factory.mktemp("bases"))
    fuzz_files.warm_up(bases)
    return bases


@pytest.mark.parametrize("kind", fuzz_files.KINDS)
@given(number=st.integers(0, 2**40))
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_damaged_files_load_or_are_refused(bases, kind, number):
    assert fuzz_files.check(bases.damaged(kind, number, seed=1), kind) in ("loaded", "refused")


def test_an_input_is_made_from_its_name_alone(bases):
    def content(path: Path) -> bytes:
        files = [path] if path.is_file() else sorted(path.iterdir())
        return b"".join(file.read_bytes() for file in files)

    for kind in fuzz_files.KINDS:
        first = content(bases.damaged(kind, 5, 0))
        assert content(bases.damaged(kind, 6, 0)) != first
        assert content(bases.damaged(kind, 5, 1)) != first
        assert content(bases.damaged(kind, 5, 0)) == first


def test_what_is_forbidden_is_seen(bases, monkeypatch):
    path = bases.damaged("safetensors", 5, 0)

    def fails(action) -> str:
        monkeypatch.setattr(fuzz_files, "read", lambda path: action())
        with pytest.raises(fuzz_files.Failure) as caught:
            fuzz_files.check(path, "safetensors")
        return str(caught.value)

    assert "opens" in fails(lambda: open("/etc/hostname"))
    assert "compile" in fails(lambda: exec("1 + 1"))
    assert "exec" in fails(lambda: exec(CODE))
    assert "writes" in fails(lambda: open(path / "new", "w"))
    assert "ZeroDivisionError" in fails(lambda: 1 / 0)
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.05)
    assert "takes longer" in fails(lambda: [None for _ in iter(int, 1)])
