"""What the benchmarks found is what is published, and every question has its script."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent.parent / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are only in the repository", allow_module_level=True)
RESULTS = runpy.run_path(str(FOLDER / "results.py"))
SCRIPTS = [question.name for question in RESULTS["QUESTIONS"] if question.script]


def test_results_are_joined_from_their_parts():
    published = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    assert published == RESULTS["joined"](), "edit notes, then: python benchmarks/results.py"


def test_figures_of_the_readme_are_those_that_were_measured():
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"[\d.,]+ \([\d.,]+-[\d.,]+\)", readme)
    assert len(figures) > 10
    assert [one for one in figures if one not in RESULTS["joined"]()] == []


def test_every_script_and_every_part_belongs_to_a_question():
    scripts = {path.stem for path in FOLDER.glob("*.py") if "parser_of(" in path.read_text()}
    assert scripts - {"report"} == set(SCRIPTS)
    parts = {path.stem for kind in ("results", "notes") for path in (FOLDER / kind).glob("*.md")}
    assert parts <= {question.name for question in RESULTS["QUESTIONS"]}


def test_a_question_that_fails_says_so_below_what_was_found(tmp_path):
    """That of DeepMind's loop, which ends at once when nobody says where DeepMind's package is."""
    kept = tmp_path / "results" / "linen_sampler.md"
    kept.parent.mkdir()
    kept.write_text("Found before.\n", encoding="utf-8")
    command = [sys.executable, FOLDER / "run.py", "linen_sampler", "--into", tmp_path]
    for _ in range(2):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 1, ran.stderr
    text = kept.read_text(encoding="utf-8")
    assert text.startswith("Found before.\n\nNot finished: linen_sampler.py on ")
    assert text.endswith("both models run in DeepMind's environment: pass --gemma-python\n")
    assert text.count("Not finished") == 1
    assert text in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
