"""Files of Gemma Scope 1 (`params.npz`) and Gemma Scope 2 (`params.safetensors`, `config.json`).

**Source:** Lieberum et al. 2024, arXiv:2408.05147, and the model cards of both.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from equigemma.interpret.sae._modules import JumpReLU
from equigemma.interpret.sae._splice import Place


def load(folder: str | Path, *, place: Place | None = None) -> tuple[JumpReLU, Place]:
    """An SAE or transcoder of Gemma Scope, and the sites that it reads and writes.

    **Arguments:** `folder`: with `params.npz` or `params.safetensors`; the latter needs the package
    safetensors. `place`: the sites, where neither `config.json` nor the path says them. Paths are
    those of the repositories, such as `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71` and
    `gemma-scope-2-270m-it/resid_post/layer_5_width_16k_l0_medium`.

    **Returns:** the weights in float32, and the place.

    **Raises:** `ValueError` for a folder that holds something else, for cross-layer transcoders,
    SAEs of embeddings and rescaled ones; `ImportError` without safetensors.
    """
    folder = Path(folder)
    place = place or _place(folder)
    tensors = {name.lower(): value for name, value in _tensors(folder).items()}
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not np.allclose(scaling, 1):
        raise ValueError(f"{folder}: scaling_factor is not 1, and rescaled SAEs are not supported.")
    skip = tensors.pop("affine_skip_connection", None)
    _check(folder, tensors)
    weights = {name: jnp.asarray(value, jnp.float32) for name, value in tensors.items()}
    return JumpReLU(**weights, skip=None if skip is None else jnp.asarray(skip, jnp.float32)), place


NAMES = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}


def _check(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    if set(tensors) != NAMES:
        raise ValueError(
            f"{folder} is no SAE of Gemma Scope: it should hold {sorted(NAMES)}, got "
            f"{sorted(tensors)}."
        )
    if tensors["w_dec"].ndim == 3:
        raise ValueError(
            f"{folder} is a cross-layer transcoder: it writes to several layers, which is not "
            "supported."
        )
    width, count = tensors["w_enc"].shape
    out = tensors["w_dec"].shape[-1]
    shapes = dict(
        w_enc=(width, count), w_dec=(count, out), b_enc=(count,), b_dec=(out,), threshold=(count,)
    )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: {name} should be {shape}, got {tensors[name].shape}.")


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / "params.npz").is_file():
        with np.load(folder / "params.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    if not (folder / "params.safetensors").is_file():
        raise ValueError(
            f"{folder} holds neither params.npz (Gemma Scope 1) nor params.safetensors (Gemma "
            "Scope 2)."
        )
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            'Gemma Scope 2 needs the package safetensors: pip install "equigemma[hf]".'
        ) from error
    return load_file(folder / "params.safetensors")


_HOOKS = {
    "output": "resid_post",
    "self_attn.o_proj.input": "z",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "mlp_normed",
}
"""Hook points of `config.json`, by what follows `model.layers.N.`, as sites of `layers.N.`."""


def _place(folder: Path) -> Place:
    config = folder / "config.json"
    if config.is_file():
        data: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        if data.get("architecture", "jump_relu") != "jump_relu":
            raise ValueError(
                f"{config}: architecture must be jump_relu, got {data['architecture']}."
            )
        reads = _site(str(data.get("hf_hook_point_in")))
        out = data.get("hf_hook_point_out")
        return Place(reads, reads if out is None else _site(out))
    return _place_of_path(folder.resolve())


def _site(hook: str) -> str:
    found = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", hook)
    if found is None or found[2] not in _HOOKS:
        raise ValueError(f"{hook} is no hook point that is known; pass `place=`.")
    return f"layers.{found[1]}.{_HOOKS[found[2]]}"


def _place_of_path(path: Path) -> Place:
    text = "/".join(path.parts[-5:])
    layer = re.search(r"layer_(\d+)", text)
    if layer is None or "embedding" in text:
        raise ValueError(f"{path}: no layer is named by this path; pass `place=`.")
    name = f"layers.{layer[1]}"
    if (path / "params.npz").is_file():
        # Of Gemma Scope 1 the repository says what it is.
        kinds = {"-res": "resid_post", "-mlp": "mlp_out", "-att": "z"}
        if "-transcoders" in text:
            return Place(f"{name}.mlp_normed", f"{name}.mlp_out", without_weight=True)
        sites = [site for kind, site in kinds.items() if re.search(rf"{kind}(?:/|$)", text)]
    else:
        kinds = {"resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out"}
        if re.search(r"(?:^|/)transcoder", text):
            return Place(f"{name}.mlp_normed", f"{name}.mlp_out")
        sites = [site for kind, site in kinds.items() if re.search(rf"(?:^|/){kind}", text)]
    if len(sites) != 1:
        raise ValueError(f"{path}: no site is named by this path; pass `place=`.")
    return Place(f"{name}.{sites[0]}", f"{name}.{sites[0]}")
