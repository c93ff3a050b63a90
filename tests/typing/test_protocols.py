"""The protocols as a static checker sees them: what it accepts, and what it refuses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@pytest.fixture(scope="module")
def diagnostics() -> dict[str, list[str]]:
    """Messages by file; a comment that ignores nothing counts as one."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("needs pyright, from the extra `dev`")
    files = [FOLDER / "accepted.py", FOLDER / "refused.py"]
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    ran = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files), ran.stdout
    return {
        file.name: [
            f"{file.name}:{entry['range']['start']['line'] + 1}: {entry['message']}"
            for entry in report["generalDiagnostics"]
            if Path(entry["file"]).name == file.name
        ]
        for file in files
    }


def test_models_written_against_the_protocols_are_accepted(diagnostics: dict[str, list[str]]):
    assert diagnostics["accepted.py"] == []


def test_every_misuse_is_refused(diagnostics: dict[str, list[str]]):
    assert diagnostics["refused.py"] == []
    # The comments are what makes the list above empty: each is at a misuse that was found.
    ignored = (FOLDER / "refused.py").read_text().count("# pyright: ignore[")
    assert ignored >= 12
