"""Names and phrases that the project has given up for the words of the field."""

import re
from pathlib import Path

import pytest

import equigemma


ROOT = Path(equigemma.__file__).parent
PROJECT = ROOT.parent

# What was written, as a regular expression of whole words, and what the field calls it. Names that
# other parts of the package use in another sense are given with their prefix.
RETIRED = {
    r"train\.Place": "train.DataState",
    r"train\.feed": "train.batches",
    r"train\.cut": "train.split_long",
    r"train\.pair": "train.collate_pairs",
    r"train\.Pairs": "train.PreferenceBatch",
    r"train\.with_images": "train.collate_images",
    r"train\.padding": "train.padding_fraction",
    r"train\.check_room": "train.check_disk_space",
    r"preference_loss": "dpo_loss",
    r"preference_margins": "reward_margins",
    r"with_reference": "with_reference_logprobs",
    r"length_normalised": "length_normalized",
    r"LookedUp": "PrecomputedEmbedding",
    r"look_up": "tied_lookup",
    r"NotFinite": "NonFiniteLossError",
    r"checkpointed|CheckpointedBlock": "remat, RematBlock (a checkpoint is a file)",
    r"held_out|held_out_loss": "validation, validation_loss",
    r"eight_bit": "quantize_base",
    r"data\.of_\w+": "data.from_text, from_completion, from_messages, from_record",
    r"--(eight-bit|held-out|clip|stored-dtype|samples)": "the option's new name, see CHANGELOG.md",
    r"8bit(-groups)?": "int8, int8-groupwise",
    r"Sight|sight": "MaskSpec, mask_spec",
    r"[Vv]isibility": "mask_kind",
    r"LentKeys": "SharedKVCache",
    r"ByteKVCache": "Int8KVCache",
    r"AbstractAttend|DotProductAttend": "AbstractAttentionFn, JaxAttention",
    r"slope|slopes": "gradient, cotangent",
    r"Speller": "IncrementalDetokenizer",
    r"QuantEinsum|QuantExperts|QuantEmbedding": "Int8Einsum, Int8Experts, Int8Embedding",
    r"GroupEinsum|GroupExperts|GroupEmbedding": "GroupwiseEinsum, ...",
    r"ByteGroups|NibbleGroups": "Int8Groups, Int4Groups",
    r"AbstractChoice": "AbstractSampler",
    r"at_temperature": "make_sampler(temperature=)",
    r"(?<!nn\.)DensePlusMoE": "DensePlusMoEConfig",
    r"vectors of texts": "text embeddings",
    r"files that nobody vouches for": "untrusted files",
    r"may look at whom|sees which|looked at by": "attends to",
    r"[Ff]ew bits": "quantized, int8, int4",
}

README = PROJECT / "README.md"
FILES = sorted(ROOT.rglob("*.py")) + [README] * README.is_file()


@pytest.mark.parametrize("retired", RETIRED)
def test_a_retired_word_does_not_come_back(retired):
    """The command's help texts are in the package's source, and so are its error texts."""
    pattern = re.compile(rf"(?<![\w-])(?:{retired})(?![\w-])")
    found = [
        f"{path.relative_to(PROJECT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, f"write {RETIRED[retired]}:\n" + "\n".join(found)
