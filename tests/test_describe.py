"""What is said about a config: tables by hand, counts by hand, bytes against real caches."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import tiny

import equigemma as eg
from equigemma._describe import _letter, _repeated, _runs, cache_bytes, describe, parameter_counts
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.config import (
    DensePlusMoEConfig,
    KeyIsValueConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    SharedKVConfig,
)


def test_table_by_hand():
    # Two kinds of layer, a soft-cap column because one of them has one, no column for keys.
    config = tiny.model_config(
        tiny.layer(window=5, softcap=2.5),
        tiny.layer(
            heads=10,
            kv_heads=1,
            qk_norm=True,
            post_norm=True,
            rope=RopeConfig(theta=1e6, scale=8.0, proportion=0.4),
        ),
        final_softcap=30.0,
    )
    # 416 outside of the layers, then 3029 and 3595.
    heading, order, blank, *table = describe(config).splitlines()
    assert heading == "vocabulary 31, width 13, 7,040 parameters, logits capped at 30"
    assert (order, blank) == ("2 layers: a, b", "")
    assert "\n".join(table) == TABLE


TABLE = """\
kind  count  heads  head size  window  rope                  soft-cap  feed-forward  norms
a         1    6/3         10       5  10,000                     2.5            17  pre
b         1   10/1         10     all  1,000,000 / 8 on 40%         -            17  pre post query key"""  # noqa: E501


def test_shared_keys_and_experts_are_told():
    owner = tiny.layer(heads=3, kv_heads=1)
    tied = replace(owner, attention=replace(owner.attention, kv=KeyIsValueConfig(heads=1)))
    experts = DensePlusMoEConfig(
        dense=owner.ffw, moe=MoEConfig(num_experts=7, num_experts_per_token=2, hidden_dim=11)
    )
    sharing = replace(
        owner,
        attention=replace(
            owner.attention, kv=SharedKVConfig(layer=1), v_norm=NormConfig(offset=None)
        ),
        ffw=experts,
    )
    lines = describe(tiny.model_config(owner, tied, sharing)).splitlines()
    assert [line.split("  ")[0] for line in lines[4:]] == ["a", "b", "c"]
    assert "also values" in lines[5] and "of layer 1" in lines[6]
    assert "17 + 2 of 7 x 11" in lines[6]
    assert lines[6].endswith("  pre")  # the norms of keys and values are the owner's
    assert "3/1" in lines[6]


def test_what_a_token_sees_ahead_is_told():
    # Gemma 4 31B: the rest of its image in local layers only.
    lines = describe(eg.variants.get("gemma4-31b")).splitlines()
    assert "  ahead  " in lines[3] and lines[4].count("its image") == 1
    assert "its image" not in lines[5] and "ahead" not in describe(tiny.GEMMA3)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("gemma1-2b", "18 layers: 18 a"),
        ("gemma2-27b", "46 layers: 23 x (a, b)"),
        ("gemma3-270m", "18 layers: 3 x (5 a, b)"),
        ("gemma3-27b", "62 layers: 10 x (5 a, b), 2 a"),
    ],
)
def test_order_of_layers(name, order):
    assert describe(eg.variants.get(name)).splitlines()[1] == order


@pytest.mark.parametrize(
    ("letters", "words"),
    [
        ("a", "a"),
        ("aaa", "3 a"),
        ("abab", "2 x (a, b)"),
        ("aabaab", "2 x (2 a, b)"),
        ("abcabcaabb", "2 x (a, b, c), 2 a, 2 b"),
        ("ababcdcd", "2 x (a, b), 2 x (c, d)"),
        ("aababb", "2 a, b, a, 2 b"),
    ],
)
def test_repetitions(letters, words):
    assert _repeated(_runs(list(letters))) == words


def test_letters_go_on_after_z():
    assert [_letter(number) for number in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]


def test_parameters_by_hand():
    # Vocabulary 31, width 13, hidden 17; heads 6, key/value heads 3, head size 10.
    config = tiny.model_config(tiny.layer(qk_norm=True, post_norm=True))
    assert parameter_counts(config) == {
        "embedding": 31 * 13,
        "attention": 6 * 13 * 10 + 2 * 3 * 13 * 10 + 6 * 10 * 13,
        "feed-forward": 2 * 13 * 17 + 17 * 13,
        "norms": 4 * 13 + 2 * 10 + 13,
        "total": 403 + 2340 + 663 + 85,
    }


@pytest.mark.parametrize("name", ["gemma1-2b", "gemma2-2b", "gemma3-270m"])
def test_parts_add_up(name):
    parts = parameter_counts(eg.variants.get(name))
    total = parts.pop("total")
    assert sum(parts.values()) == total
    assert min(parts.values()) > 0


@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16"])
@pytest.mark.parametrize("length", [3, 11])
def test_cache_bytes(dtype, length):
    # A window of 5 and a layer without one, 3 key/value heads of 10, keys and values.
    size = jnp.dtype(dtype).itemsize
    token = 2 * 3 * 10 * size
    assert cache_bytes(tiny.GEMMA3, length, dtype) == (min(5, length) + length) * token
    assert cache_bytes(tiny.GEMMA3, length, dtype, ring=False) == 2 * length * token
    cache = eg.init_cache(tiny.GEMMA3, capacity=length, dtype=jnp.dtype(dtype))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    assert cache_bytes(tiny.GEMMA3, length, dtype) == held


@pytest.mark.slow
@pytest.mark.parametrize("name", eg.variants.names())
def test_numbers_of_every_variant(name):
    config = eg.variants.get(name)
    parts = parameter_counts(config)
    assert parts["embedding"] == config.vocab * config.width
    assert sum(parts.values()) == 2 * parts["total"]
    assert parts.get("vision", 0) == sum(
        leaf.size for leaf in jax.tree.leaves(skeleton(config).vision)
    )
    for length in (4_096, 32_768, 131_072):
        ring = full = 0
        for layer in config.layers:
            attention = layer.attention
            if isinstance(attention.kv, SharedKVConfig):
                continue  # it looks at another layer's
            token = 2 * attention.kv.heads * attention.head_dim * 2  # keys and values in bfloat16
            full += length * token
            ring += min(length, attention.window or length) * token
        if name.startswith("embeddinggemma"):
            ring = full = 0  # it is bidirectional
        assert cache_bytes(config, length) == ring
        assert cache_bytes(config, length, ring=False) == full
        assert ring <= full


def test_published_sizes():
    # arXiv:2503.19786, table 1: a tower of 417M; the projection to the text has 3M more.
    assert parameter_counts(eg.variants.get("gemma3-4b"))["vision"] == 416_866_032 + 1152 * 2561
    # 10 of 62 layers see all: 16 heads of 128, keys and values, 2 bytes, and 52 windows of 1024.
    token = 2 * 16 * 128 * 2
    assert cache_bytes(eg.variants.get("gemma3-27b"), 131_072) == token * (10 * 131_072 + 52 * 1024)


def test_the_published_size_of_embeddinggemma():
    # arXiv:2509.20354: 308M, of them 4.7M in the linear maps from 768 to 3072 and back.
    parts = parameter_counts(eg.variants.get("embeddinggemma-300m"))
    layer = 2 * 768 * 768 + 2 * 256 * 768 + 3 * 768 * 1152  # attention, feed-forward
    norms = 24 * (4 * 768 + 2 * 256) + 768
    assert parts["total"] == 262_144 * 768 + 24 * layer + norms == 302_863_104
    embedder = eqx.filter_eval_shape(
        eg.Embedder, eg.variants.get("embeddinggemma-300m"), key=jax.random.key(0)
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(embedder)]
    assert sum(sizes) == 302_863_104 + 2 * 768 * 3072 == 307_581_696


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one token, got capacity=0"):
        cache_bytes(tiny.GEMMA3, 0)
