"""The command line, as it is typed."""

import subprocess
import sys

import jax
import pytest

import equigemma as eg


pytest.importorskip("typer", reason="the command line is the extra `cli`")
gguf_files = pytest.importorskip("gguf_files", reason="GGUF files are written by the gguf library")

from typer.testing import CliRunner  # noqa: E402

from equigemma.cli._app import app  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    gguf_files.write(path)
    return str(path)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    folder = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def run(*arguments: str, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def test_generate_writes_prompt_and_text_to_standard_output(model):
    result = run("generate", "hello", "-m", model, "-n", 7, "--dtype", "float32")
    weights = eg.load(model, dtype="float32")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"hello{eg.generate(*weights, 'hello', max_new_tokens=7)}\n"
    assert "7 tokens" in result.stderr and "tokens/s" in result.stderr


def test_generate_reads_standard_input(model):
    result = run("generate", "-", "-m", model, "-n", 3, input="hello")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("hello")


def test_the_seed_makes_drawn_text_repeatable(model):
    def text(seed):
        return run("generate", "h", "-m", model, "-n", 9, "-t", 2.0, "--seed", seed).stdout

    assert text(1) == text(1) != text(2)


def test_compiled_programs_are_kept_in_the_users_cache_folder(model, tmp_path):
    # A process of its own: JAX looks for its cache folder once.
    code = "from equigemma.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "hello", "-m", model, "-n", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "equigemma" / "compiled"
    assert any(folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0


def test_info_of_a_file_and_of_a_name(model):
    of_file = run("info", model, "--length", 64, "--dtype", "float32")
    assert of_file.exit_code == 0, of_file.stderr
    weights, _ = eg.load(model)
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(weights)):,}" in of_file.stdout
    of_name = run("info", "gemma3-270m")
    assert of_name.exit_code == 0
    # The published number of parameters, and the bytes of a 32k cache: keys and values, one head of
    # 256 in bfloat16, in 3 global layers of 32768 and 15 rings of 512, or in 18 of full length.
    assert "268,098,176" in of_name.stdout
    assert f"{2 * 256 * 2 * (3 * 32_768 + 15 * 512):,}" in of_name.stdout
    assert f"{2 * 256 * 2 * 18 * 32_768:,}" in of_name.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "The prompt is empty"),
        (["generate", "x", "-m", "gemma3-270n"], "did you mean 'gemma3-270m'"),
        (["generate", "x", "-m", "MODEL", "-n", "0"], "max_new_tokens must be at least 1, got 0"),
        (["generate", "x", "-m", "MODEL", "-t", "-1"], "above 0, got -1"),
        (["generate", "x", "-m", "nowhere.gguf"], "nothing to load at 'nowhere.gguf'"),
        (["info", "MODEL", "--length", "0"], "at least one token, got --length 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(model, arguments, message):
    result = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_cut_off_file_is_refused(model, tmp_path):
    cut = tmp_path / "cut.gguf"
    with open(model, "rb") as whole:
        cut.write_bytes(whole.read()[:-100])
    result = run("generate", "hello", "-m", cut)
    assert result.exit_code == 2
    assert "cut.gguf" in result.stderr and "Traceback" not in result.stderr


def test_help_names_every_option():
    result = run("generate", "--help")
    for option in ("--model", "--max-new-tokens", "--temperature", "--seed", "--dtype"):
        assert option in result.stdout


def test_without_the_terminal_packages_the_command_says_how_to_get_them():
    code = "import sys; sys.modules['typer'] = None\nfrom equigemma.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert 'pip install "equigemma[cli]"' in result.stderr
    assert "Traceback" not in result.stderr
