"""Vectors of texts against `transformers` and the steps of `sentence-transformers`, by hand.

A folder as that library lays it out: a tiny random Gemma 3 that looks ahead, and two linear maps.
"""

import copy
import json
from dataclasses import replace

import equinox as eqx
import formats
import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint._convert import convert
from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._tokenizer_files import write_tokenizer
from equigemma.checkpoint.gguf._metadata import describe_vocabulary
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.config import RopeConfig
from equigemma.embedding import EmbedderSettings
from equigemma.tokenizers._tokenizer_json import around_texts


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
save_file = pytest.importorskip("safetensors.numpy").save_file

from parity.test_checkpoints import llama, needs_llama  # noqa: E402


TOKENIZER = formats.tokenizer()
WIDTH, WIDE, WINDOW = 22, 37, 8
TEXTS = ["hello", "h", "hotel to hell, hello to the hotel: hell to hello", "tell me"]
LIBRARY = "sentence_transformers.models"
IDENTITY = "torch.nn.modules.linear.Identity"
MODULES = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]


def their_config():
    config = transformers.Gemma3TextConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=29,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        query_pre_attn_scalar=10,
        sliding_window=WINDOW,
        use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config._attn_implementation = "eager"
    return config


def change(path, values: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(folder, model) -> list[np.ndarray]:
    """The folder; returns the linear maps."""
    model.save_pretrained(folder)
    write_tokenizer(TOKENIZER, folder, Extras())
    bos, eos = TOKENIZER.special.bos, TOKENIZER.special.eos
    around = around_texts({"<bos>": bos}, {"<eos>": eos})
    change(folder / "tokenizer.json", {"post_processor": around})
    paths = ["", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{LIBRARY}.{kind}"}
        for index, (path, kind) in enumerate(zip(paths, MODULES, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": WIDTH,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "include_prompt": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    weights = []
    for path, (inputs, outputs) in {"2_Dense": (WIDTH, WIDE), "3_Dense": (WIDE, WIDTH)}.items():
        (folder / path).mkdir()
        config = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": False,
            "activation_function": IDENTITY,
        }
        (folder / path / "config.json").write_text(json.dumps(config))
        weights.append(np.asarray(tiny.normal(len(weights), outputs, inputs)))
        save_file({"linear.weight": weights[-1]}, folder / path / "model.safetensors")
    return weights


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(0)
    theirs = transformers.Gemma3TextModel(their_config()).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" not in name:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return folder, theirs, write(folder, theirs)


def with_settings(embedder: eg.Embedder, settings: EmbedderSettings) -> eg.Embedder:
    other = copy.copy(embedder)
    object.__setattr__(other, "settings", settings)
    return other


def their_vectors(theirs, weights, texts, size: int = WIDTH) -> np.ndarray:
    rows = [[*TOKENIZER.encode(text), TOKENIZER.special.eos] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        x = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for weight in weights:
            x = torch.nn.functional.linear(x, torch.tensor(weight))
        x = torch.nn.functional.normalize(x, dim=-1)[:, :size]
        return torch.nn.functional.normalize(x, dim=-1).numpy()


@pytest.mark.parametrize("size", [None, 11, 1])
def test_vectors(stored, size):
    folder, theirs, weights = stored
    embedder, tokenizer = eg.load_embedder(folder, dtype="float32")
    vectors = eg.embed(embedder, tokenizer, TEXTS, truncate_dim=size, batch_size=3)
    expected = their_vectors(theirs, weights, TEXTS, size or WIDTH)
    # Of vectors of length 1, from hidden states that sum in float32 in another order.
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    one = eg.embed(embedder, tokenizer, TEXTS[2], truncate_dim=size)
    assert one.shape == (size or WIDTH,)
    np.testing.assert_allclose(one, vectors[2], atol=1e-6)
    hinted = eg.embed(embedder, tokenizer, "llo", prompt="he", truncate_dim=size)
    np.testing.assert_allclose(hinted, vectors[0], atol=1e-6)


def test_tokens_look_ahead_within_the_window(stored):
    folder, theirs, _ = stored
    model = eg.checkpoint.load_model(folder, dtype="float32")
    # A file counts both sides: 8 is 4 before and 4 after, that is closer than 5.
    assert [layer.attention.window for layer in model.config.layers] == [5, None, 5]
    tokens = np.random.default_rng(0).integers(3, TOKENIZER.vocab_size, (2, 19))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens), use_cache=False).last_hidden_state
    hidden, _ = tiny.call(model, "trunk", tiny.host(tokens, np.int32))
    np.testing.assert_allclose(hidden, expected.numpy(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="is bidirectional"):
        eg.init_cache(model.config, capacity=7)


def test_configs_both_ways(stored):
    folder, _, _ = stored
    config = eg.checkpoint.load_config(folder)
    data = write_config(config)
    assert data["sliding_window"] == WINDOW and data["use_bidirectional_attention"] is True
    assert read_config(data) == config
    again = transformers.Gemma3TextConfig(**data)
    assert again.sliding_window == 5 and again.use_bidirectional_attention


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", "{", "modules.json is damaged"),
        ("modules.json", "[]", "lists ; only Transformer, Pooling"),
        ("2_Dense/config.json", {"bias": True}, "2_Dense/config.json: bias is True"),
        ("2_Dense/config.json", '{"in_features": 1}', "2_Dense/config.json does not say bias"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Tanh"}, "activation_function is"),
        ("2_Dense/config.json", {"out_features": 3}, r"must hold linear.weight \[3, 22\]"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "only the mean is supported"),
        ("1_Pooling/config.json", {"include_prompt": False}, "leaves out prompts"),
        ("config.json", {"use_bidirectional_attention": False}, "it is not made to be averaged"),
    ],
)
def test_folders_that_are_something_else(stored, tmp_path, file, content, says):
    theirs = stored[1]
    write(tmp_path / "model", theirs)
    path = tmp_path / "model" / file
    if isinstance(content, dict):
        change(path, content)
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=says):
        eg.load_embedder(tmp_path / "model")


def test_the_tokenizer_says_whether_texts_end(stored, tmp_path):
    write(tmp_path / "model", stored[1])
    change(tmp_path / "model" / "tokenizer.json", {"post_processor": None})
    # The other file says nothing where this one is there.
    change(tmp_path / "model" / "tokenizer_config.json", {"add_eos_token": True})
    embedder, _ = eg.load_embedder(tmp_path / "model")
    assert embedder.settings.prefix == embedder.settings.suffix == ()
    usual = eg.load_embedder(stored[0])[0].settings
    assert (usual.prefix, usual.suffix) == ((TOKENIZER.special.bos,), (TOKENIZER.special.eos,))


def test_a_folder_without_modules(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"it has no modules\.json"):
        eg.load_embedder(tmp_path / "model")


def test_what_makes_no_vector(stored):
    embedder, tokenizer = eg.load_embedder(stored[0], dtype="float32")
    with pytest.raises(ValueError, match="nothing to make a vector of"):
        eg.embed(embedder, tokenizer, [])
    bare = with_settings(embedder, EmbedderSettings(prefix=(), suffix=()))
    for texts, number in (("", "1 of 1"), (["a", ""], "2 of 2")):
        with pytest.raises(ValueError, match=f"Text {number} is empty.*nothing to make a vector"):
            eg.embed(bare, tokenizer, texts)
    for size in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=f"truncate_dim must be from 1 to {WIDTH}"):
            eg.embed(embedder, tokenizer, "a", truncate_dim=size)
    with pytest.raises(ValueError, match="prompt and prompt_name were given"):
        eg.embed(embedder, tokenizer, "a", prompt="b", prompt_name="query")
    with pytest.raises(ValueError, match="no prompt called 'other'; the model has document, query"):
        eg.embed(embedder, tokenizer, "a", prompt_name="other")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        eg.embed(embedder, tokenizer, "a", batch_size=0)


def test_a_fresh_embedder():
    config = eg.variants.get("gemma3-270m")
    layers = tuple(
        replace(layer, attention=replace(layer.attention, mask_kind="bidirectional"))
        for layer in config.layers[:2]
    )
    small = replace(config, vocab=31, width=24, layers=layers)
    embedder = eqx.filter_eval_shape(eg.Embedder, small, (37, 11), key=jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    shape = eqx.filter_eval_shape(lambda embedder, tokens: embedder(tokens), embedder, tokens)
    assert shape.shape == (2, 11) and shape.dtype == jnp.float32


# What is saved.


def test_what_we_save_they_load(stored, tmp_path):
    folder, theirs, weights = stored
    embedder, tokenizer = eg.load_embedder(folder, dtype="float32")
    for _ in range(2):  # the second time in the place of the first
        eg.save(embedder, tmp_path / "ours", tokenizer=tokenizer)
    again = transformers.Gemma3TextModel.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    ).eval()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)
    np.testing.assert_array_equal(
        their_vectors(again, weights, TEXTS), their_vectors(theirs, weights, TEXTS)
    )
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")(TEXTS[0])["input_ids"]
    assert ids == [*TOKENIZER.encode(TEXTS[0]), TOKENIZER.special.eos]

    back, _ = eg.load_embedder(tmp_path / "ours", dtype="float32")
    assert back.model.config == embedder.model.config
    assert back.settings == embedder.settings
    for ours, its in zip(jax.tree.leaves(back), jax.tree.leaves(embedder), strict=True):
        np.testing.assert_array_equal(ours, its)
    # What lists the modules says what it said before, but for the wording of a class's place.
    modules, before = (
        json.loads((path / "modules.json").read_text()) for path in (tmp_path / "ours", folder)
    )
    for ours, its in zip(modules, before, strict=True):
        assert ours["path"] == its["path"]
        assert ours["type"].split(".")[-1] == its["type"].split(".")[-1]


def test_an_embedder_whose_texts_have_no_end(stored, tmp_path):
    embedder, _ = eg.load_embedder(stored[0])

    def ending(*ids: int) -> eg.Embedder:
        return with_settings(embedder, EmbedderSettings(suffix=ids))

    endless = ending()
    eg.save(endless, tmp_path / "ours", tokenizer=TOKENIZER, dtype="float16")
    back, tokenizer = eg.load_embedder(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs("hello")["input_ids"] == TOKENIZER.encode("hello")
    assert back.settings == endless.settings
    assert tokenizer.encode("hello") == TOKENIZER.encode("hello")
    eg.save(ending(270, 1), tmp_path / "other", tokenizer=TOKENIZER)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "other")
    assert theirs("hello")["input_ids"] == [*TOKENIZER.encode("hello"), 270, 1]
    with pytest.raises(CheckpointError, match=r"come the ids \[999\], and the tokenizer has 271"):
        eg.save(ending(999), tmp_path / "third", tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("x.gguf", {"tokenizer": TOKENIZER}, "every sixth layer of such a model see all"),
        ("x", {"tokenizer": TOKENIZER, "format": "orbax"}, "orbax has no place"),
        ("x", {}, "needs its tokenizer"),
    ],
)
def test_what_no_embedder_is_saved_as(stored, tmp_path, target, options, says):
    embedder, _ = eg.load_embedder(stored[0])
    with pytest.raises(CheckpointError, match=says):
        eg.save(embedder, tmp_path / target, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1_Dense").mkdir()
    (tmp_path / "mine" / "1_Dense" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="1_Dense, which is no part of a checkpoint"):
        eg.save(embedder, tmp_path / "mine", tokenizer=TOKENIZER)


# GGUF files: their names come from the table of the gguf library, not from ours.


def write_gguf(path, stored, weights, *, vocabulary=None, **options):
    _, theirs, _ = stored
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA_EMBEDDING, 3)
    arrays = {}
    for name, tensor in theirs.state_dict().items():
        # The converter of llama.cpp stores the scales of norms with the 1 that is added to them.
        array = tensor.numpy() + float(name.endswith("norm.weight"))
        arrays[names.get_name(f"model.{name}", (".weight",))] = array
    for name, weight in zip(("dense_2", "dense_3"), weights, strict=False):
        arrays[names.get_name(f"{name}.weight", (".weight",))] = weight
    sizes = {
        "context_length": 64,
        "embedding_length": WIDTH,
        "block_count": 3,
        "feed_forward_length": 29,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 10,
        "attention.value_length": 10,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": [True, False, True],
        "rope.freq_base": 1_000_000.0,
        "pooling_type": 1,
        "dense_2_feat_in": WIDTH,
        "dense_2_feat_out": WIDE,
        "dense_3_feat_in": WIDE,
        "dense_3_feat_out": WIDTH,
    }
    return gguf_files.write(
        path,
        {f"gemma-embedding.{key}": value for key, value in (sizes | options).items()},
        arrays,
        architecture="gemma-embedding",
        vocabulary=describe_vocabulary(
            TOKENIZER.vocabulary, TOKENIZER.special, TOKENIZER.vocab_size
        )
        | {"tokenizer.ggml.add_eos_token": True}
        | {f"tokenizer.ggml.{key}": value for key, value in (vocabulary or {}).items()},
    )


def test_vectors_of_a_gguf_file(stored, tmp_path):
    folder, _, weights = stored
    path = write_gguf(tmp_path / "x.gguf", stored, weights)
    ours, tokenizer = eg.load_embedder(path, dtype="float32")
    theirs, _ = eg.load_embedder(folder, dtype="float32")
    assert ours.model.config == theirs.model.config
    assert ours.settings.prefix == theirs.settings.prefix
    assert ours.settings.suffix == theirs.settings.suffix
    assert tokenizer.encode(TEXTS[2]) == TOKENIZER.encode(TEXTS[2])
    for mine, its in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # A 1 was added to the scales of norms, and taken off again.
        np.testing.assert_allclose(mine, its, rtol=0, atol=2e-7)
    assert eg.checkpoint.load_config(path) == ours.model.config


@pytest.mark.parametrize(
    ("maps", "options", "says"),
    [
        (0, {}, "the model without the linear maps after it, dense_2 and dense_3; convert_hf"),
        (2, {"pooling_type": 2}, "gemma-embedding.pooling_type is 2; only 1"),
        (2, {"dense_3_feat_in": 3}, "gemma-embedding.dense_3_feat_in is 3; only 37"),
        (2, {"attention.causal": True}, "attention.causal is True; only False"),
    ],
)
def test_gguf_files_that_are_something_else(stored, tmp_path, maps, options, says):
    path = write_gguf(tmp_path / "x.gguf", stored, stored[2][:maps], **options)
    with pytest.raises(CheckpointError, match=says):
        eg.load_embedder(path)


def test_a_gguf_file_that_writes_texts(tmp_path):
    with pytest.raises(CheckpointError, match="its architecture is not gemma-embedding"):
        eg.load_embedder(gguf_files.write(tmp_path / "x.gguf"))


@needs_llama
def test_llama_cpp_makes_the_same_vectors_of_what_we_save(tmp_path):
    # Seven layers: it has every sixth one see all.
    local, global_ = formats.CONFIGS["gemma3"].layers[4:6]
    local, global_ = (
        replace(
            layer,
            attention=replace(
                layer.attention,
                mask_kind="bidirectional",
                rope=RopeConfig(theta=theta),
                window=window,
            ),
        )
        for layer, theta, window in ((local, 10_000.0, 5), (global_, 1_000_000.0, None))
    )
    config = formats.model_config(*[local] * 5, global_, local)
    fresh = eqx.filter_eval_shape(eg.Embedder, config, (37, formats.WIDTH), key=jax.random.key(0))
    rng = np.random.default_rng(0)
    narrow = eqx.tree_at(lambda e: e.dense, fresh, fresh.dense[:1])
    with pytest.raises(CheckpointError, match="back to its width of 28; here they lead to 37"):
        eg.save(narrow, tmp_path / "x.gguf", tokenizer=TOKENIZER)
    embedder = jax.tree.map(lambda leaf: tiny.host(rng.normal(size=leaf.shape), np.float32), fresh)
    path = tmp_path / "x.gguf"
    eg.save(embedder, path, tokenizer=TOKENIZER)
    back, tokenizer = eg.load_embedder(path, dtype="float32")
    assert back.model.config == config
    assert back.settings == EmbedderSettings(max_length=None)
    ours = eg.embed(back, tokenizer, TEXTS)
    with llama(path, "--embedding", route="v1/embeddings") as ask:
        for text, mine in zip(TEXTS, ours, strict=True):
            its = ask(input=text)["data"][0]["embedding"]
            # It looks its GELU up by an argument in 16 bits.
            np.testing.assert_allclose(mine, its, rtol=0, atol=5e-4)


def test_convert_loses_nothing_of_it(stored, tmp_path):
    with pytest.raises(CheckpointError, match="comes after its model would be lost; load_embedder"):
        convert(stored[0], tmp_path / "other")
