"""The command line, as it is typed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import equigemma as eg
from equigemma import chat as ch


pytest.importorskip("typer", reason="the command line is the extra `cli`")
gguf_files = pytest.importorskip("gguf_files", reason="GGUF files are written by the gguf library")

from typer.testing import CliRunner  # noqa: E402

from equigemma.cli._app import app  # noqa: E402
from equigemma.cli._interrupt import reraise_sigint  # noqa: E402
from equigemma.cli._sampling import Sampling  # noqa: E402


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_info_of_a_model_without_a_cache():
    result = run("info", "embeddinggemma-300m")
    assert result.exit_code == 0, result.stderr
    # 303M in the model, 308M with its linear maps, as arXiv:2509.20354 counts.
    assert "302,863,104" in result.stdout and "307,581,696 in all" in result.stdout
    assert "has no KV cache" in result.stdout and "ahead" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "The prompt is empty"),
        (["generate", "x", "-m", "gemma3-270n"], "did you mean 'gemma3-270m'"),
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


COMMANDS = {
    "generate": ["generate", "x", "--model", "nowhere"],
    "chat": ["chat", "nowhere"],
    "convert": ["convert", "nowhere", "x"],
}
SAMPLING = [
    (["-n", "0"], "--max-new-tokens must be at least 1, got 0"),
    (["-t", "-1"], "--temperature must be at least 0, got -1.0"),
    (["-t", "nan"], "--temperature must be a finite number, got nan"),
    (["--temperature", "inf"], "--temperature must be a finite number, got inf"),
    (["-t", "1", "--top-k", "0"], "--top-k must be at least 1, got 0"),
    (["-t", "1", "--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
    (["-t", "1", "--top-p", "nan"], "--top-p must be above 0 and at most 1, got nan"),
    (["-t", "1", "--min-p", "1.5"], "--min-p must be above 0 and at most 1, got 1.5"),
    (["--top-p", "0.9"], "--top-p has no effect on greedy decoding: give a --temperature above 0"),
    (["--top-k", "5", "-t", "0"], "--top-k has no effect on greedy decoding"),
    (["--repetition-penalty", "0"], "--repetition-penalty must be above 0, got 0.0"),
    (["--repetition-penalty", "nan"], "--repetition-penalty must be a finite number, got nan"),
    (["--stop", ""], "--stop needs at least one character, got an empty string"),
    (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
    (["--seed", str(1 << 64)], "--seed must be from 0 to 4294967295"),
]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        *((command, *case) for case in SAMPLING for command in ("generate", "chat")),
        ("generate", ["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        ("generate", ["--num-samples", "2"], "Greedy decoding gives the same text each time"),
        ("generate", ["--image", "README.md"], "README.md"),
        ("generate", ["--stop", "\udcff"], "--stop must be text in UTF-8; character 0 is not"),
        ("chat", ["--system", "a\udcff"], "--system must be text in UTF-8; character 1 is not"),
        ("chat", ["--capacity", "0"], "--capacity must be at least 1, got 0"),
        ("convert", ["--shard-gb", "nan"], "--shard-gb must be a finite number, got nan"),
        ("convert", ["--shard-gb", "0"], "--shard-gb must be above 0, got 0.0"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_looked_for(command, arguments, message):
    result = run(*COMMANDS[command], *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    said = " ".join(result.stderr.split())
    assert message in said
    assert "nowhere" not in said


@pytest.mark.slow
def test_sampling_options_are_those_of_make_sampler(model):
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    options |= {"repetition_penalty": 1.3}
    typed = [part for name, value in options.items() for part in (f"--{name}", value)]
    typed = [str(part).replace("_", "-") for part in typed]
    result = run("generate", "hello", "-m", model, "-n", 9, "--dtype", "float32", *typed)
    assert result.exit_code == 0, result.stderr
    weights = eg.load(model, dtype="float32")
    sampler = eg.sampling.make_sampler(**options)
    expected = eg.generate(*weights, "hello", max_new_tokens=9, sampler=sampler)
    assert result.stdout == f"hello{expected}\n"
    # Each of them has a part in that.
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = dict.fromkeys(names) | {"max_new_tokens": 9, "stop": (), "seed": 0}
    for name in options.keys() - {"temperature"}:
        less = {other: value for other, value in options.items() if other != name}
        found = Sampling(**(given | less)).arguments["sampler"]
        assert eqx.tree_equal(found, eg.sampling.make_sampler(**less))
        assert not eqx.tree_equal(found, sampler)


def test_a_stop_string_ends_the_text(model):
    options = ("-m", model, "-n", 20, "--dtype", "float32", "-t", 1, "--seed", 3)
    whole = run("generate", "hello", *options).stdout
    stop = whole[len("hello") + 4 : len("hello") + 6]
    cut = run("generate", "hello", *options, "--stop", "never there", "--stop", stop).stdout
    assert cut == whole[: whole.index(stop, len("hello"))] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_samples_are_those_of_generate(model, as_json):
    options = ("-m", model, "-n", 5, "--dtype", "float32", "-t", 2, "--seed", 7)
    result = run("generate", "hello", *options, "--num-samples", 3, *["--json"] * as_json)
    assert result.exit_code == 0, result.stderr
    weights = eg.load(model, dtype="float32")
    expected = eg.generate(
        *weights, "hello", max_new_tokens=5, temperature=2.0, seed=7, num_samples=3
    )
    assert len(set(expected)) == 3
    if as_json:
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert lines == [{"prompt": "hello", "text": text} for text in expected]
    else:
        assert result.stdout == "\n".join(f"hello{text}\n" for text in expected)


def test_json_of_one_text_is_that_text(model):
    options = ("generate", "hello", "-m", model, "-n", 5, "--dtype", "float32", "-t", 1)
    (line,) = run(*options, "--json").stdout.splitlines()
    entry = json.loads(line)
    assert run(*options).stdout == f"{entry['prompt']}{entry['text']}\n"


def test_the_version():
    from importlib.metadata import version

    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"equigemma {version('equigemma')}\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "gemma3-270m"],
        ["generate", "hello", "-n", "200", "-m", "MODEL"],
        ["chat", "TALKER", "-n", "5"],
        ["generate", "--help"],
    ],
    ids=["info", "generate", "chat", "help"],
)
def test_a_pipe_that_is_closed_ends_a_command_in_silence(model, talker, arguments):
    arguments = [talker if argument == "TALKER" else argument for argument in arguments]
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    code = "from equigemma.cli import main; main()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes) as process:
        process.stdout.close()  # nobody reads, as after `| head -0`
        process.stdin.write(b"hello\nhello\n")
        process.stdin.close()
        errors = process.stderr.read()
    # Help is printed by typer, which has a code of its own.
    assert process.returncode == (1 if "--help" in arguments else 128 + signal.SIGPIPE)
    # Of a vocabulary alone, chat says what it takes it for.
    assert b"Error" not in errors and b"roken" not in errors and b"Traceback" not in errors


def test_a_cut_off_file_is_refused(model, tmp_path):
    cut = tmp_path / "cut.gguf"
    with open(model, "rb") as whole:
        cut.write_bytes(whole.read()[:-100])
    result = run("generate", "hello", "-m", cut)
    assert result.exit_code == 2
    assert "cut.gguf" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_names_every_option(command):
    result = run(command, "--help")
    shared = "max-new-tokens temperature top-k top-p min-p repetition-penalty stop seed json dtype"
    for option in shared.split() + ["weights"]:
        assert f"--{option}" in result.stdout


def test_without_the_terminal_packages_the_command_says_how_to_get_them():
    code = "import sys; sys.modules['typer'] = None\nfrom equigemma.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert 'pip install "equigemma[cli]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_in_a_callback_comes_again():
    seen = []

    def _xla_gc_callback():
        signal.raise_signal(signal.SIGINT)
        seen.append("not lost in the callback")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), reraise_sigint():
        _xla_gc_callback()
        seen.append("went on")
        time.sleep(10)
        seen.append("never came")
    assert seen == ["not lost in the callback", "went on"]
    assert signal.getsignal(signal.SIGINT) is before


TEMPLATE = """{% for message in messages %}
{{- '<start_of_turn>' + message.role + '\n' + message.content | trim + '<end_of_turn>\n' -}}
{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"""


def write_talker(path, template=None):
    """A model whose vocabulary has turns, with a chat template or without."""
    tokens = [*gguf_files.TOKENS, "<start_of_turn>"]
    vocabulary = gguf_files.VOCABULARY | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [*gguf_files.TYPES, 3],
        "tokenizer.chat_template": template,
    }
    arrays = gguf_files.tensors()
    extra = np.ones((1, gguf_files.WIDTH), np.float32)
    arrays["token_embd.weight"] = np.concatenate([arrays["token_embd.weight"], extra])
    return str(gguf_files.write(path, arrays=arrays, vocabulary=vocabulary))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker") / "talker.gguf")


def talk(model, *lines: str, options=()):
    """What is printed for lines on standard input, and what to standard error."""
    arguments = ["chat", model, "-n", 5, "--dtype", "float32", *options]
    return run(*arguments, input="".join(f"{line}\n" for line in lines))


@pytest.mark.slow
def test_answers_as_json_are_messages(talker):
    result = talk(talker, "hello", "/unknown", "tell", options=["--json", "--stop", "never there"])
    found = [json.loads(line) for line in result.stdout.splitlines()]
    expected = answers(talker, "hello", "tell")
    assert [ch.from_json(message).text for message in found] == expected.splitlines()
    assert all(message["role"] == "assistant" for message in found)


def test_a_conversation_with_8_bit_weights(talker):
    weights, tokenizer = eg.load(talker, dtype="float32")
    _, expected = eg.Chat(eg.quantize.int8(weights), tokenizer).send("hello", max_new_tokens=5)
    assert talk(talker, "hello", options=["-w", "int8"]).stdout == f"{expected}\n"


def test_bytes_that_are_no_text_are_refused(talker):
    result = run("generate", "-", "-m", "nowhere", input=b"ab\xff")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Standard input must be text in UTF-8; byte 2 is not." in result.stderr


def answers(model, *messages: str, **options) -> str:
    """What `Chat` makes of the same."""
    chat = eg.Chat(*eg.load(model, dtype="float32"), **options)
    text = ""
    for message in messages:
        chat, reply = chat.send(message, max_new_tokens=5)
        text += f"{reply}\n"
    return text


def test_a_conversation_goes_on_line_by_line(talker):
    result = talk(talker, "hello", "", "tell", options=["--system", "hot"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == answers(talker, "hello", "tell", system="hot")
    assert "no chat template" in result.stderr and "in the way of Gemma." in result.stderr


def test_the_chat_template_of_the_file_is_used(tmp_path):
    model = write_talker(tmp_path / "talker.gguf", TEMPLATE)
    result = talk(model, "hello")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == answers(model, "hello", format=ch.Template(TEMPLATE))
    assert "no chat template" not in result.stderr


def test_the_chat_template_of_the_file_can_be_left_aside(tmp_path):
    model = write_talker(tmp_path / "talker.gguf", "{{ raise_exception('so it is used') }}")
    result = talk(model, "hello")
    assert "so it is used" in result.stderr and result.stdout == ""
    result = talk(model, "hello", options=["--format", "gemma"])
    assert result.stdout == answers(model, "hello")
    assert "so it is used" not in result.stderr


def test_a_conversation_is_saved_loaded_and_forgotten(talker, tmp_path):
    path = tmp_path / "chat.json"
    saved = talk(talker, "hello", f"/save {path}", "/reset", "hello")
    assert saved.stdout == answers(talker, "hello") * 2
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [entry["role"] for entry in data["messages"]] == ["user", "assistant"]
    assert list(tmp_path.glob("*.partial")) == list(tmp_path.glob(".*.partial")) == []
    loaded = talk(talker, f"/load {path}", "tell")
    assert "2 messages from" in loaded.stderr
    both = answers(talker, "hello", "tell")
    assert saved.stdout[: len(saved.stdout) // 2] + loaded.stdout == both


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "not valid JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "its format is another"),
        ('{"format": "equigemma chat", "version": 2, "messages": []}', "its format is another"),
        (
            '{"format": "equigemma chat", "version": 1, "messages": [{"role": "user"}]}',
            "message 1: A message is an object",
        ),
        (
            '{"format": "equigemma chat", "version": 1, "messages": '
            '[{"role": "user", "content": "h"}]}',
            "no conversation that can go on: Message 2 must be an Assistant",
        ),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(talker, tmp_path, content, message):
    path = tmp_path / "chat.json"
    path.write_text(content, encoding="utf-8")
    result = talk(talker, "hello", f"/load {path}", "tell")
    assert message in " ".join(result.stderr.split())
    assert result.stdout == answers(talker, "hello", "tell")


def test_commands_that_are_none(talker, tmp_path):
    result = talk(talker, "/what", "/save", f"/load {tmp_path / 'none'}", "/help")
    assert result.exit_code == 0 and result.stdout == ""
    for message in ("no command /what", "/save needs the name", "cannot be read", "/reset"):
        assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "file"], "has no chat template"),
        (["--thinking"], "no way to think"),
        (["--capacity", "0"], "--capacity must be at least 1, got 0"),
    ],
)
def test_a_chat_that_cannot_begin(talker, options, message):
    result = talk(talker, "hello", options=options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_scores_are_json_lines(model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "hello"}\n\n{"id": 7, "text": "hotel"}\n', encoding="utf-8")
    result = run("score", model, path, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["line"] for entry in entries] == [1, 3]
    assert ["".join(entry["pieces"]) for entry in entries] == ["hello", "hotel"]
    loaded = eg.load(model, dtype="float32")
    for entry, text in zip(entries, ["hello", "hotel"], strict=True):
        score = eg.score(*loaded, text)
        assert entry["token_ids"] == score.tokens.tolist()
        assert entry["logprobs"] == score.logprobs.tolist()
        assert entry["perplexity"] == score.perplexity
    assert "2 texts" in result.stderr
    brief = run("score", model, path, "--dtype", "float32", "--brief").stdout.splitlines()
    assert json.loads(brief[0]).keys() == {"line", "tokens", "logprob", "mean_nll", "perplexity"}


@pytest.mark.parametrize(("kind", "texts"), [("text", ["h\no\n"]), ("lines", ["h", "o"])])
def test_a_file_of_text_is_one_text_or_one_in_each_line(model, tmp_path, kind, texts):
    path = tmp_path / "text.txt"
    path.write_text("h\no\n", encoding="utf-8")
    result = run("score", model, path, "--input", kind)
    pieces = ["".join(json.loads(line)["pieces"]) for line in result.stdout.splitlines()]
    assert pieces == texts


def test_bad_lines_are_named_by_number(model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "h"}\nno json\n{"text": 5}\n{"text": "\\ud800"}\n\xff\n[]\n')
    result = run("score", model, path)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2 and result.stdout == ""
    for number in (2, 3, 4, 5, 6):
        assert f"line {number}: " in message
    assert "line 1: " not in message and "surrogate" in message and "UTF-8" in message


def test_the_totals_of_a_score_as_json(model, tmp_path):
    path = tmp_path / "texts.json"
    path.write_bytes(b'\xef\xbb\xbf[\r\n{"text": "hello"},\r\n\r\n{"text": "hot"}\r\n]\r\n')
    result = run("score", model, path, "--dtype", "float32", "--brief", "--json")
    assert result.exit_code == 0, result.stderr
    *entries, totals = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["line"] for entry in entries] == [2, 4]
    assert totals["texts"] == 2
    assert totals["tokens"] == sum(entry["tokens"] for entry in entries)
    assert totals["logprob"] == sum(entry["logprob"] for entry in entries)
    assert totals["mean_nll"] == -totals["logprob"] / totals["tokens"]
    np.testing.assert_allclose(totals["perplexity"], np.exp(totals["mean_nll"]), rtol=1e-12)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.jsonl", b"", "has no text"),
        ("texts.txt", b"\xef\xbb\xbf", "has no text"),
        ("texts.json", b"[]", "has no text"),
        ("texts.json", b'[{"text": "h"},\n{"text": 5}]', "line 2: expected an object with a"),
        ("texts.txt", b"h\0", "not text: byte 1 is zero"),
        ("texts.jsonl", b"\x1f\x8b\x08", "compressed with gzip: unpack it first"),
        ("texts.txt", "hot".encode("utf-16"), "text in UTF-16: convert it to UTF-8 first"),
        ("texts", None, "is a folder: name one of its files"),
    ],
)
def test_what_is_no_text_is_refused_before_a_model_is_looked_for(tmp_path, name, content, message):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    result = run("score", "nowhere", path)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and message in said and "nowhere" not in said
    assert "Traceback" not in said


def test_a_file_without_text(model, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(" \n", encoding="utf-8")
    assert "has no text" in run("score", model, path).stderr
    assert run("score", model, tmp_path / "none.txt").exit_code == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Orbax's event loop
def test_convert_goes_through_every_format_and_back(model, tmp_path):
    from equigemma.checkpoint import load_model

    weights = len(jax.tree.leaves(eg.load(model)[0]))
    source = model
    for format in ("huggingface", "orbax", "orbax-flat", "gguf"):
        target = tmp_path / (f"{format}.gguf" if format == "gguf" else format)
        result = run("convert", source, target, "--format", format)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
        assert f"{weights} weights written and compared" in result.stderr
        source = target
    ours, theirs = (jax.tree.leaves(load_model(path, dtype="float32")) for path in (model, source))
    for our, their in zip(ours, theirs, strict=True):
        # The scales of norms are read less by 1 and written more by 1, each rounded once.
        np.testing.assert_allclose(our, their, rtol=0, atol=3e-7 if our.ndim == 1 else 0)


def test_convert_to_another_dtype(model, tmp_path):
    from equigemma.checkpoint import load_model

    result = run("convert", model, tmp_path / "x", "--dtype", "bfloat16", "--shard-gb", "0.00001")
    assert result.exit_code == 0, result.stderr
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    ours, theirs = (load_model(path, dtype="bfloat16") for path in (model, tmp_path / "x"))
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(our), np.asarray(their))


def test_convert_leaves_a_tower_of_another_model_unread(model, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(Path(model).read_bytes())
    (tmp_path / "mmproj-other.gguf").write_bytes(b"no such file")
    assert "mmproj-other.gguf" in run("convert", path, tmp_path / "x").stderr
    result = run("convert", path, tmp_path / "x", "--text-only")
    assert result.exit_code == 0, result.stderr
    assert eg.checkpoint.load_config(tmp_path / "x") == eg.checkpoint.load_config(model)


def test_convert_replaces_with_force_alone(model, tmp_path):
    target = tmp_path / "x"
    assert run("convert", model, target).exit_code == 0
    before = (target / "config.json").stat().st_ino
    result = run("convert", model, target)
    assert result.exit_code != 0 and "is there already; choose another" in result.stderr
    assert "--force" in result.stderr and (target / "config.json").stat().st_ino == before
    assert run("convert", model, target, "--force").exit_code == 0
    assert (target / "config.json").stat().st_ino != before


def test_what_convert_refuses(model, tmp_path):
    for arguments, message in (
        (("convert", tmp_path / "none", tmp_path / "x"), "nothing to load at"),
        (("convert", model, model), "is what is to be read"),
        (("convert", model, tmp_path / "x", "--dtype", "q8_0"), "got dtype=q8_0"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        assert message in " ".join(result.stderr.split())
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_a_person_at_a_terminal(talker, tmp_path):
    """Typed lines are answered, and come back in the next conversation."""
    import os
    import pty
    import select

    def at_terminal(*typed: bytes) -> str:
        """What the terminal showed; a key is pressed whenever it has been quiet for a while."""
        code = "from equigemma.cli import main; main()"
        command = [sys.executable, "-c", code, "chat", talker, "-n", "5", "--dtype", "float32"]
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "XDG_CACHE_HOME": str(tmp_path)}
        keys = list(typed)
        shown = b""
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        ) as process:
            os.close(theirs)
            for _ in range(1000):
                if select.select([ours], [], [], 1.0)[0]:
                    try:
                        shown += os.read(ours, 4096)
                    except OSError:
                        break
                elif b"> " in shown:
                    # Ctrl-D at the end, and again if it came while something was computed.
                    os.write(ours, keys.pop(0) if keys else b"\x04")
            process.wait(timeout=60)
        os.close(ours)
        assert process.returncode == 0, shown
        return shown.decode().replace("\r\n", "\n")

    shown = at_terminal(b"hello\n", b"/help\n")
    assert "/save FILE" in shown and "Ctrl-D ends" in shown
    assert answers(talker, "hello").strip() in shown
    history = tmp_path / "equigemma" / "chat_history"
    assert history.read_text().split() == ["hello", "/help"]
    assert history.stat().st_mode & 0o777 == 0o600
    # The key for the line before.
    shown = at_terminal(b"\x10\x10\n")
    assert answers(talker, "hello").strip() in shown


def test_python_m_is_the_command():
    process = subprocess.run(
        [sys.executable, "-m", "equigemma", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert str(eg.__version__) in process.stdout
