"""Incremental detokenization: text from tokens that come one at a time, up to a stop string."""

from collections.abc import Sequence

from equigemma.tokenizers import StreamingDecoder, Tokenizer


class IncrementalDetokenizer:
    """Text from ids that come one at a time, up to the first stop string.

    ```python
    >>> from equigemma.text import IncrementalDetokenizer
    >>> class Bytes:
    ...     def token_bytes(self, index): return bytes([index])
    >>> text = IncrementalDetokenizer(Bytes(), ["END"])
    >>> [text.push(index) for index in b"E, EN"], text.push(ord("D")), text.stopped
    (['', 'E,', ' ', '', ''], '', True)

    ```
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._decoder = StreamingDecoder(tokenizer)
        self._stops = checked_stop_strings(stop_strings)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; from then on there is no more text."""

    def push(self, index: int) -> str:
        """The text that this token makes certain; none for −1."""
        return "" if index < 0 else self._add(self._decoder.push(index))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._add(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # Each as (end, start): the first to be complete, whatever the tokens, and the longest.
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - self._possible(text)
        self._held = text[certain:]
        return text[:certain]

    def _possible(self, text: str) -> int:
        """How many characters at the end of a text may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


def checked_stop_strings(stop_strings: Sequence[str] | str) -> tuple[str, ...]:
    """One or several stop strings as a tuple.

    **Raises:** `TypeError` if they are no strings, `ValueError` if one is empty.
    """
    stops = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise TypeError(
            f"`stop_strings` must be a list of str, got {shortened(stop_strings)}; ids that end a "
            "text are `stop`."
        )
    if not all(stops):
        raise ValueError("A stop string needs at least one character, got an empty one.")
    return tuple(stops)


def shortened(value: object) -> str:
    """How a value looks in an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
