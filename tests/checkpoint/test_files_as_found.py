"""Checkpoints as people have them: parts left out, joined, wrapped, split or in other dtypes."""

import json
from dataclasses import replace
from pathlib import Path

import formats
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equigemma as eg
from equigemma.checkpoint import CheckpointError, load_config, load_model
from equigemma.checkpoint._convert import convert
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.checkpoint.hf._without_effect import FIXED, WITHOUT_EFFECT


gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason='needs pip install "equigemma[hf]"'
)
orbax = pytest.importorskip("orbax.checkpoint", reason='needs pip install "equigemma[orbax]"')

# Orbax's own writers leave an event loop to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

GEMMA3 = formats.CONFIGS["gemma3"]
SEEING = formats.SEEING["3 averaged"]
EXPERTS = formats.NEWER["gemma4 experts"]


def save(config, path: Path, **options) -> Path:
    images = config.vision is not None
    eg.save(formats.model(config), path, tokenizer=formats.tokenizer(images=images), **options)
    return path


def change(folder: Path, tensors=None, **config) -> Path:
    """A folder with other tensors, made of those that it has, and other keys."""
    path = folder / "model.safetensors"
    if tensors is not None:
        made = tensors(safetensors_numpy.load_file(path))
        made = {name: np.ascontiguousarray(array) for name, array in made.items()}
        safetensors_numpy.save_file(made, path, metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def load(path: Path, **options) -> eg.Transformer:
    return load_model(path, dtype="float32", **options)


# Towers.


def text_alone(tensors):
    return {name: array for name, array in tensors.items() if name.startswith("language_model.")}


def test_weights_of_the_text_model_alone(tmp_path):
    """Trainers drop the tower and leave its description."""
    folder = change(save(SEEING, tmp_path / "x"), text_alone)
    expected = SEEING.text_only()
    for options in ({}, {"text_only": True}):
        found = load(folder, **options)
        assert found.config == expected
        np.testing.assert_array_equal(
            found.layers[1].ffw.down.weight, formats.model(SEEING).layers[1].ffw.down.weight
        )
    assert load_config(folder) == expected


def test_half_of_a_tower_is_no_tower(tmp_path):
    def without_norms(tensors):
        return {name: array for name, array in tensors.items() if "layer_norm1" not in name}

    folder = change(save(SEEING, tmp_path / "x"), without_norms)
    with pytest.raises(CheckpointError, match=r"layer_norm1\.weight: missing"):
        load(folder)
    assert load(folder, text_only=True).config == SEEING.text_only()


BROKEN = [
    {"vision_config": {"model_type": "novel_tower", "x": [1]}},
    {"vision_config": {"model_type": "siglip_vision_model", "image_size": 224}},
    {"mm_tokens_per_image": "many", "boi_token_index": None, "audio_config": {"x": 1}},
]


@pytest.mark.parametrize("keys", BROKEN)
def test_nothing_of_a_tower_matters_to_a_model_of_text(keys, tmp_path):
    folder = change(save(SEEING, tmp_path / "x"), **keys)
    with pytest.raises(CheckpointError):
        load(folder)
    assert load(folder, text_only=True).config == SEEING.text_only()
    assert load(change(folder, text_alone)).config == SEEING.text_only()


def test_keys_that_keras_hub_writes(tmp_path):
    folder = save(SEEING, tmp_path / "x")
    told = json.loads((folder / "config.json").read_text())
    around = ("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    inside = {key: told[key] for key in around}
    change(folder, vision_config=told["vision_config"] | inside, torch_dtype="mixed_bfloat16")
    formats.assert_same(load(folder), formats.model(SEEING))
    inside["mm_tokens_per_image"] = 16
    change(folder, vision_config=told["vision_config"] | inside)
    with pytest.raises(CheckpointError, match="vision_config.mm_tokens_per_image is 16; only 4"):
        load(folder)


# Keys.


@pytest.mark.parametrize("name", formats.CONFIGS)
def test_keys_without_effect(name):
    config = formats.CONFIGS[name]
    data = write_config(config)
    assert not WITHOUT_EFFECT & FIXED.keys()
    noise = {key: ["anything", 7] for key in WITHOUT_EFFECT - {"model_type"} - data.keys()}
    noise |= {key: values[-1] for key, values in FIXED.items() if key not in data}
    assert {"pretraining_tp", "temperature", "tokenizer_class", "torchscript"} <= noise.keys()
    assert noise["quantization_config"] is None and noise["pruned_heads"] is None
    assert read_config(data | noise) == config
    assert read_config(data | {"auto_map": {}, "pruned_heads": {}}) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("pruned_heads", {"0": [1]}),
        ("mlp_bias", True),
        ("embedding_multiplier", 12.0),
        ("rope_interleaved", True),
        ("num_experts", 4),
    ],
)
def test_keys_that_change_numbers_are_refused_by_name(key, value):
    with pytest.raises(CheckpointError, match=f"its {key} is|not supported: {key}"):
        read_config(write_config(GEMMA3) | {key: value})


# Numbers.


def test_floats_of_64_bits(tmp_path):
    exact = {}

    def wide(tensors):
        rng = np.random.default_rng(0)
        for name, array in tensors.items():
            exact[name] = array.astype(np.float64) + rng.normal(size=array.shape) * 1e-3
        return exact

    folder = change(save(GEMMA3, tmp_path / "x"), wide)
    for dtype in ("float32", "bfloat16"):
        found = load_model(folder, dtype=dtype)
        expected = exact["model.embed_tokens.weight"].astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(found.embedding.weight, expected)
    convert(folder, tmp_path / "y")
    formats.assert_same(load(tmp_path / "y"), load(folder))
    narrow = safetensors_numpy.load_file(tmp_path / "y" / "model.safetensors")
    assert {array.dtype for array in narrow.values()} == {np.dtype(np.float32)}


def test_floats_of_64_bits_in_a_gguf(tmp_path):
    arrays = {name: array.astype(np.float64) for name, array in gguf_files.tensors().items()}
    path = gguf_files.write(tmp_path / "x.gguf", arrays=arrays)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {"F64"}
    narrow = gguf_files.write(tmp_path / "y.gguf")
    formats.assert_same(load(path), load(narrow))
    formats.assert_same(load_model(path), load_model(narrow))


def test_each_tensor_in_a_dtype_of_its_own(tmp_path):
    kinds = [jnp.dtype("bfloat16"), np.dtype(np.float16), np.dtype(np.float32)]

    def mixed(tensors):
        return {
            name: array.astype(kinds[index % 3])
            for index, (name, array) in enumerate(sorted(tensors.items()))
        }

    stored = {}
    folder = change(save(GEMMA3, tmp_path / "x"), lambda t: stored.update(mixed(t)) or stored)
    found = load(folder)
    for name, leaf in (
        ("model.embed_tokens.weight", found.embedding.weight),
        ("model.norm.weight", found.final_norm.scale),
        ("model.layers.3.mlp.up_proj.weight", found.layers[3].ffw.gate.weight[1]),
    ):
        np.testing.assert_array_equal(leaf, stored[name].astype(np.float32))
    assert {array.dtype for array in stored.values()} == set(kinds)


# Experts.


def apart(tensors, *, joined: bool, end: str) -> dict[str, np.ndarray]:
    made = {}
    for name, array in tensors.items():
        front, _, part = name.rpartition(".")
        if part not in ("gate_up_proj", "down_proj") or not front.endswith(".experts"):
            made[name] = array
            continue
        for index, one in enumerate(array):
            parts = {part: one}
            if part == "gate_up_proj" and not joined:
                parts = dict(zip(("gate_proj", "up_proj"), np.split(one, 2), strict=True))
            made |= {f"{front}.{index}.{each}{end}": value for each, value in parts.items()}
    return made


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("end", ["", ".weight"])
def test_experts_one_by_one(joined, end, tmp_path):
    folder = save(EXPERTS, tmp_path / "x")
    change(folder, lambda tensors: apart(tensors, joined=joined, end=end))
    names = safetensors_numpy.load_file(folder / "model.safetensors")
    assert f"model.layers.0.experts.6.down_proj{end}" in names
    formats.assert_same(load(folder), formats.model(EXPERTS))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if ".3.up_proj" not in k}, r"experts\.3\.up_proj"),
        (lambda t: {k: v for k, v in t.items() if ".6." not in k}, r"expected shape \[7, "),
        (
            lambda t: {k: v[:, :-1] if ".2.down" in k else v for k, v in t.items()},
            "experts are all alike",
        ),
        (
            lambda t: {k: v.astype(np.float16) if ".2.down" in k else v for k, v in t.items()},
            "is F16 of shape .* experts are all alike",
        ),
    ],
)
def test_experts_that_are_not_all_there(damage, message, tmp_path):
    folder = save(EXPERTS, tmp_path / "x")
    change(folder, lambda tensors: damage(apart(tensors, joined=False, end="")))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# Orbax.


def tree_of(path: Path) -> dict:
    with orbax.StandardCheckpointer() as reader:
        return reader.restore(path.absolute())


WRAPPED = {
    "params": lambda tree: {"params": tree},
    "params twice": lambda tree: {"params": {"params": tree}},
    "a state": lambda tree: {
        "params": tree,
        "step": np.int32(7),
        "opt_state": {"0": {"count": np.int32(7), "mu": tree}},
    },
    "a state with variables": lambda tree: {"step": np.int32(7), "params": {"params": tree}},
}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["orbax", "orbax-flat"])
@pytest.mark.parametrize("name", WRAPPED)
def test_orbax_trees_in_others(name, format, tmp_path):
    tree = tree_of(save(GEMMA3, tmp_path / "x", format=format))
    with orbax.StandardCheckpointer() as writer:
        writer.save((tmp_path / "y").absolute(), WRAPPED[name](tree))
    found = load_model(tmp_path / "y", dtype="float32", config=GEMMA3)
    formats.assert_same(found, formats.model(GEMMA3))


# GGUF in parts.


def split(path: Path, count: int, folder: Path, name: str = "x") -> list[Path]:
    """The parts of a file, written as llama.cpp's own tool does: the first has all values."""
    reader = gguf.GGUFReader(path)
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(folder / f"{name}-{number + 1:05}-of-{count:05}.gguf")
        architecture = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(paths[-1], architecture)
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        for part in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{part}_to_file")()
        writer.close()
    return paths


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_a_gguf_in_parts(dtype, tmp_path):
    whole = save(formats.wide(GEMMA3), tmp_path / "x.gguf", dtype=dtype)
    paths = split(whole, 3, tmp_path / "parts")
    expected = load(whole)
    for source in (paths[0], tmp_path / "parts"):
        model, tokenizer = eg.load(source, dtype="float32")
        formats.assert_same(model, expected)
        assert tokenizer.encode("hello") == formats.tokenizer().encode("hello")
        assert load_config(source) == expected.config
    if dtype is not None:
        kept, alone = (load(path, quantized=True) for path in (paths[0], whole))
        assert jax.tree.structure(kept) == jax.tree.structure(alone)
        formats.assert_same(kept, alone)


def test_parts_as_the_library_cuts_them(tmp_path):
    whole = save(GEMMA3, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "gemma3", split_max_tensors=17)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    first, *others = sorted(tmp_path.glob("y-*.gguf"))
    assert len(others) == len(reader.tensors) // 17 and first.name.startswith("y-00001-of-")
    formats.assert_same(load(first), load(whole))


def test_parts_that_are_written_again_are_one_file(tmp_path):
    whole = save(GEMMA3, tmp_path / "x.gguf")
    paths = split(whole, 2, tmp_path / "parts")
    convert(paths[0], tmp_path / "y.gguf")
    formats.assert_same(load(tmp_path / "y.gguf"), load(whole))


def test_parts_with_a_vision_tower_beside(tmp_path):
    whole = save(SEEING, tmp_path / "x.gguf")
    paths = split(whole, 2, tmp_path / "parts", name="x")
    tower = tmp_path / "mmproj-x.gguf"
    tower.rename(tmp_path / "parts" / tower.name)
    assert load(paths[0]).config.vision is not None
    assert load(tmp_path / "parts").config.vision is not None


def test_parts_that_are_not_all_there(tmp_path):
    whole = save(GEMMA3, tmp_path / "x.gguf")
    paths = split(whole, 3, tmp_path / "parts")
    with pytest.raises(CheckpointError, match="load the first, x-00001-of-00003.gguf"):
        load(paths[1])
    others = split(whole, 4, tmp_path / "others")
    others[1].replace(paths[1])
    with pytest.raises(CheckpointError, match="part 1 of 4, not 1 of 3 as its name does"):
        load(paths[0])
    paths[2].replace(paths[1])
    with pytest.raises(CheckpointError, match="part 2 of 3, not 1 of 3"):
        load(paths[0])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="first of 3 parts, and x-00002-of-00003.gguf is mi"):
        load(paths[0])
    renamed = paths[0].rename(tmp_path / "parts" / "z.gguf")
    with pytest.raises(CheckpointError, match="one part of several; join them .* -00001-of-00003"):
        load(renamed)


def test_a_tensor_in_two_parts(tmp_path):
    whole = save(GEMMA3, tmp_path / "x.gguf")
    paths = split(whole, 2, tmp_path / "parts")
    again = split(whole, 1, tmp_path / "again")[0]
    reader = gguf.GGUFReader(again)
    writer = gguf.GGUFWriter(paths[1], "gemma3")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    with pytest.raises(CheckpointError, match="is in two of its parts"):
        load(paths[0])


# More rows than tokens.


def test_a_table_with_more_rows_than_the_tokenizer(tmp_path):
    config = replace(GEMMA3, vocab=formats.VOCAB + 51)
    for name in ("x", "x.gguf"):
        path = save(config, tmp_path / name)
        model, tokenizer = eg.load(path, dtype="float32")
        assert model.embedding.weight.shape[0] == formats.VOCAB + 51
        assert tokenizer.encode("hello") == formats.tokenizer().encode("hello")
