"""A tokenizer for DeepMind's samplers and tiny vocabularies: each character is a token.

The mark of an image is one too.
"""

import re
from typing import Any

import numpy as np
from gemma import gm


_FIRST, _NUMBER = 8, 90
"""Ids of characters: between the special tokens at the start and those of turns."""


class Characters:
    """What DeepMind's samplers and tasks ask of a tokenizer.

    **Arguments:** `version`: of the tokenizer that it stands for. `answers`: texts that the first
    calls of `decode` return, whatever the ids: what a model would have had to say.
    """

    FORBIDDEN_TOKENS = ()

    def __init__(self, version: int | str = 3, answers: tuple[str, ...] = ()):
        # The samplers of 4.0.1 need a token that the tokenizer of Gemma 2 does not have.
        theirs = gm.text.Gemma4Tokenizer if version == 4 else gm.text.Gemma3Tokenizer
        self.VERSION = version
        self.special_tokens = theirs.special_tokens
        # Gemma 4 came with other ways to write a conversation.
        self.FORMAT = getattr(theirs, "FORMAT", None)
        self._answers = list(answers)

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in re.split("(<start_of_image>)", text):
            if piece == "<start_of_image>":
                ids.append(int(self.special_tokens.START_OF_IMAGE))
            else:
                ids += [_FIRST + ord(character) % _NUMBER for character in piece]
        begin = [int(self.special_tokens.BOS)] if add_bos else []
        return [*begin, *ids, *([int(self.special_tokens.EOS)] if add_eos else [])]

    def decode(self, ids: Any) -> str:
        if self._answers:
            return self._answers.pop(0)
        return " ".join(str(index) for index in np.atleast_1d(np.asarray(ids)).tolist())
