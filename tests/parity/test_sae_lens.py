"""Sparse autoencoders and transcoders as `sae-lens` computes them, where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from equigemma.interpret import sae


torch = pytest.importorskip("torch", reason="sae-lens runs on torch, which is not installed")
pytest.importorskip("sae_lens", reason="sae-lens is not installed; it needs an environment apart")

from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402
from sae_lens.saes import gated_sae, jumprelu_sae, topk_sae, transcoder  # noqa: E402


D, OUT, N = 13, 17, 29
# Float32 on both sides, sums of 29 terms.
CLOSE = dict(rtol=0, atol=1e-4)
OFF = dict(apply_b_dec_to_input=False, normalize_activations="none", dtype="float32", device="cpu")


def draw(**shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def weights(out=D, **others) -> dict[str, np.ndarray]:
    return draw(w_enc=(D, N), w_dec=(N, out), b_dec=(out,), **others)


def theirs(kind, config, w):
    """Their module with our weights, under their names."""
    module = kind(config)
    upper = {name.replace("w_", "W_"): torch.tensor(value) for name, value in w.items()}
    module.load_state_dict(upper, strict=True)
    return module.eval()


def check(ours, module, w):
    x = np.random.default_rng(1).normal(size=(3, 5, D)).astype(np.float32)
    with torch.no_grad():
        features = module.encode(torch.tensor(x))
        if features.is_sparse:
            features = features.to_dense()
        again = module(torch.tensor(x))
    assert 0.05 < (features > 0).float().mean() < 0.95
    np.testing.assert_allclose(ours.encode(jnp.asarray(x)), features.numpy(), **CLOSE)
    np.testing.assert_allclose(ours(jnp.asarray(x)), again.numpy(), **CLOSE)


def arrays(w):
    return {name: jnp.asarray(value) for name, value in w.items()}


def test_jump_relu():
    w = weights(b_enc=(N,), threshold=(N,))
    config = jumprelu_sae.JumpReLUSAEConfig(d_in=D, d_sae=N, **OFF)
    check(sae.JumpReLU(**arrays(w)), theirs(jumprelu_sae.JumpReLUSAE, config, w), w)


def test_gated():
    w = weights(b_gate=(N,), b_mag=(N,), r_mag=(N,))
    config = gated_sae.GatedSAEConfig(d_in=D, d_sae=N, **OFF)
    check(sae.Gated(**arrays(w)), theirs(gated_sae.GatedSAE, config, w), w)


def test_top_k():
    w = weights(b_enc=(N,))
    config = topk_sae.TopKSAEConfig(d_in=D, d_sae=N, k=5, **OFF)
    check(sae.TopK(**arrays(w), k=5), theirs(topk_sae.TopKSAE, config, w), w)


def test_transcoder():
    w = weights(OUT, b_enc=(N,), threshold=(N,))
    config = transcoder.JumpReLUTranscoderConfig(d_in=D, d_out=OUT, d_sae=N, **OFF)
    check(sae.JumpReLU(**arrays(w)), theirs(transcoder.JumpReLUTranscoder, config, w), w)


def test_affine_transcoder():
    w = weights(OUT, b_enc=(N,), threshold=(N,), skip=(D, OUT))
    config = transcoder.JumpReLUSkipTranscoderConfig(d_in=D, d_out=OUT, d_sae=N, **OFF)
    named = {name: value for name, value in w.items() if name != "skip"} | {"w_skip": w["skip"].T}
    module = theirs(transcoder.JumpReLUSkipTranscoder, config, named)
    check(sae.JumpReLU(**arrays(w)), module, w)


@pytest.mark.parametrize("generation", [1, 2])
def test_files(generation, tmp_path, monkeypatch):
    """The same folder, read by their loader and by ours."""
    w = weights(b_enc=(N,), threshold=(N,))
    if generation == 1:
        repository, name = "google/gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_71"
        folder = tmp_path / repository / name
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{k.replace("w_", "W_"): v for k, v in w.items()})
        load = loaders.gemma_2_sae_huggingface_loader
    else:
        numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
        repository, name = "google/gemma-scope-2-270m-it", "resid_post/layer_1_width_16k_l0_small"
        folder = tmp_path / repository / name
        folder.mkdir(parents=True)
        numpy.save_file(w, folder / "params.safetensors")
        load = loaders.gemma_3_sae_huggingface_loader
        monkeypatch.setattr(
            loaders, "get_safetensors_tensor_shapes", lambda *_: {k: v.shape for k, v in w.items()}
        )

    def local(repo_id, filename, subfolder=None, **_):
        path = tmp_path / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    options, state, _ = load(repository, name, cfg_overrides={"d_in": D, "d_sae": N})
    assert options["apply_b_dec_to_input"] is False
    ours, place = sae.load(folder)
    assert options["hook_name"] == "blocks.1.hook_resid_post"
    assert place == sae.Place("layers.1.resid_post", "layers.1.resid_post")
    config = jumprelu_sae.JumpReLUSAEConfig(d_in=D, d_sae=N, **OFF)
    module = jumprelu_sae.JumpReLUSAE(config)
    module.load_state_dict(state, strict=True)
    check(ours, module.eval(), w)
