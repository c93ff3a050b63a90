"""What `pip wheel .` and the source distribution hold, and what the wheel says of itself."""

import email
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

import equigemma


builder = pytest.importorskip("hatchling.build", reason="the build backend is in the extra `test`")

ROOT = Path(equigemma.__file__).parent
PROJECT = ROOT.parent

pytestmark = pytest.mark.skipif(
    not (PROJECT / "pyproject.toml").is_file(), reason="this is not a checkout"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        with zipfile.ZipFile(folder / builder.build_wheel(str(folder))) as archive:
            yield archive


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    files = (path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(PROJECT).as_posix() for path in files}
    assert {"equigemma/py.typed", "equigemma/_kernels/few_rows.cc"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_wheel_says_what_it_needs_and_starts_the_command(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    metadata = email.message_from_string(wheel.read(f"{folder}/METADATA").decode())
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in core} == {
        "beartype",
        "equinox",
        "jax",
        "jaxtyping",
        "numpy",
        "optax",
        "wadler-lindig",
    }
    assert metadata["Requires-Python"] == ">=3.11"
    versions = [line for line in metadata.get_all("Classifier", []) if ":: Python :: 3." in line]
    assert [line.rsplit(" ", 1)[1] for line in versions] == ["3.11", "3.12", "3.13"]
    scripts = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "equigemma = equigemma.cli:main" in scripts


def test_the_source_distribution_holds_what_the_readme_links_to(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with tarfile.open(tmp_path / builder.build_sdist(str(tmp_path))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    links = re.findall(r"\]\(([^)#]+)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    for link in local:
        assert any(name == link or name.startswith(f"{link.rstrip('/')}/") for name in names), link
