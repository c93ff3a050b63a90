"""Attribution graphs against `circuit-tracer` on a tiny Gemma 2 with random transcoders.

It wants other versions of `transformers` and `huggingface_hub` than the rest of these tests, so
that the gate does not install it. By hand, in an environment of its own:

    pip install circuit-tracer==0.5.0 torch==2.13.0 -e ".[test]"
    pytest -m "" tests/parity/test_circuit_tracer.py
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma.interpret import graph, sae


torch = pytest.importorskip("torch", reason="circuit-tracer runs on torch, which is not installed")
pytest.importorskip("circuit_tracer", reason="circuit-tracer is not installed")

from circuit_tracer.attribution.attribute import attribute  # noqa: E402
from circuit_tracer.graph import prune_graph  # noqa: E402
from circuit_tracer.replacement_model import (  # noqa: E402
    replacement_model_transformerlens as replacement,
)
from circuit_tracer.transcoder.activation_functions import JumpReLU  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import (  # noqa: E402
    SingleLayerTranscoder,
    TranscoderSet,
)
from transformer_lens import HookedTransformerConfig  # noqa: E402


D, N, HEAD_DIM, WINDOW, LAYERS = 12, 23, 6, 64, 3
TOKENS = np.array([2, 7, 11, 3, 19, 5])


def ours():
    layers = [
        tiny.layer(
            window=None if index % 2 else WINDOW,
            softcap=50.0,
            post_norm=True,
            heads=4,
            kv_heads=2,
            head_dim=HEAD_DIM,
        )
        for index in range(LAYERS)
    ]
    return tiny.model(replace(tiny.model_config(*layers, final_softcap=30.0), width=D))


def weights(affine):
    def of_layer(layer):
        rng = np.random.default_rng(layer)
        shapes = dict(w_enc=(D, N), w_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,))
        if affine:
            shapes["skip"] = (D, D)
        drawn = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
        # Below 0 theirs has negative features, and Gemma Scope's formula none.
        return drawn | {"threshold": np.abs(drawn["threshold"])}

    return [of_layer(layer) for layer in range(LAYERS)]


class Tokenizer:
    all_special_ids, bos_token_id, pad_token_id, eos_token_id = [2], 2, 0, 1
    padding_side, vocab_size = "right", tiny.VOCAB

    def decode(self, tokens, **options):
        return str(tokens)

    def __len__(self):
        return tiny.VOCAB


def tensor(x):
    return torch.tensor(np.array(x))


def theirs(model, parts, reads):
    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_ctx=WINDOW,
        d_head=HEAD_DIM,
        n_heads=4,
        n_key_value_heads=2,
        d_mlp=tiny.HIDDEN,
        d_vocab=tiny.VOCAB,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=HEAD_DIM,
        eps=1e-6,
        gated_mlp=True,
        attn_scores_soft_cap=50.0,
        output_logits_soft_cap=30.0,
        use_normalization_before_and_after=True,
        final_rms=True,
        attn_scale=HEAD_DIM**0.5,
        window_size=WINDOW,
        use_local_attn=True,
        attn_types=["local", "global", "local"],
        dtype=torch.float32,
        model_name="tiny",
        device="cpu",
    )
    run = replacement.TransformerLensReplacementModel(config)
    state = {
        "embed.W_E": tensor(model.embedding.weight) * D**0.5,
        "unembed.W_U": tensor(model.embedding.weight).T,
        "ln_final.w": 1 + tensor(model.final_norm.scale),
    }
    for index, block in enumerate(model.layers):
        kv, gate = block.attention.projection.kv.weight, np.asarray(block.ffw.gate.weight)
        norms = dict(
            ln1=block.pre_attention_norm,
            ln1_post=block.post_attention_norm,
            ln2=block.pre_ffw_norm,
            ln2_post=block.post_ffw_norm,
        )
        own = {
            "attn.W_Q": tensor(block.attention.projection.q.weight),
            "attn._W_K": tensor(kv[0]),
            "attn._W_V": tensor(kv[1]),
            "attn.W_O": tensor(block.attention.output.weight),
            "mlp.W_gate": tensor(gate[0]).T,
            "mlp.W_in": tensor(gate[1]).T,
            "mlp.W_out": tensor(block.ffw.down.weight),
        } | {f"{name}.w": 1 + tensor(norm.scale) for name, norm in norms.items()}
        state |= {f"blocks.{index}.{name}": value for name, value in own.items()}
    assert not run.load_state_dict(state, strict=False).unexpected_keys
    affine, scopes = "skip" in parts[0], {}
    for index, part in enumerate(parts):
        active = JumpReLU(tensor(part["threshold"]), 0.1)
        scope = SingleLayerTranscoder(
            D, N, active, index, skip_connection=affine, dtype=torch.float32
        )
        with torch.no_grad():
            scope.W_enc.copy_(tensor(part["w_enc"]).T)
            for name in ("W_dec", "b_enc", "b_dec"):
                getattr(scope, name).copy_(tensor(part[name.lower()]))
            if affine:
                scope.W_skip.copy_(tensor(part["skip"]).T)
        scopes[index] = scope
    run._configure_replacement_model(TranscoderSet(scopes, reads, "hook_mlp_out"))
    run.tokenizer = Tokenizer()
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("most", [None, 40])
@pytest.mark.parametrize("reads", ["ln2.hook_normalized", "mlp.hook_in"])
def test_edges_and_pruning(reads, most, affine):
    model, parts = ours(), weights(affine)
    run = theirs(model, parts, reads)
    with torch.no_grad():
        logits = run(torch.tensor(TOKENS)[None])[0].numpy()
    np.testing.assert_allclose(model(TOKENS).logits, logits, rtol=0, atol=1e-4)
    expected = attribute(
        torch.tensor(TOKENS), run, max_n_logits=5, batch_size=4, max_feature_nodes=most
    )
    bare = reads == "ln2.hook_normalized"
    scopes = [
        (
            sae.JumpReLU(**{name: jnp.asarray(value) for name, value in part.items()}),
            sae.Place(f"layers.{index}.mlp_normed", f"layers.{index}.mlp_out", bare),
        )
        for index, part in enumerate(parts)
    ]
    options = dict(max_logits=5, batch=4, max_features=most)
    found = graph.attribute(model, scopes, jnp.asarray(TOKENS), **options)
    selected = expected.active_features[expected.selected_features]
    np.testing.assert_array_equal(found.features, selected.numpy())
    # Edges reach 150.
    np.testing.assert_allclose(found.adjacency, expected.adjacency_matrix, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.probabilities, expected.logit_probabilities, atol=1e-5)
    theirs_pruned, pruned = prune_graph(expected), graph.prune(found)
    np.testing.assert_array_equal(pruned.nodes, theirs_pruned.node_mask)
    np.testing.assert_array_equal(pruned.edges, theirs_pruned.edge_mask)
    assert 0 < pruned.edges.sum() < (found.adjacency != 0).sum()
