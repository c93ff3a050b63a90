"""Vision towers in GGUF files: what llama.cpp's own library calls it all, and what goes together.

That llama.cpp computes the same from them is in `parity/test_gguf_vision.py`.
"""

from dataclasses import replace
from pathlib import Path

import formats
import gguf_files as files
import jax.numpy as jnp
import numpy as np
import pytest

import equigemma as eg
from equigemma.checkpoint import CheckpointError, load_config, load_model
from equigemma.checkpoint._convert import convert
from equigemma.checkpoint.gguf import _write as _gguf_write


gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
safetensors = pytest.importorskip("safetensors", reason='needs pip install "equigemma[hf]"')

CONFIG = formats.SEEING["3 averaged"]
HALVES = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A text model and its tower, in float32."""
    return save(formats.model(CONFIG), tmp_path_factory.mktemp("pair") / "x.gguf")


def save(model: eg.Transformer, path: Path, **options) -> Path:
    eg.save(model, path, tokenizer=formats.tokenizer(images=True), **options)
    return path


def copy(pair: Path, folder: Path, *, text: str = "x.gguf", tower: str = "mmproj-x.gguf") -> Path:
    """Both files in another folder, by other names."""
    (folder / text).write_bytes(pair.read_bytes())
    (folder / tower).write_bytes((pair.parent / "mmproj-x.gguf").read_bytes())
    return folder / text


# What is in the file.


@pytest.mark.parametrize("name", formats.SEEING)
def test_tensors_are_those_that_the_library_makes_of_their_names(name, tmp_path):
    """Names in a folder, which `transformers` reads, to those of llama.cpp, by its own table."""
    model = formats.model(formats.SEEING[name])
    save(model, tmp_path / "folder")
    save(model, tmp_path / "x.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 2)
    expected = {}
    with safetensors.safe_open(tmp_path / "folder/model.safetensors", framework="np") as folder:
        for theirs in folder.keys():
            if theirs.startswith(("vision_tower.", "multi_modal_projector.")):
                array = folder.get_tensor(theirs)
                key = theirs.replace("_weight", ".weight")
                key = names.get_name(key, try_suffixes=(".weight", ".bias"))
                expected[key] = array + 1 if key == "mm.soft_emb_norm.weight" else array
    if name == "4 averaged":
        # llama.cpp takes such names, the feed-forward being as wide as the tower, for older ones.
        for part in ("0.ffn_{}.weight", "0.ffn_{}.bias", "1.ffn_{}.weight", "1.ffn_{}.bias"):
            up, down = (f"v.blk.{part.format(half)}" for half in ("up", "down"))
            expected[up], expected[down] = expected[down], expected[up]
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "mmproj-x.gguf").tensors}
    assert found.keys() == expected.keys() and len(found) == 2 * 16 + 7
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.mark.parametrize(("name", "averaged"), [("3 averaged", 3), ("4 averaged", None)])
def test_metadata(name, averaged, tmp_path):
    vision = formats.SEEING[name].vision
    save(formats.model(formats.SEEING[name]), tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "mmproj-x.gguf").fields
    keys, tower = gguf.Keys.Clip, gguf.Keys.ClipVision
    expected = {
        gguf.Keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ],
        gguf.Keys.General.TYPE: gguf.GGUFType.MMPROJ,
        gguf.Keys.General.NAME: "x",
        gguf.Keys.General.FILE_TYPE: int(gguf.LlamaFileType.ALL_F32),
        keys.PROJECTOR_TYPE: gguf.VisionProjectorType.GEMMA3,
        keys.HAS_VISION_ENCODER: True,
        tower.USE_GELU: True,
        tower.PROJECTION_DIM: formats.WIDTH,
        tower.IMAGE_SIZE: vision.pixels,
        tower.PATCH_SIZE: vision.patch,
        tower.EMBEDDING_LENGTH: vision.width,
        tower.FEED_FORWARD_LENGTH: vision.hidden,
        tower.BLOCK_COUNT: vision.layers,
        tower.Attention.HEAD_COUNT: vision.heads,
        tower.Attention.LAYERNORM_EPS: float(np.float32(vision.epsilon)),
        tower.IMAGE_MEAN: HALVES,
        tower.IMAGE_STD: HALVES,
    } | ({} if averaged is None else {tower.Projector.SCALE_FACTOR: averaged})
    found = {key: field.contents() for key, field in fields.items() if key[:5] != "GGUF."}
    assert found == expected


@pytest.mark.parametrize(
    ("dtype", "matrix", "projection"),
    [
        ("float32", "F32", "F32"),
        ("float16", "F16", "F16"),
        # In bfloat16 not every llama.cpp can transpose it; nothing is lost in float32.
        ("bfloat16", "BF16", "F32"),
        # Rows of 15 numbers are no whole blocks: in 16 bits, as its converter has it.
        ("q8_0", "F16", "F16"),
    ],
)
def test_types(dtype, matrix, projection, tmp_path):
    save(formats.model(CONFIG), tmp_path / "x.gguf", dtype=dtype)
    tensors = gguf.GGUFReader(tmp_path / "mmproj-x.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert kinds.pop("mm.input_projection.weight") == projection
    matrices = {key for key in kinds if key.endswith(".weight") and ("attn" in key or "ffn" in key)}
    assert len(matrices) == 12 and {kinds[key] for key in matrices} == {matrix}
    assert {kind for key, kind in kinds.items() if key not in matrices} == {"F32"}


def test_a_tower_in_8_bits(tmp_path):
    wide = replace(CONFIG, vision=replace(CONFIG.vision, width=32, heads=4))
    model = formats.model(wide)
    save(model, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "x.gguf", dtype="q8_0")
    kinds = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "mmproj-x.gguf").tensors
    }
    assert kinds["v.blk.1.attn_q.weight"] == kinds["v.blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["v.blk.0.ffn_down.weight"] == kinds["mm.input_projection.weight"] == "F16"


# There and back.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", formats.SEEING)
def test_what_is_saved_is_loaded(name, dtype, tmp_path):
    model = formats.model(formats.SEEING[name], dtype)
    path = save(model, tmp_path / "x.gguf")
    for source in (path, tmp_path):
        found, tokenizer = eg.load(source, dtype=dtype)
        formats.assert_same(model, found)
        assert load_config(source) == model.config
    assert tokenizer.encode("\n\n") == [2, model.config.vision.newline]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mmproj-x.gguf", "x.gguf"]


def test_through_a_folder_and_back(pair, tmp_path):
    convert(pair, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "y.gguf")
    formats.assert_same(formats.model(CONFIG), load_model(tmp_path / "y.gguf", dtype="float32"))
    assert (tmp_path / "mmproj-y.gguf").is_file()


def test_progress_goes_through_both_files(tmp_path):
    calls: list = []
    save(formats.model(CONFIG), tmp_path / "x.gguf", progress=lambda *call: calls.append(call))
    sizes = [t.n_bytes for p in tmp_path.iterdir() for t in gguf.GGUFReader(p).tensors]
    assert {call[1] for call in calls} == {sum(sizes)} == {calls[-1][0]}
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1][2].startswith("vision.")


def test_older_names_of_feed_forwards(pair, tmp_path):
    """The first converters called the first half the second; llama.cpp goes by the shapes."""
    path = copy(pair, tmp_path)
    other = {b"ffn_up.": b"ffn_xx.", b"ffn_down.": b"ffn_up.", b"ffn_xx.": b"ffn_down."}
    arrays = {t.name: t.data for t in gguf.GGUFReader(pair.parent / "mmproj-x.gguf").tensors}
    for old, new in other.items():
        arrays = {k.replace(old.decode(), new.decode()): array for k, array in arrays.items()}
    tower(tmp_path / "mmproj-x.gguf", arrays=arrays)
    formats.assert_same(formats.model(CONFIG), load_model(path, dtype="float32"))


# Which files go together.


def test_alone_it_is_a_model_of_text(pair, tmp_path):
    (tmp_path / "y.gguf").write_bytes(pair.read_bytes())
    for source in (tmp_path / "y.gguf", tmp_path):
        found = load_model(source, dtype="float32")
        assert found.config == load_config(source) == CONFIG.text_only()
    found = load_model(tmp_path / "y.gguf", dtype="float32", vision=pair.parent / "mmproj-x.gguf")
    formats.assert_same(formats.model(CONFIG), found)


def test_text_only_leaves_the_tower_unread(pair, tmp_path):
    path = copy(pair, tmp_path)
    (tmp_path / "mmproj-x.gguf").write_bytes(b"no such file")
    assert load_model(path, text_only=True).config == CONFIG.text_only()
    with pytest.raises(CheckpointError, match=r"mmproj-x\.gguf.*does not begin with GGUF"):
        load_model(path)


def test_convert_without_a_tower(pair, tmp_path):
    path = copy(pair, tmp_path)
    text = load_model(path, dtype="float32", text_only=True)
    folder, back = tmp_path / "folder", tmp_path / "back"
    tower(tmp_path / "mmproj-x.gguf", {"clip.vision.projection_dim": 2560})
    with pytest.raises(CheckpointError, match="the vision tower of a text model of width 2560"):
        convert(path, folder)
    convert(path, folder, text_only=True)
    formats.assert_same(text, load_model(folder, dtype="float32"))
    # A folder has its tower inside.
    save(formats.model(CONFIG), folder)
    convert(folder, back, text_only=True)
    formats.assert_same(text, load_model(back, dtype="float32"))


@pytest.mark.parametrize("tower", ["mmproj-model-f16.gguf", "x-mmproj.GGUF", "Other.MMPROJ.gguf"])
def test_the_only_tower_is_taken(tower, pair, tmp_path):
    path = copy(pair, tmp_path, tower=tower)
    # One that is named after another model is not for this one.
    copy(pair, tmp_path, text="z.gguf", tower="mmproj-z.gguf")
    assert load_config(path).vision == CONFIG.vision
    with pytest.raises(CheckpointError, match=r"several \.gguf files, x\.gguf, z\.gguf; name"):
        load_config(tmp_path)


def test_of_several_towers_that_of_its_name_is_taken(pair, tmp_path):
    path = copy(pair, tmp_path, text="y.gguf", tower="mmproj-a.gguf")
    copy(pair, tmp_path, text="y.gguf", tower="mmproj-b.gguf")
    message = r"several vision towers lie beside it: mmproj-a\.gguf, mmproj-b\.gguf\. Name one wit"
    with pytest.raises(CheckpointError, match=message):
        load_model(path)
    assert load_model(path, vision=tmp_path / "mmproj-b.gguf").config == CONFIG
    copy(pair, tmp_path, text="y.gguf", tower="mmproj-y.gguf")
    assert load_config(path) == CONFIG


SOME = {"x": np.ones(2000, np.float32), "y": np.ones(5, np.float32)}


def tower(path: Path, change: dict | None = None, arrays: dict | None = None, **options) -> Path:
    """The tower of `CONFIG`, written by the library itself, with other metadata."""
    vision = CONFIG.vision
    metadata = {
        "clip.projector_type": "gemma3",
        "clip.has_vision_encoder": True,
        "clip.has_text_encoder": False,
        "clip.use_gelu": True,
        "clip.vision.projection_dim": CONFIG.width,
        "clip.vision.image_size": vision.pixels,
        "clip.vision.patch_size": vision.patch,
        "clip.vision.embedding_length": vision.width,
        "clip.vision.feed_forward_length": vision.hidden,
        "clip.vision.block_count": vision.layers,
        "clip.vision.attention.head_count": vision.heads,
        "clip.vision.attention.layer_norm_epsilon": vision.epsilon,
        "clip.vision.image_mean": HALVES,
        "clip.vision.image_std": HALVES,
        "clip.vision.projector.scale_factor": 3,
    }
    options = {"architecture": "clip", "vocabulary": {}} | options
    return files.write(path, metadata | (change or {}), arrays or SOME, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip.vision.projection_dim": 2560}, "text model of width 2560, and this one has .* 28"),
        ({"clip.projector_type": "qwen2vl_merger"}, "is 'qwen2vl_merger'; only 'gemma3', that of"),
        ({"clip.projector_type": None}, "clip.projector_type is None; only 'gemma3'"),
        ({"clip.vision.block_count": 10**9}, "claim 1000000000 layers, and it has 2 tensors"),
        ({"clip.vision.image_size": 10**6}, "a weight of [0-9]+ numbers, and its largest tensor"),
        ({"clip.vision.embedding_length": None}, "lack clip.vision.embedding_length"),
        ({"clip.vision.image_mean": [0.4] * 3}, r"clip.vision.image_mean is \[.*; only \[0.5"),
        ({"clip.use_gelu": False}, "clip.use_gelu is False; only True is supported"),
        ({"clip.vision.window_size": 7}, "options that are not supported: clip.vision.window_size"),
        (
            {"clip.vision.projector.scale_factor": 4},
            "is 4, which does not divide the 6 patches of a",
        ),
        ({"clip.vision.attention.head_count": 7}, "describe no valid tower.*heads must divide its"),
    ],
    ids=str,
)
def test_a_tower_that_does_not_fit(change, message, pair, tmp_path):
    path = copy(pair, tmp_path)
    tower(tmp_path / "mmproj-x.gguf", change)
    with pytest.raises(CheckpointError, match=f"mmproj-x.gguf cannot be loaded: .*{message}"):
        load_model(path)


def test_all_differences_of_its_tensors_at_once(pair, tmp_path):
    path = copy(pair, tmp_path)
    tower(tmp_path / "mmproj-x.gguf", arrays=SOME | {"v.post_ln.bias": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"41 difference\(s\)") as error:
        load_model(path)
    for line in (
        "mm.input_projection.weight: missing",
        "x: not a part of this model",
        "v.post_ln.bias: expected shape [15], got [3]",
    ):
        assert line in str(error.value)


def test_what_goes_with_no_tower(pair, tmp_path):
    beside = pair.parent / "mmproj-x.gguf"
    other = tmp_path / "y.gguf"
    eg.save(formats.model(formats.CONFIGS["gemma2"]), other, tokenizer=formats.tokenizer())
    copied = copy(pair, tmp_path)
    # No Gemma 2 has a tower, so what lies beside it is not its own.
    (tmp_path / "mmproj-x.gguf").rename(tmp_path / "mmproj.gguf")
    assert load_config(other) == load_model(other).config and load_config(other).vision is None
    with pytest.raises(CheckpointError, match="is 'gemma2', and only 'gemma3' is read with a vis"):
        load_model(other, vision=beside)
    with pytest.raises(CheckpointError, match="it is the vision tower of a model; load the file"):
        load_model(beside)
    with pytest.raises(CheckpointError, match="its architecture is 'gemma3', and that of a vision"):
        load_model(copied, vision=pair)
    with pytest.raises(CheckpointError, match="text_only=True contradict each other"):
        load_model(pair, vision=beside, text_only=True)
    with pytest.raises(CheckpointError, match="is a folder; name the .gguf file in it"):
        load_model(pair, vision=tmp_path)
    convert(pair, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="vision= goes with a .gguf file"):
        load_model(tmp_path / "folder", vision=beside)


def test_a_vocabulary_without_images(tmp_path):
    text = formats.model(CONFIG.text_only())
    eg.save(text, tmp_path / "x.gguf", tokenizer=formats.tokenizer())
    tower(tmp_path / "mmproj-x.gguf")
    message = "vocabulary of the text model lacks '<start_of_image>' and '<end_of_image>' and"
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "x.gguf")


# What cannot be written.


def test_a_tower_that_llama_cpp_would_take_for_another(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(CheckpointError, match="vocabulary of the text model lacks"):
        eg.save(formats.model(CONFIG), path, tokenizer=formats.tokenizer())
    moved = replace(CONFIG, vision=replace(CONFIG.vision, start=5))
    with pytest.raises(CheckpointError, match=r"another one: vision.start: 272, not 5"):
        save(formats.model(moved), path)
    older = replace(formats.CONFIGS["gemma2"], vision=CONFIG.vision)
    with pytest.raises(CheckpointError, match="knows no gemma2 with such a vision tower"):
        save(formats.model(older), path)
    assert list(tmp_path.iterdir()) == []


def test_both_files_or_none(pair, tmp_path, monkeypatch):
    path = copy(pair, tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    honest = _gguf_write._write_leaf

    def fails(writer, entry, *arguments):
        if entry.path == "vision.projection.weight":
            raise KeyboardInterrupt
        return honest(writer, entry, *arguments)

    monkeypatch.setattr(_gguf_write, "_write_leaf", fails)
    with pytest.raises(KeyboardInterrupt):
        save(formats.model(CONFIG, seed=1), path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_model_of_text_gets_no_tower_of_another(pair, tmp_path):
    path = copy(pair, tmp_path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"mmproj-x\.gguf lies beside it and would be taken"):
        save(formats.model(CONFIG.text_only()), path)
    assert path.read_bytes() == before
