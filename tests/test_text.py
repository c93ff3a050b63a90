"""Strings in, strings out, with a model so small that it babbles."""

import pytest

import equigemma as eg
from equigemma import text
from equigemma.tokenizers import StreamingDecoder


gguf_files = pytest.importorskip("gguf_files", reason="GGUF files are written by the gguf library")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    gguf_files.write(path)
    return eg.load(path, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_list_gives_what_each_prompt_gives_alone(loaded, temperature):
    options = {"max_new_tokens": 11, "temperature": temperature, "seed": 7, "stop_tokens": ()}
    prompts = ["hello", "h", "hotel to hell"]
    together = eg.generate(*loaded, prompts, **options)
    assert together == [eg.generate(*loaded, prompt, **options) for prompt in prompts]
    assert len(set(together)) == 3


@pytest.mark.slow
def test_streamed_pieces_join_to_the_whole_text(loaded):
    options = {"max_new_tokens": 19, "temperature": 2.0, "seed": 3, "stop_tokens": ()}
    pieces = list(eg.stream(*loaded, "hello", **options))
    assert len(pieces) >= 19
    assert "".join(pieces) == eg.generate(*loaded, "hello", **options)


def test_the_seed_decides_what_is_drawn(loaded):
    texts = {
        eg.generate(*loaded, "hello", max_new_tokens=9, temperature=2.0, seed=seed)
        for seed in (1, 2, 1)
    }
    assert len(texts) == 2


@pytest.mark.slow
def test_text_ends_before_the_token_that_stops_it(loaded):
    model, tokenizer = loaded
    free = [
        int(token)
        for token in eg.sampling.stream(
            model, text.encode(tokenizer, ["hello"])[0], max_new_tokens=9
        )
    ]
    end = free.index(free[3]) + 1
    stopped = eg.generate(model, tokenizer, "hello", max_new_tokens=9, stop_tokens=[free[3]])
    assert stopped == tokenizer.decode(free[:end])


@pytest.mark.parametrize("prompt", ["", [], ["hello", ""]])
def test_an_empty_prompt_is_refused(loaded, prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        eg.generate(*loaded, prompt)


def test_a_character_of_several_tokens_comes_whole(loaded):
    _, tokenizer = loaded
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.push(index) for index in tokenizer.encode("h😀h", bos=False)]
    assert [piece for piece in pieces if piece][-2:] == ["😀", "h"]
    assert "".join(pieces) + decoder.finish() == "h😀h"
