"""Names on the hub, against a small server of our own that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import formats
import gguf_files
import pytest

import equigemma as eg
from equigemma.checkpoint._hub import is_name


pytest.importorskip("huggingface_hub", reason='needs pip install "equigemma[hf]"')
pytest.importorskip("safetensors", reason='needs pip install "equigemma[hf]"')

TOKEN = "hf_secret"


class Hub:
    """Repositories by name and revision, what was asked for, and who may see what."""

    def __init__(self, folder: Path):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.down = False
        self.endpoint = ""
        self.cache = folder

    def environment(self, **others: str) -> dict[str, str]:
        """What a process needs to ask this hub, and no other."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "JAX_PLATFORMS": "cpu",
            "NO_PROXY": "127.0.0.1",
            **others,
        }


def commit(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            if hub.down:
                return self.refuse(503, {})
            if path.startswith("/api/models/"):
                owner, name, about, revision = path.removeprefix("/api/models/").split("/")
                repository, file = f"{owner}/{name}", None
            else:
                repository, _, rest = path.lstrip("/").partition("/resolve/")
                revision, _, file = rest.partition("/")
            revisions = hub.repositories.get(repository)
            if revisions is None:
                return self.refuse(401, {"X-Error-Code": "RepoNotFound"})
            known = {name: name for name in revisions}
            known |= {commit(repository, name): name for name in revisions}
            if revision not in known:
                return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
            revision = known[revision]
            files = revisions[revision]
            sha = commit(repository, revision)
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if file is None and about == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": sha}
                    for name, data in files.items()
                ]
                return self.give(json.dumps(tree).encode(), {"Content-Type": "application/json"})
            if file is None:
                siblings = [{"rfilename": name} for name in files]
                answer = {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings}
                return self.give(json.dumps(answer).encode(), {"Content-Type": "application/json"})
            if repository in hub.gated and not allowed:
                return self.refuse(401, {"X-Error-Code": "GatedRepo"})
            if file not in files:
                return self.refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            etag = hashlib.sha256(files[file]).hexdigest()
            self.give(files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

        def refuse(self, status: int, headers: dict[str, str]) -> None:
            self.give(b"{}", headers, status)

        def give(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


@pytest.fixture
def hub(tmp_path, folder, gguf) -> Iterator[Hub]:
    hub = Hub(tmp_path / "cache")
    others = {
        "README.md": b"# no weights",
        "pytorch_model.bin": b"pickled",
        "consolidated.safetensors": b"the same in another layout",
    }
    hub.repositories["owner/model"] = {"main": folder | others, "older": folder}
    hub.repositories["owner/files"] = {"main": {"tiny.gguf": gguf, "README.md": b""}}
    hub.repositories["google/gated"] = {"main": folder}
    hub.gated.add("google/gated")
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("saved") / "x"
    model = formats.model(formats.CONFIGS["gemma3"])
    eg.save(model, path, tokenizer=formats.tokenizer(), shard_bytes=20_000)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    return gguf_files.write(tmp_path_factory.mktemp("file") / "x.gguf").read_bytes()


LOAD = """
    import json, sys, zlib
    import jax, numpy as np
    import equigemma as eg

    results = []
    for name, options in json.loads(sys.argv[1]):
        try:
            model, tokenizer = eg.load(name, **options)
        except ValueError as error:
            results.append(str(error))
        else:
            leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]
            results.append([str(model.dtype), zlib.crc32(b"".join(leaves)), tokenizer.vocab_size])
    print(json.dumps(results))
"""


def load(hub: Hub, *names: str | tuple[str, dict], **environment: str) -> list:
    """What `eg.load` makes of each name in a new process: settings are read on import."""
    asked = [(name, {}) if isinstance(name, str) else name for name in names]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), json.dumps(asked)],
        env=hub.environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return json.loads(result.stdout)


FLOAT32 = {"dtype": "float32"}


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> int:
    """A checksum of all weights."""
    import zlib

    import jax
    import numpy as np

    model = formats.model(formats.CONFIGS["gemma3"])
    return zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)))


@pytest.mark.slow
def test_a_repository_a_revision_and_a_file(hub, folder, expected):
    other = commit("owner/model", "older")
    found = load(
        hub,
        ("owner/model", FLOAT32),
        ("owner/model", FLOAT32 | {"revision": "older"}),
        ("owner/model", FLOAT32 | {"revision": other}),
        "owner/model",
        ("owner/files/tiny.gguf", FLOAT32),
    )
    assert found[0] == found[1] == found[2] == ["float32", expected, 271]
    assert found[3][0] == "bfloat16"
    assert found[4][0] == "float32" and found[4][2] == 271
    taken = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET"}
    # Only what is read is fetched.
    weights = {name for name in folder if name.endswith(".safetensors")}
    assert {"config.json", "tokenizer.json", *weights} <= taken and len(weights) > 1
    assert not taken & {"pytorch_model.bin", "README.md", "consolidated.safetensors"}
    # And it is fetched once: a second process asks whether it is new, and takes no file.
    hub.asked.clear()
    assert load(hub, ("owner/model", FLOAT32)) == [["float32", expected, 271]]
    assert not [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]


@pytest.mark.slow
def test_offline(hub, expected):
    (message,) = load(hub, "owner/model", HF_HUB_OFFLINE="1")
    assert "owner/model is neither a folder here nor complete in the cache" in message
    assert "HF_HUB_OFFLINE is set; unset it, or download the files first" in message
    assert hub.asked == []
    load(hub, "owner/model", "owner/files/tiny.gguf")
    hub.asked.clear()
    found = load(hub, ("owner/model", FLOAT32), "owner/files/tiny.gguf", HF_HUB_OFFLINE="1")
    assert found[0] == ["float32", expected, 271] and found[1][0] == "bfloat16"
    assert hub.asked == []


@pytest.mark.slow
def test_a_gated_repository(hub, expected):
    without, with_token = (
        load(hub, ("google/gated", FLOAT32)),
        load(hub, ("google/gated", FLOAT32), HF_TOKEN=TOKEN),
    )
    assert without == [
        f"google/gated is gated: accept its terms at {hub.endpoint}/google/gated, then log in with "
        "`hf auth login`, or set HF_TOKEN to the account that did."
    ]
    assert with_token == [["float32", expected, 271]]


def test_what_is_not_there(hub):
    hub.repositories["owner/words"] = {"main": {"README.md": b"# words"}}
    found = load(
        hub,
        "owner/none",
        ("owner/model", {"revision": "none"}),
        "owner/files/none.gguf",
        "owner/words",
    )
    assert found == [
        "There is nothing at owner/none: no folder here, and no repository of that name at "
        f"{hub.endpoint}. If it is private, log in with `hf auth login`, or set HF_TOKEN.",
        "owner/model has no revision 'none'; give a branch, a tag or a commit.",
        "owner/files has no such file on the hub.",
        "owner/words has no config.json on the hub. If it has .gguf files, load one of them as "
        "owner/words/NAME.gguf.",
    ]


@pytest.mark.slow
def test_a_hub_that_does_not_answer(hub):
    hub.down = True
    (message,) = load(hub, "owner/model")
    assert "owner/model" in message and ("503" in message or "cannot be reached" in message)
    (message,) = load(hub, "owner/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached; check the connection" in message


def test_a_config_alone(hub):
    code = "import sys, equigemma.checkpoint as c; print(len(c.load_config(sys.argv[1]).layers))"
    result = subprocess.run(
        [sys.executable, "-c", code, "owner/model"],
        env=hub.environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["7"], result.stderr
    assert not [path for _, path in hub.asked if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("google/gemma-3-1b-it", True),
        ("owner/name/file.gguf", True),
        ("owner/name.gguf", False),
        ("a/b/c", False),
        ("../x", False),
        ("/etc/passwd", False),
        ("owner/../x", False),
        ("owner/-x", False),
        ("-owner/x", False),
        ("owner\\name", False),
        ("owner", False),
        ("https://huggingface.co/a/b", False),
        ("a/b/../c.gguf", False),
        ("", False),
    ],
)
def test_what_may_be_a_name(source, expected):
    assert is_name(source) is expected
