"""Values at sites, and logits of patched models: those of plain hooks in `transformers`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from equigemma import interpret


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from parity import test_gemma3n_and_4 as newer  # noqa: E402
from parity import test_transformers as older  # noqa: E402


# Both sum in float32 in orders of their own; values reach 30 behind the first layers.
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)
GEMMA4 = ["gemma4, small", "gemma4, experts"]
LAYER = 1


@pytest.fixture(scope="module", params=["gemma2", "gemma3", *GEMMA4])
def pair(request, tmp_path_factory):
    if request.param in older.CASES:
        return older.pair(request.param)
    return newer.pair(request.param, tmp_path_factory.mktemp("folders"))


@cache
def tokens() -> np.ndarray:
    return newer.text(2, newer.LENGTH)


def heads(x, size: int):
    return x.reshape(*x.shape[:2], -1, size)


def hooks(theirs, ours) -> dict[str, tuple[str, str, Callable]]:
    """Of sites of one layer: their module, whether before or after it, and the shape."""
    layer, head_dim = f"model.layers.{LAYER}", ours.config.layers[LAYER].attention.head_dim
    flat = lambda x: x  # noqa: E731
    by_head = lambda x: heads(x, head_dim)  # noqa: E731
    places = {
        "resid_pre": (layer, "input", flat),
        "attn_normed": (f"{layer}.input_layernorm", "output", flat),
        "q": (f"{layer}.self_attn.q_proj", "output", by_head),
        "k": (f"{layer}.self_attn.k_proj", "output", by_head),
        "z": (f"{layer}.self_attn.o_proj", "input", by_head),
        "attn_out": (f"{layer}.post_attention_layernorm", "output", flat),
        "resid_mid": (f"{layer}.pre_feedforward_layernorm", "input", flat),
        "mlp_post": (f"{layer}.mlp.down_proj", "input", flat),
        "mlp_out": (f"{layer}.post_feedforward_layernorm", "output", flat),
        "per_layer_input": (f"{layer}.per_layer_projection", "input", flat),
        "router": (f"{layer}.router.proj", "output", flat),
        "resid_post": (layer, "output", flat),
    }
    there = dict(theirs.named_modules())
    names = interpret.sites(ours)
    # Their hidden units times the per-layer input are the input of the projection after it.
    del places["per_layer_input"]
    return {
        name: place
        for name, place in places.items()
        if f"layers.{LAYER}.{name}" in names and place[0] in there
    }


def their_run(theirs, places, changes: dict[str, Callable]) -> tuple[np.ndarray, dict]:
    """Logits and the values at places, those of changed ones as they are after the change."""
    modules, values, handles = dict(theirs.named_modules()), {}, []

    def on(name, slot):
        def change(value):
            first = value[0] if isinstance(value, tuple) else value
            first = changes.get(name, lambda x: x)(first)
            values[name] = first.detach().numpy()
            return (first, *value[1:]) if isinstance(value, tuple) else first

        if slot == "input":
            return lambda module, args: change(args)
        return lambda module, args, result: change(result)

    for name, (path, slot, _) in places.items():
        register = "register_forward_pre_hook" if slot == "input" else "register_forward_hook"
        handles.append(getattr(modules[path], register)(on(name, slot)))
    positions = newer.in_order(2)
    logits = newer.their_logits(theirs, tokens(), positions)
    for handle in handles:
        handle.remove()
    return logits, values


@pytest.mark.slow
def test_activations(pair):
    theirs, ours = pair
    places = hooks(theirs, ours)
    assert {"resid_pre", "q", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"} <= set(places)
    _, expected = their_run(theirs, places, {})
    names = [f"layers.{LAYER}.{name}" for name in places]
    _, found = interpret.activations(lambda m: m(tokens()).logits, ours, names)
    for name, (_, _, shaped) in places.items():
        value = np.asarray(found[f"layers.{LAYER}.{name}"])
        np.testing.assert_allclose(value, shaped(expected[name]).reshape(value.shape), **CLOSE)


@pytest.mark.slow
def test_patched_logits(pair):
    theirs, ours = pair
    places = hooks(theirs, ours)
    plain = newer.their_logits(theirs, tokens(), newer.in_order(2))
    # Of `resid_mid` a hook could change what the feed-forward reads only, not the stream; their
    # router has the tokens of all rows on one axis.
    for name in sorted(set(places) - {"resid_mid", "router"}):

        def change(x):
            x = x.clone()
            x[:, 3] = x[:, 3].flip(-1) / 2 if name != "q" and name != "k" else 0.25
            return x

        expected, _ = their_run(theirs, {name: places[name]}, {name: change})
        ours_change = 0.25 if name in ("q", "k") else lambda x: x[..., ::-1] / 2
        if name == "z":
            ours_change = lambda x: x[..., ::-1, ::-1] / 2  # noqa: E731
        changes = {f"layers.{LAYER}.{name}": interpret.at(ours_change, positions=[3])}
        found = interpret.patch(lambda m: m(tokens()).logits, ours, changes)
        np.testing.assert_allclose(found, expected, **CLOSE)
        assert np.abs(expected - plain).max() > 1e-3, name


def test_patterns(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens()), output_attentions=True).attentions
    _, found = interpret.activations(lambda m: m(tokens()), ours, ["layers.*.pattern"])
    assert len(expected) == len(found) == len(ours.layers)
    for one, other in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), **CLOSE)
