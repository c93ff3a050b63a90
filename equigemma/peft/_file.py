"""The tensors of an adapter file, each under one name however it was written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equigemma.checkpoint import CheckpointError
from equigemma.peft._names import ROOT, bare


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DOWN, UP, MAGNITUDE = ".lora_A", ".lora_B", ".lora_magnitude_vector"
EMBEDDING_DOWN, EMBEDDING_UP, ROWS = ".lora_embedding_B", ".lora_embedding_A", ".token_adapter"
BASE = ".base_layer"

# The name of the adapter is left out when PEFT saves, and there when others do.
_LORA = re.compile(
    r"(?P<module>.+)(?P<kind>\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<end>weight|bias))?"
)
_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<end>[^.]+)")
_ROWS = re.compile(
    r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?"
)


@dataclass
class AdapterFile:
    """What is not used yet of a file: tensors by their names here."""

    tensors: dict[str, np.ndarray]
    modules: dict[str, str]
    """What a module is called in the file, without its root, by its name here."""

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> np.ndarray:
        """A tensor in float32.

        **Raises:** `CheckpointError` if it is not there.
        """
        if name not in self.tensors:
            end = ".weight" if name.endswith((DOWN, UP)) else ""
            raise CheckpointError(f"{name}{end} is missing.")
        return self.tensors.pop(name).astype(np.float32)

    def called(self, module: str) -> str:
        """The name of a module by which the file's own config knows it."""
        return self.modules.get(module, module)


def read_file(path: Path) -> AdapterFile:
    """Every tensor of a file.

    **Raises:** `CheckpointError` if it is damaged, or holds several adapters.
    """
    library = safetensors()
    file, adapters = AdapterFile({}, {}), set()
    try:
        with library.safe_open(path, "numpy") as opened:
            for key in opened.keys():
                name, module, adapter = _name(key)
                if name in file.tensors:
                    raise CheckpointError(f"it holds {name} twice.")
                file.tensors[name] = np.asarray(opened.get_tensor(key))
                file.modules[bare(module)] = module.removeprefix(ROOT)
                adapters.add(adapter)
    except library.SafetensorError as error:
        raise CheckpointError(f"{path.name} is cut off or damaged: {error}.") from error
    if len(adapters - {None}) > 1:
        raise CheckpointError(
            f"it holds several adapters, {' and '.join(sorted(adapters - {None}))}; save one alone."
        )
    return file


def _name(key: str) -> tuple[str, str, str | None]:
    """The name here, the module in the file, and the adapter."""
    if match := _LORA.fullmatch(key):
        module, end = match["module"], ".bias" if match["end"] == "bias" else ""
        return f"{bare(module)}{match['kind']}{end}", module, match["adapter"]
    if match := _ROWS.fullmatch(key):
        return f"{bare(match['module'])}{ROWS}", match["module"], match["adapter"]
    if match := _WHOLE.fullmatch(key):
        return f"{bare(match['module'])}.{match['end']}", match["module"], match["adapter"]
    return bare(key), key.rpartition(".")[0], None


def adapted(file: AdapterFile) -> Iterator[str]:
    """The modules that there are low-rank adapters for."""
    for name in file.tensors:
        for kind in (DOWN, EMBEDDING_DOWN):
            if name.endswith(kind):
                yield name.removesuffix(kind)


def safetensors() -> Any:
    """The library, if it is installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Adapters in files need the package safetensors, which is not installed: "
            'pip install "equigemma[hf]".'
        ) from error
    return safetensors
