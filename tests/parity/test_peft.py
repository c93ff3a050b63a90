"""Adapters of `peft` here, and ours there: the same logits."""

import equinox as eqx
import jax
import numpy as np
import pytest
import tiny

from equigemma import lora, peft


torch = pytest.importorskip("torch", reason="peft runs on torch, which is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
theirs_of_adapters = pytest.importorskip("peft", reason="peft is not installed")

from parity.test_transformers import (  # noqa: E402
    CASES,
    LENGTH,
    build,
    config_of,
    give,
    in_order,
    text,
    their_logits,
)


# peft asks transformers for something by a name that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

# Sums in float32 in another order; logits reach 20, and adapters make them larger.
CLOSE = dict(rtol=1e-4, atol=1e-4)
NAMES = ["gemma1, a key head for each", "gemma2", "gemma3"]
EVERYTHING = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
KINDS = {
    "lora": {"target_modules": EVERYTHING},
    "dora": {"target_modules": EVERYTHING, "use_dora": True},
    "rslora": {"target_modules": EVERYTHING, "use_rslora": True},
    "usual places, other ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.v_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 11},
    },
}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pair(name: str):
    """Theirs is changed by adapters, so each test has its own."""
    theirs = build(CASES[name]())
    ours = tiny.model(config_of(theirs.config))
    give(ours, theirs)
    return theirs, ours


def logits(model) -> np.ndarray:
    return np.asarray(tiny.run(model, tiny.host(text(2, LENGTH), np.int32)).logits)


def of_theirs(model) -> np.ndarray:
    return their_logits(model, text(2, LENGTH), in_order(2, LENGTH))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_peft_wrote(name, kind, tmp_path):
    theirs, ours = pair(name)
    config = theirs_of_adapters.LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False, **KINDS[kind]
    )
    torch.manual_seed(0)
    adapted = theirs_of_adapters.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "magnitude" in parameter_name:
                parameter.mul_(1.3)
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    expected = of_theirs(adapted)
    assert np.abs(expected - logits(ours)).max() > 0.1
    np.testing.assert_allclose(logits(peft.load(tmp_path / "a", ours)), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_is_written_here(name, kind, tmp_path):
    theirs, ours = pair(name)
    model = lora.add(ours, rank=3, alpha=5.0, key=jax.random.key(0), kind=kind)
    rng = np.random.default_rng(2)
    adapters, rest = lora.split(model)
    adapters = jax.tree.map(
        lambda leaf: tiny.host(rng.normal(size=leaf.shape) * 0.3 + 0.1, leaf.dtype), adapters
    )
    model = eqx.combine(adapters, rest)
    peft.save(model, tmp_path / "a")
    adapted = theirs_of_adapters.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    expected = logits(model)
    assert np.abs(expected - logits(ours)).max() > 0.1
    np.testing.assert_allclose(of_theirs(adapted), expected, **CLOSE)
