"""Prompts with images: the ids of the processor of Gemma 3 in `transformers`, but for line ends.

That processor writes two line ends on both sides of an image into the text, where they become one
token with those that stand there already. DeepMind's package puts the token of two line ends
there, "to match how the model was trained"; so do we, and the text is the same.
"""

import json
from functools import cache

import chat_models
import chat_templates
import numpy as np
import pytest
import tiny
from PIL import Image

from equigemma import nn
from equigemma.chat import Template, User
from equigemma.chat._images import with_images
from equigemma.text import IMAGE, encode_prompts
from equigemma.tokenizers import SentencePieceTokenizer
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._tokenizer_json import to_json


transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")

SPECIAL = (IMAGE, "<end_of_image>", "<image_soft_token>", "<start_of_turn>")
LINE_ENDS = ["\n" * count for count in range(1, 9)]
SIZE = 4  # soft tokens of one image
PICTURE = np.zeros((12, 12, 3), np.uint8)


@cache
def vocabulary() -> spm.Vocabulary:
    base = chat_models.tokenizer(("<start_of_turn>",)).vocabulary
    added = [*(name for name in SPECIAL if name not in base.tokens), "<mask>"]
    added += [token for token in LINE_ENDS if token not in base.tokens]
    kinds = [spm.USER_DEFINED if token in LINE_ENDS else spm.CONTROL for token in added]
    return spm.Vocabulary(
        [*base.tokens, *added],
        [*base.scores, *(-1e3 for _ in added)],
        [*base.types, *kinds],
    )


OURS = SentencePieceTokenizer(vocabulary())
START, END, SOFT = (OURS.encode(name, bos=False, special=True)[0] for name in SPECIAL[:3])
TWO = OURS.encode("\n\n", bos=False)[0]
CONFIG = tiny.seeing(tiny.GEMMA3, tiny.replace(tiny.VISION, start=START, end=END, newline=TWO))
MODEL = chat_models.model(tiny.replace(CONFIG, vocab=OURS.vocab_size))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(json.dumps(to_json(vocabulary())), encoding="utf-8")
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "extra_special_tokens": {
            "boi_token": SPECIAL[0],
            "eoi_token": SPECIAL[1],
            "image_token": SPECIAL[2],
        },
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    images = transformers.models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil()
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=SIZE)


def their_ids(processor, text: str, images: int) -> list[int]:
    pictures = [Image.fromarray(PICTURE)] * images
    output = processor(images=[pictures], text=[text], add_special_tokens=False)
    return list(output["input_ids"][0])


def our_ids(text: str, images: int) -> list[int]:
    tokens, _ = encode_prompts(MODEL, OURS, [text], [[PICTURE] * images])
    row = np.asarray(tokens)[0]
    # Theirs has one id for all soft tokens.
    return [SOFT if index < -1 else index for index in row.tolist() if index != -1][1:]


PROMPTS = [
    f"{IMAGE}hello",
    f"hello{IMAGE}",
    f"he {IMAGE} llo",
    f"a{IMAGE}b{IMAGE}c",
    f"hell <h1>{IMAGE}</h1>",
]
BESIDE_LINE_ENDS = [
    f"h\n{IMAGE}hello",
    f"h\n\n{IMAGE}\nhello",
    f"{IMAGE}{IMAGE}",
    f"h{IMAGE}\n\n\n{IMAGE}\nl",
    f"{IMAGE}\n",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_ids_of_prompts(text, processor):
    count = text.count(IMAGE)
    assert our_ids(text, count) == their_ids(processor, text, count)


@pytest.mark.parametrize("text", BESIDE_LINE_ENDS)
def test_line_ends_beside_an_image_are_tokens_of_their_own(text, processor):
    count = text.count(IMAGE)
    ours, theirs = our_ids(text, count), their_ids(processor, text, count)
    assert ours != theirs
    assert OURS.decode(ours) == OURS.decode(theirs)
    # Without their line ends they are the same.
    ends = {OURS.encode(token, bos=False)[0] for token in LINE_ENDS}
    assert [i for i in ours if i not in ends] == [i for i in theirs if i not in ends]
    # Ours are what DeepMind's package makes of the ids of the text (see tests/interop).
    pieces = text.split(IMAGE)
    before = [index for piece in pieces for index in (*OURS.encode(piece, bos=False), START)][:-1]
    expected = np.asarray(
        nn.insert_image_tokens(tiny.host(before, np.int32), MODEL.config.vision, count)
    )
    assert ours == [SOFT if index < -1 else index for index in expected.tolist()]


def test_a_conversation(processor):
    template = chat_templates.GEMMA3
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "hello "},
                {"type": "image", "image": Image.fromarray(PICTURE)},
                {"type": "text", "text": "hotel"},
            ],
        }
    ]
    output = processor.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    said = [User(f"hello {IMAGE}hotel", [PICTURE])]
    read = with_images(MODEL, Template(template).encode(OURS, said), said)
    ours = [SOFT if index < -1 else index for index in read.ids]
    assert ours == list(np.asarray(output["input_ids"]).reshape(-1))
