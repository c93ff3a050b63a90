"""Damaged files of every kind: each loads, or ends in one of our errors, and does nothing else.

    python tests/_support/fuzz_files.py [--inputs 20000] [--seed 0]
    python tests/_support/fuzz_files.py --only gguf:123 --seed 0

A number and a kind name an input: it is made from them alone, so that it can be made again. It
fails if it crashes the process, takes longer than seconds, wants far more memory than its file has
bytes, raises anything but `CheckpointError`, runs what is in it, or reads outside of its folder.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import formats
import gguf_files
import jax
import numpy as np
import tiny

import equigemma as eg
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint._open import find, open_checkpoint, read_extras


SECONDS = 10
"""What an input may take; it takes some hundredths."""
MEMORY = 256 << 20
"""What an input may allocate; the largest file has a tenth of a megabyte."""
KINDS = ("gguf", "safetensors", "index", "config", "tokenizer.json", "tokenizer.model", "settings")
TEXT = "hello <table> é\n the <end_of_turn>"

# What damaged content must never bring about once everything is imported. `exec` and `compile` of
# code would be seen here too; chat templates are compiled in a sandbox, and not by these readers.
FORBIDDEN = ("exec", "compile", "import", "pickle.find_class", "marshal.loads", "socket.connect")
FORBIDDEN += (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "ctypes.dlopen",
)


class Failure(Exception):
    """An input did something that it must not."""


# What files are made from.


class Bases:
    """Files in order, and places to put damaged ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        tokenizer = formats.tokenizer()
        model = formats.model(formats.CONFIGS["gemma3"])
        eg.save(model, folder / "one", tokenizer=tokenizer)
        eg.save(model, folder / "several", tokenizer=tokenizer, shard_bytes=20_000)
        eg.save(model, folder / "x.gguf", tokenizer=tokenizer, dtype="q8_0")
        # Weights that an index may not reach: they are complete, so that reading them would do.
        shutil.copyfile(folder / "one/model.safetensors", folder / "outside.safetensors")
        self.files = [
            (folder / "x.gguf").read_bytes(),
            gguf_files.write(folder / "y.gguf").read_bytes(),
        ]
        for name in ("gemma4 small", "gemma4 experts"):
            path = folder / f"{name}.gguf"
            eg.save(formats.model(formats.NEWER[name]), path, tokenizer=tokenizer)
            self.files.append(path.read_bytes())
        self.folders = [folder / "one"]
        for name in ("gemma1 mqa", "gemma2"):
            self.folders.append(folder / name)
            eg.save(formats.model(formats.CONFIGS[name]), self.folders[-1])
        for name in ("gemma3n", "gemma4 small", "gemma4 experts"):
            self.folders.append(folder / name)
            eg.save(tiny.model(formats.in_files(name)), self.folders[-1])
        self.settings = {
            "tokenizer_config.json": {"chat_template": "{{ messages }}", "bos_token": "<bos>"},
            "generation_config.json": {"eos_token_id": [1, 106]},
        }

    def damaged(self, kind: str, number: int, seed: int) -> Path:
        """The file or folder with the damage that kind, number and seed stand for."""
        rng = random.Random(f"{seed}/{kind}/{number}")
        place = self.folder / "damaged"
        if kind == "gguf":
            path = place.with_suffix(".gguf")
            path.write_bytes(mutate_bytes(rng, rng.choice(self.files)))
            return path
        source = self.folder / ("several" if kind == "index" else "one")
        if kind == "config":
            source = rng.choice(self.folders)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        if kind in ("safetensors", "tokenizer.model"):
            if kind == "tokenizer.model":
                (place / "tokenizer.json").unlink()
            path = place / ("model.safetensors" if kind == "safetensors" else kind)
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
            return place
        if kind == "settings":
            name = rng.choice(sorted(self.settings))
            (place / name).write_text(json.dumps(self.settings[name]), encoding="utf-8")
        else:
            name = {"index": "model.safetensors.index.json", "config": "config.json"}.get(
                kind, kind
            )
        path = place / name
        if rng.random() < 0.25:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
            return place
        value = json.loads(path.read_bytes())
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = mutate_json(rng, value, str(self.folder))
        path.write_text(json.dumps(value), encoding="utf-8")
        return place


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few changes, most of them near the beginning, where the sizes are."""
    changed = bytearray(data)

    def somewhere() -> int:
        end = len(changed) if rng.random() < 0.4 else min(len(changed), rng.choice((64, 999, 9999)))
        return rng.randrange(max(end, 1))

    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = somewhere()
        match rng.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes(
                    [changed[at] ^ 1 << rng.randrange(8)] if changed else b""
                )
            case 2:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(changed), 2**40, 2**20))
                changed[at : at + size] = (number % 256**size).to_bytes(size, "little")
            case 3:
                del changed[at : at + rng.choice((1, 2, 8, 100))]
            case 4:
                changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 8, 99))))
            case 5:
                other = somewhere()
                size = rng.choice((4, 8, 64))
                changed[at : at + size] = changed[other : other + size]
            case 6:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def odd_value(rng: random.Random, folder: str) -> Any:
    return rng.choice(
        [
            *(None, True, False, 0, 1, -1, 2, 3, 7, 31, 0.5, -0.5, 1e308, float("nan")),
            *(float("inf"), 2**31, 2**63, 10**40, "", "x", "0", "\ud800", "\0", "gemma2", "gemma3"),
            *(
                "../outside.safetensors",
                f"{folder}/outside.safetensors",
                "/etc/passwd",
                "/dev/zero",
            ),
            *("C:\\x.safetensors", "model.safetensors", "full_attention", "sliding_attention"),
            *([], [1], [[]], {}, {"x": 1}, [0] * 99, "a" * 9999, {"rope_type": "linear"}),
            nested(rng.choice((5, 500))),
        ]
    )


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(rng: random.Random, value: Any, folder: str) -> Any:
    """One change somewhere in the tree."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        return odd_value(rng, folder)
    is_object = isinstance(value, dict)
    copy: Any = dict(value) if is_object else list(value)
    key = rng.choice(list(copy)) if is_object else rng.randrange(len(copy))
    match rng.randrange(10):
        case 0:
            del copy[key]
        case 1 if is_object:
            copy[rng.choice(("x", "", str(rng.randrange(99)), f"{key}_"))] = copy[key]
        case 1:
            copy.insert(key, copy[rng.randrange(len(copy))])
        case 2 if is_object:
            other = rng.choice(list(copy))
            copy[key], copy[other] = copy[other], copy[key]
        case 3:
            copy[key] = odd_value(rng, folder)
        case 4 if isinstance(copy[key], int | float) and abs(copy[key]) < 1e9:
            copy[key] = copy[key] * rng.choice((-1, 2, 1000)) + rng.choice((0, 1))
        case _:
            copy[key] = mutate_json(rng, copy[key], folder)
    return copy


# What is done with them.


def read(path: Path) -> None:
    """Everything that loading, chatting and converting would read."""
    opened = open_checkpoint(path)
    for leaf in jax.tree.leaves(opened.model):
        array = np.asarray(leaf)
        assert array.shape == leaf.shape
    tokenizer = opened.tokenizer()
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode(TEXT))
        tokenizer.encode(TEXT, special=True)
    template = read_extras(find(path)).chat_template
    assert template is None or isinstance(template, str)


def check(path: Path, kind: str) -> str:
    """`loaded` or `refused`.

    **Raises:** `Failure` for everything else.
    """
    try:
        with watched(path):
            read(path)
    except CheckpointError as error:
        text = str(error)
        if not text or "Traceback" in text or len(text) > 20_000:
            raise Failure(f"an error that is no sentence: {text[:500]!r}") from error
        return "refused"
    except Failure:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(f"{type(error).__name__}: {error}"[:500]) from error
    if kind == "index" and "outside" in (path / "model.safetensors.index.json").read_text("utf-8"):
        listed = json.loads((path / "model.safetensors.index.json").read_bytes())["weight_map"]
        if any("outside" in str(name) for name in listed.values()):
            raise Failure("a file outside of its folder was read")
    return "loaded"


_watch: dict[str, Any] = {"path": None}


def _audit(event: str, arguments: tuple) -> None:
    folder = _watch["path"]
    if folder is None:
        return
    if event in FORBIDDEN:
        raise Failure(f"{event} {arguments!r:.200}")
    if event == "open" and isinstance(arguments[0], str | bytes):
        name = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
        # Sources are read for the text of a traceback.
        if not name.startswith((folder, "/proc/", "/sys/")) and not name.endswith(".py"):
            raise Failure(f"opens {name!r:.200}")
        mode = arguments[1]
        if isinstance(mode, str) and set(mode) & set("wax+"):
            raise Failure(f"writes {name!r:.200}")


@contextmanager
def watched(path: Path) -> Iterator[None]:
    """With an eye on time, and on what is opened, run and imported."""

    def late(*_: Any) -> None:
        raise Failure(f"takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watch["path"] = str(path)
    try:
        yield
    finally:
        _watch["path"] = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def warm_up(bases: Bases) -> None:
    """Reads all bases: what is imported or compiled by our own code is so now."""
    sys.addaudithook(_audit)
    several, one = bases.folder / "several", bases.folder / "one"
    for path in (*bases.folder.glob("*.gguf"), several, *bases.folders):
        read(path)
    model = one / "tokenizer.model"
    eg.tokenizers.SentencePieceTokenizer.from_file(model).encode(TEXT)
    # Also the ways that errors take.
    for kind in KINDS:
        for number in range(40):
            try:
                read(bases.damaged(kind, -1 - number, 0))
            except CheckpointError:
                pass


def limit_memory() -> None:
    """From now on, a process that asks for much more gets a `MemoryError`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def run_all(bases: Bases, numbers: Iterator[int], seed: int, report: Callable[[str], None]) -> None:
    """Checks inputs; `report` gets a line before and after each."""
    for number in numbers:
        kind = KINDS[number % len(KINDS)]
        report(f"begin {kind}:{number}")
        try:
            outcome = check(bases.damaged(kind, number, seed), kind)
        except Failure as failure:
            cause = failure.__cause__ or failure
            where = "".join(traceback.format_tb(cause.__traceback__)[-3:])
            outcome = "FAILED " + json.dumps(f"{failure}\n{where}")
        report(f"end {kind} {outcome}")


def work(first: int, last: int, step: int, seed: int) -> None:
    """One process: its share of the inputs."""
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        warm_up(bases)
        limit_memory()
        numbers = iter(range(first, last, step))
        run_all(bases, numbers, seed, lambda line: print(line, flush=True))


def follow(first: int, last: int, step: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Kind, name and outcome of each input of a process that is begun again where it dies."""
    while first < last:
        command = [
            sys.executable,
            __file__,
            "--work",
            f"{first},{last},{step}",
            "--seed",
            str(seed),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            begun = ""
            for line in process.stdout:
                word, _, rest = line.strip().partition(" ")
                if word == "begin":
                    begun = rest
                elif word == "end":
                    kind, _, outcome = rest.partition(" ")
                    yield kind, begun, outcome
                    begun, first = "", int(begun.split(":")[1]) + step
        if begun:
            yield begun.split(":")[0], begun, f'FAILED "crashes: exit code {process.returncode}"'
            first = int(begun.split(":")[1]) + step
        elif process.returncode:
            sys.exit(f"A process ended with code {process.returncode} between two inputs.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one input, as a failure names it: KIND:NUMBER")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*map(int, options.work.split(",")), options.seed)
        return
    if options.only:
        kind, number = options.only.split(":")
        with tempfile.TemporaryDirectory() as folder:
            bases = Bases(Path(folder))
            warm_up(bases)
            print(check(bases.damaged(kind, int(number), options.seed), kind))
        return
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = 0
    begun = time.monotonic()
    for kind, name, outcome in follow(0, options.inputs, 1, options.seed):
        outcomes[kind, outcome.split()[0]] += 1
        if outcome.startswith("FAILED"):
            failures += 1
            print(f"{name}: {json.loads(outcome.removeprefix('FAILED '))}", flush=True)
        if sum(outcomes.values()) % 2000 == 0:
            print(
                f"{sum(outcomes.values())} inputs, {failures} failed", file=sys.stderr, flush=True
            )
    for kind in KINDS:
        loaded, refused = (outcomes[kind, outcome] for outcome in ("loaded", "refused"))
        print(
            f"{kind:16} {loaded:6} loaded {refused:6} refused {outcomes[kind, 'FAILED']:4} failed"
        )
    total = sum(outcomes.values())
    print(f"{total} inputs of seed {options.seed} in {time.monotonic() - begun:.0f} s")
    sys.exit(1 if failures or total != options.inputs else 0)


if __name__ == "__main__":
    main()
